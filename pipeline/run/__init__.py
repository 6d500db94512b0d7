"""What a run leaves in its folder: where it lies, who may write it, where its results come from."""
