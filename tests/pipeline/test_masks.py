"""The masks: their statistics, their purity, and their bits, which may never change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.lora_dropout import LoraDropout, copied_rows, example_coordinates, instance_coordinates
from pipeline.lora_dropout.attach import canonical_name
from pipeline.lora_dropout.masks import feature_words, kept, threshold

CPU = torch.device("cpu")
FEATURES = 400_000
# Two-sided normal tail beyond 6 standard deviations: 2e-9. Fewer than 100 comparisons in this file: false alarm < 2e-7
# per run, were the bits fresh; they are not, so a failure is the key's own.
DEVIATIONS = 6.0
RATES = (0.1, 0.2, 0.5, 0.9)

GOLDEN_ENSEMBLE = ["41c333eddc4b64f0", "7fd0c4e43ed300f3"]
GOLDEN_TRAIN = "9ffaffbb977afff9"


def bits(
    rate: float,
    seed: int = 7,
    purpose: str = "train",
    coordinate: tuple[int, ...] = (3, 1, 0),
    module: str = "model.layers.0.self_attn.q_proj",
    side: str = "A",
    features: int = FEATURES,
) -> torch.Tensor:
    """``(features,)`` bool."""
    return kept(feature_words(module, side, features, CPU), seed, purpose, [coordinate], threshold(rate))[0, :features]


def assert_frequency(events: torch.Tensor, probability: float) -> None:
    """The share of true events is the probability, within chance."""
    count = events.numel()
    deviation = math.sqrt(probability * (1 - probability) / count)
    found = events.double().mean().item()
    assert abs(found - probability) <= DEVIATIONS * deviation, (found, probability, count)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_features_are_kept_with_probability_one_minus_rate(rate: float, seed: int) -> None:
    print(f"seed {seed}")
    assert_frequency(bits(rate, seed=seed), 1 - rate)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "other",
    [
        {"side": "B"},
        {"module": "model.layers.0.self_attn.k_proj"},
        {"module": "model.layers.1.self_attn.q_proj"},
        {"seed": 8},
        {"purpose": "ensemble"},
        {"coordinate": (4, 1, 0)},
        {"coordinate": (3, 0, 0)},
        {"coordinate": (3, 1, 1)},
        {"coordinate": (3, 1)},
    ],
    ids=str,
)
def test_masks_that_differ_in_one_part_of_the_key_are_independent(rate: float, other: dict[str, object]) -> None:
    assert_frequency(bits(rate) & bits(rate, **other), (1 - rate) ** 2)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("distance", [1, 2, 64])
def test_features_of_one_mask_are_independent(rate: float, distance: int) -> None:
    mask = bits(rate)
    assert_frequency((mask[:-distance] & mask[distance:])[:: distance + 1], (1 - rate) ** 2)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_each_feature_is_fair_over_steps(rate: float) -> None:
    steps = [(step, 0, 0) for step in range(20_000)]
    masks = kept(feature_words("m", "A", 6, CPU), 11, "train", steps, threshold(rate))[:, :6]  # (20000, 6)
    for feature in masks.T:
        assert_frequency(feature, 1 - rate)
        assert_frequency((feature[:-1] & feature[1:])[::2], (1 - rate) ** 2)


def test_three_masks_are_jointly_independent() -> None:
    """A XOR over the coordinates would leave pairs independent, and this not."""
    first, second, third = (bits(0.5, coordinate=(n,)) for n in range(3))
    assert_frequency(first ^ second ^ third, 0.5)
    assert_frequency(first & second & third, 0.125)
    side_a = bits(0.5, coordinate=(0,)) ^ bits(0.5, coordinate=(1,))
    side_b = bits(0.5, coordinate=(0,), side="B") ^ bits(0.5, coordinate=(1,), side="B")
    assert_frequency(side_a ^ side_b, 0.5)


coordinates = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 10)), min_size=1, max_size=6)
rates = st.floats(0.0, 0.9)


@settings(max_examples=50, deadline=None)
@given(coordinates=coordinates, rate=rates, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_mask_depends_on_nothing_but_its_key(
    coordinates: list[tuple[int, ...]], rate: float, seed: int, data: st.DataObject
) -> None:
    words = feature_words("m", "B", 37, CPU)
    together = kept(words, seed, "train", coordinates, threshold(rate))
    order = data.draw(st.permutations(range(len(coordinates))))
    torch.manual_seed(data.draw(st.integers(0, 100)))
    state = torch.get_rng_state()
    for row in order:
        alone = kept(words, seed, "train", [coordinates[row]], threshold(rate))
        assert torch.equal(alone[0], together[row])
    half = torch.cat([kept(part, seed, "train", coordinates, threshold(rate)) for part in words.split(10)], dim=1)
    assert torch.equal(half, together)
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=50, deadline=None)
@given(low=rates, high=rates, seed=st.integers(0, 2**32 - 1))
def test_a_higher_rate_only_drops_more(low: float, high: float, seed: int) -> None:
    low, high = sorted((low, high))
    few, many = (bits(rate, seed=seed, features=200) for rate in (high, low))
    assert not (few & ~many).any()


def test_rate_0_keeps_everything() -> None:
    assert bits(0.0).all()


def test_golden_bits() -> None:
    """Frozen: a saved adapter's ensemble, and every resumed run, need these very bits for ever."""
    mask = kept(
        feature_words("model.layers.3.mlp.down_proj", "A", 64, CPU), 42, "ensemble", [(0,), (5,)], threshold(0.5)
    )  # (2, 64)
    assert [hexadecimal(row) for row in mask] == GOLDEN_ENSEMBLE
    mask = kept(
        feature_words("model.layers.0.self_attn.q_proj", "B", 64, CPU), 42, "train", [(7, 3, 1)], threshold(0.3)
    )
    assert hexadecimal(mask[0]) == GOLDEN_TRAIN


