"""A job is handed to schedulers as it was planned: counts, the job file, secrets, and what is refused."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright import verbs
from meshwright.cli.main import main
from meshwright.cli.parser import build_parser
from meshwright.errors import CannotWork, InputError, RunFailed
from meshwright.job import SMALL_JOB, Job, load_job
from meshwright.report.targets import TARGETS
from meshwright.verbs.launch import new_access, scheduled
from meshwright.verbs.start import cluster_of_job

GPUS = ("cluster.named=h100-sxm-80gb", "cluster.devices=16", "cluster.spot=true")
MIXED = 'cluster.groups=[{named="l4",devices=2},{named="t4",devices=2}]'
CORES = ("cluster.devices=6", "cluster.devices_per_node=2", "train.lr=1e-3")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file beside its data, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("word " * 4000)
    path = tmp_path / "my job.toml"
    path.write_text(SMALL_JOB.replace('"stdlib"', '"texts.txt"'))
    return path


def values(path: Path, overrides: tuple[str, ...]) -> tuple[Any, Any]:
    """What a scheduler is told, and the plan."""
    job = load_job(path, overrides, data_must_exist=False)
    planned, places = verbs.plan(job), {"name": path.stem, "run": path.parent / "run", "folder": path.parent}
    return scheduled(job, planned, cluster_of_job(job), **places), planned


def test_counts_are_the_plans(small: Path) -> None:
    on_gpus, plan = values(small, GPUS)
    assert on_gpus.nodes * on_gpus.devices == plan.chosen.layout.devices
    assert (on_gpus.devices, on_gpus.resource, on_gpus.device) == (8, "nvidia.com/gpu", "h100-sxm-80gb")
    assert on_gpus.spot and on_gpus.nodes_min == on_gpus.nodes
    state = max(stage.weights + stage.optimizer for stage in plan.chosen.memory)
    assert on_gpus.memory_bytes > 8 * state  # the copy that a checkpoint is written from

    on_cores, plan = values(small, CORES)
    assert (on_cores.nodes, on_cores.devices, on_cores.resource) == (3, 2, "")
    assert on_cores.memory_bytes >= 2 * plan.chosen.predicted.intervals["peak_bytes"][1]
    assert on_cores.checkpoint_bytes == 16 * plan.parameters


def test_fewer_devices_that_are_enough_are_fewer_nodes(small: Path) -> None:
    for least, nodes in ((1, 1), (2, 1), (3, 2), (6, 3)):
        told, _ = values(small, (*CORES, f"launch.devices_min={least}"))
        assert (told.nodes_min, told.nodes) == (nodes, 3)
        assert f"devices_min = {least}" in told.job_toml
        assert ("#SBATCH --nodes=2-3\n" in TARGETS["slurm"](told).files["job.sbatch"]) == (nodes == 2)


def test_larger_models_get_more_memory_disk_and_time(small: Path) -> None:
    larger = ("model.hidden=4096", "model.layers=32", "model.heads=32", "model.kv_heads=8", "model.ffn=14336")
    little, much = values(small, GPUS)[0], values(small, (*GPUS, *larger))[0]
    assert much.memory_bytes > little.memory_bytes and much.storage_bytes > little.storage_bytes
    assert much.grace_seconds > little.grace_seconds >= 60


@pytest.mark.parametrize("overrides", [GPUS, CORES])
def test_the_job_file_is_the_job_without_its_place(small: Path, overrides: tuple[str, ...]) -> None:
    told, plan = values(small, overrides)
    there = small.parent / "there.toml"
    there.write_text(told.job_toml)
    sent, here = load_job(there).as_dict(), load_job(small, overrides).as_dict()
    assert (sent["cluster"].pop("devices"), sent["cluster"].pop("devices_per_node")) == (
        plan.chosen.layout.devices,
        told.devices,
    )
    for key in ("devices", "devices_per_node"):
        del here["cluster"][key]
    assert sent == here
    assert told.paths == (str(small.parent / "texts.txt"),)  # the source is a whole path, wherever the file lies


def test_access_is_new_each_time_and_its_certificate_is_the_keys(tmp_path: Path) -> None:
    first, second = new_access(), new_access()
    assert len({one for access in (first, second) for one in (access.join, access.read, access.act, access.token)}) == 8
    (tmp_path / "certificate").write_text(first.certificate)
    (tmp_path / "key").write_text(first.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    (tmp_path / "key").write_text(second.key)
    with pytest.raises(ssl.SSLError):
        context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")


def test_files_are_written_again_but_not_over_what_a_person_changed(small: Path) -> None:
    result = verbs.launch(small, GPUS, on="kubernetes", write="out", queue="team", image="here/mine:1")
    out = small.parent / "out"
    assert result["folder"] == str(out) and result["private"] == ["secret.yaml"]
    assert (out / "secret.yaml").stat().st_mode & 0o777 == 0o600
    assert result["files"]["jobset.yaml"] == (out / "jobset.yaml").read_text()
    (jobset,) = yaml.safe_load_all((out / "jobset.yaml").read_text())
    assert jobset["metadata"]["name"] == "my-job"
    assert jobset["metadata"]["annotations"]["meshwright/name"] == "my job"
    verbs.launch(small, GPUS, on="kubernetes", write="out")
    assert "kueue" not in (out / "jobset.yaml").read_text()
    (out / "jobset.yaml").write_text("tuned by hand")
    with pytest.raises(InputError, match=r"jobset\.yaml: was changed since the launch wrote it"):
        verbs.launch(small, GPUS, on="kubernetes", write="out")


@pytest.mark.parametrize("target", TARGETS)
def test_the_screen_shows_no_secret(small: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(small), "--on", target, *CORES, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["target"] == target and shown["folder"] is None and shown["commands"] and shown["omitted"]
    assert main(["launch", str(small), "--on", target, *CORES]) == 0
    out, talk = capsys.readouterr()
    assert "PRIVATE KEY" not in out + talk + json.dumps(shown)
    for name in shown["files"]:
        assert f"==> {name} <==" in out
    assert f"{target} is not told: " in talk and "--write DIR" in talk
    assert {path.name for path in small.parent.iterdir()} == {small.name, "texts.txt"}


def test_the_grammar_has_every_target() -> None:
    action = next(one for one in build_parser()[1]["launch"]._actions if one.dest == "on")
    assert tuple(action.choices or ()) == tuple(TARGETS)


@pytest.mark.parametrize(
    ("overrides", "options", "error", "expected"),
    [
        ((), {"on": "slrum"}, InputError, "no scheduler 'slrum'; did you mean 'slurm'?"),
        (("cluster.named=tpu-v5p",), {"on": "ray"}, CannotWork, "'tpu-v5p' can only be planned for"),
        (
            ('cluster.groups=[{named="l4",devices=2},{named="t4",devices=2}]',),
            {"on": "ray"},
            CannotWork,
            "devices of several kinds",
        ),
        (("layout.tp=5",), {"on": "slurm"}, CannotWork, "layout.tp"),
        (CORES, {"on": "yarn", "submit": True}, InputError, "no program 'yarn' is here"),
        (CORES, {"on": "skypilot", "submit": True}, InputError, "no program 'sky' is here"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    small: Path, overrides: tuple[str, ...], options: dict[str, Any], error: type[Exception], expected: str
) -> None:
    before = sorted(small.parent.rglob("*"))
    with pytest.raises(error, match=expected.replace("?", r"\?")):
        verbs.launch(small, overrides, **options)
    assert sorted(small.parent.rglob("*")) == before


def test_a_job_of_python_needs_a_run_folder() -> None:
    model = {"family": "llama", "layers": 2, "hidden": 48, "heads": 6, "ffn": 96, "vocab": 300}
    job = Job(model=model, data={"seq_len": 16}, train={"steps": 1, "lr": 1.0, "global_batch": 2})
    with pytest.raises(InputError, match="has no name for its run folder"):
        verbs.launch(job, on="slurm")
    assert "--job-name=first" in verbs.launch(job, on="slurm", run="runs/first")["files"]["job.sbatch"]


def test_submitting_says_what_the_scheduler_says(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's way in is a shell script, which refuses to start without the cluster's token."""
    monkeypatch.setenv("HOME", str(small.parent))
    with pytest.raises(RunFailed, match=r"sh submit\.sh: ended with 2: no token of the Ray cluster"):
        verbs.launch(small, CORES, on="ray", submit=True)
    assert (small.parent / "runs" / "my job" / "launch" / "submit.sh").exists()


@pytest.mark.parametrize("words", [{"queue": "a\n#SBATCH --exclusive"}, {"image": "a\tb"}, {"run": "runs/a\nb"}])
def test_what_would_begin_a_line_of_its_own_in_a_script_is_refused(small: Path, words: dict[str, str]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(words))}: .* has a control character"):
        verbs.launch(small, on="slurm", **words)  # type: ignore[arg-type]
