"""Training as a whole: the trainer against trl's own, and every way to run it against the others.

All configurations train in two launches (one process; two ranks), see ``training_worker.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training_jobs import (
    BASES,
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    MORE_RANKS,
    ONE_PROCESS,
    RECIPE,
    RESUMED,
    SAME_FP32,
    SAME_FP32_EXAMPLE,
    SAME_KEYS_EXAMPLE,
    SAME_KEYS_INSTANCE,
    SAME_NF4,
    SAMPLINGS,
    STOCK_ONE,
    STOCK_TWO,
    TEMPLATE,
    TWO_RANKS,
)
from training_support import random_rows, run_worker, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapter.files import load_adapter, read_settings
from pipeline.base import load_base, load_config
from pipeline.preflight.numbers import model_shape, numerics_of
from pipeline.preflight.storage import checkpoint_bytes
from pipeline.recipe import load_recipe

pytestmark = pytest.mark.slow

Records = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_rows(folder / "train.jsonl", random_rows(40, seed=0))
    write_rows(folder / "validation.jsonl", random_rows(7, seed=1))  # odd: ranks and batches do not divide it
    text = RECIPE.format(base=small_base, folder=folder, template=TEMPLATE.replace("\n", "\\n"))
    (folder / "recipe.yaml").write_text(text)
    return folder


def trained(work: Path, jobs: dict[str, tuple[str, tuple[str, ...]]], ranks: int) -> Records:
    folder = work / f"ranks{ranks}"
    folder.mkdir()
    listed = [
        {"name": name, "recipe": str(work / "recipe.yaml"), "overrides": overrides, "trainer": trainer}
        for name, (trainer, overrides) in jobs.items()
    ]
    run_worker(listed, folder, ranks)
    return {name: {**json.loads((folder / f"{name}.json").read_text()), "folder": folder / name} for name in jobs}


@pytest.fixture(scope="module")
def one(work: Path) -> Records:
    """What each configuration of one process measured."""
    return trained(work, ONE_PROCESS, ranks=1)


@pytest.fixture(scope="module")
def two(work: Path, one: Records) -> Records:
    """What each configuration of two ranks measured; some go on from checkpoints of one."""
    return trained(work, TWO_RANKS, ranks=2)


def largest_difference(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second) > 0
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def assert_is_stock(records: Records, base: str, validation: str, stage: int) -> None:
    ours, stock = (records[f"{whose}-{base}-{validation}-zero{stage}"] for whose in ("ours", "stock"))
    assert len(ours["losses"]) == 4
    assert ours["losses"] == stock["losses"]
    assert ours["gradient_norms"] == stock["gradient_norms"]
    assert len(ours["evaluations"]) == (4 if validation == "validated" else 0)  # two datasets, twice
    ours_weights, stock_weights = (load_file(r["folder"] / "adapter_model.safetensors") for r in (ours, stock))
    assert ours_weights.keys() == stock_weights.keys()
    assert all(torch.equal(weight, stock_weights[name]) for name, weight in ours_weights.items())


@pytest.mark.parametrize(("base", "validation", "stage"), STOCK_ONE)
def test_rate_0_is_stock_trl_bit_for_bit_in_one_process(one: Records, base: str, validation: str, stage: int) -> None:
    assert_is_stock(one, base, validation, stage)


@pytest.mark.parametrize(("base", "validation", "stage"), STOCK_TWO)
def test_rate_0_is_stock_trl_bit_for_bit_on_two_ranks(two: Records, base: str, validation: str, stage: int) -> None:
    assert_is_stock(two, base, validation, stage)


@pytest.mark.parametrize("base", BASES)
def test_validation_does_not_move_training(one: Records, two: Records, base: str) -> None:
    for records, stage in ((one, 0), (two, 2)):
        if f"ours-{base}-unvalidated-zero{stage}" in records:
            on, off = (records[f"ours-{base}-{validation}-zero{stage}"] for validation in ("validated", "unvalidated"))
            assert on["losses"] == off["losses"]


@pytest.mark.parametrize(
    ("group", "tolerance"),
    [
        (SAME_FP32, FP32_TOLERANCE),
        (SAME_FP32_EXAMPLE, FP32_TOLERANCE),
        (SAME_NF4, BF16_TOLERANCE),
        (SAME_KEYS_INSTANCE, FP32_TOLERANCE),
        (SAME_KEYS_EXAMPLE, FP32_TOLERANCE),
    ],
    ids=["fp32", "fp32-example", "nf4", "keys-instance", "keys-example"],
)
def test_every_way_to_run_gives_the_same_losses(
    two: Records, group: dict[str, tuple[str, ...]], tolerance: float
) -> None:
    reference, *others = group
    differences = {name: largest_difference(two[name]["losses"], two[reference]["losses"]) for name in others}
    print(differences)
    assert {name: difference for name, difference in differences.items() if difference > tolerance} == {}


def test_the_tolerances_tell_masks_apart(two: Records) -> None:
    assert largest_difference(two["other-rate"]["losses"], two["fp32-zero2-batched"]["losses"]) > 1000 * FP32_TOLERANCE
    assert largest_difference(two["other-rate-nf4"]["losses"], two["nf4-zero2"]["losses"]) > 2 * BF16_TOLERANCE
    assert (
        largest_difference(two["fp32-example-zero2"]["losses"], two["fp32-zero2-batched"]["losses"])
        > 1000 * FP32_TOLERANCE
    )


@pytest.mark.parametrize("sampling", ["instance", "example", "keys"])
def test_accumulation_equals_ranks(one: Records, two: Records, sampling: str) -> None:
    ranks = {"instance": "fp32-zero2-batched", "example": "fp32-example-zero2", "keys": "keys-example"}[sampling]
    difference = largest_difference(one[f"accumulated-{sampling}"]["losses"], two[ranks]["losses"])
    print(difference)
    assert difference <= FP32_TOLERANCE


def test_packed_rows_train_like_padded_ones(one: Records) -> None:
    reference = one["all-padded"]
    for name in ("all-packed", "all-packed-sequential"):
        difference = largest_difference(one[name]["losses"], reference["losses"])
        print(name, difference)
        assert difference <= FP32_TOLERANCE
        assert one[name]["gradient_norms"] == pytest.approx(reference["gradient_norms"], rel=1e-5)
        assert one[name]["tokens"] == reference["tokens"] > 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_resumed_run_draws_what_the_whole_one_would_have(one: Records, sampling: str) -> None:
    """Bit for bit, with a rate that changes, in the second epoch."""
    whole, resumed = one[f"whole-{sampling}"], one[f"resumed-{sampling}"]
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["gradient_norms"] == whole["gradient_norms"][2:]


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_on_two_ranks_goes_on_bit_for_bit(two: Records, kind: str) -> None:
    """In the middle of an epoch, with gradient accumulation: losses, gradient norms and the final adapter."""
    assert_goes_on(two[f"saved-{kind}"], two[f"resumed-{kind}"])


@pytest.mark.parametrize("kind", RESUMED)
def test_checkpoints_of_two_ranks_have_the_forecast_size(two: Records, work: Path, kind: str) -> None:
    """Within 5 %, as launch/check.py says it."""
    recipe = load_recipe(work / "recipe.yaml", RESUMED[kind])
    shape = model_shape(load_config(recipe.base), recipe)
    forecast = checkpoint_bytes(shape, numerics_of(recipe), recipe.distributed.zero, 2)
    checkpoints = sorted((two[f"saved-{kind}"]["folder"].parent / f"run-saved-{kind}").rglob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert forecast == pytest.approx(sum(file.stat().st_size for file in checkpoint.iterdir()), rel=0.05)


def test_the_order_of_grouped_lengths_goes_on(one: Records) -> None:
    assert_goes_on(one["grouped"], one["resumed-grouped"])


def assert_goes_on(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert len(resumed["losses"]) == 3
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["gradient_norms"] == whole["gradient_norms"][3:]
    assert resumed["tokens"] == whole["tokens"]
    first, second = (load_file(record["folder"] / "adapter_model.safetensors") for record in (whole, resumed))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("name", MORE_RANKS)
def test_a_run_goes_on_on_more_ranks(one: Records, two: Records, name: str) -> None:
    difference = largest_difference(two[name]["losses"], one[name]["losses"][3:])
    print(difference)
    assert difference <= FP32_TOLERANCE


def test_checkpoints_hold_safetensors_and_json_only(two: Records, work: Path) -> None:
    found = {file.name for file in (work / "ranks2").rglob("checkpoint-*/*")}
    assert found == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "identity.json",
        "lora_dropout.json",
        "manifest.json",
        "optimizer.safetensors",
        "rng.json",
        "state.json",
        "trainer_state.json",
    }


def test_a_compiled_model_trains_alike(one: Records) -> None:
    difference = largest_difference(one["compiled"]["losses"], one["whole-instance"]["losses"])
    print(difference)
    assert difference <= FP32_TOLERANCE


def test_the_rate_changes_over_the_run(one: Records) -> None:
    """Another rate at the start, the same at the end."""
    changed, reference = (one[name]["gradient_norms"] for name in ("whole-other-rate", "whole-instance"))
    assert abs(changed[0] - reference[0]) > 1e-3


def test_zero_3_shards_adapter_and_base(two: Records) -> None:
    modules = 2 * 3  # two layers, three adapted modules each
    assert two["fp32-zero3-batched"]["adapter_weights_cut"] == 2 * modules
    for name in ("fp32-zero3-batched", "nf4-zero3"):
        share = two[name]["base_bytes_here"] / two[name]["base_bytes_whole"]
        print(name, two[name]["base_bytes_here"], two[name]["base_bytes_whole"])
        assert share == pytest.approx(0.5, rel=0.1)
    assert two["nf4-zero2"]["base_bytes_here"] == two["nf4-zero2"]["base_bytes_whole"]


@pytest.mark.parametrize(("ranks", "name"), [(1, "measured"), (2, "measured"), (2, "measured-zero3")])
def test_measured_losses_are_means_over_tokens(
    one: Records, two: Records, work: Path, small_base: Path, ranks: int, name: str
) -> None:
    """Against a loop over rows without batches; rows that pad the last batch must not count twice."""
    record = {1: one, 2: two}[ranks][name]
    logged = {key: value for line in record["evaluations"] for key, value in line.items() if key.endswith("_loss")}
    assert {line["step"] for line in record["evaluations"]} == {2}
    model = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, record["folder"]).eval()
    held_out = [json.loads(line) for line in (work / "validation.jsonl").read_text().splitlines()]
    assert logged["eval_validation_loss"] == pytest.approx(mean_token_loss(model, small_base, held_out), abs=1e-5)
    train = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    candidates = [mean_token_loss(model, small_base, [row]) for row in train]
    assert min(candidates) <= logged["eval_probe_loss"] <= max(candidates)


def mean_token_loss(model: PeftModel, base: Path, rows: list[dict[str, str]]) -> float:
    """Nats per trained token, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    total, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(f"{row['instruction']} {row['input']}\nAnswer:")["input_ids"]
        ids = tokenizer(f"{row['instruction']} {row['input']}\nAnswer:{row['output']}</s>")["input_ids"][:48]
        start = next(i for i, (a, b) in enumerate(zip([*prompt, None], ids, strict=False)) if a != b)
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(start, len(ids)):
            total -= scores[position - 1, ids[position]].item()
            tokens += 1
    return total / tokens


