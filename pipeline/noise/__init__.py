"""Where the noise of a LoRA Dropout gradient comes from: variance components, measured and predicted."""
