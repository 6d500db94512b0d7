"""launch/ask.py as a user runs it, and its answers against a recomputation by single forward passes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from eval.answer import Answerer, load_answerer, question_prompt
from pipeline.adapter.config import lora_config
from pipeline.adapter.files import save_adapter, settings_of
from pipeline.base import load_base
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe, recipe_to_yaml

QUESTION = "Name the capital of France."
RECIPE = """
name: random-adapter
seed: 3
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{rank: 4, alpha: 8, dropout: {{rate: {rate}}}}}
data: {{train: [{{path: {data}, format: alpaca}}]}}
eval: {{ensemble: {{instances: 3}}}}
"""


def adapter_folder(folder: Path, pocket_base: Path, rate: float) -> Path:
    """A training run's folder with a random adapter, strong enough to change answers."""
    folder.mkdir()
    (folder / "first.yaml").write_text(RECIPE.format(base=pocket_base, data=folder / "rows.jsonl", rate=rate))
    (folder / "rows.jsonl").write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    recipe = load_recipe(folder / "first.yaml")
    torch.manual_seed(0)
    model = get_peft_model(load_base(recipe.base), lora_config(recipe.adapter))
    weights = {name: 0.08 * torch.randn_like(value) for name, value in get_peft_model_state_dict(model).items()}
    save_adapter(model, weights, settings_of(recipe.adapter, recipe.seed), folder)
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, pocket_base: Path) -> Path:
    return adapter_folder(tmp_path_factory.mktemp("run") / "adapter", pocket_base, rate=0.4)


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory: pytest.TempPathFactory, pocket_base: Path) -> Path:
    return adapter_folder(tmp_path_factory.mktemp("run") / "plain", pocket_base, rate=0.0)


@pytest.fixture(scope="module")
def ensemble(adapter: Path) -> Answerer:
    return load_answerer(adapter)


def ask(repository: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "launch" / "ask.py"), *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )


