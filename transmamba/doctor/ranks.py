"""The network between ranks: two on this machine, or the real ones of a job.

`torchrun ... -m transmamba.doctor.ranks`, or the same under srun, looks at the ranks that the launcher starts.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

from transmamba.doctor.finding import Finding

PATIENCE_S = 30.0
SLOW_LATENCY_S, SLOW_RATE = 0.05, 20e6  # gloo on two idle cores of one machine: 0.2 ms, 1 GB/s
_FLOATS = 2 * 2**20  # 8 MiB


def local_finding() -> Finding:
    """Start two ranks on this machine, and say whether and how quickly they add numbers up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "transmamba.doctor.ranks", "--json"],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=2 * PATIENCE_S) for rank in ranks]
        return Finding(**json.loads(told[0][0]))
    except (subprocess.TimeoutExpired, ValueError):
        for rank in ranks:
            rank.kill()
        why = "; ".join(text for rank in ranks for text in rank.communicate()[1].strip().splitlines()[-1:])
        return _problem(f"two ranks on this machine do not meet: {why[:200] or 'no answer'}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def measure() -> Finding:
    """As one rank of a job: add up numbers with the others, check the sum, take the time; rank 0's answer counts."""
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=timedelta(seconds=PATIENCE_S))
    try:
        hosts: list[Any] = [None] * world_size
        dist.all_gather_object(hosts, socket.gethostname())
        small, large = (torch.full((n,), float(rank + 1), device=device) for n in (1, _FLOATS))
        seconds = {n.numel(): _times(lambda n=n: dist.all_reduce(n), device, n_times)
                   for n, n_times in ((small, 20), (large, 5))}  # fmt: skip
        fresh = torch.arange(1000.0, device=device) * (rank + 1)
        dist.all_reduce(fresh)
        is_right = torch.equal(fresh.cpu(), torch.arange(1000.0) * (world_size * (world_size + 1) // 2))
    finally:
        dist.destroy_process_group()
    return verdict(is_right, seconds[1], 4 * _FLOATS / seconds[_FLOATS], hosts, "NCCL" if has_gpu else "gloo")


def verdict(is_right: bool, latency_s: float, rate: float, hosts: list[str], backend: str) -> Finding:
    """The finding of sums that were right or not, took so long for a number, and moved so many bytes a second."""
    places = f"{len(hosts)} ranks on {len(set(hosts))} machine{'s' if len(set(hosts)) > 1 else ''}, {backend}"
    value = f"{places}: a sum takes {latency_s * 1e3:.2f} ms, {rate / 1e6:,.0f} MB/s"
    if not is_right:
        return Finding("ranks", f"{places}: the sum is wrong", "fatal", "look at the network and the drivers")
    if latency_s > SLOW_LATENCY_S or rate < SLOW_RATE:
        fix = "choose the fast interface with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, or free the cores"
        return Finding("ranks", value, "warning", fix)
    return Finding("ranks", value)


def _times(run: Any, device: Any, n_times: int) -> float:
    """Median seconds of a call, after two that do not count."""
    import torch

    seconds = []
    for _ in range(n_times + 2):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def _problem(what: str) -> Finding:
    fix = "let the loopback interface and this host's name resolve; GLOO_SOCKET_IFNAME=lo may help"
    return Finding("ranks", what, "fatal", fix)


def main(arguments: list[str]) -> int:
    """As a rank: print the finding, on rank 0; under srun its variables say which rank this is."""
    for name, other in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if other in os.environ:
            os.environ.setdefault(name, os.environ[other])
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        print(f"transmamba: error: {missing[0]} is not set. Fix: start this with torchrun or srun.", file=sys.stderr)
        return 2
    found = measure()
    if os.environ["RANK"] == "0":
        fields = {"check": found.check, "value": found.value, "verdict": found.verdict, "fix": found.fix}
        print(json.dumps(fields) if "--json" in arguments else " ".join(filter(None, fields.values())), flush=True)
    return 0 if found.verdict != "fatal" else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
