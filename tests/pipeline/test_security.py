"""What a recipe, a base, an adapter, a data set or a task of someone else can do: nothing but be refused."""

from __future__ import annotations

import ast
import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eval.tasks import leaf_tasks, load_tasks
from pipeline.adapter.files import load_adapter, read_peft_config
from pipeline.base import hollow_base, load_base, load_config, load_tokenizer
from pipeline.data import PromptTemplate, load_rows
from pipeline.errors import UserError
from pipeline.export.run import written_aside
from pipeline.recipe import Recipe, RecipeError, load_recipe
from pipeline.recipe.schema import Base, Eval, Source
from pipeline.redaction import command_line, redacted
from pipeline.run.folder import check_run_folder, create_run_folder, read_history, run_folder

TOKEN = "hf_" + "aB3dE5" * 6
GOOD = "name: good\nbase: {model: ./base}\ndata: {train: [{path: rows.json}]}\n"


def refusal(action: Callable[[], Any]) -> str:
    """What the user reads."""
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that exists once somebody's code has run."""
    return tmp_path / "sprung"


def pickle_that_springs(trap: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    return pickle.dumps(Bomb())


# --- pickles and code ------------------------------------------------------------------------------------------------

MODULES = {"pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"}
CALLS = {
    *("torch.load", "np.load", "numpy.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("eval", "exec", "os.system", "os.popen"),
}
TRUSTING = {"shell": "True", "weights_only": "False", "allow_pickle": "True", "trust_remote_code": "True"}


def forbidden(node: ast.AST) -> set[str]:
    """What could run code of others, in one node of a file."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names} & MODULES
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]} & MODULES
    if isinstance(node, ast.Call):
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        return {ast.unparse(node.func)} & CALLS | {key for key, value in TRUSTING.items() if named.get(key) == value}
    return set()


def test_no_loader_that_runs_code_is_in_the_source(repository: Path) -> None:
    files = [file for folder in ("pipeline", "eval", "launch") for file in (repository / folder).rglob("*.py")]
    assert len(files) > 100
    found = {file: forbidden(node) for file in files for node in ast.walk(ast.parse(file.read_text()))}
    assert not {file: names for file, names in found.items() if names}
    assert forbidden(ast.parse("torch.load(f, weights_only=False)").body[0].value)  # type: ignore[attr-defined]


def test_a_base_of_pickles_is_refused(pocket_base: Path, tmp_path: Path, trap: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(pocket_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle_that_springs(trap))
    base = Base(model=str(folder), quantization="none")
    for load in (load_config, load_base, hollow_base):
        message = refusal(lambda load=load: load(base))
        assert f"base.model: {folder} has no weights in safetensors, but pytorch_model.bin" in message
        assert "A pickle can run code when it is read" in message and "save_pretrained" in message
    assert not trap.exists()


def test_an_adapter_of_pickles_is_refused(pocket_base: Path, tmp_path: Path, trap: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (folder / "adapter_model.bin").write_bytes(pickle_that_springs(trap))
    model = hollow_base(Base(model=str(pocket_base), quantization="none"))
    message = refusal(lambda: load_adapter(model, folder))
    assert "found: adapter_model.bin, a pickle, which can run code when it is read" in message
    assert not trap.exists()


def test_code_that_a_base_brings_is_not_run(pocket_base: Path, tmp_path: Path, trap: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(pocket_base, folder)
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for load in (load_config, load_base, load_tokenizer, hollow_base):
        message = refusal(lambda load=load: load(Base(model=str(folder), quantization="none")))
        assert "brings Python code of its own, and base.trust_remote_code is false" in message
    assert not trap.exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("unsafe_code: true", "task would run code that the model writes"),
        ("metric_list: [{metric: rouge}]", "task is scored by rouge, for which lm-eval would fetch"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "would fetch code from the Hub"),
        ("dataset_path: SCRIPTED", "Dataset scripts are no longer supported"),
    ],
)
def test_code_that_a_task_brings_is_not_run(tmp_path: Path, trap: Path, line: str, expected: str) -> None:
    (tmp_path / "SCRIPTED").mkdir()
    (tmp_path / "SCRIPTED" / "SCRIPTED.py").write_text(f"open({str(trap)!r}, 'w')")
    (tmp_path / "code.py").write_text(f"open({str(trap)!r}, 'w')\nprocess = None\n")
    function = "" if "SCRIPTED" in line else "process_docs: !function code.process\n"
    (tmp_path / "task.yaml").write_text(
        f"task: task\noutput_type: generate_until\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n{function}"
        + line.replace("SCRIPTED", str(tmp_path / "SCRIPTED"))
        + ("" if "dataset_path" in line else "\ndataset_path: json\n")
    )
    assert expected in refusal(lambda: load_tasks(Eval(tasks=["task"], task_folders=[str(tmp_path)])))
    assert expected in refusal(lambda: load_tasks(Eval(tasks=[str(tmp_path / "task.yaml")])))
    assert not trap.exists()


def test_a_groups_metric_is_looked_at_in_every_task_of_it(tmp_path: Path) -> None:
    """lm-eval lays what a group's file says on each of its tasks."""
    task = "output_type: generate_until\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\ndataset_path: json\n"
    (tmp_path / "task.yaml").write_text(f"task: task\n{task}")
    (tmp_path / "group.yaml").write_text("group: group\ntask: [task]\nmetric_list: [{metric: rouge}]\n")
    (tmp_path / "outer.yaml").write_text("group: outer\ntask: [group]\n")
    for name in ("group", "outer"):
        message = refusal(lambda name=name: load_tasks(Eval(tasks=[name], task_folders=[str(tmp_path)])))
        assert "eval.tasks: task is scored by rouge, for which lm-eval would fetch" in message


def test_a_metric_that_is_never_called_is_not_fetched(
    tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some 750 of lm-eval's multiple-choice tasks name the Hub's f1, but compute theirs."""
    (tmp_path / "f1").mkdir()
    (tmp_path / "f1" / "f1.py").write_text(f"open({str(trap)!r}, 'w')")  # evaluate would run it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps({"a": "1 + 1 =", "b": 1}))
    (tmp_path / "task.yaml").write_text(
        "task: task\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n"
        "doc_to_choice: [three, two]\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}\n"
        "metric_list: [{metric: f1, hf_evaluate: true, aggregation: f1, higher_is_better: true}]\n"
    )
    (task,) = leaf_tasks(load_tasks(Eval(tasks=["task"], task_folders=[str(tmp_path)])))
    assert not trap.exists()
    found = task.process_results({"a": "1 + 1 =", "b": 1}, [(-2.0, False), (-1.0, True)])
    assert found == {"f1": (1, 1)} and task.aggregation()["f1"]([(1, 1), (0, 1)]) == pytest.approx(2 / 3)


def test_a_reader_of_formats_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets would read whatever lies in the working directory."""
    (tmp_path / "secret.txt").write_text("my diary\n")
    monkeypatch.chdir(tmp_path)
    for name in ("text", "json", "pandas", "imagefolder"):
        message = refusal(lambda name=name: load_rows([Source(path=name)]))
        assert f"data.train.0.path: found {name!r}, expected a file, a folder, or a data set of the Hub" in message


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("a: &a [1]\nb: [*a, *a]", "found &a; anchors and aliases are not read"),
        ("a: !!python/object/apply:os.system [id]", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: " + "[" * 4000, "nested more than 20 levels deep"),
        ("a: [" + "1," * 6000 + "]", "more than 5,000 keys, values and list items in all"),
        ("a: " + "x" * 300_000, "expected a recipe of at most 262,144"),
        ("k" * 201 + ": 1", "found a key of 201 characters, expected at most 200"),
        ("seed: 1" + "0" * 18, "seed: found a whole number of 19 digits, expected at most 18"),
        ('output: "\\e[2J"', "output: found the character U+001B, which is not text"),
        ('output: "a\\0b"', "output: found the character U+0000, which is not text"),
        ('"a\\x9bb": 1', "in a key: found the character U+009B, which is not text"),
        ("name: ../../etc/cron.d/x", "name: found the text '../../etc/cron.d/x', expected letters, digits"),
        (f"output: {TOKEN}", "output: found an access token (not shown here)"),
        (f"{TOKEN}: 1", "found an access token (not shown here)"),
        ("training: {hub_token: my-own-secret}", "training.hub_token: not set here (found a secret)"),
        ("api_key: my-own-secret", "api_key: unknown key (found a secret)"),
    ],
)
def test_recipes_are_bounded(tmp_path: Path, added: str, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(line for line in GOOD.splitlines() if line[:5] != added[:5]) + f"\n{added}\n")
    message = refusal(lambda: load_recipe(path))
    assert expected in message and TOKEN not in message and "my-own-secret" not in message
    assert len(message) < 3000


def test_overrides_and_chains_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "0.yaml"
    path.write_text(GOOD)
    for number in range(1, 12):
        (tmp_path / f"{number}.yaml").write_text(f"extends: ./{number - 1}.yaml\nname: n{number}\n")
    assert load_recipe(tmp_path / "9.yaml").name == "n9"
    assert "a chain of more than 10 recipes" in refusal(lambda: load_recipe(tmp_path / "11.yaml"))
    assert "expected key=value" in refusal(lambda: load_recipe(path, ["a." * 3000 + "b=1"]))
    assert "U+DCFF, which is not text" in refusal(lambda: load_recipe(path, ["output=\udcff"]))
    assert TOKEN not in refusal(lambda: load_recipe(path, [f"output={TOKEN}"]))
    assert "File name too long" in refusal(lambda: load_recipe(tmp_path / ("x" * 5000)))


# --- templates -------------------------------------------------------------------------------------------------------

ROW = {"instruction": "Add 2 and 3.", "items": [1, 2, 3], "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m['content'] }}{% endfor %}", "1 user: Hi"),
        ("{% set n = namespace(s=0) %}{% for i in items %}{% set n.s = n.s + i %}{% endfor %}{{ n.s }}", "6"),
        ("{% set q = instruction.strip()|upper %}{{ q ~ ' ' ~ items|join('-') }}", "ADD 2 AND 3. 1-2-3"),
        ("{{ instruction|replace('2', '7') }}{{ items|tojson }}{{ 2 * 3 % 4 }}", "Add 7 and 3.[1, 2, 3]2"),
        ("{{ messages|map(attribute='role')|first }}{{ messages|join(',', attribute='content') }}", "userHi"),
    ],
)
def test_templates_do_what_prompts_need(template: str, text: str) -> None:
    assert PromptTemplate(Source(path="x", prompt=template)).render(ROW) == text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages|map('attr', '__class__')|list }}", "No filter named 'attr'"),
        ("{{ range.__globals__ }}", "access to attribute '__globals__'"),
        ("{{ lipsum.__globals__ }}", "'lipsum' is undefined"),
        ("{{ items.append(4) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% include '/etc/passwd' %}", "include: a prompt takes {{ }}, if, for and set"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "than 1,000,000 rounds"),
        ("{{ 'a' * 10 ** 9 }}", "* takes numbers, of at most 40 digits"),
        ("{{ 10 ** 10 ** 10 ** 10 }}", "** takes numbers, of at most 40 digits"),
        ("{{ '%999999999d' % 1 }}", "% takes numbers"),
        ("{{ 'a'.ljust(10 ** 9) }}", "access to attribute 'ljust' of 'str' object is unsafe"),
        ("{{ 'a'|center(10 ** 9) }}", "No filter named 'center'"),
        ("{% set a = 'ab' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}", "a prompt has at most 4,000,000"),
        ("{% set a = 'ab' %}" + "{% set a = a + a %}" * 40 + "{{ a }}", "a prompt has at most 4,000,000"),
        ("{% set a = '\\\\' %}" + "{% set a = a|tojson %}" * 40 + "{{ a }}", "a prompt has at most 4,000,000"),
        (
            "{% set a = items %}" + "{% set a = [a, a] %}" * 40 + "{{ a }}",
            "set: takes texts, numbers and columns",
        ),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "macro: a prompt takes"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursive: a prompt takes plain loops"),
        ("{% set a = instruction|list|join(instruction) %}" * 2 + "{{ instruction|list|join('x' * 9) }}", "* takes"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "1" * 5000 + " }}", "not a Jinja2 template: Exceeds the limit"),
    ],
)
def test_templates_are_bounded(template: str, expected: str) -> None:
    message = refusal(lambda: PromptTemplate(Source(path="x", prompt=template)).render(ROW))
    assert message.startswith("data.train.0.prompt: ") and expected in message


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_commands_are_recorded_without_secrets() -> None:
    told = command_line(
        [
            *("launch/x.py", f"output={TOKEN}", "--token", "s3cret", "--api-key=s3cret", "a.password=s3cret", "x y"),
            *("https://me:s3cret@host/x", "base.tokenizer=t", "eval.tokens_per_pass=4", "training.pad_token=<pad>"),
        ]
    )
    assert TOKEN not in told and "s3cret" not in told
    for kept in ("launch/x.py", "'x y'", "base.tokenizer=t", "eval.tokens_per_pass=4", "<pad>", "host/x"):
        assert kept in told


