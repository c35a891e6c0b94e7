"""Forecasts, searches and published rows as text of 80 columns. Imports no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transmamba.plan_parallel import short_bytes
from transmamba.planning.forecast import Forecast, time_parts
from transmamba.planning.published import Prediction, summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from transmamba.planning.search import Search

_UNITS = {"tokens_per_s_per_gpu": "tok/s/GPU", "s_per_step": "s/step"}
_HALVES = {"fit": "fitted half", "check": "held-out half"}
_MEMORY = {"weights_bytes": "weights", "gradients_bytes": "grads", "optimizer_bytes": "optim",
           "activations_bytes": "activations", "logits_bytes": "logits", "reserved_bytes": "reserve"}  # fmt: skip


def print_forecast(found: Forecast, console: "Console") -> None:
    """Memory by stage, then time, speed and cost, each on its line."""
    from rich.text import Text

    devices = f"{found.gpus} x {found.hardware}"
    if found.device_memory_bytes is not None:
        console.print(f"{devices}, {short_bytes(round(found.device_memory_bytes))} each; at its peak a rank holds:",
                      highlight=False)  # fmt: skip
        table = _table("stage", *_MEMORY.values(), "total")
        for number, stage in enumerate(found.stages):
            sizes = [getattr(stage, name) for name in _MEMORY]
            table.add_row(str(number), *(short_bytes(size) for size in sizes), short_bytes(stage.total_bytes))
        console.print(table)
    from rich.table import Table

    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column()
    for name, text in _lines(found, devices):
        lines.add_row(Text(name, style="dim"), Text(text))
    console.print(lines)


def _lines(found: Forecast, devices: str) -> list[tuple[str, str]]:
    lines = []
    if found.device_memory_bytes is not None:
        verdict = "fits" if found.fits else "does not fit"
        peaks = ", ".join(
            f"{name} {short_bytes(size)}{'' if size <= found.device_memory_bytes else ' (too large)'}"
            for name, size in found.peak_memory_bytes.items()
        )
        lines.append(("memory", f"{verdict} with train.recompute={found.recompute}; {peaks}"))
    if_fitted = ", if it fitted" if found.fits is False else ""
    if if_fitted:
        lines.append(("to fit", _what_fits(found)))
    if found.communication:
        sent = ", ".join(
            f"{group.group} {short_bytes(group.sent_bytes)} {_seconds(group.seconds)}"
            for group in found.communication
            if group.sent_bytes >= 1000
        )
        lines.append(("sent a step", sent or "nothing"))
    low, high = found.step_s * (1 - found.error_bar), found.step_s * (1 + found.error_bar)
    lines.append(("step time", f"{_seconds(found.step_s)}  ({_seconds(max(0.0, low))} to {_seconds(high)}){if_fitted}"))
    lines.append(("how sure", found.error_words))
    if found.time is not None:
        parts = [f"{name} {s / found.step_s:.0%}" for name, s in time_parts(found.time) if s >= 0.005 * found.step_s]
        lines.append(("spent on", ", ".join(parts)))
        if found.stage_imbalance:
            lines.append(("stages", f"the dearest takes {found.stage_imbalance:.1%} more than the mean"))
    lines.append(("speed", f"{found.tokens_per_s_per_gpu:,.0f} tokens/s per device{if_fitted}"))
    if found.mfu_causal_half is not None:
        half, full = found.mfu_causal_half, found.mfu_full_attention
        lines.append(("MFU", f"{half:.1%} by the causal half of attention, {full:.1%} by its whole square"))
    lines.append(("cost", f"{_count(found.tokens)} tokens in {_days(found.days)} on {devices}, "
                          f"{found.gpu_hours:,.4g} device-hours{if_fitted}"))  # fmt: skip
    if found.anchor is not None:
        near = found.anchor
        error = near.predicted_step_s / near.measured_step_s - 1
        unit = _UNITS.get(near.kind, "TFLOP/s/GPU")
        lines.append(("nearest run", f"{near.row} ({near.source}): {near.measured:,.6g} {unit} measured; "
                                     f"the model is off by {error:+.1%} there"))  # fmt: skip
    return lines


def _what_fits(found: Forecast) -> str:
    ways = [] if found.largest_micro_batch is None else [f"train.micro_batch={found.largest_micro_batch} or less"]
    assert found.device_memory_bytes is not None
    fitting = [way for way, size in found.peak_memory_bytes.items() if size <= found.device_memory_bytes]
    ways += [f"train.recompute={way}" for way in fitting[:1]]
    return f"{', or '.join(ways) or 'cut the model over more ranks'}; --search {found.gpus} ranks all layouts"


def print_search(found: "Search", console: "Console") -> None:
    """The best layouts as a table, and the overrides of the first."""
    console.print(
        f"{found.n_valid} valid layouts on {found.gpus} x {found.hardware}; the fastest that fit in memory:",
        highlight=False,
    )
    table = _table("tp", "pp", "vpp", "cp", "sp", "dp", "zero", "micro", "recompute", "step", "tok/s/GPU", "MFU", "mem")
    for one in found.best:
        sizes = [one.tp, one.pp, one.vpp, one.cp, "yes" if one.sp else "no", one.dp, one.zero, one.micro_batch]
        speed = [_seconds(one.step_s), f"{one.tokens_per_s_per_gpu:,.0f}", f"{one.mfu_causal_half:.1%}"]
        table.add_row(*map(str, sizes), one.recompute, *speed, short_bytes(one.memory_bytes))
    console.print(table)
    console.print(f"first: {' '.join(found.best[0].overrides)}", style="dim", highlight=False)
    console.print("MFU counts the causal half of attention", style="dim")


def published_record(predictions: Sequence[Prediction]) -> dict[str, object]:
    """Rows and the summary of each half as plain data."""
    rows = [
        {
            "source": one.row.source,
            "row": one.row.name,
            "half": one.row.half,
            "measured_step_s": one.row.step_s,
            "predicted_step_s": one.step_s,
            "error": one.error,
            "guessed": one.row.guessed,
        }
        for one in predictions
    ]
    return {"rows": rows, "halves": {half: summary(part) for half, part in _halves(predictions)}}


def print_published(predictions: Sequence[Prediction]) -> None:
    """One line per row: seconds per step measured and predicted; then the medians of each half."""
    print(f"{'source':<17} {'run':<33} {'measured':>8}{'model':>8}{'error':>8} half")
    for one in predictions:
        source, name = one.row.source[:17], one.row.name[:33]
        mark = "*" if one.row.guessed else " "
        print(f"{source:<17} {name:<33}{mark}{one.row.step_s:>8.4g}{one.step_s:>8.4g}{one.error:>+8.1%} {one.row.half}")
    print("seconds per step measured, predicted; * some sizes of the row are guessed")
    for half, part in _halves(predictions):
        found = summary(part)
        print(f"{_HALVES.get(half, 'no half'):<14} {found['rows']:>4} rows  median |error| {found['median_error']:.1%}"
              f"  within 10 %: {found['within_10_percent']:.0%}")  # fmt: skip


def _halves(predictions: Sequence[Prediction]) -> list[tuple[str, list[Prediction]]]:
    names = dict.fromkeys(one.row.half for one in predictions)
    return [(name, [one for one in predictions if one.row.half == name]) for name in names]


def _table(*names: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms" if s >= 1e-3 else f"{1e6 * s:.3g} us"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.3g} days"
    if days >= 1 / 24:
        return f"{24 * days:.3g} hours"
    return f"{1440 * days:.3g} minutes" if days >= 1 / 1440 else _seconds(86400 * days)


def _count(n: int) -> str:
    for scale, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale:
            return f"{n / scale:.4g}{letter}"
    return str(n)
