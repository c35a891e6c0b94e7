"""Tables of measurements go on where they were stopped; the cheapest TransPoint minimises the cost it is made of."""

import json
from pathlib import Path

import pytest
import torch

from transmamba.bench.layer import bench_layer, cheapest_point
from transmamba.bench.rows import Row, measure_rows


def table(out: Path) -> Row:
    (file,) = out.rglob("*.json")
    return json.loads(file.read_text())


def test_rows_that_are_there_are_kept_and_failed_ones_measured_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def measure(name: str, number: float) -> Row:
        calls.append(name)
        if len(calls) == 2:
            raise RuntimeError("out of memory\nand much more")
        return {"seconds": number}

    work = [("a", lambda: measure("a", 1.0)), ("b", lambda: measure("b", 2.0))]
    measure_rows("table", work, 60, tmp_path, {"size": 1})
    assert [row.get("error") for row in table(tmp_path)["rows"]] == [None, "RuntimeError: out of memory"]
    rows = measure_rows("table", work, 60, tmp_path, {"size": 1})
    assert calls == ["a", "b", "b"] and [row["seconds"] for row in rows] == [1.0, 2.0]
    measure_rows("table", work, 60, tmp_path, {"size": 2})
    assert calls == ["a", "b", "b", "a", "b"], "other settings are another table"


def test_no_row_is_begun_after_the_budget(tmp_path: Path) -> None:
    assert measure_rows("table", [("a", lambda: {"seconds": 1.0})], -1, tmp_path, {}) == []


@pytest.mark.parametrize("length", [4096, 65_536])
def test_the_cheapest_transpoint_minimises_the_cost_it_is_made_of(length: int) -> None:
    square, scan, state = 3e-9, 2e-6, 5e-7

    def cost(point: float) -> float:
        return square * point**2 + state * point + scan * (length - point)

    predicted = cheapest_point(square * 2048**2, 2048, scan * length, state * length, length)
    assert cost(predicted) <= min(cost(point) for point in range(0, length, 7))
    assert predicted == pytest.approx((scan - state) / (2 * square))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the small sizes of a CPU")
def test_every_kind_of_layer_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transmamba.bench.layer._cpu_seconds", lambda call: 1.0 if call() else 0.0)
    assert bench_layer(60, tmp_path, "tiny", [96], 96) == 0
    rows = {row["row"]: row for row in table(tmp_path)["rows"]}
    assert set(rows) == {
        *("T96 transformer", "T96 mamba2", "T96 transmamba P0", "T96 transmamba P64", "T96 transmamba P96"),
        "T96 cheapest TransPoint, predicted by kernels",
    }
    assert all("error" not in row for row in rows.values())
    assert "T96: cheapest measured TransPoint" in capsys.readouterr().out
