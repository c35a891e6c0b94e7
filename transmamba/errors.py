"""Exit codes of the entry points, and the error a bad configuration ends in: one line per problem."""

import re
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_INTERNAL = 1
EXIT_CONFIG = 2
EXIT_STOPPED = 10
EXIT_STOP_FILE = 11
EXIT_NON_FINITE = 20
EXIT_NO_VALID_CHECKPOINT = 21
EXIT_DATA = 22
EXIT_CHECKPOINT_MISMATCH = 23
EXIT_HANG = 30
EXIT_RANK_DIED = 31
EXIT_STORAGE = 40
EXIT_NO_PROGRESS = 50
EXIT_INTERRUPTED = 130  # the shell's code for Ctrl-C, while there is nothing to save

MAX_LINES = 20
_MAX_VALUE = 80
_SECRET_KEY = re.compile(
    r"(api_?key|secret|passw(or)?d|credential|access_key|private_key|auth_token|(wandb|hf|github|api)_token)",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\bhf_\w{20,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|\b[Bb]earer\s+[\w.~+/-]{16,}|://[^/\s:@]+:[^/\s@]+@|AccountKey=|\beyJ[\w-]{10,}\."
    r"|(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])"
)


def looks_secret(key: str, value: object) -> bool:
    """Whether the name or the text of a value is that of a credential; those are never printed or stored."""
    return bool(_SECRET_KEY.search(key)) or bool(_SECRET_VALUE.search(str(value)))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what, the offending value and what to do about it."""

    key: str
    problem: str
    value: object
    fix: str

    def line(self) -> str:
        """The problem on one line of printable text, the value shortened, a credential left out."""
        value = "<hidden>" if looks_secret(self.key, self.value) else _shown(self.value)
        key = "<hidden>" if looks_secret("", self.key) else _one_line(self.key, _MAX_VALUE)
        return f"transmamba: error: {key}: {_one_line(self.problem)} (got {value}). Fix: {_one_line(self.fix)}."


class ConfigError(Exception):
    """Everything that is wrong with a configuration; the entry points print it and exit with 2."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The first problems, at most 20, one line each."""
        return [problem.line() for problem in self.problems[:MAX_LINES]]


class CompleteRunError(ConfigError):
    """Nothing is wrong but that the run has all its steps; what starts runs again takes this for done."""

    def __init__(self, problems: list[Problem], folder: object, step: int) -> None:
        self._folder, self._step = folder, step
        super().__init__(problems)

    def told(self) -> str:
        """The same as no error, on one line."""
        return f"transmamba: {self._folder} is complete at step {self._step}; raise train.steps to train longer"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _one_line(str(value), _MAX_VALUE) or "nothing"


def _one_line(text: str, limit: int = 400) -> str:
    # repr-style escapes keep a terminal safe from control characters and lone surrogates.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


class RunError(Exception):
    """Why a run ends early: the entry points print the one line and exit with the code."""

    def __init__(self, code: int, line: str) -> None:
        self.code = code
        super().__init__(f"transmamba: error: {_one_line(line, 1000)}")
