"""Tensors on disk, whole or not at all for whoever reads, and readable by whom the user's umask lets read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors' ``save_file``, whose files the owner alone may read (0600 in 0.8), with the mode of any new file.

    Args:
        file: is replaced.
        tensors: contiguous, sharing no storage.
        metadata: for the file's header.

    Raises:
        OSError, SafetensorError: the disk is full or broken; the old file is as it was, and where there was none,
            there is none. Synchronising is the caller's.
    """
    part = file.with_name(file.name + ".part")  # never the file itself: an empty one would pass for an adapter
    try:
        part.unlink(missing_ok=True)  # of a killed process, with whatever mode
        part.touch()
        mode = part.stat().st_mode
        save_file(dict(tensors), str(part), metadata=metadata)
        part.chmod(mode)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)  # what a failure leaves
