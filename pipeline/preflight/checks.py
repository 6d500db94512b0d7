"""Everything that can be said of a run before it starts, without loading a weight."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import dataclass, field

import datasets
import torch
import transformers

from pipeline.base import check_device, check_length, load_config, load_tokenizer
from pipeline.checkpoint.files import SPARE_BYTES
from pipeline.data import LabelStatistics, label_statistics, tokenise
from pipeline.data.load import load_rows, read_raw
from pipeline.data.packing import packed_rows
from pipeline.data.tokenise import IGNORED
from pipeline.errors import UserError
from pipeline.preflight.estimate import PLAIN, Batch, ModelShape, RankMemory, in_words
from pipeline.preflight.execution import Choice, check_shared_weight, chosen_execution, device_memory
from pipeline.preflight.numbers import batch_of, memory_by_stage, model_shape, numerics_of
from pipeline.preflight.storage import checkpoint_bytes, checkpoints_on_disk
from pipeline.preflight.traffic import step_traffic, stored_tensors
from pipeline.recipe import Recipe, schema
from pipeline.recipe.training import resolved_training
from pipeline.run.folder import check_run_folder, run_folder


@dataclass(frozen=True)
class Sample:
    """The first rows of the training data."""

    tokenised: datasets.Dataset
    """Columns ``input_ids``, ``labels``, ``truncated``, ``row``."""
    statistics: LabelStatistics
    """Of them."""
    training_rows: int
    """Of all the training data, after the split."""
    packed_rows: int
    """About how many rows they are packed into; as many, where the recipe does not pack."""
    validation_rows: int
    """0 where the recipe measures none."""


@dataclass(frozen=True)
class Disk:
    """Forecast for the run's folder."""

    checkpoint: int
    """Bytes of one, under a launcher."""
    plain_checkpoint: int
    """The same under plain ``python``."""
    checkpoints: int
    """Most at once."""
    newest: int | None
    """Of them, how many of the newest stay; None, all."""
    best: bool
    """Whether the best one stays besides."""
    adapter: int
    """Bytes of the finished adapter, under a launcher."""
    plain_adapter: int
    """The same under plain ``python``, which keeps it in float32."""
    free: int
    """Bytes free where the run's folder will be."""

    @property
    def needed(self) -> int:
        """Bytes at the fullest, with what is left free of it."""
        return self.checkpoint * self.checkpoints + self.adapter + SPARE_BYTES


@dataclass
class Findings:
    """What was found; ``errors`` are what would stop or spoil the run."""

    recipe: Recipe
    tokenizer: transformers.PreTrainedTokenizerBase
    shape: ModelShape | None = None
    choice: Choice | None = None
    """How mask instances run, on a device like this machine's."""
    sample: Sample | None = None
    batch: Batch | None = None
    memory: dict[int | None, RankMemory] = field(default_factory=dict)
    sent: dict[int, float] = field(default_factory=dict)
    """Bytes that each process sends in an optimizer step, by ZeRO stage; empty for a single process."""
    disk: Disk | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine(recipe: Recipe, rows: int, processes: int) -> Findings:
    """Look at base, data, batch, memory and disk, as far as each can be looked at.

    Args:
        recipe: resolved.
        rows: of the training data to tokenise.
        processes: that training will be launched with.

    Raises:
        UserError: the base or its tokenizer cannot be had, without which nothing else can be said.
    """
    config = load_config(recipe.base, recipe.distributed.zero)
    findings = Findings(recipe, load_tokenizer(recipe.base))
    _look_at_machine(findings, config)
    try:
        findings.shape = model_shape(config, recipe)
    except UserError as error:
        findings.errors.append(str(error))
    try:
        findings.sample = first_rows(recipe, findings.tokenizer, rows)
    except UserError as error:
        findings.errors.append(str(error))
    if findings.sample is not None:
        _judge_labels(findings, findings.sample)
    mean_length = _mean_length(findings)
    if findings.shape is not None:
        _choose_execution(findings, findings.shape, processes, mean_length)
    execution = findings.choice.execution if findings.choice else "batched"
    if findings.sample is not None:
        findings.batch = batch_of(recipe, findings.sample.packed_rows, processes, execution)
    if findings.shape is not None:
        findings.memory = memory_by_stage(recipe, findings.shape, processes, execution, mean_length)
    if findings.shape is not None and processes > 1:
        stored, accumulation = stored_tensors(config, recipe), resolved_training(recipe)["gradient_accumulation_steps"]
        findings.sent = {stage: step_traffic(stored, stage, accumulation).sent(processes) for stage in range(4)}
    if findings.shape is not None and findings.batch is not None:
        findings.disk = disk_forecast(recipe, findings.shape, findings.batch)
        _judge_resources(findings, findings.disk)
    return findings


def _mean_length(findings: Findings) -> float:
    """Tokens per example; the most there may be, where no row could be read."""
    if findings.sample is None:
        return findings.recipe.data.max_length
    return findings.sample.statistics.tokens / findings.sample.statistics.rows


def _choose_execution(findings: Findings, shape: ModelShape, processes: int, mean_length: float) -> None:
    """What training would choose on this machine, or refuse."""
    recipe, on_gpu = findings.recipe, torch.cuda.is_available()
    judged = findings.errors if on_gpu else findings.warnings  # without a GPU this may be a login node
    try:
        check_shared_weight(recipe, shape)
    except UserError as error:
        findings.errors.append(str(error))
        return
    device = device_memory(1 if on_gpu else processes)
    try:
        findings.choice = chosen_execution(recipe, shape, mean_length, device, recipe.distributed.zero, processes)
    except UserError as error:
        judged.append(str(error))


