"""`python -m transmamba.train [group=choice] [key=value] [--config FILE]`: pretrain a model.

Torch is imported only after the configuration has passed validation, so a bad one answers at once, on any machine.
"""

import os
import sys
from pathlib import Path

from transmamba.errors import EXIT_CONFIG, EXIT_DONE, CompleteRunError, ConfigError

# What batch scripts give: a job that is started again after the last step has nothing to do, and nothing failed.
UNLESS_COMPLETE = "--unless-complete"
_USAGE = """\
usage: python -m transmamba.train [--config FILE] [group=choice ...] [key=value ...]
       torchrun --nproc-per-node N -m transmamba.train ...

Pretrain a model. The same command runs on one process and on many; wrong values are refused before anything starts.

groups:
{groups}

keys:
  key=value           for example optim.lr=1e-3 train.tokens=50M 'transpoint.points=[0,64,inf]'
  ~key                back to its default
  Every key, its range, its unit and its default: {keys}
  What a run would be, without starting it: transmamba plan [group=choice ...] [key=value ...]

options:
  --config FILE       values of a YAML file, before those of the command line; RUN/config.yaml continues a run
  -m, --multirun      several runs one after the other: seed=1,2 is a run for each
  --unless-complete   do nothing, with exit code 0, if the run has all its steps
  -h, --help          show this and stop

examples:
  python -m transmamba.train model=small transpoint=v9 data.seq_len=1024 run.dir=runs/small
  python -m transmamba.train --config runs/small/config.yaml train.steps=2000
  torchrun --nproc-per-node 4 -m transmamba.train parallel.tp=2 parallel.pp=2"""


def main(argv: list[str] | None = None) -> int:
    """Compose, validate, train; returns the exit code."""
    from transmamba.compose import load
    from transmamba.validate import validate

    arguments = sys.argv[1:] if argv is None else argv
    is_first = os.environ.get("RANK", "0") == "0"  # the other ranks have the same to say
    if {"-h", "--help"} & set(arguments):
        if is_first:
            print(usage())
        return EXIT_DONE
    if {"-m", "--multirun"} & set(arguments):
        from transmamba.multirun import multirun

        return multirun(arguments)
    try:
        config = load([text for text in arguments if text != UNLESS_COMPLETE])
        validate(config, os.environ)
    except ConfigError as error:
        is_done = isinstance(error, CompleteRunError) and UNLESS_COMPLETE in arguments
        if is_first:
            print(error.told() if isinstance(error, CompleteRunError) and is_done else error, file=sys.stderr)
        return EXIT_DONE if is_done else EXIT_CONFIG
    wait_politely()
    from transmamba.session import train

    return train(config)


def usage() -> str:
    """What `--help` says: the form of the arguments, the presets, the options and examples."""
    from textwrap import fill

    from transmamba.overrides import groups

    lines = [
        fill(", ".join(names), width=100, initial_indent=f"  {group:<20}", subsequent_indent=" " * 22)
        for group, names in groups().items()
    ]
    return _USAGE.format(groups="\n".join(lines), keys=Path(__file__).with_name("config.py"))


def wait_politely() -> None:
    """Let idle CPU threads sleep instead of spinning; must be called before torch is loaded.

    With spinning threads a second busy process on two cores made a step 12 to 20 times slower; asleep they share.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    sys.exit(main())
