"""What an ensemble costs in evaluation, and what shared tokens save: ratios measured side by side in one run.

Three kinds of work on one random base with a random adapter, in tokens drawn at random:

- ``few-shot``: questions of two subjects, each after the subject's examples, with four choices of one token (MMLU)
- ``choices``: questions without examples, with four choices of several tokens (ARC)
- ``decoding``: one prompt, a fixed number of new tokens, batch 1

by stock lm-eval (transformers' own ``generate`` in decoding), by ours with one model, by ours with N members, and by N
separate passes of stock code, one for each member.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.lm import EnsembleLM
from eval.lm.decode import EnsembleDecoder
from eval.lm.members import MaskedMembers
from eval.logs import quiet
from pipeline.base import default_device
from pipeline.benchmark.measure import Interval, interleaved, mark
from pipeline.benchmark.random_base import plain_tokenizer, random_base
from pipeline.benchmark.run import processor
from pipeline.benchmark.shapes import shape_config
from pipeline.benchmark.show import duration
from pipeline.benchmark.statistics import Timing, interval_name, timing
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.process.environment import keep_freed_memory
from pipeline.process.rank import launched
from pipeline.recipe import Recipe
from pipeline.redaction import command_line
from pipeline.run.provenance import git_state, now, versions

STOCK = "stock lm-eval, one model"
SCHEMA = 1
"""Of the JSON file."""


@dataclass(frozen=True)
class Work:
    """Sizes, in tokens and numbers."""

    examples: int = 500
    """Tokens of a subject's examples."""
    question: int = 60
    """Tokens of a question, on average."""
    questions: int = 8
    """Of each of two subjects."""
    choice: int = 6
    """Most tokens of a choice in ``choices``."""
    new: int = 32
    """Generated tokens."""

    def scaled(self, tokens: int | None) -> Work:
        """With examples of another length."""
        return self if tokens is None else Work(examples=tokens)


@dataclass(frozen=True)
class Line:
    """One way to do one kind of work."""

    work: str
    way: str
    timing: Timing
    """Its ratios are to stock lm-eval with one model."""
    against_separate: Timing | None
    """Of N members: its ratios are to N separate passes."""


@dataclass(frozen=True)
class Subject:
    """Something to time, see :func:`pipeline.benchmark.measure.interleaved`."""

    work: Callable[[], object]
    device: torch.device

    def run(self) -> Mapping[str, list[Interval]]:
        """The work, once."""
        start = mark(self.device)
        with torch.no_grad():
            self.work()
        return {"all": [(start, mark(self.device))]}

    def own_bytes(self) -> int:
        """Not measured here."""
        return 0


def benchmark(
    recipe: Recipe,
    shape: str,
    layers: int | None,
    tokens: int | None,
    rounds: int,
    warmup: int,
    seed: int,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that is measured, for the table and the JSON file.

    Args:
        recipe: base storage, adapter and ensemble.
        shape: of the random base, see :mod:`pipeline.benchmark.shapes`.
        layers: where its depth is cut.
        tokens: of a subject's examples.
        rounds: that count; each runs every way once, in random order.
        warmup: rounds that do not count.
        seed: of weights, tokens and order.
        announce: told what happens.

    Raises:
        UserError: started through a launcher; an unknown shape.
    """
    if launched():
        raise UserError("launch/benchmark.py times one process: start it with `python`, not through a launcher")
    device = default_device()
    if device.type == "cpu":
        keep_freed_memory()  # as training and evaluation do
    announce("building the base")
    config = shape_config(shape, layers)
    model = random_adapter(random_base(config, recipe.base, device, seed), recipe, seed)
    work = Work().scaled(tokens)
    all_ways = ways(model, recipe, work, seed)
    subjects = {" ".join(key): Subject(run, device) for key, run in all_ways.items()}
    samples = interleaved(
        subjects, device, rounds, warmup, seed, lambda number: announce(f"round {number} of {rounds}")
    )
    seconds = {key: samples[" ".join(key)]["all"] for key in all_ways}
    count = recipe.eval.ensemble.instances
    lines = []
    for kind, way in seconds:
        separate = seconds[kind, f"{count} separate passes"]
        ours = way == f"ours, {count} members"
        lines.append(
            Line(
                kind,
                way,
                timing(seconds[kind, way], seconds[kind, STOCK], seed),
                timing(seconds[kind, way], separate, seed) if ours else None,
            )
        )
    return {
        "schema": SCHEMA,
        "ratio_interval_is": interval_name(rounds),
        "conditions": {
            "model": shape,
            "layers": config.num_hidden_layers,
            "quantization": recipe.base.quantization,
            "dtype": recipe.base.dtype,
            "rank": recipe.adapter.rank,
            "members": count,
            "average": recipe.eval.ensemble.average,
            "work": asdict(work),
            "rounds": rounds,
            "seed": seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "git": git_state(),
            "command": command_line(sys.argv),
            "finished": now(),
        },
        "lines": [asdict(line) for line in lines],
    }


def random_adapter(base: Any, recipe: Recipe, seed: int) -> PeftModel:
    """The base with an adapter whose B is not zero, in eval mode."""
    settings = LoraConfig(
        r=recipe.adapter.rank,
        lora_alpha=int(recipe.adapter.alpha),
        target_modules=recipe.adapter.target_modules,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings).eval().requires_grad_(False)
    draw = torch.Generator(model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=draw)
    return model


def ways(model: PeftModel, recipe: Recipe, work: Work, seed: int) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed: by kind of work and way to do it."""
    ensemble = recipe.eval.ensemble
    dropout = LoraDropout(model, recipe.adapter.dropout.rate or 0.5, recipe.seed)
    masks = MaskedMembers(dropout, ensemble)
    tokenizer = plain_tokenizer(model.config.vocab_size)
    batch_size = 8 if recipe.eval.batch_size == "auto" else recipe.eval.batch_size
    with quiet("lm_eval.models.huggingface"):
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    one = EnsembleLM(model, tokenizer, batch_size=batch_size, mode="fast")
    many = EnsembleLM(model, tokenizer, batch_size=batch_size, mode="fast", members=masks)
    draw = random.Random(seed)
    vocabulary = model.config.vocab_size
    prompt = torch.tensor([_tokens(draw, work.question, vocabulary)], device=model.device)
    length = {"min_new_tokens": work.new, "max_new_tokens": work.new, "do_sample": False, "pad_token_id": 0}

    def separate(run: Callable[[], object]) -> Callable[[], object]:
        def passes() -> None:
            for number in range(ensemble.instances):
                with masks.active(range(number, number + 1)):
                    run()

        return passes

    found: dict[tuple[str, str], Callable[[], object]] = {}
    separately = f"{ensemble.instances} separate passes"
    together = f"ours, {ensemble.instances} members"
    for kind, requests in (
        ("few-shot", few_shot_requests(draw, work, vocabulary)),
        ("choices", choice_requests(draw, work, vocabulary)),
    ):

        def scores(lm: HFLM, requests: Sequence[Any] = requests) -> Callable[[], object]:
            return lambda: lm._loglikelihood_tokens(list(requests), disable_tqdm=True)

        found[kind, STOCK] = scores(stock)
        found[kind, "ours, one model"] = scores(one)
        found[kind, together] = scores(many)
        found[kind, separately] = separate(scores(stock))

    def generated(**arguments: Any) -> object:
        return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **length, **arguments)

    found["decoding", STOCK] = generated
    found["decoding", "ours, one model"] = lambda: generated(custom_generate=EnsembleDecoder(one.members))
    found["decoding", together] = lambda: generated(custom_generate=EnsembleDecoder(masks))
    found["decoding", separately] = separate(generated)
    return found


