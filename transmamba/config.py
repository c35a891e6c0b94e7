"""Every knob of a run: name, type, range, default and unit. Sizes are global. Imports no torch."""

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_NUMBER = r"(?:0|[1-9]\d{0,17})(?:\.\d{1,18})?"  # no leading zero: "010" is neither 8 nor 10
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_count(value: object) -> object:
    """Read human sizes such as "50M" or "1.5k" as integers; the rest passes through unchanged."""
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1e9
    match = re.fullmatch(rf"({_NUMBER})([kKmMbBgGtT]?)", value) if isinstance(value, str) else None
    if match is None:
        return value
    number = float(match[1]) * _SCALES[match[2].lower()]
    return int(number) if number == int(number) else value


def parse_seconds(value: object) -> object:
    """Read human durations such as "90s" or "2h" as seconds; the rest passes through unchanged."""
    match = re.fullmatch(rf"({_NUMBER})([smhd])", value) if isinstance(value, str) else None
    return value if match is None else float(match[1]) * _UNITS_S[match[2]]


def parse_point(value: object) -> object:
    """Read "inf" as infinity; integers are tokens, floats in (0, 1] are fractions of seq_len."""
    return math.inf if value in ("inf", ".inf") else value


def check_point(value: int | float) -> int | float:
    """Refuse what is neither a token count, a fraction nor infinity (ValueError)."""
    if isinstance(value, int):
        if value < 0:
            raise ValueError("a TransPoint in tokens is 0 or more")
    elif not (0 < value <= 1 or value == math.inf):
        raise ValueError("a TransPoint is a whole number of tokens, a fraction of seq_len in (0, 1] or inf")
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Point = Annotated[
    int | Annotated[float, Field(allow_inf_nan=True)],
    BeforeValidator(parse_point),
    AfterValidator(check_point),
]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
ScheduleName = Literal[
    "cycle", "explicit", "uniform", "log", "attention_only", "mamba_only", "layer_hybrid", "random",
    "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9",
]  # fmt: skip


class Section(BaseModel):
    """A group of keys: unknown keys and silent type conversions are refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        # The whole tree is built once, at its first use, instead of every section by itself at import.
        defer_build=True,
    )


class ModelConfig(Section):
    kind: Literal["transmamba", "transformer", "mamba2", "hybrid"] = "transmamba"
    """Layer kind; `hybrid` mixes transformer and mamba2 layers by `pattern`."""
    n_layers: int = Field(default=8, ge=1, le=10_000)
    """Layers; each is one mixer and one feed-forward network."""
    d_model: int = Field(default=128, ge=1, le=1_000_000)
    """Model width."""
    n_heads: int = Field(default=8, ge=1, le=100_000)
    """Attention heads, and scan heads of the transmamba kind."""
    head_dim: int | None = Field(default=None, ge=2, le=100_000)
    """Width of a head (keys, queries, values and state); null means d_model / n_heads."""
    d_ff: int = Field(default=352, ge=0, le=10_000_000)
    """SwiGLU width; 0 leaves the feed-forward network out."""
    vocab_size: int | None = Field(default=None, ge=2, le=100_000_000)
    """Embedding rows; null means the tokenizer's size. Rounded up to a multiple of 128 either way."""
    tied: bool = True
    """Input and output embeddings are one tensor."""
    rope: Literal["attention", "both", "none"] = "attention"
    """Which readings rotate queries and keys (options A, B, C of the design)."""
    rope_theta: float = Field(default=10000.0, gt=1, le=1e12)
    """Base of the rotary frequencies."""
    conv_width: int = Field(default=4, ge=1, le=8)
    """Taps of the causal depthwise convolution."""
    conv_activation: Literal["silu", "none"] = "silu"
    """Nonlinearity after the convolution."""
    mixer_norm: Literal["head", "none"] = "head"
    """RMSNorm of the mixer's output, per head."""
    d_skip: bool = True
    """The scan's skip connection D."""
    dt_min: float = Field(default=1e-3, gt=0, le=100)
    """Smallest initial time step."""
    dt_max: float = Field(default=1e-1, gt=0, le=100)
    """Largest initial time step."""
    norm_eps: float = Field(default=1e-5, gt=0, le=1)
    """Epsilon of every RMSNorm."""
    init_std: float = Field(default=0.02, gt=0, le=10)
    """Standard deviation of the initial weights; output projections are scaled by 1/sqrt(2 n_layers)."""
    ssm_expand: int = Field(default=2, ge=1, le=64)
    """mamba2 layers: inner width over d_model."""
    ssm_head_dim: int = Field(default=64, ge=1, le=100_000)
    """mamba2 layers: value width of a head."""
    ssm_state: int = Field(default=128, ge=1, le=100_000)
    """mamba2 layers: key (state) width."""
    ssm_groups: int = Field(default=1, ge=1, le=100_000)
    """mamba2 layers: groups that share B and C."""
    pattern: Text = "MMMAMMM"
    """hybrid kind: A (attention) and M (mamba2) tiled over the layers."""


