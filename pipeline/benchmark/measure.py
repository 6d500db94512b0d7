"""Timing in interleaved rounds, and peak memory.

Every round runs every subject once, in a random order, so that what else the machine does hits all of them alike;
ratios are taken within rounds.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

Mark = float | torch.cuda.Event
Interval = tuple[Mark, Mark]


class Subject(Protocol):
    """Something to time."""

    def run(self) -> Mapping[str, list[Interval]]:
        """One step, and by phase the intervals that belong to it."""

    def own_bytes(self) -> int:
        """Bytes between steps, besides the shared base."""


def mark(device: torch.device) -> Mark:
    """This moment: in seconds, or as an event in the GPU's queue, which does not wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(interval: Interval) -> float:
    """Length of an interval, which must be over."""
    start, end = interval
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000.0
    assert isinstance(end, float)
    return end - start


def synchronize(device: torch.device) -> None:
    """Wait for the GPU's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    subjects: Mapping[str, Subject],
    device: torch.device,
    rounds: int,
    warmup: int,
    seed: int,
    announce: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each phase in each round, by subject.

    Args:
        subjects: by name.
        device: that they run on.
        rounds: that count.
        warmup: that do not.
        seed: of the order within rounds.
        announce: called with the number of each round that counts.
    """
    order = random.Random(seed)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in subjects}
    for number in range(warmup + rounds):
        if number >= warmup:
            announce(number - warmup + 1)
        for name in order.sample(list(subjects), len(subjects)):
            synchronize(device)
            phases = subjects[name].run()
            synchronize(device)
            if number >= warmup:
                for phase, intervals in phases.items():
                    samples[name].setdefault(phase, []).append(sum(map(seconds, intervals)))
    return samples


def memory_rise(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch's tensors take while ``run`` runs, above what they took before.

    On the CPU by torch's profiler, since a process's resident memory does not fall when tensors go; scratch memory
    inside kernels is in neither.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=itemgetter("ts"))
    changes = [event["args"] for event in memory]
    if not changes:
        return 0
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]  # what earlier profiles saw and still lives
    return max(change["Total Allocated"] for change in changes) - before


def stored_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages of these tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
