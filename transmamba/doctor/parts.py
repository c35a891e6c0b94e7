"""What `transmamba doctor` says of optional parts: whether they are here, and what each enables."""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from transmamba.doctor.finding import Finding
from transmamba.tracking.wandb_key import has_key

# Package -> what it enables and how it is installed.
PARTS = {
    "lm-eval": ("tasks of lm_eval in `transmamba evaluate --tasks`", "pip install -e '.[eval]'"),
    "transformers": ("exports, imports, parity tests against published layers", "pip install -e '.[peers]'"),
    "s3fs": ("data on S3", "pip install -e '.[s3]'"),
    "gcsfs": ("data on Google Cloud Storage", "pip install -e '.[gcs]'"),
    "zstandard": ("text in .zst", "pip install zstandard"),
    "optuna": ("`transmamba sweep --optuna`", "pip install -e '.[sweep]'"),
    "hydra-submitit-launcher": ("hydra/launcher=submitit_slurm", "pip install hydra-submitit-launcher"),
    "flash-linear-attention": ("a peer of the kernels' benchmarks", "pip install flash-linear-attention"),
    "mamba-ssm": ("a peer of the kernels' benchmarks", "pip install mamba-ssm"),
}


def part_findings() -> Iterator[Finding]:
    """A line for wandb and one for each optional package."""
    found = installed("wandb")
    if found and has_key(os.environ):
        yield Finding("wandb", f"{found}, a key is configured: curves on wandb.ai besides metrics.jsonl")
    else:
        value, fix = f"{found}, no key: runs are logged offline", "`wandb login` for curves on wandb.ai"
        yield Finding("wandb", value if found else "absent", "optional", fix)
    for name, (use, install) in PARTS.items():
        found = installed(name)
        yield Finding(name, f"{found}: {use}") if found else Finding(name, "absent", "optional", f"{install}: {use}")


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
