"""What a run that goes on may change: declared for every key, and asked key by key of a checkpoint and of a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from transmamba import plain_yaml
from transmamba.changes import ALLOWED_BY, FIXED, FREE, FROM_A_CHECKPOINT_ON, TO_COME, is_under
from transmamba.checkpoint import Checkpoint
from transmamba.config import Config
from transmamba.data_position import data_step_of
from transmamba.errors import EXIT_CHECKPOINT_MISMATCH, RunError
from transmamba.resume import check_belongs
from transmamba.validate_run import run_problems


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the schema."""
    found = []
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += keys(kind, f"{prefix}{name}.") if is_section else [prefix + name]
    return found


def with_another(key: str, to: object) -> dict[str, Any]:
    """The default configuration but for one key."""
    config = Config().model_dump(mode="json")
    section, _, name = key.partition(".")
    if name:
        config[section][name] = to
    else:
        config[section] = to
    return config


def changed(key: str, to: object) -> list[str]:
    """What `check_belongs` says of a checkpoint with another value of a key."""
    manifest = {"config": with_another(key, to), "step": 0, "data": {"fingerprint": "f"}}
    return check_belongs(Checkpoint(Path("step-00000001"), manifest, {}), Config(), "f")


def folder_of(place: Path, config: dict[str, Any], n_steps: int = 0) -> Config:
    """A run folder without a checkpoint; returns a default configuration that goes on in it."""
    place.mkdir()
    (place / "config.yaml").write_text(plain_yaml.write(config))
    records = [{"step": step + 1} for step in range(n_steps)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Config.model_validate({"run": {"dir": str(place)}})


def refusals(config: Config) -> list[str]:
    """What is said of a run folder that belongs to another configuration."""
    return [problem.problem for problem in run_problems(config) if "another configuration" in problem.problem]


@pytest.mark.parametrize("key", keys())
def test_every_key_is_declared_once(key: str) -> None:
    tables = (FIXED, tuple(ALLOWED_BY), TO_COME, FROM_A_CHECKPOINT_ON, FREE)
    assert len([table for table in tables if is_under(key, table)]) == 1


@pytest.mark.parametrize("key", [key for key in keys() if not is_under(key, TO_COME)])
def test_a_key_does_what_its_declaration_says(key: str) -> None:
    if is_under(key, (*FREE, *FROM_A_CHECKPOINT_ON)):
        assert changed(key, "something else") == [key]
        return
    with pytest.raises(RunError, match=f"error: {key}: .*something else") as found:
        changed(key, "something else")
    assert found.value.code == EXIT_CHECKPOINT_MISMATCH
    assert ("resume.allow=[" in str(found.value)) == is_under(key, tuple(ALLOWED_BY))


@pytest.mark.parametrize("key", [key for key in keys() if not is_under(key, TO_COME)])
def test_without_a_checkpoint_only_what_is_free_may_change(key: str, tmp_path: Path) -> None:
    config = folder_of(tmp_path / "run", with_another(key, "something else"))
    # What the run itself settles is compared when it is given, not when it is null.
    config.precision, config.data.shuffle_shards = "fp32", "all"
    stored = plain_yaml.read(tmp_path / "run" / "config.yaml")
    stored["precision"] = stored["precision"] or "fp32"
    stored["data"]["shuffle_shards"] = stored["data"]["shuffle_shards"] or "all"
    (tmp_path / "run" / "config.yaml").write_text(plain_yaml.write(stored))
    told = refusals(config)
    assert bool(told) == (not is_under(key, FREE)), told
    assert all(f"{key} something else -> " in line for line in told)


def test_what_a_run_settles_itself_may_be_left_to_it(tmp_path: Path) -> None:
    settled = Config.model_validate({"precision": "bf16", "data": {"shuffle_shards": 16}}).model_dump(mode="json")
    config = folder_of(tmp_path / "run", settled)
    assert refusals(config) == []
    config.precision = "fp32"
    assert len(refusals(config)) == 1


def test_a_folder_of_an_older_version_and_of_a_removed_blend(tmp_path: Path) -> None:
    older = Config().model_dump(mode="json")
    del older["data"]["stages"], older["model"]["rope"]
    assert refusals(folder_of(tmp_path / "older", older)) == []
    blended = with_another("data.blend", {"a": 0.7, "b": 0.3})
    (told,) = refusals(folder_of(tmp_path / "blended", blended))
    assert "data.blend.a 0.7 -> None" in told


@pytest.mark.parametrize("skip", [["7"], ["a:b"], 3])
def test_a_folder_whose_record_cannot_be_read_is_refused(tmp_path: Path, skip: object) -> None:
    config = folder_of(tmp_path / "run", with_another("data.skip", skip))
    (problem,) = run_problems(config)
    assert "config.yaml cannot be read" in problem.problem


@pytest.mark.parametrize(("first", "is_refused"), [(5, False), (3, True)])
@pytest.mark.parametrize("key", TO_COME)
def test_without_a_checkpoint_the_noted_steps_are_past(tmp_path: Path, key: str, first: int, is_refused: bool) -> None:
    config = folder_of(tmp_path / "run", Config().model_dump(mode="json"), n_steps=5)
    values: dict[str, Any] = {"skip": [f"{first}:9"], "stages": [{"step": first, "blend": {"a": 1.0}}]}
    name = key.removeprefix("data.")
    config.data = Config.model_validate({"data": {name: values[name]}}).data
    assert bool(refusals(config)) == is_refused


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
