"""Whether a target would take a file, judged offline by its own schema and rules.

Kubernetes' kinds and JobSet, Trainer and Knative: the models of their API packages on PyPI, as closed JSON schemas, for
a key that the API does not know is dropped in silence by some servers and refused by others. SkyPilot: its own schema.
KubeRay and YARN have no such package: schemas after their references. Rules between fields are in Google's Common
Expression Language, as in the definitions of these kinds; those that a target checks in code are restated in it.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

SCHEMAS = Path(__file__).with_name("schemas")
TRAINER = "kubeflow_trainer_api.models"
#: (apiVersion, kind) -> package and class of its model.
MODELS = {
    ("v1", "ConfigMap"): (TRAINER, "IoK8sApiCoreV1ConfigMap"),
    ("v1", "Secret"): (TRAINER, "IoK8sApiCoreV1Secret"),
    ("v1", "Service"): (TRAINER, "IoK8sApiCoreV1Service"),
    ("v1", "PersistentVolumeClaim"): (TRAINER, "IoK8sApiCoreV1PersistentVolumeClaim"),
    ("batch/v1", "Job"): (TRAINER, "IoK8sApiBatchV1Job"),
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): (TRAINER, "JobsetV1alpha2JobSet"),
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): (TRAINER, "TrainerV1alpha1TrainingRuntime"),
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): (TRAINER, "TrainerV1alpha1TrainJob"),
    ("serving.knative.dev/v1", "Service"): ("cloudcoil.models.knative_serving.serving.v1", "Service"),
}
#: Options of sbatch that are used -> their values, after its manual page.
SBATCH = {
    "job-name": r"[^\s\"']+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "gres": r"gpu(:\w+)?:\d+",
    "partition": r".+",
    "output": r".+",
    "open-mode": r"append|truncate",
    "signal": r"(B:|R:|BR:)?(USR1|USR2|TERM|INT|HUP)@\d+",
    "requeue": None,
    "no-kill": None,
}
#: What the packages describe as objects of the client, as it is in a file.
AS_WRITTEN = {
    "IoK8sApimachineryPkgApiResourceQuantity": {
        "type": ["string", "integer"],
        "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i?|e[0-9]+)?$",
    },
    "IoK8sApimachineryPkgUtilIntstrIntOrString": {"type": ["integer", "string"]},
    "IoK8sApimachineryPkgApisMetaV1FieldsV1": {"type": "object"},
}


def problems_of_yaml(text: str) -> list[str]:
    """What is wrong with a file of Kubernetes objects."""
    return [problem for document in yaml.safe_load_all(text) for problem in problems_of_object(document)]


def problems_of_object(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object of Kubernetes, [] where its API takes it."""
    place = document.get("apiVersion"), document.get("kind")
    if place[0] == "ray.io/v1":
        schema = {"$ref": f"kuberay#/$defs/{place[1]}"}
    elif place in MODELS:
        schema = {"$ref": f"model:{'/'.join(MODELS[place])}"}
    else:
        return [f"no kind {place[1]} of {place[0]}"]
    kind = "KnativeService" if place == ("serving.knative.dev/v1", "Service") else str(place[1])
    found = _schema_problems(document, schema)
    if found:
        return found
    if kind == "RayService":
        config = yaml.safe_load(document["spec"]["serveConfigV2"])
        found = _schema_problems(config, {"$ref": "kuberay#/$defs/ServeConfig"})
    return found + _rule_problems(document, kind)


def problems_of_yarnfile(text: str) -> list[str]:
    document = json.loads(text)
    return _schema_problems(document, _read("yarn-service-1.0.0.json")) or _rule_problems(document, "Yarnfile")


def problems_of_task(text: str) -> list[str]:
    """What is wrong with a SkyPilot task, whose parts have schemas of their own."""
    schemas, document = _read("skypilot-0.14.1.json"), yaml.safe_load(text)
    found = _schema_problems(document, schemas["task"]) + _schema_problems(document["resources"], schemas["resources"])
    for mount in document["file_mounts"].values():
        found += _schema_problems(mount, schemas["storage"])
        found += [] if mount.get("mode") in ("MOUNT", "COPY", "MOUNT_CACHED") else [f"no mode {mount.get('mode')}"]
    return found or _rule_problems(document, "SkyPilot")


