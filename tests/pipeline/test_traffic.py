"""The arithmetic of what ranks exchange; counted bytes are in pipeline/preflight/SCALE.md."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from pipeline.benchmark.shapes import shape_config
from pipeline.preflight.traffic import Stored, Traffic, checkpoint_traffic, kept_bytes, step_traffic, stored_tensors
from pipeline.recipe import Recipe


def recipe(rank: int = 16, **base: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "base": {"model": "m", **base},
            "data": {"train": [{"path": "d"}]},
            "adapter": {"rank": rank},
        }
    )


@pytest.fixture(scope="module")
def llama7b() -> Stored:
    return stored_tensors(shape_config("llama2-7b"), recipe())


def test_llama_2_7b_in_elements_of_16_bits(llama7b: Stored) -> None:
    h, f, layers, words = 4096, 11008, 32, 32000
    adapter = layers * 16 * (4 * (h + h) + 3 * (h + f))
    assert llama7b.embedding == llama7b.head == words * h
    assert sum(llama7b.layers) == layers * (4 * h * h + 3 * h * f) // 4 + (2 * layers + 1) * h + adapter
    assert llama7b.trained == adapter == 39_976_960
    assert llama7b.width == 2


def test_other_ways_to_store() -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    linear, norms = 2 * (4 * 64 * 64 + 3 * 64 * 96), 5 * 64
    adapter = 2 * 4 * (4 * 128 + 3 * 160)
    whole = stored_tensors(config, recipe(rank=4, quantization="none", dtype="float32"))
    assert (whole.head, sum(whole.layers), whole.width) == (0, linear + norms + adapter, 4)
    wide = stored_tensors(config, recipe(rank=4, dtype="float32"))
    assert sum(wide.layers) == linear // 8 + norms + adapter  # eight 4-bit weights in a float32


@given(st.integers(1, 64), st.integers(2, 2048))
def test_below_zero_3_only_the_adapter_travels(accumulation: int, ranks: int) -> None:
    stored = Stored(width=2, embedding=10**8, head=10**8, layers=(10**9, 10**6), trained=10**6)
    adapter = 2 * 10**6
    share = (ranks - 1) / ranks
    sent = [step_traffic(stored, zero, accumulation).sent(ranks) for zero in range(3)]
    assert sent[0] == pytest.approx(2 * adapter * share)
    assert sent[1] == pytest.approx(3 * adapter * share)
    assert sent[2] == pytest.approx((2 * accumulation + 1) * adapter * share)


def test_zero_3_by_hand() -> None:
    """Two layers' tensors above the threshold, one below; embedding once, head and layers twice, per micro-batch."""
    stored = Stored(width=2, embedding=300_000, head=200_000, layers=(150_000, 400_000, 90_000), trained=90_000)
    found = step_traffic(stored, 3, accumulation=3)
    assert found.gathered == 2 * (3 * (300_000 + 2 * 200_000 + 2 * 550_000) + 90_000)
    assert (found.scattered, found.all_reduced) == (2 * 3 * 90_000, 0)
    assert kept_bytes(stored, accumulation=3) == 3 * 2 * 250_000_000


def test_a_narrower_model_is_the_real_one_in_small(llama7b: Stored) -> None:
    """A sixteenth of the width, vocabulary and rank, DeepSpeed's limits by 256: all but the norms is 1/256."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=2000,
    )
    small = stored_tensors(config, recipe(rank=1))
    for zero in range(4):
        real, narrow = step_traffic(llama7b, zero, 2), step_traffic(small, zero, 2, shrunk=256)
        assert 256 * narrow.sent(8) == pytest.approx(real.sent(8), rel=1e-3)


def test_checkpoints() -> None:
    stored = Stored(width=2, embedding=1, head=1, layers=(1,), trained=1000)
    generators = checkpoint_traffic(stored, 0, ranks=4)
    assert generators == Traffic(gathered=4 * 13_500)
    assert checkpoint_traffic(stored, 2, ranks=4) == Traffic(gathered=4 * 13_500, all_reduced=12_000)
    assert checkpoint_traffic(stored, 3, ranks=4) == Traffic(gathered=14_000 + 4 * 13_500)
