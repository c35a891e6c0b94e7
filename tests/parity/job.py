"""What every rank of a layout test does; a module of its own, so that forked ranks can import it by name."""

from typing import Any

from tests.parity import rig
from transmamba.config import Config
from transmamba.parallel import topology as groups


def job(options: dict[str, Any], n_steps: int) -> rig.Trained:
    """Train the rig's model in the layout of this process's group."""
    config: Config = rig.config_of(**options)
    return rig.train(config, groups.start(config.parallel), n_steps)
