"""Whether a model lets requests share tokens: its attention must obey a mask, and its positions be given by us."""

from __future__ import annotations

import inspect

import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from eval.lm.layout import Row
from eval.lm.tensors import KeptPrefix, batch_of, mask_of, states

LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def why_separate(model: PeftModel | PreTrainedModel, longest: int) -> str | None:
    """Why a model's rows must be run whole and one request each, in words; None where tokens can be shared.

    Args:
        model: in eval mode.
        longest: tokens of the longest row.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(causal, PreTrainedModel)
    config: PretrainedConfig = causal.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention ({config._attn_implementation}) takes no mask of branches"
    taken = inspect.signature(causal.forward).parameters
    missing = [name for name in ("position_ids", "past_key_values", "logits_to_keep") if name not in taken]
    if missing:
        return f"its forward takes no {', '.join(missing)}"
    settings = config.to_dict()
    kinds = set(settings.get("layer_types") or ["full_attention"])
    window = settings.get("sliding_window")
    if not kinds <= {"full_attention", "sliding_attention"}:
        return "not all of its layers attend to everything before"
    if window is not None and window < max(longest, TEST_TOKENS):
        return f"its layers attend to the last {window} tokens only, and a text has {longest}"
    if has_length_dependent_rope(model):
        return "its rotary embedding depends on the length of the sequence"
    if not _obeys(causal):
        return "its scores change when tokens are shared, in a test on random tokens"
    return None


def has_length_dependent_rope(model: PeftModel | PreTrainedModel) -> bool:
    """Whether a token's scores depend on how long the longest row of its batch is."""
    rope = model.config.get_text_config().to_dict().get("rope_parameters") or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one, or one for each kind of layer
    return any(part.get("rope_type") in LENGTH_DEPENDENT_ROPE for part in kinds)


TEST_TOKENS = 18
"""Of the longest row in the test on random tokens."""


@torch.no_grad()
def _obeys(causal: PreTrainedModel) -> bool:
    """Whether a row with two branches after a kept beginning gives the logits of whole rows, on random tokens.

    Catches models that ignore positions or masks, and heads that treat the kept columns differently.
    """
    vocabulary = causal.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (TEST_TOKENS,), generator=draw).tolist()
    context, branches = tuple(tokens[:12]), [tuple(tokens[12:16]), tuple(tokens[15:18])]
    row = Row(context, branches, [[0], [1]])
    batch = batch_of([row, Row(context[:-2], branches[:1], [[2]])], 6, causal.device)
    cache = DynamicCache(config=causal.config)
    start = torch.tensor([context[:6]], device=causal.device)
    causal(input_ids=start, past_key_values=cache, use_cache=True)
    shared = causal(
        input_ids=batch.tokens,
        attention_mask=mask_of(batch, 1, causal),
        position_ids=batch.positions,
        past_key_values=Cache(layers=[KeptPrefix(keys, values) for keys, values in states(cache)]),
        use_cache=True,
        logits_to_keep=batch.columns,
    ).logits.float()
    shared = shared[batch.places[:, 0], batch.places[:, 1]]
    wholes = [context + branches[0][:-1], context + branches[1][:-1], context[:-2] + branches[0][:-1]]
    logits = [causal(input_ids=torch.tensor([whole], device=causal.device)).logits[0].float() for whole in wholes]
    separate = torch.cat([logits[0][11:], logits[1][12:], logits[2][9:]])
    tolerance = 1e-3 if causal.dtype == torch.float32 else 0.1
    return bool((shared - separate).abs().max() <= tolerance * separate.std())
