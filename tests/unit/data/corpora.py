"""Small prepared folders made from given token documents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from transmamba.data_pipeline.manifest import Block, Manifest, Shard, Split, load_manifest, save_manifest
from transmamba.data_pipeline.shards import SplitWriter
from transmamba.data_pipeline.tokens import TokenStore

EOD = 0
VOCAB_SIZE = 100_000
Documents = list[np.ndarray]


def numbered_documents(lengths: list[int]) -> Documents:
    """Documents whose tokens count up without repetition and end with the end-of-document token."""
    documents, first = [], 1
    for length in lengths:
        documents.append(np.append(np.arange(first, first + length - 1), EOD))
        first += length - 1
    return documents


def write_corpus(
    folder: Path, documents: Documents, *, shard_tokens: int, block_tokens: int, dtype: str = "<u4"
) -> Manifest:
    """Prepared data with these training documents and a validation split of one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    splits = {}
    for name, entries in (("train", documents), ("validation", documents[:1])):
        sizes = {"shard_tokens": shard_tokens, "block_tokens": block_tokens}
        writer = SplitWriter(folder, name, dtype=np.dtype(dtype), **sizes)
        for document in entries:
            writer.add(document)
        splits[name] = writer.finish(n_text_bytes=1)
    digest = hashlib.sha256(b"{}").hexdigest()
    vocab_size = VOCAB_SIZE if dtype == "<u4" else 60_000
    save_manifest(Manifest("tokenizer.json", digest, vocab_size, EOD, dtype, "test", splits), folder)
    return load_manifest(folder)


def store_of_sizes(shard_sizes: list[int]) -> TokenStore:
    """A store that knows its shards' sizes and has no files: enough for the order, which reads no token."""
    shards = tuple(
        Shard(f"train-{i:06d}.tar", 0, "", size, 1, 0, 0, (Block(0, size, 0, 0, ""),))
        for i, size in enumerate(shard_sizes)
    )
    split = Split(shards, sum(shard_sizes), len(shards), 1, (), None)
    return TokenStore(Manifest("tokenizer.json", "", 1, EOD, "<u2", "test", {"train": split}), "train")
