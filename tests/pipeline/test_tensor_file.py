"""Files of tensors: whole or not there, and readable as the umask says."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.run.tensor_file import write_tensors


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel writes no file beyond this many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_says_who_reads(tmp_path: Path, mask: int, mode: int) -> None:
    file, tensors = tmp_path / "a.safetensors", {"a": torch.randn(3, 5)}
    with umask(mask):
        write_tensors(file, tensors, {"format": "pt"})
    assert file.stat().st_mode & 0o777 == mode
    assert torch.equal(load_file(file)["a"], tensors["a"])


@pytest.mark.parametrize("replaces", [False, True])
def test_a_disk_that_fills_leaves_what_was_there(tmp_path: Path, replaces: bool) -> None:
    file = tmp_path / "a.safetensors"
    if replaces:
        write_tensors(file, {"a": torch.randn(3)})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with files_up_to(2**16), pytest.raises((OSError, SafetensorError), match="File too large"):
        write_tensors(file, {"a": torch.randn(2**15)})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
