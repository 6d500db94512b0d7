"""One of the trainings that :mod:`pipeline.benchmark.saving` compares: ``python -m ... JOB``, a JSON object."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from pipeline.adapter.config import lora_config
from pipeline.arguments import sft_config
from pipeline.base import load_base, load_tokenizer
from pipeline.benchmark.turns import EdgeCallback, TurnsCallback, Watching
from pipeline.data import load_splits
from pipeline.observation.observer import RunObserver
from pipeline.observation.progress import PlainWordsCallback
from pipeline.observation.rank_log import rank_log
from pipeline.observation.status import RunStatus
from pipeline.process.environment import keep_freed_memory
from pipeline.recipe import Recipe, load_recipe
from pipeline.run.folder import HISTORY_FILE, run_folder
from pipeline.supervision.bad_steps import StepGuard
from pipeline.supervision.callback import SupervisionCallback
from pipeline.supervision.supervisor import supervised
from pipeline.trainer import LoraDropoutTrainer


def run(job: dict[str, Any], turns: TurnsCallback, watching: Watching) -> None:
    """Train as the job says.

    Args:
        job: ``recipe``, ``overrides``, ``stock`` (trl's trainer and transformers' checkpoints) and ``watched``
            (heartbeat, status and logs, as pipeline.train has them).
        turns: added last.
        watching: is told of these.
    """
    recipe = load_recipe(Path(job["recipe"]), job["overrides"])
    tokenizer, folder = load_tokenizer(recipe.base), run_folder(recipe)
    folder.mkdir(parents=True)
    arguments, rows = sft_config(recipe, folder), load_splits(recipe, tokenizer).train
    if not torch.cuda.is_available():
        keep_freed_memory()
    set_seed(recipe.seed)
    model = load_base(recipe.base)
    with ExitStack() as stack:
        guard = StepGuard(recipe.supervision, float16=recipe.base.dtype == "float16")
        if job["stock"]:
            trainer = SFTTrainer(
                model=model,
                args=arguments,
                train_dataset=rows.remove_columns("row"),
                processing_class=tokenizer,
                peft_config=lora_config(recipe.adapter),
            )
        else:
            trainer = LoraDropoutTrainer(
                recipe=recipe,
                model=model,
                arguments=arguments,
                tokenizer=tokenizer,
                train=rows,
                evaluation=None,
                callbacks=[],
                guard=guard,
            )
        for printing in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printing)
        if job["watched"]:
            trainer.add_callback(EdgeCallback(watching.begins))
            _watch(trainer, recipe, folder, guard, stack)
            trainer.add_callback(EdgeCallback(watching.ends))
        trainer.add_callback(turns)
        trainer.train()


def _watch(trainer: SFTTrainer, recipe: Recipe, folder: Path, guard: StepGuard, stack: ExitStack) -> None:
    """What pipeline.train adds to a trainer, in its order."""
    status = RunStatus(folder, recipe.supervision.heartbeat_seconds)
    stack.enter_context(rank_log(folder))
    supervisor = stack.enter_context(supervised(folder, recipe.supervision, [status.beat]))
    trainer.add_callback(PlainWordsCallback(folder / HISTORY_FILE))
    trainer.add_callback(RunObserver(status))
    trainer.add_callback(SupervisionCallback(supervisor, guard))


def main() -> None:
    """Words for the other side go where standard output was; what libraries print there goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job, watching = json.loads(sys.argv[1]), Watching()
    run(job, TurnsCallback(job["steps"], channel, watching), watching)


if __name__ == "__main__":
    main()
