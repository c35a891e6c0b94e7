"""wandb beside a run: all attempts are one run with every step once, and an outage holds nothing up."""

import collections
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transmamba.config import WandbConfig
from transmamba.errors import ConfigError
from transmamba.metrics import Journal, WandbFeed
from transmamba.tracking import wandb_feed
from transmamba.tracking.wandb_key import has_key, mode_line, settled_mode
from transmamba.tracking.wandb_records import _records, offline_steps
from transmamba.validate import validate

OFFLINE = WandbConfig(mode="offline", project="p")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run folder; whatever feed a failed test leaves is killed."""
    folder = tmp_path / "runs" / "one"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    yield folder
    for number in feeds_of(folder):
        os.kill(number, signal.SIGKILL)


def feeds_of(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"transmamba.tracking.wandb_feed" in words and str(folder).encode() in words:
            found.append(int(path.parent.name))
    return found


def until(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def attempt(folder: Path, first: int, last: int) -> WandbFeed:
    """What a trainer does that resumes after step `first` and ends after `last`; its feed still runs."""
    journal = Journal(folder, first)
    feed = WandbFeed(folder, OFFLINE)
    for step in range(first + 1, last + 1):
        journal.metrics({"step": step, "loss": 1 / step, "text": "long " * (9000 if step == 3 else 1)})
    journal.close()
    return feed


def logged(folder: Path) -> tuple[set[str], collections.Counter[int]]:
    """Ids and steps of all offline files."""
    from wandb.proto import wandb_internal_pb2 as messages

    parse = messages.Record.FromString  # pyright: ignore[reportAttributeAccessIssue]
    ids, steps = set(), collections.Counter()
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        for record in map(parse, _records(path.read_bytes())):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                steps[record.history.step.num] += 1
    return ids, steps


def test_three_attempts_are_one_run_with_every_step_once(folder: Path) -> None:
    attempt(folder, 0, 20).close(60)
    until(lambda: not feeds_of(folder))
    (identity,), steps = logged(folder)
    assert identity == json.loads((folder / "wandb.json").read_text())["id"] and steps == dict.fromkeys(range(1, 21), 1)

    feed = attempt(folder, 10, 25)  # the steps after the checkpoint are done again
    until(lambda: len(offline_steps(folder)) > 20)
    for number in feeds_of(folder):
        os.kill(number, signal.SIGKILL)
    feed.close()

    attempt(folder, 20, 30).close(60)
    until(lambda: not feeds_of(folder))
    assert logged(folder) == ({identity}, dict.fromkeys(range(1, 31), 1))
    assert len(list(folder.glob("wandb/offline-run-*"))) == 3


def test_a_feed_waits_for_the_one_before(folder: Path) -> None:
    first = attempt(folder, 0, 5)
    second = attempt(folder, 5, 9)  # while the first still runs
    until(lambda: len(feeds_of(folder)) == 2)
    second.close(0.1)
    first.close(60)
    until(lambda: not feeds_of(folder))
    assert logged(folder)[1] == dict.fromkeys(range(1, 10), 1)


def test_a_cut_file_counts_as_far_as_it_goes(folder: Path) -> None:
    attempt(folder, 0, 9).close(60)
    until(lambda: not feeds_of(folder))
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    whole, found = path.read_bytes(), 9
    assert len(whole) > 32768 and offline_steps(folder) == set(range(1, 10))
    for n_bytes in range(len(whole), 0, -997):
        path.write_bytes(whole[:n_bytes])
        steps = offline_steps(folder)
        assert steps == set(range(1, len(steps) + 1)) and len(steps) <= found
        found = len(steps)
    assert found == 0


def test_a_server_that_never_answers_holds_nothing_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        started = time.monotonic()
        feed = WandbFeed(folder, WandbConfig(mode="auto", project="p"))
        begun_s = time.monotonic() - started
        journal, steps_s = Journal(folder, 0), []
        until(lambda: len(feeds_of(folder)) == 1)
        for step in range(1, 201):
            started = time.monotonic()
            journal.metrics({"step": step, "loss": 1.0})
            steps_s.append(time.monotonic() - started)
        journal.close()
        started = time.monotonic()
        feed.close(0.1)
        assert begun_s < 1 and time.monotonic() - started < 1
        assert sorted(steps_s)[100] < 0.001
        until(lambda: not feeds_of(folder), 120)
    assert "logging goes on offline" in (folder / "logs" / "wandb.log").read_text()
    assert logged(folder)[1] == dict.fromkeys(range(1, 201), 1)


class FakeWandb:
    """A server that is at `step`, or that cannot be reached."""

    class Error(Exception):
        pass

    def __init__(self, step: int | None):
        self.step, self.modes, self.teardown = step, [], lambda: None

    def init(self, **settings: Any) -> Any:
        self.modes.append((settings["mode"], settings["id"], settings["group"], settings["name"]))
        if settings["mode"] == "online" and self.step is None:
            raise self.Error("unreachable")
        self.steps: list[int] = []
        return SimpleNamespace(
            id=settings["id"],
            offline=settings["mode"] == "offline",
            step=self.step,
            log=lambda record, step: self.steps.append(step),
            finish=lambda: None,
        )


def test_a_server_knows_where_it_was_and_an_outage_goes_on_from_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_feed, "_standard_input_closed", lambda: True)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    metrics = folder / "metrics.jsonl"
    attempts = []
    for server_step, last, expected in ((0, 5, range(1, 6)), (6, 9, range(6, 10)), (None, 12, range(10, 13))):
        metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, last + 1)))
        fake = FakeWandb(server_step)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        wandb_feed.main(folder, "online", "p", "")
        assert fake.steps == list(expected)
        attempts += fake.modes
    assert [mode for mode, *_ in attempts] == ["online", "online", "online", "offline"]
    assert {(identity, group, name) for _, identity, group, name in attempts} == {
        (json.loads((folder / "wandb.json").read_text())["id"], None, "one")
    }


def test_trials_of_a_sweep_are_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tmp_path / "sweeps" / "lr" / "trials" / "0007" / "lr-0007"
    (trial / "logs").mkdir(parents=True)
    (trial / "config.yaml").write_text("seed: 1\n")
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(0))
    wandb_feed._begin(trial, "offline", "p", "")
    wandb_feed._begin(trial, "offline", "p", "mine")
    assert [(group, name) for _, _, group, name in fake.modes] == [("lr", "lr-0007"), ("mine", "lr-0007")]


def test_without_a_key_it_is_offline_and_says_so_in_one_line(tmp_path: Path) -> None:
    none: dict[str, str] = {"HOME": str(tmp_path)}
    assert not has_key(none) and settled_mode(WandbConfig(), none) == "offline"
    line = mode_line(WandbConfig(), Path("runs/x"), none)
    assert line == "offline: no key is configured; `wandb sync runs/x/wandb/offline-run-*` sends it"
    assert mode_line(WandbConfig(mode="disabled"), Path("x"), none) == "disabled"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n login user\n password secret\n")
    for environ in (none, {"WANDB_API_KEY": "x"}):
        assert has_key(environ) and settled_mode(WandbConfig(), environ) == "online"
    assert not has_key({"HOME": str(tmp_path), "NETRC": str(tmp_path / "other")})


def test_online_without_a_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    from transmamba.compose import load

    with pytest.raises(ConfigError, match=r"wandb\.mode: online needs a key"):
        validate(load(["wandb.mode=online"]), {"HOME": str(tmp_path)})