class TranspointChange(Section):
    step: int = Field(ge=1, le=10**12)
    """First training step that uses this schedule."""
    schedule: ScheduleName = "explicit"
    points: Annotated[list[Point], Field(min_length=1)] | None = None


class TranspointConfig(Section):
    schedule: ScheduleName = "cycle"
    """How each layer's TransPoint is chosen; `points` overrules it."""
    points: Annotated[list[Point], Field(min_length=1)] | None = None
    """Tokens, fractions of seq_len or inf; tiled over the layers."""
    period: int = Field(default=8, ge=2, le=10_000)
    """uniform and log: layers until the schedule repeats."""
    attention_every: int = Field(default=8, ge=1, le=10_000)
    """layer_hybrid: one layer in so many is attention, the others are scans."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """random: which draw."""
    changes: list[TranspointChange] = Field(default_factory=list)
    """Schedules that take over at later steps."""


class DataStage(Section):
    step: Count = Field(ge=1, le=10**12)
    """Data step from which this blend holds."""
    blend: dict[Text, float]
    """Weight of every source that is drawn from."""


class DataConfig(Section):
    path: Text | None = None
    """Folder or URL of `transmamba data prepare`; null means the built-in documentation corpus, or the sources."""
    sources: dict[Text, Text] = Field(default_factory=dict)
    """Several folders or URLs by name, instead of path; each brings its validation set."""
    blend: dict[Text, float] | None = None
    """Weight of every source; needed with two or more."""
    stages: list[DataStage] = Field(default_factory=list)
    """Other blends later in training."""
    seq_len: Count = Field(default=256, ge=2, le=2**24)
    """Tokens per training window."""
    document_mask: bool = True
    """Attention, convolution, state and positions start anew at every document."""
    shuffle_shards: Annotated[int, Field(ge=1, le=10**9)] | Literal["all"] | None = None
    """Shards whose windows are shuffled together; null is all, and 16 when a source is remote."""
    skip: list[Text] = Field(default_factory=list)
    """Ranges "first:last" of data steps to leave out (last excluded)."""
    prefetch: int | None = Field(default=None, ge=0, le=64)
    """Steps that a process of its own reads ahead; null is 2 with a GPU or a remote source, else 0. A remote source
    is always read ahead by one at least."""
    ledger: bool = False
    """Write which window went to which step and rank to run.dir/ledger."""
    cache_dir: Text | None = None
    """Where copies of remote shards are kept; null is ~/.cache/transmamba/shards."""
    cache_gib: float = Field(default=100.0, gt=0, le=1e9)
    """Most space for them, in GiB."""


class TrainConfig(Section):
    steps: Annotated[Count, Field(ge=1, le=10**12)] | None = None
    """Optimizer steps of the whole run."""
    tokens: Annotated[Count, Field(ge=1, le=10**18)] | None = None
    """Tokens of the whole run, instead of steps."""
    global_batch: Count = Field(default=8, ge=1, le=10**9)
    """Windows per optimizer step."""
    micro_batch: Count = Field(default=8, ge=1, le=10**9)
    """Windows per forward pass and rank; not given, the largest up to 8 that suits ranks and pipeline."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Computed again in the backward: nothing, the mixing of tokens (conv, scan, attention), or whole layers."""
    replica_check_every: int = Field(default=0, ge=0, le=10**12)
    """Steps between comparisons of replicated weights; 0 is off."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads; null chooses by the machine's load."""
    deterministic: bool = False
    """On a GPU, torch's own operations (attention's backward) also sum in one order, at a price; ours always do."""
    layer_stats_every: int = Field(default=0, ge=0, le=10**12)
    """Steps between per-layer statistics in metrics.jsonl; 0 is off."""


