"""Answers on disk: exact when they come back, never a wrong one, whatever happens to the files."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.lm.records import GeneratedRecord, RequestRecord, ScoredRecord
from eval.lm.settings import answer_settings, model_identity
from eval.lm.store import SETTINGS_FILE, AnswerStore, request_key
from pipeline.errors import UserError
from pipeline.recipe.schema import Base

SETTINGS = {"base": "pocket", "rate": 0.5, "members": {"seed": 7, "instances": 3}}

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 4096)
scored = st.builds(
    ScoredRecord, st.lists(numbers, max_size=4), st.lists(numbers, max_size=4), st.booleans(), counts, counts, numbers
)
generated = st.builds(
    GeneratedRecord,
    st.text(),
    *[st.lists(numbers, max_size=4)] * 3,
    st.lists(counts, max_size=4),
    numbers,
    numbers,
    counts,
)
answer_sets = st.lists(st.one_of(scored, generated), min_size=1, max_size=6).map(
    lambda records: {request_key("test", number): record for number, record in enumerate(records)}
)


@contextmanager
def scratch() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def some_records(count: int, seed: int) -> dict[str, RequestRecord]:
    draw = random.Random(seed)

    def logprobs(size: int) -> list[float]:
        return [-draw.expovariate(0.3) for _ in range(size)]

    return {
        request_key("loglikelihood", [seed, number]): ScoredRecord(
            logprobs(3), logprobs(3), draw.random() < 0.5, 5, 0, 1e-3
        )
        for number in range(count)
    }


def reopened(folder: Path) -> AnswerStore:
    return AnswerStore.open(folder, SETTINGS)


def answers_of(store: AnswerStore, requests: Any) -> dict[str, RequestRecord | None]:
    return {request: store.get(request) for request in requests}


def only_file(folder: Path) -> Path:
    [file] = folder.glob("*/*.jsonl")
    return file


@settings(max_examples=60, deadline=None)
@given(answers=answer_sets)
def test_records_come_back_bit_for_bit(answers: dict[str, RequestRecord]) -> None:
    with scratch() as folder:
        reopened(folder).add(answers)
        store = reopened(folder)
        found = answers_of(store, answers)
    assert repr(found) == repr(answers)  # repr tells 0.0 from -0.0 and every digit
    assert (len(store), store.corrupt) == (len(answers), [])


def test_lines_are_json() -> None:
    with scratch() as folder:
        answers = some_records(3, 1)
        reopened(folder).add(answers)
        lines = [json.loads(line) for line in only_file(folder).read_text().splitlines()]
    assert [line["answer"]["request"] for line in lines] == list(answers)


@settings(max_examples=60, deadline=None)
@given(answers=answer_sets, data=st.data())
def test_a_file_cut_anywhere_gives_a_beginning_of_the_answers(
    answers: dict[str, RequestRecord], data: st.DataObject
) -> None:
    with scratch() as folder:
        reopened(folder).add(answers)
        file = only_file(folder)
        content = file.read_bytes()
        length = data.draw(st.integers(0, len(content) - 1))
        file.write_bytes(content[:length])
        store = reopened(folder)
    whole = content[:length].count(b"\n")
    assert answers_of(store, list(answers)[:whole]) == dict(list(answers.items())[:whole])
    assert len(store) == whole
    rest = length - (content.rfind(b"\n", 0, length) + 1)
    expected = f"{file}, line {whole + 1}: cut off after {rest} bytes"
    assert [message.startswith(expected) for message in store.corrupt] == ([True] if rest else [])


@settings(max_examples=100, deadline=None)
@given(answers=answer_sets, changes=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_cost_lines_and_never_change_an_answer(
    answers: dict[str, RequestRecord], changes: list[tuple[int, int]]
) -> None:
    with scratch() as folder:
        reopened(folder).add(answers)
        file = only_file(folder)
        content = bytearray(file.read_bytes())
        original = bytes(content)
        for place, flip in changes:
            content[place % len(content)] ^= flip
        file.write_bytes(content)
        store = reopened(folder)
    sound = sum(line in set(bytes(content).split(b"\n")[:-1]) for line in original.split(b"\n")[:-1])
    assert len(store) == sound
    assert all(record in (None, answers[request]) for request, record in answers_of(store, answers).items())
    assert bool(store.corrupt) == (bytes(content) != original)


def test_a_damaged_line_is_named_and_computed_again() -> None:
    with scratch() as folder:
        answers = some_records(5, 2)
        reopened(folder).add(answers)
        file = only_file(folder)
        lines = file.read_bytes().splitlines(keepends=True)
        lines[2] = lines[2].replace(b'"tokens":5', b'"tokens":6')
        file.write_bytes(b"".join(lines))
        store = reopened(folder)
        assert store.corrupt == [f"{file}, line 3: the checksum does not match"]
        lost = list(answers)[2]
        assert store.get(lost) is None
        assert len(store) == 4
        store.add({lost: answers[lost]})
        assert answers_of(reopened(folder), answers) == answers


def test_writers_do_not_see_each_other_and_a_later_reader_sees_all() -> None:
    with scratch() as folder:
        writers = [reopened(folder) for _ in range(3)]
        parts = [some_records(7, seed) for seed in range(3)]
        for number in range(7):
            for writer, part in zip(writers, parts, strict=True):
                request = list(part)[number]
                writer.add({request: part[request]})
        everything = {request: record for part in parts for request, record in part.items()}
        assert [len(writer) for writer in writers] == [7, 7, 7]
        assert answers_of(reopened(folder), everything) == everything
        assert len(list(folder.glob("*/*.jsonl"))) == 3


def write_for_ever(folder: Path, first: int) -> None:
    store = reopened(folder)
    for seed in itertools.count(first, 2):
        store.add(some_records(4, seed))


def test_killed_writers_leave_whole_answers_and_a_reader_meanwhile_sees_only_whole_ones(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # they write files only; importing lm-eval anew would take seconds
    writers = [fork.Process(target=write_for_ever, args=(tmp_path, first)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    try:
        seen = 0
        while seen < 400:
            store = reopened(tmp_path)
            seen = len(store)
            assert all("cut off" in message for message in store.corrupt), store.corrupt
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    store = reopened(tmp_path)
    assert all("cut off" in message for message in store.corrupt)
    expected: dict[str, RequestRecord] = {}
    for seed in range(2 * len(store)):
        expected |= some_records(4, seed)
    found = {request: record for request in expected if (record := store.get(request)) is not None}
    assert len(found) == len(store) >= seen
    assert found == {request: expected[request] for request in found}


def test_other_settings_have_other_answers_even_where_files_are_copied() -> None:
    with scratch() as folder:
        answers = some_records(2, 3)
        reopened(folder).add(answers)
        other = AnswerStore.open(folder, {**SETTINGS, "rate": 0.25})
        assert len(other) == 0
        copied = other.folder / "copied.jsonl"
        copied.write_bytes(next(reopened(folder).folder.glob("*.jsonl")).read_bytes())
        other = AnswerStore.open(folder, {**SETTINGS, "rate": 0.25})
        assert (len(other), len(other.corrupt)) == (0, 2)


def test_settings_stand_beside_the_answers_in_words() -> None:
    with scratch() as folder:
        store = reopened(folder)
        note = json.loads((store.folder / SETTINGS_FILE).read_text())
        assert note["settings"] == SETTINGS
        assert "Deleting this folder" in note["about"]
        reordered = dict(reversed(SETTINGS.items()))
        assert AnswerStore.open(folder, reordered).folder == store.folder
        assert sorted(file.name for file in store.folder.iterdir()) == [SETTINGS_FILE]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_never_kept(bad: float) -> None:
    with scratch() as folder:
        store = reopened(folder)
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.add({"r": ScoredRecord([bad], [-1.0], True, 1, 0, 0.0)})
        assert len(reopened(folder)) == 0


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/.*: finished answers cannot be kept there: Not a directory"):
        reopened(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the device that is always full")
def test_a_full_disk_is_told_in_words(tmp_path: Path) -> None:
    store = reopened(tmp_path)
    store._file.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"(?s)No space left on device.*keep_answers=false"):
        store.add(some_records(1, 4))


parts = st.recursive(
    st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@given(first=st.lists(parts, max_size=3), second=st.lists(parts, max_size=3))
def test_keys_are_equal_only_for_equal_requests(first: list[Any], second: list[Any]) -> None:
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (request_key("kind", *first) == request_key("kind", *second)) == same
    assert request_key("other", *first) != request_key("kind", *first)


def test_the_border_between_prompt_and_continuation_is_part_of_the_key() -> None:
    assert request_key("loglikelihood", [1, 2], [3]) != request_key("loglikelihood", [1], [2, 3])
    assert request_key("loglikelihood", (1, 2), [3]) == request_key("loglikelihood", [1, 2], [3])


def settings_text(folder: Path, adapter: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "base": Base(model=str(folder)),
        "adapters": [adapter],
        "members": {"kind": "masks", "seed": 7, "instances": 8},
        "computing": {"mode": "fast", "max_length": 512},
        "device": torch.device("cpu"),
        **changes,
    }
    return json.dumps(answer_settings(**arguments), sort_keys=True)


def test_settings_change_with_everything_that_changes_an_answer(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, name in [(base, "model.safetensors"), (adapter, "adapter_model.safetensors")]:
        folder.mkdir()
        (folder / name).write_bytes(os.urandom(100))
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 8}')
    seen = {settings_text(base, adapter)}
    assert settings_text(base, adapter) in seen

    def changed(**changes: Any) -> None:
        found = settings_text(base, adapter, **changes)
        assert found not in seen
        seen.add(found)

    changed(base=Base(model=str(base), dtype="float32"))
    changed(adapters=[])
    changed(members={"kind": "masks", "seed": 8, "instances": 8})
    changed(computing={"mode": "exact", "max_length": 512, "batch_size": 4})
    for file in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
        content = bytearray(file.read_bytes())
        content[50] ^= 1
        file.write_bytes(content)
        changed()
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 9}')
    changed()
    (base / "README.md").write_text("words")
    assert settings_text(base, adapter) in seen


def test_large_files_are_known_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.lm.settings.HASHED_BYTES", 10)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"0" * 11)
    first = model_identity(str(tmp_path), "main")
    os.utime(shard, ns=(1, 1))
    assert model_identity(str(tmp_path), "main") != first


def test_a_base_from_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_identity("nobody/nothing", "main") == {"hub": "nobody/nothing", "commit": "main"}
    repository = tmp_path / "models--nobody--something"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_identity("nobody/something", "main") == {"hub": "nobody/something", "commit": commit}
