"""A function per verb of the command line: calls the verb in `verbs` and shows its result."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meshwright import verbs
from meshwright.cli.output import say
from meshwright.errors import InputError, Problem
from meshwright.files import decode_text

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.launch import Launch
    from meshwright.plan import Plan
    from meshwright.run import RunFolder

#: Narrower screens are laid out as if they had this many columns.
LEAST_COLUMNS = 40


def run(options: argparse.Namespace) -> None:
    """Run the parsed command. Raises MeshwrightError."""
    COMMANDS[options.verb](options)


def _console() -> Console:
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise  # ReaderLeft, handled in main.py as for any other output

    screen = Screen(highlight=False)
    # rich prints nothing on a terminal of 0 columns (COLUMNS=0, some job queues).
    return screen if screen.width >= LEAST_COLUMNS else Screen(highlight=False, width=LEAST_COLUMNS)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _new(options: argparse.Namespace) -> None:
    sys.stdout.write(verbs.new(schema=options.schema))


def _check(options: argparse.Namespace) -> None:
    result = verbs.check(options.job, options.overrides)
    if options.json:
        return _print_json(result)
    print(f"{options.job}: nothing wrong")
    model = f"{result['model']}, {result['parameters']:,} parameters"
    lines = {"model": model, "plan": result["plan"], **result["data"]}
    for name, value in lines.items():
        print(f"  {name.replace('_', ' '):<18} {value:,}" if isinstance(value, int) else f"  {name:<18} {value}")


def _explain(options: argparse.Namespace) -> None:
    keys = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if options.toml:
        if keys:
            raise InputError(Problem("command line", "--toml prints the whole job", f"leave out {' '.join(keys)}"))
        sys.stdout.write(verbs.resolved_toml(options.job, overrides))
        return
    rows = verbs.explain(options.job, overrides, keys)
    if options.json:
        return _print_json(rows)
    from meshwright.files import toml_value

    shown = [
        (row["key"], "-" if row["value"] is None else toml_value(row["value"]), row["origin"], row["meaning"])
        for row in rows
    ]
    widths = [max(len(row[column]) for row in shown) for column in range(3)]
    for key, value, origin, meaning in shown:
        print(f"{key:<{widths[0]}} = {value:<{widths[1]}}  {origin:<{widths[2]}}  {meaning}")


def _plan(options: argparse.Namespace) -> None:
    if options.layout_table:
        table = verbs.layout_table()
        if options.json:
            return _print_json(table)
        for axis, mesh_axis in table.items():
            print(f"{axis:<10} {mesh_axis or '-'}")
        return
    _check_flags(options)
    if options.serving:
        return _plan_serving(options)
    if options.advice:
        return _advise(options)
    names = ("framework", "objective", "profile")
    arguments = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.exact or options.ranks is not None:
        return _plan_exact(options, arguments)
    plan = verbs.plan(options.job, options.overrides, **arguments)
    _write(plan, options)
    if options.json:
        return _print_json(plan.as_dict())
    from meshwright.report import terminal

    terminal.show_plan(plan, _console())


#: Kind of plan -> the options that it ignores.
IGNORED_OPTIONS: Mapping[str, Sequence[str]] = {
    "serving": ("advice", "exact", "ranks", "framework", "objective", "write"),
    "advice": ("exact", "ranks", "framework", "objective", "profile", "write"),
}


def _check_flags(options: argparse.Namespace) -> None:
    """Raises InputError for flags that the kind of plan would ignore."""
    for kind, ignored in IGNORED_OPTIONS.items():
        names = [name for name in ignored if getattr(options, name) not in (None, False)]
        if getattr(options, kind) and names:
            flags = ", ".join("--for" if name == "framework" else f"--{name}" for name in names)
            what = f"--{kind} does not use {flags}"
            raise InputError(Problem("command line", what, f"leave out {flags}, or --{kind}"))


def _write(plan: Plan, options: argparse.Namespace) -> None:
    if options.write is not None:
        for path in verbs.write_plan(plan, options.job, options.overrides, options.write):
            say(f"wrote {path}")


def _plan_exact(options: argparse.Namespace, arguments: dict[str, Any]) -> None:
    result = verbs.plan_exact(options.job, options.overrides, ranks=options.ranks, **arguments)
    _write(result.plan, options)
    if options.json:
        return _print_json(result.as_dict())
    from meshwright.report import terminal
    from meshwright.report.lines import exact_lines

    terminal.show_plan(result.plan, _console())
    for line in exact_lines(result.exact.as_dict()):
        print(line)


def _advise(options: argparse.Namespace) -> None:
    result = verbs.advice(options.job, options.overrides, experience=options.advice)
    if options.json:
        return _print_json(result.as_dict())
    from meshwright.report.lines import advice_lines

    for line in advice_lines(result):
        print(line)


def _plan_serving(options: argparse.Namespace) -> None:
    plan = verbs.serving_plan(options.job, options.overrides, profile=options.profile)
    if options.json:
        return _print_json(plan.as_dict())
    from meshwright.report import serving

    serving.show_serving_plan(plan, _console())


def _verify(options: argparse.Namespace) -> None:
    result = verbs.verify(options.job, options.overrides, steps=options.steps)
    if options.json:
        return _print_json(result)
    print(f"equal: {result['layout']} and one device over {result['steps']} steps in {result['precision']}")
    print(f"  largest relative difference: loss {result['loss']['relative']:.1e}, ", end="")
    print(f"gradient {result['gradient']['relative']:.1e} (tolerance {result['tolerance']:.0e})")
    if result["buffer"]["tensor"]:
        print(f"  {result['buffer']['tensor']}, which differs most of all buffers: {result['buffer']['relative']:.1e}")
    drift = result["drift"]
    allowed = f"rounding alone may reach {drift['allowed']:.1e} here"
    print(f"  where each trains on from its own weights: {drift['relative']:.1e} ({allowed})")
    if result["without_dropout"]:
        print("  compared without dropout, whose masks depend on the layout")
    if result["twin"]:
        print(f"  compared on {result['twin']}, since one process of this machine cannot hold the model itself")


def _predict(options: argparse.Namespace) -> None:
    for answer in verbs.predict(options.cases, profile=options.profile, datasheet=options.datasheet):
        print(json.dumps(answer, allow_nan=False))


def _calibrate(options: argparse.Namespace) -> None:
    start = {"profile": options.profile, "datasheet": options.datasheet}
    result = verbs.calibrate(options.source, options.out, **start, seconds=options.seconds)
    if options.json:
        return _print_json(result)
    if result["from"] != "cases":
        return _show_measured(result)
    error = result["mean_error"]
    print(f"{result['out']}: fitted to {result['rows']} runs, {len(result['skipped'])} lines left out")
    print(f"  mean error {error['before']:.1%} before, {error['held_out']:.1%} on groups of runs left out of the fit")
    for one in result["moved"]:
        print(f"  {one['constant']:<36} {one['from']:>12.5g} -> {one['to']:<12.5g} {one['unit']}")
    for regime, one in result["corrections"].items():
        print(f"  correction of {regime}: {one['points']} points, amplitude {one['amplitude']:.0%}")
    for regime, (low, high) in result["intervals"].items():
        print(f"  90 % interval of {regime}: {low:.3f} to {high:.3f} times the prediction")
    for bad in result["skipped"]:
        say(f"left out: {bad['id']}: {bad['error']}")


def _show_measured(result: Mapping[str, Any]) -> None:
    """The changes of a profile made from a run or from this machine."""
    if result["from"] == "machine":
        print(f"{result['out']}: this machine, measured for {result['seconds']:.0f} s")
    else:
        low, high = result["interval"]
        print(f"{result['out']}: {result['steps']} steps, noise {result['noise']:.1%}")
        for part in result["parts"]:
            was, now = (part[when] / part["measured"] - 1 for when in ("before", "after"))
            print(f"  {part['name']:<12} {part['measured']:.4g} s measured; predicted {was:+.0%}, now {now:+.0%}")
        for group, factor in result["factors"].items():
            print(f"  {group:<12} takes {factor:.2f} times as long as predicted")
        print(f"  90 % interval of similar layouts: {low:.3f} to {high:.3f} times the prediction")
        return
    for one in result["changed"]:
        print(f"  {one['constant']:<40} {one['from']:>10.4g} -> {one['to']:<10.4g} {one['unit']}: {one['what']}")


def _train(options: argparse.Namespace) -> None:
    if options.detach:
        return _detach(options)
    resume_with = verbs.resume_command(options.job, options.overrides, options.run)

    def watch(folder: RunFolder, plan: Plan, processes: Launch) -> None:
        from meshwright.report import terminal

        try:
            terminal.live(folder, plan, until=lambda: processes.poll() != "running")
        except KeyboardInterrupt:
            say("stopping: saving a checkpoint first")
            processes.stop()
            say(f"resume with: {resume_with}")
            raise

    arguments = {"run": options.run, "resume": options.resume, "profile": options.profile}
    result = verbs.train(options.job, options.overrides, **arguments, watch=watch)
    if options.json:
        return _print_json(result)
    for name, value in result.items():
        print(f"{name.replace('_', ' '):<24} {value:.4f}" if isinstance(value, float) else f"{name:<24} {value}")


def _detach(options: argparse.Namespace) -> None:
    words = ["train", options.job, *options.overrides]
    words += [word for name in ("run", "profile") if (value := getattr(options, name)) for word in (f"--{name}", value)]
    folder = verbs.run_folder_of(options.job, options.run).path
    result = verbs.detach([*words, *(["--resume"] if options.resume else [])], folder)
    if options.json:
        return _print_json(result)
    _show_detached(result)


def _show_detached(result: Mapping[str, Any]) -> None:
    say(f"{result['run']} is at work, process {result['pid']}")
    for verb in ("status", "logs", "stop"):
        say(f"  meshwright {verb} {shlex.quote(result['run'])}")


def _status(options: argparse.Namespace) -> None:
    runs = verbs.status(options.runs)
    if options.json:
        return _print_json(runs)
    from meshwright.report.lines import status_lines

    for line in status_lines(runs):
        print(line)


def _stop(options: argparse.Namespace) -> None:
    result = verbs.stop(options.run)
    if options.json:
        return _print_json(result)
    at = "" if result["step"] is None else f" at step {result['step']} of {result['steps']}"
    print(f"{result['run']}: {result['state']}{at}")


def _logs(options: argparse.Namespace) -> None:
    for name, line in verbs.logs(options.run, rank=options.rank, follow=options.follow):
        print(line if options.rank is not None else f"{name}: {line}", flush=options.follow)


def _launch(options: argparse.Namespace) -> None:
    names = ("on", "write", "submit", "run", "image", "queue", "profile")
    result = verbs.launch(options.job, options.overrides, **{name: getattr(options, name) for name in names})
    if options.json:
        return _print_json(result)
    for one in result["omitted"]:
        say(f"{options.on} is not told: {one}")
    if result["folder"] is None:
        for name, text in result["files"].items():
            print(f"==> {name} <==\n{text}")
        secret = f", {', '.join(result['private'])} with the job's secrets too" if result["private"] else ""
        return say(f"nothing was written: --write DIR writes these files{secret}")
    for name in (*result["files"], *result["private"]):
        say(f"wrote {result['folder']}/{name}")
    if result["answer"] is not None:
        return print(result["answer"].rstrip())
    for command in result["commands"]:
        print(command)


def _prompt_of_stdin() -> str:
    try:
        return decode_text(sys.stdin.buffer.read())
    except UnicodeDecodeError as error:
        raise InputError(Problem("--prompt", f"stdin is not UTF-8 text: byte {error.start + 1}")) from error
    except ValueError as error:
        raise InputError(Problem("--prompt", f"stdin {error}", "convert it to UTF-8")) from error


def _generate(options: argparse.Namespace) -> None:
    prompt = _prompt_of_stdin() if options.prompt == "-" else options.prompt

    def emit(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    result = verbs.generate(
        options.model,
        prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        emit=None if options.json else emit,
    )
    if options.json:
        return _print_json(result)
    print()


def _serve(options: argparse.Namespace) -> None:
    if not options.detach:
        return verbs.serve(options.model, options.overrides, run=options.run, say=say)
    folder = verbs.serving_folder_of(options.model, options.run)
    words = ["serve", options.model, *options.overrides, "--run", str(folder)]
    result = verbs.detach(words, folder, ready=folder / "addresses.json")
    _show_detached(result)
    sys.stdout.write((folder / "addresses.json").read_text())


def _report(options: argparse.Namespace) -> None:
    path = str(verbs.report(options.run))
    _print_json({"report": path}) if options.json else print(path)


def _doctor(options: argparse.Namespace) -> None:
    result = verbs.doctor()
    if options.json:
        return _print_json(result)
    from meshwright.report import terminal

    terminal.show_doctor(result, _console())


def _completion(options: argparse.Namespace) -> None:
    from meshwright.cli.completion import script

    sys.stdout.write(script(options.shell))


#: Verb -> its function.
COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "new": _new,
    "check": _check,
    "explain": _explain,
    "plan": _plan,
    "predict": _predict,
    "calibrate": _calibrate,
    "verify": _verify,
    "status": _status,
    "stop": _stop,
    "logs": _logs,
    "train": _train,
    "launch": _launch,
    "generate": _generate,
    "serve": _serve,
    "report": _report,
    "doctor": _doctor,
    "completion": _completion,
}
