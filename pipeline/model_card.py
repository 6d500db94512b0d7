"""The adapter's README.md on the Hub: Hugging Face's model card, with what the run was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pipeline.recipe import Recipe, recipe_to_yaml


def write_model_card(recipe: Recipe, record: dict[str, Any], history: list[dict[str, Any]], folder: Path) -> None:
    """Write ``README.md``.

    Args:
        recipe: resolved.
        record: from :func:`pipeline.provenance.provenance`.
        history: the records of ``history.jsonl``.
        folder: of the run.
    """
    base_is_local = Path(recipe.base.model).exists()
    data = ModelCardData(
        base_model=None if base_is_local else recipe.base.model,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lora-dropout", "sft", "trl"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(recipe, record, history)}").save(folder / "README.md")


def _text(recipe: Recipe, record: dict[str, Any], history: list[dict[str, Any]]) -> str:
    dropout, adapter = recipe.adapter.dropout, recipe.adapter
    method = (
        f"LoRA Dropout (arXiv 2404.09610): rate {dropout.rate}, {dropout.instances} instance(s) per "
        f"{dropout.sampling}, rescale {str(dropout.rescale).lower()}"
        if dropout.rate > 0
        else "plain LoRA"
    )
    measured = next((r for r in reversed(history) if "validation_loss" in r), None)
    losses = (
        f"Last measured at step {measured['step']}: validation loss {measured['validation_loss']:.4f} nats per trained "
        f"token, training probe {measured['probe_loss']:.4f}, generalisation gap {measured['generalization_gap']:+.4f}."
        if measured
        else "No validation loss was measured, so nothing is known about its generalisation."
    )
    rows = ", ".join(f"{entry['rows']} {entry['split']} rows" for entry in record["data"])
    engine = record["engine"] + (f", {record['processes']} processes" if record["processes"] > 1 else "")
    base = Path(recipe.base.model).name if Path(recipe.base.model).exists() else recipe.base.model
    return f"""# {recipe.name}

A LoRA adapter for `{base}` ({recipe.base.quantization}, {recipe.base.dtype}), rank {adapter.rank}, alpha
{adapter.alpha:g}, trained with {method}.

{losses}
Data: {rows}. Seed {recipe.seed}. Trained under: {engine}.

The files are a plain peft adapter: `PeftModel.from_pretrained(base, "<this folder>")`. `lora_dropout.json` holds the
mask settings, from which the test-time ensemble is made.

## Recipe

```yaml
{recipe_to_yaml(recipe).strip()}
```
"""
