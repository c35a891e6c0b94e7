"""What the manifests tell before a token is read: whole, disjoint, large enough, of one tokenizer."""

import difflib
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transmamba.config import Config, padded_vocab, total_steps
from transmamba.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transmamba.data_pipeline.manifest import Manifest

_GIB = 2**30
# Name of the validation set that data.path brings.
HELD_OUT = "validation"


def data_problems(config: Config) -> Iterator[Problem]:
    """Problems of the training data and the validation sets; the built-in corpus is made to fit."""
    told = [*_source_problems(config), *_stage_problems(config)]
    yield from told
    if told:
        return
    places = {f"data.sources.{name}": place for name, place in sorted(config.data.sources.items())}
    if config.data.path is not None:
        places["data.path"] = config.data.path
    training: dict[str, Manifest] = {}
    for key, place in places.items():
        try:
            manifest = _read(key, place, config)
        except ConfigError as error:
            yield from error.problems
            continue
        if manifest is not None:
            training[key] = manifest
    if len(training) < len(places):
        return
    if training:
        yield from _size_problems(config, training)
        yield from _kinship_problems(training, places)
    held: dict[str, Manifest] = {}
    for name, place in config.validation.sets.items():
        key = f"validation.sets.{name}"
        try:
            held_out = _read(key, place, config)
        except ConfigError as error:
            yield from error.problems
            continue
        if held_out is None:
            continue
        if _is_remote(place):
            held[key] = held_out
        first = next(iter(training), None)
        if first is not None and held_out.tokenizer_sha256 != training[first].tokenizer_sha256:
            fix = f"prepare it with the tokenizer of {first}"
            yield Problem(key, f"made with another tokenizer than {first}", place, fix)
        else:
            yield from _shared_shards(key, training, held_out)
    remote = {key: manifest for key, manifest in training.items() if _is_remote(places[key])}
    yield from _cache_problems(config, remote, held)


def continues(config: Config) -> bool:
    """Whether the run has a checkpoint to continue from."""
    folder = config.run.dir
    return folder is not None and any((Path(folder) / "checkpoints").glob("step-*/manifest.json"))


