"""Evaluates in processes of its own, kills them with SIGKILL, and evaluates again.

    python evaluation_worker.py JOBS.json

``JOBS.json`` is a list of ``{"recipe", "adapter", "output", "ranks", "kills", "seed", "fails", "log"}``. A job that
``fails`` runs once, and its exit statuses are printed. Any other first runs to its end in ``<output>/whole``. Then, in
``<output>/killed``, it is started and killed once for each number in ``kills``, as soon as that share of the answers is
on disk; what the first kill left is cut in the middle of a line, as if it had come during the write, and after the
second a byte is changed. At last it runs to its end. Printed are the sound answers and the bad lines before that.
"""

from __future__ import annotations

import json
import os
import random
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
import torch
from lm_eval import evaluator
from ports import free_port

from eval import results
from eval.lm.store import AnswerStore
from eval.run import ANSWERS, evaluate
from pipeline.recipe import load_recipe


def started(job: dict[str, Any], output: Path) -> list[int]:
    """Process ids of the ranks, which evaluate; this process has no threads yet, so a fork is safe."""
    port = free_port()
    children = []
    for rank in range(job["ranks"]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if job["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        status = 1
        try:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            evaluate(load_recipe(Path(job["recipe"])), Path(job["adapter"]), output, progress=False)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return children


def statuses(children: list[int]) -> list[int]:
    """Wait for them."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def finished(children: list[int]) -> None:
    """Wait for them.

    Raises:
        RuntimeError: one failed.
    """
    if any(found := statuses(children)):
        raise RuntimeError(f"exit statuses {found}")


def files_of(output: Path) -> list[Path]:
    """That hold answers."""
    return sorted(output.glob(f"*/{ANSWERS}/*/*.jsonl"))


def size(output: Path) -> int:
    """Bytes of answers."""
    return sum(file.stat().st_size for file in files_of(output))


def kill(job: dict[str, Any], output: Path, after: int) -> None:
    """Start, and kill all ranks when ``after`` bytes of answers are there.

    Raises:
        RuntimeError: the evaluation came to its end before.
    """
    children = started(job, output)
    while size(output) < after:
        if os.waitpid(children[0], os.WNOHANG)[0]:
            raise RuntimeError("finished before it was killed")
        time.sleep(0.0005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """What the last run found."""
    draw = random.Random(job["seed"])
    whole, killed = Path(job["output"]) / "whole", Path(job["output"]) / "killed"
    if job["fails"]:
        return {"statuses": statuses(started(job, whole))}
    finished(started(job, whole))
    for number, share in enumerate(job["kills"]):
        kill(job, killed, int(share * size(whole)))
        written = [file for file in files_of(killed) if file.stat().st_size]
        file = max(written, key=lambda file: file.stat().st_mtime_ns)
        content = file.read_bytes()
        if number == 0:
            last = content.rstrip(b"\n").rfind(b"\n") + 1
            file.write_bytes(content[: draw.randrange(last + 1, len(content))])
        if number == 1:
            at = draw.randrange(len(content) // 2)
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    stores = {
        json.loads(note.read_text())["key"]: note.parent for note in sorted(killed.glob(f"*/{ANSWERS}/*/settings.json"))
    }
    read = [AnswerStore(folder, key) for key, folder in stores.items()]
    finished(started(job, killed))
    return {"sound": sum(map(len, read)), "bad": sum(len(store.corrupt) for store in read)}


if __name__ == "__main__":
    results.write_report = lambda folder: None  # type: ignore[assignment]  # pictures take longer than all the rest,
    evaluator.add_env_info = lambda storage: None  # and so does lm-eval's "pip list"
    print(json.dumps([main(job) for job in json.loads(Path(sys.argv[1]).read_text())]))
