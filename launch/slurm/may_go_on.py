"""For run.sh: whether a job that was stopped may go back into the queue. Exit status 0, or 2 with the reason.

python launch/slurm/may_go_on.py JOB launch/sft.py [--option ...] RECIPE [key=value ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.command import told_errors


def main() -> None:
    """The words are those of the job's program: its recipe is the first that is neither an option nor an override."""
    with told_errors():
        from pipeline.cluster.restarts import check_gain
        from pipeline.recipe.loader import output_and_name

        job, _, *words = sys.argv[1:]
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        recipe = next(word for word in words if word not in overrides and not word.startswith("-"))
        output, name = output_and_name(recipe, overrides)
        check_gain(job, Path(os.path.expanduser(output)) / name, Path("eval/outputs") / name)


if __name__ == "__main__":
    main()
