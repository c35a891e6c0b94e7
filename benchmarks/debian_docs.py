"""Pretrain on 80 MB of documentation out of Debian packages, from apt to the loss curve, and keep the figures.

    python benchmarks/debian_docs.py WORK_FOLDER

Needs Debian's apt-get and dpkg and the `transmamba` command; writes the corpus, the shards and the run into
WORK_FOLDER and the figures to benchmarks/results/<hardware>/debian-docs.json and two pictures beside it. Three sources
are blended 0.5, 0.3, 0.2: a dictionary (GCIDE, a document per entry), the kernel's documentation, and Python's and
Perl's.
"""

import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from transmamba.bench.kernels import results_folder
from transmamba.machine import describe_device

PACKAGES = ("dict-gcide", "linux-doc-6.1", "python3.11-doc", "perl-doc")
WEIGHTS = {"dictionary": 0.5, "kernel": 0.3, "programming": 0.2}
STEPS = 200
_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def main(work: Path) -> None:
    """Fetch, convert, prepare, verify, train, report."""
    root = _unpack(work)
    sources = {"dictionary": _dictionary(root), "kernel": _kernel(root), "programming": _programming(root)}
    n_bytes = {}
    for name, documents in sources.items():
        n_bytes[name] = _write(work / f"{name}.jsonl", documents)
        print(f"{name}: {n_bytes[name]:,} bytes of text", flush=True)
    files = [str(work / f"{name}.jsonl") for name in sources]
    tokenizer = str(work / "tokenizer.json")
    seconds = {"tokenizer": _run("transmamba", "data", "tokenizer", "train", *files, "--out", tokenizer)}
    for name in sources:
        arguments = [str(work / f"{name}.jsonl"), "--out", str(work / name), "--tokenizer", tokenizer, "--dedup"]
        seconds[f"prepare {name}"] = _run("transmamba", "data", "prepare", *arguments, "--replace")
        seconds[f"verify {name}"] = _run("transmamba", "data", "verify", str(work / name))
    run = work / "run"
    folders = [f"data.sources.{name}={work / name}" for name in sources]
    blend = "data.blend={" + ", ".join(f"{name}: {weight}" for name, weight in WEIGHTS.items()) + "}"
    options = [f"train.steps={STEPS}", f"run.dir={run}", "data.ledger=true", "sample.prompt='The word'"]
    seconds["train"] = _run(sys.executable, "-m", "transmamba.train", *folders, blend, *options)
    seconds["audit"] = _run("transmamba", "data", "audit", str(run))
    _report(work, n_bytes, seconds)


def _unpack(work: Path) -> Path:
    root = work / "packages"
    if not root.exists():
        root.mkdir(parents=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=root, check=True)
        for package in sorted(root.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, root], check=True)
    return root


def _dictionary(root: Path) -> Iterator[str]:
    """The entries of GCIDE: its index gives offset and length of each as numbers in base 64."""
    folder = root / "usr/share/dictd"
    with gzip.open(folder / "gcide.dict.dz") as file:
        text = file.read()
    places = {tuple(line.split("\t")[1:3]) for line in (folder / "gcide.index").read_text().splitlines()}
    for first, length in sorted((_number(first), _number(length)) for first, length in places):
        yield text[first : first + length].decode("utf-8", "replace")


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _BASE64.index(digit)
    return value


def _kernel(root: Path) -> Iterator[str]:
    folder = root / "usr/share/doc/linux-doc-6.1/Documentation"
    for path in sorted([*folder.rglob("*.rst*"), *folder.rglob("*.txt*"), *folder.rglob("*.yaml*")]):
        if path.is_file() and "_sources" not in path.parts:
            data = path.read_bytes()
            yield (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")


def _programming(root: Path) -> Iterator[str]:
    python = root / "usr/share/doc/python3.11/html/_sources"
    for path in sorted([*python.rglob("*.txt"), *(root / "usr/share/perl").rglob("*.pod")]):
        yield path.read_text(encoding="utf-8", errors="replace")


def _write(path: Path, documents: Iterator[str]) -> int:
    n_bytes = 0
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            if text.strip():
                file.write(json.dumps({"text": text}) + "\n")
                n_bytes += len(text.encode("utf-8"))
    return n_bytes


def _run(*command: str) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True)
    return round(time.monotonic() - started, 1)


def _report(work: Path, n_bytes: dict[str, int], seconds: dict[str, float]) -> None:
    hardware = describe_device(torch.device("cpu"))
    out = results_folder(Path(__file__).parent / "results", hardware)
    manifests = {name: json.loads((work / name / "manifest.json").read_text()) for name in n_bytes}
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    record = {
        "hardware": hardware,
        "packages": sorted(path.name for path in (work / "packages").glob("*.deb")),
        "text_bytes": n_bytes,
        "splits": {
            name: {split: {key: entry[key] for key in ("n_documents", "n_tokens", "n_text_bytes")} for split, entry in
                   manifest["splits"].items()}
            for name, manifest in manifests.items()
        },
        "blend": WEIGHTS,
        "steps": STEPS,
        "seconds": seconds,
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "validation": lines[-1]["validation"],
        "gzip9_bits_per_byte": {
            name: manifest["splits"]["validation"]["gzip9_bits_per_byte"] for name, manifest in manifests.items()
        },
    }  # fmt: skip
    (out / "debian-docs.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(work / "run" / "loss.png", out / "debian-docs-loss.png")
    subprocess.run(
        ["transmamba", "data", "inspect", work / "dictionary", "--png", out / "debian-docs-lengths.png"], check=True
    )
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
