"""The top floor: one function a verb, the same from Python and from the command line. Each joins the parts by name.

A function takes a Job, or the path of a job file and overrides, and returns what it found; nothing is printed here.
Packages are imported inside the functions: `plan` of a family needs no torch, and `new` needs nothing.
"""

from __future__ import annotations

import json as json_text
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import CannotWork, InputError, Problem, RunFailed, nearest_name
from meshwright.planning import (
    advice,
    calibrate,
    card_of_job,
    cluster_of_job,
    each,
    place,
    placed,
    plan,
    predict,
    read_job,
)
from meshwright.planning_exact import plan_exact
from meshwright.planning_serving import serving_plan, settle
from meshwright.planning_write import write_plan

if TYPE_CHECKING:
    from meshwright.job import Job
    from meshwright.launch import Started
    from meshwright.plan import Plan
    from meshwright.run import RunFolder

__all__ = [
    "advice",
    "calibrate",
    "card_of_job",
    "check",
    "cluster_of_job",
    "completion",
    "doctor",
    "explain",
    "generate",
    "layout_table",
    "new",
    "plan",
    "plan_exact",
    "predict",
    "read_job",
    "report",
    "resolved",
    "resume_command",
    "run_folder_of",
    "serve",
    "serving_plan",
    "train",
    "verify",
    "write_plan",
]

#: Sections that a run's checkpoints were made with: a resumed run must have them as they were.
OF_THE_RUN = ("model", "data", "task")

#: What decides the plan: where these have not changed, a resumed run keeps the plan that it has.
OF_THE_PLAN = ("model", "data", "cluster", "layout")


def new(*, schema: bool = False) -> str:
    """The text of a small commented job; with `schema`, the JSON Schema of job files."""
    from meshwright.job import SMALL_JOB, json_schema

    return json_text.dumps(json_schema(), indent=2) + "\n" if schema else SMALL_JOB


