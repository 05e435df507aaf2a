"""The verbs, one file each: the same functions from Python and from the command line.

A function takes a Job, or the path of a job file and overrides, and returns its result; nothing is printed here.
Packages are imported inside the functions, so that a verb loads only what it needs: `plan` of a family has no torch.
"""

from meshwright.verbs.access import logs, status, stop
from meshwright.verbs.advice import advice
from meshwright.verbs.calibrate import calibrate
from meshwright.verbs.check import check
from meshwright.verbs.detach import detach
from meshwright.verbs.doctor import doctor
from meshwright.verbs.exact import plan_exact
from meshwright.verbs.explain import explain, resolved_toml
from meshwright.verbs.generate import generate
from meshwright.verbs.launch import launch
from meshwright.verbs.new import new
from meshwright.verbs.plan import layout_table, plan
from meshwright.verbs.predict import predict
from meshwright.verbs.report import report
from meshwright.verbs.serve import serve, serving_folder_of
from meshwright.verbs.serving import serving_plan
from meshwright.verbs.start import card_of_job, cluster_of_job, read_job
from meshwright.verbs.train import resume_command, run_folder_of, train
from meshwright.verbs.verify import verify
from meshwright.verbs.write import write_plan

__all__ = [
    "advice",
    "calibrate",
    "card_of_job",
    "check",
    "cluster_of_job",
    "detach",
    "doctor",
    "explain",
    "generate",
    "launch",
    "layout_table",
    "logs",
    "new",
    "plan",
    "plan_exact",
    "predict",
    "read_job",
    "report",
    "resolved_toml",
    "resume_command",
    "run_folder_of",
    "serve",
    "serving_folder_of",
    "serving_plan",
    "status",
    "stop",
    "train",
    "verify",
    "write_plan",
]
