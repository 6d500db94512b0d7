"""The test rows of the pocket recipe for lm-eval: the tasks' ``custom_dataset``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

DATA = Path(__file__).resolve().parents[1] / "data"


def load(file: str, with_choices: bool, **_: Any) -> datasets.DatasetDict:
    """The split `test`: the rows of a file that have choices to score, or those whose answer is free.

    Args:
        file: in ``recipes/pocket/data``.
        with_choices: which of the two.
        **_: the task's metadata, which lm-eval passes too.
    """
    rows = datasets.load_dataset("json", data_files={"test": str(DATA / file)})
    return rows.filter(lambda row: bool(row["choices"]) == with_choices, load_from_cache_file=False)
