"""What ranks tell each other through the run's folder: signs of life, and which of them failed first.

ranks/rank-<r>.json     where rank r is, written every ``supervision.heartbeat_seconds``
ranks/rank-<r>.failed   the traceback of rank r, which died of an exception
ranks/failed.json       which rank failed first: all others end because of it

Collectives do not tell why they end: NCCL's wait for ever, gloo's report a closed connection. Where the folder is on
another disk on each node, ranks know of those on their own node.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from pipeline.process.rank import local_world_size, rank, world_size
from pipeline.run.whole_file import write_text
from pipeline.supervision.launcher import is_gone
from pipeline.supervision.pulse import Pulse

RANKS_FOLDER = "ranks"
FIRST_FAILURE_FILE = "failed.json"
BAD_STEPS_FILE = "bad-steps.jsonl"


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt."""

    rank: int
    """That failed; another one may have told it."""
    status: int
    """That all ranks exit with."""
    words: str
    """One line, after "rank 1 "."""


def clear_ranks(folder: Path) -> None:
    """Take away what an earlier attempt has left; before any rank of this one writes.

    Logs (``rank-<r>.jsonl``) and what bad steps held stay.
    """
    ranks = folder / RANKS_FOLDER
    ranks.mkdir(parents=True, exist_ok=True)
    for pattern in ("rank-*.json", "rank-*.failed", FIRST_FAILURE_FILE, "*.part"):
        for file in ranks.glob(pattern):
            file.unlink(missing_ok=True)


def first_on_node() -> bool:
    """Whether this rank prepares what its node's ranks share."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Ranks:
    """The files of this rank, and what it reads of the others."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: of the run; :func:`clear_ranks` has prepared it on every node."""
        self.folder = folder / RANKS_FOLDER
        self._process = psutil.Process()
        self._neighbours: dict[int, tuple[int, psutil.Process | None]] = {}
        self._killed_before = kernel_kills()

    def write(self, pulse: Pulse, call: str) -> None:
        """This rank's sign of life.

        Raises:
            OSError: the file cannot be written.
        """
        told = {
            "rank": rank(),
            "host": socket.gethostname(),
            "pid_namespace": _pid_namespace(),
            "pid": self._process.pid,
            "created": self._process.create_time(),
            "phase": pulse.phase,
            "step": pulse.step,
            "steps": pulse.steps,
            "call": call,
            "idle_seconds": round(time.monotonic() - pulse.progressed, 1),
            "time": time.time(),
            "exit_status": pulse.exit_status,
            "message": pulse.message,
        }
        write_text(self._file(rank()), json.dumps(told), durable=False)

    def told(self, other: int) -> dict[str, Any] | None:
        """The last sign of life of a rank; None where there is none, or where it cannot be read."""
        try:
            found = json.loads(self._file(other).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("rank") == other else None

    def fail(self, failure: Failure, stack: str = "") -> Failure:
        """Tell the others of a failure; the first one told stands.

        Args:
            failure: of this rank, or of one that it has lost.
            stack: traceback of this rank, for ``rank-<r>.failed``.

        Returns:
            The first failure of this attempt. Where nothing can be written, the one given.
        """
        try:
            if stack:
                (self.folder / f"rank-{rank()}.failed").write_text(stack)
            part = self.folder / f".failed-{rank()}.part"
            part.write_text(json.dumps(asdict(failure)))
            try:
                os.link(part, self.folder / FIRST_FAILURE_FILE)  # fails where it exists, over NFS too
            finally:
                part.unlink()
        except FileExistsError:
            return self.first_failure() or failure
        except OSError:  # a full disk, or one without hard links
            return self.first_failure() or failure
        return failure

    def first_failure(self) -> Failure | None:
        """What a rank has told of this attempt."""
        try:
            found = json.loads((self.folder / FIRST_FAILURE_FILE).read_text())
            return Failure(**{field.name: found[field.name] for field in fields(Failure)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def lost(self) -> Failure | None:
        """A rank of this machine that has ended without a word: killed."""
        self._meet()
        for other, (number, process) in self._neighbours.items():
            if process is not None and not is_gone(process):
                continue
            told = self.told(other)  # after it was gone: what ends by itself says so first
            if told is None or told["exit_status"] is None:
                return Failure(other, 1, f"(process {number}) was killed (SIGKILL){self._why()}")
            if told["exit_status"] != 0:
                return Failure(other, told["exit_status"], f"(process {number}) has ended: {told['message']}")
        return None

    def _why(self) -> str:
        if kernel_kills() > self._killed_before:
            return ": out of memory, the kernel has killed a process for it"
        return "; out of memory? The kernel counts no such kill"

    def _meet(self) -> None:
        """Learn the processes of the ranks of this machine, which write their files when they start.

        One that its launcher has reaped before this first look is None.
        """
        here = rank() - int(os.environ.get("LOCAL_RANK", "0"))
        for other in range(here, min(here + local_world_size(), world_size())):
            if other == rank() or other in self._neighbours:
                continue
            told = self.told(other)
            if told is None or (told["host"], told.get("pid_namespace")) != (socket.gethostname(), _pid_namespace()):
                continue
            try:
                process = psutil.Process(told["pid"])
            except psutil.NoSuchProcess:
                self._neighbours[other] = (told["pid"], None)
                continue
            if abs(process.create_time() - told["created"]) < 1:  # else another's number, or a clock that was set
                self._neighbours[other] = (told["pid"], process)

    def _file(self, of: int) -> Path:
        return self.folder / f"rank-{of}.json"


def _pid_namespace() -> str:
    """Containers may number their processes each for itself, and machines may share a name, but not a boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def kernel_kills() -> int:
    """Processes that the kernel of this machine has killed for memory since it booted; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def is_of_collective(error: Exception) -> bool:
    """Whether it may be the end of another rank: torch raises plain ``RuntimeError`` from gloo."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in words for word in ("gloo", "nccl", "connection", "socket", "process group", "store")
    )


def speaks_first() -> str:
    """How a line of this rank begins, where there are several."""
    return f"rank {rank()}: " if world_size() > 1 else ""
