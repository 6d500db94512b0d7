"""Variance components of the gradient: unbiased on grids with known ones, and the formulas against simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from pipeline.noise.components import (
    AdapterGradient,
    Components,
    Draw,
    Setting,
    averaged,
    break_even,
    break_even_interval,
    components,
    grid_components,
    measured,
    predicted,
    variance,
)

DIMENSIONS = 40
TRUE = Components(examples=40 * 1.5**2, masks=40 * 0.7**2, interaction=40 * 2.0**2)
"""Sums over coordinates of the synthetic model's components, whose standard deviations are 1.5, 0.7 and 2."""


class SyntheticGradient:
    """``G + a(x) + b(m) + c(x, m)`` with independent normal parts of known variances, one for each x, m and pair."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.known: dict[tuple[object, ...], torch.Tensor] = {}

    def part(self, *key: object) -> torch.Tensor:
        if key not in self.known:
            self.known[key] = torch.randn(DIMENSIONS, generator=self.generator)
        return self.known[key]

    def __call__(self, draw: Draw) -> torch.Tensor:
        groups = len(draw.masks) // draw.copies
        total = torch.zeros(DIMENSIONS)
        for copy in range(draw.copies):
            for place, row in enumerate(draw.rows):
                mask = (draw.purpose, draw.masks[copy * groups + place * groups // len(draw.rows)])
                total += 3.0 + 1.5 * self.part("a", row) + 0.7 * self.part("b", mask) + 2.0 * self.part("c", row, mask)
        return total / (len(draw.rows) * draw.copies)


def fresh_rows() -> object:
    """Examples that never repeat: an infinite population."""
    taken = 0

    def draw(count: int) -> Sequence[int]:
        nonlocal taken
        taken += count
        return range(taken - count, taken)

    return draw


def test_components_are_unbiased_with_honest_intervals() -> None:
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    grids = list(grid_components(SyntheticGradient(seed), fresh_rows(), grids=200, examples=4, masks=5))
    for name, estimates in zip(("V_x", "V_m", "V_xm"), zip(*(g.values() for g in grids), strict=True), strict=True):
        found = averaged(estimates)
        true = dict(zip(("V_x", "V_m", "V_xm"), TRUE.values(), strict=True))[name]
        # 6 standard errors: a false alarm in 1e8 runs
        assert abs(found.value - true) < 6 * found.error, f"{name}: {found} for {true}"
        assert found.error < 0.2 * true, f"{name}: too uncertain for this test to mean anything: {found}"


@pytest.mark.parametrize(
    "setting",
    [
        *(Setting("instance", instances, 3) for instances in (1, 2, 4, 8)),
        *(Setting("example", draws, 3) for draws in (1, 4)),
    ],
    ids=lambda setting: setting.name,
)
def test_formulas_against_simulation(setting: Setting) -> None:
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    found = measured(SyntheticGradient(seed), fresh_rows(), setting, repeats=300)
    expected = predicted(TRUE, setting)
    assert expected is not None
    assert abs(found.value - expected) < 6 * found.error, f"measured {found}, predicted {expected}"
    assert found.error < 0.1 * expected


def test_formulas_by_hand() -> None:
    parts = Components(examples=8.0, masks=3.0, interaction=5.0)
    assert predicted(parts, Setting("instance", 4, 2)) == 8 / 2 + 3 / 4 + 5 / 8
    assert predicted(parts, Setting("instance", 4, 2), micro_batches=2) == 8 / 2 + 3 / 8 + 5 / 8
    assert predicted(parts, Setting("example", 4, 2)) == 8 / 2 + (3 + 5) / 8
    assert predicted(parts, Setting("balanced", 4, 2)) is None
    even = break_even(parts, 4)
    assert even == 4 + 3 * 5 / 3
    one = predicted(parts, Setting("example", 1, 9))
    assert one == pytest.approx(predicted(parts, Setting("instance", 4, 9)))
    assert even == 9
    assert break_even(Components(1.0, -0.1, 2.0), 4) == math.inf


def test_break_even_interval_holds_the_truth() -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    parts = torch.tensor([8.0, 3.0, 5.0]) + 0.3 * torch.randn(12, 3, generator=generator)
    low, high = break_even_interval([Components(*grid) for grid in parts.tolist()], 4)
    assert 4 < low < 9.5 and 8.5 < high < 20, (low, high)  # the truth is 9, the error of V_m and V_xm 0.09
    drowned = [Components(8.0, masks, 5.0) for masks in (-2.0, 2.0, -1.0, 1.5)]
    assert break_even_interval(drowned, 4)[1] == math.inf


def test_jackknife_is_the_leave_one_out_one() -> None:
    gradients = torch.randn(7, 5, dtype=torch.float64)
    found = variance(gradients)
    assert found.value == pytest.approx(float(gradients.var(dim=0).sum()))
    without = torch.stack([gradients[[i for i in range(7) if i != left]].var(dim=0).sum() for left in range(7)])
    assert found.error == pytest.approx(float(((without - without.mean()).square().sum() * 6 / 7).sqrt()))


def test_a_grid_needs_two_of_each() -> None:
    with pytest.raises(ValueError, match="at least two examples and two masks"):
        components(iter([torch.ones(3, 2)]))
    with pytest.raises(ValueError, match="at least two independent estimates"):
        averaged([1.0])


def tiny_model(seed: int) -> AdapterGradient:
    """A LLaMA of two thousand parameters with a trained-looking adapter, and four rows of random tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.lora_dropout import LoraDropout

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    tokens = torch.randint(1, 16, (4, 6))
    return AdapterGradient(
        model.eval(),
        LoraDropout(model, 0.5, seed=seed),
        lambda rows: {"input_ids": tokens[list(rows)], "labels": tokens[list(rows)]},
        mean_trained_tokens=5.0,
    )


def test_gradient_is_the_mean_over_examples_and_copies() -> None:
    gradient = tiny_model(int(torch.randint(2**31, ())))
    instance = Setting("instance", 2, 3).drawn([0, 2, 1], repeat=5)
    each = [gradient(Draw([row], [mask], 1, instance.purpose)) for mask in instance.masks for row in instance.rows]
    assert_equal_gradients(gradient(instance), torch.stack(each).mean(dim=0))
    example = Setting("example", 2, 3).drawn([0, 2, 1], repeat=5)
    rows = [*example.rows, *example.rows]
    each = [gradient(Draw([row], [mask], 1, example.purpose)) for row, mask in zip(rows, example.masks, strict=True)]
    assert_equal_gradients(gradient(example), torch.stack(each).mean(dim=0))


def assert_equal_gradients(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative to the largest element: small ones are differences of large ones. Of 250 models the worst took 3e-5."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_predictions_hold_on_a_real_network() -> None:
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    gradient = tiny_model(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw_rows(count: int) -> Sequence[int]:
        return torch.randint(4, (count,), generator=generator).tolist()

    grids = list(grid_components(gradient, draw_rows, grids=40, examples=3, masks=3))
    for setting in (Setting("instance", 2, 4), Setting("example", 1, 4)):
        guesses = [predicted(grid, setting) for grid in grids]
        expected = averaged([guess for guess in guesses if guess is not None])
        found = measured(gradient, draw_rows, setting, repeats=60)
        error = math.hypot(found.error, expected.error)
        assert abs(found.value - expected.value) < 6 * error, f"{setting}: measured {found}, predicted {expected}"
