"""Trains many small configurations one after another in one process per rank, and writes what was measured.

    python training_worker.py JOBS.json FOLDER
    torchrun --nproc_per_node 2 training_worker.py JOBS.json FOLDER

A launch imports for ten seconds; a configuration trains for one or two. ``JOBS.json`` is a list of
``{"name", "recipe", "overrides", "trainer"}``, the trainer being ``ours``, ``ours, from <job>`` (which resumes from
that job's first checkpoint; the job may be another launch's, ``../<folder>/<job>``), ``stock`` or ``stock, bfloat16
adapter``; each job writes ``FOLDER/<name>.json`` and the folder ``FOLDER/<name>``, its adapter. ``stock`` is trl's
``SFTTrainer`` with peft's ``LoraConfig`` on the same rows as prompt and completion: its base, arguments and trainer
come from the libraries, with the same two corrections as ours (no repacking of 4-bit weights; float32 adapter where no
engine keeps masters).
"""

# the environment stands before the heavy imports

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository, for `pipeline`

from pipeline.process.environment import prepare_environment

prepare_environment()

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from pipeline.adapter.files import save_adapter, settings_of
from pipeline.arguments import sft_config
from pipeline.base import load_base, load_tokenizer
from pipeline.data import load_rows, load_splits
from pipeline.distributed import adapter_weights
from pipeline.process.rank import is_main, launched
from pipeline.recipe import Recipe, load_recipe
from pipeline.trainer import LoraDropoutTrainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Recorder(TrainerCallback):
    """Losses and gradient norms of every step, evaluations, and what ZeRO holds of the model at rest."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.tokens = 0.0
        """Of the data, that training has seen."""
        self.held: dict[str, Any] = {}
        self.first: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.held = held(kwargs["model"])
        self.first = {
            name: parameter.detach().clone()
            for name, parameter in kwargs["model"].named_parameters()
            if "lora_A" in name
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.tokens = logs["num_tokens"]
            if "grad_norm" in logs:  # DeepSpeed's float32 engine without ZeRO clips, but does not tell
                self.gradient_norms.append(float(logs["grad_norm"]))
        elif any(key.startswith("eval_") for key in logs):
            self.evaluations.append({"step": state.global_step, **logs})


def held(model: torch.nn.Module) -> dict[str, Any]:
    """Bytes of base parameters on this rank and in all, and how many adapter weights ZeRO-3 has cut."""
    here = whole = cut = 0
    for parameter in model.parameters():
        if "ds_tensor" in parameter.__dict__:  # ZeRO-3 keeps its shard there, and leaves the parameter itself empty
            available = parameter.ds_status.name == "AVAILABLE"
            own, total = (parameter if available else parameter.ds_tensor).numel(), parameter.ds_numel
            cut += parameter.requires_grad and not available and parameter.ds_tensor.numel() < parameter.ds_numel
        else:
            own = total = parameter.numel()
        if not parameter.requires_grad:
            here += own * parameter.element_size()
            whole += total * parameter.element_size()
    return {"base_bytes_here": here, "base_bytes_whole": whole, "adapter_weights_cut": int(cut)}


def ours(recipe: Recipe, folder: Path, recorder: Recorder) -> SFTTrainer:
    """The project's trainer, put together as pipeline.train does."""
    tokenizer = load_tokenizer(recipe.base)
    arguments = sft_config(recipe, folder)
    splits = load_splits(recipe, tokenizer)
    set_seed(recipe.seed)
    return LoraDropoutTrainer(
        recipe=recipe,
        model=load_base(recipe.base),
        arguments=arguments,
        tokenizer=tokenizer,
        train=splits.train,
        evaluation={"validation": splits.validation, "probe": splits.probe} if splits.validation else None,
        callbacks=[recorder],
    )


def stock(recipe: Recipe, folder: Path, recorder: Recorder, float32_adapter: bool) -> SFTTrainer:
    """Plain trl and peft."""
    dtype = DTYPES[recipe.base.dtype]
    deepspeed = {
        "zero_optimization": {"stage": recipe.distributed.zero},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    arguments = SFTConfig(
        **recipe.training,
        output_dir=str(folder),
        seed=recipe.seed,
        data_seed=recipe.seed,
        max_length=recipe.data.max_length,
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        deepspeed=deepspeed if launched() else None,
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=dtype,
    )
    set_seed(recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(
        recipe.base.model,
        dtype=dtype,
        quantization_config=quantization if recipe.base.quantization == "nf4" else None,
        device_map=None if recipe.distributed.zero == 3 and launched() else {"": "cpu"},
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    validation = recipe.data.validation
    evaluated = load_rows([validation.source]) if validation and validation.source else None
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=_prompt_completion(load_rows(recipe.data.train)),
        eval_dataset=_prompt_completion(evaluated) if evaluated else None,
        processing_class=AutoTokenizer.from_pretrained(recipe.base.model),
        peft_config=LoraConfig(
            r=recipe.adapter.rank,
            lora_alpha=recipe.adapter.alpha,
            target_modules=recipe.adapter.target_modules,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
        callbacks=[recorder],
    )
    if float32_adapter:  # DeepSpeed keeps float32 masters; without it the project keeps the adapter itself in float32
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def _prompt_completion(rows: Dataset) -> Dataset:
    return rows.select_columns(["prompt", "completion"])


def run(job: dict[str, Any], folder: Path) -> None:
    """One configuration, from the recipe to the files."""
    recipe = load_recipe(job["recipe"], job["overrides"])
    recorder = Recorder()
    checkpoints = folder / f"run-{job['name']}"
    if job["trainer"].startswith("ours"):
        trainer = ours(recipe, checkpoints, recorder)
    else:
        trainer = stock(recipe, checkpoints, recorder, job["trainer"] == "stock" and not launched())
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    _, _, resumed = job["trainer"].partition(", from ")
    launch, _, job_name = resumed.rpartition("/")
    saved = folder / launch / f"run-{job_name}" / "checkpoints"
    started_from = sorted(saved.glob("checkpoint-*"))[0] if resumed else None
    trainer.train(resume_from_checkpoint=started_from and str(started_from))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    parameters = dict(model.named_parameters())
    weights = adapter_weights(model)
    if is_main():
        (folder / job["name"]).mkdir()
        save_adapter(model, weights, settings_of(recipe.adapter, recipe.seed), folder / job["name"])
        record = {
            "losses": recorder.losses,
            "gradient_norms": recorder.gradient_norms,
            "evaluations": recorder.evaluations,
            "adapter_dtypes": sorted({str(p.dtype) for p in parameters.values() if p.requires_grad}),
            "tokens": recorder.tokens,
            "changed_a": _changed_share(recorder.first, parameters),
            **recorder.held,
        }
        (folder / f"{job['name']}.json").write_text(json.dumps(record))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()


def _changed_share(before: dict[str, torch.Tensor], after: dict[str, torch.nn.Parameter]) -> float:
    """Share of the entries of A that training moved, where they are whole on this rank."""
    changed = [(after[name].detach() != weight).flatten() for name, weight in before.items() if weight.numel()]
    return torch.cat(changed).float().mean().item() if changed else 0.0


def main() -> None:
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    gc.freeze()  # else each of the many collections below walks all that was imported, half a second
    for job in jobs:
        print(f"== {job['name']}", flush=True)
        run(job, folder)
        gc.collect()


if __name__ == "__main__":
    main()
