"""launch/sft.py under signals: what is kept, what is said, and with which status it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from sft_support import environment, launched_by, write_recipe

from launch.command import STATUSES
from pipeline.process import exit_status


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pocket_base: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("signals"), pocket_base)


def start(repository: Path, launcher: str, recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    """In a session of its own, as a terminal's foreground job."""
    return subprocess.Popen(
        [*launched_by(launcher), "launch/sft.py", str(recipe), "--no-eval", *arguments],
        env=environment(),
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_watched(process: subprocess.Popen[str]) -> bool:
    """Whether handlers are in force: python has none of its own for SIGUSR1."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_training_ends_it_with_one_sentence(
    repository: Path, recipe: Path, number: signal.Signals
) -> None:
    process = start(repository, "python", recipe, f"name=early-{number.name}")
    while not is_watched(process):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == (exit_status.INTERRUPTED if number == signal.SIGINT else exit_status.STOPPED)
    cause = "Ctrl-C" if number == signal.SIGINT else number.name
    # python itself may have a word to say of what was interrupted amid its imports, before ours
    assert errors.strip().endswith(
        f"stopped by {cause} before training began; nothing is lost, the same command starts again"
    ), output
    assert errors.count("Traceback") <= errors.count("Exception ignored")
    assert not (recipe.parent / "outputs" / f"early-{number.name}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_ctrl_c_keeps_a_checkpoint_and_says_so(repository: Path, recipe: Path, launcher: str) -> None:
    """The signal goes to all processes, as a terminal sends it; deepspeed's launcher makes SIGTERM of it, too."""
    longer = ["training.max_steps=100000", "training.eval_strategy=no", "data.validation=null"]
    process = start(repository, launcher, recipe, f"name={launcher}", *longer)
    folder = recipe.parent / "outputs" / launcher
    deadline = time.monotonic() + 200
    while not (folder / "history.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    _, alive = psutil.wait_procs(everyone, timeout=30)
    assert not alive
    (checkpoint,) = (folder / "checkpoints").glob("checkpoint-*")
    step = checkpoint.name.removeprefix("checkpoint-")
    kept = f"at step {step}; the checkpoint in {checkpoint} is kept; the same command goes on from it"
    assert kept in errors
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == 6 * 7 * 2
    assert not (folder / "adapter_model.safetensors").exists()  # an unfinished run does not look finished
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_status"], status["step"]) == ("stopped", exit_status.INTERRUPTED, int(step))
    assert kept in status["message"]
    assert process.returncode == exit_status.INTERRUPTED or launcher == "deepspeed"  # which has a status of its own
    assert "Traceback" not in errors or launcher == "deepspeed"  # whose own command has one


def test_the_help_tells_every_status() -> None:
    for name in ("FINISHED", "FAILED", "BAD_INPUT", "HUNG", "STOPPED", "INTERRUPTED"):
        assert f"{getattr(exit_status, name)} " in STATUSES
