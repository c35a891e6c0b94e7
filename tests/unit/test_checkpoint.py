"""Checkpoints: what goes in comes out, and nothing damaged does."""

import json
import random
from pathlib import Path

import pytest
import torch

from transmamba import checkpoint
from transmamba.checkpoint import CheckpointError, Piece, StorageError


def pieces() -> list[Piece]:
    draw = torch.Generator().manual_seed(1)
    whole = torch.randn(60, generator=draw)
    return [
        Piece("a", "master", (6, 10), 0, whole[:25]),  # one tensor in two ranges, as two ranks would write it
        Piece("a", "master", (6, 10), 25, whole[25:]),
        Piece("a", "exp_avg", (6, 10), 0, torch.randn(60, generator=draw)),
        Piece("b.start", "buffer", (3,), 0, torch.randn(3, generator=draw, dtype=torch.float64)),
        Piece("c", "master", (4,), 0, torch.randn(4, generator=draw).bfloat16()),
    ]


def saved(folder: Path, step: int = 7) -> Path:
    return checkpoint.save(folder, step, pieces(), {"config": {"seed": 1}})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    loaded = checkpoint.read(saved(tmp_path))
    assert loaded.step == 7 and loaded.manifest["config"] == {"seed": 1}
    first, second, *others = pieces()
    assert torch.equal(loaded.shaped("a", "master"), torch.cat([first.values, second.values]).view(6, 10))
    for piece in others:
        assert torch.equal(loaded.shaped(piece.name, piece.kind), piece.values.view(piece.shape))


def test_large_states_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 150)
    path = saved(tmp_path)
    assert len(list(path.glob("*.safetensors"))) == 3
    assert len(checkpoint.read(path).tensors) == 4


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (file,) = path.glob("*.safetensors")
    whole = file.read_bytes()
    draw = random.Random(3)
    for trial in range(200):
        data = bytearray(whole)
        if trial % 4 == 0:
            data = data[: draw.randrange(len(whole))]
        else:
            data[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=file.name):
            checkpoint.read(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["slices"].pop(0),
        lambda m: m["slices"].pop(1),
        lambda m: m["slices"].append(m["slices"][0]),
        lambda m: m["slices"][0].update(start=1),
        lambda m: m["slices"][0].update(sha256="0" * 64),
        lambda m: m["slices"][0].update(key="nowhere"),
        lambda m: m["tensors"].update(a=[7, 10]),
        lambda m: m["tensors"].pop("a"),
        lambda m: m["files"].clear(),
        lambda m: m["files"].update({"../elsewhere": {"bytes": 1, "sha256": ""}}),
        lambda m: m.update(step=8),
        lambda m: m.update(format_version=1),
        lambda m: m.pop("slices"),
    ],
)
def test_an_edited_manifest_is_refused(edit: object, tmp_path: Path) -> None:
    path = saved(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)  # pyright: ignore[reportCallIssue]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.read(path)


def test_the_newest_valid_one_is_found_by_its_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        saved(tmp_path, step)
    (tmp_path / "LATEST").write_text("step-00000009\n")  # a hint that is wrong
    (tmp_path / "step-00000200").mkdir()  # no manifest: does not exist
    (tmp_path / "step-00000100" / "manifest.json").write_text("{")
    found, rejected = checkpoint.newest_valid(tmp_path)
    assert found is not None and found.step == 10
    assert len(rejected) == 1 and "step-00000100" in rejected[0]


def test_saving_twice_changes_nothing_and_a_damaged_one_is_set_aside(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert saved(tmp_path) == path and (path / "manifest.json").stat().st_mtime_ns == before
    (file,) = path.glob("*.safetensors")
    file.write_bytes(b"damaged")
    assert checkpoint.read(saved(tmp_path)).step == 7
    assert (tmp_path / "quarantine" / "step-00000007-0" / file.name).read_bytes() == b"damaged"


@pytest.mark.parametrize("name", ["rank00000-00000.safetensors", "manifest.json"])
def test_a_failed_write_publishes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 6)
    whole = checkpoint._write_durably

    def full(path: Path, data: bytes) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        whole(path, data)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr(checkpoint, "_write_durably", full)
        saved(tmp_path, 7)
    found, rejected = checkpoint.newest_valid(tmp_path)
    assert found is not None and found.step == 6 and not rejected
    assert saved(tmp_path, 7).exists()


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    for step in range(1, 5):
        saved(tmp_path, step)
    (tmp_path / ".tmp-step-00000005").mkdir()
    gone = checkpoint.prune(tmp_path, keep=2)
    assert {path.name for path in gone} == {"step-00000001", "step-00000002", ".tmp-step-00000005"}
    assert [path.name for path in checkpoint.published(tmp_path)] == ["step-00000004", "step-00000003"]
