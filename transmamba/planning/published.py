"""Published training speeds as data, and how the time model does on them. Imports no torch."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from transmamba.errors import ConfigError, Problem
from transmamba.planning.shape import Layout, Shape, transformer_layer
from transmamba.planning.timing import FOLDER, Constants, Hardware, gpu, step_time

TABLE = FOLDER / "published.csv"
KINDS = ("tokens_per_s_per_gpu", "s_per_step", "tflops_per_gpu_full", "tflops_per_gpu_causal")
NEEDED = (
    *("source", "row", "hardware", "gpus", "n_layers", "d_model", "n_heads", "d_ff", "vocab", "seq_len"),
    *("global_batch", "value", "kind"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One published measurement and the model and layout it was made with."""

    source: str
    name: str
    half: str
    shape: Shape
    layout: Layout
    hardware: Hardware
    value: float
    kind: str
    guessed: str

    @property
    def step_s(self) -> float:
        """The measurement as seconds per step."""
        tokens = self.layout.global_batch * self.layout.seq_len
        if self.kind == "s_per_step":
            return self.value
        if self.kind == "tokens_per_s_per_gpu":
            return tokens / (self.value * self.layout.gpus)
        flops = training_flops(self.shape, self.layout.seq_len, full=self.kind == "tflops_per_gpu_full")
        return flops * tokens / (self.value * 1e12 * self.layout.gpus)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row and the model's answer."""

    row: Row
    step_s: float

    @property
    def error(self) -> float:
        """Predicted over measured seconds, less one."""
        return self.step_s / self.row.step_s - 1


def training_flops(shape: Shape, seq_len: int, *, full: bool) -> float:
    """Per token, forward and backward: 6 per weight of a matrix, and attention in full or its causal half."""
    attention = sum(12 * layer.attention_channels * seq_len for layer in shape.layers if layer.keys)
    matrices = sum(layer.parameters for layer in shape.layers) + shape.vocab_rows * shape.d_model
    return 6 * matrices + attention * (1.0 if full else 0.5)


def read_rows(path: Path = TABLE) -> list[Row]:
    """Rows of a table in the format of `published.csv`; columns that it lacks or leaves blank take their defaults.

    Raises:
        ConfigError: the file cannot be read, or a row lacks a value or has a wrong one; the row is named.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([Problem("--published", f"cannot be read: {error}", path, "give a CSV file")]) from None
    rows, problems = [], []
    for number, record in enumerate(records, 2):
        try:
            rows.append(_row({name: value for name, value in record.items() if name and value}))
        except (KeyError, ValueError, TypeError) as error:
            what = f"line {number} cannot be used: {error}"
            problems.append(Problem("--published", what, path, f"give at least {', '.join(NEEDED)}"))
    if problems or not rows:
        raise ConfigError(problems or [Problem("--published", "no rows", path, "give a table with rows")])
    return rows


def _row(record: dict[str, str]) -> Row:
    for name in NEEDED:
        if name not in record:
            raise KeyError(f"no {name}")
    numbers = {name: int(record[name]) for name in NEEDED[3:11]}
    heads, seq_len = numbers["n_heads"], numbers["seq_len"]
    head_dim = int(record.get("head_dim", numbers["d_model"] // heads))
    kv_heads, matrices = int(record.get("kv_heads", heads)), int(record.get("ffn_matrices", "3"))
    keys = (seq_len + 1) / 2
    layer = transformer_layer(numbers["d_model"], heads, kv_heads, head_dim, numbers["d_ff"], matrices, keys)
    tied = record.get("tied", "false").lower() in ("true", "1", "yes")
    shape = Shape((layer,) * numbers["n_layers"], numbers["d_model"], numbers["vocab"], tied)
    value, kind = float(record["value"]), record["kind"]
    if kind not in KINDS or not value > 0:
        raise ValueError(f"kind {kind} of value {value}; kinds are {', '.join(KINDS)}")
    hardware = gpu(record["hardware"])
    half, guessed = record.get("half", ""), record.get("guessed", "")
    layout = _layout(record, numbers["gpus"], seq_len, numbers["global_batch"])
    return Row(record["source"], record["row"], half, shape, layout, hardware, value, kind, guessed)


def _layout(record: dict[str, str], gpus: int, seq_len: int, global_batch: int) -> Layout:
    """Defaults: micro-batches of one; FSDP by eager PyTorch, everything else by fused kernels."""
    tp, pp, vpp, cp, zero = (int(record.get(name, "1")) for name in ("tp", "pp", "vpp", "cp", "zero"))
    kernels = record.get("stack") or ("eager" if zero == 3 else "fused")
    usual = "cudnn" if kernels == "fused" else "triton" if record.get("date", "2024") < "2024" else "flash2"
    recompute = record.get("recompute", "none")
    if kernels not in ("fused", "eager") or recompute not in ("none", "selective", "full"):
        raise ValueError(f"stack {kernels} or recompute {recompute}")
    attention = record.get("attention") or usual
    if attention not in ("cudnn", "flash2", "triton"):
        raise ValueError(f"attention {attention}")
    layout = Layout(
        gpus,
        seq_len,
        global_batch,
        micro_batch=int(record.get("micro_batch", "1")),
        shard_group=int(record["shard_group"]) if "shard_group" in record else None,
        sp=record.get("sp", "true" if tp > 1 else "false").lower() in ("true", "1", "yes"),
        recompute=recompute,
        reduce_bytes=int(record.get("reduce_bytes", "2")),
        kernels=kernels,
        attention=attention,
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        zero=zero,
    )
    if gpus % (tp * pp * cp):
        raise ValueError(f"tp x pp x cp does not divide {gpus} GPUs")
    return layout


def predict(rows: Sequence[Row], k: Constants) -> list[Prediction]:
    """The model's answer for every row."""
    return [Prediction(row, step_time(row.shape, row.layout, row.hardware, k).step_s) for row in rows]


def summary(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Median and mean of |error|, its 80th percentile, and the share of rows within 10 %."""
    errors = sorted(abs(prediction.error) for prediction in predictions)
    return {
        "rows": len(errors),
        "median_error": median(errors),
        "mean_error": sum(errors) / len(errors),
        "p80_error": errors[min(len(errors) - 1, int(0.8 * len(errors)))],
        "within_10_percent": sum(error <= 0.1 for error in errors) / len(errors),
    }


def nearest(shape: Shape, layout: Layout, hardware: Hardware) -> Row:
    """The published run most like a plan: same chip first, then near in size, window, GPUs and layout."""
    weights = len(shape.layers) * shape.layers[0].parameters
    sizes = (weights, layout.seq_len, layout.gpus, layout.tp, layout.pp, layout.cp)

    def distance(record: dict[str, str]) -> float:
        depth, width, d_ff = (int(record[name]) for name in ("n_layers", "d_model", "d_ff"))
        others = [depth * width * (4 * width + int(record["ffn_matrices"]) * d_ff)]
        others += [int(record[name]) for name in ("seq_len", "gpus", "tp", "pp", "cp")]
        away = sum(abs(math.log(a / b)) for a, b in zip(sizes, others, strict=True))
        return away + 100 * (not record["hardware"].startswith(hardware.chip))

    with TABLE.open(newline="", encoding="utf-8") as file:
        return _row({name: value for name, value in min(csv.DictReader(file), key=distance).items() if value})


def with_half(rows: Sequence[Row], half: str) -> list[Row]:
    """Rows of one half, "fit" or "check"."""
    return [row for row in rows if row.half == half]
