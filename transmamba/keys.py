"""The schema as a list of dotted keys: what each accepts, in words, and the nearest names of a typo."""

import difflib
import unicodedata
from functools import cache
from typing import Any

from transmamba.config import Config

# Names that other trainers give to the same things.
_ALIASES = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "peak_lr": "optim.lr",
    "weight_decay_rate": "optim.weight_decay",
    "grad_clip": "optim.clip",
    "max_grad_norm": "optim.clip",
    "gradient_clipping": "optim.clip",
    "warmup_steps": "optim.warmup",
    "lr_schedule": "optim.schedule",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "total_steps": "train.steps",
    "iters": "train.steps",
    "max_tokens": "train.tokens",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "seq_length": "data.seq_len",
    "sequence_length": "data.seq_len",
    "context_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "dtype": "precision",
    "num_layers": "model.n_layers",
    "layers": "model.n_layers",
    "hidden_size": "model.d_model",
    "num_heads": "model.n_heads",
    "d_state": "model.ssm_state",
    "d_conv": "model.conv_width",
    "ngroups": "model.ssm_groups",
    "save_interval": "checkpoint.every",
    "save_every": "checkpoint.every",
    "output_dir": "run.dir",
    "save_dir": "run.dir",
    "zero_stage": "zero.stage",
    "transpoints": "transpoint.points",
    "random_seed": "seed",
}
_POINTS = "a list of tokens (0 or more), fractions of seq_len in (0, 1] or inf"
_MEANINGS = {
    "transpoint.points": f"{_POINTS}, or null",
    "transpoint.changes": "a list such as [{step: 100, schedule: mamba_only}, {step: 200, points: [0, inf]}]",
}
_EXAMPLES = {"data.path": "/data/tokens", "run.dir": "runs/my-run", "transpoint.points": "[0,64,inf]"}


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _target(node: dict[str, Any]) -> dict[str, Any]:
    return _schema()["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


@cache
def sections() -> tuple[str, ...]:
    """Names of the top-level groups of keys."""
    return tuple(name for name, node in _schema()["properties"].items() if "$ref" in node)


@cache
def leaves() -> dict[str, dict[str, Any]]:
    """Every key by its dotted name, with the JSON schema of its value."""
    found: dict[str, dict[str, Any]] = {}
    for name, node in _schema()["properties"].items():
        inner = _target(node).get("properties")
        found |= {name: node} if inner is None else {f"{name}.{key}": leaf for key, leaf in inner.items()}
    return found


def known_leaf(key: str) -> str | None:
    """The schema key that holds `key`: itself, or the mapping that it is an entry of; None when unknown."""
    if key in leaves():
        return key
    parent = ".".join(key.split(".")[:2])
    is_mapping = parent != key and any(
        "additionalProperties" in choice for choice in _choices(leaves().get(parent, {}))
    )
    return parent if is_mapping else None


def suggest(key: str) -> str:
    """A fix for an unknown key: the same thing under our name, in its own section, or the nearest names."""
    plain = unicodedata.normalize("NFKD", key).encode("ascii", "replace").decode().replace("?", "").lower()
    last = plain.rsplit(".", 1)[-1]
    exact = [leaf for leaf in leaves() if leaf.rsplit(".", 1)[-1] == last]
    near_sections = [] if "." in plain else difflib.get_close_matches(plain, sections(), n=2, cutoff=0.75)
    if last in _ALIASES:
        names = [_ALIASES[last]]
    elif exact:
        names = exact[:3]
    elif near_sections:
        names = near_sections
    else:
        by_name = {leaf.rsplit(".", 1)[-1]: leaf for leaf in leaves()}
        near = difflib.get_close_matches(plain, leaves(), n=2, cutoff=0.6)
        near += [by_name[name] for name in difflib.get_close_matches(last, by_name, n=2, cutoff=0.75)]
        names = list(dict.fromkeys(near))[:3]
    if names:
        return f"did you mean {' or '.join(names)}?"[:-1]
    section = plain.split(".", 1)[0]
    inside = [leaf for leaf in leaves() if leaf.startswith(f"{section}.")]
    return f"remove it; the keys here are {', '.join(inside or sections())}"


def accepted(key: str) -> str:
    """What a key takes, in words, with an example: the fix for a value of the wrong type or range."""
    node = leaves()[key]
    text = _MEANINGS.get(key) or " or ".join(dict.fromkeys(_describe(choice) for choice in _choices(node)))
    example = _EXAMPLES.get(key, node.get("default"))
    if example is None or isinstance(example, (bool, list, dict)) or "one of" in text:
        return f"give {text}"
    return f"give {text}, for example {key}={example}"


def _choices(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [_target(choice) for choice in node.get("anyOf", [node])]


def _describe(node: dict[str, Any]) -> str:
    if "enum" in node or "const" in node:
        words = [str(word) for word in node.get("enum", [node.get("const")])]
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    if "additionalProperties" in node:
        return "a mapping such as {name: value}"
    if node.get("type") == "array":
        size = f"{node['minItems']} " if node.get("minItems") == node.get("maxItems", -1) else ""
        items = " or ".join(_describe(choice) for choice in _choices(node["items"]))
        return f"a list [...] of {size}items, each {items}"
    kinds = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    kinds |= {"string": "text (in quotes if it looks like a number)", "object": "a mapping of keys"}
    kind = kinds[node["type"]]
    low = next((f"from {node[k]}" for k in ("minimum", "ge") if k in node), None)
    low = low or next((f"above {node[k]}" for k in ("exclusiveMinimum", "gt") if k in node), None)
    high = next((f"up to {node[k]}" for k in ("maximum", "le") if k in node), None)
    high = high or next((f"below {node[k]}" for k in ("exclusiveMaximum", "lt") if k in node), None)
    return " ".join(part for part in (kind, low, high) if part)
