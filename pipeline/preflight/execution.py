"""Mask instances as one batch or one after another: chosen from the memory that each way is expected to take."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from accelerate.utils import gather_object

from pipeline.errors import UserError
from pipeline.preflight.estimate import PLAIN, ModelShape, RankMemory, in_words
from pipeline.preflight.numbers import Execution, flat, memory_of
from pipeline.process.rank import launched, local_world_size, world_size
from pipeline.recipe import Recipe
from pipeline.recipe.training import resolved_training

FITS = 0.9
"""Share of the free memory that an estimate may take: it is rough, and the allocator's fragments come on top."""
CLEARLY = 1.25
"""An estimate so many times what a device has is no matter of roughness."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one rank's device; on a CPU its share of the host's."""

    device: str
    free: int
    total: int


@dataclass(frozen=True)
class Choice:
    """How mask instances run, and why."""

    execution: Execution
    reason: str
    """One line for the log."""
    warning: str | None = None
    """Where even this is expected to take more than is free."""


def device_memory(processes_here: int = 1) -> DeviceMemory:
    """Of this process's device.

    Args:
        processes_here: ranks that share this host's memory, where it trains on the CPU.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(torch.cuda.get_device_name(), free, total)
    memory = psutil.virtual_memory()
    return DeviceMemory("CPU", memory.available // processes_here, memory.total // processes_here)


def least_device_memory() -> DeviceMemory:
    """Of the rank that has least, so that all ranks decide alike. Every rank calls it, once training is set up."""
    own = device_memory(local_world_size())
    everyone = gather_object([(own.free, own.total)]) if launched() else [(own.free, own.total)]
    return DeviceMemory(own.device, min(free for free, _ in everyone), min(total for _, total in everyone))


def chosen_execution(
    recipe: Recipe,
    shape: ModelShape,
    mean_length: float,
    device: DeviceMemory,
    zero: int | None,
    processes: int,
) -> Choice:
    """How the recipe's instances run on such a device.

    Args:
        recipe: the experiment.
        shape: of base and adapter.
        mean_length: tokens per example.
        device: before the base is loaded.
        zero: stage in force, or ``PLAIN``.
        processes: ranks.

    Raises:
        UserError: masks that one weight tensor cannot have at once; instances that do not fit.
    """
    check_shared_weight(recipe, shape)
    dropout = recipe.adapter.dropout
    batched, sequential = (
        memory_of(recipe, shape, zero, processes, execution, mean_length) for execution in ("batched", "sequential")
    )
    has = f"{device.device} has {in_words(device.free)} free of {in_words(device.total)}"
    if dropout.instances == 1:
        return Choice("batched", "one instance", _shortage(batched, device))
    sizes = (
        f"a step takes about {in_words(batched.step_peak)} batched, {in_words(sequential.step_peak)} sequential; {has}"
    )
    if dropout.execution == "sequential" or (dropout.execution == "auto" and shape.shared_weight):
        why = "as asked" if dropout.execution == "sequential" else f"{shape.shared_weight} has one weight for all rows"
        return Choice("sequential", f"sequential ({why}): {sizes}", _shortage(sequential, device))
    if dropout.execution == "auto":
        fits = batched.step_peak <= FITS * device.free
        return Choice(
            "batched" if fits else "sequential",
            f"{'batched' if fits else 'sequential'} (auto): {sizes}",
            _shortage(batched if fits else sequential, device),
        )
    if batched.step_peak > CLEARLY * device.total:
        micro_batch = resolved_training(recipe)["per_device_train_batch_size"]
        raise UserError(
            f"adapter.dropout.instances: {dropout.instances} copies of {micro_batch} rows as one batch take about "
            f"{in_words(batched.step_peak)} per rank, and {has}.\n"
            f"Set adapter.dropout.execution=sequential (about {in_words(sequential.step_peak)}, same loss) or auto, or "
            "lower training.per_device_train_batch_size and raise gradient_accumulation_steps by as much."
        )
    return Choice("batched", f"batched (as asked): {sizes}", _shortage(batched, device))


def check_shared_weight(recipe: Recipe, shape: ModelShape) -> None:
    """A layer whose weight is one tensor for all rows of a batch can have one mask per pass.

    Raises:
        UserError: the recipe needs several.
    """
    dropout, micro_batch = recipe.adapter.dropout, resolved_training(recipe)["per_device_train_batch_size"]
    if shape.shared_weight is None:
        return
    reason = f"{shape.shared_weight} has one weight for all rows of a batch, hence one mask"
    several = micro_batch > 1 or resolved_training(recipe)["packing"]
    if dropout.sampling == "example" and several:
        how = "packed rows hold several" if flat(recipe) else f"a micro-batch has {micro_batch}"
        raise UserError(
            f"adapter.dropout.sampling: every example draws its own mask, and {how}; but {reason}.\n"
            "Set adapter.dropout.sampling=instance, or training.per_device_train_batch_size=1 without packing."
        )
    if dropout.execution == "batched" and dropout.instances > 1:
        raise UserError(
            f"adapter.dropout.execution: batched runs {dropout.instances} masks in one pass; but {reason}.\n"
            "Set adapter.dropout.execution to sequential or auto."
        )


def _shortage(memory: RankMemory, device: DeviceMemory) -> str | None:
    if memory.peak <= device.free:
        return None
    return (
        f"training is expected to take about {in_words(memory.peak)} per rank, and {device.device} has "
        f"{in_words(device.free)} free of {in_words(device.total)} (see launch/check.py)"
    )


def execution_in_force(recipe: Recipe, shape: ModelShape, mean_length: float) -> Choice:
    """:func:`chosen_execution` where training starts; every rank calls it, before the base is loaded."""
    zero = recipe.distributed.zero if launched() else PLAIN
    return chosen_execution(recipe, shape, mean_length, least_device_memory(), zero, world_size())
