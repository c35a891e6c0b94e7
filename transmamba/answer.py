"""From what a command raises to what its user sees: one line and an exit code."""

import sys
from collections.abc import Callable

import typer

from transmamba.errors import EXIT_CONFIG, EXIT_DATA, ConfigError, RunError


def answer(run: Callable[[], None]) -> None:
    """Run a command; what a user can cause is one line and its exit code, not a traceback."""
    from transmamba.data_pipeline.errors import DamagedData, DataError

    try:
        run()
    except ConfigError as error:
        code, line = EXIT_CONFIG, str(error)
    except RunError as error:
        code, line = error.code, str(error)
    except DataError as error:
        code = EXIT_DATA if isinstance(error, DamagedData) else EXIT_CONFIG
        line = f"transmamba: error: {error.what}: {error.problem}. Fix: {error.fix}."
    else:
        return
    print(line, file=sys.stderr)
    raise typer.Exit(code)
