"""The log: a token of the data counts once, however many copies of it the objective makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_support import random_rows, write_rows
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.base import load_tokenizer
from pipeline.data import load_splits
from pipeline.observation.progress import PlainWordsCallback, plain_words
from pipeline.observation.rank_log import rank_log_file, read_rank_log
from pipeline.observation.status import read_status
from pipeline.observation.step_norms import StepNorms
from pipeline.recipe import load_recipe
from pipeline.train import train
from pipeline.trainer import loss_per_token

RECIPE = """
name: log
output: {folder}/outputs
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{rank: 2, dropout: {{rate: 0.5, instances: 4, sampling: instance, execution: {execution}}}}}
data: {{train: [{{path: {folder}/rows.jsonl, prompt: "{{{{ instruction }}}} ="}}], max_length: 48}}
training: {{num_train_epochs: 1, per_device_train_batch_size: 2, logging_steps: 1, save_strategy: epoch}}
"""


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_copies_are_not_counted_as_tokens(tmp_path: Path, small_base: Path, execution: str) -> None:
    write_rows(tmp_path / "rows.jsonl", random_rows(12, seed=3, longest=9))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path, base=small_base, execution=execution))
    folder = train(load_recipe(recipe))
    tokens = load_splits(load_recipe(recipe), load_tokenizer(load_recipe(recipe).base)).statistics.tokens

    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["tokens_per_second"] > 0 for record in records)  # miscounted, a short batch after a long is below
    assert all(0 <= record["clip_fraction"] <= 1 and record["update_norm"] > 0 for record in records)
    assert all(0 < record["data_wait"] < 1 and record["flops_per_second"] > 0 for record in records)
    assert not any("mfu" in record for record in records)  # of a CPU nobody states a peak

    status = read_status(folder)
    assert status is not None
    assert (status.state, status.step, status.steps, status.exit_status) == ("finished", 6, 6, 0)
    assert (status.loss, status.tokens_per_second) == (records[-1]["loss"], records[-1]["tokens_per_second"])
    assert (status.attempts, status.resumed_from, status.last_checkpoint) == (1, None, "checkpoints/checkpoint-6")
    log = read_rank_log(rank_log_file(folder, 0))
    said = [line["event"] for line in log if line["level"] == "info"]
    assert said[:3] == ["process", "versions", "training begins"]
    assert said[-3:] == ["training ends", "finished", "process ends"]
    assert [line["loss"] for line in log if line["event"] == "step"] == [record["loss"] for record in records]
    (written,) = [line for line in log if line["event"] == "checkpoint written"]
    assert written["bytes"] == sum(file.stat().st_size for file in (folder / "checkpoints/checkpoint-6").iterdir())

    events = EventAccumulator(str(folder / "runs")).Reload()
    (tag,) = [tag for tag in events.Tags()["scalars"] if tag.endswith("num_tokens")]
    counted = [event.value for event in events.Scalars(tag)]
    assert counted == sorted(counted)
    assert counted[-1] == tokens  # one epoch
    for name in ("tokens_per_second", "data_wait", "flops_per_second"):
        drawn = [event.value for event in events.Scalars(f"train/{name}")]
        assert drawn == pytest.approx([record[name] for record in records])


def test_the_line_is_in_plain_words() -> None:
    record = {"step": 40, "loss": 1.23456, "learning_rate": 1.9e-4, "gradient_norm": 0.812, "tokens_per_second": 5210.4}
    assert plain_words(record, 200) == (
        "step 40/200 · loss 1.2346 · learning rate 1.9e-04 · gradient norm 0.81 · 5,210 tokens/s"
    )
    measured = {"step": 40, "validation_loss": 0.6038, "probe_loss": 0.5527, "generalization_gap": 0.0511}
    assert plain_words(measured, 200).endswith(
        "validation loss 0.6038 · training probe 0.5527 · generalisation gap +0.0511"
    )


def test_step_norms_are_those_of_each_step() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    arguments, state, control = TrainingArguments(report_to="none"), TrainerState(), TrainerControl()
    norms, expected, above = StepNorms(), [], []
    for _ in range(5):
        norms.on_step_begin(arguments, state, control, model=model)
        before = model.weight.detach().clone()
        model(torch.randn(4, 3)).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 8.0)
        norms.gradient(norm)
        optimizer.step()
        optimizer.zero_grad()
        norms.on_step_end(arguments, state, control, model=model)
        expected.append(float((model.weight.detach() - before).norm()))
        above.append(float(norm) > 8.0)
    found = norms.averages(max_grad_norm=8.0)
    assert found["update_norm"] == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert found["clip_fraction"] == sum(above) / 5
    assert norms.averages(8.0) == {}  # since the last call
    norms.gradient(1.0)
    assert norms.averages(max_grad_norm=0.0) == {}  # nothing is clipped


def test_the_standard_error_of_a_loss_is_that_of_rows_drawn_again() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (400,), generator=draw).double()
    rows = torch.stack([tokens * (1 + torch.rand(400, generator=draw)), tokens], dim=1)
    loss, stderr = loss_per_token(rows)
    assert loss == pytest.approx(float(rows[:, 0].sum() / rows[:, 1].sum()))
    again = rows[torch.randint(400, (4000, 400), generator=draw)].sum(dim=1)
    assert stderr == pytest.approx(float((again[:, 0] / again[:, 1]).std()), rel=0.06)
    assert loss_per_token(rows[:1]) == (float(rows[0, 0] / rows[0, 1]), None)


def test_a_log_file_gets_lines_and_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar would fill it with carriage returns."""
    words, control = PlainWordsCallback(tmp_path / "history.jsonl"), TrainerControl()
    state = TrainerState(global_step=2, max_steps=4, epoch=0.5)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    words.on_train_begin(arguments, state, control)
    words.on_step_end(arguments, state, control)
    words.on_prediction_step(arguments, state, control, eval_dataloader=[1, 2])
    words.on_log(arguments, state, control, logs={"loss": 1.5})
    words.on_train_end(arguments, state, control)
    told = capsys.readouterr()
    assert told.out == "step 2/4 · loss 1.5000\n" and told.err == ""
