"""Time in collectives, where DeepSpeed's communication log is on (``distributed.communication_log``).

With it, DeepSpeed waits for the device after every collective that it starts: nothing overlaps any more, and a step is
slower. Collectives of ours and of accelerate (the loss, the number of tokens) do not go through DeepSpeed and are not
counted. On the CPU nothing can be waited for: a collective that runs beside the computation counts only as long as it
takes to start.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed.comm.comm import comms_logger, timers


@dataclass(frozen=True)
class Collective:
    """What one kind of collective has cost this rank."""

    calls: int
    bytes: int
    """Of the messages that this rank gave."""
    seconds: float


def collectives_since_last() -> dict[str, Collective]:
    """By DeepSpeed's name of the operation, since the last call; empty where the log is off.

    The seconds are the timers', not the log's: deepspeed 0.19.8 never clears a timer between two operations
    (comm.py: ``elapsed(reset=False)``), so that each of the log's latencies is the sum of all before it. Read the log's
    own when tests/pipeline/test_observation_throughput.py finds them equal to the timers' sum.
    """
    seconds = {name: timer.elapsed(reset=True) / 1000 for name, timer in timers.get_timers().items()}
    found = {
        name: Collective(
            calls=sum(counted[0] for counted in sizes.values()),
            bytes=sum(int(size) * counted[0] for size, counted in sizes.items()),
            seconds=seconds[name],
        )
        for name, sizes in comms_logger.get_raw_data().items()
    }
    comms_logger.reset_data()
    return found
