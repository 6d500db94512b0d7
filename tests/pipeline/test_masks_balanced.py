"""Balanced masks: every feature is kept about (1-p) N times by N masks, each of which is by itself a plain mask.

A feature is kept K = floor((1-p) N + u) times, in K random ones of the N masks. Seeds and false alarms as in
test_masks_statistics.py; there, instances are compared without balance, which makes them dependent on purpose.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_statistics import CPU, assert_binomial, assert_multinomial, bits
from peft import LoraConfig, get_peft_model
from torch import nn

from pipeline.lora_dropout import LoraDropout
from pipeline.lora_dropout.masks import Coordinate, feature_words, kept, threshold

FEATURES = 200_000
# (1-p) N: whole, not whole, below 1, above N-1; N odd and even
CASES = [(0.5, 8), (0.5, 5), (0.3, 4), (0.9, 3), (0.05, 6), (0.25, 2)]
GOLDEN = ["64ca333dfb46413a", "4bfdf4cccdff7edd", "fb335ba37ecbb563", "9447aeff8031cee4"]


def balanced_set(
    rate: float, instances: int, seed: int, prefix: Coordinate = (4,), side: str = "A", module: str = "m"
) -> torch.Tensor:
    """``(N, FEATURES)`` bool."""
    words = feature_words(module, side, FEATURES, CPU)
    return kept(words, seed, "train", [(*prefix, n) for n in range(instances)], threshold(rate), instances)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0.0, 0.999),
    instances=st.integers(1, 12),
    seed=st.integers(0, 2**63),
    prefix=st.lists(st.integers(0, 2**40), max_size=2).map(tuple),
)
def test_every_feature_is_kept_floor_or_ceil_times(rate: float, instances: int, seed: int, prefix: Coordinate) -> None:
    """And a whole (1-p) N means that often. The mean over features is (1-p) N: 60 comparisons, 1e-6 / 60 for each."""
    members = [(*prefix, n) for n in range(instances)]
    words = feature_words("m", "B", 1000, CPU)
    counts = kept(words, seed, "ensemble", members, threshold(rate), instances).sum(dim=0)
    mean = (threshold(rate) + 1 + 2**31) / 2**32 * instances  # exact: (1-p) N, with p rounded to 2**-32
    low = math.floor(mean)
    assert set(counts.tolist()) <= {low, low + (mean > low)}
    assert_binomial((counts > low).sum(), len(counts), mean - low, tests=60)


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(0.0, 0.95), instances=st.integers(1, 9), seed=st.integers(0, 2**63), data=st.data())
def test_a_member_by_itself_is_the_member_of_the_set(
    rate: float, instances: int, seed: int, data: st.DataObject
) -> None:
    """In any order, any part of the set, several sets at once, and whatever is hashed at once."""
    every = [(step, n) for step in range(2) for n in range(instances)]
    words = feature_words("m", "A", 70, CPU)
    together = kept(words, seed, "train", every, threshold(rate), instances)
    some = data.draw(st.lists(st.sampled_from(range(len(every))), min_size=1, max_size=5))
    part = kept(words, seed, "train", [every[at] for at in some], threshold(rate), instances)
    assert torch.equal(part, together[some])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.lora_dropout.masks._MOST_WORDS", data.draw(st.integers(1, 100)))
        assert torch.equal(kept(words, seed, "train", every, threshold(rate), instances), together)
        plain = kept(words, seed, "train", every, threshold(rate))
    assert torch.equal(kept(words, seed, "train", every, threshold(rate)), plain)


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(0.0, 1.0, exclude_max=True), seed=st.integers(0, 2**63), step=st.integers(0, 2**40))
def test_a_set_of_one_is_the_plain_mask(rate: float, seed: int, step: int) -> None:
    mask = bits(rate, seed, coordinate=(step, 0), features=500)
    assert torch.equal(bits(rate, seed, coordinate=(step, 0), features=500, balanced=1), mask)


@pytest.mark.parametrize(("rate", "instances"), CASES)
def test_each_member_alone_is_bernoulli_and_its_features_independent(
    mask_seed: int, rate: float, instances: int
) -> None:
    """Within a member: the kept count, neighbours that share a hash word, neighbours that do not: 3 N comparisons."""
    members, q = balanced_set(rate, instances, mask_seed), 1 - rate
    assert_binomial(members.sum(dim=1), FEATURES, q, tests=3)
    assert_binomial((members[:, ::2] & members[:, 1::2]).sum(dim=1), FEATURES // 2, q**2, tests=3)
    assert_binomial((members[:, 1:-1:2] & members[:, 2::2]).sum(dim=1), FEATURES // 2 - 1, q**2, tests=3)


@pytest.mark.parametrize(("rate", "instances"), CASES)
@pytest.mark.parametrize(
    "other",
    [{"side": "B"}, {"module": "n"}, {"prefix": (5,)}, {"prefix": (4, 0)}],
    ids=["side", "module", "step", "longer"],
)
def test_sets_are_independent(mask_seed: int, rate: float, instances: int, other: dict[str, object]) -> None:
    """Every member of one set with every member of the other: N^2 comparisons, and their counts K: one more."""
    one, two = balanced_set(rate, instances, mask_seed), balanced_set(rate, instances, mask_seed, **other)
    both = torch.stack([(member & two).sum(dim=1) for member in one])
    assert_binomial(both, FEATURES, (1 - rate) ** 2, tests=2)
    mean = (1 - rate) * instances
    whole, share = divmod(round(mean, 9), 1)
    ceil = [member_set.sum(dim=0) > whole for member_set in (one, two)]
    assert_binomial((ceil[0] & ceil[1]).sum(), FEATURES, share**2, tests=2)


@pytest.mark.parametrize(("rate", "instances"), [case for case in CASES if case[1] <= 6])
def test_every_choice_of_members_is_equally_likely(mask_seed: int, rate: float, instances: int) -> None:
    """A feature's column of the set: K is floor or ceil of (1-p) N, and all columns with that K are equally likely."""
    members = balanced_set(rate, instances, mask_seed)
    places = 2 ** torch.arange(instances)
    table = torch.bincount((members * places[:, None]).sum(dim=0), minlength=2**instances).double()
    whole, share = divmod(round((1 - rate) * instances, 9), 1)
    chances = {int(whole): 1 - share, int(whole) + 1: share}
    expected = torch.tensor(
        [chances.get(sum(column), 0.0) / math.comb(instances, sum(column)) for column in all_columns(instances)]
    )
    possible = expected > 0
    assert not table[~possible].any()
    assert_multinomial(table[possible], FEATURES * expected[possible].double())


