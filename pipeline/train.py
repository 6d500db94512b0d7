"""The training stage, from a recipe to an adapter folder."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors import SafetensorError
from transformers import set_seed
from transformers.trainer_callback import ProgressCallback

from pipeline.adapter.files import CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE, save_adapter, settings_of
from pipeline.arguments import check_reporters, sft_config
from pipeline.base import check_device, check_length, load_base, load_config, load_tokenizer
from pipeline.checkpoint.files import check_space, synchronise
from pipeline.checkpoint.optimizer import check_optimizer
from pipeline.checkpoint.resume import Origin, origin_of, told, whole_checkpoint
from pipeline.checkpoint.training_state import read_progress
from pipeline.cluster.nodes import check_same_everywhere, told_to_other_nodes
from pipeline.data import Splits, cached_splits
from pipeline.distributed import adapter_weights, check_launch, zero_stage
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.observation.flops import TokenWork, empty_base_work, own_peak_flops, recipe_work
from pipeline.observation.observer import RunObserver
from pipeline.observation.progress import PlainWordsCallback
from pipeline.observation.rank_log import rank_log
from pipeline.observation.status import RunStatus, read_status
from pipeline.observation.throughput import Throughput
from pipeline.preflight.estimate import PLAIN
from pipeline.preflight.execution import Choice, execution_in_force
from pipeline.preflight.numbers import ModelShape, model_shape, numerics_of
from pipeline.preflight.storage import checkpoint_bytes
from pipeline.process.environment import keep_freed_memory
from pipeline.process.exit_status import FINISHED
from pipeline.process.rank import is_main, launched, world_size
from pipeline.recipe import Recipe
from pipeline.recipe.training import resolved_training
from pipeline.run.folder import (
    HISTORY_FILE,
    PROVENANCE_FILE,
    RECIPE_FILE,
    check_run_folder,
    continue_run_folder,
    create_run_folder,
    read_history,
    run_folder,
)
from pipeline.run.lock import check_held, only_run
from pipeline.run.model_card import write_model_card
from pipeline.run.provenance import now, provenance
from pipeline.run.whole_file import DISK_REFUSES, write_json
from pipeline.supervision.bad_steps import StepGuard
from pipeline.supervision.callback import SupervisionCallback
from pipeline.supervision.supervisor import supervised
from pipeline.trainer import LoraDropoutTrainer


def train(recipe: Recipe, overwrite: bool = False, evaluated: bool = False) -> Path:
    """Train the adapter that the recipe describes; every rank calls it.

    Everything that can be refused is refused before the base is loaded.

    Args:
        recipe: resolved.
        overwrite: delete a run of the same name.
        evaluated: this command evaluates the adapter next, and the run's status says "finished" only after that.

    Returns:
        The run's folder, which is the adapter's.

    Raises:
        UserError: bad input, or out of memory.
        Interrupted: a signal, once the checkpoint is written.
        LostRank: another rank failed first.
    """
    with ExitStack() as held, _memory_advice(recipe), _disk_advice(recipe):
        return _trained(recipe, overwrite, evaluated, held)


def _trained(recipe: Recipe, overwrite: bool, evaluated: bool, held: ExitStack) -> Path:
    """The stages of :func:`train`, in order.

    Args:
        recipe: as there.
        overwrite: as there.
        evaluated: as there.
        held: keeps the lock on the run's folder until the end.
    """
    check_launch(recipe)
    check_optimizer(recipe)
    check_device(recipe.base)
    folder = run_folder(recipe)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "runs")
    with told_to_other_nodes(join=lambda: sft_config(recipe, folder)):
        held.enter_context(only_run(folder))
        if is_main():  # on other nodes another folder may bear its name
            check_run_folder(recipe, overwrite)
        config = load_config(recipe.base, zero_stage(recipe))
        check_length(config, recipe.base, recipe.data.max_length)
        check_reporters(recipe)
        # before the arguments, with which ZeRO-3 cuts every new model into shards
        shape = model_shape(config, recipe)
        work = empty_base_work(config, recipe, shape.adapter_parameters)
        tokenizer = load_tokenizer(recipe.base)
        splits = cached_splits(recipe, tokenizer)
        origin = origin_of(recipe, splits, overwrite)
        if is_main() and not overwrite and not origin.finished:
            _check_room(recipe, shape)
    arguments = sft_config(recipe, folder, origin.accumulation)
    check_same_everywhere(folder, origin.in_words)
    if origin.finished:
        if is_main():
            print(f"{folder}: this run is finished, with this very recipe, data and base; nothing is left to train")
        if not evaluated:  # it may have been killed before its status could say so
            RunStatus(folder, evaluates=True).end(FINISHED)
        return folder
    choice = _execution(recipe, origin, execution_in_force(recipe, shape, _tokens_per_row(splits)))
    record = {**provenance(recipe, splits.sources), "execution": choice.reason}

    if not torch.cuda.is_available():
        keep_freed_memory()
    set_seed(recipe.seed)
    model = load_base(recipe.base)
    checkpoint = whole_checkpoint(origin)
    before = None if overwrite else read_status(folder)
    _prepare_folder(recipe, origin, checkpoint, overwrite)
    status = RunStatus(folder, recipe.supervision.heartbeat_seconds, goes_on=evaluated, before=before)
    watched = supervised(folder, recipe.supervision, [status.beat])
    with rank_log(folder), watched as supervisor, _memory_advice(recipe), _disk_advice(recipe):
        supervisor.pulse.progress("loading")
        guard = StepGuard(recipe.supervision, float16=recipe.base.dtype == "float16")
        trainer = LoraDropoutTrainer(
            recipe=recipe,
            model=model,
            arguments=arguments,
            tokenizer=tokenizer,
            train=splits.laid_out,
            evaluation=_measured(splits),
            callbacks=[],
            execution=choice.execution,
            throughput=_throughput(recipe, work, splits),
            identity=origin.identity,
            guard=guard,
        )
        trainer.remove_callback(ProgressCallback)
        progress = PlainWordsCallback(folder / HISTORY_FILE)  # in its place
        trainer.add_callback(progress)
        trainer.add_callback(RunObserver(status))
        supervision = SupervisionCallback(supervisor, guard)
        trainer.add_callback(supervision)  # last
        _announce(trainer, splits, choice, told(checkpoint, trainer.progress()))
        with supervisor.watch.deferring(), closing(progress):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if supervision.stopped:
                raise supervisor.watch.interrupted()
            supervisor.watch.writing()
            _warn_without_best(trainer)
            _write_results(trainer, recipe, {**record, "finished": now()}, folder)
        if supervisor.watch.stop is not None:
            supervisor.watch.kept = f"after training; the adapter is in {folder}, and the same command evaluates it"
            raise supervisor.watch.interrupted()
        trainer.accelerator.free_memory()
        del trainer, model
        _release_memory()
    return folder


def _check_room(recipe: Recipe, shape: ModelShape) -> None:
    """Refuse a disk that does not hold a single checkpoint, before the base is loaded.

    Raises:
        UserError: says what one takes, and what is free.
    """
    training, place = resolved_training(recipe), run_folder(recipe).absolute()
    if training["save_strategy"] == "no":
        return
    while not place.exists():
        place = place.parent
    stage, resumable = (zero_stage(recipe) if launched() else PLAIN), not training["save_only_model"]
    try:
        check_space(place, checkpoint_bytes(shape, numerics_of(recipe), stage, world_size(), resumable))
    except UserError as error:
        raise UserError(f"output: {error}\nMake room, or choose another output.") from error


def _throughput(recipe: Recipe, work: TokenWork | None, splits: Splits) -> Throughput:
    """What measures speed, with the FLOPs of this base, adapter and data."""
    peak = own_peak_flops(recipe.base.dtype)
    return Throughput(
        work=None if work is None else recipe_work(work, recipe, splits.train),
        peak_flops=None if peak is None else peak * world_size(),
        communication=launched() and recipe.distributed.communication_log,
    )


@contextmanager
def _memory_advice(recipe: Recipe) -> Iterator[None]:
    """Context in which a lack of memory, while the base loads or in a step, is told with what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory_advice(recipe)) from error


