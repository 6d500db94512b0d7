"""The peft adapter of a recipe: its configuration, its masks, AdaLoRA's ranks, and its files."""
