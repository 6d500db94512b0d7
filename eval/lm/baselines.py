"""Members that are not masks: the baselines that an ensemble over masks is compared with.

Monte Carlo dropout: Gal and Ghahramani, arXiv 1506.02142. Deep ensembles: Lakshminarayanan et al., arXiv 1612.01474.

Legend: N members, n members of one pass, B rows of a member, T tokens, F input features of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from eval.lm.average import Average
from pipeline.adapter.files import check_adapter_folder, without_false_warnings
from pipeline.errors import UserError
from pipeline.lora_dropout.attach import adapter_layers

WITHOUT_INPUT_DROPOUT = ("Embedding", "ParamWrapper")
"""peft's layers that have no dropout before the adapter."""
OF_SEVERAL_ADAPTERS = ("Linear", "Linear4bit", "Linear8bitLt", "Embedding")
"""peft's layers that take an adapter for each row."""


class MemberNoise(nn.Module):
    """In the place of peft's own ``nn.Dropout`` before A: the same function, with a stream of its own per member.

    peft's would draw from the global stream, for all rows in one go: noise would then depend on what ran before and on
    how members are chunked.
    """

    def __init__(self, rate: float, generators: Sequence[torch.Generator]) -> None:
        """Args: ``rate`` p; ``generators``: n of them, in the order of the members' rows."""
        super().__init__()
        self.rate = rate
        self.generators = generators

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``(n*B, ..., F)`` to the same shape: each number is dropped with probability p, or scaled by 1/(1-p)."""
        parts = inputs.tensor_split(len(self.generators))
        noise = [
            torch.empty_like(part).bernoulli_(1 - self.rate, generator=generator)
            for part, generator in zip(parts, self.generators, strict=True)
        ]
        return inputs * torch.cat(noise).div_(1 - self.rate)


@dataclass(frozen=True)
class McDropoutMembers:
    """Monte Carlo dropout: the adapter with dropout on its input left on, and noise of its own in each member.

    Fresh noise for every token, feature and layer: members are no fixed models, unlike an ensemble's. Only the adapter
    is noisy: dropout of the base's own stays off.

    Noise is a function of the seed, the member and the tokens of the forward pass, so that an evaluation that is run
    again, or goes on after it was ended, repeats itself, and no other random stream moves. What shares a pass (batch
    size, number of processes, limit) changes the noise, and with it the scores, though not what they mean. Members in
    smaller chunks see the same noise. Tokens that requests share in mode fast share their noise, too.
    """

    model: PeftModel
    count: int
    average: Average
    rate: float
    """p of the noise."""
    seed: int
    rows_per_pass: int | None = None
    most_per_pass: int | None = None

    @cached_property
    def layers(self) -> Mapping[str, LoraLayer]:
        """That get noise, by name.

        Raises:
            UserError: none does, or a LoRA variant would do without it in silence.
        """
        adapter = _only_adapter(self.model)
        found = adapter_layers(self.model, adapter)
        own = [layer.lora_variant[adapter] for layer in found.values() if adapter in layer.lora_variant]
        variants = {type(variant).__name__ for variant in own}
        if variants:
            raise UserError(
                f"eval.systems: no mc_dropout for this adapter: its layers are of the variant {min(variants)}, to "
                "which peft gives dropout in training only; leave it out"
            )
        noisy = {name: layer for name, layer in found.items() if type(layer).__name__ not in WITHOUT_INPUT_DROPOUT}
        if not noisy:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in found.values()}))
            raise UserError(
                f"eval.systems: no mc_dropout for this adapter, whose layers ({kinds}) have no dropout on their input "
                "in peft; leave it out"
            )
        return noisy

    @contextmanager
    def active(self, numbers: range) -> Iterator[None]:
        """Noise of these members, drawn anew in every forward pass inside."""
        name = _only_adapter(self.model)
        generators = [torch.Generator(self.model.device) for _ in numbers]
        noise = MemberNoise(self.rate, generators)

        def seeded(_model: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
            tokens: torch.Tensor = arguments[0] if arguments else given["input_ids"]
            kept = given.get("past_key_values")
            before = 0 if kept is None else kept.get_seq_length()
            seeds = noise_seeds(self.seed, numbers, before, tokens[: len(tokens) // len(numbers)])
            for generator, member_seed in zip(generators, seeds, strict=True):
                generator.manual_seed(member_seed)

        stock = {layer: layer.lora_dropout[name] for layer in self.layers.values()}
        # generate() calls the causal model, past the PeftModel; AdaLoRA calls its forward, past its hooks. Else both
        # are called, and the second seeds as the first did.
        models = (self.model, self.model.get_base_model())
        hooks = [model.register_forward_pre_hook(seeded, with_kwargs=True) for model in models]
        try:
            for layer in stock:
                layer.lora_dropout[name] = noise
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, own in stock.items():
                layer.lora_dropout[name] = own


def noise_seeds(seed: int, numbers: Sequence[int], before: int, tokens: torch.Tensor) -> list[int]:
    """Of each member's noise in one forward pass, by what the pass computes.

    Args:
        seed: of the recipe.
        numbers: of the members.
        before: tokens that are kept from earlier passes.
        tokens: ``(B, T)`` that are run.
    """
    run = tokens.cpu().contiguous()
    content = hashlib.sha256(repr((seed, before, tuple(run.shape))).encode() + run.numpy().tobytes()).digest()
    digests = [hashlib.sha256(content + number.to_bytes(8, "little")).digest() for number in numbers]
    return [int.from_bytes(digest[:8], "little") for digest in digests]


@dataclass(frozen=True)
class AdapterMembers:
    """A deep ensemble: adapters of several trainings on one base, masks off.

    Members are rows of one batch, each with its own adapter (peft's inference with mixed adapters), where all layers
    can tell rows apart; else one member runs at a time.
    """

    model: PeftModel
    adapters: tuple[str, ...]
    """peft's names of them, on the model while :func:`further_adapters` is active."""
    average: Average
    rows_per_pass: int | None = None

    @property
    def count(self) -> int:
        return len(self.adapters)

    @property
    def most_per_pass(self) -> int | None:
        return None if self._rows_differ else 1

    @cached_property
    def _layers(self) -> list[LoraLayer]:
        """Of all the adapters."""
        return list({id(layer): layer for name in self.adapters for layer in self._layers_of(name).values()}.values())

    @cached_property
    def _rows_differ(self) -> bool:
        """Whether rows can have adapters of their own: all is stock LoRA, and no expert, which sees single tokens."""
        if any(isinstance(module, AuxiliaryTrainingWrapper) for module in self.model.modules()):
            return False  # a module trained in full, which has no rows
        found = [(path, layer, name) for name in self.adapters for path, layer in self._layers_of(name).items()]
        return all(
            type(layer).__name__ in OF_SEVERAL_ADAPTERS and name not in layer.lora_variant and ".experts." not in path
            for path, layer, name in found
        )

    def _layers_of(self, name: str) -> dict[str, LoraLayer]:
        return adapter_layers(self.model, name)

    @contextmanager
    def active(self, numbers: range) -> Iterator[None]:
        """Each part of the batch sees the adapter of its member."""
        names = [self.adapters[number] for number in numbers]
        if len(names) == 1:
            before = self.model.active_adapter
            self.model.set_adapter(names[0], inference_mode=True)
            try:
                yield
            finally:
                self.model.set_adapter(before, inference_mode=True)
            return

        def each_row(
            _layer: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            rows = len(arguments[0]) // len(names)
            return arguments, {**given, "adapter_names": [name for name in names for _ in range(rows)]}

        with ExitStack() as hooks:
            for layer in self._layers:
                assert isinstance(layer, nn.Module)
                hooks.callback(layer.register_forward_pre_hook(each_row, with_kwargs=True).remove)
            yield


@contextmanager
def further_adapters(model: PeftModel, folders: Sequence[Path]) -> Iterator[None]:
    """Inside, the model also holds these adapters, called as :func:`adapter_names` says; the active one stays.

    Raises:
        UserError: a folder holds no adapter.
    """
    names = adapter_names(model, len(folders))[1:]
    loaded: list[str] = []
    try:
        for name, folder in zip(names, folders, strict=True):
            check_adapter_folder(folder)
            with without_false_warnings():
                model.load_adapter(str(folder), adapter_name=name, torch_device=str(model.device))
            loaded.append(name)
        yield
    finally:
        for name in loaded:
            model.delete_adapter(name)


def adapter_names(model: PeftModel, further: int) -> tuple[str, ...]:
    """peft's names of the model's adapter and of further ones."""
    return (_only_adapter(model), *(f"member-{number}" for number in range(1, further + 1)))


def _only_adapter(model: PeftModel) -> str:
    """Name of the active adapter."""
    (name,) = model.active_adapters
    return str(name)
