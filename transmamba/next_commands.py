"""Commands that a person may type next, so that a shell outside the environment finds them."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def train_again(folder: Path) -> str:
    """What continues a run: torchrun for several ranks of one machine; jobs of several know their launcher better."""
    n_ranks = os.environ.get("WORLD_SIZE", "1")
    is_torchrun = n_ranks != "1" and n_ranks == os.environ.get("LOCAL_WORLD_SIZE")
    starter = ["torchrun", "--nproc-per-node", n_ranks] if is_torchrun else ["python"]
    return installed(*starter, "-m", "transmamba.train", "--config", str(folder / "config.yaml"))


def installed(program: str, *arguments: str) -> str:
    """A call of a program of this environment: with its folder, unless the shell finds this one by its name."""
    here = Path(sys.executable).parent
    is_found = shutil.which("transmamba") == str(here / "transmamba")
    return shlex.join([program if is_found else f"{os.path.relpath(here)}/{program}", *arguments])
