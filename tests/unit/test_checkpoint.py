"""Checkpoints: what goes in comes out, and nothing damaged does."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from transmamba import checkpoint, disk, sealed, staging
from transmamba.checkpoint import CheckpointError, StorageError
from transmamba.slices import Piece, Shard


def pieces() -> list[Piece]:
    draw = torch.Generator().manual_seed(1)
    whole = torch.randn(60, generator=draw)
    cut = torch.randn(4, 6, generator=draw)
    return [
        Piece("a", "master", (6, 10), 0, whole[:25]),  # one tensor in two ranges, as two ranks would write it
        Piece("a", "master", (6, 10), 25, whole[25:]),
        Piece("a", "exp_avg", (6, 10), 0, torch.randn(60, generator=draw)),
        Piece("b.start", "buffer", (3,), 0, torch.randn(3, generator=draw, dtype=torch.float64)),
        Piece("c", "master", (5,), 0, torch.randn(5, generator=draw).bfloat16()),
        Piece("d", "master", (4, 6), 0, cut[:, :3].flatten()[:5], Shard(1, 0, 2)),  # two shards, the first in two
        Piece("d", "master", (4, 6), 5, cut[:, :3].flatten()[5:], Shard(1, 0, 2)),
        Piece("d", "master", (4, 6), 0, cut[:, 3:], Shard(1, 1, 2)),
    ]


def whole_tensors() -> dict[tuple[str, str], torch.Tensor]:
    a0, a1, moment, b, c, d0, d1, d2 = (piece.values for piece in pieces())
    return {
        ("a", "master"): torch.cat([a0, a1]).view(6, 10),
        ("a", "exp_avg"): moment.view(6, 10),
        ("b.start", "buffer"): b,
        ("c", "master"): c,
        ("d", "master"): torch.cat([torch.cat([d0, d1]).view(4, 3), d2], 1),
    }


def saved(folder: Path, step: int = 7) -> Path:
    return checkpoint.save(folder, step, pieces(), {"config": {"seed": 1}})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    loaded = checkpoint.read(saved(tmp_path))
    assert loaded.step == 7 and loaded.manifest["config"] == {"seed": 1}
    wanted = whole_tensors()
    assert set(loaded.tensors) == set(wanted)
    for (name, kind), values in wanted.items():
        assert torch.equal(loaded.shaped(name, kind), values)
        assert torch.equal(loaded.tensors[name, kind], values.flatten())


def test_a_rank_reads_its_part_and_verifies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    loaded, draw = checkpoint.look(path), random.Random(2)
    for (name, kind), whole in whole_tensors().items():
        shards: list[Shard | None] = [None]
        if whole.dim() == 2:
            shards += [Shard(dim, part, 2) for dim in (0, 1) for part in (0, 1)]
        for shard in shards:
            flat = (whole if shard is None else shard.of(whole)).flatten()
            for _ in range(10):
                start = draw.randrange(len(flat))
                length = draw.randrange(1, len(flat) - start + 1)
                assert torch.equal(loaded.part(name, kind, shard, start, length), flat[start : start + length])
    read: list[int] = []
    whole_read = checkpoint.Checkpoint._read
    monkeypatch.setattr(checkpoint.Checkpoint, "_read", lambda self, e: read.append(e.n_bytes) or whole_read(self, e))
    loaded.part("a", "master", None, 30, 20)
    loaded.part("d", "master", Shard(1, 1, 2), 0, 12)
    assert read == [35 * 4, 12 * 4]  # the slice that holds the range, and the shard
    (file,) = path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[loaded.slices["a", "master"][None][1].offset + 3] ^= 16
    file.write_bytes(data)
    assert torch.equal(loaded.part("a", "master", None, 0, 25), whole_tensors()["a", "master"].flatten()[:25])
    with pytest.raises(CheckpointError, match=r"master of a has another digest"):
        loaded.part("a", "master", None, 0, 26)


def test_safetensors_itself_reads_the_files(tmp_path: Path) -> None:
    (file,) = saved(tmp_path).glob("*.safetensors")
    found = load_file(file)
    for piece in pieces():
        if piece.shard is None:
            assert torch.equal(found[f"{piece.name}/{piece.kind}/{piece.start}"], piece.values)


def test_large_states_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "FILE_BYTES", 150)
    path = saved(tmp_path)
    assert len(list(path.glob("*.safetensors"))) == 3
    loaded = checkpoint.read(path)
    assert all(torch.equal(loaded.shaped(*key), values) for key, values in whole_tensors().items())


@pytest.mark.parametrize("n_parts", [1, 8])
def test_what_is_written_is_hardly_more_than_the_state(
    n_parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def count(descriptor: int, chunk: memoryview) -> None:
        nonlocal written
        written += len(chunk)
        write_chunk(descriptor, chunk)

    write_chunk = disk.write_chunk
    monkeypatch.setattr(disk, "write_chunk", count)
    n = 256 * 1024  # a layer of a width of 256: of larger models the share is smaller
    values = torch.zeros(n)
    state = [
        Piece(f"layers.{i}.mixer.qkv.weight", kind, (n,), part * (n // n_parts), values[: n // n_parts])
        for i in range(4)
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for part in range(n_parts)
    ]
    checkpoint.save(tmp_path, 1, state, {})
    assert 12 * n * 4 < written <= 1.01 * 12 * n * 4


def resealed(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest as somebody would who knows the format."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    manifest.pop("sha256")
    file.write_bytes(sealed.seal(manifest))


EDITS: list[Callable[[dict[str, Any]], object]] = [
    lambda m: m["slices"].pop(0),
    lambda m: m["slices"].pop(1),
    lambda m: m["slices"].append(m["slices"][0]),
    lambda m: m["slices"][0].update(start=1),
    lambda m: m["slices"][0].update(start="0"),
    lambda m: m["slices"][0].update(length=-25),
    lambda m: m["slices"][0].update(length=10**15),
    lambda m: m["slices"][-1].update(offset=10**12),
    lambda m: m["slices"][0].update(dtype="F64"),
    lambda m: m["slices"][0].update(dtype="object"),
    lambda m: m["slices"][0].update(file="nowhere"),
    lambda m: m["slices"][0].update(shard=[0, 0, 2]),
    lambda m: m["slices"][-1].update(shard=[1, 1, 3]),
    lambda m: m["slices"][-1].update(shard=[9, 1, 2]),
    lambda m: m["slices"][-1].update(shard=[1, 0, 2]),
    lambda m: m["slices"][0].update(more=1),
    lambda m: m["tensors"].update(a=[7, 10]),
    lambda m: m["tensors"].update(a=[-6, -10]),
    lambda m: m["tensors"].update(a=[10**30]),
    lambda m: m["tensors"].pop("a"),
    lambda m: m["files"].clear(),
    lambda m: m["files"].update({"../elsewhere": {"bytes": 1, "sha256": ""}}),
    lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
    lambda m: m["files"].update({"a\0b": {"bytes": 1, "sha256": ""}}),
    lambda m: m.update(files=[1]),
    lambda m: m.update(step=8),
    lambda m: m.update(step="7"),
    lambda m: m.update(step=None),
    lambda m: m.update(format_version=1),
    lambda m: m.pop("slices"),
]


@pytest.mark.parametrize("edit", EDITS, ids=range(len(EDITS)))
def test_an_edited_manifest_is_refused_even_if_it_is_sealed_again(
    edit: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    path = saved(tmp_path)
    resealed(path, edit)
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.look(path)


def test_a_place_or_digest_that_was_edited_is_noticed_where_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for key, value in (("xxh3", "0" * 16), ("offset", 0)):
        resealed(path, lambda m, key=key, value=value: m["slices"][0].update({key: value}))
        with pytest.raises(CheckpointError, match="master of a"):
            checkpoint.read(path).shaped("a", "master")


def test_any_other_byte_of_the_manifest_breaks_its_seal(tmp_path: Path) -> None:
    path = saved(tmp_path)
    file = path / "manifest.json"
    text = file.read_text()
    for old, new in (
        ('"seed": 1', '"seed": 2'),
        ('"seed": 1', '"seed":  1'),
        ("\n}\n", "\n}\n\n"),
        ("sha256", "SHA256"),
    ):
        assert old in text
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(CheckpointError, match="sha256 is"):
            checkpoint.look(path)


def test_the_newest_valid_one_is_found_by_its_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        saved(tmp_path, step)
    (tmp_path / "LATEST").write_text("step-00000009\n")  # a hint that is wrong
    (tmp_path / "step-00000200").mkdir()  # no manifest: does not exist
    (tmp_path / "step-00000100" / "manifest.json").write_text("{")
    found, rejected = checkpoint.newest_valid(tmp_path)
    assert found is not None and found.step == 10
    assert list(rejected) == [tmp_path / "step-00000100"]


def test_saving_twice_changes_nothing_and_a_damaged_one_is_set_aside(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert saved(tmp_path) == path and (path / "manifest.json").stat().st_mtime_ns == before
    (file,) = path.glob("*.safetensors")
    file.write_bytes(b"damaged")
    assert checkpoint.read(saved(tmp_path)).step == 7
    assert (tmp_path / "quarantine" / "step-00000007-0" / file.name).read_bytes() == b"damaged"
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["rank00000-00000.safetensors", "manifest.json"])
def test_a_failed_write_publishes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 6)
    whole = disk.write_file

    def full(path: Path, parts: Any) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device", str(path))
        whole(path, parts)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=rf"{name}: No space left"):
        patch.setattr(disk, "write_file", full)
        saved(tmp_path, 7)
    found, rejected = checkpoint.newest_valid(tmp_path)
    assert found is not None and found.step == 6 and not rejected
    assert saved(tmp_path, 7).exists()
