"""What `card_of` finds in a forward pass, against counts made by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.card import AttentionShape, Block, Buffer, Card
from meshwright.errors import InputError
from meshwright.trace import card_of


class Chain(nn.Module):
    """A module that folds the given blocks."""

    def __init__(self, **blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)

    def forward(self, x: Tensor, **inputs: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x, **inputs)
        return x


def build_and_block(build: type[nn.Module] | object, x: Tensor) -> Block:
    (block,) = card_of(build, x, "it").blocks  # type: ignore[arg-type]
    return block


def test_linear_is_one_product_with_its_flops() -> None:
    block = build_and_block(lambda: nn.Linear(5, 7), torch.zeros(1, 3, 5))
    (product,) = block.products
    assert (product.rows, product.inner, product.columns) == (3, 5, 7)
    assert block.forward_flops == 2 * 3 * 5 * 7
    assert block.output_elements == 3 * 7
    assert {p.name: p.shape for p in block.parameters} == {"weight": (7, 5), "bias": (7,)}


def test_convolutions_count_kernel_groups_and_stride() -> None:
    block = build_and_block(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.zeros(1, 4, 8, 8))
    assert block.forward_flops == 2 * (4 * 4) * (2 * 9) * 6
    block = build_and_block(lambda: nn.ConvTranspose2d(4, 6, 3), torch.zeros(1, 4, 8, 8))
    assert block.forward_flops == 2 * 64 * 4 * (6 * 9)


def test_recurrent_layers_are_seen_through() -> None:
    block = build_and_block(lambda: FirstOutput(nn.LSTM(5, 7, batch_first=True)), torch.zeros(1, 3, 5))
    assert block.forward_flops == 2 * 3 * (5 + 7) * 4 * 7


class FirstOutput(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Attend(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_a_shape_and_not_a_product(causal: bool) -> None:
    block = build_and_block(lambda: Attend(causal), torch.zeros(1, 12, 16))
    assert block.attention == AttentionShape(heads=2, kv_heads=2, head_dim=8, seq_len=12, causal=causal)
    assert [product.name for product in block.products] == ["qkv"]


class Windows(nn.Module):
    """Attention within windows of four: windows are in the batch dimension."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(3, 1, 4, 8)
        return F.scaled_dot_product_attention(q, q, q)


def test_windowed_attention_is_counted_as_its_two_products() -> None:
    block = build_and_block(Windows, torch.zeros(1, 12, 8))
    assert block.attention is None
    assert block.forward_flops == 2 * (2 * 12 * 8 * 4)


def test_saved_activations_leave_out_parameters_and_count_shared_memory_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 7), nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.left(x)) * torch.sigmoid(self.right(x))

    block = build_and_block(Twice, torch.zeros(1, 5))
    # x once (for both weight gradients), then tanh's and sigmoid's results, which the product shares.
    assert sum(saved.elements for saved in block.saved) == 5 + 7 + 7
    assert {saved.bytes_per_element for saved in block.saved} == {0}


def test_whole_numbers_keep_their_own_size() -> None:
    block = build_and_block(lambda: nn.Embedding(1000, 4), torch.zeros(1, 6, dtype=torch.int64))
    assert [(saved.elements, saved.bytes_per_element) for saved in block.saved] == [(6, 8)]
    assert block.elementwise_elements == 2 * 6 * 4  # rows read and written, not the table


def test_views_cost_nothing() -> None:
    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2).unsqueeze(0).squeeze(0)

    assert build_and_block(Turn, torch.zeros(1, 3, 5)).elementwise_elements == 0


def test_blocks_are_cards_blocks_with_their_own_work() -> None:
    card = card_of(lambda: Chain(a=nn.Linear(5, 7), b=nn.GELU(), c=nn.Linear(7, 3)), torch.zeros(1, 5), "chain")
    assert [(block.name, block.kind) for block in card.blocks] == [("a", "Linear"), ("b", "GELU"), ("c", "Linear")]
    assert [block.forward_flops for block in card.blocks] == [2 * 5 * 7, 0, 2 * 7 * 3]
    assert [block.output_elements for block in card.blocks] == [7, 7, 3]
    assert [p.name for p in card.blocks[2].parameters] == ["blocks.c.weight", "blocks.c.bias"]
    assert card.splittable == {"pp"}


def test_keyword_inputs_reach_every_block() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return x + positions

    sample: tuple[Tensor, Mapping[str, Tensor]] = (torch.zeros(1, 4), {"positions": torch.zeros(1, 4)})
    assert card_of(lambda: Chain(a=Shift(), b=Shift()), sample, "shift").splittable == {"pp"}


