"""The training library: recipe, data, base model, LoRA Dropout, trainer."""
