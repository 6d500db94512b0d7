"""The launchers above a process: when one of them is gone, the process must end too.

The kernel's own means, ``PR_SET_PDEATHSIG``, knows the direct parent only, and dies with the *thread* that started the
child. Between the ``deepspeed`` command and a rank stands ``deepspeed.launcher.launch``, which outlives the command.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from pipeline.process.rank import launched

NODE_LAUNCHER = "deepspeed.launcher.launch"
"""Started by the ``deepspeed`` command on each node; starts the ranks there."""

COMMANDS = {"deepspeed", "ds", "torchrun", "accelerate", "accelerate-launch"}
MODULES = {
    "deepspeed.launcher.runner",
    NODE_LAUNCHER,
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.launch",
}
MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Environment of processes that torchrun and deepspeed's launcher have started."""


def is_launcher(words: Sequence[str]) -> bool:
    """Whether this command line is a launcher's: ``python [-u] bin/deepspeed``, ``python -m torch.distributed.run``.

    Only what stands before the launched script counts, so that ``python train.py torchrun`` is none.
    """
    for position, word in enumerate(words[:4]):
        if word == "-m":
            return words[position + 1 : position + 2] != [] and words[position + 1] in MODULES
        if Path(word).name in COMMANDS:
            return True
        if position > 0 and not word.startswith("-"):
            return False
    return False


def launchers() -> list[psutil.Process]:
    """The launchers above this process, nearest first, without a gap; none where none has started it.

    A process under plain ``python`` has none, whatever its parents are: ``nohup python ...`` outlives its shell.
    """
    found: list[psutil.Process] = []
    if not launched():
        return found
    parent = psutil.Process().parent()
    while parent is not None:
        try:
            if not is_launcher(parent.cmdline()):
                break
            found.append(parent)
            parent = parent.parent()
        except psutil.Error:  # it has just ended, or is another user's
            break
    return found


def orphaned() -> bool:
    """Whether a launcher was gone before this process could look: importing takes it seconds."""
    above = launchers()
    if not above:
        return launched() and os.getppid() == 1 and any(mark in os.environ for mark in MARKS)
    try:
        # deepspeed's second launcher, whose command is gone; on further nodes a shell or an sshd stands above it
        return NODE_LAUNCHER in above[-1].cmdline() and above[-1].ppid() == 1
    except psutil.Error:  # gone as well, by now
        return True


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, its number given to another one or not; one that nobody has waited for counts."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def in_words(process: psutil.Process) -> str:
    """As it is named on the screen; its command line is no longer known once it is gone."""
    return f"its launcher (process {process.pid})"
