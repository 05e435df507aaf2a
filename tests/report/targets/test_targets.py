"""What is written for schedulers: as it was, taken by each target's schema and rules, and refused once it is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.report.targets import TARGETS, Handout, ScheduledJob
from meshwright.report.targets.job import LONGEST_NAME, label_of
from meshwright.report.targets.text import comments, yaml_text
from tests.report.targets.cases import CASES, CORES, GPUS, golden, shown
from tests.report.targets.validators import (
    problems_of_object,
    problems_of_sbatch,
    problems_of_task,
    problems_of_yaml,
    problems_of_yarnfile,
)

PROGRAMS = Path(sys.executable).parent  # of shellcheck and hadolint, as their packages install them


def validator(name: str) -> Callable[[str], list[str]] | None:
    """What judges a file of that name; None for those that are no scheduler's."""
    by_name = {"Yarnfile": problems_of_yarnfile, "task.yaml": problems_of_task, "job.sbatch": problems_of_sbatch}
    return by_name.get(name) or (problems_of_yaml if name.endswith(".yaml") else None)


def files(target: str, job: ScheduledJob) -> dict[str, str]:
    return dict(TARGETS[target](job).files)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_is_as_it_was(case: str, target: str) -> None:
    """After a change that is meant: python -m tests.report.targets.cases, and read the difference."""
    assert shown(TARGETS[target](CASES[case])) == golden(case, target).read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_target_takes_it(case: str, target: str) -> None:
    judged = {name: judge(text) for name, text in files(target, CASES[case]).items() if (judge := validator(name))}
    assert judged == {name: [] for name in judged}
    assert judged or target == "ray"  # which takes a script


