"""Starts the training command again and again without importing for ten seconds each time.

A server (``python tests/faults/forked.py``) imports once and forks the ranks of each start: real processes, which run
``launch/sft.py``'s own command line and can be killed. It reads one JSON object per line and answers with one:
``{"start": arguments, "ranks": n, "log": file}`` with the ranks' process ids, ``{"wait": [ids]}`` with their exit
statuses, negative for a signal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from faults.runs import REPOSITORY, environment
from ports import free_port


class Forked:
    """The server, seen from a test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, recipe: Path, ranks: int, log: Path, *arguments: str) -> list[int]:
        """Process ids of the ranks, which train."""
        given = [str(recipe), "--no-eval", *arguments]
        return [int(pid) for pid in self._ask({"start": given, "ranks": ranks, "log": str(log)})]

    def wait(self, ranks: list[int]) -> list[int]:
        """Their exit statuses, once all have ended."""
        return [int(status) for status in self._ask({"wait": ranks})]

    def _ask(self, question: dict[str, Any]) -> list[Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server has ended with {self._process.wait()}")
        return list(json.loads(answer))


@contextmanager
def forked() -> Iterator[Forked]:
    """Context with a server."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        env=environment("forked"),
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Forked(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def started(arguments: list[str], ranks: int, log: str) -> list[int]:
    """Fork the ranks; this process has no threads, so a fork is safe."""
    import torch

    from launch.command import run_command
    from launch.sft import sft

    port = free_port()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(written, 1)
            os.dup2(written, 2)
            # Torch makes its thread pool anew at a child's first use; by several threads at once (transformers loads
            # weights with them) they find none: "Invalid thread pool!". Delete when torch guards pthreadpool().
            torch.set_num_threads(1)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            sys.argv = ["launch/sft.py", *arguments]
            run_command(sft, watched=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return children


def serve() -> None:
    """Import what training needs, then answer until the input ends."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries print
    import deepspeed  # noqa: F401

    import pipeline.train  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer = started(question["start"], question["ranks"], question["log"])
        else:
            answer = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in question["wait"]]
        os.write(answers, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    serve()
