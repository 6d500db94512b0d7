"""Kill training runs at random moments, start them again, and compare them with runs that nobody killed.

    python tests/faults/kill.py --moments 20 --folder /tmp/kills [--seed 1] [--parallel 2]

For each of several settings (ZeRO stage, kind of masks, base) one run is left alone. Each moment starts the same
command in a fresh folder with two ranks, sends SIGKILL to one rank, all ranks, or the launcher, starts the command
again, possibly to be killed again, until it ends. Then every logged number of every step of every attempt, and the
bytes of the final adapter, must be those of the run that was left alone. No process may live 30 s after its launcher
was killed, and a run must go on from its newest whole checkpoint, as this script finds it. Exits with 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from faults.outcome import ADAPTER, Trajectory, checkpoints, digest, newest_whole, resumed_step, trajectory
from faults.runs import Attempt, Setting, two_layers, write_recipe
from faults.watch import Watch, wait_for

SETTINGS = (
    (Setting(zero=2, sampling="instance", quantization="nf4"), "deepspeed"),
    (Setting(zero=3, sampling="example", quantization="nf4"), "torchrun"),
    (Setting(zero=0, sampling="example", quantization="none"), "deepspeed"),
    (Setting(zero=1, sampling="instance", quantization="none"), "torchrun"),
)
WHEN = ("write", "write", "step", "rotation", "end", "write", "step", "start")
"""Kinds of moments, taken in turn: half of them touch a checkpoint write."""


@dataclass(frozen=True)
class Moment:
    """When to kill what."""

    when: str
    number: int  # of the step or of the write in this attempt
    delay: float  # of the time that the thing takes, 0 to 1
    what: str

    def __str__(self) -> str:
        counted = {"write": f"in write {self.number}", "rotation": f"after write {self.number}", "end": "at the end"}
        return counted.get(self.when, f"in step {self.number}" if self.when == "step" else "at the start")


def drawn_moment(draw: random.Random, when: str, launcher: str) -> Moment:
    """A random moment of a kind."""
    launchers = ["launcher", "node launcher"] if launcher == "deepspeed" else ["launcher"]
    what = draw.choice(["rank 0", "rank 1", "all ranks", "all ranks", draw.choice(launchers), draw.choice(launchers)])
    number = {"write": draw.randint(1, 4), "rotation": draw.randint(2, 4)}.get(when, draw.randint(1, 15))
    return Moment(when, number, draw.random(), what)


@dataclass
class Reference:
    """A run that nobody killed."""

    setting: Setting
    launcher: str
    trajectory: Trajectory
    adapter: str
    files: list[str]
    seconds: dict[str, float]  # that a start, a step, a write, and all after the last step take


def reference_run(folder: Path, base: Path, setting: Setting, launcher: str) -> Reference:
    """Train without a kill, and time its parts."""
    name = f"whole-{setting}"
    attempt = Attempt(launcher, write_recipe(folder, base, name, setting), folder / f"{name}.log")
    watch = Watch(folder / "outputs" / name)
    wait_for(attempt, watch, lambda watch: False)
    total = time.monotonic() - attempt.started
    if attempt.status() != 0:
        raise RuntimeError(attempt.said()[-5000:])
    steps = watch.times["step"]
    found, problems = trajectory(watch.folder)
    if problems:
        raise RuntimeError(f"{watch.folder}: {problems}")
    seconds = {
        "start": steps[0] - attempt.started,
        "step": (steps[-1] - steps[0]) / len(steps),
        "write": max(watch.times["write"], default=0.1),
        "end": total - (steps[-1] - attempt.started),
    }
    files = sorted(path.name for path in checkpoints(watch.folder).values())
    return Reference(setting, launcher, found, digest(watch.folder / ADAPTER), files, seconds)


@dataclass
class Outcome:
    """What came of one moment."""

    number: int
    reference: Reference
    kills: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    slowest_end: float = 0.0

    def __str__(self) -> str:
        equal = "equal" if not self.problems else "NOT EQUAL"
        return (
            f"{self.number:3} {self.reference.setting!s:22} {self.reference.launcher:9} {'; '.join(self.kills)} | "
            f"from {', '.join(self.resumed) or '-'} | all gone in {self.slowest_end:.1f} s | {equal}"
            + "".join(f"\n      {problem}" for problem in self.problems)
        )


def kill_at(attempt: Attempt, watch: Watch, moment: Moment, reference: Reference) -> str | None:
    """Wait for the moment and kill; what was done, in words, or None where the command ended first."""
    if moment.when == "start":
        pause = attempt.started + moment.delay * reference.seconds["start"] - time.monotonic()
        time.sleep(max(pause, 0.5))  # the interpreter starts
    elif moment.when == "step":
        if not wait_for(attempt, watch, lambda watch: watch.history >= moment.number):
            return None
        time.sleep(moment.delay * reference.seconds["step"])
    elif moment.when == "write":
        if not wait_for(attempt, watch, lambda watch: watch.writing is not None and watch.writes >= moment.number):
            return None
        time.sleep(moment.delay * reference.seconds["write"])
    elif moment.when == "rotation":
        if not wait_for(attempt, watch, lambda watch: watch.finished >= moment.number):
            return None
        time.sleep(moment.delay * 0.01)
    else:
        last = max(step for step, _ in reference.trajectory)
        done = watch.folder / "history.jsonl"
        if not wait_for(attempt, watch, lambda _: done.exists() and f'"step": {last},' in done.read_text()):
            return None
        time.sleep(moment.delay * reference.seconds["end"] * 0.5)  # launchers look after their children every second
    if attempt.process.poll() is not None:
        return None
    seconds = time.monotonic() - attempt.started
    hit = attempt.kill(moment.what)
    inside = sorted(path.name for path in (watch.folder / "checkpoints").glob(".checkpoint-*"))
    step = max((step for step, _ in trajectory(watch.folder)[0]), default=0)
    return f"{hit} {moment} ({seconds:.1f} s, step {step}{', ' + ' '.join(inside) if inside else ''})"


def ended(attempt: Attempt) -> int | None:
    """Exit status; None where it had to be ended after a quarter of an hour."""
    try:
        return attempt.status(patience=900)
    except subprocess.TimeoutExpired:
        return None


def run_moment(number: int, folder: Path, base: Path, reference: Reference, draw: random.Random, when: str) -> Outcome:
    """One run, killed once or several times, until it ends."""
    outcome = Outcome(number, reference)
    name = f"killed-{number}"
    recipe = write_recipe(folder, base, name, reference.setting)
    run = folder / "outputs" / name
    kinds = [when, *(draw.choice(WHEN) for _ in range(draw.choice([0, 0, 1, 2])))]
    for start, kind in enumerate([*kinds, None]):
        expected = newest_whole(run)
        done = (run / ADAPTER).exists() and (run / "provenance.json").exists()
        watch = Watch(run)
        attempt = Attempt(reference.launcher, recipe, folder / f"{name}-{start}.log")
        killed = None
        if kind is not None:
            killed = kill_at(attempt, watch, drawn_moment(draw, kind, reference.launcher), reference)
        if killed is None:
            status = ended(attempt)
            if status != 0:
                outcome.problems.append(f"start {start} exits with {status}: {attempt.log}\n{attempt.said()[-1500:]}")
        else:
            outcome.kills.append(killed)
            gone = attempt.gone_after(30)
            outcome.slowest_end = max(outcome.slowest_end, gone or 99.0)
            if gone is None:
                outcome.problems.append(f"start {start}: processes lived 30 s after the kill: {attempt.log}")
        compare_so_far(outcome, run, start, attempt, expected, done, finished=killed is None)
        if killed is None:
            break
    return outcome


def compare_so_far(
    outcome: Outcome, run: Path, start: int, attempt: Attempt, expected: int, done: bool, finished: bool
) -> None:
    """After each start: what is logged, where it went on from; after the last one the adapter too."""
    found, problems = trajectory(run)
    if finished:
        outcome.problems += [f"history.jsonl: {problem}" for problem in problems]
        for place in sorted(outcome.reference.trajectory.keys() - found.keys()):
            outcome.problems.append(f"start {start}: {place} is not in the history")
    for place, record in found.items():
        whole = outcome.reference.trajectory.get(place)
        if whole != record:
            outcome.problems.append(f"start {start}: {place}: {record}, not {whole}")
    said = attempt.said()
    trained = "examples per step" in said
    if start > 0 and trained and not done:
        resumed = resumed_step(said)
        outcome.resumed.append(str(resumed))
        if resumed != expected:
            outcome.problems.append(f"start {start} went on from {resumed}, the newest whole checkpoint is {expected}")
    if not finished:
        return
    if not (run / ADAPTER).exists():
        outcome.problems.append("no final adapter")
    elif digest(run / ADAPTER) != outcome.reference.adapter:
        outcome.problems.append("the final adapter differs")
    files = sorted(path.name for path in checkpoints(run).values())
    leftovers = [path.name for path in (run / "checkpoints").glob(".*")]
    if files != outcome.reference.files or leftovers:
        outcome.problems.append(f"checkpoints {files} and {leftovers}, expected {outcome.reference.files}")


def main() -> None:
    """Run, print the table, exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings")
    parser.add_argument("--first", type=int, default=0, help="the first moment of the seed's sequence")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"--folder: {arguments.folder} exists; expected a new folder")
    arguments.folder.mkdir(parents=True)
    folder = arguments.folder.resolve()
    print(f"--seed {arguments.seed}", flush=True)
    base = two_layers(folder)
    write_recipe(folder, base, "unused", Setting())  # the rows, before threads write them
    settings = SETTINGS[: arguments.settings]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        references = list(pool.map(lambda pair: reference_run(folder, base, *pair), settings))
        for reference in references:
            times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in reference.seconds.items())
            print(f"{reference.setting} {reference.launcher}: {len(reference.trajectory)} records, {times}", flush=True)

        def outcome(number: int) -> Outcome:
            draw = random.Random(f"{arguments.seed}-{number}")
            reference = references[number % len(references)]
            found = run_moment(number, folder, base, reference, draw, WHEN[(number // len(references)) % len(WHEN)])
            print(found, flush=True)
            if not found.problems:
                shutil.rmtree(folder / "outputs" / f"killed-{number}")
            return found

        last = arguments.first + arguments.moments
        outcomes = list(pool.map(outcome, range(arguments.first, last)))
    kills = sum(len(found.kills) for found in outcomes)
    bad = [found for found in outcomes if found.problems]
    inside = sum(".part" in kill for found in outcomes for kill in found.kills)
    slowest = max((found.slowest_end for found in outcomes), default=0.0)
    print(
        f"{len(outcomes)} runs, {kills} kills, {inside} of them inside a checkpoint write; {len(bad)} runs differ; "
        f"the slowest end of all processes after a kill took {slowest:.1f} s"
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
