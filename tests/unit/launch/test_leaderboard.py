"""The comparison of a sweep's groups against curves whose values are known in closed form."""

import csv
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from transmamba.errors import ConfigError
from transmamba.launch.sweeps import files
from transmamba.launch.sweeps.files import Status, TrialFolder
from transmamba.launch.sweeps.report.leaderboard import (
    Facts,
    Result,
    interpolate,
    leaderboard,
    read_results,
    verdict,
    write_tables,
)
from transmamba.launch.sweeps.report.page import page, strip
from transmamba.launch.sweeps.report.picture import save_picture
from transmamba.launch.sweeps.report.show import table
from transmamba.launch.sweeps.request import Request

PER_STEP = 100  # tokens
NASTY = "<script>alert('x')</script> & \"q\""


def facts(cost: float = 10.0, n_steps: int = 40, *, validates_all: bool = True) -> Facts:
    return Facts(((0, cost),), PER_STEP, 64, ((0, (0.0, 16.0, math.inf)),), n_steps, validates_all)


def result(number: int, group: str, seed: int, *, level: float, cost: float = 10.0, last: int = 40) -> Result:
    """A run whose loss is level - log(step) at every step, validated every fourth."""
    losses = {step: level - math.log(step) for step in range(1, last + 1)}
    held = {step: loss for step, loss in losses.items() if step % 4 == 0}
    is_done = last == 40
    state, code = ("done", 0) if is_done else ("running", None)
    return Result(number, group, seed, state, code, 10.0 * last, facts(cost), losses, held, 1.0 if is_done else None)


def test_groups_are_compared_at_their_ends_at_equal_tokens_and_at_equal_flops() -> None:
    results = [
        *(result(seed, "cheap", seed, level=8.0 + 0.1 * seed) for seed in range(3)),
        *(result(3 + seed, "dear", seed, level=7.95 + 0.1 * seed, cost=20.0) for seed in range(3)),
    ]
    board = leaderboard("s", results)
    assert [row.group for row in board.rows] == ["dear", "cheap"]
    assert (board.equal_tokens, board.equal_flops, board.measure) == (4000, 40 * 100 * 10.0, "validation loss")
    dear, cheap = board.rows
    assert dear.loss is not None and dear.at_equal_flops is not None and cheap.at_equal_flops is not None
    assert dear.loss.mean == pytest.approx(8.05 - math.log(40))
    assert dear.loss.deviation == pytest.approx(0.1) and dear.loss.n == 3
    # The dear one has had half of the steps at the same FLOPs: log(2) nats worse than at its end, hence behind.
    assert dear.at_equal_flops.mean == pytest.approx(8.05 - math.log(20), abs=1e-12)
    assert cheap.at_equal_flops.mean == pytest.approx(8.1 - math.log(40), abs=1e-12)
    assert [row.group for row in leaderboard("s", results, "at_equal_flops").rows] == ["cheap", "dear"]
    assert dear.at_equal_tokens is not None and dear.at_equal_tokens.mean == pytest.approx(dear.loss.mean)
    assert (dear.flops, cheap.flops) == (80_000.0, 40_000.0)
    with pytest.raises(ConfigError, match="--sort"):
        leaderboard("s", results, "beauty")


def test_a_running_and_a_failed_trial_do_not_spoil_the_table() -> None:
    failed = replace(result(2, "b", 1, level=9.0, last=20), state="failed", code=20)
    waiting = replace(result(3, "c", 1, level=9.0, last=0), state="waiting", code=None)
    results = [result(0, "a", 1, level=8.0), result(1, "b", 2, level=8.2, last=24), failed, waiting]
    board = leaderboard("s", results)
    rows = {row.group: row for row in board.rows}
    assert board.equal_tokens == 4000
    assert rows["b"].loss is None and rows["b"].states == "1 failed (20), 1 running"
    assert rows["b"].at_equal_tokens is None and rows["c"].at_equal_tokens is None and board.rows[0].group == "a"
    early = leaderboard("s", results[1:])
    assert early.equal_tokens == 2000
    assert early.rows[0].at_equal_tokens is not None and early.rows[0].at_equal_tokens.n == 2


def test_validations_on_other_tokens_are_not_mixed_with_the_final_one() -> None:
    subset = replace(result(0, "a", 1, level=8.0), facts=facts(validates_all=False))
    assert max(subset.held_curve) == 36
    assert leaderboard("s", [subset]).equal_tokens == 3600
    unvalidated = replace(subset, held={40: 5.0})
    board = leaderboard("s", [unvalidated])
    assert board.measure.startswith("training loss") and board.equal_tokens == 4000


def test_flops_follow_a_schedule_that_changes() -> None:
    changing = replace(facts(), phases=((0, 10.0), (15, 30.0), (30, 20.0)))
    expected = {0: 0.0, 10: 100.0, 15: 150.0, 20: 300.0, 40: 150.0 + 450.0 + 200.0}
    assert {step: changing.flops(step) / PER_STEP for step in expected} == expected


