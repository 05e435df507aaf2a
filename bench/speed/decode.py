"""Decoding speed: Meshwright's engine beside `transformers`' `model.generate`, interleaved, on this machine.

    python bench/speed/decode.py                      both sizes, batch 1 and 8, five rounds
    python bench/speed/decode.py --sizes small --rounds 9

Models are Llamas with random weights: 3M parameters in fp32 and 443M in bf16. Both sides have the same prompts, number
of new tokens and number of threads, and decode greedily. "decoding" begins when every prompt has its first token;
"whole" is the whole call with the prompts. Creating and loading the models does not count. A round runs each side once,
in alternating order. Prints a Markdown table: median tokens per second over the rounds, lowest and highest, and the
ratio of medians with the lowest and highest ratio within one round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from meshwright.engine import Engine


@dataclass(frozen=True)
class ModelSize:
    """A model, and the numbers of tokens."""

    config: dict[str, int | bool]
    dtype: torch.dtype
    prompt_tokens: int
    new_tokens: int


SIZES = {
    "small": ModelSize(
        {
            "hidden_size": 224,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 640,
            "vocab_size": 4096,
            "tie_word_embeddings": True,
        },
        torch.float32,
        prompt_tokens=64,
        new_tokens=128,
    ),
    "large": ModelSize(
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 4096,
            "vocab_size": 32000,
        },
        torch.bfloat16,
        prompt_tokens=128,
        new_tokens=64,
    ),
}


def make_folder(size: ModelSize, folder: Path) -> int:
    """Save a random Llama of `size`. Returns its number of parameters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **size.config, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    model = transformers.LlamaForCausalLM(config).to(size.dtype)
    model.save_pretrained(folder)
    return int(model.num_parameters())


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the `whole` call, and of `decoding`, which begins when every prompt has its first token."""

    whole: float
    decoding: float


class FirstToken(transformers.StoppingCriteria):
    """Records when `generate` has its first tokens. Never stops it."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def by_transformers(model: transformers.PreTrainedModel, prompts: Sequence[Sequence[int]], new: int) -> Speed:
    """`model.generate` on `prompts` of one length."""
    ids, first = torch.tensor(prompts), FirstToken()
    begin = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([first]),
    )
    end = time.perf_counter()
    count = out.shape[0] * (out.shape[1] - ids.shape[1])
    return Speed(count / (end - begin), (count - out.shape[0]) / (end - first.at))


def by_engine(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> Speed:
    """The engine on `prompts`."""
    count, first_count, waiting, first = 0, 0, set(range(len(prompts))), 0.0
    begin = time.perf_counter()
    for index, _ in engine.generate(prompts, max_tokens=new, ignore_eos=True):
        count += 1
        if waiting:
            waiting.discard(index)
            if not waiting:
                first, first_count = time.perf_counter(), count
    end = time.perf_counter()
    return Speed(count / (end - begin), (count - first_count) / (end - first))


def measure(name: str, rounds: int, batches: Sequence[int], scratch: Path) -> list[str]:
    """Table lines for one size."""
    size, folder = SIZES[name], scratch / name
    parameters = make_folder(size, folder)
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=size.dtype).eval()
    loaded = time.perf_counter()
    engine = Engine.open(folder, max_batch=max(batches))
    opened = time.perf_counter()
    print(
        f"{name}: transformers loads in {loaded - start:.1f} s, the engine opens in {opened - loaded:.1f} s", flush=True
    )
    lines = []
    draw = torch.Generator().manual_seed(1)
    vocab = int(size.config["vocab_size"])
    for batch in batches:
        prompts = torch.randint(vocab, (batch, size.prompt_tokens), generator=draw).tolist()

        def theirs(prompts: list[list[int]] = prompts) -> Speed:
            return by_transformers(model, prompts, size.new_tokens)

        def ours(prompts: list[list[int]] = prompts) -> Speed:
            return by_engine(engine, prompts, size.new_tokens)

        speeds: list[tuple[Speed, Speed]] = []
        for turn in range(rounds + 1):
            if turn % 2:
                their_speed, our_speed = theirs(), ours()
            else:
                our_speed, their_speed = ours(), theirs()
            if turn:  # the first round warms both up
                speeds.append((their_speed, our_speed))
        label = f"{parameters / 1e6:.0f}M {str(size.dtype)[6:]}"
        for what in ("decoding", "whole"):
            pairs = [(getattr(a, what), getattr(b, what)) for a, b in speeds]
            lines.append(row(f"{label} | {batch} | {what}", pairs))
            print(lines[-1], flush=True)
    engine.close()
    return lines


def row(label: str, speeds: Sequence[tuple[float, float]]) -> str:
    """A line of the table from (theirs, ours) of every round."""
    theirs, ours = zip(*speeds, strict=True)
    ratios = [b / a for a, b in speeds]
    ratio = statistics.median(ours) / statistics.median(theirs)

    def spread(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"

    ratios_seen = f"{ratio:.1f}x ({min(ratios):.1f}-{max(ratios):.1f})"
    return f"| {label} | {spread(theirs)} | {spread(ours)} | {ratios_seen} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding speed beside transformers' generate.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="torch threads of both sides (default: torch's own)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        tables = [measure(name, arguments.rounds, arguments.batches, Path(scratch)) for name in arguments.sizes]
    print(f"\n{torch.get_num_threads()} threads, {arguments.rounds} rounds, torch {torch.__version__}, "
          f"transformers {transformers.__version__}; tokens per second: median (lowest-highest)\n")  # fmt: skip
    print("| model | batch | of | transformers generate | Meshwright engine | ratio |\n|---|---|---|---|---|---|")
    print("\n".join(line for lines in tables for line in lines))


if __name__ == "__main__":
    main()
