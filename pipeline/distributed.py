"""DeepSpeed: its configuration, and what ZeRO-3 needs to know of an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from pipeline.errors import UserError
from pipeline.process.rank import launched, rank
from pipeline.recipe import Recipe


def zero_stage(recipe: Recipe) -> int:
    """ZeRO stage in force: the recipe's under a launcher, 0 under plain ``python``."""
    return recipe.distributed.zero if launched() else 0


def check_launch(recipe: Recipe) -> None:
    """Refuse an offload that nothing would carry out.

    Raises:
        UserError: offload asked for without a launcher.
    """
    if not launched() and recipe.distributed.offload != "none":
        raise UserError(
            f"distributed.offload: {recipe.distributed.offload!r} is DeepSpeed's, which plain `python` does not run.\n"
            "Start with `deepspeed --num_gpus 1 launch/sft.py ...`, or set distributed.offload=none."
        )


PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3 keeps tensors up to this size whole on every rank between two steps."""
REUSE_ELEMENTS = 250_000_000
"""ZeRO-3 does not let go of what a quantised model needs again within so many elements."""
SHRUNK = 1
"""Divides DeepSpeed's limits, which count elements. A benchmark sets it where a small model stands for a larger one."""


def deepspeed_config(recipe: Recipe) -> dict[str, object] | None:
    """DeepSpeed's configuration, or None under plain ``python``. ``"auto"`` values are filled in by transformers."""
    if not launched():
        return None
    stage, offload = recipe.distributed.zero, recipe.distributed.offload
    # DeepSpeed's buckets of 5e8 elements are for whole models: 1 GB of buffer for a 40-million-parameter adapter
    zero: dict[str, object] = {"stage": stage, "reduce_bucket_size": 50_000_000 // SHRUNK}
    if stage == 3:  # DeepSpeed's own defaults
        zero["stage3_prefetch_bucket_size"] = 50_000_000 // SHRUNK
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS // SHRUNK
    if stage == 3 and recipe.base.quantization == "nf4":
        # DeepSpeed keeps up to 1e9 gathered *elements*; a 4-bit weight is a quarter of one, so its default is most of a
        # 7B base. This is the same share of it as of a 16-bit model.
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = REUSE_ELEMENTS // SHRUNK
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    log = {"comms_logger": {"enabled": True, "prof_all": True}} if recipe.distributed.communication_log else {}
    return {
        **log,  # where the key stands, DeepSpeed logs, whatever it says
        "zero_optimization": zero,
        "bf16": {"enabled": recipe.base.dtype == "bfloat16"},
        "fp16": {"enabled": recipe.base.dtype == "float16"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # the optimizer is SFTConfig's under every stage, offloaded or not, so that a recipe means one thing
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,  # our own log line says it
    }


def register_adapter_weights(model: nn.Module) -> None:
    """Tell ZeRO-3 that a LoRA layer's forward reads the weights of its A and B.

    Stock peft calls A and B as modules, whose hooks gather the weights. LoRA Dropout multiplies the weights by
    masks first, in the layer's own forward. ``register_external_parameter`` is DeepSpeed's interface for that.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer):  # which ZeRO-3 does not have
            for weights in (module.lora_A, module.lora_B):
                for linear in weights.values():
                    register_external_parameter(module, linear.weight)


def take_back_first_step(optimizer: Any) -> None:
    """Take back the step that DeepSpeed's 16-bit optimizer without ZeRO makes before training.

    To allocate its state it steps on zero gradients, which AdamW counts: bias correction is then one step ahead, so
    the first update is 0.74 of what it should be and ZeRO-0 trains otherwise than ZeRO-1 to 3; weight decay applies
    once, too. Seen in deepspeed 0.19.8 (FP16_UnfusedOptimizer.initialize_optimizer_states); delete when
    tests/pipeline/test_training.py finds nf4 under ZeRO-0 and ZeRO-2 equal without it.

    Args:
        optimizer: DeepSpeed's, of a new engine.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return
    for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, parameter in zip(masters, parameters, strict=True):
            master.data.copy_(parameter.data)
    for moments in optimizer.optimizer.state.values():
        if "step" in moments:
            moments["step"] = moments["step"] * 0  # a tensor or a number


def unlink_shared_buffers() -> None:
    """On a CPU, take the names of DeepSpeed's shared buffers away; each rank, when all ranks have mapped them.

    DeepSpeed never does: each run leaves 66 MiB of memory per rank in /dev/shm until the machine starts anew, and one
    that was killed leaves a half-finished exchange to the next run on the same port. Seen in deepspeed 0.19.8
    (ops/csrc/cpu/comm/shm.cpp); delete when its shared_close is called. What is mapped stays usable.
    """
    names = (str(os.getuid()), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), str(rank()))
    Path("/dev/shm", "_".join(("deepspeed_allreduce_buffer", *names))).unlink(missing_ok=True)


def loss_scaler_of(optimizer: Any) -> Any:
    """The object that keeps fp16's dynamic loss scale in DeepSpeed's optimizer; None where no loss is scaled so."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if isinstance(optimizer, FP16_UnfusedOptimizer):
        config = optimizer.loss_scale_config
        return config if config.dynamic_loss_scale else None
    if isinstance(optimizer, ZeROOptimizer):
        return optimizer.loss_scaler if optimizer.dynamic_loss_scale else None
    return None


def is_zero_3() -> bool:
    """Whether weights are sharded in this process."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def whole_parameters(parameters: list[nn.Parameter], written_by: int | None = None) -> Iterator[None]:
    """Context in which ZeRO-3's shards of these parameters are whole on every rank; below ZeRO-3 they always are.

    Args:
        parameters: of the model.
        written_by: the rank whose changes are kept, and sharded again at the end; None where nothing is changed.
    """
    if is_zero_3():
        import deepspeed

        context = deepspeed.zero.GatheredParameters(parameters, modifier_rank=written_by)
    else:
        context = nullcontext()
    with context:
        yield


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights, whole, on the CPU, under peft's names. Every rank must call it (ZeRO-3 gathers)."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with whole_parameters(list(trainable.values())):
        whole = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trainable.items()}
    # embeddings are never trained here; "auto" would ask the Hub about the base, at the very end of a run
    named = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    return {name: weight.contiguous() for name, weight in named.items()}
