"""Training that is killed, damaged or changed in between: it goes on to the same end, or is refused with words.

The short version of ``tests/faults/kill.py`` and ``tests/faults/inject.py``, which take longer.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults.forked import Forked, forked
from faults.outcome import ADAPTER, checkpoints, damaged, digest, newest_whole, trajectory
from faults.runs import Setting, write_recipe
from faults.watch import Watch

from pipeline.checkpoint.files import MANIFEST_FILE

RANKS = 2
SHORT = ("training.max_steps=7", "training.eval_steps=3", "training.save_steps=2")
"""Checkpoints at steps 2, 4 and 6; seven of the eight steps of an epoch."""


@pytest.fixture(scope="module")
def draw() -> random.Random:
    """Another moment, mask kind and ZeRO stage in every run of this suite; ``KILL_SEED=... pytest`` repeats one."""
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def server() -> Iterator[Forked]:
    with forked() as server:
        yield server


@pytest.fixture(scope="module")
def setting(draw: random.Random) -> Setting:
    return Setting(
        zero=draw.randrange(4),
        sampling=draw.choice(["instance", "example"]),
        quantization=draw.choice(["none", "nf4"]),
        rank=64,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def killed(server: Forked, folder: Path, pocket_base: Path, setting: Setting, draw: random.Random) -> Path:
    """A run of which one rank was killed while it wrote the checkpoint of step 6: 4 and 2 are whole."""
    recipe = write_recipe(folder, pocket_base, "killed", setting)
    run, log = folder / "outputs" / "killed", folder / "killed.log"
    watch = Watch(run)
    ranks = server.start(recipe, RANKS, log, *SHORT)
    deadline = time.monotonic() + 200
    while watch.writing != ".checkpoint-6.part":
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        watch.look()
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.05))
    victim = draw.randrange(RANKS)
    os.kill(ranks[victim], signal.SIGKILL)
    start = time.monotonic()
    statuses = server.wait(ranks)
    assert time.monotonic() - start < 30
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] not in (0, -signal.SIGKILL), log.read_text()[-3000:]
    return run


@pytest.mark.slow
def test_changed_data_and_recipe_are_refused_by_name(
    server: Forked, killed: Path, folder: Path, draw: random.Random
) -> None:
    rows = folder / "rows.jsonl"
    before, held = rows.read_text(), sorted(killed.rglob("*"))
    changed = [json.loads(line) for line in before.splitlines()]
    changed[draw.randrange(len(changed))]["output"] = "1000"
    rows.write_text("".join(json.dumps(row) + "\n" for row in changed))
    log = folder / "changed.log"
    ranks = server.start(folder / "killed.yaml", RANKS, log, *SHORT, "training.learning_rate=0.5")
    statuses, said = server.wait(ranks), log.read_text()
    rows.write_text(before)
    assert 2 in statuses and 0 not in statuses, said
    assert "holds another experiment" in said and "Traceback" not in said
    assert "training.learning_rate: 0.001 there, 0.5 here" in said
    assert "train data: " in said or "validation data: " in said  # whichever split the row is in
    assert sorted(killed.rglob("*")) == held


@pytest.mark.slow
def test_a_killed_run_ends_as_if_nothing_had_happened(
    server: Forked, killed: Path, folder: Path, pocket_base: Path, setting: Setting, draw: random.Random
) -> None:
    """Bit for bit, though a file of its newest whole checkpoint is damaged besides."""
    newest = newest_whole(killed)
    assert newest in (4, 6)
    checkpoint = checkpoints(killed)[newest]
    file = draw.choice(sorted(checkpoint.iterdir()))
    damaged(file, draw.choice(["truncated", "flipped", "missing"]), draw)
    log = folder / "again.log"
    assert server.wait(server.start(folder / "killed.yaml", RANKS, log, *SHORT)) == [0, 0], log.read_text()[-3000:]
    said = log.read_text()
    accused = "" if file.name == MANIFEST_FILE else file.name  # a bit of the manifest may accuse the file it speaks of
    assert f"left aside, damaged: {checkpoint}: {accused}" in said, said
    assert f"going on from {killed / 'checkpoints' / f'checkpoint-{newest - 2}'} (step {newest - 2})" in said

    recipe = write_recipe(folder, pocket_base, "whole", setting)
    log = folder / "whole.log"
    assert server.wait(server.start(recipe, RANKS, log, *SHORT)) == [0, 0], log.read_text()[-3000:]
    whole = folder / "outputs" / "whole"
    assert trajectory(killed) == trajectory(whole)
    assert [step for step, kind in trajectory(whole)[0] if kind == "step"] == [1, 2, 3, 4, 5, 6, 7]
    assert digest(killed / ADAPTER) == digest(whole / ADAPTER)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (killed, whole)]
    assert names[0] == names[1] == ["checkpoint-6", "checkpoint-7"]


def test_a_disk_that_is_too_small_or_fills_up_ends_with_words(
    server: Forked, folder: Path, pocket_base: Path, setting: Setting
) -> None:
    room = folder / "outputs" / "full"
    room.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(room)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.decode().strip()}")
    try:
        recipe = write_recipe(folder, pocket_base, "full", replace(setting, quantization="none"))
        log = folder / "full.log"
        output = [f"output={room}", "training.max_steps=2", "training.save_steps=1", "training.eval_strategy=no"]
        assert server.wait(server.start(recipe, 1, log, *output)) == [2], log.read_text()[-3000:]
        said = log.read_text()
        takes = re.search(r"error: output: .*: a checkpoint takes ([\d.]+) MiB, and 3\.0 MiB are free", said)
        assert takes is not None and not (room / "full").exists(), said

        size = f"size={math.ceil(16 + 1.6 * float(takes[1]))}m"
        subprocess.run(["mount", "-o", f"remount,{size}", str(room)], check=True)
        log = folder / "filled.log"
        assert server.wait(server.start(recipe, 1, log, *output)) == [2], log.read_text()[-3000:]
        said += log.read_text()
        assert "error: the checkpoint of step 2 could not be written" in said and "are free" in said
        assert "Traceback" not in said
        assert [path.name for path in (room / "full" / "checkpoints").iterdir()] == ["checkpoint-1"]
    finally:
        subprocess.run(["umount", "--lazy", str(room)], check=True)
