"""From the command line to a Config: presets are merged as Hydra would, the schema decides, problems come together.

Hydra itself takes 0.3 s to be loaded and to compose; a test holds every preset and override equal to what it says.
"""

import copy
import difflib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from transmamba import plain_yaml
from transmamba.config import Config, fill_defaults, open_defaults
from transmamba.errors import ConfigError, Problem
from transmamba.interpolation import escape, resolve, value_at
from transmamba.keys import accepted, known_leaf, suggest
from transmamba.overrides import CONFIG_DIR, DELETED, Overrides, choose, edit, groups, read_overrides

_WORDS = {
    "missing": "missing",
    "extra_forbidden": "not a known key",
    "int_type": "not a whole number",
    "float_type": "not a number",
    "bool_type": "not true or false",
    "string_type": "not text",
    "list_type": "not a list",
    "dict_type": "not a mapping",
    "finite_number": "not a finite number",
    "string_too_short": "empty",
    "string_too_long": "too long",
    "too_short": "too short",
    "too_long": "too long",
    "greater_than": "out of range",
    "greater_than_equal": "out of range",
    "less_than": "out of range",
    "less_than_equal": "out of range",
}


def load(argv: list[str], world_size: int | None = None) -> Config:
    """Compose the configuration of a run.

    Args:
        argv: overrides `key=value`, group choices `model=small`, `~key` (back to the default) and
            `--config FILE`, a YAML file of values that applies before the overrides.
        world_size: ranks, on which some defaults depend; what the launcher says if None.

    Returns:
        Plain data: no interpolation is left, and defaults that depend on other keys are filled in.

    Raises:
        ConfigError: all problems of this call.
    """
    problems: list[Problem] = []
    overrides = read_overrides(argv, problems)
    values = _merge(overrides, problems)
    resolve(values, problems)
    config = _checked(values, problems)
    if problems or config is None:
        raise ConfigError(problems)
    if world_size is None:
        said = os.environ.get("WORLD_SIZE", "1")
        world_size = int(said) if re.fullmatch("[0-9]{1,9}", said) else 1
    fill_defaults(config, world_size)
    return config


def to_yaml(config: Config, *, leave_open: bool = False) -> str:
    """Plain resolved values, which `--config` reads back as an equal configuration.

    Args:
        leave_open: leave out the defaults that fit themselves to other keys, so that they still do: for a run that
            has not begun. One that has keeps the values it began with.
    """
    values = config.model_dump()
    for section, name in open_defaults(config) if leave_open else ():
        del values[section][name]
    return plain_yaml.write(escape(values))


def _merge(overrides: Overrides, problems: list[Problem]) -> dict[str, Any]:
    """Defaults, then the file, then the command line. A group chosen there replaces the file's section."""
    given = {} if overrides.file is None else _read_file(overrides.file, problems)
    choices = dict(overrides.choices)
    from_file: dict[str, Any] = {}
    for name, value in given.items():
        if name in groups() and isinstance(value, str):
            choose(name, value, choices, problems)
        else:
            edit(name, value, from_file, problems)
    values = copy.deepcopy(_composed(tuple(sorted(choices.items()))))
    _apply(values, {key: value for key, value in from_file.items() if key.split(".")[0] not in overrides.choices})
    _apply(values, overrides.edits)
    return values


def _read_file(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        return plain_yaml.read(path)
    except ConfigError as error:
        problems += error.problems
    except (OSError, ValueError) as error:
        by_stem: dict[str, str] = {}
        if isinstance(error, OSError) and path.parent.is_dir():
            by_stem = {file.stem: file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")}
        # By stem: with their common ending, short names are like any other.
        near = [by_stem[stem] for stem in difflib.get_close_matches(path.stem, by_stem, n=3, cutoff=0.6)]
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        fix = f"did you mean {' or '.join(near)}" if near else "give the path of a YAML file"
        problems.append(Problem("--config", f"cannot read the file: {reason}", path, fix))
    return {}


@cache
def _composed(choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """What Hydra composes: the presets of `train.yaml`, or the chosen ones, and its own values over them."""
    values = plain_yaml.read(CONFIG_DIR / "train.yaml")
    presets: dict[str, Any] = {}
    for entry in values.pop("defaults"):
        for group, name in entry.items() if isinstance(entry, dict) else ():
            if group in groups():
                presets[group] = plain_yaml.read(CONFIG_DIR / group / f"{dict(choices).get(group, name)}.yaml")
    values.pop("hydra")
    return _merged(presets, values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _apply(values: dict[str, Any], edits: dict[str, Any]) -> None:
    lengths = ("train.steps", "train.tokens")
    for key, other in (lengths, lengths[::-1]):
        # A length given in one unit displaces a default length in the other.
        if edits.get(key) not in (None, DELETED) and other not in edits:
            values["train"].pop(other.split(".")[1], None)
    for key, value in edits.items():
        *parents, name = key.split(".", 2)
        place = values
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        if value is DELETED:
            place.pop(name, None)
        else:
            place[name] = value


def _checked(values: dict[str, Any], problems: list[Problem]) -> Config | None:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        seen = {problem.key for problem in problems}
        for detail in error.errors(include_url=False):
            problem = _in_our_words(detail["type"], detail["loc"], values)
            if problem.key not in seen:
                seen.add(problem.key)
                problems.append(problem)
    return None


def _in_our_words(kind: str, location: tuple[int | str, ...], values: dict[str, Any]) -> Problem:
    key = ".".join(str(part) for part in location[:2])
    leaf = known_leaf(key)
    if leaf is None:
        return Problem(key, "unknown key", value_at(values, key), suggest(key))
    what = _WORDS.get(kind, "not one of the accepted values")
    for index, part in enumerate(location):
        if isinstance(part, int):
            # Inside a list of mappings the field has a name; elsewhere pydantic names the kind it tried.
            names = location[index + 1 : index + 2] if leaf == "transpoint.changes" else ()
            what = f"item {part + 1}: {''.join(f'{name} is ' for name in names)}{what}"
            break
    return Problem(leaf, what, value_at(values, leaf), accepted(leaf))
