"""A run on this machine: torchrun with the right signals, threads, logs and restarts, and the true exit code."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from transmamba.errors import EXIT_DONE, CompleteRunError
from transmamba.launch.attempt import DIED_BY_SIGNAL, MAX_IDLE_RESTARTS, RESTARTED, Attempt
from transmamba.launch.checked import RANK_VARIABLES, checked
from transmamba.launch.tee import Copier

SAVE_S = 600  # how long ranks that were told to stop may take for their step and their save
LAST_WORDS_S = 10.0  # how long the watchdog may speak after the last rank
_PR_SET_PDEATHSIG = 1
_ASKS = {  # what is passed on; a terminal that goes away asks to stop
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGHUP: signal.SIGTERM,
}


def command(overrides: Sequence[str], nproc: int) -> list[str]:
    """The command that starts `nproc` ranks: plain Python for one, else torchrun."""
    train = ["-m", "transmamba.train", *overrides]
    if nproc == 1:
        return [sys.executable, *train]
    return [
        *(sys.executable, "-m", "transmamba.torchrun", "--standalone", f"--nproc-per-node={nproc}"),
        *("--signals-to-handle=SIGTERM,SIGINT,SIGUSR2", f"--shutdown-timeout={SAVE_S}"),
        *train,
    ]


def settings(nproc: int) -> dict[str, str]:
    """Environment variables that the ranks get unless they are set already: threads for each its share of the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    wanted = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    return {name: os.environ.get(name, text) for name, text in wanted.items()}


def shown(overrides: Sequence[str], nproc: int, *, max_restarts: int = 0) -> str:
    """What `run_local` would run, to be pasted into a shell; creates nothing.

    Raises:
        ConfigError: the configuration is wrong for so many ranks.
    """
    config, overrides = checked(overrides, nproc, may_restart=max_restarts > 0)
    variables = [f"{name}={shlex.quote(text)}" for name, text in settings(nproc).items()]
    return f"# run folder: {config.run.dir}\n{' '.join(variables)} {shlex.join(command(overrides, nproc))}"


def run_local(
    overrides: Sequence[str], nproc: int, *, max_restarts: int = 0, quiet: bool = False, log: Path | None = None
) -> int:
    """Run `nproc` ranks to their end and tell how it was.

    What rank 0 says goes to the screen and to logs/rank00000.log of the run folder; the other ranks write logs of
    their own. Called in the main thread, it makes SIGINT, SIGTERM, SIGHUP and SIGUSR2 a request to save and stop.

    Args:
        max_restarts: how often a run that hangs or loses a rank is started again.
        quiet: nothing goes to the screen.
        log: another file that gets what rank 0 says.

    Returns:
        The run's exit code, 0 for one that had all its steps before; 50 after three restarts without a new checkpoint;
        128 + n if signal n was passed on before there was anything to save.

    Raises:
        ConfigError: the configuration is wrong for so many ranks; nothing was created.
    """
    try:
        config, overrides = checked(overrides, nproc, may_restart=max_restarts > 0)
    except CompleteRunError as complete:
        print(complete.told(), file=sys.stderr)
        return EXIT_DONE
    folder, words = Path(str(config.run.dir)), command(overrides, nproc)
    restarts = idle = 0
    with _Asked() as asked:
        while True:
            attempt = Attempt(folder)
            code = _run_once(words, nproc, asked, _copier(folder, quiet, log))
            code = attempt.code(code, is_told=asked.number is not None)
            if code not in RESTARTED or asked.number is not None:
                return code
            idle = idle + 1 if restarts and not attempt.has_new_checkpoint() else 0
            if idle == MAX_IDLE_RESTARTS:
                _tell(f"{idle} restarts brought no new checkpoint. Fix: look at {folder}/exit.json and {folder}/logs")
                return attempt.give_up(code)
            if restarts == max_restarts:
                return code
            restarts += 1
            _tell(f"ended with code {code}; restart {restarts} of at most {max_restarts}")


class _Asked:
    """Passes the first request to stop on to the processes of the run, and remembers it."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "_Asked":
        if threading.current_thread() is threading.main_thread():
            # What is ignored on purpose (nohup, jobs in the background) stays ignored.
            heard = [number for number in _ASKS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:  # a second one must not disturb the save
            self.number = _ASKS[signal.Signals(number)]
            if self.child is not None:
                self.child.send_signal(self.number)


def _run_once(words: list[str], nproc: int, asked: _Asked, copier: Copier) -> int:
    """Run the ranks once; returns the exit code of what started them, 128 + n for signal n."""
    environ = {name: text for name, text in os.environ.items() if name not in RANK_VARIABLES}
    child = subprocess.Popen(
        words,
        env=environ | settings(nproc),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the ranks once, through here
        preexec_fn=_end_with_parent,
    )
    asked.child = child
    if asked.number is not None:  # it came before there was somebody to tell
        child.send_signal(asked.number)
    assert child.stdout is not None and child.stderr is not None
    copier.start(child.stdout, child.stderr)
    code = child.wait()
    asked.child = None
    copier.finish(LAST_WORDS_S)
    return code if code >= 0 else DIED_BY_SIGNAL - code


def _end_with_parent() -> None:
    # Ranks whose launcher was killed save and stop: nobody reads what they say any more.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _copier(folder: Path, quiet: bool, log: Path | None) -> Copier:
    screens: tuple[IO[bytes] | None, IO[bytes] | None] = (None, None)
    if not quiet:
        screens = sys.stdout.buffer, sys.stderr.buffer
    return Copier(screens, [folder / "logs" / "rank00000.log", *([] if log is None else [log])])


def _tell(text: str) -> None:
    print(f"transmamba: launch: {text}", file=sys.stderr, flush=True)
