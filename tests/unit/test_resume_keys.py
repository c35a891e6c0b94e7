"""What a resumed run may change: declared for every key, and asked of a checkpoint key by key."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from transmamba import resume
from transmamba.batches import data_step_of
from transmamba.checkpoint import Checkpoint
from transmamba.config import Config
from transmamba.errors import EXIT_CHECKPOINT_MISMATCH, RunError
from transmamba.resume import ALLOWED_BY, FIXED, FREE, TO_COME, check_belongs


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
    checkpoint = Checkpoint(Path("step-00000001"), {"config": config, "step": 0, "data": {"fingerprint": "f"}}, {})
    return check_belongs(checkpoint, Config(), "f")


@pytest.mark.parametrize("key", keys())
def test_every_key_is_declared_once(key: str) -> None:
    places = [place for place in (FIXED, tuple(ALLOWED_BY), TO_COME, FREE) if resume._under(key, place)]
    assert len(places) == 1, f"{key} stands in {len(places)} of FIXED, ALLOWED_BY, TO_COME and FREE"


@pytest.mark.parametrize("key", [key for key in keys() if not resume._under(key, TO_COME)])
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
    manifest = {"config": config, "step": 0, "data": {"fingerprint": "f"}}
    checkpoint = Checkpoint(Path("step-00000001"), manifest, {})
    assert check_belongs(checkpoint, Config(), "f") == []
    changed_since = Config.model_validate({"model": {"rope": "both"}})
    with pytest.raises(RunError, match=r"error: model.rope: "):
        check_belongs(checkpoint, changed_since, "f")


def test_other_data_is_refused() -> None:
    checkpoint = Checkpoint(Path("step-00000001"), {"config": {}, "step": 0, "data": {"fingerprint": "g"}}, {})
    with pytest.raises(RunError, match=r"error: data.path: ") as found:
        check_belongs(checkpoint, Config(), "f")
    assert found.value.code == EXIT_CHECKPOINT_MISMATCH


def of_data(step: int, skip: list[str], stages: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest of a checkpoint of a run with this data section, and the section."""
    data = {"skip": skip, "stages": stages}
    config = Config.model_validate({"data": data}).model_dump(mode="json")
    row = data_step_of(step, skip) * Config().train.global_batch
    return {"config": config, "step": step, "data": {"fingerprint": "f", "next_row": row}}, data


@pytest.mark.parametrize(
    ("key", "to"),
    [
        ("skip", ["3:5", "30:40"]),
        ("skip", ["3:5", "12:13"]),
        ("stages", [{"step": 7, "blend": {"a": 1.0}}, {"step": 20, "blend": {"b": 1.0}}]),
    ],
)
def test_what_is_to_come_may_change(key: str, to: list[Any]) -> None:
    manifest, data = of_data(10, ["3:5"], [{"step": 7, "blend": {"a": 1.0}}])
    later = Config.model_validate({"data": data | {key: to}})
    assert check_belongs(Checkpoint(Path("step-00000010"), manifest, {}), later, "f") == [f"data.{key}"]


@pytest.mark.parametrize(
    ("key", "to"),
    [
        ("skip", []),
        ("skip", ["3:6"]),
        ("skip", ["2:4"]),
        ("skip", ["3:5", "11:12"]),
        ("stages", []),
        ("stages", [{"step": 7, "blend": {"a": 2.0}}]),
        ("stages", [{"step": 7, "blend": {"a": 1.0}}, {"step": 11, "blend": {"b": 1.0}}]),
    ],
)
def test_what_is_past_may_not(key: str, to: list[Any]) -> None:
    manifest, data = of_data(10, ["3:5"], [{"step": 7, "blend": {"a": 1.0}}])
    other = Config.model_validate({"data": data | {key: to}})
    with pytest.raises(RunError, match=rf"error: data.{key}: .* keep what was before data step 12") as found:
        check_belongs(Checkpoint(Path("step-00000010"), manifest, {}), other, "f")
    assert found.value.code == EXIT_CHECKPOINT_MISMATCH
