"""Jobs with fixed secrets, and what targets make of them, which `python -m tests.report.targets.cases` writes anew."""

from __future__ import annotations

from pathlib import Path

from meshwright.report.targets import TARGETS, Access, Handout, ScheduledJob

GOLDEN = Path(__file__).with_name("golden")
GIB = 1 << 30
ACCESS = Access(
    join="7014" * 16,
    read="4ead" * 16,
    act="ac70" * 16,
    certificate="-----BEGIN CERTIFICATE-----\nMIIBfixed\n-----END CERTIFICATE-----\n",
    key="-----BEGIN PRIVATE KEY-----\nMC4fixed\n-----END PRIVATE KEY-----\n",
    token="70ce2a" * 8,
)
#: Four nodes of eight GPUs in a queue, two of them enough, and a name that no target takes as it is.
GPUS = ScheduledJob(
    name="my \"big\" job, $(4th) 'try'",
    summary="llama 32x4096 as dp8 shard8 tp4 on 32 x h100-sxm-80gb in 4 nodes",
    job_toml='[model]\nfamily = "llama"\n\n[data]\nsource = "/data/texts"\n\n[train]\nsteps = 1000\nlr = 0.0003\n',
    run="/shared/runs/big job",
    folder="/shared/100% mine/launch",
    python="/opt/meshwright/bin/python",
    nodes=4,
    nodes_min=2,
    devices=8,
    device="h100-sxm-80gb",
    resource="nvidia.com/gpu",
    cores=32,
    memory_bytes=211 * GIB + 1,
    checkpoint_bytes=120 * GIB,
    checkpoints_kept=2,
    grace_seconds=95,
    port=7474,
    image="registry.example/meshwright:0.1.0",
    version="0.1.0",
    access=ACCESS,
    serve_devices=4,
    serve_at_once=16,
    spot=True,
    queue="team-a",
    paths=("/data/texts",),
)
#: Two processes on one machine without a queue.
CORES = ScheduledJob(
    name="job",
    summary="llama 4x192 as dp2 on 2 x CPU core",
    job_toml="[train]\nsteps = 300\nlr = 0.003\n",
    run="/home/ada/runs/job",
    folder="/home/ada/runs/job/launch",
    python="/usr/bin/python3",
    nodes=1,
    nodes_min=1,
    devices=2,
    device="CPU core",
    resource="",
    cores=2,
    memory_bytes=3 * GIB,
    checkpoint_bytes=GIB // 16,
    checkpoints_kept=2,
    grace_seconds=60,
    port=7474,
    image="meshwright:0.1.0",
    version="0.1.0",
    access=ACCESS,
)
CASES = {"gpus": GPUS, "cores": CORES}


def shown(handout: Handout) -> str:
    """All of a handout as one text."""
    parts = [
        f"==> {name}{' (0600)' if name in handout.private else ''} <==\n{text}" for name, text in handout.files.items()
    ]
    submit = "".join(" ".join(command) + "\n" for command in handout.submit)
    return "\n".join([*parts, f"==> submit <==\n{submit}", "==> omitted <==", *handout.omitted, ""])


def golden(case: str, target: str) -> Path:
    return GOLDEN / f"{case}-{target}.txt"


if __name__ == "__main__":
    for case, job in CASES.items():
        for target, handout in TARGETS.items():
            golden(case, target).write_text(shown(handout(job)), encoding="utf-8")
