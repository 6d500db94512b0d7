"""What a run needs, by arithmetic: steps, bytes of memory per rank. For the disk see ``storage.py``.

Pure functions of numbers, so that each can be checked by hand. Exact: parameters, steps, weights, gradients, optimizer
states. Rough, and said to be so where it is shown: activations and working memory, to which the CUDA context and the
allocator's fragments (about 1 GiB) come on top.

Legend: R rows in one forward pass, T tokens per row, G masks in one pass, h hidden width, b bytes of the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NF4_BLOCK = 64
"""Weights that share one nf4 scale (bitsandbytes' default)."""
DOUBLE_QUANTIZATION_BLOCK = 256
"""Scales that share one float32 scale of their own under double quantisation."""
MOST_WORDS = 2**24
"""64-bit words that LoRA Dropout hashes at once; each decides over two features (lora_dropout/masks.py)."""
HEAD_TILE_TOKENS, HEAD_TILE_WORDS = 4096, 32768
"""trl's fused head computes logits in tiles of this size (trl 1.16: kernels/chunked_logprob.py, trainer/utils.py)."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a base model and of the adapter on it."""

    parameters: int
    """Of the base."""
    quantizable: int
    """Of them, weights of linear layers that bitsandbytes quantises: all but the output head's."""
    largest_linear: int
    """Of them, those of the largest layer."""
    adapter_parameters: int
    """Trained ones."""
    adapter_tensors: int
    """Tensors that they make up."""
    layers: int
    """Decoder layers."""
    hidden: int
    """Width h of the residual stream."""
    heads: int
    """Attention heads."""
    linear_outputs: int
    """Output features of one decoder layer's linear layers, summed."""
    masked_features: int = 0
    """Features that a mask decides over: both sides of all adapted layers. 0 without LoRA Dropout."""
    shared_weight: str | None = None
    """An adapted layer whose weight is one tensor for all rows of a batch: with it, a pass has one mask."""


def lora_parameters(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """Parameters of A ``(rank, in)`` and B ``(out, rank)`` over linear layers given as ``(out, in)``."""
    return sum(rank * (out_features + in_features) for out_features, in_features in shapes)


# Batch ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What an optimizer step and an epoch are."""

    micro_batch: int
    accumulation: int
    processes: int
    instances: int
    """Mask instances N: each example is computed N times."""
    rows_per_pass: int
    """Rows in one forward pass on one rank: N times the micro-batch where instances run batched."""
    steps_per_epoch: int
    steps: int

    @property
    def examples_per_step(self) -> int:
        """Different examples in one optimizer step, over all ranks."""
        return self.micro_batch * self.accumulation * self.processes


def batch(
    rows: int,
    micro_batch: int,
    accumulation: int,
    processes: int,
    epochs: float,
    max_steps: int = -1,
    instances: int = 1,
    batched: bool = True,
) -> Batch:
    """Steps as transformers counts them: the last micro-batches of an epoch make a smaller step."""
    micro_batches = math.ceil(math.ceil(rows / micro_batch) / processes)  # per rank; accelerate evens out the last
    steps_per_epoch = max(math.ceil(micro_batches / accumulation), 1)
    return Batch(
        micro_batch=micro_batch,
        accumulation=accumulation,
        processes=processes,
        instances=instances,
        rows_per_pass=micro_batch * (instances if batched else 1),
        steps_per_epoch=steps_per_epoch,
        steps=max_steps if max_steps > 0 else math.ceil(epochs * steps_per_epoch),
    )


# Memory --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numerics:
    """How numbers are stored and what is kept."""

    quantization: str
    """Of the base: nf4, int8, none."""
    dtype: str
    """That computes."""
    double_quantization: bool = True
    checkpointing: bool = True
    """Activations are recomputed in backward."""
    eager_attention: bool = False
    """Attention keeps its scores."""
    dense_mask: bool = False
    """Attention reads a mask over all pairs of a row's tokens, as where several examples lie in one row."""
    importance_bytes: int = 0
    """Per trained parameter, on every rank: AdaLoRA's smoothed importances in float32."""
    moments_bytes: int = 8
    """Optimizer state per parameter: AdamW's two moments in float32."""

    @property
    def width(self) -> int:
        """Bytes b of the compute dtype."""
        return DTYPE_BYTES[self.dtype]


def quantization_constants_bytes(quantizable: int, numerics: Numerics) -> int:
    """Scales of the quantised weights.

    nf4 keeps one float32 per 64 weights: 0.5 bit per weight. Double quantisation stores those as bytes with one
    float32 per 256 of them: 0.127 bit. int8 keeps one float32 per output row, too little to count.
    """
    if numerics.quantization != "nf4":
        return 0
    scales = math.ceil(quantizable / NF4_BLOCK)
    return scales + 4 * math.ceil(scales / DOUBLE_QUANTIZATION_BLOCK) if numerics.double_quantization else 4 * scales


def base_bytes(shape: ModelShape, numerics: Numerics) -> int:
    """Bytes of the frozen base: quantised linear layers, everything else in the compute dtype."""
    bits = {"nf4": 4, "int8": 8, "none": 8 * numerics.width}[numerics.quantization]
    return (
        math.ceil(shape.quantizable * bits / 8)
        + (shape.parameters - shape.quantizable) * numerics.width
        + quantization_constants_bytes(shape.quantizable, numerics)
    )


def activation_bytes(shape: ModelShape, rows: int, tokens: int, numerics: Numerics) -> int:
    """Rough bytes that forward keeps for backward.

    One layer keeps per token about twice what its linear layers put out (LoRA needs their inputs, the functions
    between them their arguments), for each of its two norms a float32 copy of the residual stream and the result, and
    with eager attention a float32 and a b-byte row of scores per head. Checkpointing keeps each layer's input, and all
    of one layer while it is recomputed.
    """
    width, positions = numerics.width, rows * tokens
    scores = shape.heads * tokens * (width + 4) if numerics.eager_attention else 0
    layer = positions * (2 * width * shape.linear_outputs + 2 * (4 + width) * shape.hidden + scores)
    if numerics.checkpointing:
        return shape.layers * positions * shape.hidden * width + layer
    return shape.layers * layer


def working_bytes(shape: ModelShape, rows: int, tokens: int, numerics: Numerics) -> int:
    """Rough bytes that come and go within a step: a tile of logits, and the largest weight dequantised."""
    tile = min(rows * tokens, HEAD_TILE_TOKENS) * HEAD_TILE_WORDS * numerics.width
    pairs = rows * tokens**2 * (1 + numerics.width) if numerics.dense_mask else 0  # as booleans, then as summands
    return tile + _dequantized(shape, numerics) + pairs


def _dequantized(shape: ModelShape, numerics: Numerics) -> int:
    return 0 if numerics.quantization == "none" else shape.largest_linear * numerics.width


def mask_bytes(shape: ModelShape, masks: int, numerics: Numerics) -> int:
    """Rough bytes of G masks within a step: what is hashed, bits, and per mask its own A and B for backward.

    With checkpointing only the layer that is recomputed has its own A and B, and its bits as bytes.
    """
    held = masks * (shape.adapter_parameters * numerics.width + shape.masked_features)
    bits = masks * math.ceil(shape.masked_features / 8)
    return 4 * shape.masked_features + bits + (math.ceil(held / shape.layers) if numerics.checkpointing else held)


def hashing_bytes(shape: ModelShape, masks: int, balanced: int) -> int:
    """Rough bytes that making G masks takes before each pass, when no activations are there yet.

    Hashing holds about three arrays of 64-bit words, packing three of bytes per feature. Balancing over N masks sorts:
    about four arrays of N 64-bit numbers per feature, for as many features at a time as are hashed at once.
    """
    features = shape.masked_features
    sorting = 32 * min(balanced * features, 2 * MOST_WORDS)
    return 24 * min(masks * features // 2, MOST_WORDS) + 3 * masks * features + sorting


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank's device."""

    base: int
    """Frozen weights between steps."""
    gathered: int
    """Weights of other ranks, or from CPU memory, that a step holds at its peak (ZeRO-3)."""
    weights: int
    """The adapter's, in the dtype that computes."""
    gradients: int
    optimizer: int
    """float32 masters, the optimizer's moments, AdaLoRA's importances."""
    masks: int
    """LoRA Dropout's masks, and A and B once per mask. Rough."""
    activations: int
    """Rough."""
    working: int
    """What comes and goes. Rough."""
    load_peak: int
    """Most that loading the base takes, before DeepSpeed shards anything."""

    @property
    def at_rest(self) -> int:
        """Between steps."""
        return self.base + self.weights + self.optimizer

    @property
    def step_peak(self) -> int:
        """Within a step."""
        return self.at_rest + self.gathered + self.gradients + self.masks + self.activations + self.working

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.step_peak, self.load_peak)


PLAIN = None
"""In place of a ZeRO stage: plain ``python``, one process without DeepSpeed."""


def rank_memory(
    shape: ModelShape,
    numerics: Numerics,
    zero: int | None,
    processes: int,
    rows: int,
    tokens: int,
    offload: str = "none",
    masks: int = 1,
    balanced: int = 0,
) -> RankMemory:
    """Bytes on each rank's device.

    Args:
        shape: of base and adapter.
        numerics: how they are stored.
        zero: stage, or ``PLAIN``, whose adapter is float32 and its own master.
        processes: ranks that share what is sharded.
        rows: R in one forward pass.
        tokens: T per row, at most.
        offload: the recipe's ``distributed.offload``, as far as the stage allows.
        masks: G in one forward pass.
        balanced: N where masks are balanced over N of them, else 0.
    """
    trained, width = shape.adapter_parameters, numerics.width
    base = base_bytes(shape, numerics)
    activations = activation_bytes(shape, rows, tokens, numerics)
    masked = mask_bytes(shape, masks, numerics) if shape.masked_features else 0
    hashing = hashing_bytes(shape, masks, balanced)
    working = max(working_bytes(shape, rows, tokens, numerics), hashing - activations)
    load_peak = base + _dequantized(shape, numerics)  # a weight is read in the compute dtype, then quantised
    if zero is PLAIN:
        moments = (numerics.moments_bytes + numerics.importance_bytes) * trained
        return RankMemory(base, 0, 4 * trained, 4 * trained, moments, masked, activations, working, load_peak)
    resting = math.ceil(base / processes) if zero == 3 else base
    gathered = 0
    if zero == 3:
        if offload == "all":
            resting = 0
        # bitsandbytes' 4-bit product keeps the gathered weight until backward; recomputation lets go of it per layer
        keeps_all = numerics.quantization != "none" and not numerics.checkpointing
        gathered = min(base if keeps_all else math.ceil(base / shape.layers), base - resting)
        if numerics.quantization == "none":
            load_peak = resting  # read in shards (zero.Init), which quantised models are not
    optimizer_offloaded = offload != "none" and zero >= 1
    states = 0 if optimizer_offloaded else _share(trained * (4 + numerics.moments_bytes), processes, zero >= 1)
    return RankMemory(
        base=resting,
        gathered=gathered,
        weights=_share(trained * width, processes, zero >= 3),
        gradients=_share(trained * width, processes, zero >= 2),
        optimizer=states + trained * numerics.importance_bytes,
        masks=masked,
        activations=activations,
        working=working,
        load_peak=load_peak,
    )


def _share(size: int, processes: int, sharded: bool) -> int:
    return math.ceil(size / processes) if sharded else size


# Words ---------------------------------------------------------------------------------------------------------------


def in_words(size: float) -> str:
    """`13.7 GiB`, `86 MiB`, `3 KiB`."""
    if size >= 2**30:
        return f"{size / 2**30:,.1f} GiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"
