"""The commands over checkpoints, on those of a real run: what they say is so, and what they write continues it."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.integration.conftest import SMALL, Trainer, final_state
from transmamba import checkpoint, staging
from transmamba import train as entry
from transmamba.checkpoint import Checkpoint, look, read
from transmamba.checkpoints_tools.inspection import facts
from transmamba.checkpoints_tools.rewriting import reshard
from transmamba.cli import app
from transmamba.config import Config
from transmamba.model.init import named_slices
from transmamba.model.model import Model
from transmamba.parallel.shards import Shards
from transmamba.slices import Piece, Shard
from transmamba.transpoint import layer_kinds


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("tools") / "run"
    overrides = ["train.steps=8", "checkpoint.keep=3", "sample.prompt=''", f"data.path={corpus}", f"run.dir={folder}"]
    assert entry.main([*(text for text in SMALL if "checkpoint" not in text), "checkpoint.every=3", *overrides]) == 0
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def damage(run: Path, step: int) -> Path:
    (file,) = (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-20] ^= 2
    file.write_bytes(data)
    return file


def same_state(one: Checkpoint, other: Checkpoint) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(values, other.tensors[key]) for key, values in one.tensors.items()
    )


def test_list_and_verify_tell_each_checkpoint(trained: Path, copy: Path) -> None:
    for command, state in (("list", "complete"), ("verify", "verified")):
        done = call(command, trained)
        assert done.exit_code == 0
        rows = [line for line in done.output.splitlines() if line.startswith("step-")]
        assert [row.split()[0] for row in rows] == ["step-00000008", "step-00000006", "step-00000003"]
        assert all(row.endswith(state) for row in rows) and f"{8 * 4 * 48:,} tokens" in rows[0]
    file = damage(copy, 6)
    assert call("list", copy).exit_code == 0  # it compares sizes
    done = call("verify", copy)
    assert done.exit_code == 21 and done.output.count("verified") == 2
    assert f"{file.name}: sha256 is" in done.output.replace("\n", "")


def test_inspect_shows_every_tensor_and_finds_the_damaged_one(trained: Path, copy: Path) -> None:
    found = final_state(trained)
    done = call("inspect", trained, "--json")
    told = json.loads(done.output)
    assert done.exit_code == 0 and told["step"] == 8 and told["config"]["model"]["d_model"] == 16
    rows = {(row["name"], row["kind"]): row for row in told["tensors"]}
    assert rows.keys() == set(found.tensors)
    for key, values in found.tensors.items():
        row = rows[key]
        assert row["shape"] == found.manifest["tensors"][key[0]] and row["fault"] is None
        assert row["mean"] == pytest.approx(float(values.double().mean()), abs=1e-12)
        assert (row["low"], row["high"]) == (float(values.min()), float(values.max()))
        assert row["n_zeros"] == int((values == 0).sum()) and row["n_non_finite"] == 0
    text = call("inspect", trained, "--step", 3).output
    assert "step 3" in text and "qkv" in text and "exp_avg_sq" in text and "verified" in text
    damage(copy, 8)
    assert "continues" not in call("inspect", copy, "--step", 8).output
    done = call("inspect", copy, "--step", 8)
    assert done.exit_code == 21 and done.output.count("DAMAGED") == 1
    assert call("inspect", copy).output.startswith(str(copy)) and "step 6" in call("inspect", copy).output


def test_statistics_leave_out_what_is_not_finite_and_count_it(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan"), 3.0, float("-inf"), 0.0, 0.0])
    pieces = [Piece("a", "master", (6,), 0, values), Piece("b", "master", (6,), 0, values * float("nan"))]
    one, none = facts(look(checkpoint.save(tmp_path, 1, pieces, {})))
    assert (one.mean, one.low, one.high, one.n_zeros, one.n_non_finite) == (1.0, 0.0, 3.0, 2, 2)
    assert (none.mean, none.n_zeros, none.n_non_finite) == (None, 0, 6)


def test_diff_of_a_checkpoint_with_itself_and_with_another(trained: Path, copy: Path) -> None:
    n_tensors = len(final_state(trained).tensors)
    done = call("diff", trained, copy)
    assert done.output == f"{n_tensors} tensors equal bit for bit, 0 not\n"
    assert len(call("diff", trained, copy, "--all").output.splitlines()) == n_tensors + 1
    before, after = (look(trained / "checkpoints" / f"step-{step:08d}") for step in (6, 8))
    text = call("diff", before.path, after.path).output
    name = "layers.0.mixer.qkv.weight"
    gap = after.tensors[name, "master"].double() - before.tensors[name, "master"].double()
    relative = float(gap.norm() / before.tensors[name, "master"].double().norm())
    (line,) = [line for line in text.splitlines() if line.startswith("master") and name in line]
    assert f"at most {gap.abs().max():.3e}, L2 {relative:.3e}" in line
    assert "step: 6 -> 8" in text and "schedule.lr: " in text
    assert call("diff", trained, trained.parent / "nowhere").exit_code == 2


def test_one_bit_is_a_difference(trained: Path, tmp_path: Path) -> None:
    found = final_state(trained)
    pieces = [Piece(n, k, found.manifest["tensors"][n], 0, values.clone()) for (n, k), values in found.tensors.items()]
    pieces[7].values.view(torch.int32)[3] ^= 1
    other = checkpoint.save(tmp_path, 8, pieces, {"tokens_seen": 1})
    lines = call("diff", trained, other).output.splitlines()
    (line,) = [line for line in lines if " values, " in line]
    assert pieces[7].name in line and line.split(": ")[1].startswith("1 of ")


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_reshard_cuts_anew_and_changes_no_bit(tp: int, dp: int, trained: Path, tmp_path: Path) -> None:
    done = call("reshard", trained, "--out", tmp_path / "new", "--tp", tp, "--dp", dp)
    assert done.exit_code == 0, done.output
    old, new = final_state(trained), read(tmp_path / "new" / "checkpoints" / "step-00000008")
    assert same_state(old, new)
    assert len(list(new.path.glob("*.safetensors"))) == tp * dp
    for key in ("config", "data", "schedule", "tokens_seen", "random", "versions"):
        assert old.manifest[key] == new.manifest[key]
    shards = set(new.slices["layers.0.mixer.qkv.weight", "exp_avg"])
    assert shards == ({None} if tp == 1 else {Shard(0, part, tp) for part in range(tp)})
    if (tp, dp) == (2, 2):  # and back
        back = reshard(new, tmp_path / "back", tp=1, dp=1)
        assert same_state(old, read(back)) and len(list(back.glob("*.safetensors"))) == 1


def test_every_cut_is_that_of_the_model(trained: Path, tmp_path: Path) -> None:
    """A rank of a tensor-parallel job finds its own shards in files of its own."""
    new = look(reshard(final_state(trained), tmp_path / "new", tp=2, dp=1))
    config = Config.model_validate(new.manifest["config"])
    sizes = {
        "n_tokens_known": new.manifest["data"]["vocab_size"],
        "n_rows": new.manifest["tensors"]["embedding.weight"][0],
    }
    part = Model(config.model, layer_kinds(config.model), seed=1, shards=Shards(tp=2, tp_rank=1), **sizes)
    for name, tensor, dim in named_slices(part):
        kind = "buffer" if name.endswith(".start") else "master"
        shard = None if dim is None else Shard(dim, 1, 2)
        (entry,) = new.slices[name, kind][shard]
        assert entry.length == tensor.numel()


def test_training_goes_on_from_a_resharded_checkpoint(train: Trainer, trained: Path, tmp_path: Path) -> None:
    reshard(final_state(trained), tmp_path / "new", tp=2, dp=2)
    whole = Path(shutil.copytree(trained, tmp_path / "whole"))
    for folder in (whole, tmp_path / "new"):
        assert train(folder, "train.steps=12", "sample.prompt=''") == 0
    assert same_state(final_state(whole), final_state(tmp_path / "new"))


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 MB in files of 0.8 MB: what Python holds at a time is a few of them."""
    monkeypatch.setattr(staging, "FILE_BYTES", 800_000)
    pieces = [Piece(f"layers.{i}.w", "master", (100_000,), 0, torch.full((100_000,), float(i))) for i in range(120)]
    config = {"config": {}, "data": {"vocab_size": 100}}
    source = look(checkpoint.save(tmp_path / "run" / "checkpoints", 1, pieces, config))
    del pieces
    reshard(source, tmp_path / "warm", tp=1, dp=2)  # what it imports is not counted
    tracemalloc.start()
    reshard(source, tmp_path / "new", tp=1, dp=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 9_000_000
    assert same_state(source, read(tmp_path / "new" / "checkpoints" / "step-00000001"))


def test_average_is_the_mean_and_goes_on(train: Trainer, trained: Path, tmp_path: Path) -> None:
    done = call("average", trained, "--out", tmp_path / "mean", "--last", 3)
    assert done.exit_code == 0, done.output
    new = final_state(tmp_path / "mean")
    olds = [look(trained / "checkpoints" / f"step-{step:08d}") for step in (3, 6, 8)]
    assert new.step == 8 and new.manifest["averaged"] == [3, 6, 8]
    for (name, kind), values in new.tensors.items():
        if kind == "master":
            mean = sum(old.tensors[name, kind].double() for old in olds) / 3
            assert torch.equal(values, mean.float())  # pyright: ignore[reportAttributeAccessIssue]
        elif kind == "weight":
            parts = new.tensors[f"{name}.start", "buffer"] + new.tensors[f"{name}.offset", "master"]
            assert torch.equal(values, parts)
        else:
            assert torch.equal(values, olds[-1].tensors[name, kind])
    assert train(tmp_path / "mean", "train.steps=9", "sample.prompt=''") == 0


def test_what_cannot_be_is_one_line_and_leaves_nothing(trained: Path, copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases = [
        (2, "--tp", ["reshard", trained, "--out", out, "--tp", 3]),
        (2, "--step", ["reshard", trained, "--out", out, "--step", 5]),
        (2, "--out", ["reshard", trained, "--out", trained]),
        (2, "--last", ["average", trained, "--out", out, "--last", 4]),
        (2, "RUN_DIR", ["inspect", tmp_path]),
        (2, "RUN_DIR", ["list", tmp_path / "nowhere"]),
    ]
    damage(copy, 8)
    cases += [(21, "checkpoint", ["reshard", copy / "checkpoints" / "step-00000008", "--out", out])]
    cases += [(21, "checkpoint", ["average", copy, "--out", out])]
    before = sorted(tmp_path.iterdir())
    for code, key, arguments in cases:
        done = call(*arguments)
        assert done.exit_code == code, (arguments, done.output)
        error = [line for line in done.output.splitlines() if line.startswith("transmamba: error: ")]
        assert len(error) == 1 and key in error[0] and "Fix: " in error[0] and "Traceback" not in done.output
    assert sorted(tmp_path.iterdir()) == before
