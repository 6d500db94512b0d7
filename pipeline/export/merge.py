"""The adapter added into its base's weights: ``W0 + s BA``, in 16 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.utils.hub import convert_file_size_to_int

from pipeline.adapter.files import load_adapter
from pipeline.base import DTYPES, load_base, load_config
from pipeline.errors import UserError
from pipeline.recipe import schema

WHY_NOT_4_BITS = (
    "Merging into 4 bits is lossy: W0 + s BA must be rounded to 4 bits anew, and the rounding is larger than most of "
    "what the adapter learned (huggingface/peft#2321). Merge into 16 bits, or serve the adapter unmerged on the 4-bit "
    "base that it was trained on."
)


def merge_type(name: str | None, base: schema.Base) -> str:
    """The weights' type after a merge: the one asked for, else the recipe's compute type.

    Raises:
        UserError: a quantised type, or none that is known.
    """
    name = name or base.dtype
    if name not in DTYPES:
        quantised = any(word in name.lower() for word in ("4", "8", "int", "q"))
        reason = WHY_NOT_4_BITS if quantised else "The base's weights and the adapter are added in this type."
        raise UserError(f"--dtype: found {name!r}, expected one of {', '.join(DTYPES)}.\n{reason}")
    return name


def check_shard_size(size: str) -> None:
    """Raise ``UserError`` unless transformers can read the size."""
    try:
        convert_file_size_to_int(size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: found {size!r}, expected an integer with its unit, e.g. 5GB") from error


def check_mergeable(base: schema.Base, adapted: PeftModel) -> None:
    """Refuse bases into which this adapter cannot be merged, before their weights are read.

    Args:
        base: of the adapter.
        adapted: the adapter on :func:`pipeline.base.hollow_base`.

    Raises:
        UserError: the base is stored quantised; an adapted embedding shares its weight with the output head.
    """
    config = load_config(base.model_copy(update={"quantization": "none"}))
    quantised = config.to_dict().get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "an unknown method")
        raise UserError(
            f"{base.model!r} is stored quantised ({method}), so there are no 16-bit weights to merge into.\n"
            f"{WHY_NOT_4_BITS}\nName the 16-bit model that it was made from: --base MODEL."
        )
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    if config.get_text_config().tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise UserError(
            f"{base.model!r} uses one weight as embedding and output head, and this adapter is on one of them only: "
            "merged, it would change both.\nUse the adapter unmerged, or train without the embedding in target_modules."
        )


def merged_model(base: schema.Base, adapter: Path, dtype: str) -> PreTrainedModel:
    """The base with the adapter in its weights, on the CPU.

    Args:
        base: whose quantisation is left out.
        adapter: its folder.
        dtype: of the weights, by its name in :data:`pipeline.base.DTYPES`.

    Raises:
        UserError: the base cannot be had; the merged weights are not finite.
    """
    # eager attention needs no package, and no attention runs here
    plain = base.model_copy(update={"quantization": "none", "dtype": dtype, "attention": "eager"})
    adapted = load_adapter(load_base(plain, torch.device("cpu")), adapter)
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft's, for weights that are not finite; the adapter's own have been checked
        raise UserError(
            f"{adapter}: cannot be merged in {dtype}: the sum of a base's and an adapter's weight is no finite "
            "number.\nMerge in a type of larger range (--dtype bfloat16 or float32); if that fails, too, the base is "
            "damaged."
        ) from error
