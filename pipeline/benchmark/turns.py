"""Real trainings in processes of their own that take turns, a few steps at a time, so that they can be compared."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

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


class TurnsCallback(TrainerCallback):
    """Stops training before every turn until the other side says so, and tells it how long the last turn took.

    The last callback of its trainer: what the others do at a step's end is within the turn, but not within the saving.
    """

    def __init__(self, steps: int, channel: TextIO) -> None:
        """Args: steps: of one turn. channel: to the other side, whose words come by standard input."""
        self._steps, self._channel = steps, channel
        self._began = time.perf_counter()
        self._began_processor = time.process_time()
        self._stepped = self._saving = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The end of a turn, checkpoint included, and the wait for the next; without a next one the last step."""
        if state.global_step % self._steps:
            return
        taken = time.perf_counter() - self._began, time.process_time() - self._began_processor, self._saving
        print(json.dumps(taken), file=self._channel, flush=True)
        if not sys.stdin.readline():
            control.should_training_stop = True
        self._saving, self._began, self._began_processor = 0.0, time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint may follow."""
        self._stepped = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It is written."""
        self._saving += time.perf_counter() - self._stepped


class Training:
    """A process that trains when it is told to."""

    def __init__(self, job: dict[str, Any], log: Path) -> None:
        """Start it, one rank under DeepSpeed.

        Args:
            job: for :mod:`pipeline.benchmark.saving_worker`.
            log: file for what it prints.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, json.dumps(job)],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, **single, "MASTER_PORT": str(port)},
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
