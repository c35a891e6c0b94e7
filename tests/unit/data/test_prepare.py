"""Text becomes the same bytes every time, and nothing of the user's is lost or overwritten."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pydoc_data.topics
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from transmamba import corpus
from transmamba.compose import load
from transmamba.data_pipeline import docstrings, encoding, parts
from transmamba.data_pipeline import prepare as module
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import LENGTH_EDGES, Manifest, load_manifest
from transmamba.data_pipeline.prepare import default_corpus, prepare, summary_lines
from transmamba.data_pipeline.tokenizer import load_tokenizer, token_bytes
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.data_pipeline.work import begin, hold_work_folder, remove_work_folder
from transmamba.data_pipeline.workers import WorkerDied
from transmamba.errors import EXIT_RANK_DIED, RunError

TOPICS = {name: str(text) for name, text in sorted(pydoc_data.topics.topics.items())}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file per topic of Python's help."""
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TOPICS.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The topics, prepared with small shards."""
    out = tmp_path_factory.mktemp("out") / "topics"
    return prepare([str(texts)], out, vocab_size=600, shard_tokens=70_000, validation_share=0.1, progress=False)


def decoded(manifest: Manifest, split: str) -> list[str]:
    store = TokenStore(manifest, split)
    tokenizer = load_tokenizer(manifest.tokenizer_path)
    starts = store.starts(0, store.n_tokens).tolist()
    bounds = zip(starts, [*starts[1:], store.n_tokens], strict=True)
    documents = [store.read(first, end) for first, end in bounds]
    assert all(document[-1] == manifest.eod_id for document in documents)
    return tokenizer.decode_batch([document[:-1].tolist() for document in documents])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_comes_back_whole_in_one_of_the_splits(prepared: Manifest) -> None:
    train, validation = decoded(prepared, "train"), decoded(prepared, "validation")
    assert sorted(train + validation) == sorted(TOPICS.values())
    in_order = [TOPICS[name.removesuffix(".txt")] for name in sorted(f"{name}.txt" for name in TOPICS)]
    assert train == [text for text in in_order if text in set(train)]
    assert len(prepared.splits["train"].shards) > 1


def test_the_manifest_counts_what_is_there(prepared: Manifest) -> None:
    n_bytes_of_token = token_bytes(load_tokenizer(prepared.tokenizer_path))
    for name, split in prepared.splits.items():
        store = TokenStore(prepared, name)
        tokens = store.read(0, store.n_tokens)
        starts = store.starts(0, store.n_tokens)
        lengths = np.diff(np.append(starts, store.n_tokens))
        assert split.n_documents == len(starts) == (tokens == prepared.eod_id).sum()
        assert split.n_text_bytes == n_bytes_of_token[tokens].sum()
        assert sum(entry.n_tokens for entry in split.lengths) == split.n_tokens == len(tokens)
        edges = LENGTH_EDGES.tolist()
        for entry in split.lengths:
            end = edges[edges.index(entry.shortest) + 1]
            inside = lengths[(lengths >= entry.shortest) & (lengths < end)]
            assert (entry.n_documents, entry.n_tokens) == (len(inside), inside.sum())
        assert min(shard.min_token_id for shard in split.shards) == tokens.min()
        assert max(shard.max_token_id for shard in split.shards) == tokens.max()
    text = "".join(decoded(prepared, "validation")).encode("utf-8")
    expected = 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
    assert prepared.splits["validation"].gzip9_bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert prepared.splits["train"].gzip9_bits_per_byte is None


def test_the_same_text_gives_the_same_bytes(
    texts: Path, prepared: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches of another size and one thread must not show in the result.
    monkeypatch.setattr(encoding, "BATCH_CHARS", 20_000)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    options = {"vocab_size": 600, "shard_tokens": 70_000, "validation_share": 0.1}
    prepare([str(texts)], tmp_path / "again", workers=1, progress=False, **options)
    assert files_of(tmp_path / "again") == files_of(prepared.folder)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a tenth of the topics, so that there is work for several processes."""
    monkeypatch.setattr(parts, "LEAST_PART_BYTES", 50_000)
    monkeypatch.setattr(module, "LEAST_PART_BYTES", 50_000)


@pytest.mark.usefixtures("small_parts")
def test_the_number_of_workers_does_not_show_in_the_bytes(texts: Path, tmp_path: Path) -> None:
    # Every document is there twice, in the folder and in the lines.
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TOPICS.values()))
    sources = [str(texts), str(tmp_path / "x.jsonl")]
    options = {"vocab_size": 400, "validation_share": 0.1, "dedup": True, "progress": False}
    options |= {"block_tokens": 2048, "shard_tokens": 8192}
    one = prepare(sources, tmp_path / "one", workers=1, **options)
    prepare(sources, tmp_path / "three", workers=3, **options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    different = set(TOPICS.values())
    assert f", {2 * len(TOPICS) - len(different)} duplicate documents left out" in one.source
    assert sorted(decoded(one, "train") + decoded(one, "validation")) == sorted(different)
    assert len(one.splits["train"].shards) > 10
    assert one.block_tokens == 2048
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "x.jsonl"]


