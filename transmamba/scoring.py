"""`transmamba evaluate`: a checkpoint on held-out text, in full and by position around the TransPoints."""
# B batch, T tokens.

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transmamba.config import Config
from transmamba.corpus import open_corpus
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokenizer import token_bytes
from transmamba.errors import ConfigError, Problem
from transmamba.generate import load_run
from transmamba.kernels.documents import Documents
from transmamba.model.model import Model
from transmamba.transpoint import effective_points

_ROWS = 8


@dataclass(frozen=True)
class Score:
    """A validation set under a model. `positions` are those of a token in its document, in bins [first, end)."""

    name: str
    loss: float  # nats per token
    bits_per_byte: float
    gzip9_bits_per_byte: float | None
    n_tokens: int
    positions: list[tuple[int, int]]
    loss_at: list[float]
    tokens_at: list[int]


def evaluate(run_dir: Path, *, out: Path, max_tokens: int, seq_len: int | None, progress: bool = True) -> list[Score]:
    """Score the newest valid checkpoint of a run on its validation sets; write `evaluate.json` and `evaluate.png`.

    Args:
        run_dir: a run folder.
        out: folder for the results.
        max_tokens: of every set; 0 takes all.
        seq_len: tokens per window; None takes that of the training. TransPoints given as fractions follow it.

    Raises:
        ConfigError: no run or no valid checkpoint, or data that does not fit.
        DataError, DamagedData: a validation set cannot be read.
    """
    model, tokenizer, config, _ = load_run(run_dir)
    if seq_len is not None:
        config.data.seq_len = seq_len
    corpus = open_corpus(config)
    points = effective_points(config, step=10**18)
    bytes_of = token_bytes(tokenizer)
    if len(bytes_of) != corpus.vocab_size:
        problem = f"its data has {corpus.vocab_size} token ids, its tokenizer {len(bytes_of)}"
        raise ConfigError([Problem("RUN_DIR", problem, run_dir, "give the data that it was trained on")])
    scores = [
        _score(name, model, corpus.held_stream(name, config), config, points, bytes_of, max_tokens, progress)
        for name in corpus.held
    ]
    out.mkdir(parents=True, exist_ok=True)
    record = {"run": str(run_dir), "seq_len": config.data.seq_len, "transpoints": [_plain(p) for p in points]}
    (out / "evaluate.json").write_text(
        json.dumps(record | {"sets": [asdict(score) for score in scores]}, indent=1) + "\n", encoding="utf-8"
    )
    plot_positions(scores, points, out / "evaluate.png")
    return scores


def _score(
    name: str,
    model: Model,
    stream: Stream,
    config: Config,
    points: Sequence[int | float],
    bytes_of: np.ndarray,
    max_tokens: int,
    progress: bool,
) -> Score:
    seq_len, device = stream.seq_len, next(model.parameters()).device
    n_windows = stream.n_sequential_windows
    if max_tokens:
        n_windows = min(n_windows, math.ceil(max_tokens / seq_len))
    nll_at, tokens_at, n_bytes = np.zeros(seq_len), np.zeros(seq_len), 0
    with show_step(f"scoring {name}", n_windows, visible=progress) as advance, torch.no_grad():
        for first in range(0, n_windows, _ROWS):
            windows = stream.sequential(first, min(_ROWS, n_windows - first))
            starts = windows.starts if config.data.document_mask else [row[:1] for row in windows.starts]
            documents = Documents.from_starts([row.tolist() for row in starts], seq_len, device)
            tokens_BT = torch.from_numpy(windows.tokens_BT).to(device)
            hidden_TBD = model.hidden(tokens_BT[:, :-1], points, documents)
            nll_TB, _ = model.head(model.final(hidden_TBD), tokens_BT[:, 1:].T)
            counts_BT = windows.weight_BT
            nll = nll_TB.T.double().cpu().numpy()[counts_BT]
            positions = documents.pos_BT.cpu().numpy()[counts_BT]
            nll_at += np.bincount(positions, nll, minlength=seq_len)
            tokens_at += np.bincount(positions, minlength=seq_len)
            n_bytes += int(bytes_of[windows.tokens_BT[:, 1:][counts_BT]].sum())
            advance(len(counts_BT))
    total, n_tokens = float(nll_at.sum()), int(tokens_at.sum())
    bins = position_bins(seq_len, points)
    sums = [(nll_at[low:high].sum(), tokens_at[low:high].sum()) for low, high in bins]
    return Score(
        name=name,
        loss=total / max(n_tokens, 1),
        bits_per_byte=total / math.log(2) / max(n_bytes, 1),
        gzip9_bits_per_byte=stream.store.split.gzip9_bits_per_byte,
        n_tokens=n_tokens,
        positions=[bin for bin, (_, count) in zip(bins, sums, strict=True) if count],
        loss_at=[float(nll / count) for nll, count in sums if count],
        tokens_at=[int(count) for _, count in sums if count],
    )


def position_bins(seq_len: int, points: Sequence[int | float]) -> list[tuple[int, int]]:
    """Bins of positions that double in width, cut at every TransPoint inside the window."""
    cuts = {0, seq_len, *(min(2**k, seq_len) for k in range(seq_len.bit_length()))}
    cuts |= {int(point) for point in points if 0 < point < seq_len}
    ordered = sorted(cuts)
    return list(itertools.pairwise(ordered))


def plot_positions(scores: Sequence[Score], points: Sequence[int | float], path: Path) -> None:
    """Draw loss over the position in the document, with a line at every TransPoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for score in scores:
        edges = [low for low, _ in score.positions] + [score.positions[-1][1]]
        axes.stairs(score.loss_at, [max(edge, 0.5) for edge in edges], label=score.name, linewidth=1.8, baseline=None)
    finite = sorted({int(point) for point in points if 0 < point < math.inf})
    for point in finite:
        axes.axvline(point, color="#888888", linewidth=0.8, linestyle=":")
    if finite:
        axes.plot([], [], color="#888888", linewidth=0.8, linestyle=":", label="TransPoints")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)", title="held-out loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def score_lines(scores: Sequence[Score]) -> list[str]:
    """A table for the screen: one line per set."""
    width = max(len("set"), *(len(score.name) for score in scores))
    lines = [f"{'set':<{width}}      tokens  nats/token  bits/byte  gzip -9"]
    for score in scores:
        gzip = "" if score.gzip9_bits_per_byte is None else f"{score.gzip9_bits_per_byte:.4f}"
        lines.append(
            f"{score.name:<{width}}  {score.n_tokens:>10,}  {score.loss:>10.4f}  {score.bits_per_byte:>9.4f}  {gzip:>7}"
        )
    return lines


def _plain(point: int | float) -> Any:
    return None if point == math.inf else int(point)
