"""The masks' distribution: each bit Bernoulli(1-p), and all bits independent.

Seeds are fresh in every run and printed with a failure (``mask_seed`` in conftest.py repeats one). False alarms: at
most 1e-6 per test function, see mask_statistics.py. What an alarm would take: with n pairs of features, a correlation
of about 6 / sqrt(n), which is 1 % for 400,000.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_statistics import CPU, RATES, assert_binomial, assert_multinomial, bits
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import nn

from pipeline.lora_dropout import LoraDropout, folded_alpha, instance_coordinates
from pipeline.lora_dropout.masks import feature_words, kept, threshold


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0.0, 1.0, exclude_max=True),
    seed=st.integers(0, 2**63),
    purpose=st.sampled_from(["train", "ensemble", "noise"]),
    coordinate=st.lists(st.integers(0, 2**62), max_size=3).map(tuple),
    module=st.text(max_size=20),
    side=st.sampled_from("AB"),
)
def test_features_are_kept_with_probability_one_minus_rate(
    rate: float, seed: int, purpose: str, coordinate: tuple[int, ...], module: str, side: str
) -> None:
    """60 comparisons (hypothesis prints its example): 1e-6 / 60 for each."""
    mask = bits(rate, seed, purpose, coordinate, module, side, features=100_000)
    assert_binomial(mask.sum(), 100_000, max(1 - rate, 2**-32), tests=60)


def test_rates_next_to_0_and_1() -> None:
    assert bits(0.0).all() and bits(1e-12).all()
    assert not bits(1 - 1e-12).any()  # kept once in 2**32; a threshold that wraps around would keep all


# What differs between two masks. In the first four the layer has as many inputs as outputs, as has every pair here.
OTHERS = {
    "m_A and m_B": {"side": "B"},
    "another module of the layer": {"module": "model.layers.0.self_attn.k_proj"},
    "the same module of the next layer": {"module": "model.layers.1.self_attn.q_proj"},
    "another side of another layer": {"module": "model.layers.1.self_attn.q_proj", "side": "B"},
    "the next seed": {"seed": 1},
    "the purpose": {"purpose": "ensemble"},
    "the next step": {"coordinate": (4, 1, 0)},
    "the micro-batch or the rank": {"coordinate": (3, 0, 0)},
    "the instance": {"coordinate": (3, 1, 1)},
    "a shorter coordinate": {"coordinate": (3, 1)},
    "coordinates swapped": {"coordinate": (1, 3, 0)},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_masks_that_differ_in_one_part_of_the_key_are_independent(mask_seed: int, other: dict[str, object]) -> None:
    """Both kept, and one of the two: 8 comparisons, 1e-6 / 8 for each."""
    if "seed" in other:
        other = {"seed": mask_seed + 1}
    for rate in RATES:
        one, two = bits(rate, seed=mask_seed), bits(rate, **{"seed": mask_seed, **other})
        assert_binomial((one & two).sum(), len(one), (1 - rate) ** 2, tests=2 * len(RATES))
        assert_binomial((one ^ two).sum(), len(one), 2 * rate * (1 - rate), tests=2 * len(RATES))


def test_ranks_and_instances_of_one_step_draw_independent_masks(mask_seed: int) -> None:
    """2 micro-batches x 2 ranks x 3 instances: 66 pairs."""
    coordinates = [
        coordinate
        for micro_batch in range(2)
        for rank in range(2)
        for coordinate in instance_coordinates(5, micro_batch, rank, ranks=2, instances=3)
    ]
    features = 200_000
    masks = kept(feature_words("m", "A", features, CPU), mask_seed, "train", coordinates, threshold(0.5)).float()
    assert_binomial(pairs(masks @ masks.T), features, 0.25)


def pairs(products: torch.Tensor) -> torch.Tensor:
    """The part of a symmetric matrix above its diagonal."""
    rows, columns = torch.triu_indices(*products.shape, offset=1)
    return products[rows, columns]


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_every_pair_of_consecutive_steps_is_independent(mask_seed: int, rate: float) -> None:
    """192 steps: 18,336 pairs of masks, of which any lag or bit of the counter could be the weak one."""
    features = 2**16
    steps = [(step, 0, 0) for step in range(192)]
    masks = kept(feature_words("m", "B", features, CPU), mask_seed, "train", steps, threshold(rate)).float()
    products = masks @ masks.T  # exact: counts below 2**24
    assert_binomial(pairs(products), features, (1 - rate) ** 2, tests=2)
    lags = torch.stack([products.diagonal(lag)[: 192 - 64].sum() for lag in range(1, 65)])  # pooled: 8 million pairs
    deviation = (128 * features * variance_of_both(1 - rate)) ** 0.5
    limit = stats.norm.isf(1e-6 / 2 / 64 / 2)  # half of the false alarms, 64 lags, two sides
    assert ((lags - 128 * features * (1 - rate) ** 2).abs() <= limit * deviation).all()


def variance_of_both(q: float) -> float:
    """Per pair of neighbours in a chain of independent masks: pairs that share a mask are correlated."""
    return q**2 * (1 - q**2) + 2 * (q**3 - q**4)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_every_pair_of_features_is_independent(mask_seed: int, rate: float) -> None:
    """256 features, in pairs that share a hash word, of two layers and both sides: 32,640 pairs over 40,000 steps."""
    names = [("model.layers.0.q", "A"), ("model.layers.0.q", "B"), ("model.layers.1.q", "A"), ("model.layers.1.q", "B")]
    words = torch.cat([feature_words(name, side, 64, CPU) for name, side in names])
    steps = 40_000
    masks = kept(words, mask_seed, "train", [(step,) for step in range(steps)], threshold(rate)).float()
    products = masks.T @ masks  # (256, 256)
    assert_binomial(pairs(products), steps, (1 - rate) ** 2, tests=4)
    assert_binomial(masks.sum(dim=0), steps, 1 - rate, tests=4)  # each feature is fair
    halves = products.diagonal(1)[::2].sum()  # pooled over the 128 words
    assert_binomial(halves, 128 * steps, (1 - rate) ** 2, tests=4)
    same_index = products.diagonal(128)[:64].sum()  # feature k of m_A in layers 0 and 1
    assert_binomial(same_index, 64 * steps, (1 - rate) ** 2, tests=4)


def test_neighbouring_steps_features_and_sides_are_jointly_independent(mask_seed: int) -> None:
    """12 bits at once: the two halves of a word x m_A, m_B x 3 steps, in 4096 cells. Pairwise independence, which a XOR
    of feature and step would have, is not enough here."""
    features = 2**19
    steps = [(step,) for step in range(3)]
    sides = [kept(feature_words("m", side, features, CPU), mask_seed, "train", steps, threshold(0.5)) for side in "AB"]
    twelve = torch.stack([mask[:, half::2] for mask in sides for half in (0, 1)]).flatten(0, 1)  # (12, features / 2)
    places = 2 ** torch.arange(12)
    cells = torch.bincount((twelve * places[:, None]).sum(dim=0), minlength=4096)
    assert_multinomial(cells, torch.full((4096,), features / 2 / 4096))


@pytest.mark.parametrize("rate", [0.3, 0.5])
def test_counts_of_kept_inputs_and_outputs(mask_seed: int, rate: float) -> None:
    """The table of (kept inputs, kept outputs) of an 8 x 8 layer over 60,000 steps: a product of two binomials. Bits
    that are each fair and pairwise independent may still sum up to the wrong spread, or together over the sides."""
    steps = 60_000
    words = torch.cat([feature_words("m", side, 8, CPU) for side in "AB"])
    masks = kept(words, mask_seed, "train", [(step,) for step in range(steps)], threshold(rate))
    count_in, count_out = masks[:, :8].sum(dim=1), masks[:, 8:].sum(dim=1)
    table = torch.bincount(9 * count_in + count_out, minlength=81).double()
    one = torch.from_numpy(stats.binom.pmf(range(9), 8, 1 - rate))
    expected = steps * torch.outer(one, one).flatten()
    rare = expected < 20  # in one cell together
    assert_multinomial(
        torch.cat([table[~rare], table[rare].sum()[None]]), torch.cat([expected[~rare], expected[rare].sum()[None]])
    )


class OneLayer(nn.Module):
    """A model of one linear layer, float64 so that a mean can be counted."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size_in, size_out, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, in)`` to ``(B, out)``."""
        return self.layer(x)


