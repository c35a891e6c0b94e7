"""A disk that is full, for real: older checkpoints stay, the message says what is needed, and with room it goes on."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Trainer, final_state
from transmamba import saving
from transmamba.checkpoint import newest_valid

# In a process of its own, because a limit is one of the whole process: saves 6 in vain, and again without the limit.
PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from transmamba import saving
from transmamba.checkpoint import Alone
from transmamba.config import CheckpointConfig
from transmamba.errors import RunError
from transmamba.metrics import Journal
from transmamba.slices import Piece
folder, n_values, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
saving.RETRY_S = (0.0,)
saving.ROOM = 0.0  # the disk itself shall refuse
pieces = [Piece(f"{i}.weight", "master", (n_values,), 0, torch.full((n_values,), float(i))) for i in range(8)]
saver = saving.Saver(folder, CheckpointConfig(), Journal(folder.parent, 0), Alone(), lambda step: None)
def save(step):
    saver.begin(step, pieces, {})
    saver.finish_last()
filler = folder.parent / "filler"
save(3)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
else:
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
    except OSError:
        import os
        os.truncate(filler, filler.stat().st_size - int(sys.argv[4]))
try:
    save(6)
except RunError as error:
    print(error.code, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print([path.name for path in folder.glob(".tmp*")])
if not limit:
    filler.unlink()
save(9)
"""


def run(folder: Path, n_values: int, limit: int, room: int = 0) -> str:
    arguments = [str(folder / "checkpoints"), str(n_values), str(limit), str(room)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, rejected = newest_valid(folder / "checkpoints")
    assert found is not None and found.step == 9 and not rejected
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000003", "step-00000009", "LATEST"}
    return done.stdout


@pytest.mark.parametrize(
    ("n_values", "limit", "name"),
    [(2000, 20_000, "-00000.safetensors"), (4, 1500, "rank00000.draft"), (4, 1780, "manifest")],
)
def test_a_limit_on_the_size_of_files(n_values: int, limit: int, name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    said = run(tmp_path / "run", n_values, limit)
    code, _, text = said.partition(" ")
    assert code == "40" and f"{name}" in text and "File too large" in text and "bytes needed" in text
    assert said.endswith("[]\n")  # nothing half-written is left


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("not allowed to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(("room", "name"), [(8192, "-00000.safetensors"), (32_768, "rank00000.draft")])
def test_a_small_disk_that_fills_up(room: int, name: str, small_disk: Path) -> None:
    said = run(small_disk, 1000, 0, room)
    code, _, text = said.partition(" ")
    assert code == "40" and name in text and "No space left on device" in text and str(small_disk) in text


def test_a_run_ends_with_40_on_a_full_disk_and_goes_on_when_there_is_room(
    train: Trainer, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state takes about 0.2 MB, so two checkpoints fit and a third one does not."""
    monkeypatch.setattr("transmamba.validate_run.BYTES_PER_PARAMETER", 0)
    monkeypatch.setattr(saving, "RETRY_S", (0.0,))
    folder = small_disk / "run"
    assert train(folder, "train.steps=4", "checkpoint.every=4") == 0
    size = sum(path.stat().st_size for path in folder.rglob("step-00000004/*"))
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - size // 2))
    capsys.readouterr()
    assert train(folder, "train.steps=9") == 40
    error = capsys.readouterr().err
    assert "cannot save step 9" in error and "no room" in error and f"{folder}" in error and "free. Fix: " in error
    assert final_state(folder).step == 4
    failed = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in failed if event["event"] == "save.failed"] == [8, 9]
    (small_disk / "filler").unlink()
    assert train(folder, "train.steps=9") == 0
    assert final_state(folder).step == 9
