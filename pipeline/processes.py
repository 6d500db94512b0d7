"""Which process am I? From the environment that launchers set, without importing anything heavy."""

from __future__ import annotations

import os


def rank() -> int:
    """Global rank of this process, from the launcher's environment; 0 under plain ``python``."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, from the launcher's environment; 1 under plain ``python``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and speaks on the screen."""
    return rank() == 0


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, accelerate) started this process: then DeepSpeed trains."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
