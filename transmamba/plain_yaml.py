"""YAML of plain values: no tags, anchors or duplicate keys, and no surprises such as `yes` or `010`.

A word is a boolean only when it is `true` or `false`, and a number only in decimal; everything else is text,
which the schema then refuses where it wants a number.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from transmamba.errors import ConfigError, Problem

MAX_BYTES = 1_000_000
_MAX_DEPTH = 16
_TAGS = {kind: f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "map", "seq")}


class _PlainLoader(yaml.SafeLoader):
    depth = 0
    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ComposerError(None, None, "anchors and aliases are not read", event.start_mark)
        if self.depth > _MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {_MAX_DEPTH} levels deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
     list("-+.0123456789")),
):  # fmt: skip
    _PlainLoader.add_implicit_resolver(_TAGS[_kind], re.compile(rf"(?:{_pattern})\Z"), _first)
    _PlainDumper.add_implicit_resolver(_TAGS[_kind], re.compile(rf"(?:{_pattern})\Z"), _first)


def read(path: Path) -> dict[str, Any]:
    """Read one mapping of plain values.

    Raises:
        ConfigError: too large, not UTF-8, not YAML, a duplicate key, a tag, an anchor, empty, or not a
            mapping. The key of a problem inside the file is `file:line:column`.
        OSError: the file cannot be opened.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError([Problem("--config", "the file is too large", path, f"stay below {MAX_BYTES} bytes")])
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(str(path), "not a text file", error.reason, "save it as UTF-8")]) from error
    return parse(text, path)


def parse(text: str, path: Path) -> dict[str, Any]:
    """Read one mapping from text; `path` is what the problems name (ConfigError as in `read`)."""
    loader = None
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        value = None if node is None else _plain(node, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        fix = "correct this line (spaces instead of tabs, closed brackets and quotes, plain values)"
        raise ConfigError([Problem(place, f"not readable: {error.problem}", line, fix)]) from error
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([Problem(str(path), "not YAML", reason, "write plain YAML, UTF-8")]) from error
    finally:
        if loader is not None:
            loader.dispose()
    if value is None:
        fix = "write keys such as `train: {steps: 100}`, or copy the config.yaml of a run"
        raise ConfigError([Problem("--config", f"the file {path} is empty", None, fix)])
    if not isinstance(value, dict):
        fix = "write keys such as `train: {steps: 100}`"
        raise ConfigError([Problem("--config", f"the file {path} is not a mapping", value, fix)])
    return value


def write(values: dict[str, Any]) -> str:
    """Text that `parse` reads back equal; words that other YAML readers take for numbers are quoted."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


def _plain(node: yaml.Node, path: Path) -> Any:
    place = f"{path}:{node.start_mark.line + 1}"
    if node.tag not in _TAGS.values():
        raise ConfigError([Problem(place, "a YAML tag", node.tag, "write plain values only, without tags")])
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, path) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path)
    text = str(node.value)
    if node.tag == _TAGS["null"]:
        return None
    if node.tag == _TAGS["bool"]:
        return text == "true"
    if node.tag == _TAGS["str"]:
        return text
    # Python refuses integers of thousands of digits; as text they are refused by the schema instead.
    if node.tag == _TAGS["int"]:
        return int(text) if len(text) < 400 else text
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(node: yaml.MappingNode, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, child in node.value:
        place = f"{name.value}:{name.start_mark.line + 1}" if isinstance(name, yaml.ScalarNode) else str(path)
        if not isinstance(name, yaml.ScalarNode):
            raise ConfigError([Problem(place, "a key that is not a word", None, "write `key: value`")])
        if name.value in found:
            raise ConfigError([Problem(place, f"given twice in {path}", name.value, "remove one of the two")])
        found[name.value] = _plain(child, path)
    return found