def hexadecimal(mask: torch.Tensor) -> str:
    return f"{int(''.join(str(int(bit)) for bit in mask), 2):016x}"


def small_model(targets: str | list[str] = "all-linear") -> PeftModel:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))


def test_a_layers_masks_do_not_depend_on_the_other_layers() -> None:
    coordinates = [(0, 0), (0, 1)]
    everywhere = LoraDropout(small_model(), 0.5, seed=3).layer_masks("train", coordinates)
    some = LoraDropout(small_model(["v_proj", "down_proj"]), 0.5, seed=3).layer_masks("train", coordinates)
    assert len(everywhere) == 14 and len(some) == 4
    for name, masks in some.items():
        assert torch.equal(masks.kept_in, everywhere[name].kept_in)
        assert torch.equal(masks.kept_out, everywhere[name].kept_out)


def test_layer_masks_have_the_layers_shapes_and_key() -> None:
    dropout = LoraDropout(small_model(), 0.25, seed=3)
    masks = dropout.layer_masks("train", [(9, 1)])["model.layers.1.mlp.down_proj"]
    assert masks.kept_in.shape == (1, 24) and masks.kept_out.shape == (1, 16)
    assert masks.scale == pytest.approx((4 / 3) ** 2)
    key = {"seed": 3, "coordinate": (9, 1), "module": "model.layers.1.mlp.down_proj"}
    assert torch.equal(masks.kept_in[0], bits(0.25, side="A", features=24, **key))
    assert torch.equal(masks.kept_out[0], bits(0.25, side="B", features=16, **key))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_names_do_not_depend_on_what_wraps_the_model(wrapper: str) -> None:
    assert canonical_name(f"{wrapper}base_model.model.model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"


def test_instance_coordinates_are_distinct_over_steps_micro_batches_ranks_and_instances() -> None:
    every = [
        coordinate
        for step in range(3)
        for micro_batch in range(4)
        for rank in range(2)
        for coordinate in instance_coordinates(step, micro_batch, rank, ranks=2, instances=3)
    ]
    assert len(set(every)) == len(every) == 72


def test_accumulation_and_ranks_number_micro_batches_alike() -> None:
    ranks = [instance_coordinates(5, micro, rank, 2, 3) for micro in range(2) for rank in range(2)]
    accumulated = [instance_coordinates(5, micro, 0, 1, 3) for micro in range(4)]
    assert ranks == accumulated


def test_copies_are_group_major() -> None:
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "row": torch.tensor([8, 9])}
    copied = copied_rows(batch, 3)
    assert copied["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]] * 3
    assert copied["row"].tolist() == [8, 9] * 3
    assert example_coordinates(1, [8, 9], 3) == [(1, row, draw) for draw in range(3) for row in (8, 9)]
