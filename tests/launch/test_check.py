"""The pre-flight on real rows and the base that ships: what it says, and the status it ends with."""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from pipeline.data import load_splits
from pipeline.data.packing import packed_rows
from pipeline.preflight.checks import Findings, examine, spans
from pipeline.preflight.text import print_findings
from pipeline.recipe import load_recipe


def random_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join("".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(draw.randint(1, most)))

    return [{"instruction": words(9), "input": words(5), "output": words(12)} for _ in range(count)]


@pytest.fixture
def recipe_file(tmp_path: Path, pocket_base: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps(random_rows(150)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
name: checked
output: {tmp_path / "outputs"}
base: {{model: {pocket_base}}}
adapter: {{dropout: {{rate: 0.5, instances: 4, sampling: instance}}}}
data:
  train: [{{path: ./rows.json}}]
  validation: {{fraction: 0.1}}
  max_length: 256
training: {{gradient_accumulation_steps: 2, num_train_epochs: 2}}
"""
    )
    return path


def text_of(findings: Findings) -> str:
    screen = StringIO()
    print_findings(findings, Console(file=screen, width=200, no_color=True))
    return screen.getvalue()


def looked_at(path: Path, *overrides: str, processes: int = 2) -> Findings:
    return examine(load_recipe(path, overrides), rows=100, processes=processes)


def test_a_good_recipe(recipe_file: Path) -> None:
    findings = looked_at(recipe_file)
    assert findings.errors == []
    assert findings.sample is not None
    assert findings.sample.statistics.rows == 100
    assert (findings.sample.training_rows, findings.sample.validation_rows) == (135, 15)
    text = text_of(findings)
    assert "4 examples x 2 accumulation x 2 processes = 16 examples per optimizer step" in text
    assert "135 training rows, 15 held out: 9 steps per epoch, 18 steps in all" in text
    assert "each micro-batch is computed under 4 masks: one batch of 16 rows" in text
    assert findings.choice is not None
    assert findings.choice.reason.startswith("batched (auto): a step takes about ") and findings.choice.reason in text
    assert "ZeRO-1 *" in text
    assert "each process sends per optimizer step: " in text and "under ZeRO-1 *" in text
    assert "at most 2 at once (the newest 2 and the one being written)" in text
    assert text.rstrip().endswith("ready")


def test_the_example_shows_what_is_trained_without_colour(recipe_file: Path) -> None:
    findings = looked_at(recipe_file)
    first = random_rows(150)[0]
    text = text_of(findings)
    assert f"⟦{first['output']}</s>⟧" in text or f"⟦ {first['output']}</s>⟧" in text
    before = text[: text.index("⟦")]
    assert first["instruction"] in before
    assert "### Response:" in before
    assert text.count("⟦") == text.count("⟧") == 2  # the example and the legend


def test_sequential_instances_are_said(recipe_file: Path) -> None:
    text = text_of(looked_at(recipe_file, "adapter.dropout.execution=sequential"))
    assert "4 passes of 4 rows, one after another" in text


def test_packing_is_counted_in_rows(recipe_file: Path) -> None:
    """The forecast against the packing itself, within a tenth."""
    findings = looked_at(recipe_file, "training.packing=true", "data.validation=null")
    recipe = findings.recipe
    rows = load_splits(recipe, findings.tokenizer).train
    assert findings.sample is not None and findings.batch is not None
    assert findings.sample.packed_rows == pytest.approx(len(packed_rows(rows, recipe.data.max_length)), rel=0.1)
    text = text_of(findings)
    assert f"150 training rows, in about {findings.sample.packed_rows} packed rows: " in text
    assert "4 packed rows x 2 accumulation x 2 processes = 16 packed rows per optimizer step" in text


def test_instances_that_cannot_fit_are_said(recipe_file: Path) -> None:
    many = ("adapter.dropout.instances=100000", "adapter.dropout.execution=batched")
    (warning,) = [w for w in looked_at(recipe_file, *many).warnings if w.startswith("adapter.dropout.instances")]
    assert "100000 copies of 4 rows as one batch take about" in warning


def test_rows_without_a_trained_token_are_an_error_that_lists_them(recipe_file: Path) -> None:
    rows = random_rows(150)
    rows[2]["instruction"] = rows[5]["instruction"] = "word " * 300
    (recipe_file.parent / "rows.json").write_text(json.dumps(rows))
    findings = looked_at(recipe_file)
    (error,) = findings.errors
    assert "2 of the first 100 rows have no trained token (rows 3, 6)" in error
    assert "data.max_length 256" in error
    assert any("2 of the first 100 rows lose their end at 256 tokens" in warning for warning in findings.warnings)
    assert "error: data.train" in text_of(findings)
    assert "ready" not in text_of(findings)


def test_everything_that_can_be_looked_at_is(recipe_file: Path) -> None:
    """Two mistakes in different places are both reported, and the rest is still shown."""
    findings = looked_at(recipe_file, "adapter.target_modules=[q_prj]", "data.train.0.path=./no-such.json")
    assert len(findings.errors) == 2
    assert "q_prj" in findings.errors[0]
    assert "no-such.json" in findings.errors[1]
    findings = looked_at(recipe_file, "data.max_length=1024")
    assert "was made for at most 512 positions" in findings.errors[0]
    assert findings.memory


def test_malformed_rows_are_named(recipe_file: Path) -> None:
    (recipe_file.parent / "rows.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "c",,}]')
    (error,) = looked_at(recipe_file).errors
    assert "rows.json" in error
    assert "row 2" in error


def test_a_finished_run_is_a_warning(recipe_file: Path) -> None:
    run = recipe_file.parent / "outputs" / "checked"
    run.mkdir(parents=True)
    for file in ("adapter_model.safetensors", "recipe.yaml"):
        (run / file).touch()
    (run / "provenance.json").write_text('{"finished": "today"}')
    findings = looked_at(recipe_file, "training.resume=never")
    assert findings.errors == []
    assert any("already holds a finished run" in warning for warning in findings.warnings)


def test_spans() -> None:
    assert spans([-100, -100, 5, 6, 2]) == [(0, 2, False), (2, 5, True)]
    assert spans([7, 8]) == [(0, 1, False), (1, 2, True)]  # the first token is never predicted
    assert spans([-100, 3, -100, 4]) == [(0, 1, False), (1, 2, True), (2, 3, False), (3, 4, True)]
    assert spans([-100]) == [(0, 1, False)]


def test_spans_cover_every_token_of_random_labels(pocket_base: Path) -> None:
    draw = random.Random(1)
    tokenizer = AutoTokenizer.from_pretrained(pocket_base)
    for _ in range(50):
        labels = [draw.choice([-100, -100, draw.randrange(len(tokenizer))]) for _ in range(draw.randint(1, 40))]
        covered = [index for start, end, _ in spans(labels) for index in range(start, end)]
        assert covered == list(range(len(labels)))


def status_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of the command, run in this process: importing the libraries takes most of a new one's time."""
    from launch.check import check
    from launch.command import run_command

    monkeypatch.setattr(sys, "argv", ["check.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(check)
    return ended.value.code if isinstance(ended.value.code, int) else 0


def test_a_good_recipe_ends_with_status_0(recipe_file: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "launch" / "check.py"
    tasks = Path(__file__).resolve().parents[2] / "recipes" / "pocket" / "tasks"
    options = ["training.per_device_train_batch_size=2", "--processes", "3", "--rows", "20"]
    options += [f"eval.task_folders=[{tasks}]", "eval.tasks=[pocket_choice]"]
    done = subprocess.run([sys.executable, script, recipe_file, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 examples x 2 accumulation x 3 processes = 12 examples per optimizer step" in done.stdout
    assert "first 20 rows" in done.stdout


def test_errors_end_with_status_2(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, str(recipe_file), "data.max_length=8") == 2
    assert "100 of the first 100 rows have no trained token" in capsys.readouterr().out


def test_the_evaluation_is_checked_too(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, str(recipe_file), "eval.tasks=[./none.yaml]") == 2
    said = capsys.readouterr().out
    assert "/none.yaml', which is no file" in said and "ready" not in said
    assert status_of(monkeypatch, str(recipe_file), "eval.tasks=[./none.yaml]", "--no-eval") == 0
    assert "ready" in capsys.readouterr().out


def test_a_bad_recipe_ends_with_status_2_and_no_traceback(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, str(recipe_file), "adapter.dropout.rate=1.0") == 2
    message = capsys.readouterr().err
    assert "command line: adapter.dropout.rate: found 1.0, expected a number of at least 0 and below 1" in message
    assert "Traceback" not in message


def test_a_hub_base_without_network_is_said_before_anything_else(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, str(recipe_file), "base.model=no-such-owner/no-such-model") == 2
    captured = capsys.readouterr()
    assert "base.model: 'no-such-owner/no-such-model' is neither a local path nor in the local Hub" in captured.err
    assert "hf download" in captured.err
    assert captured.out == ""


def test_real_instructions(recipe_file: Path, shared: Path) -> None:
    data = shared / "data" / "instruct" / "alpaca_5000.json"
    findings = looked_at(recipe_file, f"data.train.0.path={data}", "data.max_length=512")
    assert findings.errors == []
    assert findings.sample is not None
    assert findings.sample.training_rows == 4500
    least, median, most = findings.sample.statistics.length_quantiles
    assert 20 < least < median < most <= 512
