"""Forecasts, searches and their printing: what they say, to whom, and that it holds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transmamba.compose import load
from transmamba.planning.answer import run_plan
from transmamba.validate import validate

LAYOUT = ["model=1_5b", "data.seq_len=8192", "train.global_batch=256", "train.micro_batch=1", "parallel.tp=2"]
FORECAST_KEYS = {
    *("hardware", "gpus", "device_memory_bytes", "recompute", "stages", "peak_memory_bytes", "fits", "communication"),
    *("time", "stage_imbalance", "step_s", "error_bar", "error_words", "tokens_per_s_per_gpu", "mfu_causal_half"),
    *("mfu_full_attention", "tokens", "days", "gpu_hours", "anchor", "largest_micro_batch"),
}
PLAN_KEYS = {
    *("layers", "seq_len", "vocab_rows", "parameters", "embedding_parameters", "forward_flops_per_token"),
    *("training_flops_per_token", "flop_convention", "training_flops_per_token_full_attention"),
    *("full_attention_convention", "tokens", "steps", "tokens_per_step", "warnings", "parallel", "forecast", "search"),
}


def planned(capsys: pytest.CaptureFixture[str], *overrides: str, **options: object) -> dict:
    assert run_plan(list(overrides), as_json=True, **options) == 0  # pyright: ignore[reportArgumentType]
    return json.loads(capsys.readouterr().out)


def test_the_record_has_all_that_was_promised(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *LAYOUT, gpus=64, tokens="300B")
    assert plan.keys() == PLAN_KEYS
    found = plan["forecast"]
    assert found.keys() == FORECAST_KEYS
    assert (found["gpus"], plan["parallel"]["dp"], found["tokens"]) == (64, 32, 300 * 10**9)
    assert found["gpu_hours"] == pytest.approx(found["days"] * 24 * 64)
    assert found["days"] == pytest.approx(3e11 / found["tokens_per_s_per_gpu"] / 64 / 86400)
    flops = plan["training_flops_per_token"]
    assert found["mfu_causal_half"] == pytest.approx(found["tokens_per_s_per_gpu"] * flops / 989e12)
    assert found["mfu_full_attention"] > found["mfu_causal_half"]
    assert {group["group"] for group in found["communication"]} >= {"tp", "dp_cp"}
    assert "held-out" in found["error_words"] and "roofline" in found["error_words"]
    assert found["anchor"].keys() >= {"row", "source", "measured", "predicted_step_s"}


def test_a_model_without_a_scan_is_surer_than_one_with(capsys: pytest.CaptureFixture[str]) -> None:
    ours = planned(capsys, *LAYOUT, gpus=8)["forecast"]
    theirs = planned(capsys, "model=1_5b_transformer", *LAYOUT[1:], gpus=8)["forecast"]
    assert theirs["error_bar"] < ours["error_bar"]
    assert "roofline" not in theirs["error_words"]


def test_recomputing_makes_room(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *LAYOUT[:3], "train.micro_batch=8", gpus=8)["forecast"]
    peaks = found["peak_memory_bytes"]
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    assert found["fits"] is False
    assert peaks["none"] > 80e9 > peaks["full"]
    again = planned(capsys, *LAYOUT[:3], "train.micro_batch=8", "train.recompute=full", gpus=8)["forecast"]
    assert again["fits"] is True
    assert again["peak_memory_bytes"] == peaks
    assert again["step_s"] > found["step_s"]
    wider = planned(capsys, *LAYOUT[:3], "train.micro_batch=4", gpus=8, hardware="h200")["forecast"]
    assert wider["fits"] is True


@pytest.mark.parametrize("layout", [[], ["parallel.pp=2"], ["parallel.pp=2", "parallel.vpp=2"]], ids=str)
def test_the_largest_micro_batch_is_the_last_that_fits(layout: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    largest, fitting = set(), []
    for size in (1, 2, 4, 8):
        found = planned(capsys, *LAYOUT[:3], *layout, f"train.micro_batch={size}", gpus=8)["forecast"]
        largest.add(found["largest_micro_batch"])
        fitting += [size] * found["fits"]
    assert largest == {max(fitting)} and max(fitting) < 8


def test_what_does_not_fit_is_told_with_what_would_and_marked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = {}
    for size in (1, 8):
        assert run_plan([*LAYOUT[:3], f"train.micro_batch={size}"], as_json=False, gpus=8) == 0
        words[size] = {line[:12].strip(): line for line in capsys.readouterr().out.splitlines()}
    for name in ("step time", "speed", "cost"):
        assert words[8][name].rstrip().endswith("if it fitted") and "fitted" not in words[1][name]
    assert "train.micro_batch=2 or less, or train.recompute=full" in words[8]["to fit"] and "to fit" not in words[1]


def test_the_number_of_gpus_sets_the_defaults_that_depend_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    assert planned(capsys, "model=tiny", gpus=4)["parallel"]["dp"] == 4
    assert dict(os.environ) == before


@pytest.mark.parametrize("model", ["tiny", "tiny_transformer", "tiny_hybrid", "tiny_mamba2_stock"])
@pytest.mark.parametrize("ffn", [[], ["model.d_ff=0"]], ids=["ffn", "no ffn"])
def test_every_kind_of_layer_has_a_forecast(model: str, ffn: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel.pp=2", "parallel.vpp=2", "train.recompute=selective", "train.global_batch=64"]
    found = planned(capsys, f"model={model}", *ffn, *layout, gpus=8)["forecast"]
    assert found["step_s"] > 0
    assert len(found["stages"]) == 2
    assert all(stage["activations_bytes"] > 0 for stage in found["stages"])
    assert found["stages"][0]["logits_bytes"] == 0 < found["stages"][1]["logits_bytes"]


@pytest.mark.parametrize("options", [{"gpus": 64}, {"search": 16}, {}])
def test_the_text_fits_eighty_columns(
    options: dict[str, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_plan(["parallel.pp=2", *LAYOUT], as_json=False, **options) == 0  # pyright: ignore[reportArgumentType]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 40
    assert all(len(line) <= 80 and "…" not in line for line in lines)


@pytest.mark.usefixtures("roomy_disk")
@pytest.mark.parametrize("model", ["400m", "400m_hybrid", "tiny_mamba2"])
def test_the_best_layouts_of_a_search_are_valid_and_fit(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = [f"model={model}", "data.seq_len=2048", "train.global_batch=512", "precision=bf16"]
    found = planned(capsys, *fixed, search=128)["search"]
    times = [one["step_s"] for one in found["best"]]
    assert len(times) == 10 and times == sorted(times)
    for one in found["best"]:
        config = load([*fixed, *one["overrides"]])
        validate(config, {"WORLD_SIZE": "128", "RANK": "0"})
        assert one["memory_bytes"] <= 80e9
    first = planned(capsys, *fixed, *found["best"][0]["overrides"], gpus=128)["forecast"]
    assert first["step_s"] == pytest.approx(times[0])
    assert first["peak_memory_bytes"][found["best"][0]["recompute"]] == found["best"][0]["memory_bytes"]


@pytest.mark.parametrize(
    ("overrides", "options", "line"),
    [
        ([], {"hardware": "h300"}, "--hardware: no such profile (got h300). Fix: choose a100"),
        ([], {"tokens": "many"}, "--tokens: not a number of tokens (got many). Fix: write 300B"),
        (["parallel.tp=3"], {}, "parallel.tp: tp x cp = 3 does not divide model.n_heads=8"),
        (["train.global_batch=7"], {"search": 4096}, "--search: no layout is valid on 4096 GPUs of h100"),
        (["parallel.tp=2"], {"gpus": 3}, "parallel: tp x pp x cp = 2 x 1 x 1 = 2 does not divide the 3 processes"),
        ([], {"search": 8, "hardware": "cpu"}, "--search: layouts are searched for GPUs"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    overrides: list[str], options: dict[str, object], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(overrides, as_json=False, **options) == 2  # pyright: ignore[reportArgumentType]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"transmamba: error: {line}")


def test_a_profile_of_ones_own_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = Path("transmamba/planning/hardware/h100.yaml").read_text(encoding="utf-8")
    profile = tmp_path / "mine.yaml"
    profile.write_text(shipped.replace("nic_bytes_per_s: 47.0e+9", "nic_bytes_per_s: 4.7e+9"), encoding="utf-8")
    slow, fast = (planned(capsys, *LAYOUT, gpus=64, hardware=name)["forecast"] for name in (str(profile), "h100"))
    assert slow["step_s"] > fast["step_s"]
    short = tmp_path / "short.yaml"
    short.write_text("chip: h100\nspeed: 3\n", encoding="utf-8")
    assert run_plan(LAYOUT, as_json=True, hardware=str(short)) == 2
    assert "--hardware gpus_per_node: missing" in capsys.readouterr().err


def test_the_profile_of_a_cpu_has_a_time_model_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "model=tiny", hardware="cpu")["forecast"]
    assert found.keys() == FORECAST_KEYS
    assert found["tokens_per_s_per_gpu"] == pytest.approx(8 * 256 / found["step_s"])
    assert run_plan(["parallel.tp=2"], as_json=True, hardware="cpu") == 2
    assert "--hardware: a CPU's profile is of one process, not 2" in capsys.readouterr().err


def test_a_thousand_gpus_are_searched_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    found = planned(capsys, "model=1_5b", "data.seq_len=8192", "train.global_batch=1024", search=1024)["search"]
    assert time.process_time() - start <= 5
    assert found["n_valid"] > 1000


def command(*arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of one call of the command, the machine's load left out: its own CPU time."""
    program = f"import sys; sys.argv = ['transmamba', *{arguments!r}]; from transmamba.cli import main\n"
    program += "try: main()\nfinally:\n import resource; used = resource.getrusage(resource.RUSAGE_SELF)\n"
    program += " assert not {'torch', 'numpy'} & set(sys.modules)\n"
    program += " print(used.ru_utime + used.ru_stime, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return float(done.stderr.splitlines()[-1]), done


def test_a_plan_is_there_at_once_and_imports_no_torch() -> None:
    times = []
    while len(times) < 5 and min(times, default=1.0) > 0.5:
        seconds, done = command("plan", "model=400m", "data.seq_len=8192", "train.tokens=50M")
        assert done.returncode == 0, done.stderr
        times.append(seconds)
    assert min(times) <= 0.5, times


def test_a_wrong_configuration_is_refused_at_once() -> None:
    seconds, done = command("plan", "parallel.tp=3")
    assert done.returncode == 2
    assert done.stderr.startswith("transmamba: error: parallel.tp: tp x cp = 3 does not divide")
    assert seconds <= 1.5