def test_messages_lose_tokens_and_the_environment_s_secrets() -> None:
    environment = {"WANDB_API_KEY": "a-secret-without-form", "HOME": "/home/someone", "A_TOKEN": "short"}
    told = redacted(f"401 for {TOKEN} and a-secret-without-form in /home/someone, short", environment)
    assert told == "401 for *** and *** in /home/someone, short"


# --- files -----------------------------------------------------------------------------------------------------------


def made(tmp_path: Path, *overrides: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    return load_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path}/outputs", *overrides])


def test_only_what_a_run_wrote_is_deleted(tmp_path: Path) -> None:
    recipe = made(tmp_path)
    folder = create_run_folder(recipe, {})
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("all of it")
    (folder / "checkpoints").symlink_to(outside)
    (folder / ".status.json.77").write_text("{")  # of a killed process
    check_run_folder(recipe, overwrite=True)
    create_run_folder(recipe, {})
    assert sorted(file.name for file in folder.iterdir()) == ["identity.json", "recipe.yaml"]
    assert (outside / "thesis.tex").read_text() == "all of it"
    (folder / "notes.txt").write_text("mine")
    for overwrite in (True, False):
        message = refusal(lambda overwrite=overwrite: check_run_folder(recipe, overwrite))
        assert f"{folder}: holds notes.txt, which no run wrote" in message
    assert "which no run wrote" in refusal(lambda: create_run_folder(recipe, {}))
    assert (folder / "notes.txt").exists()


