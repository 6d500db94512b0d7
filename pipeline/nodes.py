"""Several nodes: is a folder of one the same on the others?"""

from __future__ import annotations

import socket
from pathlib import Path

from accelerate.utils import gather_object

from pipeline.errors import UserError
from pipeline.processes import launched, rank


def check_same_everywhere(folder: Path, found: str) -> None:
    """Refuse to go on in a folder that is another one on another node. Every process calls it, in a process group.

    A run that begins may have its folder on rank 0's node alone; one that goes on reads its checkpoint on every rank.

    Args:
        folder: of the run.
        found: what this process sees there, in words.

    Raises:
        UserError: on all of them, with what each host has.
    """
    everyone = gather_object([(socket.gethostname(), rank(), found)]) if launched() else []
    if len({seen for _, _, seen in everyone}) <= 1:
        return
    listed = "\n".join(f"  {host} (process {number}): {seen}" for host, number, seen in everyone)
    raise UserError(
        f"output: {folder} is not the same on all nodes:\n{listed}\n"
        "A run that goes on is read by every process: put output on a file system that all nodes share, or copy the "
        "folder to every node. To begin anew, choose another name, or pass --overwrite."
    )
