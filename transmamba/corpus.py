"""What a run reads: its sources in their blend and its validation sets."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from transmamba.config import Config
from transmamba.data_pipeline.blend import Stage
from transmamba.data_pipeline.folder import REMOTE_GROUP, Cache, PreparedFolder, is_remote, open_folder
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.prepare import default_corpus
from transmamba.data_pipeline.remote import OUTAGE_S, Patience
from transmamba.data_pipeline.remote_shards import RemoteFiles
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.workers import WorkerDied
from transmamba.errors import EXIT_RANK_DIED, ConfigError, RunError
from transmamba.heartbeat import sign_of_life
from transmamba.validate_data import continues, data_problems

GIB = 2**30
CUT = "windows 2"  # the last window of an epoch is padded; 1 left it out, and had another order
# The names of the only source and of its held-out part.
ONLY, HELD_OUT = "train", "validation"


@dataclass(frozen=True)
class Corpus:
    """Opened folders by name: what is trained on, and what is validated on (the validation split of each)."""

    sources: dict[str, PreparedFolder]
    held: dict[str, PreparedFolder]

    @property
    def first(self) -> Manifest:
        """The manifest of the first source; all have its tokenizer."""
        return next(iter(self.sources.values())).manifest

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer."""
        return self.first.vocab_size

    @property
    def n_tokens(self) -> int:
        """Training tokens of all sources, each counted once."""
        return sum(folder.manifest.splits["train"].n_tokens for folder in self.sources.values())

    @property
    def n_documents(self) -> int:
        """Training documents of all sources, each counted once."""
        return sum(folder.manifest.splits["train"].n_documents for folder in self.sources.values())

    def lengths(self, config: Config) -> list[tuple[float, float]]:
        """Document lengths in tokens and how frequent they are in the first blend."""
        found = []
        weights = config.data.blend or dict.fromkeys(self.sources, 1.0)
        for name, folder in self.sources.items():
            split = folder.manifest.splits["train"]
            share = weights.get(name, 0.0) / max(split.n_tokens, 1)
            found += [(bin.n_tokens / bin.n_documents, share * bin.n_documents) for bin in split.lengths]
        return found

    def fingerprint(self) -> str:
        """A hash that changes with the tokens, their order on disk, a source's name, the tokenizer or the way that
        windows are cut, but not with a folder's place."""
        parts = [CUT, self.first.tokenizer_sha256]
        for name, folder in sorted(self.sources.items()):
            shards = folder.manifest.splits["train"].shards
            parts += [name, *(shard.sha256 for shard in shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def mixture(self, config: Config) -> Mixture:
        """The training stream of a configuration."""
        streams = {name: _stream(folder, "train", config) for name, folder in self.sources.items()}
        blend = config.data.blend or dict.fromkeys(self.sources, 1.0)
        later = [Stage(stage.step * config.train.global_batch, stage.blend) for stage in config.data.stages]
        return Mixture(streams, [Stage(0, blend), *later])

    def held_stream(self, name: str, config: Config) -> Stream:
        """The stream of a validation set."""
        return _stream(self.held[name], "validation", config)


def open_corpus(config: Config) -> Corpus:
    """Open all data of a run; builds the default corpus at first use and notes its place in the configuration.

    Raises:
        ConfigError: the default corpus does not fit the configuration.
        DataError: a folder cannot be opened or built.
        Unreachable: a store that has answered before was away for an hour.
        RunError: a process that builds the default corpus was killed.
    """
    data = config.data
    if data.path is None and not data.sources:
        data.path = str(_default_corpus())
        problems = list(data_problems(config))
        if problems:
            raise ConfigError(problems)
    places = data.sources or {ONLY: str(data.path)}
    if data.shuffle_shards is None:  # noted, because it decides the order wherever the data lies later
        data.shuffle_shards = REMOTE_GROUP if any(map(is_remote, places.values())) else "all"
    cache = Cache(cache_folder(data.cache_dir), round(data.cache_gib * GIB))
    is_known = continues(config)
    sources = {name: _open(place, cache, is_known) for name, place in sorted(places.items())}
    held = sources if data.sources else {HELD_OUT: sources[ONLY]}
    sets = {name: _open(place, cache, is_known) for name, place in config.validation.sets.items()}
    return Corpus(sources, held | sets)


def _open(place: str, cache: Cache, is_known: bool) -> PreparedFolder:
    folder = open_folder(place, cache, Patience(outage_s=OUTAGE_S), is_known=is_known)
    if isinstance(folder.files, RemoteFiles):
        folder.files.call_on_wait(sign_of_life)
    return folder


def _default_corpus() -> Path:
    try:
        return default_corpus(progress=os.environ.get("LOCAL_RANK", "0") == "0")
    except WorkerDied as error:
        fix = "look for an out-of-memory kill, and start again"
        raise RunError(EXIT_RANK_DIED, f"data.path: {error} building the default corpus. Fix: {fix}") from error


def cache_folder(given: str | None) -> Path:
    """Where copies of remote shards lie."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else root / "transmamba" / "shards"


def _stream(folder: PreparedFolder, split: str, config: Config) -> Stream:
    return Stream(
        folder.store(split),
        seq_len=config.data.seq_len,
        seed=config.seed,
        shuffle_shards=config.data.shuffle_shards or "all",
    )
