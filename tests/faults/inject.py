"""Disk full, damaged checkpoints, changed inputs, a rank out of memory: each ends in a clear message or in recovery.

    python tests/faults/inject.py --folder /tmp/faults [--only disk,damage] [--seed 1]

Every case is a real run of `launch/sft.py`. Where a run goes on afterwards, its logged numbers and its final adapter
must be those of a run that met no fault, bit for bit. Prints a table; exits with 1 where a case ends otherwise than it
should. Needs root for the disks (a tmpfs of a few MiB) and for the limit of memory (a control group); skips what it may
not do and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from faults.outcome import ADAPTER, checkpoints, damaged, digest, newest_whole, resumed_step, trajectory
from faults.place import Outcome, Place, Skipped, last_words, logged, prepare, recovered, refused, wait_until

DISK = 200
"""MiB: three checkpoints of 30, and what is left free beside them."""

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


# disks


@contextmanager
def small_disk(place: Place) -> Iterator[Path]:
    """The folder ``outputs`` on a disk of its own."""
    disk = place.folder / "outputs"
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        raise Skipped(f"no tmpfs may be mounted: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True, capture_output=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Take all but ``leave`` bytes, while others take some too."""
    taken, piece = 0, max(shutil.disk_usage(disk).free - leave, 0)
    number = len(list(disk.glob("filler*")))
    with (disk / f"filler{number}").open("wb", buffering=0) as file:
        while piece >= 4096:
            try:
                os.posix_fallocate(file.fileno(), taken, piece)
                taken += piece
            except OSError:
                piece //= 2
                continue
            piece = min(piece, max(shutil.disk_usage(disk).free - leave, 0))


def make_room(disk: Path) -> None:
    """Give back what :func:`fill` took."""
    for filler in disk.glob("filler*"):
        filler.unlink()


