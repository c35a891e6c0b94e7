"""Files made to run code, to reach elsewhere or to fill memory: none is obeyed, each is refused with a clear line."""

import ast
import hashlib
import json
import os
import pickle
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from transmamba import checkpoint, sealed
from transmamba.checkpoint import CheckpointError
from transmamba.cli import app
from transmamba.errors import EXIT_NO_VALID_CHECKPOINT
from transmamba.slices import Piece

ROOT = Path(__file__).parents[2]


def save(folder: Path, step: int = 3) -> Path:
    return checkpoint.save(folder, step, [Piece("w", "master", (50,), 0, torch.arange(50.0))], {"tokens_seen": 1})


def shard(path: Path) -> Path:
    (file,) = path.glob("*.safetensors")
    return file


def reseal(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    manifest.pop("sha256")
    (path / "manifest.json").write_bytes(sealed.seal(manifest))


def accept(path: Path) -> None:
    """Have the manifest vouch for whatever is in the shard, as its author could."""
    data = shard(path).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(path, lambda m: m["files"].update({shard(path).name: entry}))


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path):
        self.command = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


PICKLES: dict[str, Callable[[object], bytes]] = {
    f"protocol {protocol}": lambda payload, protocol=protocol: pickle.dumps(payload, protocol) for protocol in (0, 2, 5)
} | {"torch.save": lambda payload: _torch_bytes(payload)}


def _torch_bytes(payload: object) -> bytes:
    import io

    stream = io.BytesIO()
    torch.save({"w": payload}, stream)
    return stream.getvalue()


def test_the_payloads_do_run_when_they_are_unpickled(tmp_path: Path) -> None:
    for name, encode in PICKLES.items():
        canary = tmp_path / "canary"
        data = encode(Payload(canary))
        if name == "torch.save":
            (tmp_path / "x.pt").write_bytes(data)
            torch.load(tmp_path / "x.pt", weights_only=False)
        else:
            pickle.loads(data)
        assert canary.exists(), name
        canary.unlink()


@pytest.mark.parametrize("encode", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("vouched", [False, True])
def test_a_pickle_in_the_place_of_any_file_is_never_run(
    vouched: bool, encode: Callable[[object], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    data = encode(Payload(canary))
    folder = tmp_path / "run" / "checkpoints"
    for step in range(1, 5):
        save(folder, step)
    for name in ("unpickled", "Unpickler", "load", "loads"):
        monkeypatch.setattr(pickle, name, None, raising=False)
    shard(folder / "step-00000004").write_bytes(data)
    (folder / "step-00000003" / "manifest.json").write_bytes(data)
    if vouched:
        accept(folder / "step-00000004")
    for stray in (folder / "LATEST", folder / ".tmp-step-00000009", folder / "step-00000002" / ".metadata"):
        stray.write_bytes(data)
    (folder / "step-00000002" / "optimizer.pt").write_bytes(data)
    found, rejected = checkpoint.newest_valid(folder)
    if vouched and found is not None and found.step == 4:  # long enough to hold the slice: bytes are bytes
        with pytest.raises(CheckpointError, match="another digest"):
            found.shaped("w", "master")
    else:
        assert found is not None and found.step == 2 and len(rejected) == 2
        assert torch.equal(found.shaped("w", "master"), torch.arange(50.0))
    assert not canary.exists()


@pytest.mark.parametrize("command", ["list", "verify"])
def test_the_commands_answer_with_one_line_and_their_code(command: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = save(tmp_path / "run" / "checkpoints")
    (path / "manifest.json").write_bytes(pickle.dumps(Payload(canary)))
    done = CliRunner().invoke(app, ["checkpoint", command, str(tmp_path / "run")])
    assert done.exit_code == EXIT_NO_VALID_CHECKPOINT and not canary.exists()
    assert "not JSON" in done.output and "Traceback" not in done.output


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "a link to the same bytes": lambda file, elsewhere: file.symlink_to(elsewhere),
    "a link to a device": lambda file, elsewhere: file.symlink_to("/dev/zero"),
    "a link to a secret": lambda file, elsewhere: file.symlink_to("/etc/passwd"),
    "a link to itself": lambda file, elsewhere: file.symlink_to(file),
    "a pipe": lambda file, elsewhere: os.mkfifo(file),
    "a folder": lambda file, elsewhere: file.mkdir(),
    "nothing": lambda file, elsewhere: None,
}


@pytest.mark.parametrize("put", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("name", ["manifest.json", "rank00000-00000.safetensors"])
def test_only_regular_files_are_opened(name: str, put: Callable[[Path, Path], object], tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints")
    elsewhere = tmp_path / "elsewhere"
    (path / name).rename(elsewhere)
    put(path / name, elsewhere)
    refused: list[CheckpointError] = []

    def look() -> None:
        try:
            checkpoint.read(path)
        except CheckpointError as error:
            refused.append(error)

    reader = threading.Thread(target=look, daemon=True)  # a pipe would block it for ever
    reader.start()
    reader.join(10)
    assert not reader.is_alive() and len(refused) == 1 and str(path / name) in str(refused[0])


BOMBS: dict[str, bytes] = {
    "deep lists": b"[" * 5_000_000,
    "deep objects": b'{"a":' * 1_000_000,
    "a long number": b'{"format_version": ' + b"9" * 5_000_000 + b"}",
    "a long string": b'"' + b"x" * 50_000_000,
    "not UTF-8": b'{"format_version": "\xff\xfe"}',
    "a surrogate": b'{"format_version": "\\ud800"}',
    "not an object": b"3",
    "infinity": b'{"format_version": 1e999}',
    "no number": b'{"format_version": NaN}',
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_manifest_that_is_a_bomb_is_refused_soon(data: bytes, tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "manifest.json").write_bytes(data)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.read(path)
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_manifest_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path)
    os.truncate(path / "manifest.json", 1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="at most"):
        checkpoint.read(path)


def test_slices_that_multiply_a_file_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path)

    def multiply(manifest: dict[str, Any]) -> None:
        (entry,) = manifest["slices"]
        manifest["slices"] = [{**entry, "start": 50 * i} for i in range(1000)]
        manifest["tensors"]["w"] = [50_000]

    reseal(path, multiply)
    with pytest.raises(CheckpointError, match="lies over other slices"):
        checkpoint.look(path)


def test_a_header_of_safetensors_that_lies_is_not_even_read(tmp_path: Path) -> None:
    path = save(tmp_path)
    data = bytearray(shard(path).read_bytes())
    data[:8] = (100 << 30).to_bytes(8, "little")
    shard(path).write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        checkpoint.read(path)
    accept(path)
    assert torch.equal(checkpoint.read(path).shaped("w", "master"), torch.arange(50.0))


def test_the_package_knows_no_format_that_runs_code() -> None:
    """The benchmark writes with its peers; nothing of theirs is ever read."""
    for file in ROOT.glob("transmamba/**/*.py"):
        code = ast.parse(file.read_text())
        names = {getattr(node, part, None) for node in ast.walk(code) for part in ("id", "attr", "arg", "name")}
        words = {word for name in names if isinstance(name, str) for word in name.split(".")}
        assert not words & {"pickle", "Unpickler", "weights_only", "allow_pickle", "FileSystemReader", "dill"}, file
        used = {ast.unparse(node) for node in ast.walk(code) if isinstance(node, ast.Attribute)}
        assert "torch.load" not in used, file
        if file.parts[-2:] != ("bench", "checkpoint.py"):
            modules = {node.module or "" for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
            assert "torch.save" not in used and not any("distributed.checkpoint" in name for name in modules), file
