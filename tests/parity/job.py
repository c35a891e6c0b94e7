"""What every rank of a layout test does; a module of its own, so that forked ranks can import it by name."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tests.parity import rig
from transmamba.config import Config, ParallelConfig
from transmamba.parallel import topology as groups
from transmamba.parallel.loss import vocab_cross_entropy
from transmamba.parallel.replicas import Drift, find_drift
from transmamba.run import named_weights


def job(options: dict[str, Any], n_steps: int) -> rig.Trained:
    """Train the rig's model in the layout of this process's group."""
    config: Config = rig.config_of(**options)
    return rig.train(config, groups.start(config.parallel), n_steps)


def saving_job(options: dict[str, Any], folder: Path, first: int, last: int, save_at: int) -> rig.Trained:
    """Train steps `first` to `last`, from a checkpoint in `folder` unless `first` is 0; save after `save_at` steps."""
    config: Config = rig.config_of(**options)
    job = rig.Job(config, groups.start(config.parallel))
    if first:
        with torch.no_grad():
            for chunk in job.chunks:
                for tensor in (*chunk.parameters(), *chunk.buffers()):
                    tensor.add_(0.1)  # a wrong start, so that what is not restored shows
        job.load(folder, first)
        job.keep("exp_avg", first)
        job.keep("exp_avg_sq", first)
    for step in range(first, last):
        if step == save_at:
            job.save(folder, step)
        job.step(step)
    job.keep("master", last)
    return job.trained


def drifting_job(options: dict[str, Any], rank: int, name: str) -> list[Drift]:
    """One step, then one flipped bit in one rank's copy of a weight; what this rank's comparison says."""
    config: Config = rig.config_of(**options)
    topology = groups.start(config.parallel)
    job = rig.Job(config, topology)
    job.step(0)
    weights = named_weights(job.chunks, config)
    assert find_drift(weights, topology) == []
    if topology.rank == rank:
        weights[name].data.view(torch.int32).flatten()[3] ^= 1
    return find_drift(weights, topology)


def loss_job() -> dict[str, float]:
    """Our loss over two halves of a vocabulary against torch's over the whole and megatron-core's over the halves."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    shards = groups.start(ParallelConfig(tp=2)).shards
    draw = torch.Generator().manual_seed(0)
    whole_TBE = torch.randn(7, 3, 10, generator=draw) * 5
    targets_TB = torch.randint(0, 9, (7, 3), generator=draw)
    dnll_TB, dlog_TB = torch.randn(2, 7, 3, generator=draw)
    whole_TBE[..., 9] = -torch.inf  # padding

    def local() -> torch.Tensor:
        return whole_TBE.chunk(2, -1)[shards.tp_rank].clone().requires_grad_()

    ours_TBE, theirs_TBE, torchs_TBE = local(), local(), whole_TBE.clone().requires_grad_()
    nll_TB, log_TB = vocab_cross_entropy(ours_TBE, targets_TB, shards)
    wanted_TB = cross_entropy(torchs_TBE.flatten(0, 1), targets_TB.flatten(), reduction="none").view(7, 3)
    (nll_TB * dnll_TB + log_TB * dlog_TB).sum().backward()
    (wanted_TB * dnll_TB + torchs_TBE.logsumexp(-1) * dlog_TB).sum().backward()
    mcore_TB = vocab_parallel_cross_entropy(theirs_TBE.clone(), targets_TB)
    gradients = [part.grad for part in (ours_TBE, torchs_TBE)]
    assert gradients[0] is not None and gradients[1] is not None
    return {
        "nll": float((nll_TB - wanted_TB).abs().max()),
        "nll of megatron-core": float((nll_TB - mcore_TB).abs().max()),
        "log partition": float((log_TB - torchs_TBE.logsumexp(-1)).abs().max()),
        "gradient": float((gradients[0] - gradients[1].chunk(2, -1)[shards.tp_rank]).abs().max()),
    }
