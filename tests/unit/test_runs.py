"""Run folders seen from outside: every state, torn files, many runs, and what `runs show` says of a verdict."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from transmamba import heartbeat, metrics, runs
from transmamba.cli import app
from transmamba.metrics import newest_first
from transmamba.runs import MEANINGS, find_runs, run_state

CONFIG = """seed: {seed}
precision: fp32
model:
  kind: transmamba
  n_layers: 2
  vocab_size: 512
data:
  seq_len: 16
train:
  steps: {steps}
  tokens: {tokens}
  global_batch: 4
optim:
  lr: 0.003
run:
  dir: somewhere
"""


def make_run(folder: Path, n_steps: int = 10, *, steps: str = "40", tokens: str = "null", seed: int = 1) -> Path:
    """A run folder as a trainer leaves it in the middle of its work, validated at every fifth step."""
    for name in ("logs", "checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(steps=steps, tokens=tokens, seed=seed))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, n_steps + 1):
            record: dict[str, Any] = {"step": step, "tokens": 64 * step, "loss": 9 - step / 10, "grad_norm": 1.0,
                                      "tokens_per_s": 1000.0 + step, "time_s": float((step - 1) % 5 + 1)}  # fmt: skip
            if step % 5 == 0:
                record["validation"] = {"held": {"loss": 8 - step / 10, "bits_per_byte": 3.0}}
            file.write(json.dumps(record) + "\n")
    return folder


def lock(folder: Path, host: str, pid: int) -> None:
    (folder / "lock.json").write_text(json.dumps({"host": host, "pid": pid}))


def ended(folder: Path, code: int, **fields: Any) -> None:
    (folder / "exit.json").write_text(json.dumps({"code": code, "cause": "words", "resume": "again", **fields}))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["runs", *map(str, arguments)])


@pytest.mark.parametrize("code", MEANINGS)
def test_an_exit_code_is_told_with_its_meaning(code: int, tmp_path: Path) -> None:
    ended(make_run(tmp_path / "run"), code)
    state = run_state(tmp_path / "run")
    assert state.state == {0: "done", 10: "stopped", 11: "stopped"}.get(code, "failed")
    assert (state.code, state.why) == (code, f"{code}: {MEANINGS[code]}")
    assert (state.step, state.steps, state.tokens, state.loss, state.validation) == (10, 40, 640, 8.0, 7.0)
    assert state.tokens_per_s == 1005.5 and 0 <= state.age_s < 60


def test_a_signal_before_the_first_step_is_told(tmp_path: Path) -> None:
    ended(make_run(tmp_path / "run"), 143)
    assert run_state(tmp_path / "run").why == "143: signal 15 before there was anything to save"


def test_a_run_of_this_machine_runs_while_its_process_lives(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lock(folder, socket.gethostname(), dead_pid())
    assert run_state(folder).state == "crashed"
    page = heartbeat.create_page(heartbeat.page_path(folder, 0))
    page[heartbeat.Word.PHASE] = heartbeat.Phase.SAVE
    page[heartbeat.Word.BEAT] -= 7 * 10**9
    state = run_state(folder)
    assert state.state == "running" and state.why == "in phase save, heartbeat 7 s ago" and state.code is None
    assert state.heartbeat_s is not None and 7 <= state.heartbeat_s < 20
    page[heartbeat.Word.TICKS] += 1  # the pid is another process's by now
    assert run_state(folder).state == "crashed"


def test_an_exit_from_before_the_lock_is_that_of_a_former_attempt(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    ended(folder, 10)
    os.utime(folder / "exit.json", (1, 1))
    lock(folder, socket.gethostname(), dead_pid())
    assert run_state(folder).state == "crashed"
    ended(folder, 30)  # the watchdog's, after a killed rank 0 left its lock
    os.utime(folder / "lock.json", (1, 1))
    assert run_state(folder).state == "failed"


def test_a_run_of_another_machine_is_silent_once_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    lock(folder, "elsewhere", os.getpid())
    assert run_state(folder).state == "running" and run_state(folder).host == "elsewhere"
    monkeypatch.setattr(runs, "FRESH_S", -1.0)
    assert run_state(folder).state == "silent" and "elsewhere" in run_state(folder).why


def test_half_written_files_are_taken_as_they_come(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps="null", tokens="1000")
    assert run_state(folder).steps == 16  # of 64 tokens each
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "tok')
    (folder / "exit.json").write_text('{"code": 1')
    (folder / "events.jsonl").write_text('{"event": "save"}\n\x00\x00{"ev')
    assert run_state(folder).step == 10 and run_state(folder).state == "crashed"
    assert call("show", folder).exit_code == 0
    for name in ("metrics.jsonl", "exit.json", "config.yaml"):
        (folder / name).write_bytes(random.Random(0).randbytes(3000))
    assert run_state(folder).step == 0 and call("show", folder).exit_code == 0
    for name in ("metrics.jsonl", "exit.json", "config.yaml"):
        (folder / name).unlink()
    assert run_state(folder).state == "new" and call("show", folder).exit_code == 0


def test_runs_are_found_inside_sweeps_and_sorted(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "sweeps/s/trials/0001/run", "a", "sweeps/s/trials/0000")):
        make_run(tmp_path / name, n_steps=5 + 5 * number)
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    assert {str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)} == {
        *("a", "b", "sweeps/s/trials/0000", "sweeps/s/trials/0001/run")
    }
    told = json.loads(call("ls", tmp_path, "--json", "--sort", "name").stdout)
    assert [row["name"] for row in told] == ["a", "b", "sweeps/s/trials/0000", "sweeps/s/trials/0001/run"]
    told = json.loads(call("ls", tmp_path, "--json", "--sort", "loss").stdout)
    assert [row["loss"] for row in told] == sorted(row["loss"] for row in told)
    table = call("ls", tmp_path).stdout
    assert "sweeps/s/trials/0001/run" in table and "crashed" in table and "10/40" in table
    assert call("ls", tmp_path / "empty").stdout == f"no runs under {tmp_path / 'empty'}\n"


def test_a_folder_that_is_none_costs_one_line(tmp_path: Path) -> None:
    for command in (("ls", tmp_path / "no"), ("show", tmp_path), ("plot", tmp_path, "--out", tmp_path / "x.png")):
        done = call(*command)
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and ". Fix: " in done.stderr
    assert call("plot", make_run(tmp_path / "run"), "--out", tmp_path / "x.txt").exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_thousand_runs_are_listed_in_seconds(tmp_path: Path) -> None:
    first = make_run(tmp_path / "0000", n_steps=300)
    ended(first, 0)
    for number in range(1, 1000):
        shutil.copytree(first, tmp_path / f"{number:04d}")
    started = time.process_time()
    assert len([run_state(path) for path in find_runs(tmp_path)]) == 1000
    assert time.process_time() - started < 5  # 0.5 s on an idle core


def test_lines_come_from_the_end_whatever_the_size_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, draw = tmp_path / "file", random.Random(0)
    for size in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr(metrics, "_BLOCK_BYTES", size)
        for _ in range(20):
            lines = [b"x" * draw.randrange(9) for _ in range(draw.randrange(1, 9))]
            path.write_bytes(b"\n".join(lines))
            assert list(newest_first(path)) == lines[::-1]
    path.write_bytes(b"")
    assert list(newest_first(path)) == [b""]


def test_show_names_the_blamed_rank_its_stacks_and_the_slow_ranks(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    ended(folder, 30, cause="rank 1 on n2 hangs")
    stacks = [f"logs/stacks-rank{rank:05d}.txt" for rank in range(3)]
    events = [{"event": "resume", "step": 4}, {"event": "verdict", "code": 30, "rank": 1, "cause": "rank 1 on n2 hangs",
                                               "stacks": stacks}]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": 0.0, **event}) + "\n" for event in events))
    paces = [{"rank": rank, "host": "n1", "step_s": 2.0, "own_s": own, "samples": 99} for rank, own in
             enumerate((0.5, 1.9, 0.7))]  # fmt: skip
    (folder / "logs" / "pace-rank00000.json").write_text(json.dumps(paces[:2]))
    (folder / "logs" / "pace-rank00002.json").write_text(json.dumps(paces[2:]))
    (folder / "restarts.json").write_text('{"job": "7", "restarts": 2, "idle": 0}')
    text = call("show", folder).stdout
    assert "restarts     1, from step 4; Slurm queued it again 2 times" in text
    assert "failed (30: a rank hung)" in text and "rank 1 on n2 hangs" in text
    assert stacks[1] in text and stacks[0] not in text
    assert "rank 1 on n1 is slow: 1.900 s of own work in a step of 2.000 s" in text
    about = json.loads(call("show", folder, "--json").stdout)
    assert about["restarts"] == [4] and about["stragglers"] == [1] and about["verdict"]["rank"] == 1


def test_show_tells_the_plan_and_the_configuration(tmp_path: Path) -> None:
    about = json.loads(call("show", make_run(tmp_path / "run"), "--json").stdout)
    assert about["plan"]["parameters"] > 512 * 128 and about["plan"]["tokens"] == 40 * 4 * 16
    assert about["config"]["model.n_layers"] == 2 and about["config"]["seed"] == 1
    text = call("show", tmp_path / "run").stdout
    assert f"{about['plan']['parameters']:,} parameters" in text and "transpoint   schedule cycle" not in text
    assert "data         seq_len 16" in text and "step         10 of 40, 640 tokens" in text


def test_compare_tells_numbers_and_differing_settings(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", 20, seed=7)
    done = call("compare", first, second, "--out", tmp_path / "c.png")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["seed", "1", "7"] in rows and ["step", "10", "20"] in rows and ["loss", "8.0000", "7.0000"] in rows
    assert not any(row[:1] == ["run.dir"] for row in rows)
    assert "second: equal to first in all 10 steps that both have" in done.stdout
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_compare_tells_runs_of_one_name_apart_and_draws_no_difference_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    folders = [make_run(tmp_path / name / "run") for name in ("a", "b", "c")] + [make_run(tmp_path / "d")]
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    (folders[1] / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last | {"loss": 8.25})]) + "\n")
    done = call("compare", *folders)
    assert done.stdout.split()[:4] == ["a/run", "b/run", "c/run", "d"]
    assert "b/run: at most 2.5e-01 nats from a/run, 2.5e-01 at step 10" in done.stdout
    assert "c/run: equal to a/run in all 10 steps that both have" in done.stdout
    above, below = drawn[0].axes
    assert [text.get_text() for text in above.get_legend().texts] == ["a/run", "b/run", "c/run (equal)", "d (equal)"]
    (line,) = below.lines
    assert [str(value) for value in line.get_ydata()] == ["nan"] * 9 + ["0.25"]


def test_the_running_mean_stays_beside_a_loss_that_falls_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from transmamba.plot import plot_loss

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    losses = [3 + 6 / step**0.5 for step in range(1, 301)]
    rows = [{"step": step, "tokens": 1000 * step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(tmp_path / "sweep" / "0")
    (axes,) = drawn[0].axes
    assert max(abs(axes.lines[1].get_ydata() - losses)) < 0.1
    assert axes.get_title() == "sweep/0"
    drawn[0].draw_without_rendering()
    assert "150k" in [label.get_text() for label in axes.get_xticklabels()]


def test_a_folder_that_only_holds_a_checkpoint_is_not_one_without_a_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0)
    assert run_state(folder).why == "has no step yet"
    for step in (20, 40):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir()
    (folder / "checkpoints" / "step-00000020" / "manifest.json").write_text('{"tokens_seen": 1280}')
    state = run_state(folder)
    assert (state.state, state.why) == ("new", "holds a checkpoint of step 20")
    assert (state.step, state.steps, state.tokens) == (20, 40, 1280)


def test_plots_go_over_steps_tokens_and_the_hours_of_all_attempts(tmp_path: Path) -> None:
    from transmamba.plot import _hours

    folder = make_run(tmp_path / "run")
    assert [round(hours * 3600) for hours in _hours(metrics.read_metrics(folder))] == list(range(1, 11))
    for x in ("step", "tokens", "time"):
        out = tmp_path / f"{x}.png"
        assert call("plot", folder, "--x", x, "--y", "loss,validation,bits_per_byte", "--out", out).exit_code == 0
        assert out.stat().st_size > 1000
    done = call("plot", folder, "--y", "lose", "--out", tmp_path / "no.png")
    assert done.exit_code == 2 and "grad_norm, loss" in done.stderr and not (tmp_path / "no.png").exists()
