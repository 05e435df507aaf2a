"""The short shell scripts that start the parts of a job where there is no shared disk."""

from __future__ import annotations

import shlex

from meshwright.report.targets.job import ScheduledJob
from meshwright.report.targets.text import shell_words

SERVE_PORT = 8080


def driver_script(job: ScheduledJob, *, job_file: str, run: str, address: str | None, access: str | None = None) -> str:
    """Starts the driver, whose hub listens on `address`, or on the Ray cluster that starts this script (None). It
    resumes where the run folder holds a run. `access` is a file with the hub's secrets."""
    command = shell_words(["meshwright", *job.driver(job_file=job_file, run=run, address=address)])
    hub = shlex.quote(f"{run}/hub")
    return _script(
        # A volume that is given to a group opens to it what a driver that was killed has left.
        f"if [ -d {hub} ]; then chmod -R go= {hub}; fi",
        *([] if access is None else _secrets_of_hub(access, run)),
        "resume=",
        f"if [ -f {shlex.quote(f'{run}/job.toml')} ]; then resume=--resume; fi",
        # Ray sets RAY_ADDRESS, HOST:PORT, for what it starts.
        f"exec {command}" + (' launch.address="$RAY_ADDRESS"' if address is None else "") + ' ${resume:+"$resume"}',
    )


def agent_script(job: ScheduledJob, access: str, *, named_hub: bool = False) -> str:
    """Starts the agent of a node, which dials the hub that the access file names, or that of the script's argument."""
    command = f"exec python {shell_words(job.agent())}" + ' --access "$access"'
    return _script(*_private_copy(access), command + (' --hub "$1"' if named_hub else ""))


def serve_script(run: str, token: str) -> str:
    """Serves the newest checkpoint of a run on every address, to those who have the token."""
    words = ["meshwright", "serve", run, "serve.host=0.0.0.0", f"serve.http_port={SERVE_PORT}", "serve.grpc_port=0"]
    return _script(*_private_copy(token), f'exec {shell_words(words)} serve.token_file="$access"')


def _secrets_of_hub(access: str, run: str) -> list[str]:
    """The hub takes the secrets that it finds in the run folder, which only this user may read."""
    hub = shlex.quote(f"{run}/hub")
    copied = f"cat {shlex.quote(access)} > {hub}/access.json"
    return ["umask 077", f"mkdir -p {hub}", f"rm -f {hub}/access.json", copied, "umask 022"]


def _private_copy(path: str) -> list[str]:
    """A copy that only this user can read, which mounted secrets are not."""
    return ["access=$(mktemp)", f'cat {shlex.quote(path)} > "$access"']


def _script(*lines: str) -> str:
    return "\n".join(["#!/bin/sh", "set -eu", *lines, ""])