@contextmanager
def _disk_advice(recipe: Recipe) -> Iterator[None]:
    """Context in which a disk that takes no more, under TensorBoard's files as under ours, is told with what to do."""
    folder = run_folder(recipe)
    try:
        yield
    except OSError as error:
        if error.errno in DISK_REFUSES:
            raise UserError(
                f"{folder}: cannot be written any more: {error.strerror}.\n"
                "Make room, then run the same command again: it goes on from the newest checkpoint."
            ) from error
        if error.errno == errno.ENOENT and not (folder / RECIPE_FILE).exists():
            raise UserError(f"{folder}: is gone, or was emptied, while this run trained into it.") from error
        raise


def _prepare_folder(recipe: Recipe, origin: Origin, checkpoint: Path | None, overwrite: bool) -> None:
    """Begin the run's folder anew, or get it ready to go on; rank 0, while the others wait.

    Raises:
        UserError: on every rank: it cannot be written, or another process has begun to.
    """
    problem: list[str | None] = [None]
    if is_main():
        try:
            check_held(run_folder(recipe))
            if checkpoint is None or checkpoint.parent.parent != run_folder(recipe):
                create_run_folder(recipe, origin.identity, overwrite)
            else:
                continue_run_folder(recipe, read_progress(checkpoint).step)
        except UserError as error:
            problem = [str(error)]
        except OSError as error:
            problem = [f"output: {run_folder(recipe)} cannot be written: {error}"]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])


def _execution(recipe: Recipe, origin: Origin, choice: Choice) -> Choice:
    """How instances run: a run that goes on keeps what was chosen when it began, since the sums differ in last bits."""
    if origin.progress is None or recipe.adapter.dropout.execution != "auto":
        return choice
    execution = origin.progress.execution
    return replace(choice, execution=execution, reason=f"{execution}, as when the run began")


def _tokens_per_row(splits: Splits) -> float:
    return splits.statistics.tokens / splits.statistics.rows