def few_shot_requests(draw: random.Random, work: Work, vocabulary: int) -> list[tuple[None, list[int], list[int]]]:
    """Two subjects' questions after the subject's examples, four choices of one token each."""
    requests = []
    for _ in range(2):
        examples = _tokens(draw, work.examples, vocabulary)
        for _ in range(work.questions):
            context = examples + _tokens(draw, _around(draw, work.question), vocabulary)
            requests += [(None, context, [letter]) for letter in draw.sample(range(3, vocabulary), 4)]
    return requests


def choice_requests(draw: random.Random, work: Work, vocabulary: int) -> list[tuple[None, list[int], list[int]]]:
    """Questions with four choices of several tokens each."""
    requests = []
    for _ in range(2 * work.questions):
        context = _tokens(draw, _around(draw, work.question), vocabulary)
        requests += [(None, context, _tokens(draw, draw.randint(1, work.choice), vocabulary)) for _ in range(4)]
    return requests


def _tokens(draw: random.Random, count: int, vocabulary: int) -> list[int]:
    return [draw.randrange(3, vocabulary) for _ in range(count)]


def _around(draw: random.Random, mean: int) -> int:
    """Half to one and a half times."""
    return draw.randint(max(1, mean // 2), max(1, 3 * mean // 2))


def table(result: Mapping[str, Any]) -> Iterator[Text | Table]:
    """For the terminal: what was measured, and a row for each way."""
    found = result["conditions"]
    work = found["work"]
    yield Text(
        f"{found['model']}, {found['layers']} layers, {found['quantization']} base, {found['dtype']}, rank "
        f"{found['rank']}, {found['members']} members; examples of {work['examples']} tokens, questions of about "
        f"{work['question']}\n{found['device']}, {found['threads']} threads; {found['rounds']} interleaved rounds, "
        f"medians, {result['ratio_interval_is']} over rounds"
    )
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("work", "way"):
        grid.add_column(name, no_wrap=True)
    for name in ("time", "against stock, one model", f"against {found['members']} separate passes"):
        grid.add_column(name, justify="right", no_wrap=True)
    for line in result["lines"]:
        ratios = [_ratio(line["timing"]), _ratio(line["against_separate"]) if line["against_separate"] else ""]
        grid.add_row(line["work"], line["way"], duration(line["timing"]["median"]), *ratios)
    yield grid


def _ratio(found: Mapping[str, Any]) -> Text:
    low, high = found["ratio_interval"]
    return Text(f"{found['ratio']:.2f}", style="bold") + Text(f" {low:.2f} to {high:.2f}", style="dim")


def print_result(result: Mapping[str, Any]) -> None:
    """On standard output, in full width."""
    Console(width=max(Console().width, 150), soft_wrap=True).print(*table(result), sep="\n")
