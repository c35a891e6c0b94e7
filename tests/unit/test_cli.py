"""`transmamba` itself: help, version and the command that it is not."""

from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from transmamba.answer import answer
from transmamba.cli import app


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_how_to_train_with_its_brackets(option: str) -> None:
    done = CliRunner().invoke(app, [option], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "python -m transmamba.train [key=value]" in done.output and "\\[" not in done.output


@pytest.mark.parametrize("command", ["plan", "data", "checkpoint verify", "launch local", "runs ls", "bench kernels"])
def test_every_command_takes_the_short_option(command: str) -> None:
    assert CliRunner().invoke(app, [*command.split(), "-h"]).exit_code == 0


def test_the_version_is_the_packages() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"transmamba {version('transmamba')}\n")


@pytest.mark.parametrize("arguments", [[], ["model=tiny", "-m", "--help"]], ids=str)
def test_training_is_named_where_it_is_not(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["train", *arguments])
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert line.startswith("transmamba: error: train: ")
    assert line.endswith(f"Fix: type {' '.join(['python -m transmamba.train', *arguments])}.")


def test_ctrl_c_is_a_line_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        answer(interrupt)
    assert (ended.value.exit_code, capsys.readouterr().err) == (130, "transmamba: interrupted\n")
