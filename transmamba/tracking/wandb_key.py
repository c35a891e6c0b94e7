"""Whether wandb can log in, found out without importing it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from transmamba.config import WandbConfig


def has_key(environ: Mapping[str, str]) -> bool:
    """Whether a key of wandb is configured: WANDB_API_KEY, or an entry that `wandb login` has left in netrc."""
    if environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(environ.get("NETRC") or Path(environ.get("HOME", "/nonexistent")) / ".netrc")
    try:
        return "wandb" in netrc.read_text(errors="replace")
    except OSError:
        return False


def settled_mode(config: WandbConfig, environ: Mapping[str, str]) -> Literal["online", "offline", "disabled"]:
    """What `wandb.mode=auto` comes to here: online with a key, else offline."""
    if config.mode == "auto":
        return "online" if has_key(environ) else "offline"
    return config.mode


def mode_line(config: WandbConfig, folder: Path, environ: Mapping[str, str]) -> str:
    """The mode in words, and how curves that stay here get to the server later."""
    mode = settled_mode(config, environ)
    if mode != "offline":
        return mode
    why = "offline: no key is configured; " if config.mode == "auto" else "offline; "
    return f"{why}`wandb sync {folder}/wandb/offline-run-*` sends it"
