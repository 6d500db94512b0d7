"""The masks' purity, their rates by layer and over time, and their bits, which may never change.

Their distribution is tested in test_masks_statistics.py and test_masks_balanced.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_statistics import CPU, bits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.lora_dropout import LoraDropout, copied_rows, example_coordinates, instance_coordinates
from pipeline.lora_dropout.attach import canonical_name
from pipeline.lora_dropout.masks import feature_words, kept, packed, padded, threshold, unpacked

GOLDEN_ENSEMBLE = ["41c333eddc4b64f0", "7fd0c4e43ed300f3"]
GOLDEN_TRAIN = "9ffaffbb977afff9"


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.lora_dropout.masks._MOST_WORDS", data.draw(st.integers(1, 100)))
        assert torch.equal(kept(words, seed, "train", coordinates, threshold(rate)), together)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_kinds_of_integers_are_the_same_coordinates() -> None:
    """Rows read from an array or a tensor must not change masks in silence; what is no integer is an error."""
    mask = bits(0.5, seed=7, coordinate=(3, 1, 0), features=64)
    for coordinate in ((np.int64(3), True, False), tuple(torch.tensor([3, 1, 0]))):
        assert torch.equal(bits(0.5, seed=np.int32(7), coordinate=coordinate, features=64), mask)
    with pytest.raises(TypeError, match="float"):
        bits(0.5, coordinate=(3.5,), features=64)


@settings(max_examples=50, deadline=None)
@given(low=rates, high=rates, seed=st.integers(0, 2**32 - 1))
def test_a_higher_rate_only_drops_more(low: float, high: float, seed: int) -> None:
    low, high = sorted((low, high))
    few, many = (bits(rate, seed=seed, features=200) for rate in (high, low))
    assert not (few & ~many).any()


@settings(max_examples=50, deadline=None)
@given(features=st.integers(1, 100), groups=st.integers(1, 4), data=st.data())
def test_packed_bits_are_the_bits(features: int, groups: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2 ** padded(features) - 1), min_size=groups, max_size=groups))
    rows = [[number >> place & 1 for place in range(padded(features))] for number in numbers]
    mask = torch.tensor(rows, dtype=torch.bool)
    bytes_ = packed(mask)
    assert bytes_.dtype == torch.uint8 and bytes_.shape == (groups, padded(features) // 8)
    assert int.from_bytes(bytes(bytes_[0].tolist()), "little") == numbers[0]  # feature 8k+i is bit i of byte k
    assert torch.equal(unpacked(bytes_, features), mask[:, :features])


@settings(max_examples=50, deadline=None)
@given(layer_rates=st.lists(st.floats(0.0, 0.999), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_rates_by_feature_are_each_layers_own(layer_rates: list[float], seed: int) -> None:
    """One call for layers of several rates gives each the mask that it has alone."""
    words = [feature_words(f"m.{at}", "A", 20, CPU) for at in range(len(layer_rates))]
    each = torch.tensor([threshold(rate) for rate in layer_rates], dtype=torch.int32).repeat_interleave(24)
    coordinates = [(0, 0), (0, 1)]
    for balanced in (None, 3):
        together = kept(torch.cat(words), seed, "train", coordinates, each, balanced).split(24, dim=1)
        for rate, own, mask in zip(layer_rates, words, together, strict=True):
            assert torch.equal(mask, kept(own, seed, "train", coordinates, threshold(rate), balanced))


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
    for name, layer in some.items():
        assert torch.equal(layer.kept_in, everywhere[name].kept_in)
        assert torch.equal(layer.kept_out, everywhere[name].kept_out)


def test_layer_masks_have_the_layers_shapes_and_key() -> None:
    dropout = LoraDropout(small_model(), 0.25, seed=3)
    masks = dropout.layer_masks("train", [(9, 1)])["model.layers.1.mlp.down_proj"]
    assert masks.kept_in.shape == (1, 24) and masks.kept_out.shape == (1, 16)
    assert masks.scale == pytest.approx((4 / 3) ** 2)
    key = {"seed": 3, "coordinate": (9, 1), "module": "model.layers.1.mlp.down_proj"}
    assert torch.equal(masks.kept_in[0], bits(0.25, side="A", features=24, **key))
    assert torch.equal(masks.kept_out[0], bits(0.25, side="B", features=16, **key))


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_rates_by_pattern_and_over_time(progress: float) -> None:
    """A mask of a layer is the one at the layer's rate of the moment; a growing rate only drops more."""
    model = small_model()
    pattern = {r"layers\.0\..*": 0.1, "down_proj": 0.7}  # the first that fits counts, as in peft's rank_pattern
    dropout = LoraDropout(model, 0.5, seed=3, rate_pattern=pattern, initial_rate=0.3)
    found = dropout.layer_masks("train", [(4, 0)], progress=progress)
    final = {"model.layers.0.mlp.down_proj": 0.1, "model.layers.1.mlp.down_proj": 0.7}
    for name, layer in found.items():
        rate = 0.3 + progress * (final.get(name, 0.1 if "layers.0" in name else 0.5) - 0.3)
        assert layer.rate == pytest.approx(rate)
        assert layer.scale == pytest.approx((1 - rate) ** -2)
        alone = LoraDropout(model, rate, seed=3).layer_masks("train", [(4, 0)])[name]
        assert torch.equal(layer.kept_in, alone.kept_in) and torch.equal(layer.kept_out, alone.kept_out)
    ensemble = dropout.layer_masks("ensemble", [(0,)])
    assert {name: layer.rate for name, layer in ensemble.items()} == {
        name: pytest.approx(final.get(name, 0.1 if "layers.0" in name else 0.5)) for name in found
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.5, "rate_pattern": {"q_proj": 1.0}}, "at least 0 and below 1, found 1.0 for 'q_proj'"),
        ({"rate": float("nan")}, "at least 0 and below 1, found nan for 'rate'"),
        ({"rate": 0.5, "initial_rate": -0.1}, "at least 0 and below 1, found -0.1 for 'initial'"),
        ({"rate": "0.5"}, "a number at least 0 and below 1, found '0.5' for 'rate'"),
        ({"rate": 0.5, "rate_pattern": {"q_proj": "low"}}, "a number at least 0 and below 1, found 'low' for 'q_proj'"),
        (
            {"rate": 0.5, "rate_pattern": {"q_prj": 0.1, "up_proj": 0.2, "up": 0.3}},
            "rate_pattern: 'q_prj', 'up' names no layer of this adapter; their names end in "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$",
        ),
        ({"rate": 0.5, "rate_pattern": {"*proj": 0.1}}, r"rate_pattern: '\*proj' is no regular expression: nothing"),
    ],
)
def test_wrong_rates_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraDropout(small_model(), seed=0, **arguments)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_is_a_share(progress: float) -> None:
    with pytest.raises(ValueError, match=f"progress: the share .* 0 to 1, found {progress}"):
        LoraDropout(small_model(["q_proj"]), 0.5, seed=0).layer_masks("train", [(0,)], progress=progress)


@pytest.mark.parametrize(
    ("coordinates", "balanced", "kind", "message"),
    [
        ([0, 1], None, TypeError, r"coordinates are tuples, e\.g\. \(step, row\), found 0"),
        ([0, 1], 2, TypeError, r"coordinates are tuples, e\.g\. \(step, row\), found 0"),
        (8, None, TypeError, r"coordinates are a list of tuples, e\.g\. \[\(step, row\)\], found 8"),
        ([(0,)], 0, ValueError, "balanced: at least 1, the number of masks, found 0"),
    ],
)
def test_what_is_no_coordinate_is_told(
    coordinates: list[tuple[int, ...]], balanced: int | None, kind: type[Exception], message: str
) -> None:
    dropout = LoraDropout(small_model(["q_proj"]), 0.5, seed=0)
    with pytest.raises(kind, match=message), dropout.masks("train", coordinates, balanced=balanced):
        pass


def test_one_number_is_no_ensemble() -> None:
    with pytest.raises(TypeError, match=r"members: give numbers, e\.g\. range\(8\), found 8"):
        LoraDropout(small_model(["q_proj"]), 0.5, seed=0).members(8)  # type: ignore[arg-type]


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
