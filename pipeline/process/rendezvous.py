"""Where the processes of a run meet: a port of rank 0's machine, which the launcher or SLURM has chosen."""

from __future__ import annotations

import errno
import os
import socket

from pipeline.errors import UserError
from pipeline.process.rank import launched, rank

REFUSALS = {errno.EADDRINUSE: "is taken, probably by another run,", errno.EACCES: "is reserved for root"}
"""What the system answers, in words."""


def check_port() -> None:
    """Refuse a port that somebody listens on already; rank 0 looks, where it will listen itself.

    ``deepspeed`` gives every run of a machine port 29500 unless told otherwise. torch would end rank 0 in a traceback,
    after the data is read, while the other ranks call on the other run. Under torchrun the agent listens.

    Raises:
        UserError: says how to name another port; or that none is named.
    """
    if not launched() or rank() != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    named = os.environ.get("MASTER_PORT", "")
    if not named.isdecimal() or not 0 < int(named) < 65536:
        raise UserError(
            f"MASTER_PORT: {named or 'not set'}, expected a port from 1 to 65535, as RANK and WORLD_SIZE are set.\n"
            "Launchers set all three (`deepspeed launch/sft.py ...`); for one process unset RANK and WORLD_SIZE."
        )
    port = int(named)
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: ports of ended runs are free
            probe.bind(("", port))  # without listening: no other rank may take this for the meeting
    except OSError as error:
        if error.errno in REFUSALS:  # else torch may fare better, on IPv6 say
            raise UserError(
                f"MASTER_PORT: {port}, where the processes are to meet, {REFUSALS[error.errno]} on "
                f"{socket.gethostname()}.\nGive each run its own: `deepspeed --master_port 29501 ...`, or MASTER_PORT "
                "in the environment of `srun`."
            ) from error
