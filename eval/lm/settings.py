"""What an answer depends on beside its request: the key of the answers on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from eval.lm.store import RECORDS
from pipeline.adapter.files import CONFIG_FILE, WEIGHTS_FILE
from pipeline.recipe import schema

HASHED_BYTES = 64 * 2**20
"""Files up to this size are known by their content, larger ones by size and time of change: the shards of a 7B model
take a minute to read over a network."""
PACKAGES = ("lora-dropout", "torch", "transformers", "peft", "bitsandbytes", "lm-eval", "tokenizers")
ROOT = Path(__file__).resolve().parents[2]
CODE = ("eval/lm", "pipeline/lora_dropout", "pipeline/adapter", "pipeline/base.py")
"""Our own code that an answer goes through; a change of it makes older answers strangers."""


def answer_settings(
    base: schema.Base,
    adapters: Sequence[Path],
    members: Mapping[str, object] | None,
    computing: Mapping[str, object],
    device: torch.device,
) -> dict[str, object]:
    """Everything beside a request that decides its answer, for :meth:`eval.lm.store.AnswerStore.open`.

    Args:
        base: it has been loaded already (a base from the Hub is looked up in the local cache).
        adapters: folders; none for the base alone.
        members: of the ensemble: kind, number, average, masks (seed, rates, pattern, balanced); None for one model.
        computing: how: mode, the context's length, and what else changes an answer, in mode exact the batch size.
        device: the model's.
    """
    return {
        "base": {
            **base.model_dump(),
            "model": model_identity(base.model, base.revision),
            "tokenizer": model_identity(base.tokenizer, base.revision) if base.tokenizer else None,
        },
        "adapters": [{name: _sha256(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)} for folder in adapters],
        "members": None if members is None else dict(members),
        "computing": dict(computing),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {package: version(package) for package in PACKAGES},
        "code": CODE_IDENTITY,
        "records": {kind: [field.name for field in fields(record)] for kind, record in RECORDS.items()},
    }


def model_identity(name: str, revision: str) -> dict[str, object]:
    """A model's files: of a folder what they hold, of the Hub its commit.

    Args:
        name: folder or Hub id.
        revision: of the Hub id.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
        return {"files": {file.name: _file_identity(file) for file in files if file.suffix != ".md"}}
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    commit = Path(cached).parent.name if isinstance(cached, str) else revision
    return {"hub": name, "commit": commit}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def code_identity() -> str:
    """SHA-256 of the sources in :data:`CODE`."""
    sources = [source for place in CODE for source in sorted((ROOT / place).rglob("*.py")) or [ROOT / place]]
    return hashlib.sha256("".join(_sha256(source) for source in sources).encode()).hexdigest()


CODE_IDENTITY = code_identity()
"""Of the code that runs: taken when it is imported, for files may change while it does."""


def _file_identity(file: Path) -> str:
    status = file.stat()
    if status.st_size <= HASHED_BYTES:
        return _sha256(file)
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"
