"""How a command of this project ends. ``launch/command.py`` says it to the user; queue scripts rely on it.

Launchers add their own: ``torchrun`` ends with 1 whatever its processes ended with, ``deepspeed`` with the status of
one of them, with 1 where it was signalled itself, and sometimes with 0. ``srun`` reports the highest. Where it matters
read ``status.json``, whose ``exit_status`` is the process's own.
"""

FINISHED = 0
"""Done."""
FAILED = 1
"""A bug, with a traceback; or another process of the run was killed."""
BAD_INPUT = 2
"""Bad input, or a run that cannot go on as it is (disk full, diverged); the message says what to change."""
HUNG = 70
"""No progress for ``supervision.hang_minutes``, e.g. in a collective that never ends. The same command goes on."""
STOPPED = 75
"""Stopped by SIGTERM or SIGUSR1, or with its launcher. The same command goes on from the newest checkpoint."""
INTERRUPTED = 130
"""Stopped by Ctrl-C (SIGINT). The same command goes on from the newest checkpoint."""
TERMINATED = 143
"""As killed by SIGTERM: under ``srun``, which sends it to all processes of a step where one has failed, and reports the
highest status. Before ranks can agree to stop, this one must not look like STOPPED."""
