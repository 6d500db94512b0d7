"""Data that is tokenised once and read many times: the same rows, whatever happens to the files or the processes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from filelock import FileLock
from training_support import random_rows, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.data import Splits, cache, cached_splits, load_splits
from pipeline.data.cache_key import dependencies, key_of
from pipeline.data.splits import token_fingerprint
from pipeline.errors import UserError
from pipeline.recipe import Recipe

LONG = "word " * 600
"""Fills data.max_length by itself."""
WORKER = Path(__file__).with_name("data_cache_worker.py")


@pytest.fixture(scope="module")
def tokenizer(pocket_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket_base)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("LORA_DROPOUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recipe(base: Path, file: Path, training: dict[str, Any] | None = None, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "base": {"model": str(base)},
            "data": {"train": [{"path": str(file)}], "max_length": 128, **data},
            "training": training or {},
        }
    )


def content(splits: Splits) -> dict[str, Any]:
    """All that there is to compare, column types with it."""

    def columns(rows: datasets.Dataset | None) -> Any:
        return None if rows is None else (str(rows.features), rows.to_dict())

    return {**vars(splits), **{n: columns(getattr(splits, n)) for n in ("train", "validation", "probe", "laid_out")}}


def entry(kept: Path) -> Path:
    """The one that is there."""
    (found,) = kept.glob("*/rows")
    return found


@pytest.mark.parametrize(
    ("training", "validation"),
    [({}, "source"), ({"packing": True}, "fraction"), ({"padding_free": True}, "none")],
    ids=["padded", "packed", "flat"],
)
def test_it_changes_nothing(
    pocket_base: Path,
    tmp_path: Path,
    kept: Path,
    tokenizer: PreTrainedTokenizerBase,
    training: dict[str, Any],
    validation: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    seed = random.randrange(1000)
    rows = random_rows(500, seed, longest=3)
    rows[17]["instruction"] = "word " * 130  # fills max_length by itself: dropped
    train = write_rows(tmp_path / "train.jsonl", rows)
    other = write_rows(tmp_path / "other.jsonl", random_rows(9, seed + 1))
    held_out = {"none": None, "fraction": {"fraction": 0.2}, "source": {"source": {"path": str(other)}}}[validation]
    asked = recipe(pocket_base, train, training, validation=held_out)
    plain = load_splits(asked, tokenizer)
    cold = cached_splits(asked, tokenizer)
    assert capfd.readouterr().out.count("tokenising the data on") == 1
    warm = cached_splits(asked, tokenizer)
    assert capfd.readouterr().out == ""
    assert content(plain) == content(cold) == content(warm)
    assert any(17 in dropped for dropped in warm.dropped.values())
    assert warm.train.cache_files[0]["filename"].startswith(str(kept))  # mapped, not read into memory
    assert {file.name for file in entry(kept).parent.iterdir()} == {"rows", "lock"}


def damage_of(kind: str, folder: Path, draw: random.Random) -> None:
    """Do to one of the entry's files what disks do."""
    file = draw.choice(sorted(folder.iterdir()))
    whole = file.read_bytes()
    place = draw.randrange(len(whole))
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(whole[:place])
    else:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])