class OptimConfig(Section):
    lr: float = Field(default=3e-3, gt=0, le=1)
    """Peak learning rate."""
    min_lr: float = Field(default=3e-4, ge=0, le=1)
    """Learning rate at the end of the decay; not given, at most lr / 10."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.95]
    )
    """Decay of the two moments of AdamW."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Epsilon of AdamW."""
    weight_decay: float = Field(default=0.1, ge=0, le=100)
    """Decoupled weight decay of matrices."""
    clip: float | None = Field(default=1.0, gt=0, le=1e9)
    """Largest global gradient norm; null is off."""
    z_loss: float = Field(default=0.0, ge=0, le=100)
    """Weight of the squared log-partition penalty."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    unit: Literal["steps", "tokens"] = "steps"
    """Unit of warmup and decay."""
    warmup: Count = Field(default=20, ge=0, le=10**18)
    """Length of the linear warm-up; not given, 20 steps or a tenth of a shorter run."""
    decay: Annotated[Count, Field(ge=0, le=10**18)] | None = None
    """wsd: length of the final decay; null means a tenth of the run."""


class ParallelConfig(Section):
    tp: int = Field(default=1, ge=1, le=100_000)
    """Tensor parallel degree."""
    pp: int = Field(default=1, ge=1, le=100_000)
    """Pipeline stages."""
    vpp: int = Field(default=1, ge=1, le=100_000)
    """Model chunks per pipeline stage."""
    cp: int = Field(default=1, ge=1, le=100_000)
    """Context parallel degree."""
    sp: bool = False
    """Sequence parallelism of the per-token work (needs tp >= 2)."""


class ZeroConfig(Section):
    stage: int = Field(default=1, ge=0, le=3)
    """DeepSpeed ZeRO stage; 0 is plain AdamW in fp32."""


class ValidationConfig(Section):
    every: int = Field(default=100, ge=0, le=10**12)
    """Steps between validations; 0 validates at the end only."""
    tokens: Count = Field(default=16384, ge=0, le=10**18)
    """Tokens per set in a validation during training; 0 takes all. The final one takes all."""
    sets: dict[Text, Text] = Field(default_factory=dict)
    """More validation sets: name -> prepared folder (its validation split)."""


class CheckpointConfig(Section):
    every: int = Field(default=100, ge=1, le=10**12)
    """Steps between checkpoints; the last step is always saved. Not given, at most the run's length."""
    keep: int = Field(default=2, ge=2, le=10**6)
    """Newest checkpoints that stay."""
    keep_every: int | None = Field(default=None, ge=1, le=10**12)
    """Checkpoints of steps that this divides stay for ever; null keeps none of them."""
    background: bool = True
    """Training goes on while files are written, from a copy in host memory as large as the rank's training state."""
    max_failures: int = Field(default=3, ge=1, le=10**6)
    """Saves that may fail in a row before the run ends; the last one of a run must not fail."""


