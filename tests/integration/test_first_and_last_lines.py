"""What a run says before its first step, and what a finished one says to type next, which is typed."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.integration.conftest import Trainer
from transmamba import train as entry
from transmamba.cli import app
from transmamba.compose import load
from transmamba.next_commands import train_again

KEPT = ("data.path", "data.seq_len", "train.steps", "train.global_batch", "optim.lr", "validation.tokens")


def told(said: str) -> list[list[str]]:
    """The commands after `next`, as words."""
    lines = said[said.rindex("\nnext") + 1 :].splitlines()[:3]
    return [shlex.split(line.removeprefix("next")) for line in lines]


@pytest.mark.parametrize("name", ["run", "a run"])
def test_the_commands_that_a_finished_run_names_work(
    name: str, train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    assert train(folder, "train.steps=2", "checkpoint.every=2", f"run.dir='{folder}'") == 0
    sample, longer, another = told(capsys.readouterr().out)
    assert Path(sample[0]).name == "transmamba"
    assert CliRunner().invoke(app, [*sample[1:], "--tokens", "2"]).exit_code == 0
    for words in (another, longer):
        assert (Path(words[0]).name, words[1:4]) == ("python", ["-m", "transmamba.train", "--config"])
    before, after = load(longer[3:5]), load(another[3:])
    assert after.model.kind == "transformer" and after.run.dir == f"{folder}-tiny_transformer"
    same = [key.split(".") for key in KEPT]
    assert [getattr(getattr(before, a), b) for a, b in same] == [getattr(getattr(after, a), b) for a, b in same]
    if name == "run":
        assert entry.main(another[3:]) == 0
        assert entry.main(longer[3:]) == 0


@pytest.mark.parametrize("has_units", [False, True])
def test_what_makes_a_run_slow_or_odd_is_said_at_its_start(
    has_units: bool,
    train: Trainer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transmamba.session.has_slow_bf16", lambda: not has_units)
    assert train(tmp_path / "run", "train.steps=1", "checkpoint.every=1", "precision=bf16") == 0
    said = capsys.readouterr().out
    assert ("this CPU has no bf16 units" in said) is not has_units
    assert "warning: transpoint=cycle has 8 TransPoints, and 3 layers never get" in " ".join(said.split())


@pytest.mark.parametrize(
    ("world", "local", "starter"),
    [("1", "1", "python -m"), ("4", "4", "torchrun --nproc-per-node 4 -m"), ("8", "4", "python -m")],
)
def test_several_ranks_of_a_machine_go_on_as_several(
    world: str, local: str, starter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    said = train_again(Path("runs/a"))
    assert said.endswith(f"{starter} transmamba.train --config runs/a/config.yaml")


def test_names_that_a_shell_would_take_apart_are_quoted() -> None:
    said = train_again(Path("my runs/$a"))
    assert shlex.split(said)[-1] == "my runs/$a/config.yaml"
