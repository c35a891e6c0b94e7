"""What `to-hf` says, and what it refuses: one line, the right code, nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
import typer
from torch import Tensor
from typer.testing import CliRunner

from tests.model.hf_runs import make_run
from transmamba.checkpoints_tools import hf_export
from transmamba.commands.convert import add_conversions

app = typer.Typer()
add_conversions(app)


def test_a_folder_that_computes_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", "transmamba")
    save = hf_export.save_torch_state_dict

    def damaged(tensors: dict[str, Tensor], *rest: Any, **more: Any) -> None:
        name = "model.layers.1.mixer.z.weight"
        save({**tensors, name: 1.01 * tensors[name]}, *rest, **more)

    monkeypatch.setattr(hf_export, "save_torch_state_dict", damaged)
    done = CliRunner().invoke(app, ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf")])
    assert done.exit_code == 1 and "other logits" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", "transmamba")

    def full(*rest: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "save_torch_state_dict", full)
    done = CliRunner().invoke(app, ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf")])
    assert done.exit_code == 40 and "No space left" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_tells_the_numbers(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "transmamba", 3)
    told = CliRunner().invoke(
        app, ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf"), "--check-tokens", "500"]
    )
    assert told.exit_code == 0, told.output
    for text in ("whole windows", "left padding", "packed documents", "same likeliest token 100 %", "of step 3"):
        assert text in told.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere", "--out", "new"], 2, "config.yaml"),
        (["run", "--out", "taken"], 2, "--out"),
        (["run", "--out", "run/config.yaml"], 2, "--out"),
        (["run", "--out", "new", "--step", "7"], 2, "use one of: 3"),
        (["run", "--out", "new", "--shard-size", "12"], 2, "--shard-size"),
        (["run", "--out", "new", "--dtype", "int4"], 2, "int4"),
        (["empty", "--out", "new"], 21, "no valid checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), "transmamba")
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    Path("empty").mkdir()
    Path("empty/config.yaml").write_text(Path("run/config.yaml").read_text())
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["to-hf", *arguments])
    assert done.exit_code == code and says in done.output, done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "transmamba")
    (file,) = (tmp_path / "run" / "checkpoints" / "step-00000003").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for arguments in ([], ["--step", "3"]):
        done = CliRunner().invoke(app, ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf"), *arguments])
        assert done.exit_code == 21 and not (tmp_path / "hf").exists(), done.output


def test_without_transformers_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments in (["to-hf", "run"], ["from-hf", "model"]):
        done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "new")])
        assert done.exit_code == 2 and "pip install" in done.output, done.output