def test_a_module_without_blocks_is_one_block_and_no_pipeline() -> None:
    card = card_of(lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU()), torch.zeros(1, 5), "plain")
    assert [block.name for block in card.blocks] == ["all"]
    assert card.splittable == frozenset()


class Extra(Chain):
    def forward(self, x: Tensor, **inputs: Tensor) -> Tensor:
        return super().forward(x.relu(), **inputs)


class After(Chain):
    def forward(self, x: Tensor, **inputs: Tensor) -> Tensor:
        return super().forward(x, **inputs).softmax(-1)


class Backwards(Chain):
    def forward(self, x: Tensor, **inputs: Tensor) -> Tensor:
        for block in reversed(self.blocks.values()):
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "said"), [(Extra, "before block 'a'"), (After, "after the last"), (Backwards, "order")]
)
def test_a_forward_that_is_not_the_fold_of_its_blocks_is_refused(kind: type[Chain], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        card_of(lambda: kind(a=nn.Linear(5, 5), b=nn.Linear(5, 5)), torch.zeros(1, 5), "it")
    assert "for block in self.blocks.values()" in caught.value.problems[0].nearest


def test_a_parameter_outside_the_blocks_is_refused() -> None:
    def build() -> nn.Module:
        module = Chain(a=nn.Linear(5, 5))
        module.scale = nn.Parameter(torch.ones(5))
        return module

    with pytest.raises(InputError, match="'scale' is in none of them"):
        card_of(build, torch.zeros(1, 5), "it")


def test_running_statistics_are_found() -> None:
    card = card_of(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.zeros(1, 1, 8, 8), "bn")
    assert card.stateful_buffers == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    still = nn.BatchNorm2d(2, track_running_stats=False)
    assert card_of(lambda: still, torch.zeros(1, 2, 8, 8), "bn").stateful_buffers == ()


def test_a_buffer_written_in_forward_is_found_and_a_constant_is_not() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("constant", torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * self.constant

    assert card_of(Counting, torch.zeros(1, 5), "count").stateful_buffers == ("seen",)


class Counter(nn.Module):
    """Replaces its count instead of writing to it."""

    def __init__(self, seen: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64) if seen is None else seen)
        self.register_buffer("table", torch.ones(5, 4, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return x * self.table.sum()


def test_buffers_are_listed_by_block_with_what_is_saved_of_them() -> None:
    card = card_of(lambda: Chain(a=nn.Linear(5, 5), b=Counter()), torch.zeros(1, 5), "it")
    assert card.blocks[0].buffers == ()
    assert card.blocks[1].buffers == (
        Buffer("blocks.b.seen", (), 8),
        Buffer("blocks.b.table", (5, 4), 8, persistent=False),
    )
    assert card.blocks[1].buffer_bytes == 8 + 160 and card.persistent_buffers == card.blocks[1].buffers[:1]
    assert card.stateful_buffers == ("blocks.b.seen",)


def test_a_count_in_two_modules_is_refused() -> None:
    """Once the model is split or moved to a device, each module would have its own."""

    def build() -> nn.Module:
        seen = torch.zeros((), dtype=torch.int64)
        return Chain(a=Counter(seen), b=Counter(seen))

    with pytest.raises(InputError, match=r"'blocks\.a\.seen' and 'blocks\.b\.seen' are one buffer"):
        card_of(build, torch.zeros(1, 5), "it")
    twice = Counter()
    assert card_of(lambda: Chain(a=nn.Sequential(twice, twice)), torch.zeros(1, 5), "it").blocks[0].buffers


def test_a_saved_buffer_outside_the_blocks_is_refused() -> None:
    def build() -> nn.Module:
        module = Chain(a=nn.Linear(5, 5))
        module.register_buffer("version", torch.ones(1))
        return module

    with pytest.raises(InputError, match="'version' is in none of them"):
        card_of(build, torch.zeros(1, 5), "it")


def test_tied_parameters_are_listed_once() -> None:
    def build() -> nn.Module:
        module = Chain(embed=nn.Embedding(9, 4), out=nn.Linear(4, 9, bias=False))
        module.blocks["out"].weight = module.blocks["embed"].weight
        return module

    card = card_of(build, torch.zeros(1, 3, dtype=torch.int64), "tied")
    assert card.tied == (("blocks.embed.weight", "blocks.out.weight"),)
    assert [len(block.parameters) for block in card.blocks] == [1, 0]


def test_a_model_larger_than_memory_is_traced() -> None:
    card = card_of(lambda: nn.Linear(2**20, 2**20, bias=False), torch.zeros(1, 2**20), "4 TiB")
    assert card.parameter_elements == 2**40


def test_tracing_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    card_of(lambda: nn.Sequential(nn.Linear(5, 7), nn.Dropout()), torch.zeros(1, 5), "it")
    assert torch.equal(before, torch.random.get_rng_state())


def test_forward_errors_name_the_input_and_the_line() -> None:
    with pytest.raises(InputError, match=r"input \[1, 4\] float32 failed: RuntimeError"):
        card_of(lambda: nn.Linear(5, 7), torch.zeros(1, 4), "it")

    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(InputError, match=r"depends on the values.*test_record\.py"):
        card_of(Peeks, torch.zeros(1, 4), "it")


def test_a_module_may_state_its_own_input() -> None:
    class States(nn.Linear):
        def sample_input(self) -> Tensor:
            return torch.zeros(1, 5)

    assert card_of(lambda: States(5, 7), None, "it").forward_flops == 2 * 5 * 7
    with pytest.raises(InputError, match=r"sample_input\(\)"):
        card_of(lambda: nn.Linear(5, 7), None, "it")


@pytest.mark.parametrize("sample", [3, (torch.zeros(1, 5), {}, 3), (torch.zeros(1, 5), {"scale": 2.0}), ()])
def test_a_sample_that_is_no_input_is_refused(sample: Any) -> None:
    class States(nn.Linear):
        def sample_input(self) -> Any:
            return sample

    with pytest.raises(InputError, match=r"sample_input\(\) returned a .*; return a tensor \[1, \.\.\.\], or"):
        card_of(lambda: States(5, 7), None, "it")


class Hostile(nn.Linear):
    """Leaves, or divides by zero, in one of its methods, and talks before."""

    def __init__(self, where: str, how: Callable[[], Any]) -> None:
        super().__init__(5, 7)
        self.where, self.how = where, how

    def _maybe(self, here: str) -> None:
        print("talk")
        if here == self.where:
            self.how()

    def sample_input(self) -> Tensor:
        self._maybe("sample_input")
        return torch.zeros(1, 5)

    def forward(self, x: Tensor) -> Tensor:
        self._maybe("forward")
        return super().forward(x)

    def train(self, mode: bool = True) -> Any:
        self._maybe("train")
        return super().train(mode)

    @property
    def parameter_axes(self) -> None:
        self._maybe("axes")

    @property
    def blocks(self) -> None:
        self._maybe("blocks")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("sample_input", "sample_input() of Hostile failed: "),
        ("forward", "the forward pass of an input [1, 5] float32 failed: "),
        ("train", "train() of Hostile failed: "),
        ("axes", "reading parameter_axes of Hostile failed: "),
        ("blocks", "reading blocks of Hostile failed: "),
    ],
)
@pytest.mark.parametrize(
    ("how", "kind"),
    [(lambda: sys.exit(0), "SystemExit: 0"), (lambda: 1 / 0, "ZeroDivisionError: division by zero")],
    ids=["exits", "divides"],
)
def test_code_that_fails_or_exits_is_named_and_never_heard_on_stdout(
    where: str, said: str, how: Callable[[], Any], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as refused:
        card_of(lambda: Hostile(where, how), None, "it")
    assert f"{said}{kind} (" in str(refused.value) and "test_record.py:" in str(refused.value)
    heard = capsys.readouterr()
    assert heard.out == "" and "talk" in heard.err


def test_a_forward_that_fails_on_a_shape_is_told_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"RuntimeError: .*\[1, 4\] X \[5, 7\]"):
        card_of(lambda: nn.Linear(5, 7), torch.zeros(1, 4), "it")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("change", "became"),
    [
        (lambda it, x: setattr(it, "seen", torch.cat([it.seen, it.seen])), r"\[6\] float32"),
        (lambda it, x: setattr(it, "seen", it.seen.double()), r"\[3\] float64"),
        (lambda it, x: setattr(it, "seen", None), "nothing"),
        (lambda it, x: it.seen.resize_(2), r"\[2\] float32"),
        (lambda it, x: setattr(it, "count", it.count * 0.9 + 1), r"\[\] float32"),
        (lambda it, x: setattr(it, "late", x.sum()), r"\[\] float32"),
    ],
)
@pytest.mark.parametrize("persistent", [True, False])
def test_a_saved_buffer_that_training_makes_another_is_refused(change: Any, became: str, persistent: bool) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3), persistent=persistent)
            self.register_buffer("count", torch.tensor(0), persistent=persistent)
            self.register_buffer("late", None, persistent=persistent)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                change(self, x.detach())
            return x * 2

    def trace() -> Card:
        return card_of(lambda: Chain(a=Changing()), torch.zeros(1, 5), "it")

    if not persistent:
        assert trace().persistent_buffers == ()
        return
    with pytest.raises(InputError, match=rf"'blocks\.a\.(seen|count|late)' is .* as built, and {became} after"):
        trace()
