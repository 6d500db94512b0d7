"""Bad steps: a loss that is not finite or exactly 0, or a gradient that is not finite.

The loss that counts is the step's, summed over its micro-batches and ranks: one rank's share may hold no trained token.

``stop``: after ``bad_steps`` of them in a row the run ends. ``skip`` leaves their updates out, too. By itself DeepSpeed
leaves out an update whose gradient is not finite, in every engine but float32 without ZeRO; the learning rate then
waits for a step, as it does where fp16's loss scale overflows. For the rest a hook on torch's own optimizer, which all
engines call in the end, takes the gradients away: AdamW passes over a parameter without one, so that neither moments,
step count nor weight decay move. Gradients of zeros would move all three.

In fp16 a gradient that is not finite is everyday business of the loss scale, and no bad step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch.optim import Optimizer

from pipeline.errors import UserError
from pipeline.process.exit_status import INTERRUPTED, STOPPED
from pipeline.process.rank import is_main, rank, world_size
from pipeline.recipe import schema
from pipeline.supervision.ranks import BAD_STEPS_FILE

NO_LOSS = "loss exactly 0"


@dataclass(frozen=True)
class Step:
    """What all ranks know of an optimizer step."""

    number: int
    loss: float
    gradient_norm: float
    """Before clipping; 0 where the engine does not tell."""
    rows: list[int]
    """Rows of the dataset in this rank's share, from 0."""

    def fault(self, float16: bool) -> str:
        """What is wrong with it, in words; "" where nothing is."""
        if not math.isfinite(self.loss):
            return f"loss {self.loss}"
        if self.loss == 0:
            return NO_LOSS
        if not math.isfinite(self.gradient_norm) and not float16:
            return f"gradient norm {self.gradient_norm}"
        return ""


@dataclass(frozen=True)
class Agreement:
    """What ranks agree on at the end of a step."""

    stop: int | None
    """Exit status of the signal that stops the run; None without one."""
    fault: str
    """Of the step."""


def agreed_stop(status: int | None, device: torch.device) -> int | None:
    """The exit status with which all ranks stop, if any rank has one.

    Args:
        status: of the signal that this rank has got.
        device: of the exchange.
    """
    shares = _stop_shares(status, device)
    return _stop_of(*(reduce(shares, "sum") if PartialState().num_processes > 1 else shares).tolist())


def _stop_shares(status: int | None, device: torch.device) -> torch.Tensor:
    """Summed over ranks, they tell whether and how to stop: ``(2,)`` float32."""
    return torch.tensor([status == STOPPED, status == INTERRUPTED], dtype=torch.float32, device=device)


def _stop_of(terminated: float, interrupted: float) -> int | None:
    return INTERRUPTED if interrupted else STOPPED if terminated else None