def test_interpolation_is_linear_in_the_logarithm() -> None:
    curve = [(float(x), 3.0 - math.log(x)) for x in (1, 4, 16)]
    assert interpolate(curve, 8.0) == pytest.approx(3.0 - math.log(8.0))
    assert interpolate(curve, 16.0) == 3.0 - math.log(16.0)
    assert interpolate(curve, 0.5) is None and interpolate(curve, 17.0) is None and interpolate([], 1.0) is None


def test_the_verdict_needs_a_lead_of_two_standard_errors() -> None:
    def lead(by: float) -> str:
        groups = [("a", 8.0), ("b", 8.0 + by)]
        results = [result(s, g, s, level=level + 0.1 * (s % 3)) for g, level in groups for s in range(3)]
        return verdict(leaderboard("s", results))

    # The deviation is 0.1 of three seeds each, so the standard error is 0.0816.
    assert "a leads b by 0.1500 nats, no more" in lead(0.15) and ", more than" in lead(0.17)
    assert "one seed" in verdict(leaderboard("s", [result(0, "a", 1, level=8.0), result(1, "b", 1, level=9.0)]))
    assert "fewer than two" in verdict(leaderboard("s", [result(0, "a", 1, level=8.0)]))


def test_tables_hold_every_group_and_trial(tmp_path: Path) -> None:
    board = leaderboard("s", [result(0, NASTY, 1, level=8.0), result(1, "b,c", 1, level=7.0)])
    write_tables(board, tmp_path / "out")
    with (tmp_path / "out" / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["b,c", NASTY]
    assert float(rows[0]["loss_mean"]) == 7.0 - math.log(40)
    record = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert record["trials"][0]["points"] == [[0, [0.0, 16.0, None]]]
    assert record["compared_at"]["training_flops"] == 40_000.0


def test_a_narrow_terminal_wraps_names_and_no_numbers() -> None:
    groups = ("optim.lr=0.000357 transpoint=v9", "attention_only")
    results = [result(n, group, n, level=8.0 + n) for n, group in enumerate(g for g in groups for _ in range(2))]
    console = Console(width=80, record=True, file=StringIO())
    console.print(table(leaderboard("s", results)))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 80
    for mean in (8.5, 10.5):
        loss = f"{mean - math.log(40):.4f} ± {math.sqrt(0.5):.4f}"
        assert any(loss in line and line.endswith("2 done") for line in lines), lines


class _Reader(HTMLParser):
    """Notes every tag and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_page_escapes_everything_and_loads_nothing() -> None:
    text = page(leaderboard(NASTY, [result(0, NASTY, 1, level=8.0)]), {"overrides": [NASTY, "{{title}}"]})
    reader = _Reader()
    reader.feed(text)
    assert reader.tags.count("script") == 1 and "alert('x')</script>" not in text
    assert reader.links and all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert not re.search(r"url\(|@import|https?://", text)
    assert {"table", "svg", "picture"} <= set(reader.tags)
    assert "prefers-color-scheme: dark" in text and "{{title}}" in text  # a value is not a place of the template


def test_a_strip_shows_each_layer_s_point() -> None:
    widths = re.findall(r'class="attention"[^>]* width="([\d.]+)"', strip([0.0, 16.0, math.inf, 999.0], 64))
    assert [float(width) for width in widths] == [0.0, 30.0, 120.0, 120.0]


def test_pictures_are_drawn_of_any_number_of_groups(tmp_path: Path) -> None:
    many = [result(number, f"g{number}", 1, level=8.0 + number / 10, last=40 - number) for number in range(14)]
    for results in (many, [replace(many[0], losses={}, held={}, state="waiting")]):
        save_picture(leaderboard("s", results), tmp_path / "s.png")
        assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_read_while_trials_write_them(tmp_path: Path) -> None:
    trials = Request(schedules="v1,v2,v3").trials(tmp_path / "s")
    files.create(tmp_path / "s", {}, trials)
    files.write_status(trials[0], Status("done", 0, 1, 12.5))
    files.write_status(trials[1], Status("running", None, 1))
    for trial in trials[:2]:
        trial.run.mkdir()
        held = {"validation": {"loss": 4.0, "bits_per_byte": 2.0}, "other": {"loss": 9.0, "bits_per_byte": 9.0}}
        lines = [json.dumps({"step": s, "loss": 5.0, "time_s": 3.0 * s, "validation": held}) for s in (1, 2)]
        (trial.run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')

    def facts_of(_trial: TrialFolder) -> Facts:
        return facts(n_steps=2)

    done, running, waiting = read_results(trials, facts_of)
    assert (done.final, done.bits_per_byte, done.seconds, done.step) == (4.0, 2.0, 12.5, 2)
    assert (running.final, running.state, running.seconds) == (None, "running", 6.0)
    assert (waiting.state, waiting.step, waiting.losses) == ("waiting", 0, {})
