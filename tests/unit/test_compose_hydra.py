"""Presets and plain overrides are read without Hydra, because loading it takes longer than the rest; it must agree."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from transmamba.compose import _composed
from transmamba.overrides import CONFIG_DIR, groups, parse_plain

CHOICES = [()] + [((group, name),) for group, names in groups().items() for name in names]
PARSER = OverridesParser.create()
VALUES = [
    *("a", "A_b9", "_x", "true", "True", "FALSE", "null", "Null", "0", "-0", "7", "-12", "123456789012345678", "0.5"),
    *("-3.25", "10.0", "0.000001", "50M", "1.5k", "300B", "2h", "90s", "7d", "4T", "3g", "nulls", "truely", "info"),
]
LEFT_TO_HYDRA = [
    *("inf", "NaN", "010", "1e5", "1_000", "0x10", ".5", "5.", "a-b", "a/b", "'a'", "[1]", "{a: 1}", "a,b"),
    *("a b", "", "$", "${a.b}", "--1", "+1", "1e-3", "5MM", "1.", "ä"),
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_presets_are_composed_as_hydra_does(choices: tuple[tuple[str, str], ...]) -> None:
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        composed = compose("train", overrides=[f"{group}={name}" for group, name in choices])
    theirs, ours = OmegaConf.to_container(composed, resolve=False), _composed(choices)
    assert isinstance(theirs, dict)
    assert ours == theirs
    assert repr(sorted(ours.items())) == repr(
        sorted((str(name), value) for name, value in theirs.items())
    )  # 1 is not 1.0, nor True


@pytest.mark.parametrize("value", VALUES)
def test_a_plain_override_is_read_as_hydra_does(value: str) -> None:
    theirs, ours = PARSER.parse_override(f"optim.lr={value}"), parse_plain(f"optim.lr={value}")
    assert ours is not None
    assert (ours.key_or_group, ours.package) == (theirs.key_or_group, theirs.package)
    assert repr(ours.value()) == repr(theirs.value())
    assert (ours.is_delete(), ours.is_sweep_override()) == (theirs.is_delete(), theirs.is_sweep_override())


@pytest.mark.parametrize("value", LEFT_TO_HYDRA)
def test_everything_else_is_left_to_hydra(value: str) -> None:
    assert parse_plain(f"optim.lr={value}") is None


@pytest.mark.parametrize("key", ["+a", "~a", "a/b", "a@b", "a.", ".a", "A", "a-b", "", "a..b"])
def test_unusual_keys_are_left_to_hydra(key: str) -> None:
    assert parse_plain(f"{key}=1") is None
