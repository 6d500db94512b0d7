"""Checkpoints from which a run goes on exactly: safetensors and JSON, whole tensors, readable by any number of ranks.

``files.py``: how a checkpoint gets to disk whole or not at all, and how a damaged one is recognised.
``optimizer.py``: float32 masters and moments, out of and back into whatever shards them.
``random_state.py``: the generators of each rank.
``training_state.py``: what a trainer saves and restores.
``identity.py``: which experiment a checkpoint belongs to, and how two differ.
``resume.py``: where a run goes on.
"""