def disk(place: Place) -> Iterator[Outcome]:
    """Full when a checkpoint is due, while nothing but logs is written, and at the final adapter; read-only."""
    with small_disk(place) as room:
        attempt = place.start()
        wait_until(attempt, lambda: 3 in checkpoints(place.run))
        fill(room, leave=20 * 2**20)
        yield refused("disk too small for the second checkpoint", attempt, "(?i)free|space|full")
        kept = newest_whole(place.run)
        make_room(room)
        outcome = recovered("... and with room again", place, place.start())
        yield outcome if kept == 3 else replace(outcome, problem=f"the newest whole checkpoint was {kept}, not 3")
    with small_disk(place) as room:
        attempt = place.start()
        wait_until(attempt, lambda: 3 in checkpoints(place.run))
        fill(room, leave=50 * 2**20)  # enough for the next one, and quickly taken
        wait_until(attempt, lambda: any((place.run / "checkpoints").glob(".checkpoint-6.part")))
        fill(room)
        yield refused("disk full within the second checkpoint", attempt, "(?i)space|full")
        kept, leftovers = newest_whole(place.run), list((place.run / "checkpoints").glob(".*"))
        make_room(room)
        outcome = recovered("... and with room again", place, place.start())
        good = kept in (3, 6) and not leftovers  # 6 where the disk filled too late, with the next line of the history
        yield outcome if good else replace(outcome, problem=f"checkpoint {kept}, leftovers {leftovers}")
    with small_disk(place) as room:
        attempt = place.start("training.save_steps=100")
        wait_until(attempt, logged(place.run, place.draw.randint(2, 9)))
        fill(room)
        yield refused("disk full in history, status and TensorBoard writes", attempt, "(?i)space|full")
        make_room(room)
        yield recovered("... and with room again", place, place.start())
    with small_disk(place) as room:
        attempt = place.start("training.save_strategy=no")
        wait_until(attempt, logged(place.run, 2 * place.last // 3))
        fill(room, leave=3 * 2**20)  # for logs, and less than the adapter
        yield refused("disk full at the final adapter", attempt, "(?i)space|full")
        half = (place.run / ADAPTER).exists()
        make_room(room)
        outcome = recovered("... and with room again", place, place.start())
        yield outcome if not half else replace(outcome, problem="half an adapter lay there under its own name")
    with small_disk(place) as room:
        remount(room, "ro")
        yield refused("read-only output", place.start(), "(?i)read-only")
    with small_disk(place) as room:
        shutil.copytree(place.template, place.run)
        remount(room, "ro")
        yield refused("read-only output that holds an interrupted run", place.start(), "(?i)read-only")


# checkpoints


def damage(place: Place) -> Iterator[Outcome]:
    """Each file of the newest checkpoint in turn: truncated, one bit flipped, missing; then all checkpoints."""
    assert place.template is not None
    files = sorted(path.name for path in (place.template / "checkpoints" / "checkpoint-6").iterdir())
    ways = ["truncated", "flipped", "missing"]
    place.draw.shuffle(ways)
    for number, name in enumerate(files):
        place.restore()
        way = ways[number % 3]
        damaged(place.run / "checkpoints" / "checkpoint-6" / name, way, place.draw)
        attempt = place.start()
        outcome = recovered(f"checkpoint-6/{name} {way}", place, attempt, "checkpoint-6")
        resumed = resumed_step(attempt.said())
        yield (
            outcome
            if resumed == 3 or outcome.problem
            else Outcome(outcome.what, outcome.status, outcome.said, f"went on from {resumed}, not 3")
        )
    place.restore()
    for step in (3, 6):
        damaged(place.run / "checkpoints" / f"checkpoint-{step}" / "optimizer.safetensors", "flipped", place.draw)
    attempt = place.start()
    if attempt.status() == 0:
        yield recovered("every checkpoint damaged", place, attempt, "checkpoint-3")
    else:
        yield refused("every checkpoint damaged", attempt, "checkpoint-3")
    place.restore()
    folder = place.run / "checkpoints" / "checkpoint-6"
    damaged(folder / "state.json", "flipped", place.draw)
    attempt = place.start(f"training.resume={folder}", "name=other")
    yield refused("training.resume is the path of a damaged checkpoint", attempt, r"state\.json")
    place.restore()
    history = place.run / "history.jsonl"
    lines = history.read_bytes().splitlines(keepends=True)
    history.write_bytes(lines[0] + b"\0" * 300 + b"\n" + b"".join(lines[1:]))
    yield refused("history.jsonl with zeros in it, as after a power cut", place.start(), r"history\.jsonl.*line 2")


# inputs


def inputs(place: Place) -> Iterator[Outcome]:
    """Data, base or recipe that are others than at the start."""
    rows = place.folder / "rows.jsonl"
    kept = rows.read_text()
    lines = [json.loads(line) for line in kept.splitlines()]
    changes = {
        "one answer of the data changed": [*lines[:5], {**lines[5], "output": "17"}, *lines[6:]],
        "two rows of the data swapped": [lines[1], lines[0], *lines[2:]],
        "the data's last row gone": lines[:-1],
    }
    for what, changed in changes.items():
        place.restore()
        rows.write_text("".join(json.dumps(line) + "\n" for line in changed))
        yield refused(what, place.start(), r"data|rows\.jsonl")
        rows.write_text(kept)
    place.restore()
    weights = place.base / "model.safetensors"
    kept_weights = weights.read_bytes()
    damaged(weights, "flipped", place.draw)
    yield refused("one bit of the base's weights changed", place.start(), "base")
    weights.write_bytes(kept_weights)
    os.utime(weights, (1, 1))
    place.restore()
    yield recovered("the base's weights written anew, as they were", place, place.start())
    place.restore()
    yield refused(
        "another recipe",
        place.start("training.learning_rate=0.01", "adapter.dropout.rate=0.3", "seed=4"),
        r"(?s)(?=.*learning_rate)(?=.*dropout\.rate)(?=.*seed)",
    )
    place.restore()
    yield recovered("harmless keys changed", place, place.start("training.logging_first_step=true"))
    place.restore()
    yield refused("resume=never beside an unfinished run", place.start("training.resume=never"), "never|already holds")


# processes


def processes(place: Place) -> Iterator[Outcome]:
    """A rank that runs out of memory, a folder that goes away, two runs at once."""
    yield from out_of_memory(place)
    shutil.rmtree(place.run, ignore_errors=True)
    attempt = place.start()
    wait_until(attempt, logged(place.run, 4))
    shutil.rmtree(place.run, ignore_errors=True)
    outcome = refused("the run's folder is removed while it trains", attempt, "(?i)no such|gone|removed|exist")
    yield outcome
    yield recovered("... and started again", place, place.start())
    shutil.rmtree(place.run, ignore_errors=True)
    first = place.start("training.max_steps=3000")
    wait_until(first, lambda: (place.run / "recipe.yaml").exists())
    second = place.start("training.max_steps=3000")
    yield refused("a second run into the folder", second, r"process \d+ on .* is training into this folder")
    outcome = Outcome(
        "... and the first one trains on", None, "", "" if first.process.poll() is None else last_words(first)
    )
    first.end()
    yield outcome


def out_of_memory(place: Place) -> Iterator[Outcome]:
    """The kernel's out-of-memory killer takes rank 1: its control group allows it nothing more."""
    group = MEMORY_GROUPS / f"lora-dropout-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(4 * 2**20))
    except OSError as error:
        yield Outcome("rank 1 out of memory", None, f"SKIPPED: no control group for memory ({error})")
        return
    try:
        shutil.rmtree(place.run, ignore_errors=True)
        attempt = place.start(launcher="torchrun")
        wait_until(attempt, logged(place.run, 7))
        victim = attempt.ranks()[1]
        start = time.monotonic()
        (group / "cgroup.procs").write_text(str(victim.pid))
        status = attempt.status(120)
        took = time.monotonic() - start
        killed = "oom_kill 1" in (group / "memory.oom_control").read_text()
        problem = "" if status != 0 and killed and took < 60 else f"killed by the kernel: {killed}, in {took:.0f} s"
        words = "\n".join(
            line for line in attempt.said().splitlines() if re.search(r"(?i)error|signal|died|gone", line)
        )
        yield Outcome(f"rank 1 of 2 out of memory (control group); all ended in {took:.1f} s", status, words, problem)
        again = place.start(launcher="torchrun")
        again.status()
        interrupted = place.run.rename(place.folder / "interrupted")
        whole = place.start(launcher="torchrun")
        whole.status()
        problem = "" if same_runs(interrupted, place.run) else "not the run that met no fault"
        said = f"from step {resumed_step(again.said())}"
        yield Outcome("... and started again, against a whole run", again.process.returncode, said, problem)
    finally:
        group.rmdir()


def same_runs(one: Path, other: Path) -> bool:
    """Logged numbers and adapter."""
    return trajectory(one) == trajectory(other) and digest(one / ADAPTER) == digest(other / ADAPTER)


CASES = {"disk": disk, "damage": damage, "inputs": inputs, "processes": processes}


def main() -> None:
    """Run, print the table, exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(CASES))
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"--folder: {arguments.folder} exists; expected a new folder")
    arguments.folder.mkdir(parents=True)
    print(f"--seed {arguments.seed}", flush=True)
    place = prepare(arguments.folder.resolve(), random.Random(arguments.seed))
    wrong = 0
    for name in arguments.only:
        try:
            for outcome in CASES[name](place):
                print(outcome, flush=True)
                wrong += bool(outcome.problem)
        except Skipped as reason:
            print(f"{name}: SKIPPED: {reason}", flush=True)
    print(f"{wrong} cases ended otherwise than they should")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
