"""lm-eval's own command line, with the model lora-dropout in it. Every stock flag works.

python    launch/harness.py --model lora-dropout --model_args peft=outputs/pocket,instances=8 --tasks local_arc_easy
torchrun --nproc_per_node 4 launch/harness.py ...     several processes share the requests

Installed (`pip install .`), it is called lora-dropout-lm-eval.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # python puts launch/ first, where evaluate.py shadows a package; an installed command not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.command import told_errors


def main() -> None:
    """lm-eval's command line; without arguments, its help and ours."""
    with told_errors():
        from pipeline.process.environment import prepare_environment

        prepare_environment()
        from eval.lm.command import main as run

        run()


if __name__ == "__main__":
    main()
