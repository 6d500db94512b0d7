"""The baselines' members against naive references: noise drawn by hand, adapters loaded one by one by stock peft."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from eval.lm import EnsembleLM
from eval.lm.average import Average
from eval.lm.baselines import (
    AdapterMembers,
    McDropoutMembers,
    MemberNoise,
    adapter_names,
    further_adapters,
    noise_seeds,
)
from eval.lm.decode import EnsembleDecoder
from eval.lm.layout import Request
from eval.lm.score import Scorer
from pipeline.adapter.files import load_adapter
from pipeline.base import load_base
from pipeline.errors import UserError
from pipeline.recipe.schema import Base

RATE = 0.3


def saved_adapter(base: Any, folder: Path, seed: int, config: LoraConfig | None = None) -> Path:
    """A random adapter that changes its base, as peft saves it."""
    torch.manual_seed(seed)
    lora = config or LoraConfig(r=2 + seed % 3, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.08)
    model.save_pretrained(str(folder))
    return folder


@dataclass
class Several:
    """Four saved adapters of different ranks, and the base they belong to, in one storage."""

    settings: Base
    folders: list[Path]
    stock: list[PeftModel] = field(default_factory=list)
    """With one of them each."""

    def model(self, number: int) -> PeftModel:
        """A new one, with one of the adapters."""
        return load_adapter(load_base(self.settings), self.folders[number])


@pytest.fixture(scope="module", params=["none", "nf4"])
def several(request: Any, pocket_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Several:
    folder = tmp_path_factory.mktemp("several")
    dtype = "float32" if request.param == "none" else "bfloat16"
    settings = Base(model=str(pocket_base), quantization=request.param, dtype=dtype)
    plain = load_base(settings.model_copy(update={"quantization": "none"}))
    several = Several(settings, [saved_adapter(plain, folder / str(seed), seed) for seed in range(4)])
    several.stock += [several.model(number) for number in range(4)]
    return several


@pytest.fixture
def noisy(adapted: Any) -> McDropoutMembers:
    return McDropoutMembers(adapted.model, count=3, average="logits", rate=RATE, seed=11)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """``(rows, length)`` of the pocket base's vocabulary."""
    return torch.randint(4, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(members: Any, batch: torch.Tensor, numbers: range) -> torch.Tensor:
    """``(n, B, T, V)`` of one pass."""
    with torch.no_grad(), members.active(numbers):
        return members.model(input_ids=batch.repeat(len(numbers), 1)).logits.unflatten(0, (len(numbers), -1))


def requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, 0, ("t", number, 1)) for number, pair in enumerate(pairs)]


PAIRS = [
    ("The old man", " went home"),
    ("The old man", " sat"),
    ("She", " walked slowly to the river and saw him"),
    ("In the morning the three children asked her for", " a letter"),
]


# Monte Carlo dropout


