"""A pre-flight's findings on the screen. Nothing depends on colour: what colour says, a mark says too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pipeline.checkpoint.files import SPARE_BYTES
from pipeline.preflight.checks import Disk, Findings, Sample, spans
from pipeline.preflight.estimate import PLAIN, Batch, ModelShape, RankMemory, in_words
from pipeline.preflight.execution import Choice

OPEN, CLOSE = "⟦", "⟧"
"""Around trained tokens."""
CHOSEN = "*"
"""Beside the recipe's own ZeRO stage."""


def print_findings(findings: Findings, console: Console) -> None:
    """Everything found, errors last."""
    for title, part in _parts(findings):
        console.rule(Text(title, style="bold"), align="left")
        console.print(part)
    for warning in findings.warnings:
        console.print(Text("warning: ", style="bold yellow") + Text(warning))
    for error in findings.errors:
        console.print(Text("error: ", style="bold red") + Text(error))
    if not findings.errors:
        console.print(Text("ready", style="bold green"))


def _parts(findings: Findings) -> Iterator[tuple[str, RenderableType]]:
    if findings.sample is not None:
        yield "first example", masked_example(findings.sample, findings.tokenizer)
        yield "labels", label_table(findings.sample)
    if findings.batch is not None and findings.sample is not None:
        yield "batch", batch_text(findings.batch, findings.sample, findings.choice)
    if findings.shape is not None:
        yield "parameters", parameter_text(findings.shape)
        yield "memory per rank", memory_table(findings)
    if findings.sent:
        yield "traffic", traffic_text(findings)
    if findings.disk is not None:
        yield "disk", disk_text(findings.disk)


def masked_example(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> RenderableType:
    """The first row, decoded from its tokens, trained ones between brackets and green."""
    row = sample.tokenised[0]
    text = Text()
    for start, end, trained in spans(row["labels"]):
        piece = str(tokenizer.decode(row["input_ids"][start:end]))
        text.append(f"{OPEN}{piece}{CLOSE}" if trained else piece, style="bold green" if trained else "dim")
    legend = Text(f"trained tokens are between {OPEN} and {CLOSE}, end of sequence included; the rest is read only")
    return Group(text, Text(), legend)


def label_table(sample: Sample) -> RenderableType:
    """Tokens and trained tokens per row, and rows that lose something."""
    statistics = sample.statistics
    table = Table("per row", "least", "median", "most", box=None)
    for title, quantiles in (
        ("tokens", statistics.length_quantiles),
        ("trained tokens", statistics.trained_quantiles),
    ):
        table.add_row(title, *(f"{value:,}" for value in quantiles))
    share = statistics.trained_tokens / max(statistics.tokens, 1)
    counts = (
        f"first {statistics.rows:,} rows: {statistics.tokens:,} tokens, {statistics.trained_tokens:,} trained "
        f"({share:.0%}); {statistics.truncated_rows} rows truncated, "
        f"{len(statistics.untrained_rows)} without a trained token"
    )
    return Group(table, Text(counts))


def batch_text(run: Batch, sample: Sample, choice: Choice | None) -> Text:
    """The arithmetic from micro-batch to the whole run."""
    validation = f", {sample.validation_rows:,} held out" if sample.validation_rows else ""
    packed = sample.packed_rows < sample.training_rows
    rows = f", in about {sample.packed_rows:,} packed rows" if packed else ""
    unit = "packed rows" if packed else "examples"
    lines = [
        f"{run.micro_batch} {unit} x {run.accumulation} accumulation x {_processes(run.processes)} = "
        f"{run.examples_per_step} {unit} per optimizer step",
        f"{sample.training_rows:,} training rows{validation}{rows}: {run.steps_per_epoch:,} steps per epoch, "
        f"{run.steps:,} steps in all",
    ]
    if run.instances > 1:
        how = (
            f"one batch of {run.rows_per_pass} rows"
            if run.rows_per_pass > run.micro_batch
            else f"{run.instances} passes of {run.rows_per_pass} rows, one after another"
        )
        lines.append(f"each micro-batch is computed under {run.instances} masks: {how}")
        if choice is not None:
            lines.append(choice.reason)
    return Text("\n".join(lines))


def parameter_text(shape: ModelShape) -> Text:
    """Frozen and trained parameters."""
    share = shape.adapter_parameters / shape.parameters
    return Text(f"{shape.parameters:,} frozen, {shape.adapter_parameters:,} trained ({share:.2%})")


ROWS: tuple[tuple[str, Callable[[RankMemory], int]], ...] = (
    ("frozen base", lambda memory: memory.base),
    ("adapter", lambda memory: memory.weights),
    ("optimizer, float32 masters", lambda memory: memory.optimizer),
    ("= between steps", lambda memory: memory.at_rest),
    ("gathered base", lambda memory: memory.gathered),
    ("gradients", lambda memory: memory.gradients),
    ("masks (rough)", lambda memory: memory.masks),
    ("activations (rough)", lambda memory: memory.activations),
    ("comes and goes (rough)", lambda memory: memory.working),
    ("= peak within a step", lambda memory: memory.step_peak),
    ("peak while loading", lambda memory: memory.load_peak),
)


def memory_table(findings: Findings) -> RenderableType:
    """One column per ZeRO stage, the recipe's marked."""
    table = Table("", box=None)
    for stage in findings.memory:
        chosen = stage == findings.recipe.distributed.zero
        name = "python" if stage is PLAIN else f"ZeRO-{stage}"
        table.add_column(f"{name} {CHOSEN}" if chosen else name, justify="right", style="bold" if chosen else None)
    for title, size in ROWS:
        table.add_row(title, *(_size(size(memory)) for memory in findings.memory.values()))
    processes = findings.batch.processes if findings.batch is not None else 1
    note = (
        f"{CHOSEN} the recipe's stage, {_processes(processes)}; python: one process without DeepSpeed. "
        "About 1 GiB of CUDA context and fragments comes on top."
    )
    return Group(table, Text(note, style="dim"))


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def _size(size: int) -> str:
    return in_words(size) if size else "-"


def traffic_text(findings: Findings) -> Text:
    """What each process sends in a step; what it receives is as much."""
    chosen = findings.recipe.distributed.zero
    stages = [
        f"{in_words(sent)} under ZeRO-{stage}{f' {CHOSEN}' if stage == chosen else ''}"
        for stage, sent in findings.sent.items()
    ]
    return Text(f"each process sends per optimizer step: {', '.join(stages)} (pipeline/preflight/SCALE.md)")


def disk_text(disk: Disk) -> Text:
    """What checkpoints take, and what is free."""
    checkpoint, adapter = (
        in_words(size) + (f" ({in_words(plain)} under plain python)" if plain != size else "")
        for size, plain in ((disk.checkpoint, disk.plain_checkpoint), (disk.adapter, disk.plain_adapter))
    )
    return Text(
        f"a checkpoint: {checkpoint}; {_at_once(disk)}; adapter: {adapter}; "
        f"together {in_words(disk.needed)} of {in_words(disk.free)} free, with {in_words(SPARE_BYTES)} to spare"
    )


def _at_once(disk: Disk) -> str:
    if disk.checkpoints == 0:
        return "none is saved unless a signal stops the run"
    if disk.newest is None:
        return f"all {disk.checkpoints} are kept (training.save_total_limit)"
    best = ", the best" if disk.best else ""
    return f"at most {disk.checkpoints} at once (the newest {disk.newest}{best} and the one being written)"
