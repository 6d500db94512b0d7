"""What is refused before a run starts, and what is said when memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import random_rows, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.adapter.config import check_target_modules, lora_config
from pipeline.adapter.files import check_adapter_folder, load_adapter, read_settings
from pipeline.distributed import check_launch
from pipeline.errors import UserError
from pipeline.recipe import Recipe, recipe_to_yaml, schema
from pipeline.run.folder import check_run_folder, create_run_folder, run_folder
from pipeline.train import out_of_memory_advice, train
from pipeline.trainer import LoraDropoutTrainer


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "t", "base": {"model": "m"}, "data": {"train": [{"path": "d"}]}, **sections})


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    )


@pytest.mark.parametrize(
    ("targets", "missing"),
    [
        (["query"], "query"),
        (["q_proj", "v_porj", "w"], "v_porj, w"),
        (["proj"], "proj"),
        (["lm_head"], "lm_head"),  # trl computes the loss from its weight, past any adapter on it
    ],
)
def test_target_modules_that_match_nothing_are_named(llama: LlamaForCausalLM, targets: list[str], missing: str) -> None:
    with pytest.raises(UserError) as error:
        check_target_modules(llama, schema.Adapter(target_modules=targets))
    message = str(error.value)
    assert message.startswith(f"adapter.target_modules: {missing} matches no linear layer or embedding of this model.")
    assert "It has: down_proj, embed_tokens, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; or use" in message


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["layers.0.self_attn.q_proj", "mlp.up_proj"]])
def test_target_modules_that_match(llama: LlamaForCausalLM, targets: Any) -> None:
    check_target_modules(llama, schema.Adapter(target_modules=targets))


def test_rescale_decides_the_alpha_that_peft_sees() -> None:
    verbatim = schema.Adapter(alpha=32, dropout=schema.Dropout(rate=0.5, rescale=False))
    assert lora_config(verbatim).lora_alpha == 8
    assert lora_config(schema.Adapter(alpha=32, dropout=schema.Dropout(rate=0.5))).lora_alpha == 32


def test_offload_needs_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    offloaded = recipe(distributed={"zero": 2, "offload": "optimizer"})
    with pytest.raises(UserError) as error:
        check_launch(offloaded)
    assert "distributed.offload: 'optimizer' is DeepSpeed's, which plain `python` does not run" in str(error.value)
    assert "deepspeed --num_gpus 1 launch/sft.py" in str(error.value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launch(offloaded)


# --- the output folder -----------------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten_silently(tmp_path: Path) -> None:
    run = recipe(output=str(tmp_path), training={"resume": "never"})
    check_run_folder(run, overwrite=False)
    folder = create_run_folder(run, {"seed": 1})
    assert folder == run_folder(run) == tmp_path / "t"
    assert (folder / "recipe.yaml").read_text() == recipe_to_yaml(run)
    check_run_folder(run, overwrite=False)  # nothing is lost: no checkpoint, no adapter
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        check_run_folder(run, overwrite=False)
    assert f"{folder}: already holds an unfinished run; it is never overwritten silently" in str(error.value)
    assert all(words in str(error.value) for words in ("name=...", "--overwrite", "training.resume=auto"))
    check_run_folder(recipe(output=str(tmp_path)), overwrite=False)  # resume: auto looks at it closely later
    (folder / "provenance.json").write_text('{"finished": "now"}')
    with pytest.raises(UserError, match="already holds a finished run"):
        check_run_folder(run, overwrite=False)
    assert (folder / "checkpoints" / "checkpoint-2").exists()
    check_run_folder(run, overwrite=True)
    create_run_folder(run, {"seed": 1})
    assert sorted(file.name for file in folder.iterdir()) == ["identity.json", "recipe.yaml"]


def test_a_run_goes_on_from_a_path_in_another_folder(tmp_path: Path) -> None:
    """Never in the one that holds the checkpoint, which --overwrite would delete."""
    run = recipe(output=str(tmp_path))
    checkpoint = create_run_folder(run, {}) / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"lies in .*the folder of this very run") as error:
            check_run_folder(recipe(output=str(tmp_path), training={"resume": str(checkpoint)}), overwrite)
        assert ("which --overwrite would delete" in str(error.value)) == overwrite
    with pytest.raises(UserError, match=r"training\.resume: found '/nowhere', which is no folder"):
        check_run_folder(recipe(output=str(tmp_path), training={"resume": "/nowhere"}), overwrite=False)
    check_run_folder(recipe(name="other", output=str(tmp_path), training={"resume": str(checkpoint)}), overwrite=True)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {
        tmp_path / "file": "Not a directory",
        tmp_path / "file" / "x": "Not a directory",
        Path("/proc/x"): "takes no",
    }
    for place, reason in places.items():
        tried = "/proc" if place.parts[1] == "proc" else str(tmp_path / "file")
        with pytest.raises(UserError) as error:
            check_run_folder(recipe(output=str(place)), overwrite=True)
        assert str(error.value).startswith(f"output: {place / 't'} cannot be written: {tried}: {reason}")
        assert "Choose a folder in which you may write, with another output." in str(error.value)
    check_run_folder(recipe(output=str(tmp_path / "new")), overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "nothing is left of the trial"


def test_overwrite_deletes_nothing_but_runs(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    check_run_folder(recipe(output=str(tmp_path)), overwrite=False)  # an empty folder is free
    (tmp_path / "t" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files of something else: no recipe\.yaml"):
        check_run_folder(recipe(output=str(tmp_path)), overwrite=False)
    with pytest.raises(UserError, match=r"--overwrite deletes runs only, and this folder has no recipe\.yaml"):
        check_run_folder(recipe(output=str(tmp_path)), overwrite=True)
    assert (tmp_path / "t" / "thesis.tex").exists()


def test_a_folder_without_an_adapter_says_what_it_holds(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    with pytest.raises(UserError, match=r"no adapter here \(found: no such folder\)"):
        check_adapter_folder(tmp_path / "absent")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"no adapter here \(found: notes\.txt\)"):
        load_adapter(llama, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_settings(tmp_path) is None


# --- memory ----------------------------------------------------------------------------------------------------------


def numbered(advice: str) -> list[str]:
    first, *lines = advice.splitlines()
    assert first == "out of memory. Change, in this order:"
    assert [line.split(".")[0].strip() for line in lines] == [str(n) for n in range(1, len(lines) + 1)]
    return [line.split(". ", 1)[1].split(" ")[0].split("=")[0] for line in lines]


def test_advice_names_what_is_left_to_change_cheapest_first() -> None:
    wasteful = recipe(
        base={"model": "m", "quantization": "none"},
        adapter={"dropout": {"rate": 0.5, "instances": 4, "sampling": "instance"}},
        training={"gradient_checkpointing": False},
        distributed={"zero": 0},
    )
    assert numbered(out_of_memory_advice(wasteful)) == [
        "adapter.dropout.execution",
        "training.per_device_train_batch_size",
        "training.activation_checkpointing",
        "data.max_length",
        "base.quantization",
        "distributed.zero",
        "distributed.offload",
    ]
    frugal = recipe(
        adapter={"dropout": {"rate": 0.5, "instances": 4, "sampling": "instance", "execution": "sequential"}},
        distributed={"zero": 3, "offload": "all"},
    )
    assert numbered(out_of_memory_advice(frugal)) == ["training.per_device_train_batch_size", "data.max_length"]


@pytest.mark.parametrize("where", ["load", "train"])
def test_running_out_of_memory_is_a_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_base: Path, where: str
) -> None:
    """While the base is loaded, or in a step."""

    def exhausted(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if where == "load":
        monkeypatch.setattr("pipeline.train.load_base", exhausted)
    else:
        monkeypatch.setattr(LoraDropoutTrainer, "train", exhausted)
    data = write_rows(tmp_path / "rows.jsonl", random_rows(8, seed=0))
    run = recipe(
        base={"model": str(small_base), "quantization": "none", "dtype": "float32"},
        data={"train": [{"path": str(data)}], "max_length": 128},
        output=str(tmp_path / "outputs"),
        training={"report_to": []},
    )
    with pytest.raises(UserError, match=r"(?s)out of memory\. Change, in this order:.*1\. training\.per_device_train"):
        train(run)
