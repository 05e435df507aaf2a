"""Serving plans from a job and a folder: what `plan --serving` says, and what `serve` starts with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from meshwright.errors import CannotWork, InputError
from meshwright.families.decoder import parameters
from meshwright.families.llama.card import hf_names, shape_from_hf
from meshwright.job import SMALL_JOB
from meshwright.job.sections import ServeSection
from meshwright.verbs.serving import plan_settings, serving_plan

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "vocab_size": 129280,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8"},
}


def folder_of(config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    job = tmp_path / "job.toml"
    job.write_text(SMALL_JOB)
    return job


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A job for a folder that has a config and no weights: planning needs none."""
    folder_of(CONFIG, tmp_path / "llama")
    job = tmp_path / "job.toml"
    job.write_text('[model]\nhf = "llama"\n[data]\nseq_len = 256\n[train]\nsteps = 1\nlr = 1e-3\nglobal_batch = 8\n')
    return job


def test_named_devices_are_planned_for_any_engine(llama: Path) -> None:
    goals = ["serve.ttft_seconds=0.5", "serve.tpot_seconds=0.05", "serve.requests_per_second=4"]
    plan = serving_plan(llama, ["cluster.named=h100-sxm-80gb", *goals])
    assert (plan.engine, plan.chosen.precision, plan.chosen.devices) == ("paged", "bf16", 1)
    assert plan.chosen.predicted.dollars_per_million_tokens is not None
    long = serving_plan(llama, ["cluster.named=h100-sxm-80gb", "serve.prompt_tokens=8000", "serve.output_tokens=100"])
    assert long.target.prompt_tokens == 8000
    with pytest.raises(CannotWork, match=r"8192 fit; nearest: serve.prompt_tokens=8064"):
        serving_plan(llama, ["cluster.named=h100-sxm-80gb", "serve.prompt_tokens=9000", "serve.output_tokens=128"])


def test_a_mixture_with_latent_attention_from_its_config(tmp_path: Path, llama: Path) -> None:
    folder = folder_of(DEEPSEEK, tmp_path / "deepseek")
    plan = serving_plan(llama, [f"model.hf={folder}", "cluster.named=h200-sxm"])
    assert plan.chosen.tp == 8 and plan.chosen.precision == "fp8"
    assert plan.parameters == pytest.approx(671e9, rel=0.01)
    with pytest.raises(InputError, match="deepseek_v3"):  # our engine does not decode it
        serving_plan(llama, [f"model.hf={folder}"])


def test_this_machine_is_planned_for_our_engine(small: Path) -> None:
    plan = serving_plan(small)
    assert plan.engine == "meshwright" and plan.chosen.precision == "fp32"
    assert plan.target.prompt_tokens + plan.target.output_tokens <= 256
    assert plan.chosen.max_len == 256 and plan.chosen.max_batch >= 1
    pinned = serving_plan(small, ["serve.max_batch=3", "serve.tp=2", "serve.max_len=128"])
    assert (pinned.chosen.max_batch, pinned.chosen.tp, pinned.chosen.max_len) == (3, 2, 128)


def test_wishes_out_of_reach_end_with_what_can_be_had(small: Path) -> None:
    with pytest.raises(CannotWork, match=r"nearest: serve.tpot_seconds=0\.0"):
        serving_plan(small, ["serve.tpot_seconds=1e-9"])


def test_a_faulty_wish_is_not_answered_with_a_training_plan(llama: Path) -> None:
    with pytest.raises(InputError) as caught:
        serving_plan(llama, ["cluster.named=l4", "cluster.devices=1", "serve.tpot_seconds=0"])
    (problem,) = caught.value.problems
    assert "serve.tpot_seconds" in problem.where


def test_serve_takes_what_is_open_from_the_plan(tmp_path: Path) -> None:
    tiny = {**CONFIG, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = folder_of({**tiny, "intermediate_size": 128, "vocab_size": 512}, tmp_path / "tiny")
    open_ = plan_settings(folder, ServeSection())
    assert open_.settings.max_batch == open_.plan.chosen.max_batch >= 1 and open_.settings.tp == open_.plan.chosen.tp
    assert open_.settings.max_len == 8192 and open_.precision == "bf16"
    pinned = plan_settings(folder, ServeSection(max_batch=3, tp=1, max_len=100, precision="fp32"))
    assert (pinned.settings.max_batch, pinned.settings.tp, pinned.settings.max_len) == (3, 1, 100)
    assert pinned.precision == "fp32"
    hurried = plan_settings(folder, ServeSection(tpot_seconds=1e-9))
    assert "nearest: serve.tpot_seconds=" in hurried.summary and hurried.settings.max_batch >= 1
    heads = plan_settings(folder, ServeSection(max_batch=1))
    assert heads.settings.tp in (1, 2)


def test_serve_refuses_what_cannot_fit_before_it_reads_a_weight(tmp_path: Path) -> None:
    huge = {**CONFIG, "num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128}
    folder = folder_of({**huge, "intermediate_size": 53248}, tmp_path / "huge")
    with pytest.raises(CannotWork, match=r"needs [\d.]+ GiB a device.*nearest"):
        plan_settings(folder, ServeSection())
    with pytest.raises(CannotWork, match=r"heads do not divide|key heads do not divide"):
        plan_settings(folder_of(CONFIG, tmp_path / "llama"), ServeSection(tp=3))


def test_serve_starts_as_planned(tmp_path: Path) -> None:
    """The whole command on a tiny model: the plan on stderr, its figures beside the measured ones in /metrics."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    limits = {"intermediate_size": 64, "vocab_size": 256, "max_position_embeddings": 128}
    config = {**CONFIG, **sizes, **limits, "torch_dtype": "float32", "eos_token_id": 0}
    folder = folder_of(config, tmp_path / "tiny")
    shape = shape_from_hf(config)
    names = hf_names(shape)
    weights = {names[p.name]: np.full(p.shape, 0.01, np.float32) for p in parameters(shape)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = {chr(33 + index): index for index in range(90)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="!")).save(str(folder / "tokenizer.json"))
    command = [sys.executable, "-m", "meshwright", "serve", str(folder), "serve.http_port=0", "serve.grpc_port=0"]
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as server:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        assert line, server.stderr.read()
        shown = httpx.get(json.loads(line)["http"] + "/metrics", timeout=30).text
        server.send_signal(signal.SIGTERM)
        _, summary = server.communicate(timeout=60)
    assert server.returncode == 0
    assert "serving plan: tp 1, up to" in summary and "128 tokens" in summary
    assert 'meshwright_predicted{figure="tokens_per_second"}' in shown
    assert 'meshwright_predicted{figure="token_seconds"}' in shown


def test_the_command_line_shows_it(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from meshwright.cli.main import main

    words = ["plan", str(llama), "--serving", "cluster.named=h100-sxm-80gb", "serve.requests_per_second=4"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["predicted"]["requests_per_second"]["mid"] == pytest.approx(4)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "SERVES" in shown and "first token" in shown and "tokens/s" in shown
    assert main([*words, "serve.tpot_seconds=1e-6"]) == 3
    assert "nearest:" in capsys.readouterr().err
