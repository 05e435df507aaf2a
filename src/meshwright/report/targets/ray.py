"""Ray: a script that submits the job to a Ray cluster that runs already."""

from __future__ import annotations

from meshwright.report.targets.job import Handout, ScheduledJob, missing_paths
from meshwright.report.targets.scripts import driver_script
from meshwright.report.targets.text import comments, not_said, shell_words

SCRIPT, DRIVER = "submit.sh", "driver.sh"
#: What the script refuses to go on without, and how to get it.
TOKEN = """\
# Ray's jobs run any code: the cluster must ask for its token, and this script must have it.
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
  echo "no token of the Ray cluster: put it into ~/.ray/auth_token (on the cluster: ray get-auth-token)" >&2
  exit 2
fi
export RAY_AUTH_MODE=token
"""


def handout(job: ScheduledJob) -> Handout:
    """submit.sh, and what it submits: driver.sh and job.toml."""
    omitted = [
        *missing_paths(job, "on every node"),
        f"the run folder: it is {job.run} on the node that runs the driver, which must outlive the job",
        f"nodes: Meshwright asks for {job.nodes} x {job.devices} devices when it starts, and says what lacks",
        "the container image: the nodes need Meshwright and the driver's version of Ray",
    ]
    if job.queue:
        omitted.append(f"the queue {job.queue}: Ray has none")
    words = ["ray", "job", "submit", "--submission-id", job.short_name, "--working-dir", "."]
    submit = shell_words([*words, "--entrypoint-num-cpus", "0", "--", "sh", DRIVER])
    about = [f"{job.name}: {job.summary}", *not_said(omitted)]
    script = "\n".join(
        [
            "#!/bin/sh",
            comments(about).rstrip("\n"),
            "set -eu",
            'cd "$(dirname "$0")"',
            TOKEN.rstrip("\n"),
            ': "${RAY_API_SERVER_ADDRESS:?is not set: give the address of the dashboard, such as http://HEAD:8265}"',
            f"exec {submit}",
            "",
        ]
    )
    driver = driver_script(job, job_file="job.toml", run=job.run, address=None)
    files = {SCRIPT: script, DRIVER: driver, "job.toml": job.job_toml}
    return Handout(files, tuple(omitted), (("sh", SCRIPT),))
