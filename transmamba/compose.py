"""From the command line to a Config: Hydra composes the groups, the schema decides, every problem is told at once."""

import copy
import difflib
import re
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from transmamba import plain_yaml
from transmamba.config import Config, fill_defaults
from transmamba.errors import ConfigError, Problem, looks_secret
from transmamba.keys import accepted, known_leaf, leaves, sections, suggest

CONFIG_DIR = Path(__file__).parent / "configs"
_ENVIRONMENT = re.compile(r"USER|HOME|SCRATCH|TMPDIR|SLURM_\w+")
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_ENV_REFERENCE = re.compile(r"\$\{oc\.env:([^},$]*)(,[^{}$]*)?\}")
_KEY_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")
_MAX_OVERRIDES = 1000
_DELETED = object()


def load(argv: list[str]) -> Config:
    """Compose the configuration of a run.

    Args:
        argv: overrides `key=value`, group choices `model=small`, `~key` (back to the default) and
            `--config FILE`, a YAML file of values that applies before the overrides.

    Returns:
        Plain data: no interpolation is left, and defaults that depend on other keys are filled in.

    Raises:
        ConfigError: all problems of this call.
    """
    problems: list[Problem] = []
    path, texts = _split(argv, problems)
    file_values = {} if path is None else _read_file(path, problems)
    choices: dict[str, str] = {}
    edits: dict[str, Any] = {}
    given: dict[str, str] = {}
    for text in texts[:_MAX_OVERRIDES]:
        override = _parse(text, problems)
        if override is not None:
            _sort(override, text, choices, edits, given, problems)
    for group in _groups():
        if isinstance(file_values.get(group), str):
            _choose(group, file_values.pop(group), choices, problems)
    values = _merge(choices, file_values, edits, problems)
    _resolve(values, problems)
    config = _validated(values, problems)
    if problems or config is None:
        raise ConfigError(problems)
    fill_defaults(config)
    return config


