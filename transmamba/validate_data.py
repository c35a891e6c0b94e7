"""What the manifests tell before a token is read: whole, disjoint, large enough, of one tokenizer."""

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transmamba.config import Config, padded_vocab
from transmamba.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transmamba.data_pipeline.manifest import Manifest


def data_problems(config: Config) -> Iterator[Problem]:
    """Problems of `data.path` and `validation.sets`; the built-in corpus (data.path=null) is made to fit."""
    yield from _blend_problems(config)
    training = None
    if config.data.path is not None:
        try:
            training = _read("data.path", config.data.path)
        except ConfigError as error:
            yield from error.problems
            return
        yield from _size_problems(config, training)
        yield from _shared_shards("data.path", training, training)
    for name, path in config.validation.sets.items():
        key = f"validation.sets.{name}"
        try:
            held_out = _read(key, path)
        except ConfigError as error:
            yield from error.problems
            continue
        if training is not None and held_out.tokenizer_sha256 != training.tokenizer_sha256:
            fix = "prepare it with the tokenizer of data.path"
            yield Problem(key, "made with another tokenizer than data.path", path, fix)
        elif training is not None:
            yield from _shared_shards(key, training, held_out)


def _read(key: str, path: str) -> "Manifest":
    # The manifest reader brings numpy; a run on the built-in corpus is checked without it.
    from transmamba.data_pipeline.errors import DataError
    from transmamba.data_pipeline.manifest import load_manifest

    try:
        if not Path(path).exists():
            raise ConfigError([_missing(key, path)])
        return load_manifest(Path(path))
    except DataError as error:
        raise ConfigError([Problem(key, f"{error.what}: {error.problem}", path, error.fix)]) from error
    except OSError as error:
        fix = "check the path, its permissions and its owner"
        raise ConfigError([Problem(key, f"cannot be read: {error.strerror}", path, fix)]) from error


def _missing(key: str, path: str) -> Problem:
    folder = Path(path)
    siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=3, cutoff=0.5)
    fix = "give a folder made by `transmamba data prepare SRC... --out DIR`"
    if near:
        fix = f"did you mean {' or '.join(str(folder.parent / name) for name in near)}"
    is_pattern = any(letter in path for letter in "*?[{")
    what = "no such folder; patterns are not expanded here" if is_pattern else "no such folder"
    return Problem(key, what, path, fix)


def _blend_problems(config: Config) -> Iterator[Problem]:
    weights = list((config.data.blend or {}).values())
    if any(weight < 0 for weight in weights) or (weights and math.fsum(weights) == 0):
        fix = "give one positive weight per source"
        yield Problem("data.blend", "weights are negative or all zero", config.data.blend, fix)


def _size_problems(config: Config, training: "Manifest") -> Iterator[Problem]:
    rows, needed, tp = config.model.vocab_size, training.vocab_size, config.parallel.tp
    if rows is not None and rows < needed:
        fix = f"use model.vocab_size=null or {padded_vocab(needed)}"
        yield Problem("model.vocab_size", f"smaller than the tokenizer's {needed} tokens", rows, fix)
    if rows is None and padded_vocab(needed) % tp:
        unit = math.lcm(128, tp)
        fix = f"use model.vocab_size={-(-needed // unit) * unit}"
        yield Problem("model.vocab_size", f"not divisible by tp={tp}", padded_vocab(needed), fix)
    seq_len, batch = config.data.seq_len, config.train.global_batch
    n_tokens = training.splits["train"].n_tokens
    # A window reads one token more than it trains on, its last target.
    windows = (n_tokens - 1) // seq_len
    if windows < 1:
        fix = f"use data.seq_len={max(2, n_tokens - 1)} or less, or more data"
        yield Problem("data.seq_len", f"the data has only {n_tokens} training tokens", seq_len, fix)
    elif windows < batch:
        fix = f"use train.global_batch={windows} or less, a shorter data.seq_len, or more data"
        yield Problem("train.global_batch", f"the data has only {windows} windows of {seq_len}", batch, fix)


def _shared_shards(key: str, training: "Manifest", held_out: "Manifest") -> Iterator[Problem]:
    """Shards with the same content on both sides; within one folder the train and validation splits."""
    seen = {shard.sha256: shard.name for shard in training.splits["train"].shards}
    for shard in held_out.splits["validation"].shards:
        if shard.sha256 in seen:
            what = f"validates on a shard that it trains on ({seen[shard.sha256]})"
            yield Problem(key, what, shard.name, "prepare training and validation from different text")
            return
