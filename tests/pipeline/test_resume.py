"""Going on: a run that was cut off ends as the uninterrupted one; what belongs to another experiment is refused."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from training_support import random_rows, write_rows

from pipeline.checkpoint.files import sha256_of
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe
from pipeline.run.folder import read_history
from pipeline.supervision.bad_steps import StepGuard
from pipeline.supervision.watch import Interrupted
from pipeline.train import train

RECIPE = """
name: whole
seed: 3
output: {folder}/outputs
base: {{model: {folder}/base, quantization: none, dtype: float32}}
adapter: {{rank: 4, target_modules: [q_proj, down_proj]}}
data:
  train: [{{path: {folder}/train.jsonl, prompt: "{{{{ instruction }}}}:"}}]
  validation: {{fraction: 0.2, probe_rows: 4}}
  max_length: 96
training: {{max_steps: 6, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 1.0e-3,
            logging_steps: 1, eval_strategy: epoch, save_strategy: steps, save_steps: 2, save_total_limit: 9,
            metric_for_best_model: validation_loss, report_to: [], gradient_checkpointing: false}}
"""
TIMES = ("time", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Path:
    """A run of six steps and two epochs, with a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(small_base, folder / "base")
    write_rows(folder / "train.jsonl", random_rows(18, seed=0))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    train(recipe(folder))
    return folder


def recipe(work: Path, *overrides: str) -> Recipe:
    return load_recipe(work / "recipe.yaml", overrides)


def cut_off(work: Path, name: str, step: int) -> Path:
    """The folder of a run that was killed after a step, under another name."""
    whole, folder = work / "outputs" / "whole", work / "outputs" / name
    shutil.copytree(whole, folder)
    for name in ("adapter_model.safetensors", "README.md", "provenance.json"):
        (folder / name).unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return folder


