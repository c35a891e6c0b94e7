"""One line of `transmamba doctor`."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "optional", "warning", "fatal"]
EXIT_CODES = {"ok": 0, "optional": 0, "warning": 1, "fatal": 2}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, how good that is and what to do about it."""

    check: str
    value: str
    verdict: Verdict = "ok"
    fix: str = ""
