"""The whole of `serve.main` in a process of its own, with a real model: start, answers, deaths, the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from meshwright.errors import InputError
from meshwright.serve.client import stream_grpc, stream_http
from meshwright.serve.server import bind, main, model_name

PROGRAM = """
import json, sys
from types import SimpleNamespace
from meshwright.errors import MeshwrightError
from meshwright.serve.server import main
folder, config = sys.argv[1:]
try:
    main(folder, SimpleNamespace(**json.loads(config)), precision="fp32")
except MeshwrightError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
CONFIG: dict[str, Any] = {
    "host": "127.0.0.1",
    "http_port": 0,
    "grpc_port": 0,
    "max_batch": 8,
    "max_len": None,
    "token_file": None,
    "tp": 1,
}
PROMPTS = ["def main(", "import os", "The quick brown fox", "héllo 😀", "x = 1\n"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Llama of a few thousand weights with a tokenizer of 300 ids, written by transformers."""
    transformers = pytest.importorskip("transformers")
    import tokenizers
    import torch

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    inner.train_from_iterator(PROMPTS * 3, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=4096, eos_token_id=0, bos_token_id=None, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Process:
    """`main` in a process, whose temporary files go to `temporary`; its first line of output has the addresses."""

    def __init__(self, folder: Path, temporary: Path, **changes: Any) -> None:
        config = json.dumps(CONFIG | changes)
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path), TMPDIR=str(temporary))
        command = [sys.executable, "-c", PROGRAM, str(folder), config]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def wait_ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate())
        addresses: dict[str, Any] = json.loads(line)
        return addresses

    def family(self) -> set[int]:
        """Process ids of everything that it started."""
        found, level = set(), {self.process.pid}
        while level:
            level = {
                int(child)
                for pid in level
                for task in Path(f"/proc/{pid}/task").glob("*/children")
                for child in task.read_text().split()
            }
            found |= level
        return found

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextlib.contextmanager
def serving(folder: Path, temporary: Path, **changes: Any) -> Iterator[tuple[Process, dict[str, Any]]]:
    process = Process(folder, temporary, **changes)
    try:
        yield process, process.wait_ready()
    finally:
        if process.process.poll() is None:
            process.process.kill()
        process.process.communicate()


def reference(folder: Path, prompt: str, tokens: int) -> str:
    """Greedy text by transformers."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=True).input_ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def gone(pids: set[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_real_model_over_both_protocols(tiny_folder, tmp_path, until, tp):
    with serving(tiny_folder, tmp_path, tp=tp) as (process, at):
        assert at["model"] == "tiny-llama" and at["pid"] == process.process.pid
        client = openai.OpenAI(base_url=at["http"] + "/v1", api_key="none", max_retries=0)
        for prompt in PROMPTS:
            expected = reference(tiny_folder, prompt, 12)
            answer = client.completions.create(model="tiny-llama", prompt=prompt, max_tokens=12, temperature=0)
            assert answer.choices[0].text == expected
            assert "".join(stream_http(at["http"], prompt, max_tokens=12, temperature=0)) == expected
            pieces = stream_grpc(at["grpc"], prompt, model="tiny-llama", max_tokens=12, temperature=0)
            assert "".join(pieces) == expected
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(model="tiny-llama", messages=messages, max_tokens=12, temperature=0)
        assert chat.choices[0].message.content == reference(tiny_folder, "[user]hi[assistant]", 12)
        family = process.family()
        assert len(family) >= tp + 1  # the ranks and the template's process
        status, out, err = process.end()
        assert (status, err) == (0, "")
        assert out == ""  # after the line with the addresses
        until(lambda: gone(family))


def test_client_that_leaves_frees_the_real_engine(tiny_folder, tmp_path, until):
    with serving(tiny_folder, tmp_path) as (_, at):
        stream = stream_http(at["http"], "x", max_tokens=4000, ignore_eos=True)
        next(stream)

        def active() -> bool:
            return "meshwright_engine_active 1.0" in httpx.get(at["http"] + "/metrics").text

        until(active)
        stream.close()
        until(lambda: not active())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_lets_running_requests_end_and_refuses_new_ones(number, tiny_folder, tmp_path, until):
    with serving(tiny_folder, tmp_path) as (process, at):
        texts: list[str] = []

        def ask() -> None:
            texts.append("".join(stream_http(at["http"], "x", max_tokens=400, ignore_eos=True)))

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: "meshwright_engine_active 1.0" in httpx.get(at["http"] + "/metrics").text)
        status, _, _ = process.end(number)
        asking.join(60)
        assert status == 0
        assert len(texts) == 1 and texts[0]
        with pytest.raises(httpx.ConnectError):
            httpx.get(at["http"] + "/health")


