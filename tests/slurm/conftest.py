"""The cluster of these tests; where none can be started they skip, and say why."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from controller import Cluster, missing, started_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes."""
    if why := missing():
        pytest.skip(f"no SLURM controller can be started here: {why}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own are too long for a socket's path
    with started_cluster(folder) as started:
        yield started
    shutil.rmtree(folder)
