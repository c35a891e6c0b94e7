"""The CPU's time model: its counts against torch's dispatcher, its fit, its errors, and steps that no fit has seen."""
# B batch, T tokens, D model width.

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transmamba import plain_yaml
from transmamba.bench import profile as bench_profile
from transmamba.config import Config
from transmamba.kernels.documents import Documents
from transmamba.model.layer import Layer
from transmamba.planning import cpu_fit
from transmamba.planning.cpu_time import TERMS, Work, step_seconds, work
from transmamba.transpoint import layer_kinds

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "benchmarks" / "results" / "cpu-amd-epyc" / "plan-cpu.json"
VIEWS = {
    *("view", "transpose", "t", "expand", "slice", "select", "unsqueeze", "permute", "detach", "as_strided"),
    *("split", "unbind", "_unsafe_view", "alias", "split_with_sizes", "squeeze", "diagonal", "empty", "empty_like"),
    *("empty_strided", "new_empty", "unfold"),
}


def config_of(kind: str, points: list[Any], *, n_layers: int = 1, **others: Any) -> Config:
    """Two windows of 256 tokens; `others` replace sections."""
    model = {"kind": kind, "n_layers": n_layers, "d_model": 128, "n_heads": 4, "d_ff": 256, "vocab_size": 256}
    model |= {"ssm_head_dim": 32, "ssm_state": 32}
    sections: dict[str, Any] = {"model": model, "data": {"seq_len": 256}, "transpoint": {"points": points}}
    return Config.model_validate(sections | {"train": {"steps": 1, "global_batch": 2, "micro_batch": 2}} | others)


