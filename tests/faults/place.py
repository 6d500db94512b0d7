"""Where faults are injected, and how a case ends: in a message, or in recovery."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.outcome import ADAPTER, Trajectory, checkpoints, digest, trajectory
from faults.runs import Attempt, Setting, two_layers, write_recipe

SETTING = Setting(zero=2)


class Skipped(Exception):
    """The machine does not allow a case; why."""


@dataclass
class Place:
    """Where the cases run, and the run that met no fault."""

    folder: Path
    base: Path
    draw: random.Random
    launcher: str = "python"
    whole: Trajectory | None = None
    adapter: str = ""
    template: Path | None = None  # a run that was killed at step 7, with checkpoints 3 and 6

    @property
    def run(self) -> Path:
        """The folder of every case's run, one after another."""
        return self.folder / "outputs" / "faulty"

    @property
    def recipe(self) -> Path:
        return self.folder / "faulty.yaml"

    @property
    def last(self) -> int:
        """Step of the run."""
        assert self.whole is not None
        return max(step for step, _ in self.whole)

    def start(self, *arguments: str, launcher: str | None = None) -> Attempt:
        number = len(list(self.folder.glob("*.log")))
        return Attempt(launcher or self.launcher, self.recipe, self.folder / f"{number}.log", arguments)

    def restore(self) -> None:
        """The interrupted run, as it was."""
        assert self.template is not None
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.template, self.run)

    def ends_alike(self, attempt: Attempt) -> str:
        """Why the finished run is not the one that met no fault; empty where it is."""
        status = attempt.status()
        if status != 0:
            return f"exits with {status}: {last_words(attempt)}"
        found, problems = trajectory(self.run)
        if problems or found != self.whole:
            return f"another trajectory {problems}"
        return "" if digest(self.run / ADAPTER) == self.adapter else "another adapter"


@dataclass(frozen=True)
class Outcome:
    """Of one case."""

    what: str
    status: int | None
    said: str
    problem: str = ""

    def __str__(self) -> str:
        verdict = f"WRONG: {self.problem}" if self.problem else "as it should"
        said = "\n".join(f"      {line}" for line in self.said.splitlines()[:6])
        return f"{self.what} | status {self.status} | {verdict}\n{said}"


def last_words(attempt: Attempt) -> str:
    """The error message, or the end of what was said."""
    said = attempt.said()
    found = re.search(r"error: .*(\n(?!\[|Traceback|$).*)*", said, re.MULTILINE)
    return found[0] if found else said[-600:]


def refused(what: str, attempt: Attempt, words: str, statuses: tuple[int, ...] = (2,)) -> Outcome:
    """A run that must end with a message of these words (a regular expression) and no traceback."""
    status = attempt.status()
    said = attempt.said()
    message = last_words(attempt)
    problem = ""
    if status not in statuses:
        problem = f"status {status}, expected {statuses}"
    elif not re.search(words, message):
        problem = f"the message has not {words!r}"
    elif "Traceback" in said:
        problem = "a traceback: " + said[said.index("Traceback") :][-1500:]
    return Outcome(what, status, message, problem)


def recovered(what: str, place: Place, attempt: Attempt, words: str = "") -> Outcome:
    """A run that must end as if there had been no fault, having said these words."""
    problem = place.ends_alike(attempt)
    said = attempt.said()
    lines = [line for line in said.splitlines() if re.search(r"(?i)warning: |resum|go(es|ing) on from|damage", line)]
    if not problem and words and not re.search(words, said):
        problem = f"nothing says {words!r}"
    return Outcome(what, attempt.process.returncode, "\n".join(lines), problem)


def wait_until(attempt: Attempt, reached: Callable[[], bool], patience: float = 200) -> None:
    """Poll; it must come to that before the command ends."""
    deadline = time.monotonic() + patience
    while not reached():
        if attempt.process.poll() is not None or time.monotonic() > deadline:
            attempt.end()
            raise RuntimeError(f"it never came to that: {attempt.said()[-3000:]}")
        time.sleep(0.002)


def logged(run: Path, step: int) -> Callable[[], bool]:
    """Whether the step is in the history."""
    file = run / "history.jsonl"
    return lambda: file.exists() and f'"step": {step},' in file.read_text()


def prepare(folder: Path, draw: random.Random) -> Place:
    """The run without a fault, and the interrupted one that cases start from."""
    place = Place(folder, two_layers(folder), draw)
    write_recipe(folder, place.base, "faulty", SETTING)
    attempt = place.start()
    if attempt.status() != 0:
        raise RuntimeError(attempt.said()[-3000:])
    place.whole, problems = trajectory(place.run)
    assert not problems
    place.adapter = digest(place.run / ADAPTER)
    shutil.rmtree(place.run)
    attempt = place.start()
    wait_until(attempt, logged(place.run, 8))
    attempt.kill("all ranks")
    attempt.gone_after(30)
    assert [step for step in checkpoints(place.run)] == [3, 6], list(checkpoints(place.run))
    place.template = shutil.copytree(place.run, folder / "template")
    return place
