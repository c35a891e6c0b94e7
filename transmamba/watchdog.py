"""A process beside the ranks of a node that ends the job when one of them dies or hangs.

Every rank notes what it does in its page (`transmamba.heartbeat`); a child of each node's local rank 0 reads them. Its
verdict is exit code 30 (hang), 31 (a rank died) or that of a rank that left for a reason of its own, told in
verdict.json, events.jsonl, exit.json and a line on stderr.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from transmamba import heartbeat
from transmamba.errors import EXIT_HANG, EXIT_RANK_DIED
from transmamba.heartbeat import VERDICT, WAITING, Phase, Pulse, Word
from transmamba.next_commands import train_again
from transmamba.stragglers import Recorder

APPEAR_S = 60.0  # how long a rank may take to its first heartbeat, from that of local rank 0
PATIENCE_S = 1.5  # how long ranks may take to leave by themselves once they are told to, or said that they do
STACKS_S = 2.0  # how long to wait for stacks; a rank in a system call that cannot be interrupted writes none
_TICK_S = 0.5


class Watchdog:
    """Watches the ranks of one node (`ranks`, their numbers) until all are done or the job has to end.

    A heartbeat begun before `since_ns` (CLOCK_BOOTTIME) by a process that has ended is that of a former run.
    """

    def __init__(self, folder: Path, ranks: list[int], world_size: int, limit_s: float | None, since_ns: int):
        self._folder, self._numbers, self._limit_s, self._since_ns = folder, ranks, limit_s, since_ns
        self._is_alone = world_size == len(ranks)
        self._ranks: dict[int, Pulse] = {}
        self._poll = select.poll()
        self._started_at = self._looked_at = time.monotonic()
        self._old_verdict = _seen(folder / VERDICT)
        self._paces = Recorder(folder, min(ranks))

    def run(self) -> int:
        """Returns 0 once every rank is done, else the code that the job was ended with."""
        while True:
            self._look(_TICK_S)
            ranks, has_all = self._ranks.values(), len(self._ranks) == len(self._numbers)
            is_over = ranks and all(rank.beat[1] == Phase.DONE and (has_all or rank.process < 0) for rank in ranks)
            self._paces.note(ranks, at_once=bool(is_over))
            if is_over:
                return 0
            others = self._verdict_of_others()
            if others is not None:
                return self._end_job(others["code"], [], others)
            if not has_all and time.monotonic() - self._started_at > APPEAR_S:
                return self._end_job(EXIT_RANK_DIED, [])
            if dead := self._lost():
                if all(rank.page[Word.LEFT] for rank in dead):
                    self._look(0.2)  # who only lost a peer may be seen first
                    dead = self._lost()
                return self._end_job(EXIT_RANK_DIED, dead)
            if suspects := self._late():
                return self._end_job(EXIT_HANG, suspects)

    def _look(self, wait_s: float) -> None:
        """Read every heartbeat after `wait_s`, or as soon as a process ends."""
        for number in {*self._numbers} - {*self._ranks}:
            with suppress(OSError, ValueError):  # not there yet
                self._register(number)
        ended = {fd for fd, _ in self._poll.poll(wait_s * 1000)}
        now = time.monotonic()
        pause_s, self._looked_at = now - self._looked_at - wait_s, now
        for rank in self._ranks.values():
            rank.observe()
            if pause_s > 2:  # the node was frozen or very busy: nobody could beat
                rank.changed_at += pause_s
            if rank.process in ended:
                self._poll.unregister(rank.process)
                os.close(rank.process)
                rank.process = -1

    def _register(self, number: int) -> None:
        page = heartbeat.open_page(heartbeat.page_path(self._folder, number))
        process = heartbeat.open_process(page)
        if process >= 0:
            self._poll.register(process, select.POLLIN)
        elif page[Word.BOOT] != heartbeat.boot() or page[Word.CREATED] < self._since_ns:
            return
        self._ranks[number] = Pulse(number, page, process)

    def _working(self) -> list[Pulse]:
        """Ranks that live and have not said that they are done."""
        return [rank for rank in self._ranks.values() if rank.process >= 0 and rank.beat[1] != Phase.DONE]

    def _lost(self) -> list[Pulse]:
        """Ranks that ended before they were done, or said that they leave and do not come to an end."""
        long_ago = time.monotonic_ns() - PATIENCE_S * 1e9
        undone = [rank for rank in self._ranks.values() if rank.beat[1] != Phase.DONE]
        return [rank for rank in undone if rank.process < 0 or 0 < rank.page[Word.LEFT] < long_ago]

    def _late(self) -> list[Pulse]:
        """Suspects once a rank is beyond its limit: who waits for the one that hangs stops beating with it."""
        now = time.monotonic()
        ages = [(now - rank.changed_at, rank) for rank in self._working()]
        exceeded = [age for age, rank in ages if age > rank.limit_s(self._limit_s)]
        return [rank for age, rank in ages if exceeded and age > 0.75 * min(exceeded)]

    def _verdict_of_others(self) -> dict[str, Any] | None:
        is_new = not self._is_alone and _seen(self._folder / VERDICT) not in ((0, 0, 0), self._old_verdict)
        return json.loads((self._folder / VERDICT).read_text(encoding="utf-8")) if is_new else None

    def _end_job(self, code: int, suspects: list[Pulse], verdict: dict[str, Any] | None = None) -> int:
        """Stacks and records first, because a launcher may end this process together with the last rank."""
        stopped = {rank.number for rank in self._working() if heartbeat.process_state(rank.page[Word.PID])[0] == "T"}
        roll = [rank.summary(self._limit_s) for rank in self._ranks.values()]
        stacks, waiting = self._ask_for_stacks()
        if verdict is None:
            doubts = {n: (r not in suspects, n not in stopped, n in waiting) for n, r in self._ranks.items()}
            roll.sort(key=lambda about: (doubts[about["rank"]], about["left_ns"], about["step"], -about["age_s"]))
            suspect = roll[0] if suspects else None
            if code == EXIT_RANK_DIED and suspect is not None:
                code = suspect["reason"] or code
            verdict = self._describe(code, suspect) | {"stacks": stacks, "ranks": roll}
            if code == EXIT_HANG and verdict["rank"] in waiting and not self._is_alone:
                time.sleep(1)  # everybody here waits: the node of the rank that hangs shall speak first
        self._record_within(2.0, verdict)
        patient_until = time.monotonic() + PATIENCE_S
        while self._working() and time.monotonic() < patient_until + 2:
            for rank in self._working():
                rank.page[Word.ORDER] = verdict["code"]
                if time.monotonic() > patient_until:
                    rank.send(signal.SIGKILL)
            self._look(0.05)
        self._record_within(2.0, verdict)  # rank 0 may have written its own exit.json on its way out
        fix = f"look at logs and {VERDICT} in {self._folder}, then {train_again(self._folder)}"
        with suppress(OSError):
            print(f"transmamba: error: watchdog: {verdict['cause']}. Fix: {fix}", file=sys.stderr, flush=True)
            if 0 in self._numbers:
                (self._folder / "lock.json").unlink(missing_ok=True)  # of rank 0, which is no more
        return verdict["code"]

    def _ask_for_stacks(self) -> tuple[list[str], set[int]]:
        """Have every living rank write the stacks of its threads; returns the files and who waits for others."""
        paths = {rank.number: heartbeat.stacks_path(self._folder, rank.number) for rank in self._working()}
        begun = {number: _seen(path)[0] for number, path in paths.items()}
        for rank in self._working():
            rank.send(signal.SIGCONT)  # a stopped process writes nothing
            rank.send(signal.SIGUSR1)
        until, sizes, is_whole = time.monotonic() + STACKS_S, begun, False
        while not is_whole and time.monotonic() < until:
            time.sleep(0.1)
            self._look(0)
            before, sizes = sizes, {number: _seen(path)[0] for number, path in paths.items()}
            missing = [rank for rank in self._working() if sizes.get(rank.number) == begun.get(rank.number, -1)]
            is_whole = sizes == before and not missing
        waiting = set()
        for number, path in paths.items():
            with suppress(OSError):
                # The main thread is the oldest and comes last, its innermost frame first.
                text = path.read_bytes()[begun[number] :].decode(errors="replace").rpartition("hread 0x")[2]
                if any(mark in line for line in text.splitlines()[1:4] for mark in WAITING):
                    waiting.add(number)
        return [str(path) for number, path in paths.items() if sizes[number] > begun[number]], waiting

    def _describe(self, code: int, about: dict[str, Any] | None) -> dict[str, Any]:
        """The verdict in words and numbers; nothing is known about a rank that has not appeared."""
        host, what = socket.gethostname(), "died without a word (killed, out of memory or crashed)"
        if about is None:
            about = {"rank": min({*self._numbers} - {*self._ranks}), "phase": "setup", "step": 0, "age_s": APPEAR_S}
            what = "gave no sign of life"
        elif code == EXIT_HANG:
            what = f"hangs, without a heartbeat for {about['age_s']} s (limit {about['limit_s']} s)"
        elif about["reason"]:
            what = f"left with code {code}, for which its log has the reason"
        elif about["left_ns"]:
            what = "ended by itself before the job was done"
        cause = f"rank {about['rank']} on {host} {what}, in phase {about['phase']} at step {about['step']}"
        return {"code": code, "cause": cause, **about, "host": host}

    def _record_within(self, patience_s: float, verdict: dict[str, Any]) -> None:
        # A stuck storage must not keep the job from ending.
        (thread := threading.Thread(target=self._record, args=(verdict,), daemon=True)).start()
        thread.join(patience_s)

    def _record(self, verdict: dict[str, Any]) -> None:
        """Write verdict.json unless another node was first (then repeat its words), and exit.json like rank 0."""
        path = self._folder / VERDICT
        with suppress(OSError, ValueError):
            draft = self._draft(verdict)
            if _seen(path) == self._old_verdict != (0, 0, 0):
                path.unlink(missing_ok=True)
            try:
                os.link(draft, path)
            except FileExistsError:
                verdict.update(json.loads(path.read_text(encoding="utf-8")))
            else:
                with (self._folder / "events.jsonl").open("ab", buffering=0) as events:
                    events.write(json.dumps({"time": time.time(), "event": "verdict", **verdict}).encode() + b"\n")
        with suppress(OSError):
            found = (path.parent for path in (self._folder / "checkpoints").glob("step-*/manifest.json"))
            newest = max((path for path in found if path.name.removeprefix("step-").isdigit()), default=None)
            record = {"code": verdict["code"], "cause": verdict["cause"], "checkpoint": newest and str(newest)}
            os.replace(self._draft(record | {"resume": train_again(self._folder)}), self._folder / "exit.json")

    def _draft(self, record: dict[str, Any]) -> Path:
        path = self._folder / "logs" / f".watchdog-{socket.gethostname()}-{os.getpid()}"
        path.unlink(missing_ok=True)  # its former content may be a published file
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return path


def _seen(path: Path) -> tuple[int, int, int]:
    """Size and identity of a file; zeros if there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_size, found.st_ino, found.st_mtime_ns


def main(arguments: list[str]) -> int:
    """`FOLDER RANK,RANK,... WORLD_SIZE LIMIT_S|auto SINCE_NS`; see `Watchdog`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks; this process ends when they do
    folder, ranks, world_size, limit_s, since_ns = arguments
    numbers, given_s = [int(number) for number in ranks.split(",")], None if limit_s == "auto" else float(limit_s)
    return Watchdog(Path(folder), numbers, int(world_size), given_s, int(since_ns)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
