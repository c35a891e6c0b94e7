"""The command line as data: which file, group choices and single values; every bad argument is told."""

import difflib
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmamba.errors import Problem
from transmamba.keys import known_leaf, leaves, sections, suggest

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override

CONFIG_DIR = Path(__file__).parent / "configs"
# The value of a key that goes back to its default.
DELETED = object()
_MAX_OVERRIDES = 1000
_MAX_LENGTH = 20_000
# Most arguments: a key and a word, a number or one with a unit. Hydra's grammar reads them alike, but takes a fifth
# of a second to be loaded, so it is only asked about the others.
_PLAIN = re.compile(
    r"(?P<key>[a-z][a-z_]*(?:\.[a-z][a-z0-9_]*)*)="
    r"(?P<value>[A-Za-z_][A-Za-z0-9_]*|-?(?:0|[1-9][0-9]{0,17})(?P<fraction>\.[0-9]{1,18})?(?P<unit>[kKmMbBgGtTsShHdD])?)"
)
_WORDS = {"true": True, "false": False, "null": None}
_NUMBERS = ("inf", "nan")


@dataclass(frozen=True, slots=True)
class PlainOverride:
    """A key and a single value."""

    key_or_group: str
    only: str | int | float | bool | None
    package: None = None

    def is_delete(self) -> bool:
        """A plain value is set, not deleted."""
        return False

    def is_sweep_override(self) -> bool:
        """A plain value is one value."""
        return False

    def value(self) -> str | int | float | bool | None:
        """As YAML would have it."""
        return self.only


@dataclass(slots=True)
class Overrides:
    """What the command line asks for: `choices` by group, `edits` by dotted key."""

    file: Path | None = None
    choices: dict[str, str] = field(default_factory=dict)
    edits: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """The argument that gave each key, to notice a second one."""


def read_overrides(argv: list[str], problems: list[Problem]) -> Overrides:
    """Sort the arguments; what is wrong with one is added to `problems` and the others are still read."""
    found = Overrides()
    arguments = _split(argv, found, problems)
    if len(arguments) > _MAX_OVERRIDES:
        fix = "put the values into a file and give --config FILE"
        problems.append(Problem("overrides", "too many", len(arguments), fix))
    for text in arguments[:_MAX_OVERRIDES]:
        override = _parse(text, problems)
        if override is not None:
            _sort(override, text, found, problems)
    return found


@cache
def groups() -> dict[str, list[str]]:
    """Names of the presets of every config group."""
    folders = sorted(folder for folder in CONFIG_DIR.iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def choose(group: str, name: str, choices: dict[str, str], problems: list[Problem]) -> None:
    """Add a group choice unless the group has one already."""
    names = groups()[group]
    if name in names:
        choices.setdefault(group, name)
        return
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    ordered = dict.fromkeys([*near, *names])
    fix = f"choose {', '.join(ordered)}; single values are {group}.<key>=<value>"
    problems.append(Problem(group, "no such choice", name, fix))


def edit(key: str, value: Any, edits: dict[str, Any], problems: list[Problem]) -> None:
    """Add the value of a key, or of every key when `value` is a mapping for a whole section."""
    shown = "~" if value is DELETED else value
    if key in sections() and isinstance(value, dict):
        for name, inner in value.items():
            edit(f"{key}.{name}", inner, edits, problems)
    elif key in sections():
        fix = f"give one of its keys: {', '.join(leaf for leaf in leaves() if leaf.startswith(key + '.'))}"
        problems.append(Problem(key, "a group of keys, not a key", shown, fix))
    elif known_leaf(key) is None:
        problems.append(Problem(key, "unknown key", shown, suggest(key)))
    else:
        edits[key] = value


def _split(argv: list[str], found: Overrides, problems: list[Problem]) -> list[str]:
    texts, rest = [], list(argv)
    while rest:
        text = rest.pop(0)
        if text == "--config" or text.startswith("--config="):
            name = text.partition("=")[2] or (rest.pop(0) if rest and "=" not in rest[0] else "")
            if not name or found.file is not None:
                problems.append(Problem("--config", "needs exactly one file", name, "write --config FILE once"))
            else:
                found.file = Path(name)
        elif text.startswith("-"):
            fix = "write overrides as key=value; `python -m transmamba.train --help` shows the options"
            problems.append(Problem(text.partition("=")[0], "unknown option", text, fix))
        else:
            texts.append(text)
    return texts


@cache
def _parser() -> "OverridesParser":
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def parse_plain(text: str) -> PlainOverride | None:
    """Read a key with a word, a number or a number with a unit; None for everything else, which is Hydra's."""
    match = _PLAIN.fullmatch(text)
    if match is None or match["value"].lower() in _NUMBERS:
        return None
    value = match["value"]
    if value.lower() in _WORDS:
        return PlainOverride(match["key"], _WORDS[value.lower()])
    if value.lstrip("-")[0].isdigit() and not match["unit"]:
        return PlainOverride(match["key"], float(value) if match["fraction"] else int(value))
    return PlainOverride(match["key"], value)


def _parse(text: str, problems: list[Problem]) -> "Override | PlainOverride | None":
    plain = parse_plain(text)
    return _parse_by_hydra(text, problems) if plain is None else plain


def _parse_by_hydra(text: str, problems: list[Problem]) -> "Override | None":
    from hydra.errors import HydraException

    key = text.partition("=")[0].lstrip("+~")
    form = "write key=value; put a value with spaces, '=' or brackets in quotes: 'key=\"a=b\"'"
    if len(text) > _MAX_LENGTH or "\0" in text:
        name = key if len(key) < len(text) else "override"
        problems.append(Problem(name, "too long, or not text", text, "give a shorter plain value"))
    elif key and not re.fullmatch(r"[\w./@-]+", key, re.ASCII):
        problems.append(Problem(key, "unknown key", text, suggest(key)))
    else:
        try:
            override = _parser().parse_override(text)
        except (HydraException, ValueError, RecursionError):
            problems.append(Problem(key or text, "not an override", text, form))
            return None
        if override.key_or_group and not (override.is_delete() and "=" in text):
            return override
        problems.append(Problem(key or text, "not an override", text, form))
    return None


def _sort(override: "Override | PlainOverride", text: str, found: Overrides, problems: list[Problem]) -> None:
    """File one override under group choices or value edits, or add the problem it has."""
    key = override.key_or_group
    shown = text.partition("=")[2] or text
    earlier = found.texts.setdefault(key, text)
    if earlier != text:
        problems.append(Problem(key, "given twice with different values", f"{earlier} and {text}", "keep one"))
    elif key.split(".")[0].split("/")[0] == "hydra":
        problems.append(Problem(key, "Hydra's own settings are for several runs", shown, "remove it, or add -m"))
    elif "_target_" in text:
        fix = "remove it; no object is started by name, only listed options such as optim.schedule=wsd"
        problems.append(Problem(key, "_target_ is not read", shown, fix))
    elif override.is_sweep_override():
        fix = f"write a list in brackets, {key}=[...]; several runs are a sweep"
        problems.append(Problem(key, "several values for one run", shown, fix))
    elif override.package is not None or "/" in key:
        problems.append(Problem(key, "unknown key", shown, suggest(key)))
    elif override.is_delete():
        edit(key, DELETED, found.edits, problems)
    elif key in groups() and not isinstance(override.value(), (dict, list)):
        choose(key, str(override.value()), found.choices, problems)
    else:
        edit(key, override.value(), found.edits, problems)