def check(job: Job | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the job, its model and its data, and plans it: {"model", "parameters", "layout", "plan", "data": {...}}.

    Raises InputError, or CannotWork where only the plan fails, listing every problem of all of them.
    """
    sound = read_job(job, overrides)
    survey, planned = each(lambda: _surveyed(sound), lambda: plan(sound))
    return {
        "model": planned.model,
        "parameters": planned.parameters,
        "layout": planned.chosen.layout.as_dict(),
        "plan": f"{planned.chosen.layout} on {planned.cluster}",
        "data": {key: value for key, value in asdict(survey).items() if key != "problems"},
    }


def _surveyed(job: Job) -> Any:
    from meshwright import data

    with placed(job):
        survey = data.survey(job)
        if survey.problems:
            raise InputError(survey.problems)
    return survey


def explain(job: Job | str | Path, overrides: Sequence[str] = (), keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What each value is and where it came from: [{"key", "value", "origin", "meaning"}].

    All keys unless `keys` names some; a section's name stands for all of its keys. Raises InputError for a bad job or
    an unknown key.
    """
    from meshwright.job import job_keys

    job = read_job(job, overrides, data_must_exist=False)
    meanings = job_keys()
    sections = {key.partition(".")[0] for key in meanings}
    unknown = [key for key in keys if key not in meanings and key not in sections]
    if unknown:
        known = [*meanings, *sections]
        raise InputError([Problem("command line", f"no key '{key}'", _near_key(key, known)) for key in unknown])
    values, origins = job.as_dict(), job.origins
    rows = []
    for key, meaning in meanings.items():
        section, _, name = key.partition(".")
        if not keys or key in keys or section in keys:
            row = {"key": key, "value": values[section][name], "origin": origins[key], "meaning": meaning}
            rows.append(row)
    return rows


def _near_key(key: str, known: Sequence[str]) -> str:
    same = [one for one in known if one.partition(".")[2] == key.rpartition(".")[2]]
    if same:
        return "did you mean " + " or ".join(f"'{one}'" for one in same) + "?"
    phrase = nearest_name(key, known)
    return phrase if phrase.startswith("did you mean") else "`meshwright explain JOB` lists them all"


def resolved(job: Job | str | Path, overrides: Sequence[str] = ()) -> str:
    """The job with everything filled in, as TOML."""
    from meshwright.job import job_to_toml

    return job_to_toml(read_job(job, overrides, data_must_exist=False))


def layout_table() -> dict[str, str | None]:
    """Logical axis of a parameter -> the mesh axis that splits it, None for never."""
    from meshwright.layout import AXIS_RULES

    return dict(AXIS_RULES)


def verify(job: Job | str | Path, overrides: Sequence[str] = (), *, steps: int = 20) -> dict[str, Any]:
    """Trains the job's layout and one device side by side. Raises LayoutsDisagree naming where they part."""
    from meshwright import families
    from meshwright import verify as verification

    job = read_job(job, overrides)
    with placed(job):
        families.require_trainable(job)
    return verification.run(job, card_of_job(job), cluster_of_job(job), steps=steps)


def run_folder_of(job: str | Path, run: str | Path | None = None) -> RunFolder:
    """The folder named, or runs/NAME for the job file NAME.toml."""
    from meshwright.run import RunFolder

    return RunFolder(run if run is not None else Path("runs") / Path(job).stem)


def train(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    run: str | Path | None = None,
    resume: bool = False,
    profile: str | Path | None = None,
    watch: Callable[[RunFolder, Plan, Started], None] | None = None,
) -> dict[str, Any]:
    """Trains a job into its run folder and writes its report: {"run", "step", "loss", ..., "report"}.

    The plan is made with `profile`, a file that `calibrate` wrote, where one is given.
    `watch(folder, plan, started)` is called once the processes run, and may look on until they end. Raises InputError
    where the folder holds a run and `resume` is not set (or the reverse), RunFailed with the command that resumes.
    """
    from meshwright import data, families, launch
    from meshwright.job import Job, job_to_toml

    if run is None and isinstance(job, Job):
        raise InputError(Problem("run", "a Job has no name for its run folder", 'give run="runs/name"'))
    folder = run_folder_of(job if not isinstance(job, Job) else "", run)
    again = resume_command(job, overrides, run)
    job = read_job(job, overrides)
    if job.cluster.named is not None:
        what = f"'{job.cluster.named}' is planned for, not what this machine has"
        raise CannotWork(Problem(place(job, "cluster.named"), what, "leave it out to train on this machine"))
    if job.cluster.groups:
        what = "devices of several kinds are planned for, and `train` runs those of this machine"
        raise CannotWork(Problem(place(job, "cluster.groups"), what, "leave it out to train on this machine"))
    with placed(job):
        families.require_trainable(job)
    earlier = _earlier_run(folder, resume, again)
    if earlier is not None:
        _same_run(earlier, job, folder)
    chosen = _kept_plan(folder, earlier, job) or plan(job, profile=profile)
    _make(folder)
    with placed(job):
        data.build_manifest(job, folder.manifest)  # first: a folder with a job.toml holds a run that can be resumed
    folder.write_job(job_to_toml(job))
    folder.write_plan(chosen.as_dict())
    started = launch.local(
        "meshwright.train:work",
        {"run": str(folder.path.resolve()), "resume": resume},
        chosen.chosen.layout.devices,
        folder.logs,
        interface=job.launch.interface,
        grace_seconds=60.0,  # asked to end, a run saves first
    )
    try:
        if watch is not None:
            watch(folder, chosen, started)
        results = started.wait()
    except RunFailed as error:
        folder.append_event("failure", reason=str(error.problems[0]))
        raise RunFailed(error.problems, resume=again) from error
    except (InputError, CannotWork):
        if earlier is None and not folder.events.exists():  # nothing was trained: this is no run yet
            folder.job.unlink()
        raise
    finally:
        started.stop()
    return {"run": str(folder.path), **results[0], "report": str(report(folder.path))}


def resume_command(job: Job | str | Path, overrides: Sequence[str], run: str | Path | None) -> str:
    """The command that goes on with a run."""
    name = str(job) if isinstance(job, str | Path) else f"{run}/job.toml"
    words = ["meshwright", "train", name, *overrides, *(["--run", str(run)] if run is not None else []), "--resume"]
    return shlex.join(words)


def _earlier_run(folder: RunFolder, resume: bool, again: str) -> Job | None:
    """The job of the run that the folder holds, to be resumed; None for a fresh folder."""
    from meshwright.job import load_job

    if folder.job.exists() and not resume:
        hint = f"to go on with it: {again}; or name another folder with --run DIR"
        raise InputError(Problem(str(folder.path), "holds a run already", hint))
    if resume and not folder.job.exists():
        raise InputError(Problem(str(folder.path), "holds no run to resume", "leave --resume out to start one"))
    return load_job(folder.job, data_must_exist=False) if resume else None


def _make(folder: RunFolder) -> None:
    try:
        folder.create()
    except OSError as error:
        what = f"cannot be a run folder ({error.strerror})"
        raise InputError(Problem(str(folder.path), what, "name another with --run DIR")) from error


def _same_run(earlier: Job, job: Job, folder: RunFolder) -> None:
    """Raises InputError where the job differs from the run's in what its checkpoints were made with."""
    before, now = earlier.as_dict(), job.as_dict()
    problems = [
        Problem(
            f"{section}.{key}",
            f"is {now[section][key]!r}, the run in {folder.path} was made with {value!r}",
            "name another folder with --run DIR",
        )
        for section in OF_THE_RUN
        for key, value in before[section].items()
        if now[section][key] != value
    ]
    if problems:
        raise InputError(problems)


def _kept_plan(folder: RunFolder, earlier: Job | None, job: Job) -> Plan | None:
    """The plan that a resumed run has, where nothing that decides it has changed; None where it must be made."""
    if earlier is None or not folder.plan.exists():
        return None
    before, now = earlier.as_dict(), job.as_dict()
    same = all(before[section] == now[section] for section in OF_THE_PLAN)
    same = same and all(before["train"][key] == now["train"][key] for key in ("global_batch", "precision", "compile"))
    if not same:
        return None
    from meshwright.families import read_config
    from meshwright.plan import Plan

    kept = Plan.from_dict(read_config(folder.plan))
    return kept if kept.chosen.layout.devices == cluster_of_job(job).devices else None


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    emit: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continues `prompt`; `emit` gets the text as it comes. `temperature` 0 takes the likeliest token.

    Returns {"text", "tokens", "finish_reason", "seconds"}. Raises InputError for a folder without a model.
    """
    from meshwright.engine import Engine, TextStream
    from meshwright.engine.folder import find_model
    from meshwright.serve.models.text import TextTokenizer

    folder = find_model(Path(model))
    tokenizer = TextTokenizer(folder)
    with Engine.open(folder, max_batch=1) as engine:
        ids = tokenizer.encode(prompt, add_special=True)
        stream, pieces, reason, tokens = TextStream(tokenizer.decode), [], None, 0
        begin = time.perf_counter()
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        for _, event in engine.generate([ids], **sampling):
            tokens, reason = tokens + 1, event.finish_reason
            piece = "" if reason == "stop" else stream.push(event.token)
            piece += stream.finish() if reason else ""
            pieces.append(piece)
            if emit is not None and piece:
                emit(piece)
        seconds = time.perf_counter() - begin
    return {"text": "".join(pieces), "tokens": tokens, "finish_reason": reason, "seconds": seconds}


def serve(model: str | Path, overrides: Sequence[str] = (), *, say: Callable[[str], None] = lambda _: None) -> None:
    """Serves a model until asked to end (Ctrl-C, SIGTERM). Settings: the run's [serve] section, then overrides.

    What they leave open is planned for this machine; `say` gets the plan in a line. Raises CannotWork for a model that
    does not fit, before a weight is read.
    """
    from meshwright import serve as server
    from meshwright.engine.folder import find_model
    from meshwright.job import read_serve
    from meshwright.run import RunFolder

    settings = read_serve(overrides, RunFolder(model).job)
    folder = find_model(Path(model))
    settled = settle(folder, settings)
    say(settled.said)
    figures = settled.plan.chosen.predicted
    predicted = {"tokens_per_second": figures.tokens_per_second.mid, "token_seconds": figures.tpot_seconds.mid}
    server.main(folder, settled.settings, precision=settled.precision, predicted=predicted)


def report(run: str | Path) -> Path:
    """Writes the run's self-contained HTML page and returns its path. Raises InputError where there is no run."""
    from meshwright.report import html
    from meshwright.run import RunFolder

    folder = RunFolder(run)
    for file in (folder.job, folder.plan):
        if not file.is_file():
            what = f"is no run folder: it has no {file.name}"
            raise InputError(Problem(str(folder.path), what, "name the folder that `train` made"))
    html.write_report(folder.path)
    return folder.report


def doctor() -> dict[str, Any]:
    """What this machine has, its speeds, and every socket that Meshwright listens on."""
    from meshwright import probe

    return probe.diagnose()


def completion(shell: str) -> str:
    """The completion script of bash, zsh or fish."""
    from meshwright.completion import script

    return script(shell)
