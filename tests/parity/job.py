"""What every rank of a layout test does; a module of its own, so that forked ranks can import it by name."""

from pathlib import Path
from typing import Any

import torch

from tests.parity import rig
from transmamba.config import Config
from transmamba.parallel import topology as groups
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
