"""Every way a run ends has its own exit code, says one line, and loses nothing."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import Trainer, final_state
from tests.integration.test_resume import damage, interrupt_at
from transmamba import checkpoint, disk, loop, saving
from transmamba.data_pipeline.manifest import load_manifest
from transmamba.metrics import read_metrics
from transmamba.parallel.pipeline import Stage


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def last_event(folder: Path) -> dict[str, Any]:
    return events(folder)[-1]


def test_a_run_leaves_everything_in_its_folder(train: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, "train.steps=9", "validation.every=3", "train.layer_stats_every=3") == 0
    for name in ("config.yaml", "env.json", "metrics.jsonl", "events.jsonl", "loss.png", "exit.json", "logs"):
        assert (folder / name).exists(), name
    assert not (folder / "lock.json").exists()
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"step-00000008", "step-00000009", "LATEST"}  # every 4 and the last, newest two kept
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 10))
    for record in records:
        assert {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "time_s"} <= record.keys()
        assert len(record["past_transpoint"]) == 3
    assert [r["step"] for r in records if "validation" in r] == [3, 6, 9]
    assert all(len(r["layers"]["output_rms"]) == 3 for r in records if r["step"] % 3 == 0)
    assert records[-1]["loss"] == float(repr(records[-1]["loss"]))  # full precision
    assert json.loads((folder / "exit.json").read_text())["code"] == 0


def test_the_saved_config_repeats_the_run(train: Trainer, tmp_path: Path) -> None:
    from transmamba import train as entry

    assert train(tmp_path / "run", "train.steps=5") == 0
    again = tmp_path / "again"
    assert entry.main(["--config", str(tmp_path / "run" / "config.yaml"), f"run.dir={again}"]) == 0
    first, second = final_state(tmp_path / "run"), final_state(again)
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())


def test_a_signal_saves_and_tells_how_to_go_on(
    train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 2)
    assert train(tmp_path / "run", "train.steps=9") == 10
    assert f"--config {tmp_path / 'run' / 'config.yaml'}" in capsys.readouterr().out.replace("\n", "")
    assert final_state(tmp_path / "run").step == 3


def test_signals_during_a_save_wait_for_it(train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, folder = disk.write_file, tmp_path / "run"

    def slow(path: Path, parts: Any) -> None:
        time.sleep(0.3)
        signal.raise_signal(signal.SIGTERM)  # from the thread, while the loop goes on or waits
        whole(path, parts)

    monkeypatch.setattr(disk, "write_file", slow)
    assert train(folder, "train.steps=2000", "validation.every=0") == 10
    told = [event["event"] for event in events(folder)]
    assert told[-3:] == ["save", "stop", "exit"] and told.count("save") >= 2 and "save.failed" not in told
    newest, before = checkpoint.published(folder / "checkpoints")
    assert checkpoint.read(newest).step == len(read_metrics(folder)) > checkpoint.read(before).step >= 4
    assert not list((folder / "checkpoints").glob(".tmp*"))


def test_a_stop_file_stops_and_saves(train: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "STOP").touch()
    assert train(folder, "train.steps=9") == 11
    assert final_state(folder).step == 1
    assert train(folder, "train.steps=9") == 0


def test_a_non_finite_loss_is_never_saved(train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loop.run_schedule

    def poisoned(*args: object, **kwargs: object) -> list[torch.Tensor]:
        reports = whole(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        return [report * math.nan for report in reports] if poisoned_steps.pop(0) else reports

    poisoned_steps = [False] * 5 + [True]
    monkeypatch.setattr(loop, "run_schedule", poisoned)
    assert train(tmp_path / "run", "train.steps=9", "validation.every=0") == 20
    assert final_state(tmp_path / "run").step == 4
    assert last_event(tmp_path / "run")["code"] == 20


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_non_finite_gradient_is_never_saved(
    stage: int, train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.run_schedule
    steps = iter(range(100))

    def poisoned(stage: Stage, *args: object, **kwargs: object) -> list[torch.Tensor]:
        if next(steps) == 5:
            layer = next(module for name, module in stage.chunks[0].named_modules() if name.endswith("layers.1.norm"))
            layer.register_forward_hook(lambda _m, _i, out: out.register_hook(lambda g: g * math.inf) and None)
        return whole(stage, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loop, "run_schedule", poisoned)
    prompt = "sample.prompt=''"
    assert train(tmp_path / "run", "train.steps=9", "validation.every=0", f"zero.stage={stage}", prompt) == 20
    assert final_state(tmp_path / "run").step == 4


def test_no_valid_checkpoint_is_never_a_fresh_start(
    train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(folder, "train.steps=8") == 0
    before = (folder / "metrics.jsonl").read_text()
    for path in (folder / "checkpoints").glob("step-*"):
        damage(path)
    capsys.readouterr()
    assert train(folder, "train.steps=9") == 21
    assert capsys.readouterr().err.startswith("transmamba: error: resume: none of the 2 checkpoints")
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.d_ff=32", "model.d_ff"),
        ("seed=5", "seed"),
        ("data.seq_len=24", "data.seq_len"),
        ("transpoint.points=[0, 1, 2]", "transpoint.points"),
        ("train.global_batch=8", "train.global_batch"),
        ("precision=bf16", "precision"),
    ],
)
def test_another_configuration_does_not_take_over_a_checkpoint(
    override: str, key: str, train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(folder, "train.steps=4") == 0
    config = (folder / "config.yaml").read_text()
    capsys.readouterr()
    assert train(folder, "train.steps=8", override) == 23
    error = capsys.readouterr().err
    assert f"error: {key}: " in error and "Fix: " in error
    assert (folder / "config.yaml").read_text() == config


def test_length_extension_and_another_schedule_need_to_be_allowed(train: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, "train.steps=4") == 0
    longer = ["train.steps=8", "data.seq_len=96", "transpoint=uniform", "resume.allow=[seq_len,transpoint]"]
    assert train(folder, *longer) == 0
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert {"data.seq_len", "transpoint.schedule"} <= set(resumed["changed"])
    tokens = [json.loads(line)["tokens"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    short, long = tokens[0], tokens[-1] - tokens[-2]
    assert long == 2 * short and tokens == [short * step for step in range(1, 5)] + [
        4 * short + long * step for step in range(1, 5)
    ]
    newest = checkpoint.read(checkpoint.published(folder / "checkpoints")[0])
    assert newest.manifest["tokens_seen"] == tokens[-1]


def test_other_data_does_not_take_over_a_checkpoint(train: Trainer, corpus: Path, tmp_path: Path) -> None:
    from transmamba.data_pipeline.prepare import prepare

    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(f"another text, number {number}, with enough words to fill it. " * 40)
    prepare([str(text)], tmp_path / "other", tokenizer=load_manifest(corpus).tokenizer_path, progress=False)
    assert train(tmp_path / "run", "train.steps=4") == 0
    assert train(tmp_path / "run", "train.steps=8", f"data.path={tmp_path / 'other'}") == 23


def test_damaged_data_stops_the_run(train: Trainer, tmp_path: Path, corpus: Path) -> None:
    import shutil

    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    manifest = load_manifest(copy)
    shard = manifest.splits["train"].shards[0]
    data = bytearray((copy / shard.name).read_bytes())
    for offset in range(len(data) // 4, 3 * len(data) // 4, 2000):
        data[offset] ^= 4
    (copy / shard.name).write_bytes(data)
    assert train(tmp_path / "run", "train.steps=200", f"data.path={copy}") == 22
    cause = last_event(tmp_path / "run")["cause"]
    assert isinstance(cause, str) and shard.name in cause


def test_a_full_disk_is_told_and_only_the_last_save_ends_the_run(
    train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = disk.write_chunk, tmp_path / "run"
    full = [".tmp-step-00000008/rank00000-00000.safetensors"]

    def write_chunk(descriptor: int, chunk: memoryview) -> None:
        if any(os.readlink(f"/proc/self/fd/{descriptor}").endswith(name) for name in full):
            whole(descriptor, chunk[:100])
            raise OSError(28, "No space left on device")
        whole(descriptor, chunk)

    monkeypatch.setattr(disk, "write_chunk", write_chunk)
    monkeypatch.setattr(saving, "RETRY_S", (0.0,))
    assert train(folder, "train.steps=10") == 0
    assert [path.name for path in checkpoint.published(folder / "checkpoints")] == ["step-00000010", "step-00000004"]
    (failed,) = [event for event in events(folder) if event["event"] == "save.failed"]
    assert failed["step"] == 8 and failed["need"] > 0 and failed["free"] > 0
    full.append(".tmp-step-00000013/manifest.json")
    capsys.readouterr()
    assert train(folder, "train.steps=13") == 40
    error = capsys.readouterr().err
    assert "cannot save step 13" in error and "manifest.json: No space left" in error and "Fix: " in error
    assert last_event(folder)["code"] == 40 and final_state(folder).step == 12
    full.clear()
    assert train(folder, "train.steps=13") == 0
    assert final_state(folder).step == 13 and not list((folder / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize("kind", ["transmamba", "transformer", "mamba2", "hybrid"])
def test_every_kind_learns_by_one_override(kind: str, train: Trainer, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.steps=40", "optim.lr=1e-2", f"model.kind={kind}") == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
