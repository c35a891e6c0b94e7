"""What is in a prepared folder, for the eye: counts, document lengths, frequent tokens, samples.

E vocabulary entries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import LengthBin, Manifest
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.tokens import TokenStore

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEQ_LENS = (256, 512, 1024, 2048, 4096, 8192, 32768, 131072)
WIDTH = 80
# Tokens that are counted of one split; of more, pieces at even distances.
_COUNTED = 1 << 26
_PIECE = 1 << 20
_SAMPLE_TOKENS, _SAMPLE_LINES = 160, 4
_BAR = 36
_TOP_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class TokenShare:
    """A frequent token: its id, its text, and its share of the counted tokens."""

    id: int
    text: str
    share: float


@dataclass(frozen=True, slots=True)
class SplitCensus:
    """One split in numbers.

    Attributes:
        at_least: sequence length -> shares of the documents, and of the tokens, that are in documents of so many
            tokens or more.
        entropy: of single tokens, nats per token, over `n_counted` tokens.
        n_used: ids that occur among them.
        samples: beginnings of documents at even distances.
    """

    n_shards: int
    n_documents: int
    n_tokens: int
    n_text_bytes: int
    bytes_per_token: float
    mean_length: float
    lengths: tuple[LengthBin, ...]
    at_least: dict[int, tuple[float, float]]
    gzip9_bits_per_byte: float | None
    n_counted: int
    n_used: int
    entropy: float
    top: tuple[TokenShare, ...]
    samples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Census:
    """A folder in numbers."""

    folder: str
    source: str
    vocab_size: int
    eod_id: int
    token_dtype: str
    block_tokens: int
    splits: dict[str, SplitCensus]

    def record(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return dataclasses.asdict(self)


def take_census(manifest: Manifest, *, samples: int = 3, top: int = 10, progress: bool = True) -> Census:
    """Count a folder that `load_manifest` has read.

    Args:
        manifest: of the folder.
        samples: documents to decode per split, 0 or more.
        top: frequent tokens to name.
        progress: show progress on stderr.

    Raises:
        DataError: the tokenizer cannot be read.
        DamagedData: a block does not match its digest.
    """
    from transmamba.data_pipeline.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(manifest.tokenizer_path)
    splits = {}
    for name in manifest.splits:
        store = TokenStore(manifest, name)
        counts_E = _count(store, f"counting {name}", progress=progress)
        splits[name] = _census_of(store, counts_E, tokenizer, samples=samples, top=top)
    names = {
        name: getattr(manifest, name) for name in ("source", "vocab_size", "eod_id", "token_dtype", "block_tokens")
    }
    return Census(folder=str(manifest.folder), **names, splits=splits)


def _census_of(store: TokenStore, counts_E: np.ndarray, tokenizer: Tokenizer, *, samples: int, top: int) -> SplitCensus:
    split, n_counted = store.split, int(counts_E.sum())
    shares = counts_E[counts_E > 0] / n_counted
    # Equally frequent ids in ascending order.
    frequent = np.argsort(-counts_E, kind="stable")[:top]
    return SplitCensus(
        n_shards=len(split.shards),
        n_documents=split.n_documents,
        n_tokens=split.n_tokens,
        n_text_bytes=split.n_text_bytes,
        bytes_per_token=split.n_text_bytes / split.n_tokens,
        mean_length=split.n_tokens / split.n_documents,
        lengths=split.lengths,
        at_least={length: _at_least(split.lengths, length) for length in SEQ_LENS},
        gzip9_bits_per_byte=split.gzip9_bits_per_byte,
        n_counted=n_counted,
        n_used=len(shares),
        entropy=abs(float((shares * np.log(shares)).sum())),
        top=tuple(
            TokenShare(i, tokenizer.decode([i], skip_special_tokens=False), float(counts_E[i]) / n_counted)
            for i in frequent.tolist()
            if counts_E[i]
        ),
        samples=tuple(_samples(store, tokenizer, samples)),
    )


def _count(store: TokenStore, title: str, *, progress: bool) -> np.ndarray:
    """How often each id occurs in at most `_COUNTED` tokens: int64 [E]."""
    counts_E = np.zeros(store.manifest.vocab_size, dtype=np.int64)
    n_pieces = min(-(-store.n_tokens // _PIECE), _COUNTED // _PIECE)
    with show_step(title, n_pieces, visible=progress) as advance:
        for i in range(n_pieces):
            first = max(i * _PIECE, i * (store.n_tokens - _PIECE) // max(n_pieces - 1, 1))
            piece = store.read(first, min(first + _PIECE, store.n_tokens))
            counts_E += np.bincount(piece, minlength=len(counts_E))
            advance(1)
    return counts_E


def _at_least(lengths: Sequence[LengthBin], length: int) -> tuple[float, float]:
    # Powers of two are edges of bins.
    longer = [entry for entry in lengths if entry.shortest >= length]
    n_documents, n_tokens = sum(entry.n_documents for entry in lengths), sum(entry.n_tokens for entry in lengths)
    return sum(e.n_documents for e in longer) / n_documents, sum(e.n_tokens for e in longer) / n_tokens


def _samples(store: TokenStore, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    for i in range(count):
        position, reach = (2 * i + 1) * store.n_tokens // (2 * count), _PIECE
        while not len(starts := store.starts(position, min(position + reach, store.n_tokens))):
            # No document starts after it: the one it lies in is shown.
            position, reach = max(position - reach, 0), 2 * reach
        tokens = store.read(int(starts[0]), min(int(starts[0]) + _SAMPLE_TOKENS, store.n_tokens))
        ends = np.flatnonzero(tokens == store.eod_id)
        yield tokenizer.decode(tokens[: ends[0] if len(ends) else None].tolist(), skip_special_tokens=False)


def lines_of(census: Census) -> Iterator[str]:
    """The census on a terminal of 80 columns."""
    yield from _wrapped("folder", census.folder)
    yield from _wrapped("source", census.source)
    kind, eod_id = np.dtype(census.token_dtype).name, census.eod_id
    yield f"tokens     {kind} below {census.vocab_size:,}, blocks of {census.block_tokens:,}, end of document {eod_id}"
    yield ""
    splits = census.splits.values()
    yield f"{'':<34}" + "".join(f"{name:>20}" for name in census.splits)
    rows = {
        "shards": [f"{split.n_shards:,}" for split in splits],
        "documents": [f"{split.n_documents:,}" for split in splits],
        "tokens": [f"{split.n_tokens:,}" for split in splits],
        "bytes of text": [f"{split.n_text_bytes:,}" for split in splits],
        "bytes per token": [f"{split.bytes_per_token:.3f}" for split in splits],
        "tokens per document": [f"{split.mean_length:,.1f}" for split in splits],
        "unigram entropy, nats per token": [f"{split.entropy:.4f}" for split in splits],
        "unigram entropy, bits per byte": [_bits_per_byte(split) for split in splits],
        "gzip -9, bits per byte": [
            f"{split.gzip9_bits_per_byte:.4f}" if split.gzip9_bits_per_byte else "-" for split in splits
        ],
        "ids that occur": [f"{split.n_used:,}" for split in splits],
        "tokens counted for the last four": [f"{split.n_counted:,}" for split in splits],
    }
    for title, values in rows.items():
        yield f"{title:<34}" + "".join(f"{value:>20}" for value in values)
    for name, split in census.splits.items():
        yield from ("", *_split_lines(name, split))


def _split_lines(name: str, split: SplitCensus) -> Iterator[str]:
    from rich.cells import set_cell_size

    yield f"{name}: share that is in documents of so many tokens or more"
    yield f"{'':<12}" + "".join(f"{length:>8,}" for length in split.at_least)
    for column, unit in enumerate(("documents", "tokens")):
        yield f"  {unit:<10}" + "".join(f"{shares[column]:>8.1%}" for shares in split.at_least.values())
    yield f"{name}: lengths of documents in tokens"
    yield from _histogram_lines(split)
    yield f"{name}: most frequent tokens"
    cells = [f"{set_cell_size(_printable(t.text).replace(' ', '·'), 8)} {t.share:>5.1%}" for t in split.top]
    for first in range(0, len(cells), _TOP_COLUMNS):
        yield "  " + " ".join(cells[first : first + _TOP_COLUMNS])
    for i, text in enumerate(split.samples, start=1):
        yield f"{name}: sample {i} of {len(split.samples)}"
        yield from _wrapped("", _printable(text), most=_SAMPLE_LINES)


def _histogram_lines(split: SplitCensus) -> Iterator[str]:
    """Documents per doubling of the length, with the share of the tokens that are in them."""
    doublings: dict[int, tuple[int, int]] = {}
    for entry in split.lengths:
        power = entry.shortest.bit_length() - 1
        n_documents, n_tokens = doublings.get(power, (0, 0))
        doublings[power] = (n_documents + entry.n_documents, n_tokens + entry.n_tokens)
    most = max(n_documents for n_documents, _ in doublings.values())
    for power in range(min(doublings), max(doublings) + 1):
        n_documents, n_tokens = doublings.get(power, (0, 0))
        bar = "█" * math.ceil(_BAR * n_documents / most)
        share = f"{n_tokens / split.n_tokens:>6.1%} of tokens"
        yield f"  {1 << power:>9,} {bar:<{_BAR}} {n_documents:>11,} {share}"


def _bits_per_byte(split: SplitCensus) -> str:
    return f"{split.entropy / math.log(2) / split.bytes_per_token:.4f}" if split.n_text_bytes else "-"


def _printable(text: str) -> str:
    """Text on one line."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _wrapped(title: str, text: str, most: int = 2) -> list[str]:
    """Text after a title, in lines that fit the terminal, the first ones of them."""
    from rich.cells import chop_cells

    indent = 11 if title else 2
    lines = chop_cells(text, WIDTH - indent)[:most] or [""]
    return [f"{title if i == 0 else '':<{indent}}{line}" for i, line in enumerate(lines)]


def draw_lengths(census: Census, out: Path) -> None:
    """Draw, over the length, the shares of documents and of tokens in documents at least so long, into a PNG.

    Raises:
        DataError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, split) in enumerate(census.splits.items()):
        lengths = [entry.shortest for entry in split.lengths]
        documents, tokens = zip(*(_at_least(split.lengths, length) for length in lengths), strict=True)
        axes.plot(lengths, documents, "o-", markersize=3, color=f"C{i}", label=f"{name}, documents")
        axes.plot(lengths, tokens, "o--", markersize=3, color=f"C{i}", alpha=0.5, label=f"{name}, tokens")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(xlabel="tokens", ylabel="share in documents of so many tokens or more", title=Path(census.folder).name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(out, dpi=130, format="png")
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise DataError(str(out), problem, "give a file in a folder that you can write") from error
