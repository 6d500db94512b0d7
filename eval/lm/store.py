"""Finished answers on disk: an evaluation that was ended at any moment goes on where it stopped.

    <folder>/<first digits of the key>/
        settings.json                          what the answers depend on beside the request
        <host>-<process>-<random>.jsonl        one file for each process that computed some

Every process appends to a file of its own, so that many can write at once, on a network file system too, without
locks. A line is trusted if its checksum is right, whatever happened to the file: a line that was cut off, overwritten
or copied from answers of other settings counts as not there. To forget the answers, delete the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from eval.lm.records import GeneratedRecord, RequestRecord, ScoredRecord
from pipeline.errors import UserError

SETTINGS_FILE = "settings.json"
RECORDS: dict[str, type[ScoredRecord] | type[GeneratedRecord]] = {
    "scored": ScoredRecord,
    "generated": GeneratedRecord,
}
_KINDS = {record: kind for kind, record in RECORDS.items()}
_BEGIN, _MIDDLE, _END = b'{"sha256":"', b'","answer":', b"}"
_DIGITS = 64
"""Of a SHA-256 in hexadecimal."""


def request_key(kind: str, *parts: object) -> str:
    """SHA-256 (hexadecimal) of a request.

    Args:
        kind: of request, e.g. ``loglikelihood``.
        *parts: everything else that decides its answer: tokens, or texts; generation arguments; the number of the
            repeat where a request is sampled several times. As JSON takes it (a tuple counts as a list).
    """
    return hashlib.sha256(_canonical([kind, *parts])).hexdigest()


class AnswerStore:
    """Answers of one system with one set of settings.

        store = AnswerStore.open(folder, settings)
        request = request_key("loglikelihood", context_tokens, continuation_tokens)
        record = store.get(request)         # None: compute it
        store.add({request: record, ...})   # a batch at a time: on disk when it returns

    What other processes add after :meth:`open` is not seen.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Read what is there; :meth:`open` also makes the folder.

        Args:
            folder: of these settings.
            key: SHA-256 of the settings, hexadecimal; enters every checksum.
        """
        self.folder = folder
        self.corrupt: list[str] = []
        """Lines that were not trusted: file, line, why. Their requests are computed again."""
        self._key = key
        self._file = folder / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._answers: dict[str, RequestRecord] = {}
        for file in sorted(folder.glob("*.jsonl")):
            self._read(file)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, object]) -> AnswerStore:
        """The answers that were given under the same settings, by whichever process.

        Args:
            folder: of all answers, made where it is missing.
            settings: everything beside a request that decides its answer, as JSON takes it.

        Raises:
            UserError: the folder cannot be written.
        """
        key = hashlib.sha256(_canonical(settings)).hexdigest()
        own = folder / key[:16]
        note = {
            "about": "Finished answers to evaluation requests under these settings. Deleting this folder only means "
            "that they are computed again.",
            "key": key,
            "settings": settings,
        }
        text = json.dumps(note, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        try:
            own.mkdir(parents=True, exist_ok=True)
            partial = own / f"{SETTINGS_FILE}.{secrets.token_hex(4)}.part"
            partial.write_text(text, encoding="utf-8")
            partial.replace(own / SETTINGS_FILE)
        except OSError as error:
            raise _unwritable(own, error) from error
        return cls(own, key)

    def __len__(self) -> int:
        """Finished requests."""
        return len(self._answers)

    def get(self, request: str) -> RequestRecord | None:
        """The answer to a request (of :func:`request_key`); None if it is not finished."""
        return self._answers.get(request)

    def add(self, answers: Mapping[str, RequestRecord]) -> None:
        """Append answers in one write; when this returns they survive the process and the machine.

        A batch of 8 takes 1 ms on a local disk, 0.7 ms of it fsync.

        Raises:
            UserError: the disk is full, or the folder cannot be written any more.
            ValueError: a number is NaN or infinite.
        """
        if not answers:
            return
        lines = b"".join(self._line(request, record) for request, record in answers.items())
        try:
            with self._file.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._answers.update(answers)

    def _line(self, request: str, record: RequestRecord) -> bytes:
        """``{"sha256": <of the key and the bytes of the answer>, "answer": {...}}`` and a newline."""
        answer = _canonical({"request": request, "kind": _KINDS[type(record)], "record": asdict(record)})
        return _BEGIN + self._checksum(answer) + _MIDDLE + answer + _END + b"\n"

    def _checksum(self, answer: bytes) -> bytes:
        return hashlib.sha256(self._key.encode() + answer).hexdigest().encode()

    def _read(self, file: Path) -> None:
        """Take a file's sound lines; note the others."""
        try:
            *lines, rest = file.read_bytes().split(b"\n")
        except OSError as error:
            self.corrupt.append(f"{file}: cannot be read: {error.strerror}")
            return
        for number, line in enumerate(lines, start=1):
            answer = line[len(_BEGIN) + _DIGITS + len(_MIDDLE) : -len(_END)]
            if line == _BEGIN + self._checksum(answer) + _MIDDLE + answer + _END:
                content = json.loads(answer)
                self._answers[content["request"]] = RECORDS[content["kind"]](**content["record"])
            else:
                self.corrupt.append(f"{file}, line {number}: the checksum does not match")
        if rest:
            cut = f"cut off after {len(rest)} bytes (its process was ended while it wrote, or still writes)"
            self.corrupt.append(f"{file}, line {len(lines) + 1}: {cut}")


def _canonical(content: object) -> bytes:
    """JSON that is the same for equal contents; floats in the digits that give the same float again.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: finished answers cannot be kept there: {error.strerror}.\n"
        "Free space, or choose another folder; eval.keep_answers=false evaluates without keeping them (an evaluation "
        "that is ended then starts again from the beginning)."
    )
