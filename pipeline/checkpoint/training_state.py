"""What a trainer saves at a step, and how another one, on any number of ranks, goes on from there."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from pipeline.adapter.files import WEIGHTS_FILE, save_adapter, settings_of
from pipeline.checkpoint.files import check_space, delete_old, listed_checkpoints, problem_of, write_checkpoint
from pipeline.checkpoint.optimizer import MASTER, MOMENTS, States, optimizer_states, restore_optimizer_states
from pipeline.checkpoint.random_state import random_state, restore_random_state
from pipeline.distributed import adapter_weights, is_zero_3, loss_scaler_of, whole_parameters
from pipeline.errors import UserError
from pipeline.preflight.numbers import Execution
from pipeline.process.rank import is_main, rank
from pipeline.run.folder import IDENTITY_FILE
from pipeline.run.tensor_file import write_tensors

if TYPE_CHECKING:
    from pipeline.checkpoint.trainer import ResumableTrainer

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
RANDOM_FILE = "rng.json"

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scaling of fp16 remembers."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, besides its tensors."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens of the data seen, over all ranks."""
    ranks: int
    micro_batch: int
    """Rows of one rank's micro-batch."""
    accumulation: int
    """Micro-batches of one rank in an optimizer step."""
    execution: Execution
    """How the mask instances ran: batched or sequential."""
    zero: int
    """ZeRO stage."""

    @property
    def rows_per_step(self) -> int:
        """Of the data, over all ranks."""
        return self.ranks * self.micro_batch * self.accumulation


def read_progress(checkpoint: Path) -> Progress:
    """Of a checkpoint that is whole."""
    state = json.loads((checkpoint / STATE_FILE).read_bytes())
    return Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})


# Saving ---------------------------------------------------------------------------------------------------------------


def save_training_state(trainer: ResumableTrainer, folder: Path, identity: dict[str, Any]) -> Path:
    """Write a checkpoint of the current step and delete those that are too old; every rank calls it.

    Args:
        trainer: between two optimizer steps.
        folder: ``checkpoints/`` of the run.
        identity: of the experiment, from :func:`pipeline.checkpoint.identity.identity_of`.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: on every rank: it does not fit, or the disk fails. The newest checkpoint before it is untouched.
    """
    weights = adapter_weights(trainer.adapted)
    states: States = {}
    if not trainer.args.save_only_model:
        states = optimizer_states(trainer.inner_optimizer, trained_parameters(trainer.adapted), keep=is_main())
    generators = gather_object([random_state()])
    problem = [None if not is_main() else _written(trainer, folder, weights, states, generators, identity)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])
    return folder / f"checkpoint-{trainer.state.global_step}"