def test_a_recipe_kept_where_the_run_would_go_is_not_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "good"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(GOOD)
    recipe = load_recipe(folder / "recipe.yaml", [f"output={tmp_path}/outputs"])
    message = refusal(lambda: check_run_folder(recipe, overwrite=False))
    assert "holds a recipe.yaml without identity.json, which no run wrote" in message


def test_links_are_not_followed_when_a_run_is_deleted(tmp_path: Path) -> None:
    recipe = made(tmp_path)
    real = tmp_path / "elsewhere"
    create_run_folder(recipe, {}).rename(real)
    run_folder(recipe).symlink_to(real)
    assert f"is a link to {real}" in refusal(lambda: check_run_folder(recipe, overwrite=True))
    assert (real / "identity.json").exists()
    shutil.rmtree(real)
    assert f"is a link to {real}, where nothing is" in refusal(lambda: check_run_folder(recipe, overwrite=True))


def test_a_full_disk_ends_an_export_in_words(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "before").touch()

    def fill() -> None:
        with written_aside(folder), open("/dev/full", "w") as full:
            full.write("x")

    message = refusal(fill)
    assert f"{folder}: cannot be written: [Errno 28] No space left on device" in message
    assert "Make room" in message
    assert [file.name for file in tmp_path.iterdir()] == ["export"] and (folder / "before").exists()


