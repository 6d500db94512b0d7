"""Where a result comes from: recipe, data, code, versions, machine."""

from __future__ import annotations

import hashlib
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.base import base_identity
from pipeline.process.rank import launched, world_size
from pipeline.recipe import Recipe, recipe_to_yaml
from pipeline.redaction import command_line

PACKAGES = (
    "lora-dropout",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "lm-eval",
    "safetensors",
)


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Installed versions of what can change a number."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def git_state() -> dict[str, object] | None:
    """Commit and whether the work tree differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],  # else `status` writes its index
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, object]:
    """Host, processor and accelerators."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
    }


def provenance(recipe: Recipe, data: list[dict[str, object]]) -> dict[str, Any]:
    """Everything needed to repeat a training run. Hub tokens and the environment are not in it.

    Args:
        recipe: resolved.
        data: paths, rows and fingerprints, from :func:`pipeline.data.load_splits`.
    """
    return {
        "recipe_sha256": hashlib.sha256(recipe_to_yaml(recipe).encode()).hexdigest(),
        "seed": recipe.seed,
        "base": base_identity(recipe.base),
        "data": data,
        "versions": versions(),
        "git": git_state(),
        "machine": machine(),
        "processes": world_size(),
        "engine": f"DeepSpeed ZeRO-{recipe.distributed.zero}" if launched() else "one process, no DeepSpeed",
        "command": command_line(sys.argv),
        "started": now(),
    }
