"""`python -m transmamba.torchrun [options] -m transmamba.train [overrides]`: torchrun with a true exit code.

Options and engine are torchrun's, which itself answers 1 and a traceback to every failure of a rank, also where a run
was asked to stop.
"""

import logging
import sys

from transmamba.errors import EXIT_DONE, EXIT_INTERNAL
from transmamba.launch.attempt import DIED_BY_SIGNAL


def main(argv: list[str]) -> int:
    """Run the ranks; returns the exit code of the ranks that failed first, 128 + n if signal n ended a rank or this."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What it has to say about failures, each rank said before.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(argv))
    except ChildFailedError as error:
        codes = sorted(failure.exitcode for failure in error.failures.values())
        # A reason that a rank gave says more than the death of one that lost it.
        return codes[-1] if codes[-1] > EXIT_INTERNAL or codes[0] > 0 else DIED_BY_SIGNAL - codes[0]
    except SignalException as error:
        return DIED_BY_SIGNAL + int(error.sigval)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