def problems_of_sbatch(text: str) -> list[str]:
    """What is wrong with the options of a batch script. sbatch reads those before the first command alone."""
    found, lines = [], text.splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    for number, line in enumerate(lines):
        if not line.startswith("#SBATCH"):
            continue
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        name, _, value = words[0].removeprefix("--").partition("=")
        pattern = SBATCH.get(name)
        right = name in SBATCH and (value == "" if pattern is None else re.fullmatch(pattern, value) is not None)
        if not (right and len(words) == 1 and number < first_command):
            found.append(f"line {number + 1}: {line}")
    return found


def _schema_problems(document: Any, schema: dict[str, Any]) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema, registry=_registry()).iter_errors(document)
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


def _rule_problems(document: dict[str, Any], kind: str) -> list[str]:
    of_kubernetes = "apiVersion" in document
    return [
        f"{rule['at']}: {rule['says']}"
        for rule in _read("rules.json")
        if kind in rule["kinds"] or ("*" in rule["kinds"] and of_kubernetes)
        for value in _places(document, rule["at"])
        if not _holds(rule["rule"], value)
    ]


def _holds(rule: str, value: Any) -> bool:
    """As in Kubernetes, a rule that meets what it cannot work with is broken."""
    try:
        return _compiled(rule).execute({"self": value}) is True
    except (RuntimeError, TypeError, ValueError):
        return False


def _places(document: Any, at: str) -> Iterator[Any]:
    """The values at a path: "a.b", "a.b[]" for each of a list, "a{}" for each of a map; <pod>, <job>, <raycluster>."""
    marks = {"<pod>": "containers", "<job>": "completions", "<raycluster>": "headGroupSpec"}
    if at in marks:
        yield from (one for one in _objects(document) if marks[at] in one)
        return
    values = [document]
    for part in at.split(".") if at else []:
        name = part.rstrip("[]{}")
        values = [value[name] for value in values if isinstance(value, dict) and name in value]
        if part.endswith("[]"):
            values = [one for value in values for one in value]
        elif part.endswith("{}"):
            values = [one for value in values for one in value.values()]
    yield from values


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


@cache
def _compiled(rule: str) -> cel.Program:
    return cel.compile(rule)


@cache
def _read(name: str) -> Any:
    return json.loads((SCHEMAS / name).read_text(encoding="utf-8"))


@cache
def _registry() -> Registry:
    kuberay = json.dumps(_read("kuberay-v1.json"))
    for word, model in (
        ("ObjectMeta", "ApimachineryPkgApisMetaV1ObjectMeta"),
        ("PodTemplateSpec", "ApiCoreV1PodTemplateSpec"),
    ):
        kuberay = kuberay.replace(f"kubernetes#{word}", f"model:{TRAINER}/IoK8s{model}")
    known = Resource.from_contents(json.loads(kuberay), default_specification=DRAFT202012)
    return Registry(retrieve=_model_schema).with_resource("kuberay", known)


@cache
def _model_schema(uri: str) -> Resource:
    """The schema of a model, "model:PACKAGE/CLASS", closed: no key but those that it names, and no null."""
    package, name = uri.removeprefix("model:").split("/")
    schema = getattr(importlib.import_module(package), name).model_json_schema(by_alias=True)
    schema["$defs"] = {
        **schema.get("$defs", {}),
        **{key: one for key, one in AS_WRITTEN.items() if key in schema["$defs"]},
    }
    return Resource.from_contents(_closed(schema), default_specification=DRAFT202012)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _closed(value) for key, value in schema.items() if key not in ("default", "title", "description")}
    if "anyOf" in kept:
        kept["anyOf"] = [one for one in kept["anyOf"] if one != {"type": "null"}]
    if "properties" in schema and isinstance(schema["properties"], dict) and schema.get("type") == "object":
        properties = {key: _closed(value) for key, value in schema["properties"].items()}
        kept |= {"properties": properties, "additionalProperties": False}
    return kept
