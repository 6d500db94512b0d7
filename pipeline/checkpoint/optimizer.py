"""Float32 masters and moments of the trained parameters, whole, out of and back into whatever shards them.

DeepSpeed's ZeRO keeps them as slices of flat partitions; its public ``safe_get_full_*`` and ``safe_set_full_*`` put
together and take apart. Without ZeRO, an optimizer of torch's has them by parameter, and DeepSpeed's 16-bit optimizer
by a float32 copy of it. In the file all of them look alike: ``<what>.<parameter>``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pipeline.distributed import zero_stage
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.recipe.training import resolved_training

MASTER = "master"
"""Of a 16-bit parameter: its float32 original, on which the optimizer works."""

MOMENTS = frozenset(("exp_avg", "exp_avg_sq"))
"""Of AdamW: one number for each weight."""

States = dict[str, dict[str, torch.Tensor]]
"""What -> parameter -> tensor, on the CPU: masters and moments shaped like the parameter, counters without axes."""


ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Values of ``training.optim`` whose state is shaped like the weights, so that any number of ranks can share it out."""


def check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer whose state ZeRO's shards would make unreadable, where checkpoints are to be saved.

    Raises:
        UserError: says which take its place.
    """
    training = resolved_training(recipe)
    saves = training["save_strategy"] != "no" and not training["save_only_model"]
    if saves and zero_stage(recipe) > 0 and training["optim"] not in ELEMENTWISE:
        raise UserError(f"training.optim: {_unshardable(training['optim'])}")


def _unshardable(optimizer: str) -> str:
    return (
        f"{optimizer} keeps state that is not one number for each weight: under ZeRO 1 to 3 a checkpoint of it could "
        f"not be put together.\nUse {', '.join(ELEMENTWISE)}; or distributed.zero=0; or training.save_only_model=true, "
        "which cannot go on; or training.save_strategy=no."
    )


def optimizer_states(optimizer: Any, parameters: dict[str, nn.Parameter], keep: bool) -> States:
    """Everything the optimizer holds of each parameter; every rank must call it.

    Args:
        optimizer: DeepSpeed's, or torch's own, without accelerate's wrapper.
        parameters: the trained ones, by name.
        keep: False on ranks that only take part in gathering; they get an empty result.
    """
    states: States = {}
    for what, name, tensor in _entries(optimizer, parameters):
        if keep:
            states.setdefault(what, {})[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return states


def restore_optimizer_states(optimizer: Any, parameters: dict[str, nn.Parameter], states: States) -> None:
    """Put back what :func:`optimizer_states` took; every rank must call it, with all of it.

    Works before the optimizer's first step, when it has made no state yet. ZeRO keeps a master of a float32 parameter
    too, which the file has not twice: add the parameter itself as :data:`MASTER`.
    """
    if _sharded(optimizer):
        _restore_sharded(optimizer, parameters, states)
        return
    masters, holder = _masters(optimizer, parameters), _holder(optimizer)
    for name, master in masters.items():
        if name in states.get(MASTER, {}):
            master.data.copy_(states[MASTER][name])
        found = {what: by_name[name] for what, by_name in states.items() if what != MASTER and name in by_name}
        if found:
            holder.state[master] = {
                what: _counter_as_held(tensor, holder, master)
                if what == "step"
                else tensor.to(master.device, copy=True)
                for what, tensor in found.items()
            }


def _sharded(optimizer: Any) -> bool:
    if isinstance(optimizer, torch.optim.Optimizer):
        return False
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    return isinstance(optimizer, ZeROOptimizer)


def _holder(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch's (or bitsandbytes') at the bottom, which holds the moments."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    assert isinstance(optimizer.optimizer, torch.optim.Optimizer)
    return optimizer.optimizer


def _entries(optimizer: Any, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """What, parameter's name, tensor: the same order on every rank, since ZeRO gathers."""
    if _sharded(optimizer):
        yield from _sharded_entries(optimizer, parameters)
        return
    holder = _holder(optimizer)
    for name, master in _masters(optimizer, parameters).items():
        if master is not parameters[name]:
            yield MASTER, name, master
        for what, value in holder.state.get(master, {}).items():
            yield what, name, value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _masters(optimizer: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """What the optimizer steps on for each parameter: the parameter, or DeepSpeed's float32 copy of it."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return dict(parameters)
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names[id(parameter)]: master
        for masters, sixteen in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
        for master, parameter in zip(masters, sixteen, strict=True)
    }


def _counter_as_held(value: torch.Tensor, holder: torch.optim.Optimizer, steps_on: torch.Tensor) -> torch.Tensor | int:
    """A copy of a counter of steps where torch's optimizer expects it: on the CPU, but a fused one beside its weights.

    The fused kernel on a GPU reads it there; ``torch.optim.Optimizer.load_state_dict`` makes the same difference.
    Those of bitsandbytes and transformers count in a python int, which alone is a whole number in the file.
    """
    if value.dtype == torch.int64:
        return int(value)
    beside = holder.defaults.get("fused") or holder.defaults.get("capturable")
    return value.to(steps_on.device, copy=True) if beside else value.clone()


# ZeRO ----------------------------------------------------------------------------------------------------------------


def _shards_weights(optimizer: Any) -> bool:
    """Whether it is ZeRO-3's."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)


def _flat_partitions(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat float32 tensors, one for each of the optimizer's groups."""
    if _shards_weights(optimizer):
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _sharded_entries(optimizer: Any, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    flat = _flat_partitions(optimizer)[0]
    held = _holder(optimizer).state.get(flat, {})
    moments = [what for what, value in held.items() if torch.is_tensor(value) and value.shape == flat.shape]
    counters = {what: torch.as_tensor(value) for what, value in held.items() if what not in moments}
    for what, value in counters.items():
        if value.dim():
            raise UserError(
                _unshardable(f"{type(_holder(optimizer)).__name__}, whose {what} has {value.numel()} values")
            )
    for name, parameter in parameters.items():
        shape = parameter.ds_shape if _shards_weights(optimizer) else parameter.shape  # type: ignore[attr-defined]
        if parameter.dtype != torch.float32:
            yield MASTER, name, safe_get_full_fp32_param(parameter).reshape(shape)
        for what in moments:
            yield what, name, safe_get_full_optimizer_state(parameter, what).reshape(shape)
        for what, value in counters.items():
            yield what, name, value


def _restore_sharded(optimizer: Any, parameters: dict[str, nn.Parameter], states: States) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    counters = {what: next(iter(by_name.values())) for what, by_name in states.items() if _counts(by_name)}
    moments = [what for what in states if what != MASTER and what not in counters]
    holder = _holder(optimizer)
    for flat in _flat_partitions(optimizer):
        held = {what: torch.zeros_like(flat) for what in moments}
        holder.state[flat] = held | {what: _counter_as_held(value, holder, flat) for what, value in counters.items()}
    if not _shards_weights(optimizer):
        # DeepSpeed links parameters to the moments after its first step only, for which there is no public call
        # (deepspeed 0.19.8); delete when safe_set_full_optimizer_state works on a fresh engine
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in parameters.items():
        if name in states.get(MASTER, {}):
            safe_set_full_fp32_param(parameter, states[MASTER][name].to(parameter.device))
        for what in moments:
            safe_set_full_optimizer_state(parameter, states[what][name].to(parameter.device), what)


def _counts(by_name: dict[str, torch.Tensor]) -> bool:
    """Whether a state is a counter of steps, the same for all that share a flat partition."""
    return next(iter(by_name.values())).dim() == 0