def all_columns(instances: int) -> list[tuple[int, ...]]:
    """All columns of N bits, member 0 the lowest: in the order of the numbers they stand for."""
    return [column[::-1] for column in itertools.product((0, 1), repeat=instances)]


def test_members_of_one_set_are_dependent(mask_seed: int) -> None:
    """The price of balance, and the positive control of every test above: two of 8 members at p = 0.5 keep a feature
    with chance 4/8 * 3/7, not 1/4. The difference is 0.036, or 37 standard deviations."""
    members = balanced_set(0.5, 8, mask_seed)
    both = torch.stack([(members[i] & members[j]).sum() for i, j in itertools.combinations(range(8), 2)])
    assert_binomial(both, FEATURES, 3 / 14)
    with pytest.raises(AssertionError, match="chance"):
        assert_binomial(both, FEATURES, 1 / 4)


def test_the_model_sees_balanced_sets() -> None:
    """Through the handle, at two rates: whatever part of the ensemble is asked for, a feature's count is the set's."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(30, 22), nn.Linear(22, 9)), LoraConfig(r=2, target_modules=["0", "1"])
    )
    dropout = LoraDropout(model, 0.5, seed=5, rate_pattern={"1": 0.2})
    for name, low, high in (("0", 2, 2), ("1", 3, 4)):  # (1-p) 4 is 2 and 3.2
        parts = [dropout.layer_masks("ensemble", [(n,)], balanced=4)[name] for n in range(4)]
        whole = dropout.layer_masks("ensemble", [(n,) for n in range(4)], balanced=4)[name]
        for side in ("kept_in", "kept_out"):
            members = torch.cat([getattr(part, side) for part in parts])
            assert torch.equal(members, getattr(whole, side))
            counts = members.sum(dim=0)
            assert counts.min() >= low and counts.max() <= high


@pytest.mark.parametrize("coordinate", [(3, 4), (3, -1)])
def test_a_member_outside_the_set_is_refused(coordinate: Coordinate) -> None:
    with pytest.raises(ValueError, match="balanced over 4 masks: their last coordinates are 0 to 3"):
        bits(0.5, coordinate=coordinate, features=10, balanced=4)


def test_golden_bits() -> None:
    """Frozen, as those of plain masks: balanced members of a saved adapter are the same models for ever."""
    words = feature_words("model.layers.3.mlp.down_proj", "A", 64, CPU)
    members = kept(words, 42, "ensemble", [(n,) for n in range(4)], threshold(0.4), 4)
    assert [f"{int(''.join(str(int(bit)) for bit in row), 2):016x}" for row in members] == GOLDEN
