"""The time model against published runs: half of them fitted the constants, the other half judges."""

import csv
import dataclasses
from pathlib import Path

import pytest

from transmamba.errors import ConfigError
from transmamba.planning.answer import run_published
from transmamba.planning.published import TABLE, Prediction, predict, read_rows, summary, training_flops, with_half
from transmamba.planning.shape import Layout, Shape, transformer_layer
from transmamba.planning.timing import PUBLISHED_CHIPS, fitted, gpu, step_time

LLAMA_8B = Shape((transformer_layer(4096, 32, 8, 128, 14336, 3, 4096.5),) * 32, 4096, 128256, False)
ONE_NODE = Layout(gpus=8, seq_len=8192, global_batch=128, micro_batch=1, cp=2)


def held_out() -> list[Prediction]:
    return predict(with_half(read_rows(), "check"), fitted()[0])


def test_the_held_out_half_of_the_published_runs_is_predicted() -> None:
    found = summary(held_out())
    assert found["rows"] >= 80
    assert found["median_error"] <= 0.06
    assert found["within_10_percent"] >= 0.8


def test_no_source_with_several_held_out_rows_is_far_off_as_a_whole() -> None:
    predictions = held_out()
    for source in {one.row.source for one in predictions}:
        of_source = [one for one in predictions if one.row.source == source]
        if len(of_source) >= 3:
            assert summary(of_source)["median_error"] <= 0.1, source


def test_rows_alternate_between_the_halves_within_their_source() -> None:
    counts: dict[str, int] = {}
    for row in read_rows():
        counts[row.source] = counts.get(row.source, 0) + 1
        assert row.half == ("fit" if counts[row.source] % 2 else "check"), row.name


def test_a_wrong_constant_would_be_noticed() -> None:
    k, _ = fitted()
    slower = dataclasses.replace(k, matmul={chip: rate / 1.15 for chip, rate in k.matmul.items()})
    assert summary(predict(with_half(read_rows(), "check"), slower))["median_error"] > 0.06


def test_the_reported_error_is_that_of_the_committed_constants() -> None:
    k, stated = fitted()
    assert summary(held_out()) == pytest.approx(stated, rel=1e-9)
    assert set(k.matmul) == set(PUBLISHED_CHIPS)


def test_flops_are_those_that_the_publishers_count() -> None:
    # Both figures are worked out in the recipe of the published runs: 57.9 GFLOPs a token with the whole square.
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    assert training_flops(LLAMA_8B, 8192, full=True) == 6 * matrices + 12 * 32 * 4096 * 8192
    assert training_flops(LLAMA_8B, 8192, full=True) == pytest.approx(57.9e9, rel=1e-3)
    assert training_flops(LLAMA_8B, 8192, full=False) == pytest.approx(51.5e9, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "slower"),
    [
        ({"recompute": "full"}, True),
        ({"recompute": "selective"}, True),
        ({"overlaps": False}, True),
        ({"gpus": 1024, "global_batch": 16384}, True),
        ({"tp": 2, "cp": 1}, True),
        ({"micro_batch": 2}, False),
    ],
)
def test_the_step_time_moves_the_way_it_must(changes: dict[str, object], slower: bool) -> None:
    k, h100 = fitted()[0], gpu("h100")
    usual = step_time(LLAMA_8B, ONE_NODE, h100, k).step_s
    changed = step_time(LLAMA_8B, dataclasses.replace(ONE_NODE, **changes), h100, k).step_s
    assert (changed > usual) == slower


def test_the_parts_of_a_step_add_up() -> None:
    layout = dataclasses.replace(ONE_NODE, gpus=64, tp=2, pp=4, vpp=2, sp=True)
    time = step_time(LLAMA_8B, layout, gpu("h100"), fitted()[0])
    parts = [getattr(time, field.name) for field in dataclasses.fields(time) if field.name not in ("step_s", "stage_s")]
    assert sum(parts) == pytest.approx(time.step_s)
    assert all(part > 0 for name, part in zip(["tp", "cp", "pp", "bubble"], parts[4:8], strict=True) if name)


def test_a_group_that_spans_nodes_has_the_adapters_of_its_members() -> None:
    h100 = gpu("h100")
    assert h100.link(8, 1) == h100.nvlink_bytes_per_s
    assert h100.link(16, 1) == h100.nvlink_bytes_per_s  # eight adapters are as fast
    assert h100.link(16, 4) == 2 * h100.nic_bytes_per_s
    assert h100.link(4, 8) == h100.nic_bytes_per_s


def test_every_row_says_where_it_is_from_and_what_is_guessed() -> None:
    with TABLE.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            assert record["url"].startswith("https://"), record["row"]
            assert set(record["guessed"].split()) <= set(record), record["row"]


def test_a_table_of_ones_own_needs_the_sizes_and_the_measurement_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "mine.csv"
    head = "source,row,hardware,gpus,n_layers,d_model,n_heads,d_ff,vocab,seq_len,global_batch,value,kind\n"
    table.write_text(head + "mine,7B,h100,8,32,4096,32,11008,32000,4096,64,9000,tokens_per_s_per_gpu\n")
    assert run_published(table, as_json=False) == 0
    said = capsys.readouterr().out
    assert "median |error|" in said
    heads, values = said.splitlines()[:2]
    assert heads.split() == ["source", "run", "measured", "model", "error", "half"]
    # Right-aligned heads end where their numbers end.
    assert values[: heads.index("error") + 5].endswith("%") and values[: heads.index("measured") + 8][-1].isdigit()
    (row,) = read_rows(table)
    assert row.step_s == pytest.approx(64 * 4096 / (9000 * 8))
    table.write_text(head + "mine,7B,h100,8,32,4096,32,11008,32000,4096,64,fast,tokens_per_s_per_gpu\n")
    assert run_published(table, as_json=False) == 2
    line = capsys.readouterr().err
    assert line.startswith("transmamba: error: --published: line 2 cannot be used")
    assert line.count("\n") == 1


def test_an_unknown_kind_of_hardware_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose a100"):
        gpu("h300")
