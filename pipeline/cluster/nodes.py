"""Several nodes: what one of them finds wrong, all are told; is a folder of one the same on the others?"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import gather_object

from pipeline.errors import UserError
from pipeline.process.rank import launched, local_world_size, rank, world_size


@contextmanager
def told_to_other_nodes(join: Callable[[], object]) -> Iterator[None]:
    """Context of what each process does by itself before :func:`check_same_everywhere`: where one fails, all do.

    Launchers end the processes of their own node. Without a word to the others, they wait for half an hour for a node
    whose data file is missing.

    Args:
        join: makes the process group.

    Raises:
        UserError: as before, once the other nodes know.
    """
    try:
        yield
    except UserError as error:
        if world_size() > local_world_size():
            problem = str(error).splitlines()[0]
            print(f"(process {rank()} on {socket.gethostname()}) {problem} (the other nodes are told)", flush=True)
            join()
            _gathered(str(error), "")
        raise


def check_same_everywhere(folder: Path, found: str) -> None:
    """Refuse to go on in a folder that is another one on another node. Every process calls it, in a process group.

    A run that begins may have its folder on rank 0's node alone; one that goes on reads its checkpoint on every rank.

    Args:
        folder: of the run.
        found: what this process sees there, in words.

    Raises:
        UserError: on all of them, with what each host has; or with what another node failed of.
    """
    everyone = _gathered("", found)
    for host, number, problem, _ in everyone:
        if problem:
            raise UserError(f"(process {number} on {host}) {problem}")
    if len({seen for *_, seen in everyone}) <= 1:
        return
    listed = "\n".join(f"  {host} (process {number}): {seen}" for host, number, _, seen in everyone)
    raise UserError(
        f"output: {folder} is not the same on all nodes:\n{listed}\n"
        "A run that goes on is read by every process: put output on a file system that all nodes share, or copy the "
        "folder to every node. To begin anew, choose another name, or pass --overwrite."
    )


def _gathered(problem: str, found: str) -> list[tuple[str, int, str, str]]:
    """Host, rank, problem and finding of every process; nothing under plain ``python``."""
    return gather_object([(socket.gethostname(), rank(), problem, found)]) if launched() else []