class Recorder(TorchDispatchMode):
    """Flops of matrix products, numbers that other operations read and write, and calls."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul, self.elements, self.operations = 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.operations += 0.4 if name in VIEWS else 1
        if name == "mm":
            self.matmul += 2 * math.prod(args[0].shape) * args[1].shape[1]
        elif name not in VIEWS and "bmm" not in name and "scaled_dot" not in name:
            results = result if isinstance(result, tuple | list) else [result]
            touched = [*args, *(() if name.endswith("_") else results)]  # what is changed in place is an argument
            self.elements += sum(x.numel() for x in touched if isinstance(x, Tensor))
            self.elements += sum(x.numel() for a in args if isinstance(a, list) for x in a if isinstance(x, Tensor))
        return result


@pytest.mark.parametrize(
    ("kind", "point"),
    [("transmamba", 0), ("transmamba", 64), ("transmamba", math.inf), ("transformer", 0), ("mamba2", 0)],
)
def test_work_of_a_layer_is_what_the_dispatcher_sees(kind: str, point: float) -> None:
    config = config_of(kind, [point])
    layer = Layer(config.model, layer_kinds(config.model)[0])
    for tensor in (*layer.parameters(), *layer.buffers()):
        torch.nn.init.normal_(tensor, std=0.1)
    B, T = config.train.micro_batch, config.data.seq_len
    x_TBD, documents = torch.randn(T, B, config.model.d_model).requires_grad_(), Documents.whole(B, T)
    documents.prefix(point)
    recorder = Recorder()
    with recorder:
        y_TBD = layer(x_TBD, {"transformer": math.inf}.get(kind, point), documents)
        y_TBD.backward(torch.ones_like(y_TBD))
    one, two = work(config), work(config_of(kind, [point], n_layers=2))
    own = {term: asdict(two)[term] - asdict(one)[term] for term in TERMS}
    assert own["matmul"] == recorder.matmul
    assert own["elements"] == pytest.approx(recorder.elements, rel=0.1)
    assert own["operations"] == pytest.approx(recorder.operations, rel=0.1)


# Of a machine that does not exist, in nanoseconds per unit.
TRUTH = {"matmul": 0.0114, "matmul_edges": 0.02, "attention": 0.012, "scores": 3.4, "scan": 0.0094}
TRUTH |= {"elements": 0.19, "operations": 9000.0, "parameters": 5.0}
KNOWN = {term: TRUTH[term] for term in ("matmul", "matmul_edges", "attention", "scores")}


def true_seconds(config: Config) -> float:
    amounts = asdict(work(config))
    return sum(amounts[term] * TRUTH[term] for term in TERMS) * 1e-9


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    seconds = {name: true_seconds(cpu_fit.config_of(name, 1)) for name in cpu_fit.FITTED}
    found = cpu_fit.fit(seconds, KNOWN)
    assert found == {term: pytest.approx(TRUTH[term], rel=0.02) for term in TERMS}
    # A known constant that is wrong shows in the rest.
    assert cpu_fit.fit(seconds, KNOWN | {"matmul": 0.02}) != found


def test_what_a_fit_writes_passes_the_check_on_its_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, record, slowness = tmp_path / "new" / "cpu.yaml", tmp_path / "new" / "record.json", 1.0

    def measure(named: dict[str, Config], threads: list[int], *, clock: str) -> dict[str, dict[int, float]]:
        assert clock == "wall"
        return {name: {n: slowness * true_seconds(config) for n in threads} for name, config in named.items()}

    monkeypatch.setattr(bench_profile, "measure", measure)
    monkeypatch.setattr(bench_profile, "kernel_constants", lambda threads, clock: KNOWN)
    options = ["--clock", "wall", "--threads", "3", "--profile", str(profile), "--record", str(record)]
    assert cpu_fit.main(options) == 0
    assert cpu_fit.main([*options, "--check"]) == 0
    assert {
        name: len(part["rows"])
        for name, part in json.loads(record.read_text()).items()
        if name in ("fitted", "held_out")
    } == {
        "fitted": len(cpu_fit.FITTED),
        "held_out": len(cpu_fit.HELD_OUT),
    }
    slowness = 1.3
    assert cpu_fit.main([*options, "--check"]) == 1


def test_no_constant_is_negative_whatever_was_measured() -> None:
    seconds = {name: 1e-3 * (1 + index) for index, name in enumerate(cpu_fit.FITTED)}
    assert min(cpu_fit.fit(seconds, KNOWN).values()) >= 0


def test_work_adds_up() -> None:
    one = work(config_of("transmamba", [64]))
    assert one + one == one * 2
    assert Work() + one == one
    double = work(config_of("transmamba", [64], train={"global_batch": 4, "micro_batch": 2, "steps": 1}))
    assert double.matmul == 2 * one.matmul
    assert double.parameters == one.parameters
    full = work(
        config_of("transmamba", [64], train={"global_batch": 2, "micro_batch": 2, "steps": 1, "recompute": "full"})
    )
    assert one.matmul < full.matmul < 4 / 3 * one.matmul  # the head is not repeated


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"tp": 2}},
        {"precision": "bf16"},
        {"train": {"threads": 7, "steps": 1, "global_batch": 2, "micro_batch": 2}},
    ],
)
def test_what_the_profile_does_not_cover_is_refused(sections: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="profile"):
        step_seconds(config_of("transmamba", [64], **sections), plain_yaml.read(cpu_fit.PROFILE))


def test_the_record_belongs_to_the_profile_and_keeps_the_limit() -> None:
    record, profile = json.loads(RECORD.read_text()), plain_yaml.read(cpu_fit.PROFILE)
    for rows, names in ((record["fitted"]["rows"], cpu_fit.FITTED), (record["held_out"]["rows"], cpu_fit.HELD_OUT)):
        assert {row["name"] for row in rows} == set(names)
        for row in rows:
            predicted = step_seconds(cpu_fit.config_of(row["name"], row["threads"]), profile)
            assert predicted == pytest.approx(row["predicted_s"], rel=1e-3)
            assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
    assert not set(cpu_fit.FITTED) & set(cpu_fit.HELD_OUT)
    assert max(abs(row["error"]) for row in record["held_out"]["rows"]) <= cpu_fit.LIMIT


def test_planning_imports_no_torch() -> None:
    names = "activations", "cpu_time", "cpu_fit"
    program = f"import sys; from transmamba.planning import {', '.join(names)}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check", "--threads", "7"], "choose 1, 2"),
        (["--threads", "0"], "choose 1 or more"),
        (["--check", "--profile", "missing.yaml"], "missing.yaml"),
        (["--check", "--record", "BROKEN"], "Expecting value"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "record.json"
    broken.write_text("no JSON")
    with pytest.raises(SystemExit) as ended:
        cpu_fit.main([str(broken) if word == "BROKEN" else word for word in arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.long
def test_steps_that_no_fit_has_seen_take_as_long_as_predicted(tmp_path: Path) -> None:
    record = tmp_path / "check.json"
    command = [sys.executable, "-m", "transmamba.planning.cpu_fit", "--check", "--threads", "1", "--record", record]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(record.read_text())["held_out"]["rows"]) == len(cpu_fit.HELD_OUT) == 6
