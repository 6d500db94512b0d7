"""Tokenised splits on disk: written aside, synchronised, renamed; recognised as whole by sizes and hashes.

<folder>/
    train.arrow  laid_out.arrow  validation.arrow  probe.arrow   rows, as far as the recipe has them
    entry.json       what they depend on, everything else that is known of them, and size and SHA-256 of each file
    entry.sha256     of entry.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from pipeline.checkpoint.files import sha256_of, synchronise
from pipeline.data.splits import Splits
from pipeline.data.tokenise import LabelStatistics

ENTRY_FILE, CHECKSUM_FILE = "entry.json", "entry.sha256"
ABOUT = "Tokenised training data. Where no training runs the folder may be deleted: the data is tokenised again."


class DamagedEntry(Exception):
    """Why a folder holds no whole entry, in words."""


def write_entry(folder: Path, splits: Splits, depends_on: dict[str, Any]) -> None:
    """Write splits; whatever is there is replaced.

    Args:
        folder: of the entry; its parent exists, and no other process writes to it.
        splits: in memory or anywhere on disk.
        depends_on: of :func:`pipeline.data.cache_key.dependencies`.

    Raises:
        OSError: the disk is full, or cannot be written; nothing is left of what was begun.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that died
        shutil.rmtree(leftover)
    part = folder.with_name(f".{folder.name}.{socket.gethostname()}-{os.getpid()}.part")
    part.mkdir()
    try:
        for name, rows in _datasets(splits).items():
            _write_rows(part / f"{name}.arrow", rows)
        files = sorted(part.iterdir())
        entry = {
            "about": ABOUT,
            "depends_on": depends_on,
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files},
            "statistics": asdict(splits.statistics),
            "dropped": splits.dropped,
            "sources": splits.sources,
            "tokens_sha256": splits.tokens_sha256,
        }
        (part / ENTRY_FILE).write_text(json.dumps(entry, indent=2) + "\n")
        (part / CHECKSUM_FILE).write_text(sha256_of(part / ENTRY_FILE) + "\n")
        for file in (*files, part / ENTRY_FILE, part / CHECKSUM_FILE, part):
            synchronise(file)
        if folder.exists():  # damaged
            shutil.rmtree(folder)
        part.rename(folder)
        synchronise(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_entry(folder: Path) -> Splits | None:
    """What was written, its rows mapped into memory; None where there is nothing. Reads every byte.

    Raises:
        DamagedEntry: what is there is not what was written.
    """
    if not folder.exists():
        return None
    try:
        content = (folder / ENTRY_FILE).read_bytes()
        if hashlib.sha256(content).hexdigest() != (folder / CHECKSUM_FILE).read_text().removesuffix("\n"):
            raise DamagedEntry(f"{ENTRY_FILE} is not what was written")
        entry = json.loads(content)
        for name, expected in entry["files"].items():
            if (folder / name).stat().st_size != expected["bytes"]:
                raise DamagedEntry(f"{name} has {(folder / name).stat().st_size:,} bytes, not {expected['bytes']:,}")
            if sha256_of(folder / name) != expected["sha256"]:
                raise DamagedEntry(f"{name} is not what was written (its SHA-256 differs)")
        rows = {name.removesuffix(".arrow"): datasets.Dataset.from_file(str(folder / name)) for name in entry["files"]}
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedEntry(f"cannot be read ({error})") from error
    return Splits(
        train=rows["train"],
        validation=rows.get("validation"),
        probe=rows.get("probe"),
        statistics=_statistics(entry["statistics"]),
        dropped=entry["dropped"],
        sources=entry["sources"],
        laid_out=rows.get("laid_out", rows["train"]),
        tokens_sha256=entry["tokens_sha256"],
    )


def _datasets(splits: Splits) -> dict[str, datasets.Dataset]:
    """The splits that there are, by file name."""
    rows = {"train": splits.train}
    if splits.laid_out is not splits.train:
        rows["laid_out"] = splits.laid_out
    if splits.validation is not None and splits.probe is not None:
        rows |= {"validation": splits.validation, "probe": splits.probe}
    return rows


def _write_rows(file: Path, rows: datasets.Dataset) -> None:
    """Rows in their order, as an Arrow stream, which can be mapped into memory."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, rows.features.arrow_schema) as stream:
        for batch in rows.with_format("arrow").iter(batch_size=1000):
            stream.write_table(batch)


def _statistics(values: dict[str, Any]) -> LabelStatistics:
    """From JSON, which knows no tuples."""
    tuples = {name: tuple(values[name]) for name in ("length_quantiles", "trained_quantiles")}
    return LabelStatistics(**{**values, **tuples})