def _measured(splits: Splits) -> dict[str, Any] | None:
    """What is measured with masks off, in the order of the log."""
    if splits.validation is None:
        return None
    return {"validation": splits.validation, "probe": splits.probe}


def _announce(trainer: LoraDropoutTrainer, splits: Splits, choice: Choice, start: str | None) -> None:
    """Say what is about to run; main process only."""
    if not is_main():
        return
    if start is not None:
        print(start)
    arguments = trainer.args
    trained, total = trainer.adapted.get_nb_trainable_parameters()
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    assert isinstance(trainer.train_dataset, Dataset)
    packed_rows = len(trainer.train_dataset)
    packed = f", packed into {packed_rows:,} rows" if packed_rows < len(splits.train) else ""
    if choice.warning:
        print(f"warning: {choice.warning}")
    for split, rows in splits.dropped.items():
        if rows:
            listed = ", ".join(str(row + 1) for row in rows[:10]) + (", ..." if len(rows) > 10 else "")
            print(f"warning: {len(rows)} {split} rows have no trained token and are left out (rows {listed})")
    print(
        f"{len(splits.train):,} training rows ({splits.statistics.trained_tokens:,} trained tokens{packed}), "
        f"{len(splits.validation) if splits.validation else 0:,} validation rows\n"
        f"{trained:,} trained of {total:,} parameters; {masked_layers_in_words(trainer.dropout)}\n"
        f"{batch} {'packed rows' if packed else 'examples'} per step = {arguments.per_device_train_batch_size} rows "
        f"x {arguments.gradient_accumulation_steps} accumulation x {arguments.world_size} process(es)"
        + (f"; each as {trainer.copies} copies\ninstances: {choice.reason}" if trainer.copies > 1 else "")
    )


def masked_layers_in_words(dropout: LoraDropout | None) -> str:
    """On how many layers the masks drop anything, and with which rates: of all adapted ones, at the last step."""
    if dropout is None:
        return "no LoRA Dropout"
    rates = [dropout.rates.of(name) for name in dropout.layers]
    masked = sum(rate > 0 for rate in rates)
    some = "" if masked == len(rates) else f" of {len(rates)}"
    each = f"rate {rates[0]:g}" if len(set(rates)) == 1 else f"rates {min(rates):g} to {max(rates):g}"
    start = "" if dropout.rates.initial is None else f", from {dropout.rates.initial:g} at the first step"
    return f"LoRA Dropout on {masked}{some} layers, {each}{start}"


def _warn_without_best(trainer: LoraDropoutTrainer) -> None:
    """Say so where the best step's weights were asked for, and it has no checkpoint."""
    if is_main() and trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        print(
            f"warning: training.load_best_model_at_end: step {trainer.state.best_global_step} was the best, and no "
            "checkpoint of it was saved: the adapter has the weights of the last step"
        )


def _write_results(trainer: LoraDropoutTrainer, recipe: Recipe, record: dict[str, Any], folder: Path) -> None:
    """Adapter, model card, and last the provenance, which says that the run is finished; every rank takes part.

    Raises:
        UserError: on every rank: they could not be written.
    """
    weights = adapter_weights(trainer.adapted)
    problem: list[str | None] = [None]
    if is_main():
        try:
            save_adapter(trainer.adapted, weights, settings_of(recipe.adapter, recipe.seed), folder)
            write_model_card(recipe, record, read_history(folder), folder)
            for name in (WEIGHTS_FILE, CONFIG_FILE, SETTINGS_FILE):
                synchronise(folder / name)
            write_json(folder / PROVENANCE_FILE, record)
            print(f"adapter written to {folder}")
        except (OSError, SafetensorError) as error:
            problem = [
                f"{folder}: the adapter could not be written: {error}\n"
                "Make room, then run the same command again: it goes on from the newest checkpoint."
            ]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])


def out_of_memory_advice(recipe: Recipe) -> str:
    """What to change, what costs least first."""
    dropout = recipe.adapter.dropout
    advice = []
    if dropout.instances > 1 and dropout.execution != "sequential":
        advice.append("adapter.dropout.execution=sequential (1/N of the activations, same loss, slower)")
    advice.append("training.per_device_train_batch_size lower, training.gradient_accumulation_steps higher by as much")
    if not resolved_training(recipe)["activation_checkpointing"]:
        advice.append("training.activation_checkpointing=true (recomputes activations)")
    advice.append("data.max_length lower (truncates rows: see launch/check.py)")
    if recipe.base.quantization != "nf4":
        advice.append("base.quantization=nf4 (changes the base)")
    if recipe.distributed.zero < 3:
        advice.append("distributed.zero=3, with more than one GPU (shards the base)")
    if recipe.distributed.offload == "none":
        advice.append("distributed.offload=optimizer (slower)")
    numbered = "\n".join(f"  {number}. {line}" for number, line in enumerate(advice, start=1))
    return f"out of memory. Change, in this order:\n{numbered}"


def _release_memory() -> None:
    """Give the memory of model and engine back: the evaluation loads its own base, and never scores on the engine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