def test_text_behind_a_url_gives_the_tokens_of_the_same_text_on_disk(tmp_path: Path, prepared: Manifest) -> None:
    files = fsspec.filesystem("memory")
    for name, text in TOPICS.items():
        files.pipe(f"/topics/{name}.txt", text.encode("utf-8"))
    options = {"vocab_size": 600, "shard_tokens": 70_000, "validation_share": 0.1, "progress": False}
    manifest = prepare(["memory://topics"], tmp_path / "out", **options)
    files.rm("/topics", recursive=True)
    assert manifest.source == f"{len(TOPICS)} files of memory://topics"
    for split in ("train", "validation"):
        assert manifest.splits[split] == prepared.splits[split]


def test_two_processes_do_not_prepare_the_same_folder(texts: Path, tmp_path: Path) -> None:
    with hold_work_folder(tmp_path / "out"), pytest.raises(DataError, match="another process is preparing it; wait"):
        prepare([str(texts)], tmp_path / "out", vocab_size=300, progress=False)
    prepare([str(texts)], tmp_path / "out", vocab_size=300, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_plan_starts_anew_and_says_what_differs(tmp_path: Path) -> None:
    with hold_work_folder(tmp_path / "out") as folder:
        assert begin(folder, {"sources": ["a", 3], "seed": 1}) == []
        (folder / "part").write_text("done")
        assert begin(folder, {"sources": ["a", 3], "seed": 1}) == []
        assert (folder / "part").exists()
        (folder / "mine").write_text("kept")
        changed = begin(folder, {"sources": ["a", 4], "seed": 1}, keep=[str(folder / "mine")])
        assert changed == ["sources"]
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "mine", "plan.json"]


@pytest.mark.parametrize("ending", [remove_work_folder, lambda folder: begin(folder, {"seed": 2})])
def test_a_work_folder_that_was_half_removed_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: Callable[[Path], object]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with hold_work_folder(tmp_path / "out") as folder:
        begin(folder, {"seed": 1})
        (folder / "shards").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ending(folder)
        assert (folder / "shards").exists()
        begin(folder, {"seed": 1})
        assert not (folder / "shards").exists()


def test_replacing_that_was_interrupted_loses_no_data(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([str(texts)], out, vocab_size=300, progress=False)
    before = files_of(out)
    # As a kill between the two renames leaves it.
    with hold_work_folder(out) as folder:
        out.rename(folder / "replaced")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare([str(tmp_path / "bad.txt")], out, vocab_size=300, progress=False, replace=True)
    assert files_of(out) == before
    with hold_work_folder(out) as folder:
        out.rename(folder / "replaced")
    with pytest.raises(DataError, match="made with --vocab-size 300 instead of 400"):
        prepare([str(texts)], out, vocab_size=400, progress=False)
    assert files_of(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "out"]
    # And as one after both leaves it.
    with hold_work_folder(out) as folder:
        (folder / "replaced").mkdir()
        (folder / "replaced" / "old").write_text("")
    assert prepare([str(texts)], out, vocab_size=400, progress=False, replace=True).vocab_size == 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "out"]


def test_a_given_tokenizer_is_used_unchanged(texts: Path, prepared: Manifest, tmp_path: Path) -> None:
    path = prepared.tokenizer_path
    options = {"tokenizer": path, "validation_share": 0.1, "progress": False}
    manifest = prepare([str(texts / "*.txt")], tmp_path / "x", **options)
    assert manifest.tokenizer_sha256 == prepared.tokenizer_sha256
    everything = [*decoded(manifest, "train"), *decoded(manifest, "validation")]
    assert sorted(everything) == sorted(TOPICS.values())