def _source_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the names, places and weights of the sources, before any of them is opened."""
    data, names = config.data, sorted(config.data.sources)
    if data.sources and data.path is not None:
        fix = "keep one of them: data.path=null, or add its folder to the sources"
        yield Problem("data.sources", "given beside data.path", ", ".join(names), fix)
    for name, place in data.sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            yield Problem("data.sources", "not a name for a source", name, "use letters, digits, - and _")
        elif "\0" in place or ".." in Path(place).parts or len(place) > 4096:
            what = "a path with '..' or a NUL character"
            yield Problem(f"data.sources.{name}", what, place, "give an absolute or a plain path")
    for name, place in config.validation.sets.items():
        if name in (data.sources or (HELD_OUT,)):
            what = "the name of a set that the training data brings"
            yield Problem(f"validation.sets.{name}", what, place, "give it another name")
    if data.blend is None and len(names) > 1:
        example = ", ".join(f"{name}: 1" for name in names)
        fix = f"give every source a weight, for example 'data.blend={{{example}}}'"
        yield Problem("data.blend", f"missing with {len(names)} sources", None, fix)
    if data.blend is not None:
        missing = sorted(data.sources.keys() - data.blend)
        if missing:
            fix = "give one weight per source, 0 for one that a later stage begins with"
            yield Problem("data.blend", f"no weight for {', '.join(missing)}", data.blend, fix)
        yield from _weight_problems("data.blend", data.blend, config)
    blends = [data.blend or dict.fromkeys(names, 1.0), *(stage.blend for stage in data.stages)]
    for name in names:
        if name in blends[0] and not any(blend.get(name) for blend in blends):
            fix = f"give it a positive weight in data.blend or data.stages, or remove data.sources.{name}"
            yield Problem("data.blend", f"nothing is ever drawn from {name}", data.blend, fix)


def _weight_problems(key: str, weights: dict[str, float], config: Config) -> Iterator[Problem]:
    # The blend brings numpy; a run without one is checked without it.
    from transmamba.data_pipeline.blend import whole_units
    from transmamba.data_pipeline.errors import DataError

    try:
        whole_units(weights, key)
    except DataError as error:
        yield Problem(key, error.problem, weights, error.fix)
        return
    unknown = sorted(weights.keys() - config.data.sources)
    if unknown:
        names = ", ".join(sorted(config.data.sources))
        fix = f"use {names}" if names else "name the folders in data.sources, or remove it"
        yield Problem(key, f"a weight for {unknown[0]!r}, which is no source", weights, fix)


def _stage_problems(config: Config) -> Iterator[Problem]:
    steps = [stage.step for stage in config.data.stages]
    for one, other in itertools.pairwise(steps):
        if one >= other:
            yield Problem(
                "data.stages", f"step {other} comes after step {one}", steps, "begin later from stage to stage"
            )
    # Skipped ranges count as data steps; ranges that are no ranges are refused elsewhere.
    skips = [text.split(":") for text in config.data.skip]
    end = total_steps(config) + sum(int(last) - int(first) for first, last in skips)
    for step in steps:
        if step >= end:
            yield Problem("data.stages", f"the data of the run ends at step {end}", step, f"use a step below {end}")
    for stage in config.data.stages:
        yield from _weight_problems("data.stages", stage.blend, config)


def _read(key: str, path: str, config: Config) -> "Manifest | None":
    """The manifest at a place, or None if it lies in a store that is away, for which a continued run waits."""
    # The manifest reader brings numpy; a run on the built-in corpus is checked without it.
    from transmamba.data_pipeline.errors import DataError
    from transmamba.data_pipeline.manifest import load_manifest
    from transmamba.data_pipeline.remote import Unreachable

    try:
        if _is_remote(path):
            return _read_remote(path, config)
        if not Path(path).exists():
            raise ConfigError([_missing(key, path)])
        return load_manifest(Path(path))
    except Unreachable:
        return None
    except DataError as error:
        raise ConfigError([Problem(key, f"{error.what}: {error.problem}", path, error.fix)]) from error
    except OSError as error:
        fix = "check the path, its permissions and its owner"
        raise ConfigError([Problem(key, f"cannot be read: {error.strerror}", path, fix)]) from error


def _read_remote(url: str, config: Config) -> "Manifest":
    from transmamba.corpus import GIB, cache_folder
    from transmamba.data_pipeline.folder import Cache, open_folder

    cache = Cache(cache_folder(config.data.cache_dir), round(config.data.cache_gib * GIB))
    return open_folder(url, cache, is_known=continues(config)).manifest


def _cache_problems(config: Config, training: "dict[str, Manifest]", held: "dict[str, Manifest]") -> Iterator[Problem]:
    """Shards behind URLs that one process reads at a time must fit into the cache.

    The reader of the training data and the trainer, which validates, are processes of their own.
    """
    if not training and not held:
        return
    from transmamba.data_pipeline.folder import REMOTE_GROUP
    from transmamba.data_pipeline.remote_shards import bytes_at_a_time, bytes_in_order

    def of_training(group: int | str) -> int:
        return sum(bytes_at_a_time(manifest, group) for manifest in training.values())

    group, limit = config.data.shuffle_shards or REMOTE_GROUP, config.data.cache_gib * _GIB
    n_tokens = config.train.micro_batch * config.data.seq_len + 1
    validating = sum(bytes_in_order(manifest, n_tokens) for manifest in (*training.values(), *held.values()))
    fix = f"use data.cache_gib={math.ceil(max(of_training(group), validating) / _GIB)}"
    if of_training(group) > limit:
        n_shards = max(len(manifest.splits["train"].shards) for manifest in training.values())
        smaller = n_shards if group == "all" else min(group, n_shards)
        while smaller and of_training(smaller) > limit:
            smaller //= 2
        what = f"data.shuffle_shards={group} reads up to {of_training(group) / _GIB:.3g} GiB of shards at a time"
        fix += f", or data.shuffle_shards={smaller}" if smaller else ""
        yield Problem("data.cache_gib", what, config.data.cache_gib, fix)
    elif validating > limit:
        what = f"validation reads up to {validating / _GIB:.3g} GiB of shards at a time"
        yield Problem("data.cache_gib", what, config.data.cache_gib, fix)


def _is_remote(place: str) -> bool:
    # As in the data pipeline, which a run on the built-in corpus is checked without.
    return "://" in place


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


def _size_problems(config: Config, training: "dict[str, Manifest]") -> Iterator[Problem]:
    first = next(iter(training.values()))
    rows, needed, tp = config.model.vocab_size, first.vocab_size, config.parallel.tp
    if rows is not None and rows < needed:
        fix = f"use model.vocab_size=null or {padded_vocab(needed)}"
        yield Problem("model.vocab_size", f"smaller than the tokenizer's {needed} tokens", rows, fix)
    if rows is None and padded_vocab(needed) % tp:
        unit = math.lcm(128, tp)
        fix = f"use model.vocab_size={-(-needed // unit) * unit}"
        yield Problem("model.vocab_size", f"not divisible by tp={tp}", padded_vocab(needed), fix)
    seq_len, batch = config.data.seq_len, config.train.global_batch
    # A window reads one token more than it trains on, its last target.
    sizes = {key: manifest.splits["train"].n_tokens for key, manifest in training.items()}
    windows = sum((n_tokens - 1) // seq_len for n_tokens in sizes.values())
    key, fewest = min(sizes.items(), key=lambda entry: entry[1])
    if fewest - 1 < seq_len:
        fix = f"use data.seq_len={max(2, fewest - 1)} or less, or more data"
        yield Problem("data.seq_len", f"{key} has only {fewest} training tokens", seq_len, fix)
    elif windows < batch:
        fix = f"use train.global_batch={windows} or less, a shorter data.seq_len, or more data"
        yield Problem("train.global_batch", f"the data has only {windows} windows of {seq_len}", batch, fix)


def _kinship_problems(training: "dict[str, Manifest]", places: dict[str, str]) -> Iterator[Problem]:
    """Sources of different tokenizers, and shards that are in two sources or on both sides of the hold-out."""
    (first, tokenizer), *_ = ((key, manifest.tokenizer_sha256) for key, manifest in training.items())
    seen: dict[str, tuple[str, str]] = {}
    for key, manifest in training.items():
        if manifest.tokenizer_sha256 != tokenizer:
            fix = f"prepare it with --tokenizer {places[first]}"
            yield Problem(key, f"made with another tokenizer than {first}", places[key], fix)
        # Not of the shards' files, in which tokens have the names of their split and shard.
        doubled = [shard for shard in manifest.splits["train"].shards if shard.blocks_sha256 in seen]
        if doubled:
            other, name = seen[doubled[0].blocks_sha256]
            what = f"its shard {doubled[0].name} is also in {other} ({name})"
            yield Problem(key, what, places[key], "keep it in one source, with the sum of the weights")
        seen |= {shard.blocks_sha256: (key, shard.name) for shard in manifest.splits["train"].shards}
    for key, manifest in training.items():
        yield from _shared_shards(key, training, manifest)


def _shared_shards(key: str, training: "dict[str, Manifest]", held_out: "Manifest") -> Iterator[Problem]:
    """Shards with the same content in some training split and in a validation split."""
    shards = [shard for manifest in training.values() for shard in manifest.splits["train"].shards]
    seen = {shard.blocks_sha256: shard.name for shard in shards}
    for shard in held_out.splits["validation"].shards:
        if shard.blocks_sha256 in seen:
            what = f"validates on a shard that it trains on ({seen[shard.blocks_sha256]})"
            yield Problem(key, what, shard.name, "prepare training and validation from different text")
            return
