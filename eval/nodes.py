"""Several nodes: the adapter that the first process sees, on every node."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.adapter.files import CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from pipeline.checkpoint.files import sha256_of
from pipeline.errors import UserError
from pipeline.run.folder import RECIPE_FILE

FILES = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, RECIPE_FILE)
"""What an evaluation reads of an adapter."""


@contextmanager
def adapter_on_every_node(adapter: Path, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """Context with the folder in which this process finds the adapter that the first process finds in ``adapter``.

    Where training wrote to a disk of the first node, the others have nothing there, or the adapter of an earlier run.
    They get a copy in a temporary folder, written by one process of each such node; what is there stays untouched.

    Raises:
        UserError: on all processes, where the first finds no adapter and another does.
    """
    own = {name: sha256_of(adapter / name) for name in FILES if (adapter / name).is_file()}
    seen = _gathered((socket.gethostname(), own), group)
    first_host, wanted = seen[0]
    if group is None or all(found == wanted for _, found in seen):
        yield adapter
        return
    if not wanted:
        raise UserError(f"{adapter}: no adapter here on {first_host}, where the first process runs")
    contents = [{name: (adapter / name).read_bytes() for name in wanted} if own == wanted else {}]
    dist.broadcast_object_list(contents, src=dist.get_global_rank(group, 0), group=group)
    lacking = [(rank, host) for rank, (host, found) in enumerate(seen) if found != wanted]
    writers = {host: rank for rank, host in reversed(lacking)}  # the first process of each
    rank = dist.get_rank(group)
    with ExitStack() as stack:
        copy = None
        if rank in writers.values():
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-dropout-"))
            copy = Path(folder) / adapter.name
            copy.mkdir()
            for name, content in contents[0].items():
                (copy / name).write_bytes(content)
        copies = _gathered(copy, group)
        yield adapter if own == wanted else copies[writers[socket.gethostname()]]
        dist.barrier(group)  # else the writer could be done, and its copy gone, while another process reads it


def _gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every process's value, by rank."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
