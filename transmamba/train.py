"""`python -m transmamba.train [group=choice] [key=value] [--config FILE]`: pretrain a model.

Torch is imported only after the configuration has passed validation, so a bad one answers at once, on any machine.
"""

import os
import sys

from transmamba.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Compose, validate, train; returns the exit code."""
    from transmamba.compose import load
    from transmamba.validate import validate

    arguments = sys.argv[1:] if argv is None else argv
    if {"-m", "--multirun"} & set(arguments):
        from transmamba.multirun import multirun

        return multirun(arguments)
    try:
        config = load(arguments)
        validate(config, os.environ)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # the other ranks have the same to say
            print(error, file=sys.stderr)
        from transmamba.errors import EXIT_CONFIG

        return EXIT_CONFIG
    wait_politely()
    from transmamba.session import train

    return train(config)


def wait_politely() -> None:
    """Let idle CPU threads sleep instead of spinning; must be called before torch is loaded.

    With spinning threads a second busy process on two cores made a step 12 to 20 times slower; asleep they share.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    sys.exit(main())
