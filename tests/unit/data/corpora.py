"""Small prepared folders made from given token documents."""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from transmamba.data_pipeline.blocks import blocks_name, map_rows
from transmamba.data_pipeline.manifest import MANIFEST_NAME, Manifest, Shard, Split, load_manifest, save_manifest
from transmamba.data_pipeline.shards import ShardWriter, join_parts
from transmamba.data_pipeline.tokenizer import encode_documents, token_bytes, train_tokenizer, vocab_size_of
from transmamba.data_pipeline.tokens import TokenStore

EOD = 0
VOCAB_SIZE = 100_000
Documents = list[np.ndarray]


def english() -> tuple[Tokenizer, Documents]:
    """A small tokenizer and the help topics of Python as documents of its tokens."""
    texts = [str(topic) for topic in pydoc_data.topics.topics.values()][:40]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    return tokenizer, encode_documents(tokenizer, texts, eod_id=EOD)


def numbered_documents(lengths: list[int]) -> Documents:
    """Documents whose tokens count up without repetition and end with the end-of-document token."""
    documents, first = [], 1
    for length in lengths:
        documents.append(np.append(np.arange(first, first + length - 1), EOD))
        first += length - 1
    return documents


def write_corpus(
    folder: Path,
    documents: Documents,
    *,
    shard_tokens: int,
    block_tokens: int,
    dtype: str = "<u4",
    tokenizer: Tokenizer | None = None,
    held_out: Documents | None = None,
) -> Manifest:
    """Prepared data with these training documents, and `held_out` or the first of them as the validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_str() if tokenizer else "{}"
    (folder / "tokenizer.json").write_text(text)
    n_entries = VOCAB_SIZE if dtype == "<u4" else 60_000
    sizes = {"shard_tokens": shard_tokens, "block_tokens": block_tokens}
    splits = {}
    for name, entries in (("train", documents), ("validation", held_out or documents[:1])):
        writer = ShardWriter(folder, name, dtype=np.dtype(dtype), eod_id=EOD, **sizes)
        for document in entries:
            writer.add(document)
        n_bytes = int(token_bytes(tokenizer)[np.concatenate(entries)].sum()) if tokenizer else 1
        splits[name] = join_parts(folder, name, [writer.finish()], n_text_bytes=n_bytes)
    manifest = Manifest(
        tokenizer_file="tokenizer.json",
        tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(),
        vocab_size=vocab_size_of(tokenizer) if tokenizer else n_entries,
        eod_id=EOD,
        token_dtype=dtype,
        block_tokens=block_tokens,
        source="test",
        splits=splits,
    )
    save_manifest(manifest, folder)
    return load_manifest(folder)


def write_sealed(folder: Path, record: dict[str, Any]) -> None:
    """Write a manifest from its JSON, with the digest of what it says now."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(rest, separators=(",", ":"), sort_keys=True)
    record["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps(record))


def rows_of(manifest: Manifest, index: int, split: str = "train") -> np.ndarray:
    """Rows of one shard in its split's table of blocks, copied."""
    shards = manifest.splits[split].shards
    first = sum(shard.n_blocks for shard in shards[:index])
    return map_rows(manifest.folder / blocks_name(split))[first : first + shards[index].n_blocks].copy()


def store_of_sizes(shard_sizes: list[int]) -> TokenStore:
    """A store that knows its shards' sizes and has no files: enough for the order, which reads no token."""
    shards = tuple(
        Shard(f"train-{i:06d}.tar", 0, "", n_tokens=size, n_documents=1, n_blocks=1, blocks_sha256="",
              min_token_id=0, max_token_id=0)
        for i, size in enumerate(shard_sizes)
    )  # fmt: skip
    split = Split(shards, sum(shard_sizes), len(shards), 1, (), None)
    manifest = Manifest("tokenizer.json", "", 1, EOD, "<u2", max(shard_sizes), "test", {"train": split})
    return TokenStore(manifest, "train")
