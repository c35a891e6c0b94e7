"""What the doctor says of storage, clocks, limits, programs, optional parts and the network, with faults planted."""

import collections
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from transmamba.doctor import parts, ranks, system
from transmamba.doctor.finding import Finding, Verdict
from transmamba.doctor.parity import parity_finding
from transmamba.doctor.parts import PARTS, part_findings
from transmamba.doctor.ranks import local_finding, verdict
from transmamba.doctor.system import (
    clock_finding,
    cores_finding,
    files_finding,
    program_finding,
    shared_memory_finding,
    storage_findings,
    system_findings,
)

ROOT = Path(__file__).parents[2]
Usage = collections.namedtuple("Usage", "total used free")


def test_slow_storage_and_a_clock_that_is_off_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [found.verdict for found in storage_findings(tmp_path)][1] == "ok"
    monkeypatch.setattr(system, "SLOW_SYNC_S", 0.0)
    monkeypatch.setattr(system, "SKEW_S", -1.0)
    slow, skewed = storage_findings(tmp_path)
    assert slow.verdict == skewed.verdict == "warning" and "MB/s" in slow.value and "run.dir" in slow.fix
    assert not list(tmp_path.iterdir())


def test_a_file_server_in_another_hour_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + 3600)
    found = list(storage_findings(tmp_path))[1]
    assert found.verdict == "warning" and 3590 < float(found.value.split()[0]) < 3610


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not {"storage speed", "storage clock"} & {found.check for found in system_findings(tmp_path / "runs")}


def test_a_clock_that_goes_backwards_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock_finding() == Finding("clock", "monotonic, in pace with the wall clock")
    ticks = iter(range(10**6, 0, -1))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic_ns", lambda: next(ticks))
        assert clock_finding().verdict == "fatal"


def test_a_quota_below_the_cores_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert cores_finding() == Finding("cores", "8 of 16 may be used")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores_finding().verdict == "ok"
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    found = cores_finding()
    assert (found.verdict, found.value) == ("warning", "8 of 16 may be used, 2.5 of them by quota")
    assert found.fix.startswith("set train.threads=2:")


def test_small_limits_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert files_finding() == Finding("open files", "at most 256 (ulimit -n)", "warning", "ulimit -n 4096")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 << 20, 0, 64 << 20))
    found = shared_memory_finding()
    assert (found.verdict, found.value) == ("warning", "0.06 GiB free") and "--shm-size" in found.fix


@pytest.mark.parametrize("missing", ["optional", "fatal"])
def test_a_program_is_there_absent_or_broken(missing: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program_finding("x", "tool", missing, "install it") == Finding("x", "absent", missing, "install it")
    for text, expected in (("echo tool 1.2", Finding("x", "tool 1.2")),
                           ("echo no conf; exit 1", Finding("x", "no conf", missing, "install it"))):  # fmt: skip
        (tmp_path / "tool").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "tool").chmod(0o755)
        assert program_finding("x", "tool", missing, "install it") == expected


def test_every_optional_part_says_what_it_enables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "installed", lambda name: None)
    absent = list(part_findings())
    assert [found.check for found in absent] == ["wandb", *PARTS]
    assert all(found.verdict == "optional" and PARTS[found.check][1] in found.fix for found in absent[1:])
    monkeypatch.setattr(parts, "installed", lambda name: "1.0")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert all(found.verdict == "ok" for found in part_findings())


def test_a_wrong_scan_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    from transmamba.model import mixing

    assert parity_finding().verdict == "ok"
    whole = mixing.ssd_scan

    def wrong(*args: Any, **given: Any) -> Any:
        if given.get("transpoint") == 17:
            given["dt_BTH"] = given["dt_BTH"] * 1.001
        return whole(*args, **given)

    monkeypatch.setattr(mixing, "ssd_scan", wrong)
    found = parity_finding()
    assert found.verdict == "fatal" and found.fix.startswith("TransPoint 17 is wrong")


@pytest.mark.long
def test_ranks_that_cannot_meet_are_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    found = local_finding()
    assert found.verdict == "fatal" and "do not meet" in found.value and "interface" in found.fix


def test_wrong_sums_are_fatal_and_slow_ones_warnings() -> None:
    hosts = ["a", "a", "b", "b"]
    assert verdict(False, 1e-4, 1e9, hosts, "gloo").verdict == "fatal"
    assert (
        verdict(True, 1.0, 1e9, hosts, "gloo").verdict == verdict(True, 1e-4, 1e3, hosts, "gloo").verdict == "warning"
    )
    assert verdict(True, 1e-4, 1e9, hosts, "NCCL") == Finding(
        "ranks", "4 ranks on 2 machines, NCCL: a sum takes 0.10 ms, 1,000 MB/s"
    )


def test_the_ranks_of_a_job_look_at_their_own_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    job = plain | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_NTASKS": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", "from transmamba.doctor.report import run_doctor; from pathlib import Path; "
             "raise SystemExit(run_doctor(False, False, Path('runs'), network=True))"],
            cwd=ROOT,
            env=job | {"SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert told[0].startswith("ranks 2 ranks on 1 machine, gloo: ") and told[1] == ""


def test_without_a_launcher_the_network_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.main([]) == 2
    assert "RANK is not set. Fix: start this with torchrun" in capsys.readouterr().err
