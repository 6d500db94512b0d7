"""Write the recipe's JSON schema, for editors.

python launch/schema.py

Editors with YAML support complete and check a recipe that begins with
`# yaml-language-server: $schema=../pipeline/recipe/schema.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command

SCHEMA_FILE = Path(__file__).resolve().parents[1] / "pipeline" / "recipe" / "schema.json"


def schema_text() -> str:
    """The file's content: every key with its type, limits, default and words; SFTConfig's fields are trl's."""
    import json

    from pipeline.recipe.json_schema import editor_schema
    from pipeline.recipe.training import field_schemas

    return json.dumps(editor_schema(field_schemas()), indent=2) + "\n"


def schema(
    output: Annotated[Path, typer.Option("--output", help="Where to write it.")] = SCHEMA_FILE,
) -> None:
    """Write the JSON schema of recipes, from the schema in pipeline/recipe and the installed trl."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    from pipeline.errors import UserError

    try:
        with output.open("a"):  # before trl is loaded
            pass
        output.write_text(schema_text())
    except OSError as error:
        raise UserError(
            f"--output: {output} cannot be written: {error.strerror}.\n"
            "Name a file in a folder that exists and in which you may write."
        ) from error
    print(f"wrote {output}")


if __name__ == "__main__":
    run_command(schema)
