"""Runs that end badly, each with two ranks, all at once, in real processes that this one forks.

    python supervision_worker.py FOLDER [SCENARIO ...]

Importing torch takes seconds, so it is done once. What a scenario's ranks print is in ``FOLDER/<scenario>/<rank>.txt``,
what became of them in ``FOLDER/<scenario>.json``: exit status and seconds since the fault, rank by rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from accelerate import PartialState
from ports import free_port

from launch.command import told_errors
from pipeline.errors import UserError
from pipeline.recipe import schema
from pipeline.supervision.bad_steps import StepGuard
from pipeline.supervision.supervisor import Supervisor, supervised
from pipeline.supervision.watch import watching

SETTINGS = schema.Supervision(heartbeat_seconds=0.5)
FAULT = 3
"""The step at which it happens."""


def bug(rank: int) -> None:
    if rank == 1:
        raise ValueError("row 7 has no tokens")


def bad_input(rank: int) -> None:
    if rank == 1:
        raise UserError("disk full\nDelete something.")


def same_bug(rank: int) -> None:
    raise ValueError(f"found on rank {rank}")


def killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hung(rank: int) -> None:
    """Rank 0 waits for it in a collective."""
    if rank == 1:
        time.sleep(1000)


def terminated(rank: int) -> None:
    """One rank is signalled; both stop."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


def interrupted(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGINT)


def twice(rank: int) -> None:
    """Signalled, and again 4 s later, while both are blocked."""
    if rank == 1:
        time.sleep(1000)


def blocked(rank: int) -> None:
    """Signalled once, while both are blocked."""
    if rank == 1:
        time.sleep(1000)


SCENARIOS: dict[str, Callable[[int], None]] = {
    scenario.__name__: scenario
    for scenario in (bug, bad_input, same_bug, killed, hung, terminated, interrupted, twice, blocked)
}
SIGNALS = {"twice": 2, "blocked": 1}
"""SIGTERMs that both ranks get: 1 s after the fault, and 4 s after that."""


def loop(supervisor: Supervisor, folder: Path, rank: int, fault: Callable[[int], None]) -> None:
    """What a trainer does at each step, as far as supervision sees it."""
    guard, watch = StepGuard(SETTINGS), supervisor.watch
    for step in range(1, 1000):
        supervisor.pulse.progress("training", step, 1000)
        if step == FAULT:
            (folder / "fault").write_text(str(time.time()))
            fault(rank)
        guard.loss(torch.tensor(1.0))
        agreement = guard.close(step, torch.device("cpu"), watch.stop.status if watch.stop else None)
        if agreement.stop is not None:
            watch.agreed(agreement.stop)
            (folder / f"saved-{rank}").write_text(str(step))
            watch.kept = f"at step {step}"
            raise watch.interrupted()
        time.sleep(0.02)


def run_rank(folder: Path, name: str, rank: int, port: str) -> None:
    """One rank of a scenario, as a command runs it."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    screen = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    torch.set_num_threads(1)
    settings = SETTINGS.model_copy(update={"hang_minutes": 0.06}) if name == "hung" else SETTINGS
    with watching() as watch, told_errors(watch):
        PartialState(cpu=True)
        with supervised(folder, settings) as supervisor, watch.deferring():
            loop(supervisor, folder, rank, SCENARIOS[name])
        dist.destroy_process_group()
    os._exit(0)


def start(folder: Path, name: str) -> dict[int, int]:
    """Fork both ranks; their process numbers."""
    folder.mkdir()
    port = free_port()
    numbers = {}
    for rank in (0, 1):
        number = os.fork()
        if number == 0:
            run_rank(folder, name, rank, port)
        numbers[rank] = number
    return numbers


def main(root: Path, names: list[str]) -> None:
    """All scenarios at once."""
    running = {name: start(root / name, name) for name in names}
    began = {name: 0.0 for name in names}
    signals = {name: count for name, count in SIGNALS.items() if name in names}
    ended: dict[str, dict[str, tuple[int, float]]] = {name: {} for name in names}
    due = dict.fromkeys(signals, 0.0)
    while any(len(found) < 2 for found in ended.values()):
        time.sleep(0.05)
        for name, numbers in running.items():
            fault = root / name / "fault"
            if not began[name] and fault.exists() and fault.read_text():
                began[name] = float(fault.read_text())
                due[name] = time.time() + 1.0
            if began[name] and signals.get(name) and time.time() > due[name]:
                signals[name] -= 1
                due[name] = time.time() + 4.0
                began[name] = time.time()
                for number in numbers.values():
                    os.kill(number, signal.SIGTERM)
            for rank, number in numbers.items():
                if str(rank) not in ended[name]:
                    found, status = os.waitpid(number, os.WNOHANG)
                    if found:
                        ended[name][str(rank)] = (os.waitstatus_to_exitcode(status), time.time() - began[name])
    for name, found in ended.items():
        (root / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(SCENARIOS))
