"""What LoRA Dropout costs: time and memory of its variants, side by side in one run."""
