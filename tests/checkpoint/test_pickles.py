"""The look-out for pickles sees them, and only them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from tests.checkpoint.pickles import assert_no_pickles


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_are_seen_whatever_they_are_called(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "innocent.json").write_bytes(pickle.dumps({"a": [1, 2]}, protocol=protocol))
    with pytest.raises(AssertionError, match="is a pickle"):
        assert_no_pickles(tmp_path)


def test_archives_of_torch_are_seen(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(AssertionError, match="is a zip"):
        assert_no_pickles(tmp_path)


def test_plain_files_pass(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("(a sentence. with dots.)")
    (tmp_path / "empty").write_bytes(b"")
    assert_no_pickles(tmp_path)
