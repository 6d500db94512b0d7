"""Messages can be printed and logged, whatever they quote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.resume import ANEW, _check_same
from pipeline.errors import UserError


@given(st.text(st.characters()))
def test_text_stays_as_it_is_and_all_else_is_escaped(message: str) -> None:
    said = str(UserError(message))
    assert said.encode().decode() == said
    halves = any("\ud800" <= character <= "\udfff" for character in message)
    assert (said == message) is not halves


def test_half_a_character_in_a_runs_identity_is_told(tmp_path: Path) -> None:
    (tmp_path / "identity.json").write_text(json.dumps({"seed": 1, "a\udd29": 2}))
    with pytest.raises(UserError, match=r"a\\udd29: 2 there, nothing here") as caught:
        _check_same(tmp_path, tmp_path, {"seed": 1}, ANEW)
    str(caught.value).encode()