def test_json_lines_and_wide_vocabularies_are_stored_in_the_dtype_they_need(tmp_path: Path) -> None:
    lines = [json.dumps({"body": text}) for text in TOPICS.values()]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    options = {"field": "body", "vocab_size": 300, "progress": False}
    manifest = prepare([str(tmp_path / "x.jsonl")], tmp_path / "narrow", **options)
    assert manifest.token_dtype == "<u2"
    wide = json.loads(manifest.tokenizer_path.read_text())
    added = {"content": "<wide>", "id": 70_000, "special": True, "normalized": False}
    wide["added_tokens"].append(added | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    wide["model"]["vocab"]["<wide>"] = 70_000
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    other = prepare([str(tmp_path / "x.jsonl")], tmp_path / "wide", tokenizer=tmp_path / "wide.json", **options)
    assert other.token_dtype == "<u4"
    assert other.vocab_size == 70_001
    assert decoded(other, "train") == decoded(manifest, "train")


@pytest.mark.parametrize("n_documents", [1, 2, 5])
def test_a_few_documents_still_give_a_validation_split(tmp_path: Path, n_documents: int) -> None:
    texts = list(TOPICS.values())[:n_documents]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.md").write_text(text, encoding="utf-8")
    manifest = prepare([str(tmp_path)], tmp_path / "out", vocab_size=300, progress=False)
    train, validation = decoded(manifest, "train"), decoded(manifest, "validation")
    assert train
    assert validation
    assert sum(map(len, train + validation)) == sum(map(len, texts))
    assert sum(map(len, validation)) <= sum(map(len, train))


def test_finished_data_are_left_alone_unless_they_are_to_be_replaced(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = prepare([str(texts)], out, vocab_size=300, progress=False)
    before, stamp = files_of(out), (out / "manifest.json").stat().st_mtime_ns
    assert prepare([str(texts), str(texts)], out, vocab_size=300, workers=1, progress=False) == made
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="with --vocab-size 300 instead of 400, with --seed 17 instead of 18; choose"):
        prepare([str(texts)], out, vocab_size=400, seed=18, progress=False)
    with pytest.raises(DataError, match="made with another tokenizer; choose another --out, or give --replace"):
        prepare([str(texts)], out, tokenizer=made.tokenizer_path, progress=False)
    with pytest.raises(DataError, match="made from other files; choose"):
        prepare([str(texts / "[ab]*.txt")], out, vocab_size=300, progress=False)
    assert files_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_data_without_a_definition_are_not_replaced_and_incomplete_data_are_made_again(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare([str(texts)], out, vocab_size=300, progress=False)
    before = files_of(out)
    (out / "validation-000000.tar").unlink()
    prepare([str(texts)], out, vocab_size=300, progress=False)
    assert files_of(out) == before
    (out / "definition.json").unlink()
    with pytest.raises(DataError, match="that do not say how they were made"):
        prepare([str(texts)], out, vocab_size=300, progress=False)
    assert files_of(out).keys() == before.keys() - {"definition.json"}
    prepare([str(texts)], out, vocab_size=300, progress=False, replace=True)
    assert files_of(out) == before


def test_a_folder_with_other_files_is_refused_and_prepared_data_is_replaced(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = prepare([str(texts)], out, vocab_size=300, progress=False)
    second = prepare([str(texts)], out, vocab_size=400, progress=False, replace=True)
    assert (first.vocab_size, second.vocab_size) == (300, 400)
    (out / "notes.txt").write_text("mine")
    before = files_of(out)
    with pytest.raises(DataError, match=r"is not empty and holds other files \(notes.txt\)"):
        prepare([str(texts)], out, vocab_size=300, progress=False)
    assert files_of(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "settings.json").write_text("{}")
    with pytest.raises(DataError, match="holds other files"):
        prepare([str(texts)], tmp_path / "other", vocab_size=300, progress=False)
    with pytest.raises(DataError, match="is not a folder"):
        prepare([str(texts)], out / "notes.txt", vocab_size=300, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_failed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, text in enumerate(TOPICS.values()):
        (tmp_path / "in" / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "in" / "zzz.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"zzz.txt: not UTF-8 at byte offset 0"):
        prepare([str(tmp_path / "in")], tmp_path / "out", vocab_size=300, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("validation_share", 0.0),
        ("validation_share", 1.0),
        ("shard_tokens", 0),
        ("workers", 0),
        ("block_tokens", 100),
        ("vocab_size", 9),
    ],
)
def test_options_out_of_range_are_refused_by_name(texts: Path, tmp_path: Path, option: str, value: float) -> None:
    with pytest.raises(DataError, match=option):
        prepare([str(texts)], tmp_path / "out", progress=False, **{option: value})  # pyright: ignore
    assert not list(tmp_path.iterdir())


def test_the_summary_tells_the_numbers_and_the_next_command(prepared: Manifest) -> None:
    text = "\n".join(summary_lines(prepared))
    for expected in (
        f"{prepared.splits['train'].n_tokens:,} tokens",
        "bytes per token",
        "gzip -9",
        f"data.path={prepared.folder}",
    ):
        assert expected in text


def _build_default(root: Path) -> str:
    return str(default_corpus(root, progress=False))


@pytest.mark.usefixtures("safe_to_fork")
def test_builders_of_the_default_corpus_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = docstrings.list_modules()[:150]
    monkeypatch.setattr(docstrings, "list_modules", lambda: modules)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        folders = set(pool.map(_build_default, [tmp_path] * 2))
    (folder,) = map(Path, folders)
    manifest = load_manifest(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert "docstrings of" in manifest.source
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert default_corpus(tmp_path, progress=False) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    (folder / "tokenizer.json").write_text("damaged")
    assert default_corpus(tmp_path, progress=False) == folder
    assert load_manifest(folder) == manifest


def test_a_run_says_when_its_default_corpus_lost_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_one(progress: bool) -> Path:
        raise WorkerDied("a worker process died")

    monkeypatch.setattr(corpus, "default_corpus", lose_one)
    with pytest.raises(RunError, match=r"data\.path: a worker process died building the default corpus") as caught:
        corpus.open_corpus(load([]))
    assert caught.value.code == EXIT_RANK_DIED
