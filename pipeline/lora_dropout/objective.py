"""Equation 7: each example's loss is averaged over N mask instances.

``L(x) = 1/N sum_n loss(x; theta_0 + delta_theta(m_n))``. Two ways to draw the masks, with the same expected loss and
gradient at given weights:

- *instance* (the paper): N masks, each shared by the whole micro-batch.
- *example*: every example draws its own N masks.

Both run as a batch of copies, copy-major, so that each weight is read (and under ZeRO-3 gathered) once; instances
can also run one after another. The functions give the copies and the coordinates of their masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def instance_coordinates(step: int, micro_batch: int, rank: int, ranks: int, instances: int) -> list[tuple[int, ...]]:
    """Coordinates of the N masks of one micro-batch, distinct over steps, micro-batches and ranks.

    Args:
        step: optimizer step, from 0.
        micro_batch: within the step, from 0.
        rank, ranks: of the data-parallel group.
        instances: N.
    """
    return [(step, micro_batch * ranks + rank, instance) for instance in range(instances)]


def example_coordinates(epoch: int, rows: Sequence[int], instances: int) -> list[tuple[int, ...]]:
    """Coordinates of the masks of ``instances`` copies of a batch, copy-major: ``instances * len(rows)`` of them.

    They name the dataset row and not its place in a batch, so that ranks against accumulation changes nothing.
    """
    return [(epoch, row, draw) for draw in range(instances) for row in rows]


def copied_rows(batch: Mapping[str, torch.Tensor], copies: int) -> dict[str, torch.Tensor]:
    """Each ``(B, ...)`` tensor as ``(copies * B, ...)``, copy-major: the group-major order of the masks."""
    return {name: tensor.repeat(copies, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