def _written(
    trainer: ResumableTrainer,
    folder: Path,
    weights: dict[str, torch.Tensor],
    states: States,
    generators: list[dict[str, Any]],
    identity: dict[str, Any],
) -> str | None:
    """Write on rank 0; what went wrong in words, for all ranks."""
    step = trainer.state.global_step
    tensors = {f"{what}.{name}": tensor for what, by_name in states.items() for name, tensor in by_name.items()}

    def write_files(part: Path) -> None:
        save_adapter(trainer.adapted, weights, settings_of(trainer.recipe.adapter, trainer.recipe.seed), part)
        if trainer.allocation is not None:
            trainer.allocation.save(part)
        _write_json(part / IDENTITY_FILE, identity)
        # lines of the log are in the run's history; transformers would write them all again with each checkpoint
        dataclasses.replace(trainer.state, log_history=[]).save_to_json(str(part / TRAINER_STATE_NAME))
        if not trainer.args.save_only_model:
            write_tensors(part / OPTIMIZER_FILE, tensors)
            _write_json(part / STATE_FILE, _small_state(trainer))
            _write_json(part / RANDOM_FILE, generators)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, sum(t.numel() * t.element_size() for t in (*weights.values(), *tensors.values())))
        write_checkpoint(folder, step, write_files)
        delete_old(folder, step, trainer.args.save_total_limit, trainer.state.best_global_step)
    except (UserError, OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        return f"the checkpoint of step {step} could not be written: {error}\n{_kept(folder)}"
    return None


def _kept(folder: Path) -> str:
    """What a run that cannot save any more can go on from."""
    whole = next((found for found in listed_checkpoints(folder) if problem_of(found.folder) is None), None)
    if whole is None:
        return "Make room, then run the same command again: there is no earlier checkpoint, it starts anew."
    return f"Make room, then run the same command again: it goes on from {whole.folder}, which is whole."


def _small_state(trainer: ResumableTrainer) -> dict[str, Any]:
    assert trainer.lr_scheduler is not None
    used = _used_groups(trainer.inner_optimizer)
    groups = itertools.compress(trainer.inner_optimizer.param_groups, used)
    return {
        **asdict(trainer.progress()),
        "scheduler": _of_used(trainer.lr_scheduler.state_dict(), used),
        "rates": [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in groups],
        "loss_scale": _loss_scale(trainer),
    }


def _used_groups(optimizer: Any) -> list[bool]:
    """Which of the optimizer's groups have parameters. transformers makes one for what does not decay, which is empty
    for an adapter, and DeepSpeed leaves such groups out: in a checkpoint they do not count."""
    sharded = not isinstance(optimizer, torch.optim.Optimizer)  # DeepSpeed's: none is empty
    return [sharded or bool(group["params"]) for group in optimizer.param_groups]


def _of_used(scheduler: dict[str, Any], used: list[bool]) -> dict[str, Any]:
    """A scheduler's state; of its lists by group, the entries of groups that have parameters."""
    return {
        key: list(itertools.compress(value, used)) if _by_group(value, used) else value
        for key, value in scheduler.items()
    }


def _of_all(saved: dict[str, Any], fresh: dict[str, Any], used: list[bool]) -> dict[str, Any]:
    """The inverse, for a scheduler whose state is ``fresh`` so far: empty groups keep what they have."""
    return {
        key: [saved[key][sum(used[:n])] if used[n] else entry for n, entry in enumerate(value)]
        if _by_group(value, used)
        else saved[key]
        for key, value in fresh.items()
    }


def _by_group(value: Any, used: list[bool]) -> bool:
    return isinstance(value, list) and len(value) == len(used)


def _loss_scale(trainer: ResumableTrainer) -> dict[str, Any]:
    """Of fp16, as a dictionary; empty where the loss is not scaled, or by a fixed number."""
    if not trainer.is_deepspeed_enabled:
        scaler = trainer.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()
    scaler = loss_scaler_of(trainer.inner_optimizer)
    return {} if scaler is None else {key: value for key, value in vars(scaler).items() if key in LOSS_SCALE}


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


# Restoring ------------------------------------------------------------------------------------------------------------


def restore_training_state(trainer: ResumableTrainer, checkpoint: Path) -> None:
    """Put a checkpoint into a trainer that has its engine and optimizer, but has made no step; every rank calls it.

    Raises:
        UserError: a rank cannot see the checkpoint; it was saved without the optimizer's state; another version, or
            another program, wrote it.
    """
    check_seen_by_all(checkpoint)
    with _foreign_is_told(checkpoint):
        _restore(trainer, checkpoint)


@contextmanager
def _foreign_is_told(checkpoint: Path) -> Iterator[None]:
    """Context in which a checkpoint that is whole, but not as this version writes it, is refused in words."""
    try:
        yield
    except (LookupError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint}: its files are whole, but not what this version writes ({type(error).__name__}: {error}).\n"
            "Go on with the version that wrote it (ranks/rank-0.jsonl names it); or begin anew, without "
            "training.resume and with --overwrite."
        ) from error


def _restore(trainer: ResumableTrainer, checkpoint: Path) -> None:
    """The parts of :func:`restore_training_state`."""
    restore_weights(trainer.adapted, checkpoint)
    if not (checkpoint / OPTIMIZER_FILE).exists():
        raise UserError(
            f"{checkpoint}: holds the adapter only (training.save_only_model), from which training cannot go on.\n"
            "Take a checkpoint that was saved with save_only_model false, or start anew."
        )
    parameters = trained_parameters(trainer.adapted)
    optimizer = trainer.inner_optimizer
    restore_optimizer_states(optimizer, parameters, _read_states(trainer.adapted, checkpoint))
    small = json.loads((checkpoint / STATE_FILE).read_bytes())
    assert trainer.lr_scheduler is not None
    used = _used_groups(trainer.inner_optimizer)
    trainer.lr_scheduler.load_state_dict(_of_all(small["scheduler"], trainer.lr_scheduler.state_dict(), used))
    groups = itertools.compress(trainer.inner_optimizer.param_groups, used)
    for group, rates in zip(groups, small["rates"], strict=True):
        group.update(rates)
    _restore_loss_scale(trainer, small["loss_scale"])
    trainer.restore_tokens(small["tokens"])
    if trainer.allocation is not None:
        trainer.allocation.restore(checkpoint)


