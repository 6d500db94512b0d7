"""The configurations that ``test_training.py`` trains: name -> (trainer, overrides), see ``training_worker.py``."""

from __future__ import annotations

TEMPLATE = "{{ instruction }} {{ input }}\nAnswer:"

# Rank 512 makes A and B larger than ZeRO-3's persistence threshold (100,000 elements): below it nothing is sharded.
RECIPE = """
name: trained
seed: 5
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{rank: 512, alpha: 512, target_modules: [q_proj, up_proj, down_proj],
           dropout: {{rate: 0.5, instances: 2, sampling: instance}}}}
data:
  train: [{{path: {folder}/train.jsonl, prompt: "{template}"}}]
  validation: {{source: {{path: {folder}/validation.jsonl, prompt: "{template}"}}, probe_rows: 5}}
  max_length: 48
training:
  {{max_steps: 3, per_device_train_batch_size: 2, per_device_eval_batch_size: 2, learning_rate: 1.0e-3,
   optim: adamw_torch, gradient_checkpointing: false, logging_steps: 1, eval_strategy: steps, eval_steps: 2,
   report_to: [], save_strategy: "no"}}
"""

NO_VALIDATION = ("data.validation=null", "training.eval_strategy=no")
NF4 = ("base.quantization=nf4", "base.dtype=bfloat16")
PLAIN_LORA = ("adapter.dropout.rate=0", "adapter.dropout.instances=1")
BASES = {"fp32": (), "nf4": NF4}
VALIDATIONS = {"unvalidated": NO_VALIDATION, "validated": ()}
EXECUTIONS = {"batched": (), "sequential": ("adapter.dropout.execution=sequential",)}
CHECKPOINTING = {
    "kept": (),
    "reentrant": (
        "training.gradient_checkpointing=true",
        "training.gradient_checkpointing_kwargs={use_reentrant: true}",
    ),
    "non-reentrant": (
        "training.gradient_checkpointing=true",
        "training.gradient_checkpointing_kwargs={use_reentrant: false}",
    ),
}
EXAMPLE = ("adapter.dropout.sampling=example",)


def zero(stage: int, offload: str = "none") -> tuple[str, ...]:
    return (f"distributed.zero={stage}", f"distributed.offload={offload}")


