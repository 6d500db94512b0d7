"""What is fuzzed: for each target the good files, how they are spoilt, and the functions that read them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from compare_runs import choice_samples, text_samples, word_samples, write_run
from fuzz_cases import (
    BYTE_EDITS,
    NASTY,
    REPOSITORY,
    SCALARS,
    TEXT_EDITS,
    TREE_EDITS,
    VALUES,
    Target,
    edited_bytes,
    edited_text,
    edited_tree,
    edits,
    fitting,
    written,
)
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from eval.compare.run import Declared, compare_adapters
from pipeline.adapter.check import check_adapter
from pipeline.adapter.files import AdapterSettings, save_adapter
from pipeline.base import hollow_base, load_tokenizer
from pipeline.checkpoint.files import write_checkpoint
from pipeline.checkpoint.resume import ANEW, Origin, _check_same, whole_checkpoint
from pipeline.checkpoint.training_state import Progress, read_progress
from pipeline.data import PromptTemplate, load_rows, tokenise
from pipeline.data.splits import content_fingerprint
from pipeline.errors import UserError
from pipeline.export.run import masks_of, read_source
from pipeline.observation.show import exit_status, show_once
from pipeline.observation.status import Status
from pipeline.preflight.checks import examine
from pipeline.recipe import load_recipe, recipe_to_yaml
from pipeline.recipe.json_schema import all_keys, schema_at
from pipeline.recipe.schema import Base, Source
from pipeline.recipe.training import field_schemas, sft_field_names
from pipeline.run.folder import check_run_folder, read_history, read_provenance

RECIPES = ("alpaca.yaml", "pocket/pocket.yaml", "pocket/pocket-lora.yaml", "calibration/calibration.yaml")
POCKET_BASE = REPOSITORY / "recipes" / "pocket" / "base"
KEYS = [*all_keys(), *(f"training.{name}" for name in sft_field_names()), "data.train.1.path", "extends", "a.b", "data"]
OVERRIDES = st.one_of(
    st.tuples(st.sampled_from(KEYS), VALUES).map(lambda pair: f"{pair[0]}={written(pair[1])}"),
    st.tuples(st.text(max_size=12), SCALARS).map(lambda pair: f"{pair[0]}={written(pair[1])}"),
    st.sampled_from(NASTY),
)


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipes(folder: Path) -> Target:
    """Real recipes with their lines, bytes and overrides spoilt."""
    shutil.copytree(REPOSITORY / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("base", "data", "*.json"))

    def read(case: tuple[str, list[Any], list[Any], list[str]]) -> None:
        name, lines, bytes_, overrides = case
        text = edited_text((REPOSITORY / "recipes" / name).read_text(), lines)
        spoilt = folder / "recipes" / Path(name).with_name("spoilt.yaml")
        spoilt.write_bytes(edited_bytes(text.encode(errors="surrogatepass"), bytes_))
        recipe = load_recipe(spoilt, overrides)
        again = folder / "again.yaml"
        again.write_text(recipe_to_yaml(recipe))
        assert load_recipe(again) == recipe, "the resolved recipe is another one"

    some = st.lists(OVERRIDES, max_size=2)
    cases = st.tuples(
        st.sampled_from(RECIPES),
        edits(TEXT_EDITS) | st.just([]),
        st.just([]) | st.just([]) | edits(BYTE_EDITS, most=2),
        st.just([]) | some,
    )
    return Target(cases, read)


def prompts(folder: Path) -> Target:
    """Templates of prompts, on a row with a bit of everything."""
    parts = st.sampled_from(
        [
            *("{{ instruction }}", "{% if input %}", "{% endif %}", "{% for x in items %}", "{% endfor %}", "{{ x }}"),
            *(
                "{{ items|join(instruction) }}",
                "{% set a = instruction %}",
                "{% set a = a ~ a %}",
                "{{ a }}",
                "{{",
                "}}",
            ),
            *(
                "{{ row.__class__ }}",
                "{{ items[9] }}",
                "{{ 1 // 0 }}",
                "{{ 9 ** 99 }}",
                "{{ a + 1 }}",
                "{# ",
                "{% raw %}",
            ),
            *("{{ input|tojson|replace('a', 'bb') }}", "{{ items.append(1) }}", "{{ loop.index }}", "{{ (" * 50),
        ]
    )
    row = {"instruction": 'a "b" \\ {{ c }}', "input": "", "items": [1, [2, None]], "row": {"k": 1.5}, "nothing": None}

    def read(text: str) -> None:
        PromptTemplate(Source(path="rows.json", prompt=text)).render(row)

    return Target(st.lists(parts | st.sampled_from(NASTY) | st.text(max_size=9), max_size=12).map("".join), read)


def check(folder: Path) -> Target:
    """What ``launch/check.py`` says of recipes whose values are wild, but of the right kind."""
    rows = [{"instruction": f"What comes after {n}?", "input": "", "output": f" {n + 1}"} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: spoilt\noutput: {folder}/outputs\nbase: {{model: {POCKET_BASE}, quantization: none}}\n"
        f"data: {{train: [{{path: {folder}/rows.jsonl}}], max_length: 64}}\n"
    )
    schemas = {key: schema_at(key.split(".")) or {} for key in all_keys()}
    schemas |= {f"training.{name}": found for name, found in field_schemas().items()}
    plain = st.sampled_from(sorted(schemas)).flatmap(
        lambda key: fitting(schemas[key]).map(lambda value: f"{key}={written(value)}")
    )

    def read(overrides: Sequence[str]) -> None:
        loaded = load_recipe(recipe, overrides)
        check_run_folder(loaded, overwrite=False)
        found = examine(loaded, 4, 2)
        if found.errors:
            raise UserError("\n".join(found.errors))

    return Target(st.lists(plain, min_size=1, max_size=2), read)


# --- data ------------------------------------------------------------------------------------------------------------

CELLS = st.one_of(st.text(max_size=30), VALUES)
ROWS = st.lists(
    st.fixed_dictionaries({}, optional={"instruction": CELLS, "input": CELLS, "output": CELLS, "extra": VALUES})
    | st.just({"instruction": "Add 2 and 3.", "input": "", "output": "5"}),
    max_size=5,
)


def data(folder: Path) -> Target:
    """Rows in json, jsonl and parquet, in the wrong form, then spoilt."""
    tokenizer = load_tokenizer(Base(model=str(POCKET_BASE)))
    numbers = iter(range(10**9))

    def read(case: tuple[str, list[Any], list[Any], bool]) -> None:
        form, rows, bytes_, all_good = case
        if all_good:
            rows = [{"instruction": "Add 2 and 3.", "input": "", "output": "5"}] * 4
        number = next(numbers)
        if number % 100 == 0:
            shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
        file = folder / f"rows-{number}.{form}"
        file.write_bytes(edited_bytes(_rows_as(form, rows), bytes_))
        try:
            loaded = load_rows([Source(path=str(file))])
            content_fingerprint(loaded)
            tokenise(loaded, tokenizer, 16)
        finally:
            file.unlink()

    spoilt = edits(BYTE_EDITS, most=3)
    return Target(
        st.tuples(st.sampled_from(["json", "jsonl", "parquet"]), ROWS, st.just([]) | spoilt, st.booleans()), read
    )


def _rows_as(form: str, rows: list[dict[str, Any]]) -> bytes:
    if form == "json":
        return json.dumps(rows).encode()
    if form == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    buffer = io.BytesIO()
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, OverflowError, UnicodeError):  # columns of mixed kinds: parquet has none
        texts = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
        table = pa.Table.from_pylist(texts).replace_schema_metadata({"huggingface": json.dumps(rows)})
    try:
        pq.write_table(table, buffer)
    except pa.ArrowException:  # a column without any value
        return b"PAR1"
    return buffer.getvalue()


# --- adapters, runs, results -----------------------------------------------------------------------------------------


def adapters(folder: Path) -> Target:
    """An adapter's four files, as they are read before an evaluation, a question or an export."""
    good = folder / "good"
    good.mkdir()
    base = Base(model=str(POCKET_BASE), quantization="none", dtype="float32")
    model = get_peft_model(hollow_base(base), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    settings = AdapterSettings(rate=0.5, instances=2, sampling="example", rescale=True, alpha=8.0, seed=1)
    weights = {name: torch.ones_like(tensor) for name, tensor in get_peft_model_state_dict(model).items()}
    save_adapter(model, weights, settings, good)
    recipe = load_recipe(
        REPOSITORY / "recipes" / "pocket" / "pocket.yaml", ["adapter.rank=2", "base.quantization=none"]
    )
    (good / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    names = sorted(file.name for file in good.iterdir())

    def read(case: tuple[str, list[Any], list[Any], bool]) -> None:
        name, tree, bytes_, with_recipe = case
        spoilt = folder / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(good, spoilt, ignore=None if with_recipe else shutil.ignore_patterns("recipe.yaml"))
        _spoil(spoilt / name, tree, bytes_)
        source = read_source(spoilt, None)
        check_adapter(source.base, spoilt, masks_of(source))

    cases = st.tuples(st.sampled_from(names), edits(TREE_EDITS), st.just([]) | edits(BYTE_EDITS), st.booleans())
    return Target(cases, read)


def _spoil(file: Path, tree: list[Any], bytes_: list[Any]) -> None:
    """A JSON file's values, the header of a safetensors file, or any file's bytes."""
    if not file.exists():
        return
    content = file.read_bytes()
    if not bytes_ and file.suffix == ".json":
        content = json.dumps(edited_tree(json.loads(content), tree)).encode()
    elif not bytes_ and file.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(edited_tree(json.loads(content[8 : 8 + size]), tree)).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    file.write_bytes(edited_bytes(content, bytes_))


def results(folder: Path) -> Target:
    """Two evaluations, of which one is spoilt, compared."""
    tasks = {"choice": choice_samples(6, 1), "text": text_samples(4, 1), "words": word_samples(4, 1)}
    good = write_run(folder / "good", tasks, "good")
    other = write_run(
        folder / "other", {"choice": choice_samples(6, 2), "text": text_samples(4, 2), "words": word_samples(4, 2)}, "b"
    )
    names = sorted(file.name for file in other.iterdir())
    output = folder / "comparison"

    def read(case: tuple[str, list[Any], list[Any], int]) -> None:
        name, tree, bytes_, line = case
        spoilt = folder / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(other, spoilt)
        file = spoilt / name
        if file.suffix == ".jsonl" and not bytes_:
            lines = file.read_text().splitlines()
            place = line % len(lines)
            lines[place] = json.dumps(edited_tree(json.loads(lines[place]), tree))
            file.write_text("\n".join(lines) + "\n", errors="surrogatepass")
        else:
            _spoil(file, tree, bytes_)
        compare_adapters([str(good), str(spoilt)], Declared(), output)

    cases = st.tuples(
        st.sampled_from([*names, "results.json", "results.json"]),
        edits(TREE_EDITS),
        st.just([]) | st.just([]) | edits(BYTE_EDITS, most=2),
        st.integers(0, 5),
    )
    return Target(cases, read)


def runs(folder: Path) -> Target:
    """What a run leaves in its folder and later commands read."""
    history = [{"step": step, "loss": 1.0 / step, "time": float(step)} for step in range(1, 6)]
    good: dict[str, Any] = {
        "history.jsonl": history,
        "status.json": {**asdict(Status()), "started": "2030-01-01T00:00:00+00:00", "loss": 2.5, "step": 3},
        "ranks/rank-0.json": {
            "rank": 0,
            "host": "h",
            "pid": 1,
            "phase": "training",
            "step": 3,
            "call": "f",
            "time": 1.5,
        },
        "identity.json": {"seed": 1, "data.max_length": 64, "training.max_steps": 3, "rows per optimizer step": 4},
        "provenance.json": {"data": [{"split": "train", "rows": 3}], "processes": 1, "engine": "one process"},
    }
    (folder / "ranks").mkdir()

    def read(case: tuple[str, list[Any], list[Any]]) -> None:
        name, tree, bytes_ = case
        for file, content in good.items():
            changed = edited_tree(content, tree) if file == name else content
            as_lines = isinstance(changed, list) and file == "history.jsonl"
            text = "".join(json.dumps(one) + "\n" for one in changed) if as_lines else json.dumps(changed)
            (folder / file).write_bytes(edited_bytes(text.encode(), bytes_ if file == name else []))
        read_history(folder)
        read_provenance(folder)
        exit_status(show_once([folder], ranks=True, as_json=False))
        show_once([folder], ranks=True, as_json=True)
        _check_same(folder, folder, good["identity.json"], ANEW)

    return Target(st.tuples(st.sampled_from(sorted(good)), edits(TREE_EDITS), st.just([]) | edits(BYTE_EDITS)), read)


def checkpoints(folder: Path) -> Target:
    """The newest of two checkpoints spoilt: the older one must be taken."""
    good = folder / "good"

    def write(part: Path) -> None:
        shutil.copyfile(POCKET_BASE / "config.json", part / "trainer_state.json")
        state = {field.name: 1 for field in dataclass_fields(Progress)}
        (part / "state.json").write_text(json.dumps(state))
        save_file({"master.a": torch.arange(64.0), "exp_avg.a": torch.ones(64)}, str(part / "optimizer.safetensors"))

    for step in (3, 7):
        write_checkpoint(good, step, write)
    names = sorted(file.name for file in (good / "checkpoint-7").iterdir())

    def read(case: tuple[str, list[Any], list[Any]]) -> None:
        name, tree, bytes_ = case
        spoilt = folder / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(good, spoilt)
        file = spoilt / "checkpoint-7" / name
        _spoil(file, tree, bytes_)
        found = whole_checkpoint(Origin({}, 1, source=spoilt))
        same = file.read_bytes() == (good / "checkpoint-7" / name).read_bytes()
        if name != "manifest.json":  # which has no checksum of its own
            assert found == spoilt / ("checkpoint-7" if same else "checkpoint-3"), f"took {found}"
        assert found is not None and read_progress(found).step == 1
        if found.name == "checkpoint-3":
            raise UserError("the older one")

    cases = st.tuples(st.sampled_from([*names, "manifest.json"]), edits(TREE_EDITS), st.just([]) | edits(BYTE_EDITS))
    return Target(cases, read)


# --- commands --------------------------------------------------------------------------------------------------------


def commands(folder: Path) -> Target:
    """Real commands on recipes that cannot be read: exit status 2, no traceback. Those that can be are not run."""
    readable = recipes(folder)

    def read(case: Any) -> None:
        try:
            readable.read(case)
        except UserError:
            name, _, _, overrides = case
            spoilt = folder / "recipes" / Path(name).with_name("spoilt.yaml")
            printable = [text for text in overrides if "\0" not in text and not text.startswith("-")]
            if printable != overrides:
                return
            script = "check.py" if len(str(case)) % 2 else "sft.py"
            command = [sys.executable, str(REPOSITORY / "launch" / script), str(spoilt), *overrides]
            ended = subprocess.run(command, capture_output=True, check=False, cwd=folder)
            said = ended.stderr.decode(errors="replace")
            assert ended.returncode == 2 and "Traceback" not in said, f"{ended.returncode}: {said[-2000:]}"
            raise

    return Target(readable.cases, read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "recipes": recipes,
    "prompts": prompts,
    "check": check,
    "data": data,
    "adapters": adapters,
    "results": results,
    "runs": runs,
    "checkpoints": checkpoints,
    "commands": commands,
}
