"""The sections of a job: every key with its type, range, default and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticKnownError


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _not_a_number(value: Any) -> Any:
    """Refuses 0 and 1 for true and false. A Literal does not, since Python takes them as equal."""
    if type(value) in (int, float):
        raise PydanticKnownError("literal_error", {"expected": "'auto', True or False"})
    return value


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrNone = Annotated[int, Field(ge=0, le=2**31 - 1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Betas = Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)]


def _key(default: Any, meaning: str) -> Any:
    return Field(default, description=meaning)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ModelSection(_Section):
    """What is trained: exactly one of `family` (with its shape), `hf` or `module`."""

    family: Literal["llama"] | None = _key(None, "built-in family; covers Llama, Mistral, Qwen2 and Qwen3 shapes")
    layers: Annotated[int, Field(ge=1, le=10_000)] | None = _key(None, "number of layers")
    hidden: Count | None = _key(None, "width of the residual stream")
    heads: Count | None = _key(None, "query heads")
    kv_heads: Count | None = _key(None, "key and value heads; default: heads")
    ffn: Count | None = _key(None, "width of the feed-forward part")
    vocab: Count | None = _key(None, "tokens in the vocabulary")
    head_dim: Count | None = _key(None, "width of a head; default: hidden / heads")
    rope_theta: Positive = _key(10000.0, "base of the rotary positions")
    rope_scaling: dict[str, Any] | None = _key(
        None, 'long-context scaling, such as { rope_type = "linear", factor = 2.0 }'
    )
    norm_eps: Positive = _key(1e-5, "epsilon of the norms")
    tied_embeddings: bool = _key(False, "the output head is the token embedding")
    qk_norm: bool = _key(False, "normalise queries and keys of each head (Qwen3)")
    attention_bias: bool = _key(False, "biases on queries, keys and values (Qwen2)")
    hf: Text | None = _key(None, "path of a Hugging Face folder: shape, weights and tokenizer come from it")
    module: Text | None = _key(None, 'any nn.Module factory, as "package.file:build"')
    module_folder: Text | None = _key(None, "folder that `module` is imported from; default: the job file's")
    arguments: dict[str, Any] = _key({}, "keyword arguments for the factory of `module`")


class DataSection(_Section):
    """What it is trained on."""

    source: Text = _key("stdlib", '"stdlib", "digits", or path or URL of a .txt or .jsonl file or of a folder')
    seq_len: Annotated[int, Field(ge=1, le=2**27)] | None = _key(None, "tokens per sequence (language models)")
    tokenizer: Text = _key(
        "bpe", '"bpe" (trained on the source), "bytes", or the path of a tokenizer.json or its folder'
    )
    text_key: Text = _key("text", "the field of a .jsonl record that holds its text")
    held_out: Fraction = _key(0.02, "fraction of the documents kept aside to measure on")


class TaskSection(_Section):
    """What is learnt: the shape of a batch, the loss, the metric."""

    name: Literal["language-model", "classification"] = _key(
        "language-model", "default: language-model for family and hf, classification for module"
    )


class TrainSection(_Section):
    """How it is trained."""

    steps: Count = Field(description="optimizer steps")
    lr: Positive = Field(description="peak learning rate")
    global_batch: Count = Field(description="sequences (or samples) per step, over all devices")
    precision: Literal["auto", "fp32", "bf16"] = _key("auto", "of the arithmetic; auto follows the device")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = _key(0, "of the initial weights and the order of samples")
    warmup_steps: CountOrNone = _key(0, "steps of linear warm-up; default: a tenth of the steps, at most 100")
    decay: Literal["cosine", "wsd", "constant"] = _key("cosine", "learning rate after the warm-up")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = _key(0.1, "last learning rate / lr")
    decay_fraction: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = _key(
        0.2, "wsd: share of steps that decay"
    )
    weight_decay: NotNegative = _key(0.1, "AdamW's, on matrices")
    betas: Betas = _key((0.9, 0.95), "AdamW's")
    eps: Positive = _key(1e-8, "AdamW's")
    clip: NotNegative = _key(1.0, "largest gradient norm over all ranks; 0 is off")
    eval_every: CountOrNone = _key(0, "steps between measurements on held-out data; 0: at the end only")
    eval_batches: Count = _key(8, "batches of a measurement")
    compile: Annotated[Literal["auto", True, False], BeforeValidator(_not_a_number)] = _key(
        "auto", "torch.compile; auto: where it pays"
    )


class GroupOfDevices(_Section):
    """Devices of one kind in a cluster of several."""

    named: Text = Field(description="a device of the table")
    devices: Annotated[int, Field(ge=1, le=1_000_000)] = Field(description="number of devices")
    devices_per_node: Annotated[int, Field(ge=1, le=1_000_000)] | None = _key(None, "of one machine")


class ClusterSection(_Section):
    """What it runs on; default: this machine."""

    devices: Annotated[int, Field(ge=1, le=1_000_000)] | None = _key(None, "devices in all")
    devices_per_node: Annotated[int, Field(ge=1, le=1_000_000)] | None = _key(None, "devices of one machine")
    named: Text | None = _key(None, "a device of the table, to plan for another machine")
    groups: Annotated[tuple[GroupOfDevices, ...], BeforeValidator(_as_tuple)] = _key(
        (), 'devices of several kinds, to plan for: [{named = "a100-sxm-80gb", devices = 8}, ...]'
    )
    dollars_per_hour: Positive | None = _key(None, "price of one device; default: the table's, where it has one")
    spot: bool = _key(False, "on capacity that can be reclaimed: cheaper, interrupted more often")
    failures_per_1000_node_days: NotNegative | None = _key(None, "unexpected interruptions; default: as published")


class LayoutSection(_Section):
    """Pins: what is fixed of the layout. The rest is planned."""

    dp: Count | None = _key(None, "total data-parallel degree")
    shard: Count | None = _key(None, "how many share one copy of the weights (FSDP); divides dp x cp")
    tp: Count | None = _key(None, "tensor-parallel degree")
    pp: Count | None = _key(None, "pipeline stages")
    vpp: Count | None = _key(None, "virtual stages per rank")
    cp: Count | None = _key(None, "context-parallel degree")
    ep: Count | None = _key(None, "expert-parallel degree; divides dp x cp")
    sequence_parallel: bool | None = _key(None, "split activations between tensor-parallel products too")
    micro_batch: Count | None = _key(None, "samples of one forward pass")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zbv", "dualpipev"] | None = _key(
        None, "order of the pipeline's micro-batches"
    )
    recompute: Literal["none", "selective", "full"] | None = _key(None, "activations computed again, not kept")
    offload: bool | None = _key(None, "optimizer state in host memory")

    def pins(self) -> dict[str, Any]:
        """The fields that are pinned, by name."""
        return {name: value for name, value in self if value is not None}


class CheckpointSection(_Section):
    """When the state is saved."""

    every: CountOrNone | None = _key(
        None, "steps between checkpoints; 0: at the end only; default: planned, three minutes of work apart at most"
    )
    keep: Count = _key(2, "newest checkpoints kept")
    asynchronous: bool = _key(True, "write while training goes on")
    url: Text | None = _key(None, "place in an object store, such as s3://bucket/runs/job, where copies are kept too")


class LaunchSection(_Section):
    """How processes are started."""

    on: Literal["local", "ray", "agents"] = _key(
        "local", "where the ranks run: this machine, a Ray cluster, or nodes whose agents somebody else starts"
    )
    address: Text | None = _key(
        None, "agents: HOST:PORT that the hub listens on; ray: the cluster's address (default: one is started)"
    )
    devices_min: Count | None = _key(
        None,
        "fewest devices to start with once all were waited for, and to go on with after a loss; default: all, then one",
    )
    interface: Text = _key("lo", "network interface that the ranks talk over; with several nodes, lo: each node's own")
    timeout_seconds: Positive = _key(300.0, "longest wait for another process, and for the nodes to start with")


class ServeSection(_Section):
    """How the result is served."""

    host: Text = _key("127.0.0.1", "address to listen on")
    http_port: Port = _key(8000, "0: any free port")
    grpc_port: Port = _key(7070, "0: any free port")
    max_batch: Annotated[int, Field(ge=1, le=65536)] | None = _key(None, "requests computed together; default: planned")
    max_len: Count | None = _key(None, "longest sequence, prompt included; default: the model's")
    token_file: Text | None = _key(None, "file holding the token that clients must send")
    tp: Count | None = _key(None, "tensor-parallel degree of the engine; default: planned")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "fp4"] = _key(
        "auto", "of the weights; auto: the model's own, fewer bits only where the target asks for it"
    )
    ttft_seconds: Positive | None = _key(None, "target: mean time to the first token, waiting included")
    tpot_seconds: Positive | None = _key(None, "target: mean time between two tokens of an answer")
    requests_per_second: Positive | None = _key(None, "target: requests answered, over all replicas")
    prompt_tokens: Count | None = _key(None, "tokens of a prompt that is planned for; default: 512 or what fits")
    output_tokens: Count | None = _key(None, "tokens of an answer that is planned for; default: 128 or what fits")


class JobSections(_Section):
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    task: TaskSection = Field(default_factory=TaskSection)
    train: TrainSection
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    layout: LayoutSection = Field(default_factory=LayoutSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)
    serve: ServeSection = Field(default_factory=ServeSection)
