"""LoRA Dropout on a finished ``PeftModel``: find its layers, make their masks, switch them on and off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.adalora.layer import SVDConv2d, SVDLinear
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pipeline.lora_dropout import refusals
from pipeline.lora_dropout.convolution import MaskedConvolution
from pipeline.lora_dropout.embedding import MaskedEmbedding
from pipeline.lora_dropout.experts import MaskedExperts
from pipeline.lora_dropout.layer_masks import LayerMasks, MaskedLayer, Runs
from pipeline.lora_dropout.linear import MaskedLinear
from pipeline.lora_dropout.masks import Coordinate, check_coordinates, feature_words, kept, packed, padded, threshold
from pipeline.lora_dropout.rates import Rates
from pipeline.lora_dropout.svd import MaskedSVD, MaskedSVDConvolution

_PEFT_PREFIX = "base_model.model."


def _masked_kinds() -> dict[type, type[MaskedLayer]]:
    """How each of peft's layer types is masked. bitsandbytes' exist only where it is installed."""
    kinds: dict[type, type[MaskedLayer]] = {
        Linear: MaskedLinear,
        Embedding: MaskedEmbedding,
        Conv1d: MaskedConvolution,
        Conv2d: MaskedConvolution,
        Conv3d: MaskedConvolution,
        ParamWrapper: MaskedExperts,
        SVDLinear: MaskedSVD,
        SVDConv2d: MaskedSVDConvolution,
    }
    if is_bnb_available():
        from peft.tuners.adalora.bnb import SVDLinear8bitLt
        from peft.tuners.lora.bnb import Linear8bitLt

        kinds |= {Linear8bitLt: MaskedLinear, SVDLinear8bitLt: MaskedSVD}
    if is_bnb_4bit_available():
        from peft.tuners.adalora.bnb import SVDLinear4bit
        from peft.tuners.lora.bnb import Linear4bit

        kinds |= {Linear4bit: MaskedLinear, SVDLinear4bit: MaskedSVD}
    return kinds


MASKED_KINDS = _masked_kinds()


def canonical_name(name: str) -> str:
    """A module's name in the base model, whatever wraps it: masks must not depend on the wrapper."""
    return name.rpartition(_PEFT_PREFIX)[2]


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that hold the adapter, by the canonical name of what they wrap.

    peft nests its wrappers of several parameters of one module, ``experts``, ``experts.base_layer``, ...: the name of
    such a layer is the parameter's, ``experts.up_proj``, however deep it lies.

    Raises:
        ValueError: two layers have one name.
    """
    modules = [(canonical_name(name), module) for name, module in model.named_modules()]
    wrappers = {name for name, module in modules if isinstance(module, BaseTunerLayer)}
    layers: dict[str, LoraLayer] = {}
    for name, module in modules:
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            parts = name.split(".")
            wrapped = [part == "base_layer" and ".".join(parts[:at]) in wrappers for at, part in enumerate(parts)]
            path = [part for part, inside in zip(parts, wrapped, strict=True) if not inside]
            if isinstance(module, ParamWrapper):
                path.append(module.parameter_name)
            canonical = ".".join(path)
            if canonical in layers:
                raise ValueError(f"two layers are called {canonical}, so that their masks would be the same")
            layers[canonical] = module
    return layers


def masked_layers(model: nn.Module, adapter_name: str) -> dict[str, MaskedLayer]:
    """The layers that hold the adapter, by canonical name, sorted so that ranks agree.

    Raises:
        ValueError: the adapter is on no layer, on a kind of layer without a mask rule, or on a layer that
            already has another LoRA variant (e.g. DoRA): a layer is never left without masks in silence.
    """
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"no layer holds a LoRA adapter named {adapter_name!r}")
    return {name: _masked_layer(name, layer, adapter_name) for name, layer in sorted(layers.items())}


def _masked_layer(name: str, layer: LoraLayer, adapter_name: str) -> MaskedLayer:
    """The layer with its mask rule."""
    kind = type(layer)
    if kind not in MASKED_KINDS:
        known = ", ".join(sorted(known.__name__ for known in MASKED_KINDS))
        reason = refusals.LAYERS.get(kind.__name__, "leave this layer out of target_modules")
        raise ValueError(f"{name}: LoRA Dropout has no masks for {kind.__name__} (it has them for {known}): {reason}")
    if adapter_name in layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
        reason = refusals.VARIANTS.get(variant, "attach it to a plain LoRA")
        raise ValueError(
            f"{name} already has the LoRA variant {variant}; LoRA Dropout cannot be combined with it: {reason}"
        )
    if layer.lora_bias.get(adapter_name, False):
        raise ValueError(
            f"{name}: its adapter has a bias (lora_bias), which is neither a column of A nor a row of B and has no "
            "mask rule; set lora_bias to False"
        )
    return MASKED_KINDS[kind](name, layer, adapter_name)


class LoraDropout:
    """The masks of one adapter of a finished ``PeftModel``.

    Between ``with`` blocks the model runs peft's stock code, bit for bit. Inside one, each group of rows sees its
    own mask. Nothing is registered on the model: its state dict, its parameters and its saved adapter stay stock.
    Forward and backward belong inside: under activation checkpointing, the recomputation in backward needs the masks.

        dropout = LoraDropout(model, rate=0.5, seed=42)
        with dropout.masks("train", [(step, micro_batch, n) for n in range(4)]):
            loss = model(**four_copies_of_the_batch).loss
            loss.backward()

    For an ensemble, :meth:`members`; call ``model.eval()`` first, since the base may have dropout of its own.

    With ``rescale`` (the default of the recipe) masks are scaled by 1/(1-p), so that the mean of ``B_hat A_hat`` is
    ``BA``. Equation 2 verbatim, without the scale, is the same model at ``alpha * (1-p)**2``: see
    :func:`folded_alpha`.
    """

    def __init__(
        self,
        model: PeftModel,
        rate: float,
        seed: int,
        adapter_name: str = "default",
        rate_pattern: Mapping[str, float] | None = None,
        initial_rate: float | None = None,
    ) -> None:
        """Find the layers; nothing changes yet.

        Args:
            model: with the adapter already on it.
            rate: p in [0, 1).
            seed: of the masks.
            adapter_name: peft's name of the adapter.
            rate_pattern: other rates by module name: see :class:`Rates`.
            initial_rate: rate at the start of training, where it changes: see :class:`Rates`.

        Raises:
            ValueError: see :func:`masked_layers`; a rate that is no number in [0, 1); a pattern that names no layer.
        """
        self.rates = Rates(rate, dict(rate_pattern or {}), initial_rate)
        self.seed = seed
        self.adapter_name = adapter_name
        self.layers = masked_layers(model, adapter_name)
        unused = self.rates.unused(self.layers)
        if unused:
            endings = sorted({name.rpartition(".")[2] for name in self.layers})
            raise ValueError(
                f"rate_pattern: {', '.join(map(repr, unused))} names no layer of this adapter; "
                f"their names end in {', '.join(endings)}"
            )
        self._words: torch.Tensor | None = None
        self._active = False

    @property
    def rate(self) -> float:
        """p, of every layer that no pattern names."""
        return self.rates.rate

    @contextmanager
    def masks(
        self,
        purpose: str,
        coordinates: Sequence[Coordinate],
        *,
        rows: int | None = None,
        lengths: Sequence[int] | None = None,
        balanced: int | None = None,
        progress: float = 1.0,
    ) -> Iterator[None]:
        """Context in which the batch's rows see ``G = len(coordinates)`` masks.

        A batch of ``G*b`` rows is group-major: rows ``[g*b, (g+1)*b)`` are under mask g. The context must enclose
        forward, recomputation and backward.

        Args:
            purpose: separates streams, e.g. ``"train"``.
            coordinates: G of them.
            rows: of the batch, checked in every layer where given.
            lengths: G numbers of tokens, where examples of different lengths lie in one row, one after another.
            balanced: N, where the last coordinate counts 0 to N-1 and each feature is to be kept about (1-p) N times.
            progress: share of the training that is done, for a rate that changes.

        Raises:
            RuntimeError: entered inside another one, of this handle or of another one on the adapter; on leaving, the
                adapter was merged or disabled inside, or another one made active.
            TypeError: a coordinate that is no tuple of integers.
            ValueError: several masks for a layer that can only have one; the adapter is merged, disabled or not active;
                see :meth:`layer_masks`.
        """
        if self._active:
            raise RuntimeError("LoraDropout.masks() is already active on this adapter; leave it first")
        masks = self.layer_masks(purpose, coordinates, rows=rows, lengths=lengths, balanced=balanced, progress=progress)
        self._check_layers(len(coordinates))
        self._active = True
        try:
            for name, layer in self.layers.items():
                layer.attach(masks[name])
            yield
        finally:
            for layer in self.layers.values():
                layer.detach()
            self._active = False
        try:
            self._check_reached()
        except ValueError as error:
            raise RuntimeError(
                f"{error}. It happened while masks were active; what ran since ran without them"
            ) from error

    def members(self, numbers: Iterable[int], balanced: int | None = None) -> AbstractContextManager[None]:
        """Masks of the ensemble members with these numbers (equation 8); rows are member-major.

        Args:
            numbers: of the members.
            balanced: N, for members 0 to N-1 that keep each feature about (1-p) N times between them.

        Raises:
            TypeError: one number for the numbers; and see :meth:`masks`.
        """
        if not isinstance(numbers, Iterable):
            raise TypeError(f"members: give numbers, e.g. range(8), found {numbers!r}")
        return self.masks("ensemble", [(number,) for number in numbers], balanced=balanced)

    def layer_masks(
        self,
        purpose: str,
        coordinates: Sequence[Coordinate],
        *,
        rows: int | None = None,
        lengths: Sequence[int] | None = None,
        balanced: int | None = None,
        progress: float = 1.0,
    ) -> dict[str, LayerMasks]:
        """Masks of every layer at these coordinates, by canonical name; arguments as for :meth:`masks`.

        Raises:
            TypeError: a coordinate that is no tuple of integers.
            ValueError: no coordinates; another number of lengths; balanced, and a coordinate outside the set or no set;
                progress outside 0 to 1.
        """
        check_coordinates(coordinates)
        if lengths is not None and len(lengths) != len(coordinates):
            raise ValueError(f"{len(lengths)} lengths for {len(coordinates)} masks: give the tokens of each mask's run")
        words = self._feature_words()
        rates = [self.rates.of(name, progress) for name in self.layers]
        sizes = [padded(features) for layer in self.layers.values() for features in layer.features()]
        bits = packed(
            kept(words, self.seed, purpose, coordinates, self._thresholds(rates, sizes, words.device), balanced)
        )
        runs = None if lengths is None else Runs.of(lengths, words.device)
        parts = iter(bits.split([size // 8 for size in sizes], dim=1))
        return {
            name: LayerMasks(
                name,
                next(parts),
                next(parts),
                *layer.features(),
                rate,
                # an expert in a list sees any number of tokens, and all under the one mask
                None if layer.one_group else rows,
                None if layer.one_group else runs,
            )
            for (name, layer), rate in zip(self.layers.items(), rates, strict=True)
        }

    def _check_reached(self) -> None:
        """Refuse masks that would change nothing in a layer, with ``ValueError``."""
        for name, masked in self.layers.items():
            if masked.layer.merged:
                raise ValueError(
                    f"{name}: an adapter is merged into its weight, where no mask reaches it; unmerge_adapter() first"
                )
            if self.adapter_name not in masked.layer.active_adapters:
                raise ValueError(
                    f"{name}: the adapter {self.adapter_name!r} is not active and its masks would change nothing; "
                    "set_adapter() first"
                )
            if masked.layer.disable_adapters:
                raise ValueError(f"{name}: adapters are disabled and masks would change nothing; enable them first")

    def _check_layers(self, groups: int) -> None:
        """Refuse masks that a layer would not heed, or could not tell apart."""
        self._check_reached()
        for name, masked in self.layers.items():
            if masked.occupied():
                raise RuntimeError(
                    f"{name}: the adapter {self.adapter_name!r} already has masks, of another LoraDropout, or another "
                    "LoRA variant there; leave that first, or it would be lost"
                )
            if masked.one_group and groups > 1:
                raise ValueError(
                    f"{name}: {masked.one_group}, so {groups} masks cannot run at once; use instance masks, one after "
                    "another (execution: sequential)"
                )

    @staticmethod
    def _thresholds(rates: list[float], sizes: list[int], device: torch.device) -> torch.Tensor | int:
        """One for all layers where they have one rate, else ``(F,)`` int32."""
        if len(set(rates)) == 1:
            return threshold(rates[0])
        each = torch.tensor([threshold(rate) for rate in rates for _side in "AB"], dtype=torch.int32, device=device)
        return each.repeat_interleave(torch.tensor(sizes, device=device), output_size=sum(sizes))

    def _feature_words(self) -> torch.Tensor:
        """``(F/2,)`` int64, A then B of every layer: all masks of a step come from one hash of this vector."""
        device = next(iter(self.layers.values())).device()
        if self._words is None or self._words.device != device:
            words = []
            for name, layer in self.layers.items():
                features_in, features_out = layer.features()
                words += [feature_words(name, "A", features_in, device), feature_words(name, "B", features_out, device)]
            self._words = torch.cat(words)
        return self._words


def folded_alpha(alpha: float, rate: float, rescale: bool) -> float:
    """The alpha under which masks scaled by 1/(1-p), and the deterministic adapter, mean what the recipe says.

    ``rescale=False`` is equation 2 verbatim: masks of 0 and 1, whose mean adapter is ``(1-p)**2 BA``. Folding that
    factor into alpha once, when the adapter is created, makes every later use right: the deterministic model, the
    saved adapter in stock peft, a merge. The masked model is unchanged, since the two scales of 1/(1-p) cancel it.
    """
    return alpha if rescale else alpha * (1.0 - rate) ** 2