def test_killed_engine_is_an_error_and_leaves_nothing(tiny_folder, tmp_path, until):
    with serving(tiny_folder, tmp_path, tp=2) as (process, _):
        family = process.family()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in family}
        rank = max(pid for pid, command in commands.items() if "meshwright.launch.worker" in command)
        os.kill(rank, signal.SIGKILL)
        _, err = process.process.communicate(timeout=60)
        assert process.process.returncode == 4
        assert "rank 1 of 2" in err and "Traceback" not in err
        until(lambda: gone(family))


def test_killed_server_leaves_nothing(tiny_folder, tmp_path, until):
    with serving(tiny_folder, tmp_path) as (process, _):
        family = process.family()
        process.process.kill()
        until(lambda: gone(family))


def test_sigterm_before_it_is_ready_is_a_clean_end(tiny_folder, tmp_path, until):
    process = Process(tiny_folder, tmp_path)
    try:
        until(lambda: len(process.family()) >= 2)  # the template's process and the engine's
        family = process.family()
        status, _, err = process.end()
        assert status == 0 and "Traceback" not in err
        until(lambda: gone(family))
    finally:
        process.process.kill()
        process.process.wait()


def test_addresses_that_nobody_can_read_end_it_in_order(tiny_folder, tmp_path, until):
    process = Process(tiny_folder, tmp_path)
    assert process.process.stdout is not None
    process.process.stdout.close()
    process.process.stdout = None
    until(lambda: len(process.family()) > 1)
    family = process.family()
    _, err = process.process.communicate(timeout=60)
    hint = "send it to a file, or to a reader that stays for one line"
    assert err.splitlines()[0] == f"stdout: the addresses cannot be written: Broken pipe; {hint}"
    assert process.process.returncode == 4 and "closed" not in err
    until(lambda: gone(family))


def test_bad_starts_are_bad_input(tiny_folder, tmp_path):
    def start(folder: Path = tiny_folder, **changes: Any) -> None:
        main(folder, SimpleNamespace(**CONFIG | changes))  # type: ignore[arg-type]

    with pytest.raises(InputError, match=r"serve\.token_file"):
        start(host="0.0.0.0")
    with pytest.raises(InputError, match="cannot read"):
        start(token_file=str(tmp_path / "none"))
    with pytest.raises(InputError, match="not a model folder"):
        start(tmp_path)
    with bind("127.0.0.1", 0) as taken, pytest.raises(InputError, match=r"serve\.http_port.*in use"):
        start(http_port=taken.getsockname()[1])
    with bind("127.0.0.1", 0) as taken, pytest.raises(InputError, match=r"serve\.grpc_port"):
        start(grpc_port=taken.getsockname()[1])
    with pytest.raises(InputError, match="max_len"):
        start(max_len=100_000)


def test_models_are_named_after_their_folder_or_run(tmp_path):
    assert model_name(tmp_path / "Qwen3") == "Qwen3"
    assert model_name(tmp_path / "my-run" / "checkpoints" / "step-20" / "model") == "my-run"


def test_a_detached_server_is_shown_and_stopped_by_its_folder(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "server"
    words = ["serve", str(tiny_folder), "serve.http_port=0", "serve.grpc_port=0", "--run", str(run), "--detach"]

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "meshwright", *arguments]
        return subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)

    started = command(*words)
    assert started.returncode == 0, started.stderr
    try:
        assert stream_http(json.loads(started.stdout)["http"], {"prompt": "a", "max_tokens": 2})
        assert "running" in command("status", str(run)).stdout
        again = command(*words)
        assert again.returncode != 0 and "is at work" in again.stderr
    finally:
        stopped = command("stop", str(run))
    assert stopped.stdout == f"{run}: ended\n", stopped.stderr
    assert "serving plan" in command("logs", str(run)).stdout
