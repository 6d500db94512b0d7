"""Trains AdaLoRA configurations, one after another, and writes what each rank holds afterwards.

    python adalora_worker.py JOBS.json FOLDER
    torchrun --nproc_per_node 2 adalora_worker.py JOBS.json FOLDER

``JOBS.json`` is a list of ``{"name", "recipe", "overrides"}``. Each job writes ``FOLDER/<name>.<rank>.json`` and the
folder ``FOLDER/<name>``, its adapter.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from training_worker import Recorder, launched, ours  # prepares the environment before the heavy imports
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pipeline.adapter.adalora import RankAllocation, layer_weights
from pipeline.adapter.files import save_adapter, settings_of
from pipeline.distributed import adapter_weights
from pipeline.recipe import load_recipe


def master_values(allocation: RankAllocation) -> dict[str, list[float]]:
    """The optimizer's own singular values, float32; every rank calls it."""
    if not launched():
        return {name: layer_weights(layer)["lora_E"][:, 0].tolist() for name, layer in allocation.layers.items()}
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, layer in allocation.layers.items():
        values = layer_weights(layer)["lora_E"]
        master = safe_get_full_fp32_param(values)
        if master is None:  # no ZeRO
            master = allocation._masters.get(name, values)
        found[name] = master[:, 0].tolist()
    return found


def run(job: dict[str, Any], folder: Path) -> None:
    """One configuration."""
    recipe = load_recipe(job["recipe"], job["overrides"])
    recorder = Recorder()
    trainer = ours(recipe, folder / "checkpoints", recorder)
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    trainer.train()
    allocation = trainer.allocation
    record = {
        "losses": recorder.losses,
        "trained": sorted({name.split(".")[-2] for name, p in trainer.adapted.named_parameters() if p.requires_grad}),
        "rank_numbers": sorted({layer.ranknum["default"].item() for layer in allocation.layers.values()}),
        "steps": [allocation.config.tinit, allocation.config.tfinal, allocation.config.total_step],
        "kept": {name: kept.tolist() for name, kept in allocation.kept.items()},
        "values": {name: layer_weights(layer)["lora_E"][:, 0].tolist() for name, layer in allocation.layers.items()},
        "masters": master_values(allocation),
        "importance": {
            name: {kind: value.double().sum().item() for kind, value in kinds.items()}
            for name, kinds in allocation.importance.items()
        },
    }
    rank = trainer.accelerator.process_index
    (folder / f"{job['name']}.{rank}.json").write_text(json.dumps(record))
    weights = adapter_weights(trainer.adapted)
    if rank == 0:
        (folder / job["name"]).mkdir()
        save_adapter(trainer.adapted, weights, settings_of(recipe.adapter, recipe.seed), folder / job["name"])
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(f"== {job['name']}", flush=True)
        run(job, Path(sys.argv[2]))
        gc.collect()


if __name__ == "__main__":
    main()
