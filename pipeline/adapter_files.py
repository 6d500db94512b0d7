"""A saved adapter: peft's own files, and its LoRA Dropout settings beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe import schema

SETTINGS_FILE = "lora_dropout.json"


@dataclass(frozen=True)
class AdapterSettings:
    """What peft's own configuration has no place for (it drops keys it does not know when it loads)."""

    rate: float
    instances: int
    sampling: str
    rescale: bool
    alpha: float
    """As in the recipe. ``adapter_config.json`` holds the folded one where ``rescale`` is false."""
    seed: int
    """Of the ensemble's masks."""


def settings_of(adapter: schema.Adapter, seed: int) -> AdapterSettings:
    """The settings that a recipe's adapter section stands for."""
    dropout = adapter.dropout
    return AdapterSettings(
        rate=dropout.rate,
        instances=dropout.instances,
        sampling=dropout.sampling,
        rescale=dropout.rescale,
        alpha=adapter.alpha,
        seed=seed,
    )


def save_adapter(model: PeftModel, weights: dict[str, torch.Tensor], settings: AdapterSettings, folder: Path) -> None:
    """Write the adapter in peft's own format, loadable by stock peft, and our settings beside it.

    Args:
        model: for its configuration.
        weights: as ``get_peft_model_state_dict`` names them, on the CPU, whole (not sharded).
        settings: of LoRA Dropout.
        folder: must exist.
    """
    config = model.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n")


def read_settings(folder: Path) -> AdapterSettings:
    """LoRA Dropout settings of a saved adapter.

    Raises:
        UserError: the folder holds no adapter of ours.
    """
    check_adapter_folder(folder)
    file = folder / SETTINGS_FILE
    if not file.exists():
        raise UserError(
            f"{folder}: a peft adapter without {SETTINGS_FILE}, so how it was trained is not known.\n"
            "Expected an adapter that launch/sft.py wrote."
        )
    try:
        return AdapterSettings(**json.loads(file.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        expected = ", ".join(field.name for field in fields(AdapterSettings))
        raise UserError(f"{file}: cannot be read ({error}).\nExpected an object with {expected}.") from error


def check_adapter_folder(folder: Path) -> None:
    """Raise ``UserError`` unless the folder holds a peft adapter."""
    if not (folder / "adapter_config.json").exists():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: no adapter here (found: {found or 'an empty folder'}).\n"
            "Expected adapter_config.json and adapter_model.safetensors: train first with launch/sft.py, or give the "
            "run's output folder."
        )


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with the saved adapter on it, for inference (eval mode, nothing requires a gradient).

    Raises:
        UserError: the folder holds no adapter.
    """
    check_adapter_folder(folder)
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    return adapted.eval()


def adapter_dropout(model: PeftModel, settings: AdapterSettings) -> LoraDropout:
    """The masks an adapter was trained with, for its ensemble."""
    return LoraDropout(model, rate=settings.rate, seed=settings.seed)