def to_yaml(config: Config) -> str:
    """Plain resolved values, which `--config` reads back as an equal configuration."""

    def escape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: escape(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [escape(inner) for inner in value]
        # "${" would be read as an interpolation; backslashes before it count double then.
        is_text = isinstance(value, str) and "${" in value
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if is_text else value

    return plain_yaml.write(escape(config.model_dump(mode="python")))


def _split(argv: list[str], problems: list[Problem]) -> tuple[Path | None, list[str]]:
    path, texts, rest = None, [], list(argv)
    while rest:
        text = rest.pop(0)
        if text == "--config" or text.startswith("--config="):
            name = text.partition("=")[2] or (rest.pop(0) if rest and "=" not in rest[0] else "")
            if not name or path is not None:
                problems.append(
                    Problem("--config", "needs exactly one file", name, "write --config FILE once")
                )
            else:
                path = Path(name)
        elif text.startswith("-"):
            fix = "write overrides as key=value; the only option here is --config FILE"
            problems.append(Problem(text.partition("=")[0], "unknown option", text, fix))
        else:
            texts.append(text)
    if len(texts) > _MAX_OVERRIDES:
        fix = "put the values into a file and give --config FILE"
        problems.append(Problem("overrides", "too many", len(texts), fix))
    return path, texts


def _read_file(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        return plain_yaml.read(path)
    except ConfigError as error:
        problems += error.problems
    except (OSError, ValueError) as error:
        names = []
        if path.parent.is_dir():
            names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        fix = f"did you mean {' or '.join(near)}" if near else "give the path of a YAML file"
        problems.append(Problem("--config", f"cannot read the file: {reason}", path, fix))
    return {}


def _parse(text: str, problems: list[Problem]) -> Override | None:
    key = text.partition("=")[0].lstrip("+~")
    form = "write key=value; put a value with spaces, '=' or brackets in quotes: 'key=\"a=b\"'"
    if len(text) > 20_000 or "\0" in text:
        problems.append(
            Problem(key[:80] or "override", "too long or not text", text, "give a shorter plain value")
        )
    elif key and not re.fullmatch(r"[\w./@-]+", key, re.ASCII):
        problems.append(Problem(key, "unknown key", text, suggest(key)))
    else:
        try:
            override = OverridesParser.create().parse_override(text)
        except (HydraException, ValueError, RecursionError):
            problems.append(Problem(key or text, "not an override", text, form))
            return None
        if override.key_or_group and not (override.is_delete() and "=" in text):
            return override
        problems.append(Problem(key or text, "not an override", text, form))
    return None


def _sort(
    override: Override,
    text: str,
    choices: dict[str, str],
    edits: dict[str, Any],
    given: dict[str, str],
    problems: list[Problem],
) -> None:
    """File one override under group choices or value edits, or add the problem it has."""
    key = override.key_or_group
    shown = text.partition("=")[2] or text
    if given.setdefault(key, text) != text:
        problems.append(
            Problem(key, "given twice with different values", f"{given[key]} and {text}", "keep one")
        )
    elif key.split(".")[0].split("/")[0] == "hydra":
        problems.append(Problem(key, "Hydra's own settings cannot be overridden", shown, "remove it"))
    elif "_target_" in text:
        fix = "remove it; this program starts no objects by name, only listed options such as optim.schedule=wsd"
        problems.append(Problem(key, "_target_ is not read", shown, fix))
    elif override.is_sweep_override():
        fix = f"write a list in brackets, {key}=[...], or start a sweep with -m"
        problems.append(Problem(key, "several values for one run", shown, fix))
    elif override.package is not None or "/" in key:
        problems.append(Problem(key, "unknown key", shown, suggest(key)))
    elif override.is_delete():
        _edit(key, _DELETED, edits, problems)
    elif key in _groups() and not isinstance(override.value(), (dict, list)):
        _choose(key, str(override.value()), choices, problems)
    else:
        _edit(key, override.value(), edits, problems)


def _edit(key: str, value: Any, edits: dict[str, Any], problems: list[Problem]) -> None:
    if key in sections() and isinstance(value, dict):
        for name, inner in value.items():
            _edit(f"{key}.{name}", inner, edits, problems)
    elif key in sections():
        value = "~" if value is _DELETED else value
        fix = f"give one of its keys: {', '.join(leaf for leaf in leaves() if leaf.startswith(key + '.'))}"
        problems.append(Problem(key, "a group of keys, not a key", value, fix))
    elif known_leaf(key) is None:
        value = "~" if value is _DELETED else value
        problems.append(Problem(key, "unknown key", value, suggest(key)))
    else:
        edits[key] = value


def _groups() -> dict[str, list[str]]:
    folders = sorted(folder for folder in CONFIG_DIR.iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _choose(group: str, name: str, choices: dict[str, str], problems: list[Problem]) -> None:
    names = _groups()[group]
    if name in names:
        choices.setdefault(group, name)
        return
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
    fix = f"choose {', '.join(near)}; single values are {group}.<key>=<value>"
    problems.append(Problem(group, "no such choice", name, fix))


def _merge(
    choices: dict[str, str], file_values: dict[str, Any], edits: dict[str, Any], problems: list[Problem]
) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        composed = compose("train", overrides=[f"{group}={name}" for group, name in choices.items()])
    base = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(base, dict)
    from_file: dict[str, Any] = {}
    for name, value in file_values.items():
        _edit(name, value, from_file, problems)
    values: dict[str, Any] = {str(name): value for name, value in base.items()}
    # The command line wins over the file: a group chosen there replaces the file's section.
    _apply(values, {key: value for key, value in from_file.items() if key.split(".")[0] not in choices})
    _apply(values, edits)
    return values


def _apply(values: dict[str, Any], edits: dict[str, Any]) -> None:
    lengths = ("train.steps", "train.tokens")
    for key, other in (lengths, lengths[::-1]):
        # A length given in one unit displaces a default length in the other.
        if edits.get(key) not in (None, _DELETED) and other not in edits:
            values["train"].pop(other.split(".")[1], None)
    for key, value in edits.items():
        *parents, name = key.split(".", 2)
        place = values
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict):
            continue
        if value is _DELETED:
            place.pop(name, None)
        else:
            place[name] = value


def _resolve(values: dict[str, Any], problems: list[Problem]) -> None:
    """Replace every interpolation by its value; report those that cannot or must not be read, and credentials."""
    root: DictConfig | None = None
    every_key: dict[str, Any] = {}
    for path, text in list(_strings(values, ())):
        key = ".".join(str(part) for part in path[:2])
        problem = None
        if looks_secret(key, text):
            fix = "keep credentials out of the configuration; log in once or set the tool's environment variable"
            problem = Problem(key, "looks like a credential", "<hidden>", fix)
        elif "_target_" in text or "_target_" in path:
            problem = Problem(key, "_target_ is not read", text, "write plain values only")
        elif _REFERENCE.search(text):
            if root is None:
                every_key = _over_defaults(values)
                root = OmegaConf.create(every_key)
            problem = _interpolate(values, every_key, root, path, text)
        if problem is not None:
            problems.append(problem)
            _put(values, path, None)


def _over_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of the values with the schema's defaults for keys that are not given."""
    merged = Config().model_dump()
    for name, value in values.items():
        default = merged.get(name)
        merged[name] = default | value if isinstance(default, dict) and isinstance(value, dict) else value
    return copy.deepcopy(merged)


def _interpolate(
    values: dict[str, Any], every_key: dict[str, Any], root: DictConfig, path: tuple, text: str
) -> Problem | None:
    key = ".".join(str(part) for part in path[:2])
    rest = text
    for match in _ENV_REFERENCE.finditer(text):
        if not _ENVIRONMENT.fullmatch(match[1]):
            fix = "write the value itself; only USER, HOME, SCRATCH, TMPDIR and SLURM_* are read"
            return Problem(key, "reads an environment variable that is not listed", match[1], fix)
        rest = rest.replace(match[0], "")
    names = _KEY_REFERENCE.findall(rest)
    if len(names) > 1 or _REFERENCE.search(_KEY_REFERENCE.sub("", rest)):
        fix = "write plain values, ${section.key} or ${oc.env:NAME}"
        return Problem(key, "an interpolation that is not read", text, fix)
    chain = [key]
    while names and names[0] not in chain:
        chain.append(names[0])
        target = reduce(lambda place, part: place.get(part) if isinstance(place, dict) else None,
                        names[0].split("."), every_key)  # fmt: skip
        names = [] if not isinstance(target, str) else _KEY_REFERENCE.findall(target)
    if names:
        fix = "give one of these keys a plain value"
        return Problem(key, "a cycle of interpolations", " -> ".join([*chain, names[0]]), fix)
    try:
        value = reduce(getitem, path, root)
    except (OmegaConfBaseException, KeyError, RecursionError):
        missing = next((m[1] for m in _ENV_REFERENCE.finditer(text)), chain[-1])
        what = "an environment variable that is not set" if "oc.env" in text else "a key that does not exist"
        return Problem(key, f"refers to {what}", missing, "set it, or write the value itself")
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value, resolve=True)
    _put(values, path, value)
    return None


def _strings(value: Any, path: tuple) -> Any:
    """Yield (path, text) of every text in a tree of plain data."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            if isinstance(name, str) and not isinstance(inner, (str, dict, list)) and looks_secret(name, ""):
                yield (*path, name), str(inner)
            yield from _strings(inner, (*path, name))


def _put(values: dict[str, Any], path: tuple, value: Any) -> None:
    reduce(getitem, path[:-1], values)[path[-1]] = value


def _validated(values: dict[str, Any], problems: list[Problem]) -> Config | None:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        seen = {problem.key for problem in problems}
        for detail in error.errors():
            problem = _problem(detail, values)
            if problem.key not in seen:
                seen.add(problem.key)
                problems.append(problem)
    return None


def _problem(detail: Any, values: dict[str, Any]) -> Problem:
    """One line for a pydantic error, in our words."""
    key = str(detail["loc"][0])
    for part in detail["loc"][1:2]:
        key = f"{key}.{part}"
    leaf = known_leaf(key)
    if leaf is None:
        return Problem(key, "unknown key", detail["input"], suggest(key))
    item = next((part for part in detail["loc"][2:] if isinstance(part, int)), None)
    value = reduce(lambda place, part: place.get(part) if isinstance(place, dict) else None,
                   leaf.split("."), values)  # fmt: skip
    what = _WORDS.get(detail["type"], "not one of the accepted values")
    if item is not None:
        what = f"item {item + 1} is {what}"
    return Problem(leaf, what, value, accepted(leaf))


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
