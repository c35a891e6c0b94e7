"""Repairs of Triton's interpreter: products of bfloat16 tiles, and what makes it slow."""

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tl.dot` multiply bfloat16 tiles by their values, scans work on whole vectors, and calls be calls."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", _scan)
    monkeypatch.setattr(interpreter, "_patch_lang", _Patches().patch)


_create_dot, _patch_lang = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang


def _dot(self: Any, left: Any, right: Any, total: Any, *options: Any) -> Any:
    """The interpreter keeps the raw bits of bfloat16 as integers, and multiplies those."""
    return _create_dot(self, _values(left), _values(right), total, *options)


def _values(tile: Any) -> Any:
    if tile.dtype.scalar != tl.bfloat16:
        return tile
    bits = tile.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _scan(self: Any, inputs: Any) -> Any:
    """Scan of a vector in log2 n sweeps; the interpreter calls the operator on one pair of numbers after the other."""
    dtypes, values = [value.dtype for value in inputs], [value.handle.data for value in inputs]
    index, distance = np.arange(values[0].size), 1
    while distance < index.size:
        earlier = [self.to_tensor(np.roll(value, distance), dtype) for value, dtype in zip(values, dtypes, strict=True)]
        later = [self.to_tensor(value, dtype) for value, dtype in zip(values, dtypes, strict=True)]
        combined = [value.handle.data for value in self.combine_fn.fn(*earlier, *later)]
        values = [np.where(index < distance, old, new) for old, new in zip(values, combined, strict=True)]
        distance *= 2
    return [self.to_tensor(value, dtype) for value, dtype in zip(values, dtypes, strict=True)]


class _Patches:
    """The interpreter replaces Triton's language at every call of a jitted function; here, once a launch."""

    def __init__(self) -> None:
        self._patched: set[str] = set()

    def patch(self, function: Any) -> Any:
        languages = {module.__name__ for module in function.__globals__.values() if module in (tl, tl.core)}
        if languages <= self._patched:
            return interpreter._LangPatchScope()
        is_launch = not self._patched
        self._patched |= languages
        scope = _patch_lang(function)
        return _Launch(scope, self._patched) if is_launch else scope


class _Launch:
    """What a launch has replaced, until it ends."""

    def __init__(self, scope: Any, patched: set[str]) -> None:
        self._scope, self._patched = scope, patched

    def restore(self) -> None:
        self._patched.clear()
        self._scope.restore()