#: (file, what it says, what it says wrongly): misspelt, of a wrong type, or against a rule.
MUTATIONS = [
    ("jobset.yaml", "replicatedJobs:", "replicatedJob:"),
    ("jobset.yaml", "completionMode: Indexed", "completionMode: indexed"),
    ("jobset.yaml", "parallelism: 4", 'parallelism: "4"'),
    ("jobset.yaml", "operator: All", "operator: Every"),
    ("jobset.yaml", "      - driver\n", "      - drivers\n"),
    ("jobset.yaml", "containerName: driver", "containerName: main"),
    ("jobset.yaml", "restartPolicy: Never", "restartPolicy: Always"),
    ("jobset.yaml", "restartPolicy: Never", "restartPolicy: OnFailure"),
    ("jobset.yaml", "suspend: true", "suspend: yes please"),
    ("jobset.yaml", "mountPath:", "mountpath:"),
    ("jobset.yaml", "apiVersion: jobset.x-k8s.io/v1alpha2", "apiVersion: jobset.x-k8s.io/v1"),
    ("jobset.yaml", "kueue.x-k8s.io/queue-name: team-a", 'kueue.x-k8s.io/queue-name: "team a"'),
    ("jobset.yaml", '"216065Mi"', '"216065 MiB"'),
    ("trainjob.yaml", "kind: TrainingRuntime\n    name:", "kind: Runtime\n    name:"),
    ("trainjob.yaml", "numNodes: 1\n  template", "nodes: 1\n  template"),
    ("trainjob.yaml", "- name: node", "- name: trainer"),
    ("trainjob.yaml", "mlPolicy:\n    numNodes: 1", "mlPolicy:\n    numNodes: 0"),
    ("job.yaml", 'job-min-parallelism: "2"', 'job-min-parallelism: "4"'),
    ("job.yaml", "completions: 4", "completions: 3"),
    ("rayjob.yaml", "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
    ("rayjob.yaml", "shutdownAfterJobFinishes: true", "shutdownAfterJobFinish: true"),
    ("rayjob.yaml", "minReplicas: 2", "minReplicas: 5"),
    ("rayjob.yaml", "mode: token", "mode: secret"),
    ("rayjob.yaml", 'rayVersion: "2.60.0"', 'rayVersion: "2.9.0"'),
    ("rayjob.yaml", "backoffLimit: 3", "backoffLimit: -1"),
    ("rayservice.yaml", "rayClusterConfig:", "rayClusterSpec:"),
    ("rayservice.yaml", "min_replicas: 0", "min_replica: 0"),
    ("serve.yaml", "timeoutSeconds: 600", 'timeoutSeconds: "600"'),
    ("serve.yaml", "name: http1", "name: http"),
    ("serve.yaml", 'max-scale: "4"', 'max-scale: "-1"'),
    ("serve.yaml", "    spec:\n      timeoutSeconds", "    spec:\n      restartPolicy: Never\n      timeoutSeconds"),
    ("common.yaml", "port: 7474", "port: 74740"),
    ("common.yaml", "- ReadWriteOnce", "- ReadWriteTwice"),
    ("common.yaml", "clusterIP: None", "clusterIp: None"),
    ("secret.yaml", "stringData:", "stringdata:"),
    ("Yarnfile", '"dependencies": [\n        "driver"', '"dependencies": [\n        "drivers"'),
    ("Yarnfile", '"memory": "216065"', '"memory": 216065'),
    ("Yarnfile", '"restart_policy": "ON_FAILURE"', '"restart_policy": "on failure"'),
    ("Yarnfile", '"src_file"', '"source_file"'),
    ("Yarnfile", '"queue"', '"queueName"'),
    ("task.yaml", "use_spot: true", 'use_spot: "true"'),
    ("task.yaml", "num_nodes: 4", "nodes: 4"),
    ("task.yaml", "num_nodes: 4", "num_nodes: 0"),
    ("task.yaml", "max_restarts_on_errors: 6", "max_restarts_on_errors: -1"),
    ("task.yaml", "mode: MOUNT_CACHED", "mode: CACHED"),
    ("task.yaml", "accelerators:", "accelerator:"),
    ("job.sbatch", "#SBATCH --cpus-per-task", "#SBATCH --cpu-per-task"),
    ("job.sbatch", "--nodes=2-4", "--nodes=two"),
    ("job.sbatch", "--signal=B:USR1@95", "--signal=B@95"),
    ("job.sbatch", "#SBATCH --requeue", "echo\n#SBATCH --requeue"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), MUTATIONS, ids=lambda value: value.strip()[:32])
def test_a_wrong_file_is_caught(name: str, right: str, wrong: str) -> None:
    written = {name: text for target in TARGETS for name, text in files(target, GPUS).items()}
    judge = validator(name)
    assert judge is not None and right in written[name]
    assert judge(written[name].replace(right, wrong, 1))


def test_an_object_of_no_kind_is_caught() -> None:
    assert problems_of_object({"apiVersion": "v1", "kind": "Pods"}) == ["no kind Pods of v1"]


def scripts() -> list[tuple[str, str]]:
    """(name, text) of every script, those inside other files too."""
    found = []
    for case, job in CASES.items():
        for target, handout in TARGETS.items():
            texts = dict(handout(job).files)
            if target == "kubernetes":
                texts = next(yaml.safe_load_all(texts["common.yaml"]))["data"]
            if target == "skypilot":
                texts["run.sh"] = "#!/bin/bash\n" + yaml.safe_load(texts["task.yaml"])["run"]
            found += [
                (f"{case}-{target}-{name}", text) for name, text in texts.items() if name.endswith((".sh", ".sbatch"))
            ]
    return found


def test_shellcheck_finds_nothing_in_any_script(tmp_path: Path) -> None:
    written = scripts()
    for name, text in written:
        (tmp_path / name).write_text(text)
    command = [str(PROGRAMS / "shellcheck"), "--enable=quote-safe-variables", *(name for name, _ in written)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert {name.rpartition("-")[2] for name, _ in written} == {
        *("job.sbatch", "driver.sh", "agent.sh", "serve.sh", "run.sh", "submit.sh"),
    }


def test_shellcheck_would_find_a_name_without_quotes(tmp_path: Path) -> None:
    text = dict(scripts())["gpus-slurm-job.sbatch"]
    (tmp_path / "job.sbatch").write_text(text.replace('mkdir -p -- "$run"', "mkdir -p -- $run"))
    done = subprocess.run([str(PROGRAMS / "shellcheck"), "job.sbatch"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 1


def test_hadolint_finds_nothing_in_the_container_file(tmp_path: Path) -> None:
    """It is not built here: it needs a base image from a registry of images."""
    (tmp_path / "Containerfile").write_text(files("kubernetes", GPUS)["Containerfile"])
    command = [str(PROGRAMS / "hadolint"), "Containerfile"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60)


@given(NAMES)
@settings(max_examples=200, deadline=None)
def test_any_name_becomes_one_that_all_targets_take(name: str) -> None:
    label = label_of(name)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label) and len(label) <= LONGEST_NAME
    assert label_of(label) == label


@given(NAMES)
@settings(max_examples=8, deadline=None)
def test_any_name_is_kept_as_it_is_beside_it(name: str) -> None:
    """Whatever characters it holds, files are read back with it, and no line of a script is made of it."""
    job = replace(GPUS, name=name, run=f"/runs/{name}")
    for document in yaml.safe_load_all(files("kubernetes", job)["jobset.yaml"]):
        assert document["metadata"]["annotations"]["meshwright/name"] == name
        assert problems_of_object(document) == []
    assert json.loads(files("yarn", job)["Yarnfile"])["description"].startswith(name)
    lines = files("slurm", job)["job.sbatch"].split("\n")
    other = files("slurm", replace(GPUS, run="/runs/x"))["job.sbatch"].split("\n")
    assert len(lines) - sum(line.count("\n") for line in (f"/runs/{name}",)) * 2 == len(other)


def test_names_that_are_cut_differ() -> None:
    assert label_of("a" * 60 + "1") != label_of("a" * 60 + "2")
    assert label_of("???") != label_of("!!!")
    assert label_of('My "big" job') == "my-big-job" and label_of("7b") == "job-7b" and label_of("job") == "job"


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=40), max_size=4))
@settings(max_examples=100, deadline=None)
def test_yaml_is_read_back(value: dict[str, str]) -> None:
    assert yaml.safe_load(yaml_text([(["a\nb", "\x85 c"], {"key": value})])) == {"key": value}