class ResumeConfig(Section):
    mode: Literal["auto", "must", "never"] = "auto"
    """auto continues when run.dir holds a checkpoint."""
    allow: list[Literal["seq_len", "transpoint"]] = Field(default_factory=list)
    """What may differ from the checkpoint."""


class SampleConfig(Section):
    prompt: Annotated[str, Field(max_length=4096)] = "Return the"
    """Text that the model completes before and after training; empty leaves it out."""
    tokens: int = Field(default=40, ge=1, le=100_000)
    """Tokens to add."""


class WatchdogConfig(Section):
    limit_s: Annotated[Seconds, Field(gt=0, le=10**8)] | None = None
    """Seconds without a heartbeat that count as a hang."""


class WandbConfig(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online when a key is configured, else offline."""
    project: Text = "transmamba"
    group: Text | None = None


class RunConfig(Section):
    dir: Text | None = None
    """Run folder; null makes a new one under runs/."""


class Config(Section):
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of weights and data order."""
    precision: Literal["fp32", "bf16"] | None = None
    """null means bf16 on a GPU and fp32 on a CPU."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    transpoint: TranspointConfig = Field(default_factory=TranspointConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    resume: ResumeConfig = Field(default_factory=ResumeConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    run: RunConfig = Field(default_factory=RunConfig)


def total_steps(config: Config, surplus_tokens: int = 0) -> int:
    """Optimizer steps of the run; `train.tokens` is rounded up to whole steps (0 when neither is given).

    Args:
        surplus_tokens: read so far beyond steps x tokens per step, because windows had another length.
    """
    if config.train.steps is not None:
        return config.train.steps
    return -(-max((config.train.tokens or 0) - surplus_tokens, 0) // tokens_per_step(config))


def tokens_per_step(config: Config) -> int:
    """Tokens of one global batch."""
    return config.train.global_batch * config.data.seq_len


def padded_vocab(n: int) -> int:
    """Embedding rows for `n` token ids: the next multiple of 128, whatever the layout."""
    return -(-n // 128) * 128


def head_width(model: ModelConfig) -> int:
    """Width of a head: `head_dim`, or d_model / n_heads."""
    return model.head_dim or model.d_model // model.n_heads


def open_defaults(config: Config) -> list[tuple[str, str]]:
    """Section and name of the keys that nobody gave and that fit themselves to others, also once they are filled in."""
    fitting = (("train", "micro_batch"), ("optim", "min_lr"), ("optim", "warmup"), ("checkpoint", "every"))
    return [(section, name) for section, name in fitting if name not in getattr(config, section).model_fields_set]


def fill_defaults(config: Config, world_size: int = 1) -> None:
    """Fit the defaults that depend on other keys and on the number of processes; what was given stays as it is."""
    steps, not_given = total_steps(config), open_defaults(config)
    if "micro_batch" not in config.train.model_fields_set:
        parallel = config.parallel
        n_rows = config.train.global_batch // max(world_size // (parallel.tp * parallel.pp * parallel.cp), 1)
        # A pipeline needs a micro-batch per stage; what cannot be had is refused by `validate`.
        sizes = [n for n in range(1, 9) if n_rows and n_rows % n == 0 and n_rows // n % parallel.pp == 0]
        config.train.micro_batch = max(sizes, default=1)
    if "min_lr" not in config.optim.model_fields_set:
        config.optim.min_lr = min(config.optim.min_lr, config.optim.lr / 10)
    if "warmup" not in config.optim.model_fields_set:
        warmup = min(config.optim.warmup, steps // 10)
        config.optim.warmup = warmup * (tokens_per_step(config) if config.optim.unit == "tokens" else 1)
    if steps and "every" not in config.checkpoint.model_fields_set:
        config.checkpoint.every = min(config.checkpoint.every, steps)
    for section, name in not_given:
        getattr(config, section).model_fields_set.discard(name)
