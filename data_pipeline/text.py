"""Documents, and what bytes must be to become one."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from transmamba.data_pipeline.errors import DataError

# First bytes of packed files.
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
# A dict would keep the last of two members of one name and drop the other without a word.
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name that leads back to its source."""

    name: str
    text: str


def decode_text(data: bytes, name: str, *, offset: int) -> str:
    """Bytes as text, without a byte order mark.

    Args:
        data: what was read.
        name: of the file.
        offset: of the data in the file, for the message.

    Raises:
        DataError: they are not UTF-8; the line tells the offset of the first wrong byte.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        for magic, suffix in _PACKED.items():
            if offset == 0 and data.startswith(magic):
                raise DataError(name, f"holds packed data, not text ({suffix})", f"add {suffix} to its name") from error
        problem = f"not UTF-8 at byte offset {offset + error.start}"
        raise DataError(name, problem, "convert it, for example with iconv -t UTF-8") from error


def text_of_line(line: str, name: str, field: str) -> str:
    """The text of a JSON line; "" where the field is null.

    Args:
        line: one JSON object.
        name: of the line, for messages.
        field: member that holds the text.

    Raises:
        DataError: no JSON object, no text in the field (the fields found are named), the field twice, or half a
            surrogate pair in it.
    """
    try:
        record = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg} at character {error.pos})"
        raise DataError(name, problem, "give one JSON object per line") from error
    except (ValueError, RecursionError) as error:
        raise DataError(name, f"JSON that cannot be read ({error})", "remove the line") from error
    if not isinstance(record, tuple):
        raise DataError(name, f"a JSON {type(record).__name__}, not an object", "give one object per line")
    texts = [value for key, value in record if key == field]
    if len(texts) > 1:
        raise DataError(name, f"field {field!r} is there {len(texts)} times", "write the line with one of them")
    text = texts[0] if texts else 0
    if text is None:
        return ""
    if not isinstance(text, str):
        fields = ", ".join(sorted({key for key, _ in record})) or "none"
        raise DataError(
            name, f"no text in field {field!r} (fields found: {fields})", "name the text field with --field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"field {field!r} has half a surrogate pair at character {error.start}"
        raise DataError(name, problem, "write the text as UTF-8") from error
    return text


def nearest_existing(path: Path) -> str:
    """Advice for a path that does not exist: a similar name in the deepest folder that does, if there is one."""
    parent, is_folder = path.parent, False
    while not parent.is_dir():
        # Something is looked for below it, so only a folder can be meant.
        path, parent, is_folder = parent, parent.parent, True
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or not is_folder)
    close = difflib.get_close_matches(path.name, names, n=1)
    if not close:
        return f"check the path; {parent} holds no similar name"
    return f"the nearest existing name is {parent / close[0]}"
