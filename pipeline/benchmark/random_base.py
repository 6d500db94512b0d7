"""A base with random weights, built straight into its storage: no download, never a 16-bit copy of it."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Params4bit
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.quantizers import AutoHfQuantizer

from pipeline.base import DTYPES, keep_training_kernel, quantization_config
from pipeline.recipe import schema


def random_base(config: LlamaConfig, base: schema.Base, device: torch.device, seed: int) -> PreTrainedModel:
    """A model of this configuration as :func:`pipeline.base.load_base` would load it, but for its weights.

    Modules are made on torch's meta device, then each weight is drawn, quantised and let go of, one at a time: the peak
    is the quantised model and one layer's weight in 16 bit.

    Args:
        config: of the architecture.
        base: the recipe's section: quantisation (``nf4`` or ``none``), dtype, attention.
        device: where the weights are drawn and stay.
        seed: of the weights.
    """
    dtype = DTYPES[base.dtype]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=base.attention)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # the only part that is computed, and not drawn
    settings = quantization_config(base)
    quantizer = None if settings is None else AutoHfQuantizer.from_config(settings)
    if quantizer is not None:
        quantizer.preprocess_model(model, device_map={"": device})
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    drawn: dict[int, nn.Parameter] = {}  # tied weights are one parameter
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in drawn:
                drawn[id(parameter)] = _random(parameter, dtype, device, generator, config.initializer_range)
            module.register_parameter(name, drawn[id(parameter)])
            weight = drawn[id(parameter)]
            if isinstance(weight, Params4bit):  # as bitsandbytes' own loading leaves it
                weight.module, module.quant_state = module, weight.quant_state
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    keep_training_kernel(model)
    return model.eval()


def _random(
    empty: nn.Parameter, dtype: torch.dtype, device: torch.device, generator: torch.Generator, deviation: float
) -> nn.Parameter:
    """The weight of an empty parameter: a norm's are one, others normal; 4-bit ones are quantised."""
    if empty.dim() == 1:
        return nn.Parameter(torch.ones(empty.shape, dtype=dtype, device=device), requires_grad=False)
    weight = torch.empty(empty.shape, dtype=dtype, device=device).normal_(0.0, deviation, generator=generator)
    if not isinstance(empty, Params4bit):
        return nn.Parameter(weight, requires_grad=False)
    quantised = Params4bit(
        weight,
        requires_grad=False,
        blocksize=empty.blocksize,
        compress_statistics=empty.compress_statistics,
        quant_type=empty.quant_type,
        quant_storage=empty.quant_storage,
    )
    return quantised.to(device)  # type: ignore[misc]  # its overloads miss a subclass; it quantises


def plain_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """What a trainer asks of a tokenizer when its rows are numbers already: a pad token and an end."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"<{number}>": number for number in range(3, min(vocabulary, 16))}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
