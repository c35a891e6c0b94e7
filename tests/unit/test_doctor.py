import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor
from typer.testing import CliRunner

from transmamba.cli import app
from transmamba.doctor import report as doctor
from transmamba.doctor.report import (
    Finding,
    device_findings,
    disk_finding,
    kernel_findings,
    memory_finding,
    version_finding,
)
from transmamba.kernels import backend
from transmamba.kernels.cases import Case, cases
from transmamba.kernels.gated_norm import gated_rms_norm

CPU = torch.device("cpu")
NORM = next(cases("gated_norm gate=some"))


def with_op(case: Case, op: Any) -> Case:
    return Case(replace(case.operation, op=op), case.flags)


def test_this_machine_gets_a_line_for_everything(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json", "--run-dir", str(tmp_path / "runs")])
    rows = json.loads(done.stdout)
    assert {"python", "torch", "triton", "deepspeed", "megatron-core", "other requirements"} <= {
        row["check"] for row in rows
    }
    assert {
        *(
            "device",
            "threads",
            "memory",
            "run folder",
            "storage speed",
            "storage clock",
            "clock",
            "cores",
            "open files",
        ),
        *("/dev/shm", "C compiler", "git", "Slurm", "wandb", "lm-eval", "optuna", "mamba-ssm", "self-test", "ranks"),
    } <= {row["check"] for row in rows}
    assert all(row["fix"] for row in rows if row["verdict"] != "ok"), "what is not well has a remedy"
    assert done.exit_code == max(doctor.EXIT_CODES[row["verdict"]] for row in rows)
    assert not list(tmp_path.iterdir()), "looking makes nothing"
    (ranks,) = (row["value"] for row in rows if row["check"] == "ranks")
    assert ranks.startswith("2 ranks on 1 machine, gloo: a sum takes ")


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("optional", 0), ("warning", 1), ("fatal", 2)])
def test_the_exit_code_is_that_of_the_worst_line(verdict: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Finding("first", "well"), Finding("second", "found", verdict, "do something")]
    monkeypatch.setattr(doctor, "machine_findings", lambda run_dir: iter(rows))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == code
    assert verdict in done.stdout and "do something" in done.stdout


@pytest.mark.parametrize(
    ("requirement", "verdict", "value"),
    [
        ("pytest>=1", "ok", pytest.__version__),
        ("pytest>=999,<1000", "warning", f"{pytest.__version__}, supported is <1000,>=999"),
        ("no-such-package>=1", "fatal", "missing"),
    ],
)
def test_versions_are_held_against_their_range(requirement: str, verdict: str, value: str) -> None:
    finding = version_finding(Requirement(requirement))
    assert (finding.verdict, finding.value) == (verdict, value)
    assert finding.fix == ("" if verdict == "ok" else f"pip install '{Requirement(requirement)}'")


def test_more_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    (threads,) = (finding for finding in device_findings() if finding.check == "threads")
    assert (threads.verdict, threads.fix) == ("warning", "set OMP_NUM_THREADS to at most 2")


def test_a_torch_that_cannot_be_imported_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = device_findings()
    assert (finding.check, finding.verdict) == ("import torch", "fatal")


def test_short_memory_and_disk_are_warnings_and_no_folder_is_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "MIN_MEMORY", 0)
    monkeypatch.setattr(doctor, "MIN_DISK", 0)
    assert memory_finding().verdict == disk_finding(tmp_path).verdict == "ok"
    (tmp_path / "file").write_text("")
    assert disk_finding(tmp_path / "file" / "runs").verdict == "fatal"
    monkeypatch.setattr(doctor, "MIN_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "MIN_DISK", 1 << 60)
    assert memory_finding().verdict == disk_finding(tmp_path / "new").verdict == "warning"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_kernels_are_said_to_be_unchecked() -> None:
    done = CliRunner().invoke(app, ["doctor", "--kernels"])
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [doctor.NO_DEVICE]


def test_every_case_agrees_with_its_reference_on_the_cpu_path() -> None:
    found = list(kernel_findings(list(cases()), CPU, is_small=True))
    assert len(found) == sum(len(case.operation.tolerance) for case in cases())
    assert [finding for finding in found if finding.verdict != "ok"] == []


def test_kernels_are_run_where_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(backend, "runs_triton", lambda stream: asked.append(stream.dtype) or True)
    assert [finding.verdict for finding in kernel_findings([NORM], CPU, is_small=True)] == ["ok", "ok"]
    assert {torch.float32, torch.bfloat16} <= set(asked)
    assert not torch.are_deterministic_algorithms_enabled(), "settings are put back"


def failing_ops() -> Iterator[Any]:
    """Wrong by 2 %, not repeatable, failing: (what is wrong with it, operation)."""
    good, noise = gated_rms_norm, torch.Generator().manual_seed(0)

    def noisy(y_BTHV: Tensor, weight_HV: Tensor, z_BTHV: Tensor, gate_BT: Tensor) -> Any:
        return good(y_BTHV + 1e-6 * torch.randn((), generator=noise), weight_HV, z_BTHV, gate_BT=gate_BT)

    def broken(**given: Any) -> Any:
        raise RuntimeError("planted\nsecond line")

    yield pytest.param(lambda **given: 1.02 * good(**given), "output 0 is off by 2.0e-02 of 1e-05", id="wrong")
    yield pytest.param(noisy, "output 0 differs between two runs", id="unsteady")
    yield pytest.param(broken, "RuntimeError: planted", id="broken")


@pytest.mark.parametrize(("op", "complaint"), list(failing_ops()))
def test_a_failing_kernel_is_named_with_its_flags_and_its_error(
    op: Any, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = list(kernel_findings([with_op(NORM, op), NORM], CPU, is_small=True))
    assert [finding.verdict for finding in found] == ["fatal", "fatal", "ok", "ok"]
    assert found[0].fix.startswith(complaint)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "kernel_findings", lambda checked, device: iter(found))
    monkeypatch.setattr(doctor, "far_findings", lambda device: iter(()))
    assert doctor.run_doctor(True, False, tmp_path) == 2
    lines = capsys.readouterr().err.split("\n")[-3:-1]
    assert lines[0].startswith(f"gated_norm gate=some float32 3x25x3x20: {complaint}")
    assert len(lines) == 2


def test_the_command_line_loads_torch_only_when_it_is_needed() -> None:
    modules = "transmamba.cli, transmamba.doctor.report, transmamba.doctor.ranks, transmamba.runs, transmamba.runs_show"
    program = f"import sys, {modules}; assert not {{'torch', 'wandb', 'matplotlib'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("free_gb", "error", "verdicts"), [(20, 0.0, ["warning"]), (140, 1e-3, ["ok"]), (140, 0.1, ["fatal"])]
)
def test_long_streams_are_checked_where_they_fit(
    free_gb: int, error: float, verdicts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 10**9, 141 * 10**9))
    monkeypatch.setattr("transmamba.kernels.large.far_errors", lambda device: iter([("ssd values", error)]))
    assert [finding.verdict for finding in doctor.far_findings(CPU)] == verdicts