def test_small_updates_survive_in_float32(one: Records) -> None:
    ours, control = one["small-steps"], one["small-steps-bfloat16"]
    assert ours["adapter_dtypes"] == ["torch.float32"]
    assert control["adapter_dtypes"] == ["torch.bfloat16"]
    print(ours["changed_a"], control["changed_a"])
    assert ours["changed_a"] > 0.95
    assert control["changed_a"] < 0.05


def test_int8_trains(one: Records, two: Records) -> None:
    """As float32 does, to the 8 bits of its weights."""
    assert largest_difference(one["int8"]["losses"][:2], one["measured"]["losses"]) < 0.03
    assert largest_difference(two["int8"]["losses"], two["fp32-zero2-batched"]["losses"]) < 0.03


STOCK_PEFT = """
import sys
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base, out, *adapters = sys.argv[1:]
ids = torch.load(out + "/ids.pt")
for number, adapter in enumerate(adapters):
    four_bit = "nf4" in adapter
    dtype = torch.bfloat16 if four_bit else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quantization if four_bit else None, device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' own switch: the kernel that training used
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        torch.save(model(ids).logits, f"{out}/stock{number}.pt")
assert "pipeline" not in sys.modules
"""


def test_stock_peft_gives_our_logits(one: Records, work: Path, small_base: Path, tmp_path: Path) -> None:
    names = ["measured", "not-rescaled", "nf4-masked"]
    ids = torch.randint(4, 4096, (3, 17), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "stock_peft.py").write_text(STOCK_PEFT)
    folders = [str(one[name]["folder"]) for name in names]
    subprocess.run(
        [sys.executable, str(tmp_path / "stock_peft.py"), str(small_base), str(tmp_path), *folders],
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    for number, name in enumerate(names):
        recipe = load_recipe(work / "recipe.yaml", ONE_PROCESS[name][1])
        model = load_adapter(load_base(recipe.base), one[name]["folder"])
        with torch.no_grad():
            ours = model(ids).logits
            with model.disable_adapter():
                base = model(ids).logits
        stock = torch.load(tmp_path / f"stock{number}.pt")
        assert (ours - base).abs().max() > 0.1
        if name == "nf4-masked":
            assert torch.equal(ours, stock)
        else:
            torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_without_rescale_alpha_is_folded_in_the_file(one: Records) -> None:
    folder = one["not-rescaled"]["folder"]
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 512 * 0.25
    settings = read_settings(folder)
    assert (settings.alpha, settings.rescale, settings.rate) == (512, False, 0.5)