def curve(folder: Path) -> list[dict[str, float]]:
    """What the run logged, but for its speed."""
    return [
        {key: value for key, value in record.items() if key in ("step", "epoch") or "loss" in key or "norm" in key}
        for record in read_history(folder)
    ]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_that_was_cut_off_ends_like_the_whole(work: Path, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    """History and adapter, to the bit: in an epoch, after its last step, and after the last step of all."""
    folder = cut_off(work, f"cut-{step}", step)
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 5, "loss"')  # killed while it wrote
    train(recipe(work, f"name=cut-{step}"))
    assert f"going on from {folder}/checkpoints/checkpoint-{step} (step {step})" in capsys.readouterr().out
    assert curve(folder) == curve(work / "outputs" / "whole")
    assert weights(folder) == weights(work / "outputs" / "whole")
    assert "finished" in json.loads((folder / "provenance.json").read_text())


def test_a_finished_run_is_not_trained_again(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = work / "outputs" / "whole" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    assert train(recipe(work, "training.save_steps=3", "eval.limit=2")) == adapter.parent
    assert "this run is finished, with this very recipe, data and base" in capsys.readouterr().out
    assert adapter.stat().st_mtime_ns == written


def test_a_damaged_checkpoint_is_told_and_an_older_one_taken(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cut_off(work, "damaged", 4)
    moments = folder / "checkpoints" / "checkpoint-4" / "optimizer.safetensors"
    moments.write_bytes(moments.read_bytes()[:-1])
    train(recipe(work, "name=damaged"))
    said = capsys.readouterr().out
    assert f"warning: left aside, damaged: {moments.parent}: optimizer.safetensors has" in said
    assert "checkpoint-2 (step 2)" in said
    assert weights(folder) == weights(work / "outputs" / "whole")


def test_a_run_may_go_on_under_another_name(work: Path) -> None:
    source = work / "outputs" / "whole" / "checkpoints" / "checkpoint-4"
    train(recipe(work, "name=branch", f"training.resume={source}", "training.eval_strategy=no"))
    losses = {record["step"]: record["loss"] for record in curve(work / "outputs" / "whole") if "loss" in record}
    branch = {record["step"]: record["loss"] for record in curve(work / "outputs" / "branch")}
    assert branch == {step: losses[step] for step in (5, 6)}
    assert weights(work / "outputs" / "branch") == weights(work / "outputs" / "whole")


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["training.learning_rate=2e-3"], ["training.learning_rate: 0.001 there, 0.002 here"]),
        (["training.max_steps=7"], ["training.max_steps: 6 there, 7 here"]),
        (["adapter.dropout.rate=0.2"], ["adapter.dropout.rate: 0.5 there, 0.2 here"]),
        (
            ["adapter.rank=5", "adapter.target_modules=[q_proj]"],
            [
                "adapter.rank: 4 there, 5 here",
                "adapter.target_modules: ['q_proj', 'down_proj'] there, ['q_proj'] here",
            ],
        ),
        (["base.dtype=bfloat16"], ["base.dtype: 'float32' there, 'bfloat16' here"]),
    ],
)
def test_another_recipe_is_refused_with_its_differences(work: Path, overrides: list[str], lines: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train(recipe(work, *overrides))
    said = str(error.value).splitlines()
    assert said[0] == f"{work}/outputs/whole: holds another experiment, in which this one cannot go on. It differs in"
    assert said[1:-1] == [f"  {line}" for line in lines]
    assert "Undo these changes to go on" in said[-1] and "--overwrite" in said[-1]


def test_another_number_of_rows_per_step_is_refused(work: Path) -> None:
    with pytest.raises(
        UserError, match=r"trained with 4 rows per optimizer step \(1 process\(es\) x 2 rows x 2 acc"
    ) as e:
        train(recipe(work, "training.gradient_accumulation_steps=3"))
    assert "per_device_train_batch_size to 1 or 2 or 4" in str(e.value)


@pytest.mark.parametrize("changed", ["data", "base"])
def test_changed_files_are_refused(work: Path, changed: str) -> None:
    """One letter of a row; one number of the base's configuration."""
    cut_off(work, f"changed-{changed}", 4)
    file = work / "train.jsonl" if changed == "data" else work / "base" / "config.json"
    before = file.read_text()
    old, new = ('"instruction": "', '"instruction": "z') if changed == "data" else ("1e-05", "2e-05")
    file.write_text(before.replace(old, new, 1))
    assert file.read_text() != before
    try:
        with pytest.raises(UserError) as error:
            train(recipe(work, f"name=changed-{changed}"))
    finally:
        file.write_text(before)
    expected = {"data": ("  tokens of the training rows: ", "  train data: "), "base": ("  files of the base: ",)}
    found = str(error.value).splitlines()[1:-1]
    assert len(found) == len(expected[changed]), found
    assert all(line.startswith(start) for line, start in zip(found, expected[changed], strict=True))
    train(recipe(work, f"name=changed-{changed}"))
    assert weights(work / "outputs" / f"changed-{changed}") == weights(work / "outputs" / "whole")


def test_what_cannot_be_gone_on_from_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint that training can go on from"):
        train(recipe(work, "name=new", f"training.resume={tmp_path}"))
    assert not (work / "outputs" / "new").exists()
    with pytest.raises(UserError, match=r"already holds a finished run.*\n.*training\.resume=auto"):
        train(recipe(work, "training.resume=never"))
    train(recipe(work, "name=small", "training.save_only_model=true", "training.max_steps=2"))
    (work / "outputs" / "small" / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2: holds the adapter only \(training\.save_only_model\)"):
        train(recipe(work, "name=small", "training.save_only_model=true", "training.max_steps=2"))
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged: rng\.json is missing"):
        broken = cut_off(work, "broken", 4) / "checkpoints" / "checkpoint-4"
        (broken / "rng.json").unlink()
        train(recipe(work, "name=new", f"training.resume={broken}"))


@pytest.mark.parametrize("spoilt", ["state.json", "rng.json", "adapter_model.safetensors", "optimizer.safetensors"])
def test_a_whole_checkpoint_of_another_kind_is_refused_in_words(work: Path, spoilt: str) -> None:
    """Its hashes are right; its content is not what is written here."""
    checkpoint = cut_off(work, f"foreign-{spoilt}", 4) / "checkpoints" / "checkpoint-4"
    file = checkpoint / spoilt
    if spoilt == "state.json":
        state = json.loads(file.read_text())
        del state[random.choice(["rates", "zero", "scheduler"])]
        file.write_text(json.dumps(state))
    elif spoilt == "rng.json":
        file.write_text('[{"python": "nothing"}]')
    else:
        tensors = load_file(file)
        first = next(name for name in tensors if tensors[name].dim())
        tensors[first] = tensors[first].flatten()[:1]  # torch would repeat it
        save_file(tensors, file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][spoilt] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"its files are whole, but .*not what this version writes|not of this .* shape"
    ):
        train(recipe(work, f"name=foreign-{spoilt}"))


def test_the_best_checkpoint_is_kept_and_loaded(work: Path) -> None:
    """Besides the newest; its weights are the run's where load_best_model_at_end asks for it."""
    overrides = [
        "name=best",
        "training.save_total_limit=1",
        "training.greater_is_better=true",  # so that it is not the last
        "training.load_best_model_at_end=true",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
    ]
    train(recipe(work, *overrides))
    folder = work / "outputs" / "best"
    measured = {record["step"]: record["validation_loss"] for record in curve(folder) if "validation_loss" in record}
    best = max(measured, key=lambda step: measured[step])
    assert best < 6
    kept = folder / "checkpoints" / f"checkpoint-{best}"
    assert weights(kept) == weights(folder)
    assert (kept.parent / "checkpoint-6").is_dir()  # the newest, from which a run that was stopped goes on


MEASURED = ("training.eval_strategy=steps", "training.eval_steps=2")


@pytest.mark.parametrize(
    ("step", "overrides"),
    [
        # the best is an older one, and its checkpoint the only one that transformers would leave
        (5, (*MEASURED, "training.save_total_limit=1", "training.greater_is_better=true")),
        (3, (*MEASURED, "training.save_strategy=best")),
        (4, ()),  # the last of an epoch, whose end is measured
        (3, (*MEASURED, "training.eval_on_start=true")),
        (6, ()),  # the last of all
    ],
)
def test_a_signal_keeps_a_checkpoint_from_which_the_run_goes_on(
    work: Path, step: int, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """History and adapter to the bit, whatever else the recipe says of checkpoints and measuring."""
    name = f"signal-{step}-{len(list((work / 'outputs').iterdir()))}"
    train(recipe(work, f"name={name}-whole", *overrides))
    steps = itertools.count(1)

    def signalled(guard: StepGuard, norm: object) -> None:
        if next(steps) == step:
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patched:
        patched.setattr(StepGuard, "gradient", signalled)
        with pytest.raises(Interrupted, match=f"stopped by SIGUSR1 at step {step}; the checkpoint in"):
            train(recipe(work, f"name={name}", *overrides))
    folder = work / "outputs" / name
    assert (folder / "checkpoints" / f"checkpoint-{step}").is_dir()
    train(recipe(work, f"name={name}", *overrides))
    assert curve(folder) == curve(work / "outputs" / f"{name}-whole")
    assert weights(folder) == weights(work / "outputs" / f"{name}-whole")
