"""Bad steps under every engine: what `skip` leaves out, and where `stop` ends. Not collected: about 3 minutes.

    python tests/faults/bad_steps.py --folder /tmp/steps [MODE-STAGE ...]        e.g. skip-3 stop-0
    torchrun --nproc_per_node 2 tests/faults/bad_steps.py --folder /tmp/steps [MODE-STAGE ...]

Real trainers on the pocket base; the third step's loss, or the gradient of one weight, is spoilt on the last rank only,
or the loss is 0 on all. Printed is one line for each case, and at the end how many failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY)

from pipeline.process.environment import prepare_environment

prepare_environment()

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, set_seed
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pipeline.arguments import sft_config
from pipeline.base import load_base, load_tokenizer
from pipeline.data import load_splits
from pipeline.distributed import adapter_weights
from pipeline.errors import UserError
from pipeline.process.rank import is_main, launched, rank, world_size
from pipeline.recipe import load_recipe
from pipeline.supervision.bad_steps import StepGuard
from pipeline.supervision.callback import SupervisionCallback
from pipeline.supervision.ranks import BAD_STEPS_FILE, RANKS_FOLDER
from pipeline.supervision.supervisor import supervised
from pipeline.trainer import LoraDropoutTrainer

FAULT = 3
STEPS = 6
KINDS = ("loss nan", "loss 0", "gradient nan")


class SpoiltTrainer(LoraDropoutTrainer):
    """Spoils steps from the third on: one of them, or all."""

    kind = ""
    last = FAULT

    def spoils(self) -> bool:
        return FAULT <= self.state.global_step + 1 <= self.last

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.spoils() and self.kind == "loss 0":
            self.guard._loss = None
            loss = loss * 0
            self.guard.loss(loss)
        if self.spoils() and self.kind == "loss nan" and rank() == world_size() - 1:
            loss = loss * float("nan")
            self.guard.loss(loss)
        return loss

    def spoil_gradients(self) -> None:
        weight = next(parameter for parameter in self.adapted.parameters() if parameter.requires_grad)
        weight.register_hook(self.spoilt_gradient)

    def spoilt_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        spoilt = self.spoils() and self.kind == "gradient nan" and rank() == world_size() - 1
        return gradient * float("nan") if spoilt else gradient


class Weights(TrainerCallback):
    """The adapter after every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.trainer: LoraDropoutTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.seen.append(
            torch.cat([weight.float().flatten() for weight in adapter_weights(self.trainer.adapted).values()])
        )


def run(folder: Path, zero: int, dtype: str, kind: str, mode: str) -> str:
    """One case; what is wrong with it, or ""."""
    recipe = load_recipe(
        folder / "recipe.yaml",
        [
            f"distributed.zero={zero}",
            f"base.dtype={dtype}",
            f"supervision.on_bad_step={mode}",
            "supervision.bad_steps=2",
        ],
    )
    output = folder / f"{mode}-{zero}-{dtype}-{kind.replace(' ', '-')}"
    tokenizer, arguments = load_tokenizer(recipe.base), sft_config(recipe, output)
    splits = load_splits(recipe, tokenizer)
    set_seed(recipe.seed)
    guard, weights = StepGuard(recipe.supervision), Weights()
    with supervised(output, recipe.supervision) as supervisor:
        trainer = SpoiltTrainer(
            recipe, load_base(recipe.base), arguments, tokenizer, splits.train, None, [weights], guard=guard
        )
        trainer.kind, trainer.last = kind, FAULT if mode == "skip" else STEPS
        weights.trainer = trainer
        trainer.spoil_gradients()
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(SupervisionCallback(supervisor, guard))
        try:
            trainer.train()
            told = ""
        except UserError as error:
            told = str(error)
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()
    PartialState().wait_for_everyone()
    return judged_skip(weights.seen, guard, told) if mode == "skip" else judged_stop(output, kind, told)


def judged_skip(seen: list[torch.Tensor], guard: StepGuard, told: str) -> str:
    """The bad step changes nothing, all others something."""
    before, bad, *rest = seen[FAULT - 2 :]
    if told or guard.bad != 1:
        return f"{guard.bad} bad steps; {told}"
    if not torch.equal(before, bad):
        return f"the bad step moved weights by up to {(bad - before).abs().max():.2g}"
    if torch.equal(bad, rest[0]) or not all(one.isfinite().all() for one in seen):
        return "training does not go on"
    return ""


def judged_stop(output: Path, kind: str, told: str) -> str:
    """Ended after the second bad step, the newest checkpoint before the first, rows of both ranks known."""
    checkpoints = sorted(path.name for path in output.glob("checkpoints/checkpoint-*"))
    if "2 bad steps in a row" not in told:
        return f"not stopped: {told or 'trained to the end'}"
    newest = f"checkpoint-{FAULT - 1}" if is_main() or checkpoints else ""
    if checkpoints[-1] != newest:
        return f"checkpoints {checkpoints}"
    lines = [json.loads(line) for line in (output / RANKS_FOLDER / BAD_STEPS_FILE).read_text().splitlines()]
    found = {(line["step"], line["rank"], len(line["rows"])) for line in lines}
    expected = {(step, one, 2) for step in (FAULT, FAULT + 1) for one in range(world_size())}
    return "" if found == expected else f"rows {found}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("parts", nargs="*", metavar="MODE-STAGE", help="of skip and stop, 0 to 3; by default all")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if is_main():
        if folder.exists():
            parser.error(f"--folder: {folder} exists; expected a new folder")
        folder.mkdir(parents=True)
        rows = [{"instruction": f"Say {number}", "output": str(number) * 3} for number in range(40)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "recipe.yaml").write_text(f"""
name: spoilt
output: {folder}
base: {{model: {REPOSITORY}/recipes/pocket/base, quantization: none}}
adapter: {{rank: 4, alpha: 8, dropout: {{rate: 0.3}}}}
data: {{train: [{{path: {folder}/rows.jsonl, prompt: "{{{{ instruction }}}}"}}], max_length: 32}}
training: {{max_steps: {STEPS}, per_device_train_batch_size: 2, logging_steps: 1, save_strategy: steps, save_steps: 1,
            eval_strategy: "no", gradient_checkpointing: false, weight_decay: 0.1, learning_rate: 1.0e-3}}
""")
        (folder / "ready").touch()
    while not (folder / "ready").exists():  # there is no process group yet: the first arguments make it
        time.sleep(0.1)
    failed = cases = 0
    for mode in ("skip", "stop"):
        for zero in range(4) if launched() else (0,):
            for dtype in ("float32", "bfloat16"):
                for kind in KINDS:
                    if f"{mode}-{zero}" not in (arguments.parts or f"{mode}-{zero}"):
                        continue
                    wrong = run(folder, zero, dtype, kind, mode)
                    everyone = [line for line in gather_object([wrong]) if line] if world_size() > 1 else [wrong]
                    cases += 1
                    failed += any(everyone)
                    gc.collect()
                    if is_main():
                        engine = f"ZeRO-{zero}" if launched() else "python"
                        print(f"{mode}, {engine}, {dtype}, {kind}: {'; '.join(everyone) or 'ok'}", flush=True)
    if is_main():
        print(f"{cases} cases with {world_size()} ranks, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