def deltas(rate: float, rescale: bool, seed: int, masks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The masked updates of a real layer, read off as its output on the unit vectors: ``(masks, out, in)``, then
    ``alpha/r * BA``, then what the layer adds without masks."""
    size_in, size_out, rank, alpha = 13, 10, 3, 6.0
    config = LoraConfig(r=rank, lora_alpha=folded_alpha(alpha, rate, rescale), target_modules=["layer"])
    model = get_peft_model(OneLayer(size_in, size_out), config, autocast_adapter_dtype=False)
    layer = model.base_model.model.layer
    generator = torch.Generator().manual_seed(seed % 2**63)
    for weights in (layer.lora_A, layer.lora_B):  # positive, so that no element of BA is near 0
        weight = weights["default"].weight
        weight.data = torch.rand(weight.shape, dtype=torch.float64, generator=generator) + 0.5
    a, b = (weights["default"].weight.detach() for weights in (layer.lora_A, layer.lora_B))
    unit = torch.eye(size_in, dtype=torch.float64)
    dropout = LoraDropout(model, rate, seed)
    with torch.no_grad():
        frozen = unit @ layer.base_layer.weight.T
        with dropout.masks("train", [(n,) for n in range(masks)]):
            masked = model(unit.repeat(masks, 1)).view(masks, size_in, size_out) - frozen
        return masked.mT, alpha / rank * b @ a, (model(unit) - frozen).T


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("rescale", [True, False])
def test_the_mean_of_the_masked_update(mask_seed: int, rate: float, rescale: bool) -> None:
    """E[B_hat A_hat] = BA with rescale, (1-p)^2 BA without, element by element.

    An element of B_hat A_hat is the one of BA, times the scale, or 0: so the mean of 5000 masks, divided by the
    element, counts the masks that keep its row and its column, which is Binomial(5000, (1-p)^2). 130 comparisons.
    """
    masks, q = 5_000, 1 - rate
    updates, product, deterministic = deltas(rate, rescale, mask_seed, masks)
    mean = product if rescale else q**2 * product
    torch.testing.assert_close(deterministic, mean)  # what stock peft adds is the mean
    counts = updates.mean(dim=0) / mean * q**2 * masks
    torch.testing.assert_close(counts, counts.round(), atol=1e-6, rtol=0)
    assert_binomial(counts.round(), masks, q**2)
    with pytest.raises(AssertionError, match="chance"):  # the test sees the other convention
        assert_binomial((counts * (q**2 if rescale else q**-2)).round().clamp(max=masks), masks, q**2)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_the_sparsity_of_the_product(mask_seed: int, rate: float) -> None:
    """The share of zeros in B_hat A_hat is 2p - p^2 on average.

    One mask's share of kept elements is (inputs kept / in) (outputs kept / out), whose variance follows from two
    binomials. One comparison, the mean of 5000 masks, by its normal tail: 1e-6 is 4.9 standard deviations.
    """
    masks, q = 5_000, 1 - rate
    updates, product, _ = deltas(rate, True, mask_seed, masks)
    size_out, size_in = product.shape
    sparsity = (updates == 0).double().mean(dim=(1, 2))
    square_in, square_out = (q**2 + q * (1 - q) / size for size in (size_in, size_out))
    deviation = ((square_in * square_out - q**4) / masks) ** 0.5
    assert abs(sparsity.mean() - (2 * rate - rate**2)) <= stats.norm.isf(1e-6 / 2) * deviation
