"""What a run left behind, read without the product's own code."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

ADAPTER = "adapter_model.safetensors"

EXACT = ("loss", "learning_rate", "gradient_norm", "clip_fraction", "update_norm", "epoch")
EXACT_MEASURED = (
    "validation_loss",
    "validation_loss_stderr",
    "probe_loss",
    "probe_loss_stderr",
    "generalization_gap",
    "epoch",
)

Trajectory = dict[tuple[int, str], dict[str, float]]
"""Step and kind of record -> what must be equal, as floats."""


def trajectory(folder: Path) -> tuple[Trajectory, list[str]]:
    """What ``history.jsonl`` holds, by step and kind; and its problems: torn lines, or a step that is there twice."""
    found: Trajectory = {}
    problems = []
    file = folder / "history.jsonl"
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], start=1):
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            problems.append(f"line {number} is torn")
            continue
        kind, keys = ("step", EXACT) if "loss" in record else ("measured", EXACT_MEASURED)
        place = (record["step"], kind)
        if place in found:
            problems.append(f"step {place} is there twice")
        found[place] = {key: record[key] for key in keys if key in record}
    return found, problems


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def checkpoint_is_whole(folder: Path) -> bool:
    """By its manifest, checked here independently of the product: every file, its size and hash."""
    try:
        listed = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return False
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {"manifest.json"}
    return listed.keys() <= present and all(
        (folder / name).stat().st_size == entry["bytes"] and digest(folder / name) == entry["sha256"]
        for name, entry in listed.items()
    )


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step to folder, whole or not."""
    found = (folder / "checkpoints").glob("checkpoint-*")
    return dict(sorted((int(path.name.removeprefix("checkpoint-")), path) for path in found))


def newest_whole(folder: Path) -> int:
    """Its step; 0 where there is none."""
    return max((step for step, path in checkpoints(folder).items() if checkpoint_is_whole(path)), default=0)


RESUMED = re.compile(r"(?i)resum\w* .*?checkpoint-(\d+)|going on .*?checkpoint-(\d+)|goes on .*?checkpoint-(\d+)")


def resumed_step(said: str) -> int:
    """The step that a command says it goes on from; 0 where it says nothing."""
    found = [int(next(filter(None, groups))) for groups in RESUMED.findall(said)]
    return found[0] if found else 0


def damaged(file: Path, how: str, draw: random.Random) -> None:
    """Make the file shorter by a random part, flip a random bit of it, or delete it."""
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "truncated":
        content = content[: draw.randrange(len(content) - 1)]  # a manifest without its last newline is whole
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
