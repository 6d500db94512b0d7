"""Bytes that a run's checkpoints take on disk, by arithmetic: ``pipeline/checkpoint/files.py`` says what is in one."""

from __future__ import annotations

import math

from pipeline.preflight.estimate import PLAIN, ModelShape, Numerics

ENTRY_BYTES = 140
"""Of one tensor in the header of a safetensors file: name, dtype, shape, offsets. Names have about 90 characters."""
RANDOM_BYTES = 13_500
"""State of one rank's generators in ``rng.json``: 2,500 bytes of Python's and of NumPy's, 5,056 of torch's, in text."""
JSON_BYTES = 7_000
"""The other JSON files of a checkpoint, together."""


def checkpoint_bytes(
    shape: ModelShape, numerics: Numerics, zero: int | None, processes: int, resumable: bool = True
) -> int:
    """Bytes of one checkpoint: the adapter, its float32 masters and moments, and small files.

    Nothing of it depends on the ZeRO stage or is written twice; only the generators' states grow with the ranks.

    Args:
        shape: of base and adapter.
        numerics: how they are stored.
        zero: stage, or ``PLAIN``, whose adapter is float32 and its own master.
        processes: ranks.
        resumable: false for SFTConfig's ``save_only_model``, which leaves the optimizer and the generators out.
    """
    trained = shape.adapter_parameters
    width = 4 if zero is PLAIN else numerics.width
    importances = trained * numerics.importance_bytes
    size = trained * width + shape.adapter_tensors * ENTRY_BYTES + importances + JSON_BYTES
    if not resumable:
        return size
    masters = 4 if width < 4 else 0
    entries = (masters + numerics.moments_bytes) // 4 + 1  # of each parameter, with its count of steps
    return (
        size
        + trained * (masters + numerics.moments_bytes)
        + entries * shape.adapter_tensors * ENTRY_BYTES
        + processes * RANDOM_BYTES
    )


def checkpoints_on_disk(
    strategy: str, interval: float, steps: int, epochs: float, limit: int | None, best: bool = False
) -> int:
    """Most checkpoints that lie on disk at once: the newest, the best, and the one that is being written.

    Args:
        strategy: when they are saved: ``no``, ``epoch`` or ``steps``.
        interval: steps from one to the next, where they are saved by steps; below 1 a share of all steps.
        steps: of the whole run.
        epochs: of the whole run.
        limit: SFTConfig's ``save_total_limit``, the newest that are kept.
        best: whether the best by validation loss is kept besides.
    """
    if strategy == "no":
        return 0
    every = interval if interval >= 1 else max(math.ceil(interval * steps), 1)
    saves = math.ceil(epochs) if strategy == "epoch" else math.ceil(steps / every)
    return saves if limit is None else min(saves, limit + 1 + best)


def optimizer_bytes(optimizer: str, arguments: str | None) -> int:
    """Bytes of optimizer state per parameter, its counters apart; AdamW's for a name that is not known.

    Args:
        optimizer: SFTConfig's ``optim``.
        arguments: its ``optim_args``, which may give SGD and RMSprop a momentum.
    """
    name = optimizer.removeprefix("paged_")
    moments = next((count for known, count in _MOMENTS.items() if name.startswith(known)), 2)
    if name in ("sgd", "rmsprop") and "momentum=" in (arguments or ""):
        moments += 1
    width = 1 if "8bit" in name else 4
    return moments * width


_MOMENTS = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1, "ademamix": 3}
"""Numbers per parameter. Adafactor's are per row and column."""
