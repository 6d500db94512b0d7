"""Which process am I? From the environment that launchers set, without importing anything heavy."""

from __future__ import annotations

import os
import re


def rank() -> int:
    """Global rank of this process, from the launcher's environment; 0 under plain ``python``."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, from the launcher's environment; 1 under plain ``python``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes on this node, from the launcher's environment (deepspeed's name differs from torchrun's)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def is_main() -> bool:
    """Whether this process writes files and speaks on the screen."""
    return rank() == 0


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, accelerate) started this process: then DeepSpeed trains."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ended_by_srun() -> bool:
    """Whether ``srun`` ends this process where another one of its step has failed."""
    return "SLURM_STEP_ID" in os.environ and world_size() > 1


def adopt_slurm_task() -> None:
    """Where SLURM's ``srun`` started this process, be one rank of its step, as under any launcher.

    What is set already stays: MASTER_ADDR for clusters whose node names do not resolve, MASTER_PORT where a port is
    assigned; and all of it under a launcher within the step. What a person types in the shell of ``srun --pty bash``
    is one process by itself, whatever was allocated.
    """
    step = os.environ
    if launched() or "SLURM_STEP_ID" not in step or _has_terminal():
        return
    step["RANK"], step["WORLD_SIZE"] = step["SLURM_PROCID"], step["SLURM_STEP_NUM_TASKS"]
    step["LOCAL_RANK"] = step["SLURM_LOCALID"]
    step["LOCAL_WORLD_SIZE"] = str(_tasks_per_node(step["SLURM_STEP_TASKS_PER_NODE"])[int(step["SLURM_NODEID"])])
    step.setdefault("MASTER_ADDR", _first_host(step["SLURM_STEP_NODELIST"]))
    step.setdefault("MASTER_PORT", str(_port(int(step["SLURM_JOB_ID"]), int(step["SLURM_STEP_ID"]))))


def _has_terminal() -> bool:
    """Whether a person may have typed this command: tasks of ``srun`` have a terminal under ``--pty`` only.

    SLURM_PTY_PORT would not tell: a shell under ``--pty`` hands it on to every step that is started from it.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def _first_host(hosts: str) -> str:
    """Of SLURM's short form of a sorted list, where rank 0 runs: ``gpu[007-010,12],login1`` -> ``gpu007``.

    ``scontrol show hostnames`` would tell, too; within a container there is none.
    """
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", hosts)
    assert first is not None, hosts
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0])


def _tasks_per_node(counts: str) -> list[int]:
    """``2(x3),1`` -> 2, 2, 2, 1."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]


def _port(job: int, step: int) -> int:
    """For the rendezvous of a step: below the ports that Linux hands out by itself (32768 and more).

    No two jobs whose numbers are less than 1,000 apart share a port, nor do the first 12 steps of one: jobs may share
    a host.
    """
    return 20000 + (job + 1000 * step) % 12000
