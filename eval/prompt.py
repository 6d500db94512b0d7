"""The prompt that training put before a completion, around other text."""

from __future__ import annotations

from pipeline.data import PromptTemplate
from pipeline.recipe import Recipe


class TrainingPrompt:
    """The template of the first training source."""

    def __init__(self, recipe: Recipe) -> None:
        """Compile it. Raises UserError where it is not Jinja2."""
        self._columns = recipe.data.train[0].columns
        self._template = PromptTemplate(recipe.data.train[0])

    def render(self, instruction: str, context: str = "") -> str:
        """The prompt.

        Args:
            instruction: fills the format's ``instruction`` or ``prompt``, under the source's own column name too.
            context: fills ``input``, likewise.

        Raises:
            UserError: the template needs other columns.
        """
        columns = {"instruction": instruction, "prompt": instruction, "input": context}
        own = {name: columns[wanted] for wanted, name in self._columns.items() if wanted in columns}
        return self._template.render({**columns, **own})
