"""No traceback reaches the user: what is fed to the commands is spoilt in thousands of ways, and each must be told.

python tests/faults/fuzz.py                          all targets, about 25,000 cases
python tests/faults/fuzz.py --only recipes --cases 500 --seed 7

Every case calls the functions that the commands call. They may succeed, or raise ``UserError``, whose message is the
user's; anything else is a failure, and so is a case that takes longer than ``SLOW`` seconds. ``commands`` runs real
commands on spoilt recipes: each must exit with status 2 and without a traceback.

Exit status: 0 no failure, 1 failures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(Path(__file__).parent)]

from hypothesis import HealthCheck, Phase, given, seed, settings

from pipeline.process.environment import prepare_environment

prepare_environment()

from fuzz_cases import Target

from pipeline.errors import UserError

SLOW = 20
"""Seconds of processor time after which a case is a failure."""
CASES = {
    "recipes": 20_000,
    "prompts": 2_000,
    "check": 300,
    "data": 3_000,
    "adapters": 1_500,
    "results": 600,
    "runs": 1_000,
    "checkpoints": 1_000,
    "commands": 60,
}


@dataclass
class Tally:
    """What came of the cases of one target."""

    accepted: int = 0
    refused: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """How often, by kind and place."""
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of each, the shortest case and its traceback."""
    slowest: float = 0.0

    def fail(self, error: BaseException, case: object) -> None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(REPOSITORY) in frame.filename]
        ours = [frame for frame in frames if "/tests/" not in frame.filename] or frames
        place = f"{Path(ours[-1].filename).relative_to(REPOSITORY)}:{ours[-1].lineno}"
        key = f"{type(error).__name__} at {place}"
        self.failures[key] += 1
        shown = repr(case)
        if key not in self.examples or len(shown) < len(self.examples[key][0]):
            self.examples[key] = (shown, "".join(traceback.format_exception(error)))


class TooSlow(Exception):
    """A case that did not end."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"more than {SLOW} s of the processor")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises :class:`TooSlow` in the main thread."""
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def tried(target: Target, cases: int, number: int) -> Tally:
    """So many cases of a target."""
    tally = Tally()

    def one(case: Any) -> None:
        started = time.process_time()
        try:
            with time_limit(), contextlib.redirect_stdout(io.StringIO()):
                target.read(case)
            tally.accepted += 1
        except UserError as error:
            str(error).encode()  # what cannot be printed is a traceback, too
            tally.refused += 1
        except (Exception, SystemExit) as error:  # the point of this program
            tally.fail(error, case)
        tally.slowest = max(tally.slowest, time.process_time() - started)

    run = settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(target.cases)(one))
    seed(number)(run)()
    return tally


def report(name: str, tally: Tally) -> None:
    """One line of the table, and the failures under it."""
    total = tally.accepted + tally.refused + tally.failures.total()
    print(
        f"{name:<11} {total:>7,} {tally.accepted:>9,} {tally.refused:>9,} {tally.failures.total():>9,} "
        f"{tally.slowest:>8.2f} s",
        flush=True,
    )
    for key, count in tally.failures.most_common():
        case, trace = tally.examples[key]
        print(
            f"  {count:,} x {key}\n    case: {case[:600]}\n    {trace[-900:].strip()}".replace("\n", "\n    "),
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, help="of each target; see CASES for the defaults")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--counts", type=Path, metavar="FILE", help="JSON: cases by target, of these targets only")
    arguments = parser.parse_args()
    counts = (
        dict.fromkeys(arguments.only, arguments.cases) if arguments.cases else {n: CASES[n] for n in arguments.only}
    )
    if arguments.counts:
        counts = json.loads(arguments.counts.read_text())
    print(
        f"seed {arguments.seed}\n"
        f"{'target':<11} {'cases':>7} {'accepted':>9} {'refused':>9} {'failures':>9} {'slowest':>10}"
    )
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = str(Path(name) / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        from fuzz_targets import TARGETS

        for target, cases in counts.items():
            folder = Path(name) / target
            folder.mkdir()
            tally = tried(TARGETS[target](folder), cases, arguments.seed)
            report(target, tally)
            failures += tally.failures.total()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
