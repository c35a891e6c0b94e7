"""`transmamba evaluate`: a checkpoint on held-out text, in full and by position around the TransPoints."""
# B batch, T tokens.

import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from transmamba.compose import load, to_yaml
from transmamba.config import Config
from transmamba.corpus import Corpus, open_corpus
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokenizer import load_tokenizer, token_bytes
from transmamba.errors import ConfigError, Problem
from transmamba.generate import load_run
from transmamba.kernels.documents import Documents
from transmamba.model.model import Model
from transmamba.overrides import read_overrides
from transmamba.plot import run_title
from transmamba.transpoint import effective_points

_ROWS = 8
_GIVE_DATA = "give data that was made with the model's tokenizer, after `--`: data.path=DIR"


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


def evaluate(
    run_dir: Path,
    *,
    out: Path,
    max_tokens: int,
    seq_len: int | None,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> list[Score]:
    """Score the newest valid checkpoint of a run on its validation sets; write `evaluate.json` and `evaluate.png`.

    Args:
        run_dir: a run folder, or a model folder of transformers.
        out: folder for the results.
        max_tokens: of every set; 0 takes all.
        seq_len: tokens per window; None takes that of the training. TransPoints given as fractions follow it.
        overrides: `key=value` of data and validation, such as `data.path=DIR`.

    Raises:
        ConfigError: no run or no checkpoint, data that does not fit, or an override of something else.
        RunError: there are checkpoints and none of them verifies (exit 21).
        DataError, DamagedData: a validation set cannot be read.
    """
    check_overrides(overrides)
    model, tokenizer, config, _ = load_run(run_dir)
    config = with_overrides(config, overrides)
    if seq_len is not None:
        config.data.seq_len = seq_len
    corpus = _open(config)
    points = effective_points(config, step=10**18)
    _check_tokenizer(tokenizer, corpus, config)
    bytes_of = token_bytes(tokenizer)
    scores = [
        _score(name, model, corpus.held_stream(name, config), config, points, bytes_of, max_tokens, progress)
        for name in corpus.held
    ]
    out.mkdir(parents=True, exist_ok=True)
    record = {"run": str(run_dir), "seq_len": config.data.seq_len, "transpoints": [_plain(p) for p in points]}
    (out / "evaluate.json").write_text(
        json.dumps(record | {"sets": [asdict(score) for score in scores]}, indent=1) + "\n", encoding="utf-8"
    )
    plot_positions(scores, points, out / "evaluate.png", f"held-out loss of {run_title(run_dir)}")
    return scores


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that are none, or that are about more than the data.

    Raises:
        ConfigError: they are.
    """
    problems: list[Problem] = []
    found = read_overrides(list(overrides), problems)
    asked: dict[str, Any] = {**({"--config": found.file} if found.file else {}), **found.choices, **found.edits}
    for key, value in asked.items():
        if not key.startswith(("data.", "validation.")):
            fix = "override keys of data and validation only"
            problems.append(Problem(key, "scoring does not change it", value, fix))
    if problems:
        raise ConfigError(problems)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of a configuration with overrides that `check_overrides` has let pass.

    Raises:
        ConfigError: a value does not fit.
    """
    if not overrides:
        return config
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        changed = load(["--config", str(file), *overrides])
    if changed.data.path is not None and changed.data.sources:
        fix = "add data.sources={}, or override single sources as data.sources={NAME: DIR}"
        raise ConfigError([Problem("data.path", "given beside data.sources", changed.data.path, fix)])
    return changed


def _open(config: Config) -> Corpus:
    """The data; of a model that was not trained on the built-in corpus they must be given.

    Raises:
        ConfigError: none are given, and the built-in corpus does not fit.
    """
    is_given = config.data.path is not None or bool(config.data.sources)
    try:
        return open_corpus(config)
    except ConfigError as error:
        if is_given:
            raise
        what = f"not given, and the built-in corpus does not fit ({error.problems[0].problem})"
        raise ConfigError([Problem("data.path", what, None, _GIVE_DATA)]) from error


def _check_tokenizer(tokenizer: Tokenizer, corpus: Corpus, config: Config) -> None:
    """Refuse data whose token ids mean something else than the model's.

    Raises:
        ConfigError: another vocabulary.
    """
    if load_tokenizer(corpus.first.tokenizer_path).get_vocab(True) != tokenizer.get_vocab(True):
        what = f"made with another tokenizer than the model's ({corpus.vocab_size} token ids)"
        raise ConfigError([Problem("data.path", what, config.data.path, _GIVE_DATA)])


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


def plot_positions(scores: Sequence[Score], points: Sequence[int | float], path: Path, title: str) -> None:
    """Draw loss over the position in the document, counted from 1, with a line at every TransPoint."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for score in scores:
        edges = [low for low, _ in score.positions] + [score.positions[-1][1]]
        axes.stairs(score.loss_at, [edge + 1 for edge in edges], label=score.name, linewidth=1.8, baseline=None)
    finite = sorted({int(point) for point in points if 0 < point < math.inf})
    for point in finite:
        axes.axvline(point + 1, color="#888888", linewidth=0.8, linestyle=":")
    if finite:
        axes.plot([], [], color="#888888", linewidth=0.8, linestyle=":", label="TransPoints")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(left=1)
    axes.set(xlabel="token of the document, counted from 1", ylabel="loss (nats per token)", title=title)
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