def stock_pairs(stages: tuple[tuple[str, str, int], ...]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Ours and stock trl at rate 0, for each (base, validation, ZeRO stage)."""
    return {
        f"{whose}-{base}-{validation}-zero{stage}": (
            whose,
            (*PLAIN_LORA, *BASES[base], *VALIDATIONS[validation], *zero(stage), "training.max_steps=4"),
        )
        for base, validation, stage in stages
        for whose in ("ours", "stock")
    }


STOCK_ONE = tuple((base, validation, 0) for base in BASES for validation in VALIDATIONS)
STOCK_TWO = (("fp32", "unvalidated", 2), *((base, "validated", 2) for base in BASES), ("nf4", "validated", 3))

# equal losses for the same masks, two ranks: name -> overrides. The first of each group is the reference.
SAME_FP32 = {
    **{
        f"fp32-zero{stage}-{how}": (*zero(stage), *EXECUTIONS[how])
        for stage, how in ((2, "batched"), (1, "batched"), (3, "batched"))
    },
    **{
        f"fp32-zero{stage}-{how}-{kind}": (*zero(stage), *EXECUTIONS[how], *CHECKPOINTING[kind])
        for stage, how, kind in (
            (0, "batched", "reentrant"),
            (0, "sequential", "non-reentrant"),
            (2, "batched", "non-reentrant"),
            (3, "batched", "reentrant"),
            (3, "sequential", "reentrant"),
        )
    },
    **{
        f"fp32-zero{stage}-offload-{offload}": zero(stage, offload) for stage, offload in ((1, "optimizer"), (3, "all"))
    },
}
SAME_FP32_EXAMPLE = {
    "fp32-example-zero2": (*EXAMPLE, *zero(2)),
    "fp32-example-zero3": (*EXAMPLE, *zero(3)),
    "fp32-example-zero3-sequential": (*EXAMPLE, *zero(3), *EXECUTIONS["sequential"], *CHECKPOINTING["reentrant"]),
}
SAME_NF4 = {
    "nf4-zero2": (*NF4, *zero(2)),
    "nf4-zero0": (*NF4, *zero(0)),
    "nf4-zero1-sequential": (*NF4, *zero(1), *EXECUTIONS["sequential"]),
    "nf4-zero2-sequential-reentrant": (*NF4, *zero(2), *EXECUTIONS["sequential"], *CHECKPOINTING["reentrant"]),
    "nf4-zero3": (*NF4, *zero(3)),
    "nf4-zero3-sequential-reentrant": (*NF4, *zero(3), *EXECUTIONS["sequential"], *CHECKPOINTING["reentrant"]),
    "nf4-zero3-offload": (*NF4, *zero(3, "all")),
}
# every key of LoRA Dropout at once, and examples one after another in a row in place of padding
PADDING_FREE = ("training.padding_free=true",)
KEYS = (
    "adapter.dropout.balanced=true",
    "adapter.dropout.rate_pattern={down_proj: 0.2, 'model.layers.1.*q_proj': 0}",
    "adapter.dropout.initial_rate=0.1",
)
SAME_KEYS_INSTANCE = {
    "keys-instance": (*KEYS, *zero(2)),
    "keys-instance-flat": (*KEYS, *zero(2), *PADDING_FREE, *CHECKPOINTING["reentrant"]),
    "keys-instance-flat-sequential": (*KEYS, *zero(0), *PADDING_FREE, *EXECUTIONS["sequential"]),
}
SAME_KEYS_EXAMPLE = {
    "keys-example": (*KEYS, *EXAMPLE, *zero(2)),
    "keys-example-flat": (*KEYS, *EXAMPLE, *zero(2), *PADDING_FREE, *CHECKPOINTING["non-reentrant"]),
    "keys-example-flat-sequential": (*KEYS, *EXAMPLE, *zero(3), *PADDING_FREE, *EXECUTIONS["sequential"]),
}
FP32_TOLERANCE = 1e-5  # nats, absolute, of losses near 7: about ten units in the last place
BF16_TOLERANCE = 2e-2  # bfloat16 keeps 8 bits: 0.3 % of losses near 7; other masks move them by more than 0.1

# one process and two accumulated micro-batches: the masks and rows of two ranks
ACCUMULATED = {
    "accumulated-instance": (*NO_VALIDATION, "training.gradient_accumulation_steps=2"),
    "accumulated-example": (*NO_VALIDATION, *EXAMPLE, "training.gradient_accumulation_steps=2"),
    "accumulated-keys": (*NO_VALIDATION, *EXAMPLE, *KEYS, "training.gradient_accumulation_steps=2"),
}

# all rows in each step, so that it does not matter which of them share a packed row
ALL_AT_ONCE = (
    *NO_VALIDATION,
    *EXAMPLE,
    *KEYS,
    "data.train.0.limit=9",
    "training.per_device_train_batch_size=9",
)
PACKED = {
    "all-padded": ALL_AT_ONCE,
    "all-packed": (*ALL_AT_ONCE, "training.packing=true"),
    "all-packed-sequential": (*ALL_AT_ONCE, "training.packing=true", *EXECUTIONS["sequential"]),
}

# four steps in one go, and the last two of them from the checkpoint after two
LONG = (
    *NO_VALIDATION,
    *KEYS,
    "data.train.0.limit=6",
    "training.max_steps=4",
    "training.save_strategy=steps",
    "training.save_steps=2",
)
# six steps over two epochs, and the last three of them from the checkpoint in the middle of the first
SAVED = (
    *NO_VALIDATION,
    *KEYS,
    "data.train.0.limit=16",
    "training.max_steps=6",
    "training.save_strategy=steps",
    "training.save_steps=3",
    "training.per_device_train_batch_size=1",
    "training.weight_decay=0.1",
)
ACCUMULATES = ("training.gradient_accumulation_steps=2",)
RESUMED = {
    "fp32-zero0": (*SAVED, *ACCUMULATES, *zero(0)),
    "fp32-zero1-example": (*SAVED, *ACCUMULATES, *EXAMPLE, *zero(1)),
    "nf4-zero2-example": (*SAVED, *ACCUMULATES, *NF4, *EXAMPLE, *zero(2)),
    "fp32-zero3": (*SAVED, *ACCUMULATES, *zero(3)),
    "nf4-zero3-example": (*SAVED, *ACCUMULATES, *NF4, *EXAMPLE, *zero(3)),
    "nf4-zero3-offload": (*SAVED, *ACCUMULATES, *NF4, *zero(3, "all")),
}
# begun on one rank with two micro-batches a step, continued on two with one
MORE_RANKS = {
    "more-ranks": (*SAVED, *zero(2)),
    "more-ranks-example": (*SAVED, *EXAMPLE, *zero(3)),
}
COMPILED = (
    "training.save_strategy=no",
    "training.torch_compile=true",
    "training.torch_compile_backend=aot_eager",  # inductor gives the same, in half a minute
    "training.pad_to_multiple_of=48",  # one shape, compiled once
)
SAMPLINGS: dict[str, tuple[str, ...]] = {"instance": (), "example": EXAMPLE}

# AdamW steps of 1e-6 on weights near 0.06, where neighbours are 2e-4 (bfloat16) or 4e-9 (float32) apart
SMALL_STEPS = (
    *NO_VALIDATION,
    *PLAIN_LORA,
    *NF4,
    "training.learning_rate=1.0e-6",
    "training.lr_scheduler_type=constant",
    "training.adam_epsilon=1.0e-15",
)

ONE_PROCESS: dict[str, tuple[str, tuple[str, ...]]] = {
    **stock_pairs(STOCK_ONE),
    **{name: ("ours", overrides) for name, overrides in {**ACCUMULATED, **PACKED}.items()},
    **{
        name: (trainer, (*LONG, *overrides))
        for sampling, overrides in SAMPLINGS.items()
        for name, trainer in ((f"whole-{sampling}", "ours"), (f"resumed-{sampling}", f"ours, from whole-{sampling}"))
    },
    **{name: ("ours", (*overrides, *ACCUMULATES)) for name, overrides in MORE_RANKS.items()},
    "grouped": ("ours", (*SAVED, *ACCUMULATES, "training.train_sampling_strategy=group_by_length")),
    "resumed-grouped": (
        "ours, from grouped",
        (*SAVED, *ACCUMULATES, "training.train_sampling_strategy=group_by_length"),
    ),
    "compiled": ("ours", (*LONG, *COMPILED)),
    "whole-other-rate": ("ours", (*LONG, "adapter.dropout.initial_rate=0.2")),
    "measured": ("ours", ("training.max_steps=2", *PADDING_FREE)),  # validation is padded all the same
    "not-rescaled": ("ours", (*NO_VALIDATION, "adapter.dropout.rescale=false")),
    "nf4-masked": ("ours", (*NO_VALIDATION, *NF4)),
    "int8": ("ours", (*NO_VALIDATION, "base.quantization=int8", "base.dtype=bfloat16")),
    "small-steps": ("ours", SMALL_STEPS),
    "small-steps-bfloat16": ("stock, bfloat16 adapter", SMALL_STEPS),
}
TWO_RANKS: dict[str, tuple[str, tuple[str, ...]]] = {
    **stock_pairs(STOCK_TWO),
    **{
        name: ("ours", (*NO_VALIDATION, *overrides))
        for name, overrides in {
            **SAME_FP32,
            **SAME_FP32_EXAMPLE,
            **SAME_NF4,
            **SAME_KEYS_INSTANCE,
            **SAME_KEYS_EXAMPLE,
        }.items()
    },
    **{
        name: (trainer, overrides)
        for kind, overrides in RESUMED.items()
        for name, trainer in ((f"saved-{kind}", "ours"), (f"resumed-{kind}", f"ours, from saved-{kind}"))
    },
    **{name: (f"ours, from ../ranks1/{name}", overrides) for name, overrides in MORE_RANKS.items()},
    "measured": ("ours", ("training.max_steps=2", *zero(2))),
    "measured-zero3": ("ours", ("training.max_steps=2", *zero(3))),
    "other-rate": ("ours", (*NO_VALIDATION, *zero(2), "adapter.dropout.rate=0.4")),
    "other-rate-nf4": ("ours", (*NO_VALIDATION, *NF4, *zero(2), "adapter.dropout.rate=0.4")),
    "int8": ("ours", (*NO_VALIDATION, "base.quantization=int8", "base.dtype=bfloat16", *zero(2))),
}
