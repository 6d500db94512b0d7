"""The JSON schema for editors is frozen: a key that comes, goes or changes shows here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.schema import schema_text
from pipeline.recipe.json_schema import all_keys, schema_at


def test_the_schema_file_is_current(repository: Path) -> None:
    """If the change is meant: `python launch/schema.py` writes the file anew; commit it with the change."""
    kept = (repository / "pipeline" / "recipe" / "schema.json").read_text()
    assert json.loads(kept) == json.loads(schema_text()), "run `python launch/schema.py` and review the difference"
    assert kept == schema_text(), "only the form differs: run `python launch/schema.py`"


def test_every_key_is_documented() -> None:
    from pipeline.recipe.training import field_schemas

    for key in all_keys():
        schema = schema_at([int(part) if part.isdigit() else part for part in key.split(".")])
        assert schema is not None
        assert schema.get("description"), f"{key} has no docstring"
    assert all(schema["description"] for schema in field_schemas().values())


def test_editors_need_nothing_required_but_know_every_key(repository: Path) -> None:
    schema = json.loads((repository / "pipeline" / "recipe" / "schema.json").read_text())
    assert all("required" not in section for section in [schema, *schema["$defs"].values()])
    assert {"extends", "name", "training"} <= schema["properties"].keys()
    assert schema["properties"]["training"]["additionalProperties"] is False
    assert "deepspeed" not in schema["properties"]["training"]["properties"]


@pytest.mark.parametrize("section", ["Recipe", "Base", "Adapter", "Dropout", "Source", "Data", "Eval"])
def test_docstrings_end_as_sentences(section: str) -> None:
    from pipeline.recipe import schema

    model = getattr(schema, section)
    for name, field in model.model_fields.items():
        assert field.description is None or field.description.rstrip().endswith((".", "`")), f"{section}.{name}"