def answered_ids(answerer: Answerer, prompt: str, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy answer without our decoder: every step runs the whole sequence, one member after another, uncached.

    Returns:
        ``(1, T)`` prompt and answer; ``(1 + N, new tokens)`` log-probabilities of the answer, the average's first.
    """
    ids = answerer.tokenizer(prompt, return_tensors="pt")["input_ids"]
    steps = []
    for _ in range(new_tokens):
        logits = []
        for member in range(answerer.ensemble.instances):
            with torch.no_grad(), answerer.dropout.members([member]):
                logits.append(answerer.model(input_ids=ids).logits[0, -1].float())
        stacked = torch.stack(logits)
        token = stacked.mean(dim=0).argmax()
        averaged = stacked.mean(dim=0).log_softmax(dim=-1)[token]
        steps.append(torch.cat([averaged[None], stacked.log_softmax(dim=-1)[:, token]]))
        ids = torch.cat([ids, token[None, None]], dim=1)
        if token == answerer.tokenizer.eos_token_id:
            break
    return ids, torch.stack(steps, dim=1)


def text_of(answerer: Answerer, answer_ids: torch.Tensor) -> str:
    return answerer.tokenizer.decode(answer_ids, skip_special_tokens=True).strip()


def test_ensemble_answer_and_confidence(ensemble: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = question_prompt(ensemble.recipe, QUESTION)
    sure = ensemble.answer(prompt, max_new_tokens=5, temperature=0.0)
    ids, log_probabilities = answered_ids(ensemble, prompt, 5)
    length = len(ensemble.tokenizer(prompt)["input_ids"])
    assert capsys.readouterr().out.strip() == text_of(ensemble, ids[0, length:])
    assert sure.tokens == ids.shape[1] - length
    # float32, caches and rows of one batch against single passes: 1e-4 relative
    assert sure.sequence == pytest.approx(log_probabilities[0].mean().exp().item(), rel=1e-4)
    assert sure.first == pytest.approx(log_probabilities[0, 0].exp().item(), rel=1e-4)
    assert sure.members == pytest.approx(log_probabilities[1:].mean(dim=1).exp().tolist(), rel=1e-4)
    assert max(sure.members) - min(sure.members) > 1e-3  # the members do differ


def test_deterministic_answer_is_stock_generation(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answerer = load_answerer(adapter, ensemble=False)
    prompt = question_prompt(answerer.recipe, QUESTION)
    sure = answerer.answer(prompt, max_new_tokens=12, temperature=0.0)
    inputs = answerer.tokenizer(prompt, return_tensors="pt")
    stock = answerer.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == text_of(answerer, stock)
    assert sure.tokens == len(stock) and sure.members == pytest.approx([sure.sequence])


def test_sampling_repeats_with_the_seed(ensemble: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, texts = question_prompt(ensemble.recipe, QUESTION), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        ensemble.answer(prompt, max_new_tokens=12, temperature=1.5)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_prompt_longer_than_the_context(ensemble: Answerer) -> None:
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens; this base reads 512, the answer included"):
        ensemble.answer("word " * 600, max_new_tokens=5, temperature=0.0)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"format": "alpaca"}, "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"),
        ({"columns": {"instruction": "ask", "input": "about"}, "prompt": "{{ ask }}|{{ about }}>"}, "Add.|2 and 3>"),
    ],
)
def test_prompt_is_the_training_prompt(source: dict, expected: str) -> None:
    recipe = Recipe(name="x", base={"model": "m"}, data={"train": [{"path": "p", **source}]})
    assert question_prompt(recipe, "Add.", "2 and 3").endswith(expected)


def test_input_that_the_prompt_has_no_place_for() -> None:
    recipe = Recipe(name="x", base={"model": "m"}, data={"train": [{"path": "p", "format": "prompt-completion"}]})
    assert question_prompt(recipe, "Add.") == "Add."
    with pytest.raises(UserError, match="--input: this adapter was trained on prompts without an input"):
        question_prompt(recipe, "Add.", "2 and 3")


def test_rate_zero_answers_deterministically(plain_adapter: Path) -> None:
    assert load_answerer(plain_adapter).dropout is None
    with pytest.raises(UserError, match=r"--ensemble: .* was trained without LoRA Dropout \(rate 0\)"):
        load_answerer(plain_adapter, ensemble=True)
    with pytest.raises(UserError, match=r"--instances: .*without LoRA Dropout \(rate 0\).* no effect"):
        load_answerer(plain_adapter, instances=4)


def test_options_without_effect(adapter: Path) -> None:
    with pytest.raises(UserError, match=r"--average: .*--deterministic asks for no ensemble.* no effect"):
        load_answerer(adapter, ensemble=False, average="logits")


def test_adapter_without_its_recipe(adapter: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "lora_dropout.json"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: no recipe.yaml beside the adapter")):
        load_answerer(tmp_path)


def test_help_is_light(repository: Path) -> None:
    code = (
        "import atexit, runpy, sys; sys.argv[1:] = ['--help']\n"
        "atexit.register(lambda: print('heavy', sorted({'torch', 'transformers', 'peft'} & set(sys.modules))))\n"
        f"runpy.run_path({str(repository / 'launch' / 'ask.py')!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=repository)
    assert run.returncode == 0 and "--deterministic" in run.stdout and "heavy []" in run.stdout


@pytest.mark.slow
def test_questions_from_a_pipe(repository: Path, adapter: Path) -> None:
    run = ask(repository, str(adapter), "--max-new-tokens", "4", stdin=f"{QUESTION}\n\nAnd of Spain?\n")
    assert run.returncode == 0, run.stderr
    assert "random-adapter: an ensemble of 3, average of logits" in run.stderr
    number = r"[01]\.\d{3}"
    line = rf"\[confidence {number} per token over \d, {number} in the first; each of the 3 members alone "
    assert len(re.findall(line + rf"{number} to {number}\]", run.stdout)) == 2


def test_conversation_ends_with_control_d(repository: Path, adapter: Path) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, str(repository / "launch" / "ask.py"), str(adapter), "--deterministic"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "3"], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        os.close(terminal)
        os.write(controller, f"{QUESTION}\n".encode() + b"\x04")
        out, error = running.communicate(timeout=120)
    os.close(controller)
    assert running.returncode == 0, error
    assert len(re.findall(r"\[confidence [01]\.\d{3} per token over \d, [01]\.\d{3} in the first\]", out)) == 1
    assert "Traceback" not in error


def test_no_adapter_in_the_folder(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    run = ask(repository, str(tmp_path), QUESTION)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"{tmp_path}: no adapter here (found: notes.txt)" in run.stderr
    assert "Expected adapter_config.json" in run.stderr
