"""What the tests of the training library share."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging


@pytest.fixture(scope="session")
def small_base(pocket_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of the pocket base, float32 on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("small-base")
    logging.set_verbosity_error()  # the layers that are left out are reported as unused
    model = LlamaForCausalLM.from_pretrained(pocket_base, num_hidden_layers=2, dtype="float32")
    logging.set_verbosity_warning()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pocket_base).save_pretrained(folder)
    return folder


@pytest.fixture
def mask_seed() -> int:
    """Of a statistical test's masks: fresh in every run; ``MASK_SEED=... pytest ...`` repeats one."""
    seed = int(os.environ.get("MASK_SEED", secrets.randbits(62)))
    print(f"MASK_SEED={seed}")
    return seed
