"""How fast optimizer steps are, and what they wait for."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.observation.flops import DataWork
from pipeline.observation.rank_log import LOG


def peak_memory_bytes() -> int:
    """Most memory this process has held: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Throughput(TrainerCallback):
    """Speed since the last line of the log. A step's time is from the request for its data to its end.

    Evaluations and checkpoints are outside. Nothing here waits for the device: trl does, in each micro-batch.
    """

    def __init__(
        self, work: DataWork | None = None, peak_flops: float | None = None, communication: bool = False
    ) -> None:
        """Nothing measured yet.

        Args:
            work: FLOPs per token of the data; None where they are not known.
            peak_flops: FLOP/s that all ranks' devices together can reach at most; None where that is not known.
            communication: DeepSpeed's communication log is on.
        """
        self.work = work
        self.peak_flops = peak_flops
        self.communication = communication
        self._started = 0.0
        self._waited_seconds = 0.0
        self._step_seconds = 0.0
        self._tokens: int | None = None  # of the data, at the last line
        self._collectives: Counter[tuple[str, str]] = Counter()  # by operation and what is counted

    def fetched(self, batches: Iterator[Any], tokens: int) -> Iterator[Any]:
        """The batches of one optimizer step, with the time that each takes to come.

        Args:
            batches: of the trainer's data loader.
            tokens: seen so far.
        """
        self._started = time.perf_counter()
        if self._tokens is None:  # not 0 where a run goes on
            self._tokens = tokens
        if self.communication:
            _collectives()  # an evaluation's or a checkpoint's
        return self._timed(batches)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited_seconds += time.perf_counter() - started
            yield batch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer step is done."""
        self._step_seconds += time.perf_counter() - self._started
        if self.communication:
            self._collectives += _collectives()

    def since_last(self, tokens: int) -> dict[str, float]:
        """Numbers of the steps since the last call, for a line of the log.

        Returns:
            ``tokens_per_second`` of the data, over all ranks; ``data_wait``, the share of this rank's time that it
            waited for data; ``communication``, the share in DeepSpeed's collectives, where they are measured;
            ``flops_per_second`` over all ranks, ``mfu`` and ``hfu`` (see :mod:`pipeline.observation.flops`) where they
            are known; ``peak_memory_bytes`` of this rank.
        """
        seconds = max(self._step_seconds, 1e-9)
        speed = (tokens - (self._tokens or 0)) / seconds
        found = {"tokens_per_second": speed, "data_wait": self._waited_seconds / seconds}
        if self.communication:
            found["communication"] = self._communication_seconds() / seconds
        if self.work is not None:
            found["flops_per_second"] = speed * self.work.model
            if self.peak_flops is not None:
                found["mfu"] = speed * self.work.model / self.peak_flops
                found["hfu"] = speed * self.work.hardware / self.peak_flops
        self._tokens, self._step_seconds, self._waited_seconds = tokens, 0.0, 0.0
        return {**found, "peak_memory_bytes": peak_memory_bytes()}

    def _communication_seconds(self) -> float:
        """Since the last call; what each operation took goes to the rank's log."""
        counted, self._collectives = self._collectives, Counter()
        for operation in sorted({operation for operation, _ in counted}):
            numbers = {what: counted[operation, what] for what in ("calls", "bytes", "seconds")}
            LOG.info("collectives", extra={"operation": operation, **numbers})
        return sum(number for (_, what), number in counted.items() if what == "seconds")


def _collectives() -> Counter[tuple[str, str]]:
    """Calls, bytes and seconds of each of DeepSpeed's operations since the last call."""
    from pipeline.observation.communication import collectives_since_last  # DeepSpeed takes seconds to import

    return Counter(
        {
            (operation, what): number
            for operation, collective in collectives_since_last().items()
            for what, number in vars(collective).items()
        }
    )