@pytest.mark.parametrize(
    "text",
    ["1e3", "0o17", "0x1F", "1_000", "on", "NO", "y", "~", "", "=", "1:30", ".inf", "Null", "2026-01-01", "<<", "- a",
     "a: b", "#x", "%x", "@x", "'", '"', " a", "a ", "true", "+1", "0.5", "*a", "&a", "!a", "|", "NaN"],
)  # fmt: skip
def test_yaml_quotes_what_a_reader_may_take_for_something_else(text: str) -> None:
    """Readers of YAML 1.1 and 1.2 differ in what is a number, a truth value or nothing."""
    line = yaml_text([([], {"key": text})])
    assert line == f"key: {json.dumps(text)}\n"


def test_a_comment_stays_a_comment() -> None:
    assert comments(["a\nb: 1", "c\u2028d", ""]) == "# a\\nb: 1\n# c\\u2028d\n#\n"


@pytest.mark.parametrize("target", TARGETS)
def test_secrets_are_only_in_private_files(target: str) -> None:
    handout: Handout = TARGETS[target](GPUS)
    holders = {
        name
        for name, text in handout.files.items()
        if any(word in text for word in (GPUS.access.join, GPUS.access.act, GPUS.access.token, "PRIVATE KEY"))
    }
    assert holders == set(handout.private)


def test_agents_do_not_get_the_private_key_of_the_hub() -> None:
    for document in yaml.safe_load_all(files("kubernetes", GPUS)["jobset.yaml"]):
        for job in document["spec"]["replicatedJobs"]:
            volumes = job["template"]["spec"]["template"]["spec"]["volumes"]
            keys = [item["key"] for volume in volumes if "secret" in volume for item in volume["secret"]["items"]]
            assert keys == {"driver": ["access.json"], "agent": ["agents.json"]}[job["name"]]


def test_the_hub_is_found_by_the_name_of_its_service() -> None:
    config, service, _ = yaml.safe_load_all(files("kubernetes", GPUS)["common.yaml"])
    (secret,) = yaml.safe_load_all(files("kubernetes", GPUS)["secret.yaml"])
    (jobset,) = yaml.safe_load_all(files("kubernetes", GPUS)["jobset.yaml"])
    driver = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert service["spec"]["selector"].items() <= driver["metadata"]["labels"].items()
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert json.loads(secret["stringData"]["agents.json"])["address"] == address
    assert "launch.address=0.0.0.0:7474" in shlex.split(config["data"]["driver.sh"])


def test_a_fixed_number_of_nodes_is_asked_for_as_one() -> None:
    fixed = replace(GPUS, nodes_min=4)
    assert "#SBATCH --nodes=4\n" in files("slurm", fixed)["job.sbatch"]
    assert "--no-kill" not in files("slurm", fixed)["job.sbatch"]
    assert "job.yaml" not in files("kubernetes", fixed)
    assert "job.yaml" not in files("kubernetes", replace(GPUS, queue=None))  # only Kueue admits in part


def test_without_a_queue_nothing_waits_for_one() -> None:
    for name, text in files("kubernetes", CORES).items():
        if name.endswith(".yaml"):
            assert "kueue" not in text and "suspend: true" not in text


@pytest.mark.parametrize("token", [None, "", "abc"])
def test_the_ray_script_wants_a_token_first(tmp_path: Path, token: str | None) -> None:
    for name, text in files("ray", CORES).items():
        (tmp_path / name).write_text(text)
    if token is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = ["sh", str(tmp_path / "submit.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    expected = "RAY_API_SERVER_ADDRESS" if token else "no token of the Ray cluster"
    assert done.returncode != 0 and expected in done.stderr
