"""The shape of a decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """All numbers of a decoder. Sizes are element counts; `ffn` is the width of one feed-forward matrix.

    Attention is latent (DeepSeek-V2, arXiv 2405.04434) if `kv_lora` is above 0: then `head_dim` is the part of a key
    without rotary positions, `rope_head_dim` the part with them, and `q_lora` 0 means queries without a low rank.
    Every `moe_every`-th layer after `first_dense_layers` has experts. `biases` puts one on every product of attention
    and feed-forward; `bias_of` names single places: "qkv", "out", "ffn", "head", "router". `norms` is the number per
    layer: 1 if attention and feed-forward share it, 4 if their outputs have one too. `qk_norm` is False or "" for none,
    True or "head" (of each head) or "full" (of all heads together). `mtp_layers` are extra layers that predict further
    tokens (DeepSeek-V3, arXiv 2412.19437).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    biases: bool = False
    norm: str = "rms"
    learned_positions: int = 0
    qk_norm: bool | str = False
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    first_dense_layers: int = 0
    moe_every: int = 1
    imbalance: float = 1.0
    q_lora: int = 0
    kv_lora: int = 0
    rope_head_dim: int = 0
    v_head_dim: int = 0
    mtp_layers: int = 0
    sliding_window: int | None = None
    bias_of: tuple[str, ...] = ()
    norms: int = 2
    embedding_norm: bool = False
    final_norm: bool = True
    shared_gate: bool = False
    sinks: bool = False
    embed_width: int = 0  # of a token table that is projected to `hidden` (OPT-350M); 0: `hidden`
    hf_type: str = ""

    @property
    def latent(self) -> bool:
        """Whether keys and values are low-rank."""
        return self.kv_lora > 0

    @property
    def key_dim(self) -> int:
        """Width of one head's query and key."""
        return self.head_dim + (self.rope_head_dim if self.latent else 0)

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return (self.v_head_dim or self.head_dim) if self.latent else self.head_dim

    @property
    def q_width(self) -> int:
        """Columns of all queries."""
        return self.heads * self.key_dim

    @property
    def kv_width(self) -> int:
        """Columns of all keys; latent attention has a key for every head."""
        return (self.heads if self.latent else self.kv_heads) * self.key_dim

    @property
    def out_width(self) -> int:
        """Rows of the output projection."""
        return self.heads * self.value_dim

    def mixed(self, layer: int) -> bool:
        """Whether layer `layer` is a mixture of experts."""
        past = layer - self.first_dense_layers
        return self.experts > 0 and past >= 0 and past % self.moe_every == self.moe_every - 1

    def bias(self, place: str) -> bool:
        """Whether the products at `place` have a bias."""
        return place in self.bias_of or (self.biases and place in ("qkv", "out", "ffn"))
