"""Counts the bytes that ranks exchange in real training steps, beside what ``pipeline/preflight/traffic.py`` predicts.

The model is a known shape at a sixteenth of its width, vocabulary and rank: matrices and adapter are 1/256 of the real
ones, and so are DeepSpeed's limits, which count elements, so that ZeRO-3 gathers and lets go of the same layers at the
same moments. Two runs of different length differ by the traffic of the steps between, and nothing is hooked into them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.benchmark.random_base import plain_tokenizer
from pipeline.benchmark.shapes import shape_config
from pipeline.benchmark.turns import free_port
from pipeline.errors import UserError
from pipeline.preflight.traffic import Stored, Traffic, checkpoint_traffic, kept_bytes, step_traffic, stored_tensors
from pipeline.process.rank import launched
from pipeline.recipe import Recipe, load_recipe
from pipeline.run.provenance import git_state, now, versions

NARROWER = 16
SHRUNK = NARROWER**2
STEPS = 3, 5
"""Of the two runs. ZeRO-3 knows the order of the weights after two passes."""
SMALL = 64
"""Bytes of the largest message that is no tensor: counts, norms, flags."""
PLACE = "pipeline.benchmark.traffic_worker"


@dataclass(frozen=True)
class Case:
    """A way to train."""

    zero: int
    accumulation: int
    recomputes: bool = True
    saves: bool = False

    @property
    def name(self) -> str:
        """Of its runs."""
        return (
            f"zero{self.zero}-x{self.accumulation}{'' if self.recomputes else '-kept'}{'-saves' if self.saves else ''}"
        )

    @property
    def words(self) -> str:
        """For the table."""
        if self.saves:
            return f"ZeRO-{self.zero}, a checkpoint"
        recomputes = "" if self.recomputes else ", no activation checkpointing"
        return f"ZeRO-{self.zero}, accumulation {self.accumulation}{recomputes}"


CASES = (
    *(Case(zero, 2) for zero in range(4)),
    Case(3, 1),
    Case(3, 1, recomputes=False),
    *(Case(zero, 2, saves=True) for zero in (0, 2, 3)),
)


@dataclass(frozen=True)
class Count:
    """Of one step, or of one checkpoint."""

    case: str
    predicted: dict[str, float]
    """Bytes of whole tensors gathered, and reduced or scattered; bytes that each rank sends."""
    kept: int
    """That ZeRO-3 may gather less."""
    measured: dict[str, float]
    small_messages: float
    """Collectives of at most ``SMALL`` bytes."""
    messages: float


def benchmark(shape: str, layers: int | None, ranks: int, announce: Callable[[str], None]) -> dict[str, Any]:
    """Train each case for a few steps and count.

    Args:
        shape: of ``pipeline/benchmark/shapes.py``.
        layers: decoder layers, where the depth is cut.
        ranks: to start.
        announce: told what happens.

    Raises:
        UserError: started through a launcher; the training failed.
    """
    if launched():
        raise UserError("launch/benchmark.py starts its processes itself: start it with `python`")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        folder = Path(place)
        announce("building the base")
        recipe_file = _prepared(_narrow(shape_config(shape, layers)), folder)
        jobs = [_job(case, steps, recipe_file, folder) for case in CASES for steps in _steps(case)]
        announce(f"training {len(jobs)} times on {ranks} ranks")
        apart = _namespace()
        counts = _counted(jobs, ranks, folder, apart)
        recipe = load_recipe(recipe_file)
        stored = stored_tensors(LlamaConfig.from_pretrained(folder / "base"), recipe)
        found = [_count(case, counts, stored, recipe, ranks, bool(apart)) for case in CASES]
    return {
        "counts": [asdict(count) for count in found],
        "conditions": {
            "shape": shape,
            "layers": layers,
            "narrower": NARROWER,
            "ranks": ranks,
            "wire": bool(apart),
            "versions": versions(),
            "git": git_state(),
            "finished": now(),
        },
    }


def _narrow(config: LlamaConfig) -> LlamaConfig:
    """The same layers and heads' proportions, ``NARROWER`` times narrower."""
    assert config.num_key_value_heads is not None
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = max(config.num_attention_heads // NARROWER, groups)
    return LlamaConfig(
        hidden_size=config.hidden_size // NARROWER,
        intermediate_size=config.intermediate_size // NARROWER,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // groups,
        vocab_size=config.vocab_size // NARROWER,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )


def _prepared(config: LlamaConfig, folder: Path) -> Path:
    """Base, rows and recipe; returns the recipe's file."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
    plain_tokenizer(config.vocab_size).save_pretrained(folder / "base")
    rows = [{"prompt": "<3> <4> <5>", "completion": "<6> <7>"}] * 64
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "name": "traffic",
        "output": str(folder),
        "base": {"model": str(folder / "base"), "dtype": "bfloat16"},
        "adapter": {"rank": 16 // NARROWER, "dropout": {"rate": 0.5}},
        "data": {"train": [{"path": str(folder / "rows.json"), "format": "prompt-completion"}], "max_length": 16},
        "training": {"per_device_train_batch_size": 1, "report_to": [], "logging_steps": 1000, "save_strategy": "no"},
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # which is YAML too
    return file


def _steps(case: Case) -> tuple[int, ...]:
    """Of its runs: what checkpoints add shows in a single one."""
    return STEPS[1:] if case.saves else STEPS


def _job(case: Case, steps: int, recipe_file: Path, folder: Path) -> dict[str, Any]:
    saves = [f"training.save_steps={STEPS[0]}", "training.save_strategy=steps"] if case.saves else []
    return {
        "name": f"{case.name}-{steps}",
        "recipe": str(recipe_file),
        "shrunk": SHRUNK,
        "overrides": [
            f"name={case.name}-{steps}",
            f"distributed.zero={case.zero}",
            f"training.gradient_accumulation_steps={case.accumulation}",
            f"training.gradient_checkpointing={str(case.recomputes).lower()}",
            f"training.max_steps={steps}",
            *saves,
        ],
    }


def _namespace() -> list[str]:
    """Command that starts another in a network of its own; empty where this machine does not let it."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return []
    apart = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    command = [*apart, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []


def _counted(jobs: list[dict[str, Any]], ranks: int, folder: Path, apart: list[str]) -> dict[str, Any]:
    """What the first rank counted, by job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"]
    reachable = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]  # a network of its own has no other name
    done = subprocess.run(
        [*apart, *torchrun, *reachable, "-m", PLACE, str(folder / "jobs.json"), str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TORCH_FR_BUFFER_SIZE": "200000", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the training failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads((folder / "rank-0.json").read_text()))


def _count(case: Case, counts: dict[str, Any], stored: Stored, recipe: Recipe, ranks: int, wire: bool) -> Count:
    """Difference of two runs: in their steps, or in a checkpoint."""
    first, second = (f"{case.name}-{steps}" for steps in STEPS)
    times = STEPS[1] - STEPS[0]
    if case.saves:
        first, times = second.replace("-saves", ""), 2  # at the step asked for, and at the end
    messages = _collectives(counts[second])
    messages.subtract(_collectives(counts[first]))
    gathered = reduced = small = 0.0
    for (name, _, size), number in messages.items():
        if size <= SMALL:
            small += number
        elif "gather" in name:
            gathered += number * size
        else:
            reduced += number * size
    predicted = _predicted(case, stored, ranks)
    sent = (counts[second]["wire"] - counts[first]["wire"]) / ranks
    return Count(
        case=case.words,
        predicted={
            "gathered": predicted.gathered,
            "reduced": predicted.all_reduced + predicted.scattered,
            # gloo has no reduce-scatter of its own: torch all-reduces in its place
            "sent": Traffic(predicted.gathered, 0, predicted.all_reduced + predicted.scattered).sent(ranks),
        },
        kept=0 if case.saves or case.zero < 3 else kept_bytes(stored, case.accumulation, SHRUNK),
        measured={"gathered": gathered / times, "reduced": reduced / times, "sent": sent / times if wire else 0.0},
        small_messages=small / times,
        messages=sum(messages.values()) / times,
    )


def _predicted(case: Case, stored: Stored, ranks: int) -> Traffic:
    if case.saves:
        return checkpoint_traffic(stored, case.zero, ranks)
    return step_traffic(stored, case.zero, case.accumulation, SHRUNK)


def _collectives(count: dict[str, Any]) -> Counter[tuple[str, str, int]]:
    return Counter({(name, dtype, size): number for name, dtype, size, number in count["collectives"]})


def print_result(found: dict[str, Any]) -> None:
    """The table, predicted beside measured."""
    conditions = found["conditions"]
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("per step, bytes", no_wrap=True)
    for title in ("gathered", "counted", "reduced", "counted", "sent by a rank", "counted", "messages", "small"):
        grid.add_column(title, justify="right", no_wrap=True)
    for count in found["counts"]:
        pairs = [
            f"{count[side][what]:,.0f}"
            for what in ("gathered", "reduced", "sent")
            for side in ("predicted", "measured")
        ]
        grid.add_row(count["case"], *pairs, f"{count['messages']:,.0f}", f"{count['small_messages']:,.0f}")
    depth = "" if conditions["layers"] is None else f", {conditions['layers']} layers"
    head = (
        f"{conditions['shape']}{depth}, {conditions['narrower']} times narrower (x {SHRUNK} for the real one), "
        f"nf4, rank 16 / {conditions['narrower']}, {conditions['ranks']} ranks\n"
        "gathered, reduced: whole tensors at torch's process group; sent: rings, against the kernel's bytes"
        f"{'' if conditions['wire'] else ' (not counted: no network namespace here)'}; small: at most {SMALL} bytes"
    )
    Console(width=max(Console().width, 170), soft_wrap=True).print(Group(Text(head), Text(), grid))
