"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as pipeline.process.environment does, before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face import: no test may reach the network

# a run of the suite finds what the one before found; `pytest --hypothesis-profile=search` looks for new cases
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "search",
    settings.get_profile("suite"),
    derandomize=False,
    max_examples=1000,
    database=DirectoryBasedExampleDatabase(".hypothesis"),
)
settings.load_profile("suite")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two workers, which take whole files in this order, then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenised data of this session's tests, not the user's; processes that tests start inherit it."""
    folder = tmp_path_factory.mktemp("token-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DROPOUT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and bases that are too large or not licensed to ship; tests that need them skip where absent."""
    folder = Path(os.environ.get("LORA_DROPOUT_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "base" / "books7M").is_dir():
        pytest.skip(f"no {folder}: set LORA_DROPOUT_SHARED to a folder with base/, data/ and corpus/")
    return folder


@pytest.fixture(scope="session")
def pocket_base(repository: Path) -> Path:
    """The small LLaMA base that the repository ships."""
    return repository / "recipes" / "pocket" / "base"