class StepGuard:
    """Sees each optimizer step of a run. Nothing waits for the device before :meth:`close`.

    Attributes:
        streak: the bad steps in a row until now, oldest first.
        faults: of these, in words.
        bad: bad steps of this attempt.
    """

    def __init__(self, settings: schema.Supervision, float16: bool = False) -> None:
        """Args: settings: the recipe's. float16: the engine scales losses."""
        self.settings, self.float16 = settings, float16
        self.streak: list[Step] = []
        self.faults: list[str] = []
        self.bad = 0
        self._loss: torch.Tensor | None = None
        self._norm: torch.Tensor | float | None = None
        self._hook_norm: torch.Tensor | None = None
        self._rows: list[int] = []
        self._leaves_out: bool | None = None

    def watch(self, optimizer: Optimizer) -> None:
        """Look at each update before it is made. Args: optimizer: torch's, before any engine takes it."""
        optimizer.register_step_pre_hook(self._before_update)

    def loss(self, loss: torch.Tensor) -> None:
        """One pass of the step. Args: loss: its share of the step's, a scalar."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def rows(self, rows: Iterable[int]) -> None:
        """The rows of one micro-batch, counted from 0."""
        self._rows.extend(rows)

    def gradient(self, norm: torch.Tensor | float | None) -> None:
        """The norm of the step's gradient over all ranks, before clipping; None where the engine does not tell."""
        self._norm = norm

    def close(self, number: int, device: torch.device, stop: int | None) -> Agreement:
        """End a step: all ranks exchange their losses, and whether one has been signalled, in one reduction.

        Args:
            number: of the step, from 1.
            device: of the exchange.
            stop: exit status of a signal that this rank has got.
        """
        zero = torch.zeros((), device=device)
        norm = self._norm if self._norm is not None else self._hook_norm
        seen = [
            zero if self._loss is None else self._loss.to(device),
            zero if norm is None else torch.as_tensor(norm, dtype=torch.float32, device=device).detach(),
        ]
        shares = torch.cat([_stop_shares(stop, device), torch.stack(seen)])
        if PartialState().num_processes > 1:
            shares = reduce(shares, "sum")
        terminated, interrupted, loss, norms = shares.tolist()  # the one wait for the device
        step = Step(number, loss / world_size(), norms / world_size(), self._rows)
        trained = self._loss is not None
        self._loss = self._norm = self._hook_norm = self._leaves_out = None
        self._rows = []
        fault = step.fault(self.float16) if trained else ""
        if fault:
            self.bad += 1
            self.streak.append(step)
            self.faults.append(fault)
        else:
            self.streak.clear()
            self.faults.clear()
        return Agreement(_stop_of(terminated, interrupted), fault)

    def too_many(self) -> bool:
        """Whether the run has to end: alike on all ranks."""
        return len(self.streak) >= self.settings.bad_steps

    def spoilt(self) -> bool:
        """Whether the weights may be spoilt: an update that is not finite was not left out."""
        return self.settings.on_bad_step == "stop" and any(fault != NO_LOSS for fault in self.faults)

    def error(self, folder: Path, newest: str) -> UserError:
        """Write down the rows of the streak, from all ranks, and what to tell the user; every rank calls it.

        Args:
            folder: for ``bad-steps.jsonl``.
            newest: where the last good checkpoint is, in words.
        """
        own = [
            {
                "step": step.number,
                "fault": fault,
                "loss": str(step.loss),
                "gradient_norm": str(step.gradient_norm),
                "rank": rank(),
                "rows": [row + 1 for row in step.rows],
            }
            for step, fault in zip(self.streak, self.faults, strict=True)
        ]
        records: list[dict[str, Any]] = gather_object(own) if world_size() > 1 else own
        file = folder / BAD_STEPS_FILE
        if is_main():
            with file.open("a") as lines:
                lines.writelines(json.dumps(record) + "\n" for record in records)
        rows = sorted({row for record in records for row in record["rows"]})
        listed = ", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else "")
        told = "; ".join(f"step {step.number}: {fault}" for step, fault in zip(self.streak, self.faults, strict=True))
        return UserError(
            f"{len(self.streak)} bad steps in a row (supervision.bad_steps: {self.settings.bad_steps}): {told}.\n"
            f"Their training rows, counted from 1: {listed}; all of them, with the ranks that had them, in {file}.\n"
            f"{newest}\n"
            "Look at these rows first. If they are right: training.learning_rate lower, training.warmup_ratio higher, "
            "base.dtype=bfloat16 in place of float16, or supervision.on_bad_step=skip where single rows are at fault."
        )

    def _before_update(self, optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Note the gradient's norm, for engines that do not tell it, and take a bad gradient away."""
        if self._loss is None:  # DeepSpeed allocates its state by a step before training
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._norm is None and self._leaves_out is None and gradients:
            self._hook_norm = torch.nn.utils.get_total_norm(gradients).float()
        if self.settings.on_bad_step != "skip":
            return
        if self._leaves_out is None:  # ZeRO-3 calls once for each of its groups
            self._leaves_out = self._agreed_bad()
        if self._leaves_out:
            for parameter in parameters:
                parameter.grad = None

    def _agreed_bad(self) -> bool:
        """Whether the step is bad by its loss or by what any rank's optimizer is about to use."""
        assert self._loss is not None
        norm = self._norm if self._norm is not None else self._hook_norm
        shares = torch.stack([self._loss, torch.as_tensor(0.0 if norm is None else norm).to(self._loss)])
        if PartialState().num_processes > 1:
            shares = reduce(shares, "sum")
        loss, norms = shares.tolist()
        return bool(Step(0, loss, norms, []).fault(self.float16))
