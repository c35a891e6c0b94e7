"""Seconds of real training steps of named configurations on this machine, for the profile that `plan` predicts with."""
# B batch, T tokens, H heads, N head width.

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from transmamba import session
from transmamba.batches import MicroBatch
from transmamba.config import Config
from transmamba.data_pipeline.progress import show_step
from transmamba.kernels.documents import Documents
from transmamba.parallel import topology as groups
from transmamba.parallel.pipeline import run_schedule
from transmamba.parallel.topology import Topology
from transmamba.run import build_chunks, build_optimizer, build_stage
from transmamba.transpoint import effective_points

Clock = Literal["cpu", "wall"]
_ROUNDS = 6


def measure(
    named: Mapping[str, Config],
    threads: Sequence[int],
    *,
    clock: Clock = "cpu",
    passes: int = 2,
    seconds: float = 0.6,
) -> dict[str, dict[int, float]]:
    """Seconds of a training step of every configuration with every number of threads, on one process.

    Configurations take turns, `passes` times; a turn trains for `seconds`, at least two steps, after one that does not
    count. The result is the least time of a step.

    Args:
        named: configurations by name, each of one process and a given vocabulary, their windows whole.
        clock: "cpu" is the CPU time of the thread that runs the step: other processes cannot take it away, and it does
            not pass while the thread sleeps, so what it waits for others is left out. "wall" is for a quiet machine.
    """
    session.quieten_libraries()
    found: dict[str, dict[int, float]] = {name: {} for name in named}
    topology = groups.start(next(iter(named.values())).parallel)
    try:
        with show_step("measure steps", passes * len(named), visible=True) as advance:
            for name, config in passes * list(named.items()):
                for n, step_s in _turn(config, topology, threads, clock, seconds).items():
                    found[name][n] = min(step_s, found[name].get(n, step_s))
                gc.collect()
                advance(1, name)
    finally:
        groups.stop()
    return found


def kernel_constants(threads: int, clock: Clock = "cpu") -> dict[str, float]:
    """Nanoseconds of what `cpu_time` calls matmul and matmul edges, attention and scores, from two sizes of each."""
    torch.set_num_threads(threads)
    sizes, widths = ((1024, 1024, 512), (1024, 192, 64)), (16, 64)
    B, H, T = 2, 4, 512  # one block of keys: every query meets all of them
    calls = [partial(torch.matmul, torch.randn(M, K), torch.randn(K, N)) for M, N, K in sizes]
    calls += [partial(_attend, torch.randn(3, B, H, T, N)) for N in widths]
    rounds = [[least_seconds(call, clock, 0.15) for call in calls] for _ in range(_ROUNDS)]
    large, small, narrow, wide = (min(times) * 1e9 for times in zip(*rounds, strict=True))
    flops = [2 * M * N * K for M, N, K in sizes]
    edges = [2 * (M * N + N * K + K * M) for M, N, K in sizes]
    per_edge = (small / flops[1] - large / flops[0]) / (edges[1] / flops[1] - edges[0] / flops[0])
    per_edge = max(0.0, per_edge)
    pairs = B * H * T * T
    per_flop = (wide - narrow) / (14 * pairs * (widths[1] - widths[0]))
    return {
        "matmul": (large - per_edge * edges[0]) / flops[0],
        "matmul_edges": per_edge,
        "attention": per_flop,
        "scores": narrow / pairs - 14 * widths[0] * per_flop,
    }


def _attend(qkv_3BHTN: torch.Tensor) -> None:
    """Causal attention, forward and backward."""
    q_BHTN, k_BHTN, v_BHTN = qkv_3BHTN.clone().requires_grad_().unbind()
    y_BHTN = scaled_dot_product_attention(q_BHTN, k_BHTN, v_BHTN, is_causal=True)
    torch.autograd.grad(y_BHTN, (q_BHTN, k_BHTN, v_BHTN), y_BHTN.detach())


def least_seconds(function: Callable[[], object], clock: Clock, seconds: float) -> float:
    """The least time of a call: the second one and those that begin within `seconds` after it."""
    now = time.thread_time if clock == "cpu" else time.perf_counter
    function()
    deadline, times = time.monotonic() + seconds, []
    while len(times) < 2 or time.monotonic() < deadline:
        started = now()
        function()
        times.append(now() - started)
    return min(times)


def _turn(config: Config, topology: Topology, threads: Sequence[int], clock: Clock, seconds: float) -> dict[int, float]:
    chunks = build_chunks(config, config.model.vocab_size or 0, topology, [range(config.model.n_layers)])
    optimizer = build_optimizer(chunks, config, topology)
    stage = build_stage(chunks, optimizer, config, topology)
    batches = [_micro_batch(config, number) for number in range(config.train.global_batch // config.train.micro_batch)]

    def step() -> None:
        run_schedule(stage, batches, n_rows=config.train.micro_batch, n_tokens=config.data.seq_len)
        optimizer.step(1e-5)

    least: dict[int, float] = {}
    for n in threads:
        torch.set_num_threads(n)
        least[n] = least_seconds(step, clock, seconds)
    return least


def _micro_batch(config: Config, seed: int) -> MicroBatch:
    draw = torch.Generator().manual_seed(seed)
    B, T = config.train.micro_batch, config.data.seq_len
    tokens_BT = torch.randint(0, config.model.vocab_size or 1, (B, T + 1), generator=draw)
    weight_BT = torch.full((B, T), 1 / (config.train.global_batch * T))
    return MicroBatch(tokens_BT[:, :-1], tokens_BT[:, 1:], weight_BT, Documents.whole(B, T), effective_points(config))
