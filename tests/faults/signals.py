"""Signals under every launcher: is a checkpoint kept, do all processes end in time, with which status?

    python tests/faults/signals.py --folder /tmp/signals [CASE ...]

A case is launcher-target-signal, e.g. deepspeed-launcher-SIGKILL. About a minute each, by default all.
Targets: ``group``, all processes at once, as by Ctrl-C; ``launcher``, the command alone; ``inner``, deepspeed's
launcher.launch alone; ``ranks``; ``rank1``. Printed is one line for each case, and at the end how many failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "launch")]

from sft_support import environment, launched_by, write_recipe

REPOSITORY = TESTS.parent
CASES = {
    "python-group-SIGINT": 130,
    "python-launcher-SIGTERM": 75,
    "python-launcher-SIGUSR1": 75,
    "torchrun-group-SIGINT": 130,
    "torchrun-launcher-SIGTERM": 75,
    "torchrun-launcher-SIGKILL": 75,
    "torchrun-launcher-SIGUSR1": 75,
    "torchrun-ranks-SIGUSR1": 75,
    "torchrun-rank1-SIGKILL": 1,
    "deepspeed-group-SIGINT": 130,
    "deepspeed-launcher-SIGTERM": 75,
    "deepspeed-launcher-SIGKILL": 75,
    "deepspeed-inner-SIGTERM": 75,
    "deepspeed-inner-SIGKILL": 75,
    "deepspeed-rank1-SIGKILL": 1,
}
"""And the status of rank 0, which status.json tells."""
LONGEST = 30.0
"""Seconds until no process of the run lives."""


def is_rank(process: psutil.Process) -> bool:
    """Not a launcher whose arguments name the script."""
    words = process.cmdline()
    return "launch/sft.py" in words[1:3]


def targets(everyone: list[psutil.Process], target: str) -> list[psutil.Process]:
    """Who gets the signal; the command is the first of them all."""
    ranks = sorted((process for process in everyone if is_rank(process)), key=lambda rank: rank.pid)
    if target == "group":
        return everyone
    if target == "launcher":
        return everyone[:1]
    if target == "inner":
        return [process for process in everyone if "deepspeed.launcher.launch" in process.cmdline()]
    return ranks[1:] if target == "rank1" else ranks


def run(case: str, recipe: Path) -> str:
    """What is wrong with it, or ""; prints what happened."""
    launcher, target, number = case.split("-")
    folder = recipe.parent / "outputs" / case
    log = recipe.parent / f"{case}.log"
    with log.open("w") as screen:
        command = subprocess.Popen(
            [
                *launched_by(launcher),
                "launch/sft.py",
                str(recipe),
                f"name={case}",
                "--no-eval",
                "training.max_steps=100000",
            ],
            env=environment(),
            cwd=REPOSITORY,
            stdout=screen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while not (folder / "history.jsonl").exists():
        if command.poll() is not None:
            return f"ended by itself: {log}"
        time.sleep(0.2)
    everyone = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    for process in targets(everyone, target):
        process.send_signal(signal.Signals[number])
    began = time.monotonic()
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everyone):
        command.poll()
        if time.monotonic() - began > 2 * LONGEST:
            break
        time.sleep(0.1)
    seconds = time.monotonic() - began
    for process in everyone:
        if process.is_running() and process.pid != command.pid:
            process.kill()
    told = json.loads((folder / "status.json").read_text())
    kept = sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*"))
    print(f"{case}: all gone after {seconds:.1f} s; command {command.wait()}, rank 0 {told['exit_status']}; {kept}")
    wrong = [] if seconds < LONGEST else [f"{seconds:.0f} s"]
    if told["exit_status"] != CASES[case]:
        wrong.append(f"status {told['exit_status']}: {told['message']}")
    if CASES[case] != 1 and kept != [f"checkpoint-{told['step']}"]:
        wrong.append(f"checkpoints {kept}, step {told['step']}")
    return "; ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - CASES.keys()
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if arguments.folder.exists():
        parser.error(f"--folder: {arguments.folder} exists; expected a new folder")
    arguments.folder.mkdir(parents=True)
    recipe = write_recipe(arguments.folder, REPOSITORY / "recipes/pocket/base")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    failed = 0
    cases = arguments.cases or list(CASES)
    for case in cases:
        wrong = run(case, recipe)
        failed += bool(wrong)
        if wrong:
            print(f"  FAILED: {wrong}", flush=True)
    print(f"{len(cases)} cases, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
