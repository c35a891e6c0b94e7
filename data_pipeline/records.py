"""Small files that are there whole or not at all, also after the power failed."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


def save_bytes(path: Path, data: bytes) -> None:
    """Write a file aside, flush it and rename it into its place."""
    aside = path.with_name(f"{path.name}.new")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON object."""
    save_bytes(path, json.dumps(record, ensure_ascii=False).encode("utf-8"))


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array in npy format."""
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    save_bytes(path, data.getvalue())


def load_record(path: Path) -> dict[str, Any]:
    """Read a JSON object that `save_record` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