def check_seen_by_all(checkpoint: Path) -> None:
    """Raise ``UserError`` on every rank unless each can read the checkpoint's files."""
    here = None if (checkpoint / WEIGHTS_FILE).is_file() else f"process {rank()} on {socket.gethostname()}"
    blind = [found for found in gather_object([here]) if found]
    if blind:
        raise UserError(
            f"{checkpoint}: not visible to {', '.join(blind[:4])}{', ...' if len(blind) > 4 else ''}.\n"
            "A run on several nodes goes on only from a folder that all of them share: set output to one, or copy the "
            "run's folder to the same path on each node."
        )


def restore_weights(model: PeftModel, checkpoint: Path) -> None:
    """The adapter's weights as they were in the engine's dtype; every rank calls it."""
    saved, parameters = load_file(str(checkpoint / WEIGHTS_FILE)), trained_parameters(model)
    names = saved_names(model)
    if {names[name] for name in parameters} != saved.keys():
        raise UserError(f"{checkpoint / WEIGHTS_FILE}: its weights are not those of this recipe's adapter")
    with whole_parameters(list(parameters.values()), written_by=0), torch.no_grad():
        for name, parameter in parameters.items():
            if saved[names[name]].shape != parameter.shape:  # copy_ would repeat a smaller one
                raise UserError(f"{checkpoint / WEIGHTS_FILE}: {names[name]} is not of this recipe's adapter's shape")
            if is_main() or not is_zero_3():  # ZeRO-3 passes rank 0's on
                parameter.data.copy_(saved[names[name]])


def restore_random(checkpoint: Path) -> None:
    """The generators of this rank, where the checkpoint has it."""
    with _foreign_is_told(checkpoint):
        by_rank = json.loads((checkpoint / RANDOM_FILE).read_bytes())
        if rank() < len(by_rank):
            restore_random_state(by_rank[rank()])


def trained_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """By name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_names(model: PeftModel) -> dict[str, str]:
    """Name in ``adapter_model.safetensors`` of each trained parameter: peft is asked with tensors that are marked."""
    parameters = list(trained_parameters(model))
    marked = {name: torch.tensor(index) for index, name in enumerate(parameters)}
    named = get_peft_model_state_dict(model, state_dict=marked, save_embedding_layers=False)
    return {parameters[int(mark)]: name for name, mark in named.items()}


def _read_states(model: PeftModel, checkpoint: Path) -> States:
    """The optimizer's states, with the float32 weights as their own masters."""
    states: States = {}
    known = trained_parameters(model)
    for key, tensor in load_file(str(checkpoint / OPTIMIZER_FILE)).items():
        what, _, name = key.partition(".")
        if name not in known:
            raise LookupError(f"{OPTIMIZER_FILE} has {key}, which is of no trained parameter")
        states.setdefault(what, {})[name] = tensor
    saved = load_file(str(checkpoint / WEIGHTS_FILE))
    masters = states.setdefault(MASTER, {})
    for name, its_name in saved_names(model).items():
        masters.setdefault(name, saved[its_name].float())
    for what in MOMENTS & states.keys():
        for name, tensor in states[what].items():
            if tensor.shape != masters[name].shape:
                raise ValueError(f"{OPTIMIZER_FILE} has {what}.{name} in the shape {tuple(tensor.shape)}")
    if len({frozenset(states[what]) for what in MOMENTS & states.keys()}) > 1:
        raise LookupError(f"{OPTIMIZER_FILE} has one moment of a weight, but not the other")
    return states


def _restore_loss_scale(trainer: ResumableTrainer, saved: dict[str, Any]) -> None:
    if not saved:
        return
    if not trainer.is_deepspeed_enabled:
        trainer.accelerator.scaler.load_state_dict(saved)
        return
    scaler = loss_scaler_of(trainer.inner_optimizer)
    for key in LOSS_SCALE:
        if key in saved:
            setattr(scaler, key, saved[key])
