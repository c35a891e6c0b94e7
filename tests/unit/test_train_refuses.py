"""`python -m transmamba.train` with a wrong input or a request for help: answers quickly and creates nothing."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from transmamba.compose import load
from transmamba.errors import EXIT_CONFIG
from transmamba.overrides import groups
from transmamba.train import usage

LIMIT_S = 1.5
# Any of these in sys.modules means that the answer waited for an import that it does not need.
PROBE = """
import atexit, runpy, sys
atexit.register(lambda: print({"torch", "deepspeed", "megatron", "wandb", "numpy"} & set(sys.modules)))
sys.argv[0] = "train"
runpy.run_module("transmamba.train", run_name="__main__")
"""


def run(argv: list[str], folder: Path, program: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, *program, *argv],
        cwd=folder,
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("argv", "environ", "key"),
    [
        (["learning_rate=1e-3"], {}, "learning_rate"),
        (["model.n_heads=7", "model.head_dim=null"], {}, "model.n_heads"),
        (["data.path=missing"], {}, "data.path"),
        ([], {"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        (["--config", "missing.yaml"], {}, "--config"),
    ],
    ids=["unknown-key", "indivisible-width", "missing-data", "world-size", "missing-file"],
)
def test_a_wrong_input_ends_with_code_2_and_one_line_and_creates_nothing(
    argv: list[str], environ: dict[str, str], key: str, tmp_path: Path
) -> None:
    done = run(argv, tmp_path, ["-m", "transmamba.train"], **environ)
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"transmamba: error: {key}: ")
    assert "Fix: " in line
    assert not list(tmp_path.iterdir())


def test_a_wrong_input_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    done = run(["optim.lr=2"], tmp_path, ["-c", PROBE])
    assert done.returncode == EXIT_CONFIG
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["model=tiny", "--help"], ["-m", "--help"]], ids=str)
def test_help_names_what_can_be_written_and_needs_no_torch(argv: list[str], tmp_path: Path) -> None:
    done = run(argv, tmp_path, ["-c", PROBE])
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    assert done.stdout.splitlines()[-1] == "set()"
    names = [name for names in groups().values() for name in names]
    assert [name for name in (*names, "--config", "-m", "key=value") if f" {name}" not in done.stdout] == []
    (keys,) = re.findall(r"its default: (\S+)", done.stdout)
    assert "class ModelConfig" in Path(keys).read_text()


def test_the_examples_of_the_help_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "config.yaml").write_text("seed: 1\n")
    examples = [line.split() for line in usage().partition("examples:\n")[2].splitlines()]
    assert len(examples) == 3
    for words in examples:
        assert load(words[words.index("transmamba.train") + 1 :])


def test_the_answer_takes_less_than_one_and_a_half_seconds_of_work(tmp_path: Path) -> None:
    # Processor time of one child: it waits for nothing, and other work on this machine does not count.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(["optim.lr=2"], tmp_path, ["-m", "transmamba.train"]).returncode == EXIT_CONFIG
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= LIMIT_S
