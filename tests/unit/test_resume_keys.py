"""What a resumed run may change: declared for every key, and asked of a checkpoint key by key."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from transmamba import resume
from transmamba.checkpoint import Checkpoint
from transmamba.config import Config
from transmamba.errors import EXIT_CHECKPOINT_MISMATCH, RunError
from transmamba.resume import ALLOWED_BY, FIXED, FREE, check_belongs


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the schema."""
    found = []
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += keys(kind, f"{prefix}{name}.") if is_section else [prefix + name]
    return found


def changed(key: str, to: object) -> list[str]:
    """What `check_belongs` says of a checkpoint whose configuration is the default one but for one key."""
    config = Config().model_dump(mode="json")
    section, _, name = key.partition(".")
    if name:
        config[section][name] = to
    else:
        config[section] = to
    checkpoint = Checkpoint(Path("step-00000001"), {"config": config, "data": {"fingerprint": "f"}}, {})
    return check_belongs(checkpoint, Config(), "f")


@pytest.mark.parametrize("key", keys())
def test_every_key_is_declared_once(key: str) -> None:
    places = [place for place in (FIXED, tuple(ALLOWED_BY), FREE) if resume._under(key, place)]
    assert len(places) == 1, f"{key} stands in {len(places)} of FIXED, ALLOWED_BY and FREE"


@pytest.mark.parametrize("key", keys())
def test_a_key_does_what_its_declaration_says(key: str) -> None:
    if resume._under(key, FREE):
        assert changed(key, "something else") == [key]
        return
    with pytest.raises(RunError, match=f"error: {key}: .*something else") as found:
        changed(key, "something else")
    assert found.value.code == EXIT_CHECKPOINT_MISMATCH
    assert ("resume.allow=[" in str(found.value)) == resume._under(key, tuple(ALLOWED_BY))


def test_keys_that_came_later_count_as_their_defaults() -> None:
    config = Config().model_dump(mode="json")
    del config["data"]["stages"], config["model"]["rope"]
    checkpoint = Checkpoint(Path("step-00000001"), {"config": config, "data": {"fingerprint": "f"}}, {})
    assert check_belongs(checkpoint, Config(), "f") == []
    changed_since = Config.model_validate({"model": {"rope": "both"}})
    with pytest.raises(RunError, match=r"error: model.rope: "):
        check_belongs(checkpoint, changed_since, "f")


def test_other_data_is_refused() -> None:
    checkpoint = Checkpoint(Path("step-00000001"), {"config": {}, "data": {"fingerprint": "g"}}, {})
    with pytest.raises(RunError, match=r"error: data.path: ") as found:
        check_belongs(checkpoint, Config(), "f")
    assert found.value.code == EXIT_CHECKPOINT_MISMATCH