@pytest.fixture
def drawn(adapted: Any, noisy: McDropoutMembers) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What the noise multiplied each layer's input by, pass by pass: read off by a hook on the layer's A."""
    seen: dict[str, list[torch.Tensor]] = {}
    inputs: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in noisy.layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda _m, given, name=name: inputs.update({name: given[0]})))
        hooks.append(
            layer.lora_A["default"].register_forward_pre_hook(
                lambda _m, given, name=name: seen.setdefault(name, []).append(
                    torch.where(inputs[name] == 0, torch.nan, given[0] / inputs[name])
                )
            )
        )
    yield seen
    for hook in hooks:
        hook.remove()


def test_noise_is_peft_s_dropout_on_the_input_of_a_and_nothing_else(
    adapted: Any, noisy: McDropoutMembers, drawn: dict[str, list[torch.Tensor]]
) -> None:
    """Every layer: 0 with probability p, else 1/(1-p); fresh for each token, feature, layer and member."""
    batch = tokens(2, 40)
    logits(noisy, batch, range(3))
    assert drawn.keys() == noisy.layers.keys() and len(drawn) > 10
    for name, (factors,) in drawn.items():
        known = factors[~factors.isnan()]
        kept = known != 0
        torch.testing.assert_close(known[kept], torch.full_like(known[kept], 1 / (1 - RATE)), atol=1e-5, rtol=1e-5)
        share, sigma = kept.float().mean().item(), (RATE * (1 - RATE) / known.numel()) ** 0.5
        assert share == pytest.approx(1 - RATE, abs=5 * sigma), name
        assert (factors.nan_to_num().std(dim=1) > 0).float().mean() > 0.99, f"{name}: the same noise at every token"
        members = factors.nan_to_num().unflatten(0, (3, 2))
        assert not torch.equal(members[0], members[1])


def noisy_logits(model: PeftModel, members: McDropoutMembers, batch: torch.Tensor) -> torch.Tensor:
    """``(N, B, T, V)``: a pass of stock peft for each member, its own dropout on, seeded as the member is."""
    plain = copy.deepcopy(model)
    for layer in McDropoutMembers(plain, 1, "logits", RATE, 0).layers.values():
        layer.lora_dropout["default"] = nn.Dropout(members.rate).train()
    found = []
    for member_seed in noise_seeds(members.seed, range(members.count), 0, batch):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(member_seed)
            found.append(plain(input_ids=batch).logits)
    return torch.stack(found)


def test_noise_is_that_of_peft_s_own_dropout_layers(adapted: Any, noisy: McDropoutMembers) -> None:
    batch = tokens(2, 12)
    found, expected = logits(noisy, batch, range(3)), noisy_logits(adapted.model, noisy, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_noise_depends_on_seed_member_and_pass_alone(adapted: Any, noisy: McDropoutMembers) -> None:
    """Not on what ran before, nor on chunks of members; and the global stream stays where it was."""
    batch, other = tokens(2, 12), tokens(3, 9, seed=1)
    before = torch.random.get_rng_state()
    whole = logits(noisy, batch, range(3))
    with torch.no_grad(), noisy.active(range(1, 3)):
        adapted.model(input_ids=other.repeat(2, 1))
        chunk = adapted.model(input_ids=batch.repeat(2, 1)).logits.unflatten(0, (2, 2))
    torch.testing.assert_close(chunk, whole[1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(before, torch.random.get_rng_state())
    reseeded = replace(noisy, seed=12)
    assert (logits(reseeded, batch, range(3)) - whole).abs().max() > 0.01


def test_without_noise_it_is_the_adapter(adapted: Any, noisy: McDropoutMembers) -> None:
    batch = tokens(2, 12)
    with torch.no_grad():
        adapter = adapted.model(input_ids=batch).logits
    almost_none = logits(replace(noisy, rate=1e-7), batch, range(3))
    torch.testing.assert_close(almost_none, adapter.expand_as(almost_none), atol=1e-5, rtol=1e-5)


def test_only_the_dropout_of_the_adapter_is_on_and_only_inside(several: Several) -> None:
    """No layer of bitsandbytes is ever in train mode, in which it would compute otherwise."""
    model, batch = several.model(0), tokens(1, 8)
    members = McDropoutMembers(model, 2, "logits", RATE, 0)
    with torch.no_grad():
        before = model(input_ids=batch).logits
    with members.active(range(2)):
        training = {type(module) for module in model.modules() if module.training}
    assert training == {MemberNoise}
    logits(members, batch, range(2))
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch).logits, before)
    assert not any(isinstance(module, MemberNoise) or module.training for module in model.modules())


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_scores_of_noisy_members_are_averaged_by_the_key(adapted: Any, noisy: McDropoutMembers, average: Any) -> None:
    """Mode exact with one request a batch, whose tokens are known: against stock passes averaged by hand."""
    members = replace(noisy, average=average)
    lm = EnsembleLM(adapted.model, adapted.tokenizer, batch_size=1, members=members)
    found = lm.loglikelihood(requests(PAIRS), disable_tqdm=True)
    for (context, continuation), (score, _) in zip(PAIRS, found, strict=True):
        expected = by_hand(partial(noisy_logits, adapted.model, members), adapted, context, continuation, average)
        assert score == pytest.approx(expected, abs=1e-5 * (1 + abs(expected)))


def by_hand(passes: Any, adapted: Any, context: str, continuation: str, average: str) -> float:
    """Log-likelihood of a continuation under the average of ``passes(ids)``, ``(N, 1, T, V)``."""
    prompt = adapted.tokenizer(context)["input_ids"]
    ids = adapted.tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    members = passes(ids[:, :-1])[:, 0].float()  # (N, T, V)
    scores = members.mean(0) if average == "logits" else members.softmax(-1).mean(0).log()
    return float(scores.log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())


def test_what_was_finished_does_not_change_the_noise_of_the_rest(adapted: Any, noisy: McDropoutMembers) -> None:
    """Mode fast, several batches and kept beginnings: batches that an ended evaluation left are as they would be."""
    beginning = tuple(tokens(1, 40, seed=5)[0].tolist())
    asked = [
        Request((*(beginning if number % 2 else ()), *row[:6].tolist()), tuple(row[6:].tolist()))
        for number, row in enumerate(tokens(24, 9))
    ]
    scorer = Scorer(adapted.model, noisy, tokens_per_pass=100)
    batches = list(scorer.scores(asked))
    assert len(batches) > 3
    whole = {index: scored for batch in batches for index, scored in batch.items()}
    finished = frozenset(index for batch in batches[::2] for index in batch)
    rest = {i: s for batch in Scorer(adapted.model, noisy, 100).scores(asked, finished) for i, s in batch.items()}
    assert rest == {index: scored for index, scored in whole.items() if index not in finished}


def test_generation_with_noise_repeats_itself_whatever_the_chunks(adapted: Any, noisy: McDropoutMembers) -> None:
    prompt = tokens(2, 6)

    def written(members: McDropoutMembers) -> list[list[int]]:
        with torch.no_grad():
            found = adapted.model.generate(
                input_ids=prompt, custom_generate=EnsembleDecoder(members), max_new_tokens=8, do_sample=False
            )
        return found[:, 6:].tolist()

    first = written(noisy)
    assert first == written(noisy) == written(replace(noisy, rows_per_pass=2))
    assert any(first != written(replace(noisy, seed=seed)) for seed in range(4))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "whose layers (Embedding) have no dropout on their input"),
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "its layers are of the variant DoraLinearVariant"),
    ],
)
def test_an_adapter_that_takes_no_noise_is_refused(pocket_base: Path, config: LoraConfig, reason: str) -> None:
    base = load_base(Base(model=str(pocket_base), quantization="none", dtype="float32"))
    model = get_peft_model(base, config)
    with pytest.raises(UserError, match=re.escape(reason)):
        McDropoutMembers(model, 2, "logits", RATE, 0).layers  # noqa: B018


ADALORA = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules="all-linear", task_type="CAUSAL_LM")


def test_adalora_has_noise_too(pocket_base: Path, tmp_path: Path) -> None:
    """Its model calls the base past the base's hooks."""
    base, batch = load_base(Base(model=str(pocket_base), quantization="none", dtype="float32")), tokens(2, 12)
    model = load_adapter(copy.deepcopy(base), saved_adapter(base, tmp_path / "a", 0, ADALORA))
    members = McDropoutMembers(model, 2, "logits", RATE, 3)
    found, expected = logits(members, batch, range(2)), noisy_logits(model, members, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


# Deep ensembles

TOLERANCE = {"none": 1e-5, "nf4": 2e-2}
"""Of logits near 2. nf4 computes in bfloat16, whose sums may depend on how many rows there are; seen on a CPU: 0."""


@contextmanager
def deep(several: Several, average: Average = "logits") -> Iterator[AdapterMembers]:
    model = several.model(0)
    with further_adapters(model, several.folders[1:]):
        yield AdapterMembers(model, adapter_names(model, 3), average)


def test_each_part_of_a_batch_is_the_stock_model_of_its_adapter(several: Several) -> None:
    batch = tokens(2, 12)
    with deep(several) as members:
        assert members.count == 4 and members.most_per_pass is None
        found = logits(members, batch, range(4))
        chunk = logits(members, batch, range(1, 3))
        alone = logits(members, batch, range(3, 4))
    tolerance = TOLERANCE[several.settings.quantization]
    for number in range(4):
        with torch.no_grad():
            expected = several.stock[number](input_ids=batch).logits
        torch.testing.assert_close(found[number], expected, atol=tolerance, rtol=tolerance)
        if number in (1, 2):
            torch.testing.assert_close(chunk[number - 1], expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(alone[0], expected, atol=tolerance, rtol=tolerance)
    assert (found[0] - found[1]).abs().max() > 20 * tolerance, "the adapters differ by far more"


@pytest.mark.parametrize(("mode", "average"), [("exact", "logits"), ("fast", "logits"), ("fast", "probabilities")])
def test_a_deep_ensemble_is_its_stock_models_averaged_by_hand(
    several: Several, adapted: Any, average: Any, mode: Any
) -> None:
    relative = {"none": 1e-5, "nf4": 1e-2}[several.settings.quantization]

    def stock(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([model(input_ids=ids).logits for model in several.stock])

    with deep(several, average) as members:
        lm = EnsembleLM(members.model, adapted.tokenizer, batch_size=3, members=members, mode=mode)
        found = lm.loglikelihood(requests(PAIRS), disable_tqdm=True)
    for (context, continuation), (score, _) in zip(PAIRS, found, strict=True):
        expected = by_hand(stock, adapted, context, continuation, average)
        assert score == pytest.approx(expected, abs=relative * (1 + abs(expected)))


def test_a_deep_ensemble_writes_what_its_stock_models_write_together(several: Several) -> None:
    """Greedy, against full passes over the whole sequence at every step; chunked members write the same."""
    if several.settings.quantization == "nf4":
        pytest.skip("bfloat16 has ties")
    sequence, written = tokens(2, 6), []
    with deep(several) as members, torch.no_grad():
        for rows in (None, 2, 1):
            decoder = EnsembleDecoder(replace(members, rows_per_pass=rows))
            written.append(
                members.model.generate(
                    input_ids=sequence, custom_generate=decoder, max_new_tokens=7, do_sample=False, eos_token_id=None
                )
            )
    with torch.no_grad():
        for _ in range(7):
            mean = torch.stack([model(input_ids=sequence).logits[:, -1] for model in several.stock]).mean(0)
            sequence = torch.cat([sequence, mean.argmax(-1)[:, None]], dim=1)
    assert all(torch.equal(found, sequence) for found in written)


def test_the_model_is_left_as_it_was(several: Several) -> None:
    model, batch = several.model(0), tokens(2, 8)
    with torch.no_grad():
        before = model(input_ids=batch).logits
    with further_adapters(model, several.folders[1:]):
        members = AdapterMembers(model, adapter_names(model, 3), "logits")
        for numbers in (range(4), range(2, 3)):
            logits(members, batch, numbers)
        with torch.no_grad():
            assert torch.equal(model(input_ids=batch).logits, before), "between passes the first adapter answers"
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch).logits, before)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert not any(parameter.requires_grad or "member-" in name for name, parameter in model.named_parameters())


def test_layers_that_cannot_tell_rows_apart_run_one_member_at_a_time(pocket_base: Path, tmp_path: Path) -> None:
    settings = Base(model=str(pocket_base), quantization="none", dtype="float32")
    plain, batch = load_base(settings), tokens(2, 8)
    folders = [saved_adapter(plain, tmp_path / str(seed), seed, ADALORA) for seed in range(2)]
    model = load_adapter(load_base(settings), folders[0])
    with further_adapters(model, folders[1:]):
        members = AdapterMembers(model, adapter_names(model, 1), "logits")
        assert members.most_per_pass == 1
        found = torch.cat([logits(members, batch, range(number, number + 1)) for number in range(2)])
    for number, folder in enumerate(folders):
        with torch.no_grad():
            expected = load_adapter(load_base(settings), folder)(input_ids=batch).logits
        torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01
