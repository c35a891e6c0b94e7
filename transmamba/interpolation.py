"""References inside values: `${section.key}` and a few environment variables; everything else is refused."""

import copy
import re
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

from transmamba.config import Config
from transmamba.errors import Problem, looks_secret

if TYPE_CHECKING:
    from omegaconf import DictConfig

# A shared file must not read credentials from the environment into a configuration that is stored and logged.
_ENVIRONMENT = re.compile(r"USER|HOME|SCRATCH|TMPDIR|SLURM_\w+")
_ESCAPED = re.compile(r"(?<!\\)(?:\\\\)*\\\$\{")
_ENV_REFERENCE = re.compile(r"\$\{oc\.env:([^},$]*)(,[^{}$]*)?\}")
_KEY_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")
Path = tuple[Any, ...]


def resolve(values: dict[str, Any], problems: list[Problem]) -> None:
    """Replace every interpolation by its value, in place; refuse credentials and what must not be read."""
    texts = list(_texts(values, ()))
    has_references = any("${" in text for _, text in texts)
    every_key = _over_defaults(values) if has_references else {}
    readable = copy.deepcopy(every_key)
    pending = []
    for path, text in texts:
        key = ".".join(str(part) for part in path[:2])
        problem = None
        if looks_secret(key, text):
            fix = "keep credentials out of the configuration; log in, or set the tool's environment variable"
            problem = Problem(key, "looks like a credential", "<hidden>", fix)
        elif "_target_" in text or "_target_" in path:
            problem = Problem(key, "_target_ is not read", text, "write plain values only")
        elif "${" in text:
            problem = _refusal(key, text, every_key)
            pending.append((path, text, key))
        if problem is not None:
            problems.append(problem)
            pending = [entry for entry in pending if entry[0] != path]
            _put(values, path, None)
            if has_references:
                _put(readable, path, None)
    if not pending:
        return
    from omegaconf import OmegaConf  # a tenth of a second, which most configurations need not wait for

    root = OmegaConf.create(readable)
    for path, text, key in pending:
        problem = _replace(key, text, values, root, path)
        if problem is not None:
            problems.append(problem)
            _put(values, path, None)


def escape(value: Any) -> Any:
    """The same plain data with texts written so that `resolve` gives them back unchanged."""
    if isinstance(value, dict):
        return {key: escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escape(inner) for inner in value]
    # Backslashes count double before an interpolation only.
    is_text = isinstance(value, str) and "${" in value
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if is_text else value


def _over_defaults(values: dict[str, Any]) -> dict[str, Any]:
    merged = Config().model_dump()
    for name, value in values.items():
        default = merged.get(name)
        merged[name] = default | value if isinstance(default, dict) and isinstance(value, dict) else value
    return copy.deepcopy(merged)


def _refusal(key: str, text: str, every_key: dict[str, Any]) -> Problem | None:
    """What is wrong with the references of one text before any is read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    unread = Problem(
        key, "an interpolation that is not read", text, "write plain values, ${section.key} or ${oc.env:NAME}"
    )
    try:
        OmegaConf.create({"text": text})
    except OmegaConfBaseException:
        return unread
    rest = _ESCAPED.sub("", text)
    for match in _ENV_REFERENCE.finditer(rest):
        if not _ENVIRONMENT.fullmatch(match[1]):
            fix = "write the value itself; only USER, HOME, SCRATCH, TMPDIR and SLURM_* are read"
            return Problem(key, "reads an environment variable that is not listed", match[1], fix)
        rest = rest.replace(match[0], "")
    names = _KEY_REFERENCE.findall(rest)
    if len(names) > 1 or "${" in _KEY_REFERENCE.sub("", rest):
        return unread
    chain = [key]
    while names and names[0] not in chain:
        chain.append(names[0])
        target = value_at(every_key, names[0])
        names = _KEY_REFERENCE.findall(str(target)) if isinstance(target, (str, list, dict)) else []
    if names:
        fix = "give one of these keys a plain value"
        return Problem(key, "a cycle of interpolations", " -> ".join([*chain, names[0]]), fix)
    return None


def _replace(key: str, text: str, values: dict[str, Any], root: "DictConfig", path: Path) -> Problem | None:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = reduce(getitem, path, root)
        if isinstance(value, (DictConfig, ListConfig)):
            value = OmegaConf.to_container(value, resolve=True)
    except (OmegaConfBaseException, KeyError, TypeError, ValueError, RecursionError):
        unset = next((match[1] for match in _ENV_REFERENCE.finditer(text)), None)
        what = "a key that does not exist" if unset is None else "an environment variable that is not set"
        missing = unset or ", ".join(_KEY_REFERENCE.findall(text))
        return Problem(key, f"refers to {what}", missing, "set it, or write the value itself")
    _put(values, path, value)
    return None


def value_at(values: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _texts(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """Every text in a tree of plain data with its path; also what has the name of a credential, as text."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(name, str) and not isinstance(inner, (str, dict, list)) and looks_secret(name, ""):
                yield (*path, name), str(inner)
            yield from _texts(inner, (*path, name))


def _put(values: dict[str, Any], path: Path, value: Any) -> None:
    reduce(getitem, path[:-1], values)[path[-1]] = value
