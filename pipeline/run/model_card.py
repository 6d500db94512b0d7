"""The adapter's README.md on the Hub: Hugging Face's model card, with what the run was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pipeline.recipe import Recipe, recipe_to_yaml, schema


def write_model_card(recipe: Recipe, record: dict[str, Any], history: list[dict[str, Any]], folder: Path) -> None:
    """Write ``README.md``.

    Args:
        recipe: resolved.
        record: from :func:`pipeline.run.provenance.provenance`.
        history: the records of ``history.jsonl``.
        folder: of the run.
    """
    words = (
        'The files are a plain peft adapter: `PeftModel.from_pretrained(base, "<this folder>")`. `lora_dropout.json` '
        "holds the\nmask settings, from which the test-time ensemble is made."
    )
    _save(_text(recipe, record, history, words), recipe.base.model, "peft", folder)


def write_export_card(
    title: str,
    words: str,
    base_model: str,
    library: str,
    folder: Path,
    trained: tuple[Recipe, dict[str, Any], list[dict[str, Any]]] | None,
) -> None:
    """Write ``README.md`` of an export.

    Args:
        title: its heading, where the training is not known.
        words: what the files are, and how to load them.
        base_model: a Hub id or a folder.
        library: ``peft`` or ``transformers``.
        folder: of the export.
        trained: arguments of :func:`write_model_card`, where the training is known.
    """
    _save(f"# {title}\n\n{words}\n" if trained is None else _text(*trained, words), base_model, library, folder)


def _save(text: str, base_model: str, library: str, folder: Path) -> None:
    """The file, its metadata before the text."""
    data = ModelCardData(
        base_model=None if Path(base_model).exists() else base_model,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["lora", "lora-dropout", "sft", "trl"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def rates_in_words(rate: float, pattern: Mapping[str, float], initial: float | None = None) -> str:
    """The rates of LoRA Dropout as Markdown: ``rate 0.5 (`q_proj` 0.2)``."""
    others = ", ".join(f"`{name}` {other:g}" for name, other in pattern.items())
    start = "" if initial is None else f", moved linearly from {initial:g} at the first step"
    return f"rate {rate:g}" + (f" (rate_pattern: {others})" if others else "") + start


def _kind_and_rank(adapter: schema.Adapter) -> tuple[str, str]:
    """``A LoRA``, ``rank 8``, and what other kinds are called."""
    if adapter.method == "adalora":
        return (
            "An AdaLoRA",
            f"rank {adapter.rank} on average over its layers, allocated from {adapter.initial_rank} in each",
        )
    if adapter.rank_stabilized:
        return "A rank-stabilized LoRA (rsLoRA, scaled by alpha over the root of the rank)", f"rank {adapter.rank}"
    return "A LoRA", f"rank {adapter.rank}"


def _text(recipe: Recipe, record: dict[str, Any], history: list[dict[str, Any]], words: str) -> str:
    dropout, adapter = recipe.adapter.dropout, recipe.adapter
    kind, rank = _kind_and_rank(adapter)
    rates = rates_in_words(dropout.rate, dropout.rate_pattern, dropout.initial_rate)
    method = (
        f"LoRA Dropout (arXiv 2404.09610): {rates}, {dropout.instances} instance(s) per {dropout.sampling}, "
        f"rescale {str(dropout.rescale).lower()}"
        if dropout.masked
        else "no LoRA Dropout"
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

{kind} adapter for `{base}` ({recipe.base.quantization}, {recipe.base.dtype}), {rank}, alpha
{adapter.alpha:g}, trained with {method}.

{losses}
Data: {rows}. Seed {recipe.seed}. Trained under: {engine}.

{words}

## Recipe

```yaml
{recipe_to_yaml(recipe).strip()}
```
"""