def first_rows(recipe: Recipe, tokenizer: transformers.PreTrainedTokenizerBase, rows: int) -> Sample:
    """The first rows of each source, tokenised as for training; validation rows of their own are read as well.

    Raises:
        UserError: data that cannot be read, or rows that the template does not fit.
    """
    data = recipe.data
    tokenised = tokenise(load_rows([_first(source, rows) for source in data.train]), tokenizer, data.max_length)
    count = sum(_count(source, f"data.train.{index}") for index, source in enumerate(data.train))
    held_out = 0
    if data.validation is not None and data.validation.source is not None:
        load_rows([_first(data.validation.source, rows)], ["data.validation.source"])
        held_out = _count(data.validation.source, "data.validation.source")
    elif data.validation is not None and data.validation.fraction is not None:
        held_out = math.ceil(count * data.validation.fraction)
        count -= held_out
    packed = count
    if resolved_training(recipe)["packing"]:
        packed = math.ceil(count * len(packed_rows(tokenised, data.max_length)) / len(tokenised))
    return Sample(tokenised, label_statistics(tokenised), count, packed, held_out)


def _first(source: schema.Source, rows: int) -> schema.Source:
    return source.model_copy(update={"limit": rows if source.limit is None else min(rows, source.limit)})


def _count(source: schema.Source, key: str) -> int:
    rows = len(read_raw(source, key))
    return rows if source.limit is None else min(rows, source.limit)


def spans(labels: list[int]) -> list[tuple[int, int, bool]]:
    """Runs of tokens alike in being trained: start, end, trained. The first token is never predicted."""
    trained = [index > 0 and label != IGNORED for index, label in enumerate(labels)]
    edges = [0, *(i for i in range(1, len(labels)) if trained[i] != trained[i - 1]), len(labels)]
    return [(start, end, trained[start]) for start, end in itertools.pairwise(edges) if end > start]


def disk_forecast(recipe: Recipe, shape: ModelShape, run: Batch) -> Disk:
    """Bytes that checkpoints will take, and that are free where they go."""
    training, numerics, zero = resolved_training(recipe), numerics_of(recipe), recipe.distributed.zero
    existing = run_folder(recipe).absolute()
    while not existing.exists():
        existing = existing.parent
    strategy, interval = training["save_strategy"], training["save_steps"]
    if strategy == "best":  # at evaluations
        strategy, interval = training["eval_strategy"], training["eval_steps"] or training["logging_steps"]
    best = training["metric_for_best_model"] is not None
    epochs, limit = run.steps / run.steps_per_epoch, training["save_total_limit"]
    resumable = not training["save_only_model"]
    return Disk(
        checkpoint=checkpoint_bytes(shape, numerics, zero, run.processes, resumable),
        plain_checkpoint=checkpoint_bytes(shape, numerics, PLAIN, 1, resumable),
        checkpoints=checkpoints_on_disk(strategy, interval, run.steps, epochs, limit, best),
        newest=limit,
        best=best,
        adapter=shape.adapter_parameters * numerics.width,
        plain_adapter=shape.adapter_parameters * 4,
        free=shutil.disk_usage(existing).free,
    )


def _look_at_machine(findings: Findings, config: transformers.PretrainedConfig) -> None:
    """What the base's configuration, this machine and the run's folder say about the recipe."""
    recipe = findings.recipe
    try:
        check_length(config, recipe.base, recipe.data.max_length)
    except UserError as error:
        findings.errors.append(str(error))
    try:
        check_device(recipe.base)
    except UserError as error:
        # without a GPU this may be a login node, and what fits there says nothing about the nodes that train
        (findings.errors if torch.cuda.is_available() else findings.warnings).append(str(error))
    try:
        check_run_folder(recipe, overwrite=False)
    except UserError as error:
        findings.warnings.append(str(error))


def _judge_labels(findings: Findings, sample: Sample) -> None:
    statistics = sample.statistics
    if statistics.untrained_rows:
        listed = ", ".join(str(row + 1) for row in statistics.untrained_rows[:10])
        more = ", ..." if len(statistics.untrained_rows) > 10 else ""
        findings.errors.append(
            f"data.train: {len(statistics.untrained_rows)} of the first {statistics.rows} rows have no trained token "
            f"(rows {listed}{more}): the prompt alone fills data.max_length {findings.recipe.data.max_length}, or the "
            "completion is empty.\nRaise data.max_length or mend the rows."
        )
    if statistics.truncated_rows:
        findings.warnings.append(
            f"data.max_length: {statistics.truncated_rows} of the first {statistics.rows} rows lose their end at "
            f"{findings.recipe.data.max_length} tokens, and EOS with it"
        )


def _judge_resources(findings: Findings, disk: Disk) -> None:
    if disk.needed > disk.free:
        findings.errors.append(
            f"output: checkpoints will take {in_words(disk.needed)}, and {in_words(disk.free)} are free in "
            f"{run_folder(findings.recipe)} ({in_words(SPARE_BYTES)} are to stay free).\n"
            "Choose another output, or lower training.save_total_limit where several checkpoints are kept."
        )
    if torch.cuda.is_available():
        device = device_memory()
        needed = findings.memory[findings.recipe.distributed.zero].peak
        if needed > device.total:
            findings.warnings.append(
                f"memory: about {in_words(needed)} per rank, and {device.device} has {in_words(device.total)}.\n"
                "In this order: a smaller training.per_device_train_batch_size with more gradient_accumulation_steps, "
                "adapter.dropout.execution=sequential, a shorter data.max_length, a higher distributed.zero."
            )
