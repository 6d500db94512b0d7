"""What all sections of a recipe are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LOCAL_OR_HUB = "local-or-hub"
"""JSON schema format of a string that names a local path or a Hub id.

In a recipe file, a value that starts with ``./`` or ``../`` is relative to that file; on the command line it is
relative to the working directory. ``~/`` is the home folder. Anything else is a path if it exists, else a Hub id.
"""

PathOrHubId = Annotated[str, Field(json_schema_extra={"format": LOCAL_OR_HUB})]


class Contradiction(ValueError):
    """Values that are right one by one, but not together."""

    def __init__(self, *problems: tuple[tuple[str, ...], str]) -> None:
        """Each problem: the dotted keys it concerns, relative to the section that raises, and what to do."""
        self.problems = problems
        super().__init__("; ".join(message for _, message in problems))


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