def test_a_damaged_entry_is_recognised_and_done_again(
    pocket_base: Path, tmp_path: Path, kept: Path, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    train = write_rows(tmp_path / "train.jsonl", random_rows(30, seed=1))
    asked = recipe(pocket_base, train, {"packing": True}, validation={"fraction": 0.2})
    whole = content(cached_splits(asked, tokenizer))
    for kind in ["gone", "cut", *["flipped"] * 3]:
        damage_of(kind, entry(kept), draw)
        capfd.readouterr()
        assert content(cached_splits(asked, tokenizer)) == whole, (seed, kind)
        said = capfd.readouterr().out
        assert "the data is tokenised again" in said and said.count("tokenising the data on") == 1, (seed, kind, said)
    assert content(cached_splits(asked, tokenizer)) == whole
    assert len(list(entry(kept).parent.iterdir())) == 2  # no leftovers


def test_the_key_is_of_everything_that_changes_tokens(
    pocket_base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = random_rows(30, seed=2)
    train = write_rows(tmp_path / "train.jsonl", rows)
    asked = recipe(pocket_base, train)

    def key(other: Recipe, by: PreTrainedTokenizerBase = tokenizer) -> str:
        return key_of(dependencies(other, by))

    first = key(asked)
    assert first == key(asked.model_copy(update={"name": "other", "output": "elsewhere"}))
    assert first == key(recipe(pocket_base, train, {"learning_rate": 1e-5, "per_device_train_batch_size": 2}))
    source = {"path": str(train)}
    keys = [
        first,
        key(recipe(pocket_base, train, max_length=129)),
        key(asked.model_copy(update={"seed": 1})),
        key(recipe(pocket_base, train, validation={"fraction": 0.1})),
        key(recipe(pocket_base, train, train=[{**source, "limit": 29}])),
        key(recipe(pocket_base, train, train=[{**source, "prompt": "{{ instruction }}"}])),
        key(recipe(pocket_base, train, train=[{**source, "columns": {"instruction": "input"}}])),
        key(recipe(pocket_base, train, train=[source, source])),
        key(recipe(pocket_base, train, {"packing": True})),
        key(recipe(pocket_base, train, {"padding_free": True})),
    ]
    other = AutoTokenizer.from_pretrained(pocket_base)
    other.add_tokens(["zzz"])
    keys.append(key(asked, other))
    rows[29]["output"] += "x"
    status = train.stat()
    write_rows(train, rows)
    os.utime(train, ns=(status.st_atime_ns, status.st_mtime_ns))  # content counts, not when it was written
    keys.append(key(asked))
    assert len(set(keys)) == len(keys)


def test_the_token_fingerprint_is_of_ids_labels_rows_and_their_order() -> None:
    draw = random.Random(random.randrange(10**6))

    def numbers(least: int) -> list[int]:
        return [draw.randrange(-100, 32000) for _ in range(draw.randint(least, 9))]

    rows = [
        {"input_ids": ids, "labels": ids[::-1], "row": row} for row, ids in enumerate(numbers(1) for _ in range(2500))
    ]
    whole = datasets.Dataset.from_list(rows)
    expected = token_fingerprint(whole)
    indices = list(range(len(rows)))
    draw.shuffle(indices)
    places = [indices.index(index) for index in range(len(rows))]
    assert token_fingerprint(whole.select(indices).select(places)) == expected  # wherever the rows lie on disk
    changed = [whole.select(indices), whole.select(range(2499))]
    for name in ("input_ids", "labels", "row"):
        other = [dict(row) for row in rows]
        other[1234][name] = 7 if name == "row" else [*rows[1234][name][:-1], rows[1234][name][-1] + 1]
        changed.append(datasets.Dataset.from_list(other))
    moved = [dict(row) for row in rows]  # one token from a row to the next
    for name in ("input_ids", "labels"):
        moved[5][name], moved[6][name] = rows[5][name] + rows[6][name][:1], rows[6][name][1:]
    changed.append(datasets.Dataset.from_list(moved))
    assert len({expected, *map(token_fingerprint, changed)}) == 1 + len(changed)


def test_data_that_changes_while_it_is_read_is_not_kept(
    pocket_base: Path, tmp_path: Path, kept: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_rows(tmp_path / "train.jsonl", random_rows(9, seed=3))

    def slow(*arguments: Any) -> Splits:
        splits = load_splits(*arguments)
        write_rows(train, random_rows(10, seed=3))
        return splits

    monkeypatch.setattr(cache, "load_splits", slow)
    with pytest.raises(UserError, match="a source changed while it was read"):
        cached_splits(recipe(pocket_base, train), tokenizer)
    assert not list(kept.glob("*/rows"))
    monkeypatch.setattr(cache, "load_splits", load_splits)
    assert len(cached_splits(recipe(pocket_base, train), tokenizer).train) == 10


def test_what_nobody_used_for_a_month_is_deleted_and_what_is_held_is_not(
    pocket_base: Path, tmp_path: Path, kept: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    files = [write_rows(tmp_path / f"{number}.jsonl", random_rows(5, seed=number)) for number in range(4)]
    places = []
    for file in files[:3]:
        cached_splits(recipe(pocket_base, file), tokenizer)
        places += [place for place in kept.iterdir() if place not in places]
    old = time.time() - 31 * 24 * 3600
    for place in places:
        os.utime(place / "lock", (old, old))
    cached_splits(recipe(pocket_base, files[0]), tokenizer)  # a use
    with FileLock(places[1] / "lock"):
        cached_splits(recipe(pocket_base, files[3]), tokenizer)
    left = [place.exists() for place in places]
    assert left == [True, True, False] and len(list(kept.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_told(
    pocket_base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_DROPOUT_CACHE", str(tmp_path / "file" / "cache"))
    train = write_rows(tmp_path / "train.jsonl", random_rows(5, seed=4))
    with pytest.raises(UserError, match=r"file/cache: tokenised data cannot be kept there: Not a directory") as error:
        cached_splits(recipe(pocket_base, train), tokenizer)
    assert "LORA_DROPOUT_CACHE" in str(error.value)


@pytest.fixture(scope="module")
def scenes(pocket_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes found, by scene of the worker."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = random_rows(400, seed=5)
    files = {
        "kill": write_rows(folder / "kill.jsonl", rows),
        "all": write_rows(folder / "all.json", rows),  # the same rows in another file
        "mistake": write_rows(
            folder / "empty.jsonl", [*rows[:40], *[{**row, "instruction": LONG} for row in rows[:20]]]
        ),
    }
    (folder / "cache").mkdir()
    process = subprocess.run(
        [sys.executable, str(WORKER), str(pocket_base), *(f"{scene}={file}" for scene, file in files.items())],
        env={
            **os.environ,
            "LORA_DROPOUT_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return dict(zip(files, json.loads(process.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
def test_of_four_processes_one_does_the_work(scenes: dict[str, Any]) -> None:
    told = scenes["all"]
    assert told["tokenised"] == 1 and len(told["ends"]) == 4 and len(set(told["ends"].values())) == 1, told


@pytest.mark.slow
def test_where_it_is_killed_another_does_it(scenes: dict[str, Any]) -> None:
    told = scenes["kill"]
    assert told["tokenised"] == 2, told
    assert len(told["ends"]) == 3 and str(told["killed"]) not in told["ends"]
    assert set(told["ends"].values()) == set(scenes["all"]["ends"].values())


@pytest.mark.slow
def test_rank_0_tells_what_is_wrong_with_the_data(scenes: dict[str, Any]) -> None:
    """Found by whoever is first, told by rank 0, which ends first; a launcher then ends the others."""
    told = scenes["mistake"]
    assert list(told["ends"]) == ["0"] and "20 of 60 rows have no trained token" in told["ends"]["0"], told
    assert 1 <= told["tokenised"] <= 4  # whoever comes after it was found looks anew


def test_the_fingerprint_of_the_sources_is_that_of_their_text(
    pocket_base: Path, tmp_path: Path, kept: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "a b", "completion": "c"}]
    train = write_rows(tmp_path / "train.jsonl", rows)
    source = [{"path": str(train), "format": "prompt-completion"}]
    splits = cached_splits(recipe(pocket_base, train, train=source), tokenizer)
    parts = [text.encode() for text in rows[0].values()]
    by_hand = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()
    assert splits.sources[0]["sha256"] == by_hand
