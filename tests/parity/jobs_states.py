"""What ranks do with the training state; a module of its own, so that forked ranks can import it by name."""

from pathlib import Path
from typing import Any

import torch

from tests.parity import rig
from transmamba.config import Config
from transmamba.parallel import topology as groups


def trip_job(options: dict[str, Any], source: Path, target: Path, first: int, last: int) -> rig.Trained:
    """Load what a job of any layout saved after `first` steps, save it at once to `target`, and train to `last`."""
    config: Config = rig.config_of(**options)
    job = rig.Job(config, groups.start(config.parallel))
    with torch.no_grad():
        for chunk in job.chunks:
            for tensor in (*chunk.parameters(), *chunk.buffers()):
                tensor.add_(0.1)  # a wrong start, so that what is not restored shows
    job.load(source, first)
    job.save(target, first)
    for step in range(first, last):
        job.step(step)
    job.keep("master", last)
    return job.trained
