"""Tiny random causal language models of many architectures, with a random LoRA adapter that changes their output."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from eval.lm.members import Members

VOCABULARY = 4096
"""Of the pocket base's tokenizer."""
CONTEXT = 64
"""Longest sequence of the models here, in tokens."""
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
SCALED_ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 3.0, 5.0],
    **SCALED_ROPE,
}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "llama, grouped queries": {"model_type": "llama", **LLAMA, "num_key_value_heads": 2},
    "llama, eager": {"model_type": "llama", **LLAMA, "attn_implementation": "eager"},
    "llama, yarn": {"model_type": "llama", **LLAMA, "rope_parameters": {"rope_type": "yarn", **SCALED_ROPE}},
    "llama, dynamic": {"model_type": "llama", **LLAMA, "rope_parameters": {"rope_type": "dynamic", **SCALED_ROPE}},
    "mistral": {"model_type": "mistral", **LLAMA, "num_key_value_heads": 2, "sliding_window": None},
    "mistral, window": {"model_type": "mistral", **LLAMA, "num_key_value_heads": 2, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", **LLAMA},
    "qwen3": {"model_type": "qwen3", **LLAMA, "head_dim": 8},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "initializer_range": 0.3,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "word_embed_proj_dim": 32,
        "init_std": 0.3,
        "pad_token_id": 3,
    },
    "bloom": {
        "model_type": "bloom",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    },
    "mpt": {
        "model_type": "mpt",
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": CONTEXT,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    },
    "gemma2": {
        "model_type": "gemma2",
        **LLAMA,
        "head_dim": 8,
        "attn_logit_softcapping": 2.0,
        "sliding_window": 7,
        "attn_implementation": "eager",
    },
    "gemma2, no window": {
        "model_type": "gemma2",
        **LLAMA,
        "head_dim": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "layer_types": ["full_attention"] * 2,
        "sliding_window": CONTEXT,
        "attn_implementation": "eager",
    },
    "phi": {"model_type": "phi", **LLAMA, "partial_rotary_factor": 0.5},
    "phi3": {"model_type": "phi3", **LLAMA},
    "phi3, longrope": {
        "model_type": "phi3",
        **LLAMA,
        "original_max_position_embeddings": 16,
        "rope_parameters": LONGROPE,
    },
    "gpt_neox": {"model_type": "gpt_neox", **LLAMA},
}
WORDS = ["the", "old", "dog", "house", "river", "walked", "slowly", "saw", "her", "letter", "under", "white", "never"]


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model of :data:`CONFIGS` with random weights, in eval mode."""
    arguments = dict(CONFIGS[kind])
    attention = arguments.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()


def with_adapter(model: PreTrainedModel, seed: int = 1, **config: Any) -> PeftModel:
    """A random LoRA on all linear layers, or as ``config`` says, that really changes the output."""
    torch.manual_seed(seed)
    arguments = {"r": 4, "lora_alpha": 8.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(model, LoraConfig(**arguments)).eval().requires_grad_(False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data.normal_(std=0.2)
    return adapted


def sentence(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def questions(seed: int, count: int, examples: int = 20) -> list[tuple[str, str]]:
    """(context, continuation) of ``count`` questions with four choices, most after the same ``examples`` words,
    some with equal or longer choices."""
    draw = random.Random(seed)
    beginning = sentence(draw, examples, examples)
    pairs = []
    for number in range(count):
        context = f"{beginning if number % 4 else ''} {sentence(draw, 1, 12)}:"
        pairs += [(context, " " + sentence(draw, 1, most)) for most in (1, 1, 3, 5)]
    return pairs


def requests_of(kind: str, arguments: list[Any], task: str = "task") -> list[Instance]:
    """One document each."""
    return [Instance(kind, {}, given, 0, (task, number, 1)) for number, given in enumerate(arguments)]


def naive_logits(model: PeftModel, members: Members, tokens: list[int]) -> torch.Tensor:
    """``(N, T, V)`` float64: every member alone, one whole pass each."""
    found = []
    for number in range(members.count):
        with members.active(range(number, number + 1)), torch.no_grad():
            found.append(model(input_ids=torch.tensor([tokens])).logits[0].double())
    return torch.stack(found)


def averaged(logits: torch.Tensor, average: str) -> torch.Tensor:
    """The definition: ``(N, ..., V)`` logits to ``(..., V)`` log-probabilities."""
    if average == "logits":
        return logits.mean(0).log_softmax(-1)
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def naive_scores(
    model: PeftModel, members: Members, context: list[int], continuation: list[int]
) -> tuple[list[float], list[float], bool]:
    """Log-likelihood under the first 1..N members, under each alone, and whether greedy: the definition."""
    logits = naive_logits(model, members, context + continuation[:-1])[:, len(context) - 1 :]
    wanted = torch.tensor(continuation)[:, None]
    running = [averaged(logits[:n], members.average) for n in range(1, members.count + 1)]
    each = [averaged(member[None], members.average) for member in logits]
    sums = [[float(scores.gather(1, wanted).sum()) for scores in part] for part in (running, each)]
    return sums[0], sums[1], bool((running[-1].argmax(-1) == wanted[:, 0]).all())


def counted_calls(model: torch.nn.Module, calls: list[tuple[int, int]]) -> Callable[[], None]:
    """From now on every forward pass adds its (rows, tokens) to ``calls``; the result ends that."""
    hook = model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda _module, arguments, _output: calls.append(tuple(arguments[0].shape))
    )
    return hook.remove