def test_an_export_goes_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with written_aside(tmp_path / "link") as part:
        (part / "file").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").exists()


def test_damaged_records_are_told(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    assert "history.jsonl, line 2: not JSON" in refusal(lambda: read_history(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": [], "lora_alpha": 4}')
    assert "r is []; expected a whole number" in refusal(lambda: read_peft_config(tmp_path))
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    assert "not JSON" in refusal(lambda: read_peft_config(tmp_path))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("content", [b"\x80\x04\x95", b"[" * 100_000, b'{"instruction": 1' + b"0" * 9999, b"PAR1PAR1"])
def test_damaged_data_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    message = refusal(lambda: load_rows([Source(path=str(file))]))
    assert message.startswith("data.train.0.path: ") and str(file) in message and len(message) < 1000


@pytest.mark.parametrize("cut", [0, 30])
def test_an_archive_is_not_unpacked(tmp_path: Path, cut: int) -> None:
    """datasets would, into its cache: 2 KB of gzip can hold gigabytes."""
    packed = gzip.compress(b'{"instruction": "' + b"a" * 100_000 + b'"}')
    (tmp_path / "rows.json").write_bytes(packed[: len(packed) - cut])
    message = refusal(lambda: load_rows([Source(path=str(tmp_path / "rows.json"))]))
    assert "rows.json is no .json file, but " in message and message.endswith("unpack it")


def test_a_header_of_absurd_size_is_told(pocket_base: Path, tmp_path: Path) -> None:
    """safetensors says how long its header is; a lie must not be believed."""
    from pipeline.adapter.check import stored_shapes

    file = tmp_path / "adapter_model.safetensors"
    save_file({"a": load_file(pocket_base / "model.safetensors").popitem()[1]}, str(file))
    whole = file.read_bytes()
    for size in (2**62, 2**40, len(whole)):
        file.write_bytes(size.to_bytes(8, "little") + whole[8:])
        assert str(file) in refusal(lambda: stored_shapes(tmp_path))


def test_problems_are_errors_of_the_user(tmp_path: Path) -> None:
    """``RecipeError`` is what ``launch/`` prints without a traceback."""
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "bad.yaml")
