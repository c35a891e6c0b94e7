"""From what a command raises to what its user sees: one line and an exit code."""

import errno
import sys
from collections.abc import Callable

import typer

from transmamba.errors import EXIT_CONFIG, EXIT_DATA, EXIT_INTERRUPTED, EXIT_STORAGE, ConfigError, RunError


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
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code, fix = (EXIT_STORAGE, "make room") if is_full else (EXIT_CONFIG, "check the path and its permissions")
        line = f"transmamba: error: {error.filename or 'storage'}: {error.strerror or error}. Fix: {fix}."
    except KeyboardInterrupt:
        code, line = EXIT_INTERRUPTED, "transmamba: interrupted"
    else:
        return
    print(line, file=sys.stderr)
    raise typer.Exit(code)
