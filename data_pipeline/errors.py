"""What the data pipeline raises: one line that says where, what and how to get on."""

from __future__ import annotations


class DataError(ValueError):
    """Input or stored data that cannot be used as it is.

    Args:
        what: the file, shard, line or field.
        problem: what is wrong with it, with the offending value.
        fix: what the user can do.
    """

    def __init__(self, what: str, problem: str, fix: str) -> None:
        self.what = what
        self.problem = problem
        self.fix = fix
        super().__init__(" ".join(f"{what}: {problem}; {fix}".split()))

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str]]:
        # Exceptions travel between processes by their constructor's arguments.
        return type(self), (self.what, self.problem, self.fix)


class DamagedData(DataError):  # noqa: N818, named after what it is about
    """Bytes on disk that no longer match their recorded digest."""
