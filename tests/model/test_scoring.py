"""`transmamba evaluate`: scores against logits taken one document at a time."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from tests.model.hf_runs import N_TOKENS, SEQ_LEN, make_run, topics
from tests.unit.data.corpora import write_corpus
from transmamba.checkpoints_tools.hf_export import export
from transmamba.cli import app
from transmamba.compose import load
from transmamba.data_pipeline.tokenizer import encode_documents, load_tokenizer, token_bytes, train_tokenizer
from transmamba.errors import ConfigError
from transmamba.kernels.documents import Documents
from transmamba.model.model import Model
from transmamba.scoring import evaluate, position_bins, score_lines
from transmamba.transpoint import effective_points


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model, list[list[int]]]:
    """A run, its model, and the documents that its validation split holds."""
    root = tmp_path_factory.mktemp("scoring")
    run = root / "run"
    model = make_run(run, "transmamba", 3, f"data.path={root / 'data'}")
    tokenizer = load_tokenizer(run / "tokenizer.json")
    documents = encode_documents(tokenizer, [text[:700] for text in topics(9)], eod_id=0)
    write_corpus(root / "data", documents, shard_tokens=600, block_tokens=200, dtype="<u2", tokenizer=tokenizer)
    # The fixture's validation split is the first document alone.
    return run, model, [documents[0].tolist()]


def expected(model: Model, run: Path, documents: list[list[int]]) -> tuple[list[float], list[int], list[int]]:
    """Loss, position and bytes of every counted token, from logits of each piece of a document by itself."""
    points = effective_points(load(["--config", str(run / "config.yaml")]), 10**18)
    bytes_of = token_bytes(load_tokenizer(run / "tokenizer.json"))
    losses, positions, n_bytes = [], [], []
    stream = [token for document in documents for token in document]
    for begin in range(0, len(stream) - 1, SEQ_LEN):
        window = stream[begin : begin + SEQ_LEN + 1]
        first = 0
        for i in range(len(window) - 1):
            ends = window[i] == 0
            if ends or i == len(window) - 2:
                piece = torch.tensor([window[first : i + 2]])
                with torch.no_grad():
                    logits = model.predict(piece[:, :-1], points, Documents.whole(1, piece.shape[1] - 1))[:, 0]
                nll = F.cross_entropy(logits, piece[0, 1:], reduction="none").tolist()
                for offset, loss in enumerate(nll):
                    if window[first + offset] != 0:
                        losses.append(loss)
                        positions.append(offset)
                        n_bytes.append(int(bytes_of[window[first + offset + 1]]))
                first = i + 1
    return losses, positions, n_bytes


def test_scores_are_those_of_the_logits(scored: tuple[Path, Model, list[list[int]]], tmp_path: Path) -> None:
    run, model, documents = scored
    (score,) = evaluate(run, out=tmp_path, max_tokens=0, seq_len=None, progress=False)
    losses, positions, n_bytes = expected(model, run, documents)
    assert score.name == "validation"
    assert score.n_tokens == len(losses)
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / sum(n_bytes), rel=1e-5)
    for (low, high), loss, count in zip(score.positions, score.loss_at, score.tokens_at, strict=True):
        inside = [found for found, position in zip(losses, positions, strict=True) if low <= position < high]
        assert count == len(inside)
        assert loss == pytest.approx(sum(inside) / len(inside), rel=1e-5)
    assert sum(score.tokens_at) == score.n_tokens
    record = json.loads((tmp_path / "evaluate.json").read_text())
    assert record["transpoints"] == [0, 9, 70, None]
    assert record["sets"][0]["loss"] == score.loss
    assert (tmp_path / "evaluate.png").stat().st_size > 10_000
    assert len(score_lines([score])) == 2


def test_bins_are_cut_at_every_transpoint() -> None:
    assert position_bins(20, [0, 6, math.inf, 20]) == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8), (8, 16), (16, 20)]


def test_a_part_of_the_set_and_longer_windows_can_be_asked_for(
    scored: tuple[Path, Model, list[list[int]]], tmp_path: Path
) -> None:
    run, _, documents = scored
    (part,) = evaluate(run, out=tmp_path, max_tokens=10, seq_len=None, progress=False)
    (long,) = evaluate(run, out=tmp_path, max_tokens=0, seq_len=400, progress=False)
    assert part.n_tokens == SEQ_LEN
    assert long.n_tokens == len(documents[0]) - 1
    assert max(end for _, end in long.positions) > SEQ_LEN


def test_other_data_can_be_given_for_a_run_and_for_a_model_folder(
    scored: tuple[Path, Model, list[list[int]]], tmp_path: Path
) -> None:
    run, _, _ = scored
    export(run, tmp_path / "hf", check_tokens=0)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    documents = encode_documents(tokenizer, [text[:700] for text in topics(12)[3:]], eod_id=0)
    write_corpus(tmp_path / "b", documents, shard_tokens=600, block_tokens=200, dtype="<u2", tokenizer=tokenizer)
    given = [f"data.path={tmp_path / 'b'}", f"data.seq_len={SEQ_LEN}"]
    arguments = [str(tmp_path / "hf"), "--out", str(tmp_path / "out"), "--", *given]
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == 0, result.output
    (own,) = evaluate(run, out=tmp_path, max_tokens=0, seq_len=None, progress=False)
    (other,) = evaluate(run, overrides=given, out=tmp_path, max_tokens=0, seq_len=None, progress=False)
    (found,) = json.loads((tmp_path / "out" / "evaluate.json").read_text())["sets"]
    assert found["loss"] == pytest.approx(other.loss, rel=1e-6)
    assert found["n_tokens"] == other.n_tokens != own.n_tokens


def test_data_that_do_not_fit_are_refused_before_anything_is_written(
    scored: tuple[Path, Model, list[list[int]]], tmp_path: Path
) -> None:
    run, _, _ = scored
    strange = train_tokenizer(topics(40)[20:], vocab_size=N_TOKENS)
    documents = encode_documents(strange, [text[:700] for text in topics(9)], eod_id=0)
    write_corpus(tmp_path / "data", documents, shard_tokens=600, block_tokens=200, dtype="<u2", tokenizer=strange)
    for override, words in (
        (f"data.path={tmp_path / 'data'}", "made with another tokenizer than the model's .* after `--`"),
        ("model.d_model=64", "scoring does not change it .* override keys of data and validation only"),
        ("dota.path=x", "unknown key"),
        (f"data.path={tmp_path / 'none'}", "no such"),
    ):
        command = ["evaluate", str(run), "--out", str(tmp_path / "out"), "--", override]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, result.output
        assert re.search(words, result.output), result.output
        assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_one_without_any(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "transformer")
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    for command in (["evaluate", str(tmp_path / "run")], ["generate", str(tmp_path / "run"), "-p", "x"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 21, result.output
        assert f"`transmamba checkpoint verify {tmp_path / 'run'}`" in result.output
        assert "bytes, the manifest says" in result.output
        assert result.output.count("\n") == 1
    shutil.rmtree(file.parent)
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "run"), "-p", "x"])
    assert result.exit_code == 2
    assert "it has no checkpoint" in result.output


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        evaluate(tmp_path / "nothing", out=tmp_path / "out", max_tokens=0, seq_len=None, progress=False)
    assert not (tmp_path / "out").exists()
