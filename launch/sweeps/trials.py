"""The trials of a sweep: the values of every axis, and their product, with the seeds outermost."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from transmamba.errors import ConfigError, Problem

MAX_TRIALS = 10_000
_PLAIN = re.compile(r"[\w./,+~-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Choice:
    """One value of an axis: what tables call it, and the overrides that make it."""

    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep. Trials of one `group` differ in their seed only."""

    number: int
    group: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is told to people."""
        return f"{self.number:04d} {self.group} seed {self.seed}"


def grid_axis(text: str) -> list[Choice]:
    """Read `key=a,b,c` in Hydra's grammar: lists in brackets, quotes, `range(...)` and `choice(...)` are understood.

    Raises:
        ConfigError: not of this form, or a value is there twice.
    """
    fix = "write --grid key=a,b,c; lists in brackets, 'transpoint.points=[0,4],[8,16]'"
    try:
        override = OverridesParser.create().parse_override(text)
        if override.is_delete() or override.package is not None or not override.key_or_group:
            raise ValueError
        if override.is_sweep_override():
            values = [str(value) for value in override.sweep_string_iterator()]
        else:
            values = [override.get_value_element_as_str()]
    except (HydraException, ValueError, RecursionError) as error:
        raise ConfigError([Problem("--grid", "not a key with values", text, fix)]) from error
    key = override.key_or_group
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ConfigError([Problem("--grid", f"{key} has a value twice", twice, "give every value once")])
    if key == "run.dir":
        raise ConfigError([Problem("--grid", "every trial has a run folder of its own", text, "remove it")])
    return [Choice(value if key == "transpoint" else f"{key}={value}", (f"{key}={value}",)) for value in values]


def seed_axis(n_seeds: int, first: int) -> list[Choice]:
    """Consecutive seeds from that of the configuration on."""
    return [Choice(str(seed), (f"seed={seed}",)) for seed in range(first, first + n_seeds)]


def product(axes: Sequence[Sequence[Choice]], seeds: Sequence[Choice], base: Sequence[str]) -> list[Trial]:
    """All combinations; the seeds change slowest, so that a sweep that ends early has compared everything once.

    Args:
        axes: what trials differ in; the last axis changes fastest. None at all gives one group, "default".
        seeds: from `seed_axis`.
        base: overrides of all trials; those of an axis take their keys over.

    Raises:
        ConfigError: more than 10,000 trials, or two axes set the same key.
    """
    _refuse_shared_keys([*axes, seeds])
    n_trials = len(seeds)
    for axis in axes:
        n_trials *= len(axis)
    if n_trials > MAX_TRIALS:
        fix = f"stay below {MAX_TRIALS}; --optuna searches large spaces"
        raise ConfigError([Problem("--grid", "too many trials", n_trials, fix)])
    combinations = itertools.product(seeds, *axes)
    return [_trial(number, seed, list(choices), base) for number, (seed, *choices) in enumerate(combinations)]


def key_of(override: str) -> str:
    """The key of `key=value`, without the marks that add or delete."""
    return override.partition("=")[0].lstrip("+~")


def assignment(key: str, value: str) -> str:
    """`key=value` for any text as the value, quoted where Hydra's grammar needs it."""
    if _PLAIN.fullmatch(value):
        return f"{key}={value}"
    escaped = re.sub(r"""(\\*)('|\Z)""", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


def _trial(number: int, seed: Choice, choices: Sequence[Choice], base: Sequence[str]) -> Trial:
    own = [*itertools.chain.from_iterable(choice.overrides for choice in choices), *seed.overrides]
    taken = {key_of(text) for text in own}
    group = " ".join(choice.label for choice in choices) or "default"
    kept = [text for text in base if key_of(text) not in taken]
    return Trial(number, group, int(seed.label), (*kept, *own))


def _refuse_shared_keys(axes: Sequence[Sequence[Choice]]) -> None:
    seen: set[str] = set()
    for keys in map(set, map(_keys, axes)):
        if seen & keys:
            fix = "set it in one place; several values of one key are one --grid, key=a,b"
            raise ConfigError([Problem("--grid", "two axes of the sweep set the same key", min(seen & keys), fix)])
        seen |= keys


def _keys(axis: Sequence[Choice]) -> Iterator[str]:
    for choice in axis:
        yield from map(key_of, choice.overrides)
