"""What prepared data were made from: recorded beside them, so that the same command finds nothing left to do and
another one destroys nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import FORMAT_VERSION, MANIFEST_NAME, load_manifest
from transmamba.data_pipeline.records import load_record, save_record
from transmamba.data_pipeline.remote import shown_url
from transmamba.data_pipeline.sources import SourceFile, is_url

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from transmamba.data_pipeline.passes import Options

DEFINITION_NAME = "definition.json"
# The merges of a few thousand tokens settle long before this much text; those of larger vocabularies need more.
SAMPLE_CHARS = 6_000_000
SAMPLE_CHARS_PER_ENTRY = 1000
_SHOWN_FILES = 3
_OPTIONS = ("field", "eod_token", "validation_share", "dedup", "shard_tokens", "block_tokens", "seed")
# Members that a digest stands for, or that are no option.
_IN_WORDS = {
    "program": "by another version of this program",
    "sources": "from other files",
    "tokenizer": "with another tokenizer",
}


def definition_of(sources: object, given: Tokenizer | None, options: Options) -> dict[str, Any]:
    """Everything that the tokens depend on, by name; JSON.

    Args:
        sources: JSON that changes when the input does; see `identities`.
        given: the tokenizer to use; None trains one.
        options: of the command.
    """
    definition: dict[str, Any] = {
        "program": [FORMAT_VERSION, SAMPLE_CHARS, SAMPLE_CHARS_PER_ENTRY, importlib.metadata.version("tokenizers")],
        # Digests, because a URL may hold a credential, and a list of files may be longer than the rest.
        "sources": _digest(json.dumps(sources)),
        "tokenizer": _digest(given.to_str()) if given else None,
        "vocab_size": None if given else options.vocab_size,
    }
    return definition | {name: getattr(options, name) for name in _OPTIONS}


def identities(files: Sequence[SourceFile]) -> list[list[object]]:
    """Files, wherever they are looked at from."""
    return [
        [file.place if is_url(file.place) else os.path.abspath(file.place), file.n_bytes, file.stamp] for file in files
    ]


def names_of(files: Sequence[SourceFile]) -> list[list[str]]:
    """Files as they may be written down and shown, each with what changes when it does."""
    return [[_shown(str(place)), f"{n_bytes} {stamp}"] for place, n_bytes, stamp in identities(files)]


def changes_in_words(before: list[list[str]], now: list[list[str]]) -> str:
    """Which files are gone, new or changed: the first of each.

    Args:
        before, now: as `names_of`.
    """
    earlier, later = dict(before), dict(now)
    kinds = {
        "gone": [name for name in earlier if name not in later],
        "new": [name for name in later if name not in earlier],
        "changed": [name for name in later if earlier.get(name, later[name]) != later[name]],
    }
    words = [f"{kind}: {_first(names)}" for kind, names in kinds.items() if names]
    return "; ".join(words) or "the same in another order, or by other URLs"


def save_definition(definition: dict[str, Any], folder: Path) -> None:
    """Record it beside the data."""
    save_record(folder / DEFINITION_NAME, definition)


def is_prepared(out: Path, definition: dict[str, Any]) -> bool:
    """Whether a folder already holds the data of a definition; False also where they are incomplete.

    Raises:
        DataError: it holds data of another definition, or data that do not say how they were made.
    """
    if not (out / MANIFEST_NAME).exists():
        return False
    try:
        there = load_record(out / DEFINITION_NAME)
    except (OSError, ValueError):
        there = {}
    if there != definition:
        fix = "choose another --out, or give --replace to lose them; runs that were trained on them cannot go on then"
        raise DataError(str(out), f"holds data {_difference(there, definition)}", fix)
    try:
        load_manifest(out)
    except DataError:
        # What is damaged is made again, from the same input.
        return False
    return True


def _difference(there: object, asked: dict[str, Any]) -> str:
    if not isinstance(there, dict) or there.keys() != asked.keys():
        return "that do not say how they were made"
    words = [
        _IN_WORDS.get(name) or f"with --{name.replace('_', '-')} {there[name]} instead of {value}"
        for name, value in asked.items()
        # A tokenizer that is given has the only size.
        if there[name] != value and not (name == "vocab_size" and there["tokenizer"] != asked["tokenizer"])
    ]
    return f"made {', '.join(words)}"


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_FILES:,} more" if len(names) > _SHOWN_FILES else ""
    return ", ".join(names[:_SHOWN_FILES]) + more


def _shown(place: str) -> str:
    """Without a credential, and a file name that is not UTF-8 by its bytes."""
    return os.fsencode(shown_url(place)).decode("utf-8", "backslashreplace")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
