"""Real trainings in processes of their own that take turns, a few steps at a time, so that they can be compared."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import UserError

WORKER = "pipeline.benchmark.saving_worker"


@dataclass(frozen=True)
class Turn:
    """What one turn took."""

    seconds: float
    processor_seconds: float
    """Of all the process's threads: what other processes do moves it less than the time that passes."""
    saving: float
    """Of them, seconds between the end of a step and the end of its checkpoint; 0 where none was written."""
    watching: float
    """Of them, seconds within the callbacks of heartbeat, status and logs; and processor time of their thread."""


class Watching:
    """Seconds that some callbacks of a trainer take, which stand between two of its own."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0
        self._process = psutil.Process()

    def begins(self) -> None:
        """The first of them is about to be called."""
        self._began = time.perf_counter()

    def ends(self) -> None:
        """The last of them has been."""
        self.seconds += time.perf_counter() - self._began

    def so_far(self) -> float:
        """And what the thread of the heartbeat has computed, to 10 ms."""
        beating = {thread.native_id for thread in threading.enumerate() if thread.name == "heartbeat"}
        times = [times for times in self._process.threads() if times.id in beating]
        return self.seconds + sum(each.user_time + each.system_time for each in times)


class EdgeCallback(TrainerCallback):
    """Called before, or after, what :class:`Watching` times, at each event of a step."""

    def __init__(self, passed: Callable[[], None]) -> None:
        """Args: passed: of a :class:`Watching`."""
        self._passed = passed

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note it, as in the other events."""
        self._passed()

    on_substep_end = on_step_end = on_log = on_save = on_step_begin


class TurnsCallback(TrainerCallback):
    """Stops training before every turn until the other side says so, and tells it how long the last turn took.

    The last callback of its trainer: what the others do at a step's end is within the turn, but not within the saving.
    """

    def __init__(self, steps: int, channel: TextIO, watching: Watching) -> None:
        """Say how turns are.

        Args:
            steps: of one turn.
            channel: to the other side, whose words come by standard input.
            watching: what is told of it.
        """
        self._steps, self._channel, self._watching = steps, channel, watching
        self._watched = 0.0
        self._began = time.perf_counter()
        self._began_processor = time.process_time()
        self._stepped = self._saving = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The end of a turn, checkpoint included, and the wait for the next; without a next one the last step."""
        if state.global_step % self._steps:
            return
        seconds, processor = time.perf_counter() - self._began, time.process_time() - self._began_processor
        watched, self._watched = self._watched, self._watching.so_far()
        turn = seconds, processor, self._saving, self._watched - watched
        print(json.dumps(turn), file=self._channel, flush=True)
        if not sys.stdin.readline():
            control.should_training_stop = True
        self._saving, self._began, self._began_processor = 0.0, time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint may follow."""
        self._stepped = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It is written."""
        self._saving += time.perf_counter() - self._stepped


def free_port() -> int:
    """That nobody listens at, on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Training:
    """A process that trains when it is told to."""

    def __init__(self, job: dict[str, Any], log: Path) -> None:
        """Start it, one rank under DeepSpeed.

        Args:
            job: for :mod:`pipeline.benchmark.saving_worker`.
            log: file for what it prints.
        """
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, json.dumps(job)],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, **single, "MASTER_PORT": str(free_port())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def ready(self) -> None:
        """Wait until it stands before its first step."""
        self._told()

    def turn(self) -> Turn:
        """Let it train one turn."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._told()

    def end(self) -> None:
        """Let it end, or end it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _told(self) -> Turn:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"a training ended before its time:\n{self._log.read_text()[-3000:]}")
        return Turn(*json.loads(line))
