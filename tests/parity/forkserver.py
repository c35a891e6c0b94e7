"""Several ranks on one machine in a second or two: processes forked from a server that has imported everything."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

PRELOAD = ["megatron.core.pipeline_parallel.schedules", "deepspeed", "transmamba.session", "tests.parity.rig"]


def run(world_size: int, function: Callable[..., Any], *args: Any, limit_s: float = 240.0) -> list[Any]:
    """`function(*args)` on every rank of a gloo group, one thread each; returns their results in order of rank.

    Raises:
        AssertionError: a rank failed (its traceback), died without a word, or was not done after `limit_s`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world_size, f"{folder}/store", function, args, answers))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + limit_s
        while len(results) + len(failures) < world_size:
            if not answers.empty():
                rank, value, failure = answers.get()
                if failure is None:
                    results[rank] = pickle.loads(value)
                else:
                    failures.append(f"rank {rank}:\n{failure}")
                    deadline = min(deadline, time.monotonic() + 2.0)  # the others' part of the story
            elif any(process.exitcode not in (None, 0) for process in processes) and answers.empty():
                failures.append(f"a rank died: exit codes {[process.exitcode for process in processes]}")
                break
            elif time.monotonic() > deadline:
                failures.append(f"not done in time: ranks {sorted(set(range(world_size)) - set(results))}")
                break
            else:
                time.sleep(0.005)
        for process in processes:
            if failures:
                process.kill()
            process.join()
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, store: str, function: Callable[..., Any], args: Any, answers: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    import torch
    import torch.distributed as dist

    from transmamba.session import quieten_libraries

    quieten_libraries()
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        value = function(*args)
        dist.barrier()
        answers.put((rank, pickle.dumps(value), None))  # plain bytes: torch would share memory with a process that ends
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
