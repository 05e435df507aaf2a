"""The grammar of the command line: every verb with its arguments, help and examples. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from meshwright import __version__
from meshwright.errors import InputError, Problem

ABOUT = """\
Plans, verifies, trains and serves a model over many devices, from one job file.

  meshwright new > job.toml      a small job to start from
  meshwright plan job.toml       how to split it over this machine, and why
  meshwright train job.toml      trains it into runs/job
  meshwright serve runs/job      serves the trained model over HTTP and gRPC"""

EXIT_CODES = """\
exit codes: 0 done, 2 bad input, 3 does not fit or cannot work, 4 failed at run time, 5 layouts disagree,
            130 stopped by Ctrl-C, SIGTERM or SIGHUP (`train` saves first)"""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=110)


class _Parser(argparse.ArgumentParser):
    """argparse that raises InputError where it would print its usage and exit."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "allow_abbrev": False, "formatter_class": _Help})

    def error(self, message: str) -> NoReturn:
        raise InputError(Problem("command line", message, f"see {self.prog} --help"))


Adder = Callable[..., argparse.ArgumentParser]


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and the parser of each verb by its name."""
    parser = _Parser(prog="meshwright", description=ABOUT, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"meshwright {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", parser_class=_Parser)
    verbs: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n".join(f"  meshwright {example}" for example in examples)
        title = "example" if len(examples) == 1 else "examples"
        verbs[name] = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"{title}:\n{lines}"
        )
        return verbs[name]

    _add_job_verbs(add)
    _add_plan_verbs(add)
    _add_prediction_verbs(add)
    _add_train_verbs(add)
    _add_access_verbs(add)
    _add_launch_verbs(add)
    _add_serve_verbs(add)
    _add_report_verbs(add)
    return parser, verbs


def _add_job_verbs(add: Adder) -> None:
    verb = add("new", "print a small commented job", "new > job.toml", "new --schema > job.schema.json")
    verb.add_argument("--schema", action="store_true", help="print the JSON Schema of job files instead, for editors")

    verb = add("check", "read the job and its data, and list every problem at once", "check job.toml train.lr=1e-3")
    _takes_job(verb)

    verb = add(
        "explain",
        "show each value of the job, its origin and its meaning",
        "explain job.toml",
        "explain job.toml train.lr model.head_dim",
        "explain base.toml train.lr=1e-3 --toml",
    )
    verb.add_argument("job", metavar="JOB", help="job file")
    verb.add_argument("words", metavar="KEY|KEY=VALUE", nargs="*", help="keys to show (default: all), and overrides")
    verb.add_argument("--toml", action="store_true", help="print the resolved job as TOML")
    _takes_json(verb)


def _add_plan_verbs(add: Adder) -> None:
    verb = add(
        "plan",
        "choose the layout: whether it fits, how fast it will be, and why",
        "plan job.toml",
        "plan job.toml cluster.named=h100-sxm-80gb cluster.devices=64 --json",
        "plan job.toml --exact --ranks 0,5",
        "plan job.toml --for torchtitan --write plans/job",
        "plan job.toml --advice new",
        "plan job.toml --for megatron-lm --objective money",
        "plan job.toml --serving cluster.named=h100-sxm-80gb serve.tpot_seconds=0.03",
    )
    _takes_job(verb)
    verb.add_argument("--layout-table", action="store_true", help="only print how each logical axis is split")
    verb.add_argument(
        "--advice",
        nargs="?",
        const="some",
        choices=("new", "some", "expert"),
        metavar="EXPERIENCE",
        help="which strategy and tools suit a team that is new, has some experience (default) or is expert",
    )
    verb.add_argument("--exact", action="store_true", help="rehearse ranks of the layout, for their exact memory")
    what = "ranks to rehearse (default: one of the first, second, last and fullest stage)"
    verb.add_argument("--ranks", type=_ranks, metavar="N,N", help=what)
    verb.add_argument("--serving", action="store_true", help="plan how to serve the model, for the targets in [serve]")
    what = "framework to plan for: megatron-lm, ... (default: meshwright)"
    verb.add_argument("--for", dest="framework", metavar="FRAMEWORK", help=what)
    verb.add_argument("--objective", metavar="WORD", help="time (default), or money, with fewer devices")
    verb.add_argument("--profile", metavar="PROFILE", help="profile that `calibrate` wrote (default: the shipped one)")
    what = "write plan, page, timeline and other frameworks' configuration to DIR"
    verb.add_argument("--write", metavar="DIR", help=what)

    verb = add("verify", "train a layout and one device side by side, and compare", "verify job.toml layout.tp=2")
    _takes_job(verb)
    verb.add_argument("--steps", type=_at_least(1), default=20, metavar="N", help="steps to compare (default: 20)")


def _add_prediction_verbs(add: Adder) -> None:
    verb = add(
        "predict",
        "predict step time and memory of runs, one JSON line per case",
        "predict cases.jsonl",
        "predict cases.jsonl --profile ours.toml",
    )
    verb.add_argument("cases", metavar="CASES", help="file of cases, one JSON object per line (docs/predict.md)")
    _takes_profile(verb, "predict with")

    verb = add(
        "calibrate",
        "make a profile of constants from measured runs, one run, or this machine",
        "calibrate machine --out here.toml",
        "calibrate runs/job --out here.toml",
        "calibrate measured.jsonl --out ours.toml",
    )
    what = "machine, a run folder of 20 steps or more, or a file of measured cases (docs/calibrate.md)"
    verb.add_argument("source", metavar="SOURCE", help=what)
    verb.add_argument("--out", required=True, metavar="PROFILE", help="file to write the profile to (TOML)")
    what = "about how long to measure the machine (default: 30)"
    verb.add_argument("--seconds", type=_number(1.0, 300.0), default=30.0, metavar="S", help=what)
    _takes_profile(verb, "start from")
    _takes_json(verb)


def _add_train_verbs(add: Adder) -> None:
    verb = add(
        "train",
        "train the job as planned, into a run folder",
        "train job.toml",
        "train job.toml --run runs/second train.lr=1e-3",
        "train job.toml --resume",
    )
    _takes_job(verb)
    verb.add_argument("--run", metavar="DIR", help="run folder (default: runs/NAME of the job file)")
    verb.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run folder")
    verb.add_argument(
        "--profile", metavar="PROFILE", help="constants that `calibrate` wrote (default: the shipped ones)"
    )
    what = "return once it has started; it goes on without this terminal (see status, logs, stop)"
    verb.add_argument("--detach", action="store_true", help=what)


def _add_access_verbs(add: Adder) -> None:
    verb = add("status", "show what runs are doing", "status", "status runs/job --json")
    verb.add_argument("runs", metavar="RUN", nargs="*", help="run folders (default: those in runs/)")
    _takes_json(verb)

    verb = add("stop", "have a run save and end", "stop runs/job")
    verb.add_argument("run", metavar="RUN", help="run folder")
    _takes_json(verb)

    verb = add("logs", "print what the ranks of a run have printed", "logs runs/job", "logs runs/job --rank 1 --follow")
    verb.add_argument("run", metavar="RUN", help="run folder")
    verb.add_argument("--rank", type=_at_least(0), metavar="K", help="of this rank alone")
    verb.add_argument("--follow", action="store_true", help="go on as long as the run is at work")


def _add_launch_verbs(add: Adder) -> None:
    verb = add(
        "launch",
        "hand the planned job to a scheduler, in its own words",
        "launch job.toml --on slurm",
        "launch job.toml --on slurm --submit cluster.devices=6 cluster.devices_per_node=2",
        "launch job.toml --on kubernetes --write manifests --queue team cluster.named=h100-sxm-80gb cluster.devices=16",
    )
    _takes_job(verb)
    targets = ("slurm", "kubernetes", "ray", "yarn", "skypilot")
    verb.add_argument("--on", required=True, choices=targets, help=", ".join(targets))
    verb.add_argument("--write", metavar="DIR", help="write the files to DIR (default: show them)")
    what = "write them, by default to RUN/launch, and give them to the scheduler"
    verb.add_argument("--submit", action="store_true", help=what)
    verb.add_argument("--run", metavar="DIR", help="run folder (default: runs/NAME of the job file)")
    verb.add_argument("--image", metavar="IMAGE", help="container image (default: meshwright:VERSION)")
    verb.add_argument("--queue", metavar="NAME", help="Slurm's partition, Kueue's or YARN's queue")
    verb.add_argument(
        "--profile", metavar="PROFILE", help="constants that `calibrate` wrote (default: the shipped ones)"
    )


def _add_serve_verbs(add: Adder) -> None:
    verb = add(
        "generate",
        "continue a text with a trained model",
        'generate runs/job --prompt "def main("',
        "generate ./qwen3-folder --prompt Hello --temperature 0.8 --top-p 0.95 --seed 1",
    )
    verb.add_argument(
        "model", metavar="RUN_OR_FOLDER", help="run folder, Hugging Face folder, or URL of one in a store"
    )
    verb.add_argument("--prompt", required=True, help="text to continue; - reads it from stdin")
    verb.add_argument("--max-tokens", type=_at_least(1), default=128, metavar="N", help="tokens to add (default: 128)")
    verb.add_argument("--temperature", type=_number(0.0, 100.0), default=0.0, metavar="T", help="0 is greedy (default)")
    verb.add_argument(
        "--top-p",
        type=_number(0.0, 1.0),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens with probabilities of sum P",
    )
    verb.add_argument("--seed", type=_at_least(0), metavar="N", help="seed of the sampling (default: random)")
    _takes_json(verb)

    verb = add(
        "serve",
        "serve a trained model over HTTP and gRPC",
        "serve runs/job",
        "serve ./qwen3-folder serve.http_port=9000 serve.tp=2",
    )
    verb.add_argument(
        "model", metavar="RUN_OR_FOLDER", help="run folder, Hugging Face folder, or URL of one in a store"
    )
    verb.add_argument("overrides", metavar="serve.KEY=VALUE", nargs="*", help="settings of the [serve] section")
    verb.add_argument("--run", metavar="DIR", help="folder for logs, status and stop (with --detach: runs/serve-NAME)")
    verb.add_argument("--detach", action="store_true", help="return once it is ready; it goes on without this terminal")


def _add_report_verbs(add: Adder) -> None:
    verb = add("report", "write the HTML page of a run, and print its path", "report runs/job")
    verb.add_argument("run", metavar="RUN", help="run folder")
    _takes_json(verb)

    verb = add("doctor", "show this machine, its speeds and the sockets, and what is wrong", "doctor", "doctor --json")
    _takes_json(verb)

    verb = add("completion", "print the completion script of a shell", "completion bash > ~/.meshwright-completion")
    verb.add_argument("shell", choices=("bash", "zsh", "fish"), help="shell")


def _takes_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="job file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace the file's")
    _takes_json(parser)


def _takes_profile(parser: argparse.ArgumentParser, words: str) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--profile", metavar="PROFILE", help=f"{words} this profile (default: the one shipped)")
    chosen.add_argument("--datasheet", action="store_true", help=f"{words} data sheets alone, with no fitted constants")


def _takes_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _at_least(lowest: int) -> Any:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {lowest}, not '{text}'")
        return int(text)

    return whole_number


def _ranks(text: str) -> list[int]:
    return [_at_least(0)(word) for word in text.split(",")]


def _number(low: float, high: float) -> Any:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, not '{text}'")
        return value

    return number
