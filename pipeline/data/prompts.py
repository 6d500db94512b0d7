"""Prompt templates: from a row's columns to the text before the completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from pipeline.data.sandbox import BoundedSandbox, rendered
from pipeline.errors import UserError
from pipeline.recipe import schema

# The prompt of the Alpaca data set (tatsu-lab/stanford_alpaca, README, "Data Release"): part of the format, since
# models tuned on it are asked with these very words.
ALPACA = (
    "Below is an instruction that describes a task{% if input %}, paired with an input that provides further context"
    "{% endif %}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n"
    "{% if input %}### Input:\n{{ input }}\n\n{% endif %}"
    "### Response:\n"
)

FORMAT_PROMPTS = {"alpaca": ALPACA, "prompt-completion": "{{ prompt }}"}
OPTIONAL_COLUMNS = {"input"}

_ENVIRONMENT = BoundedSandbox()
RENDERING_ERRORS = (
    jinja2.TemplateError,  # a column that the row lacks, what the sandbox forbids
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template can raise: it holds expressions over whatever the row holds."""


class PromptTemplate:
    """A source's prompt template.

    PromptTemplate(source).render({"instruction": "Add 2 and 3.", "input": ""})
    """

    def __init__(self, source: schema.Source, key: str = "data.train.0") -> None:
        """Compile.

        Args:
            source: its ``prompt``, or the format's own.
            key: recipe key, for messages.

        Raises:
            UserError: a template that is not Jinja2, or more of it than prompts may use (see ``sandbox.py``).
        """
        self.key = f"{key}.prompt"
        try:
            self._template = _ENVIRONMENT.template(source.prompt or FORMAT_PROMPTS[source.format])
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self.key}: not a Jinja2 template: {error.message} (its line {error.lineno})") from error

    def render(self, columns: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            UserError: a column that the row lacks, or that the sandbox forbids.
        """
        try:
            return rendered(self._template, columns)
        except RENDERING_ERRORS as error:
            raise UserError(
                f"{self.key}: cannot be rendered: {error}; the row has the columns {', '.join(sorted(columns))}"
            ) from error
