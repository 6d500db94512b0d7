"""The finished answers of one system, for both ways to start an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.lm.model import EnsembleLM
from eval.lm.settings import answer_settings
from eval.lm.store import AnswerStore
from pipeline.recipe import schema


def kept_answers(
    folder: Path, base: schema.Base, adapters: Sequence[Path], members: Mapping[str, object] | None, lm: EnsembleLM
) -> AnswerStore:
    """What an evaluation that was ended has left; damaged lines are told on the screen.

    Args:
        folder: of all answers.
        base: of the model.
        adapters: folders; none for the base alone.
        members: what decides the members' answers beside base and adapters; None for one model.
        lm: that will answer.

    Raises:
        UserError: the folder cannot be written.
    """
    computing: dict[str, object] = {"mode": lm.mode, "max_length": lm.max_length}
    if lm.mode == "exact":
        computing["batch_size"] = lm.batch_size_per_gpu  # its bits depend on what shares a batch
    store = AnswerStore.open(folder, answer_settings(base, adapters, members, computing, lm.device))
    for line in store.corrupt:
        print(f"warning: kept answers: {line}; what it held is computed again", flush=True)
    return store
