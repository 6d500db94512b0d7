"""The state of Python's, NumPy's and torch's random generators as JSON, one entry per rank.

Masks and the order of the data need none of it: both are functions of the seed and of where the run stands. What does
is peft's own dropout and NEFTune's noise.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def random_state() -> dict[str, Any]:
    """Of this process; of CUDA, its own device. Large states as base64 of their bytes, little-endian 32-bit words."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    state = {
        "python": [version, _text(np.array(numbers, dtype="<u4")), gauss],
        "numpy": [kind, _text(keys.astype("<u4")), position, has_gauss, cached],
        "torch": _text(torch.random.get_rng_state().numpy()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.random.get_rng_state().numpy())
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators of this process back to :func:`random_state`'s."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(_words(numbers).tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, _words(keys), *rest))
    torch.random.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.random.set_rng_state(_bytes(state["cuda"]))


def _text(state: npt.NDArray[Any]) -> str:
    return base64.b64encode(state.tobytes()).decode()


def _words(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(base64.b64decode(text), dtype="<u4").astype(np.uint32)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
