"""Defaults that follow from other values, and absolute paths. Knows no types."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeGuard

from meshwright.job.checks import PATH_KEYS
from meshwright.storage.url import is_url


def with_defaults(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections with every default that follows from other values; given values stay."""
    model, data, task, train = (_table(sections.get(name)) for name in ("model", "data", "task", "train"))
    hidden, heads, steps = model.get("hidden"), model.get("heads"), train.get("steps")
    if _whole(heads) and not (model.get("hf") or model.get("module")):
        model.setdefault("kv_heads", heads)
        if _whole(hidden) and hidden % heads == 0:
            model.setdefault("head_dim", hidden // heads)
    folder = model.get("hf")
    if isinstance(folder, str) and "\0" not in folder and Path(folder).is_dir():  # its weights have its tokenizer's ids
        data.setdefault("tokenizer", folder)
    if model.get("module"):
        task.setdefault("name", "classification")
    if _whole(steps):
        train.setdefault("warmup_steps", min(100, steps // 10))
    filled = {"model": model, "data": data, "task": task, "train": train}
    broken = {name: content for name, content in sections.items() if not isinstance(content, dict)}
    return {**sections, **filled, **broken}


def _table(content: Any) -> dict[str, Any]:
    return dict(content) if isinstance(content, dict) else {}


def _whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= 2**31 - 1


def absolute_paths(sections: dict[str, Any], folders: dict[str, Path]) -> dict[str, Any]:
    """The sections with relative paths made absolute, from the folder of the file that has them."""
    result = dict(sections)
    model = result.get("model")
    if isinstance(model, dict) and "module" in model:  # beside the file that names it, from any run folder
        result["model"] = {"module_folder": str(folders.get("model.module", Path()) / "."), **model}
    for key, words in PATH_KEYS.items():
        section, _, name = key.partition(".")
        content = result.get(section)
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(content, dict) or not isinstance(value, str):
            continue
        if value and value not in words and "\0" not in value and not is_url(value):
            # normpath, not resolve: a link that the user gave a name keeps that name
            absolute = os.path.normpath(Path.cwd() / folders.get(key, Path()) / os.path.expanduser(value))
            result[section] = {**content, name: absolute}
    return result
