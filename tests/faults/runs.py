"""Real training runs for the tests of faults: a small recipe, its launch, its processes, and what it left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
TAG = "LORA_DROPOUT_FAULT_RUN"
"""In the environment of every process of one launch, so that orphans are found."""

RECIPE = """
name: {name}
seed: 3
output: {folder}/outputs
base: {{model: {base}, quantization: {quantization}, dtype: {dtype}}}
adapter: {{rank: {rank}, alpha: 8, dropout: {{rate: 0.5, instances: 2, sampling: {sampling}}}}}
data:
  train: [{{path: {folder}/rows.jsonl, prompt: "{{{{ instruction }}}}\\nAnswer:"}}]
  validation: {{fraction: 0.13, probe_rows: 4}}
  max_length: 32
training: {{num_train_epochs: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, logging_steps: 1,
           eval_strategy: steps, eval_steps: 5, gradient_checkpointing: false, save_strategy: steps,
           save_steps: {save_steps}, save_total_limit: 2, learning_rate: 1.0e-3, optim: adamw_torch}}
distributed: {{zero: {zero}}}
supervision: {{heartbeat_seconds: 1, hang_minutes: 3}}
"""


@dataclass(frozen=True)
class Setting:
    """What is trained: 61 rows of training, 8 steps an epoch with two ranks, the last one short."""

    zero: int = 2
    sampling: str = "instance"
    quantization: str = "none"
    rank: int = 256  # 30 MB of optimizer state: a checkpoint takes long enough to be hit
    save_steps: int = 3  # never at the end of an epoch

    def __str__(self) -> str:
        return f"zero{self.zero}-{self.sampling}-{self.quantization}"


def write_recipe(folder: Path, base: Path, name: str, setting: Setting) -> Path:
    """A recipe in ``folder``, and its 70 rows if they are not there yet."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        draw = random.Random(0)
        numbers = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(70)]
        lines = [{"instruction": f"Add {a} and {b}.", "input": "", "output": str(a + b)} for a, b in numbers]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = folder / f"{name}.yaml"
    dtype = "float32" if setting.quantization == "none" else "bfloat16"
    recipe.write_text(
        RECIPE.format(
            name=name,
            folder=folder,
            base=base,
            dtype=dtype,
            quantization=setting.quantization,
            rank=setting.rank,
            sampling=setting.sampling,
            save_steps=setting.save_steps,
            zero=setting.zero,
        )
    )
    return recipe


def environment(tag: str) -> dict[str, str]:
    """One thread in every process: another number adds in another order, and the last bits differ."""
    return {
        **os.environ,
        TAG: tag,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
    }


def launch_command(launcher: str) -> list[str]:
    """``python`` starts one process, the others two."""
    return {
        "python": [sys.executable],
        "deepspeed": [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port", free_port()],
        "torchrun": [str(SCRIPTS / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    }[launcher]


@dataclass
class Attempt:
    """One start of the command."""

    launcher: str
    recipe: Path
    log: Path
    arguments: tuple[str, ...] = ()
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        """Start it; what it says goes to the log."""
        command = [*launch_command(self.launcher), str(REPOSITORY / "launch" / "sft.py"), str(self.recipe), "--no-eval"]
        with self.log.open("w") as said:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                env=environment(self.tag),
                cwd=REPOSITORY,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.monotonic()

    def processes(self) -> list[psutil.Process]:
        """All that live and stem from this start, orphans too."""
        found = []
        for process in psutil.process_iter():
            try:
                # a zombie has no environment, and is dead
                if process.pid != os.getpid() and process.environ().get(TAG) == self.tag:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes."""
        found = {}
        for process in self.processes():
            try:
                rank = process.environ().get("RANK")
                parent = process.parent()
                forked = parent is not None and parent.environ().get("RANK") is not None
            except psutil.Error:
                continue
            if rank is not None and not forked:
                found[int(rank)] = process
        return found

    def kill(self, what: str) -> str:
        """SIGKILL; ``launcher``, ``node launcher`` (deepspeed's second process), ``all ranks`` or ``rank <r>``.

        Returns:
            What was hit: the launcher where no rank runs yet, all ranks where that one does not.
        """
        ranks = self.ranks()
        if what == "launcher" or not ranks:
            what, hit = "launcher", [psutil.Process(self.process.pid)]
        elif what == "node launcher":
            hit = [parent for parent in [next(iter(ranks.values())).parent()] if parent is not None]
        elif what == "all ranks" or int(what.removeprefix("rank ")) not in ranks:
            what, hit = "all ranks", list(ranks.values())
        else:
            hit = [ranks[int(what.removeprefix("rank "))]]
        for process in hit:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        return what

    def gone_after(self, patience: float) -> float | None:
        """Seconds until the last process of this start is gone; None if that takes longer, and then they are ended."""
        start = time.monotonic()
        while time.monotonic() - start < patience:
            self.process.poll()  # else it stays a zombie
            if not self.processes():
                self.process.wait()
                return time.monotonic() - start
            time.sleep(0.3)
        self.end()
        return None

    def end(self) -> None:
        """SIGKILL to all that is left."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def status(self, patience: float = 400) -> int:
        """Exit status of the command, waited for; it and its children are ended after ``patience`` seconds."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.end()
            raise

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def two_layers(folder: Path) -> Path:
    """The first two layers of the pocket base, float32."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    base = folder / "base"
    pocket = REPOSITORY / "recipes" / "pocket" / "base"
    LlamaForCausalLM.from_pretrained(pocket, num_hidden_layers=2, dtype="float32").save_pretrained(base)
    AutoTokenizer.from_pretrained(pocket).save_pretrained(base)
    return base
