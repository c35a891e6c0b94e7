"""Damage of every kind is found, every time; the peers' formats take the same flipped bits without a word."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from transmamba import checkpoint
from transmamba.checkpoint import CheckpointError
from transmamba.slices import Piece

N_FLIPS, N_SIDE_BY_SIDE = 2000, 200


def state(seed: int = 0, n: int = 20_000) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(n, generator=draw) for i in range(4)}


def save(folder: Path, step: int = 3, seed: int = 0, n: int = 2000) -> Path:
    pieces = [Piece(name, "master", (n,), 0, values) for name, values in state(seed, n).items()]
    return checkpoint.save(folder, step, pieces, {"seed": seed})


def flip(path: Path, where: float, bit: int) -> bytes:
    """Flip one bit of a file; returns what it was."""
    whole = path.read_bytes()
    data = bytearray(whole)
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    return whole


def test_every_one_of_two_thousand_flipped_bits_is_found(tmp_path: Path) -> None:
    path, draw = save(tmp_path), random.Random(5)
    files = sorted(path.iterdir())
    weights = [max(file.stat().st_size, 20_000) for file in files]  # the manifest gets its share
    n_found = {file.name: 0 for file in files}
    for _ in range(N_FLIPS):
        (file,) = draw.choices(files, weights)
        whole = flip(file, draw.random(), draw.randrange(8))
        with pytest.raises(CheckpointError, match=file.name):
            checkpoint.read(path)
        file.write_bytes(whole)
        n_found[file.name] += 1
    assert sum(n_found.values()) == N_FLIPS and min(n_found.values()) > 100
    checkpoint.read(path)


def test_a_flipped_bit_is_also_found_by_the_digest_of_its_slice_alone(tmp_path: Path) -> None:
    path, draw = save(tmp_path), random.Random(6)
    (file,) = path.glob("*.safetensors")
    loaded = checkpoint.look(path)
    for _ in range(300):
        (entry,) = loaded.slices[f"layers.{draw.randrange(4)}.weight", "master"][None]
        at = (entry.offset + draw.randrange(entry.n_bytes)) / file.stat().st_size + 1e-9
        whole = flip(file, at, draw.randrange(8))
        with pytest.raises(CheckpointError, match="another digest"):
            loaded.shaped(entry.name, "master")
        file.write_bytes(whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_side_by_side_with_the_formats_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = state()
    ours = save(tmp_path / "ours", n=20_000)
    torch.save(tensors, tmp_path / "torch.pt")
    save_file(tensors, tmp_path / "one.safetensors")
    save_distributed(tensors, checkpoint_id=tmp_path / "dcp", no_dist=True)

    def load_dcp() -> dict[str, torch.Tensor]:
        into = {name: torch.zeros_like(values) for name, values in tensors.items()}
        load_distributed(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
        return into

    (own_file,), (dcp_file,) = ours.glob("*.safetensors"), (tmp_path / "dcp").glob("*.distcp")
    columns: dict[str, tuple[Path, Callable[[], Any]]] = {
        "transmamba": (own_file, lambda: checkpoint.read(ours)),
        "torch.save": (tmp_path / "torch.pt", lambda: torch.load(tmp_path / "torch.pt")),
        "DCP": (dcp_file, load_dcp),
        "safetensors": (tmp_path / "one.safetensors", lambda: load_file(tmp_path / "one.safetensors")),
    }
    found = dict.fromkeys(columns, 0)
    draw = random.Random(7)
    for _ in range(N_SIDE_BY_SIDE):
        where, bit = draw.uniform(0.02, 0.98), draw.randrange(8)  # within the tensors of each
        for name, (file, load) in columns.items():
            whole = flip(file, where, bit)
            try:
                load()
            except Exception:
                found[name] += 1
            file.write_bytes(whole)
    with capsys.disabled():
        print("\nflipped bits found, of", N_SIDE_BY_SIDE, found)
    assert found.pop("transmamba") == N_SIDE_BY_SIDE
    assert all(n <= 0.02 * N_SIDE_BY_SIDE for n in found.values())


def shard(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


# What is done to the newest of two checkpoints; `other` is one of another run at the same step.
DAMAGE: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "cut": lambda new, other, draw: os.truncate(shard(new), draw.randrange(shard(new).stat().st_size)),
    "longer": lambda new, other, draw: shard(new).open("ab").write(draw.randbytes(draw.randrange(1, 99))),
    "a page of zeros": lambda new, other, draw: zero_page(shard(new), draw),
    "a swapped shard": lambda new, other, draw: swap(shard(new), shard(new.parent / "step-00000003")),
    "a shard of another run": lambda new, other, draw: shutil.copyfile(shard(other), shard(new)),
    "the manifest of another run": lambda new, other, draw: shutil.copyfile(
        other / "manifest.json", new / "manifest.json"
    ),
    "the manifest of another step": lambda new, other, draw: shutil.copyfile(
        new.parent / "step-00000003" / "manifest.json", new / "manifest.json"
    ),
    "another step's name": lambda new, other, draw: swap(new, new.parent / "step-00000003"),
    "a shard gone": lambda new, other, draw: shard(new).unlink(),
    "one more shard": lambda new, other, draw: shutil.copyfile(shard(other), new / "rank00001-00000.safetensors"),
    "a cut manifest": lambda new, other, draw: os.truncate(
        new / "manifest.json", draw.randrange((new / "manifest.json").stat().st_size)
    ),
    "an empty manifest": lambda new, other, draw: (new / "manifest.json").write_bytes(b""),
}


def zero_page(file: Path, draw: random.Random) -> None:
    with file.open("r+b") as stream:
        stream.seek(draw.randrange(file.stat().st_size // 4096) * 4096)
        stream.write(bytes(4096))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_checkpoint_before_is_used(kind: str, tmp_path: Path) -> None:
    draw = random.Random(8)
    for trial in range(12):
        folder = tmp_path / str(trial)
        save(folder, 3, seed=1)
        new, other = save(folder, 6, seed=2), save(tmp_path / f"other{trial}", 6, seed=3)
        DAMAGE[kind](new, other, draw)
        found, rejected = checkpoint.newest_valid(folder)
        if kind == "another step's name":
            assert found is None and len(rejected) == 2
            continue
        fallback = None if kind == "a swapped shard" else 3  # that damages both
        assert (found and found.step) == fallback, kind
        assert new in rejected and str(new) in rejected[new]


@pytest.mark.parametrize("text", ["", "nonsense", "step-00000009\n", "../../elsewhere\n"])
def test_the_hint_decides_nothing(text: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "LATEST").write_text(text)
    found, rejected = checkpoint.newest_valid(tmp_path)
    assert found is not None and found.step == 3 and not rejected
