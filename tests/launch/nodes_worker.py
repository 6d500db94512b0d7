"""Ranks of several nodes on this machine, each node with disks of its own.

    python nodes_worker.py JOBS.json

``JOBS.json`` is a list of ``{"recipe", "nodes", "ranks", "folder", "stages", "last"}``: ``nodes`` times ``ranks``
processes are forked and run the stages (``train``, ``evaluate``), the last node with the overrides ``last``. What a
node writes lies in ``<folder>/node-<n>``: ``cache``, ``outputs`` and ``eval``. Rank r's screen is ``<folder>/<r>.log``,
and a line of JSON on the screen tells the exit statuses of each job. Where a rank fails, the others have 20 s to fail.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pipeline.process.environment import prepare_environment

prepare_environment()
import deepspeed  # noqa: F401  # once, and not in every fork
import torch
from ports import free_port

from eval.run import evaluate
from launch.command import told_errors
from pipeline.recipe import load_recipe
from pipeline.run.folder import run_folder
from pipeline.train import train


def run(job: dict[str, Any], node: int) -> None:
    """One rank's stages."""
    own = Path(job["folder"]) / f"node-{node}"
    overrides = job.get("last", []) if node == job["nodes"] - 1 else []
    recipe = load_recipe(Path(job["recipe"]), [f"output={own / 'outputs'}", *overrides])
    with told_errors():
        if "train" in job["stages"]:
            train(recipe)
        if "evaluate" in job["stages"]:
            evaluate(recipe, run_folder(recipe), own / "eval", progress=False)


def started(job: dict[str, Any], node: int, local: int, port: str) -> int:
    """Process id of a rank; this process has no threads yet, so a fork is safe."""
    child = os.fork()
    if child:
        return child
    folder, rank, ranks = Path(job["folder"]), node * job["ranks"] + local, job["nodes"] * job["ranks"]
    os.environ["LORA_DROPOUT_CACHE"] = str(folder / f"node-{node}" / "cache")
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(local)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    status = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        run(job, node)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main(job: dict[str, Any]) -> list[int]:
    """Exit statuses of the ranks."""
    for node in range(job["nodes"]):
        (Path(job["folder"]) / f"node-{node}").mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = [started(job, node, local, port) for node in range(job["nodes"]) for local in range(job["ranks"])]
    ends: dict[int, int] = {}
    deadline = None
    while len(ends) < len(children):
        child, end = os.waitpid(-1, os.WNOHANG)
        if child:
            ends[child] = os.waitstatus_to_exitcode(end)
        elif deadline is None and any(ends.values()):
            deadline = time.monotonic() + 20
        elif deadline is not None and time.monotonic() > deadline:
            for left in set(children) - ends.keys():
                os.kill(left, signal.SIGKILL)
        time.sleep(0.05)
    return [ends[child] for child in children]


if __name__ == "__main__":
    print(json.dumps([main(job) for job in json.loads(Path(sys.argv[1]).read_text())]))
