"""Ask a trained adapter, in the prompt it was trained with.

python launch/ask.py outputs/llama2-7b-alpaca-nf4 "Name three rivers."
python launch/ask.py outputs/llama2-7b-alpaca-nf4                        asks for questions; one per line from a pipe
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import run_command
from pipeline.errors import UserError


def questions(prompt: str | None) -> Iterator[str]:
    """The one question, or those typed at a prompt, or the lines of a pipe; until Ctrl-D or Ctrl-C."""
    if prompt is not None:
        yield prompt
        return
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  line editing and history for input()

    print("Ask; Ctrl-D ends.")
    try:
        while True:
            if question := input("\n> ").strip():
                yield question
    except (EOFError, KeyboardInterrupt):
        print()


def ask(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder that launch/sft.py wrote.")],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Without it, asks for questions.")] = None,
    ensemble: Annotated[
        bool | None,
        typer.Option(
            "--ensemble/--deterministic",
            help="Ensemble over masks, or masks off. Default: ensemble, where trained with LoRA Dropout.",
            show_default=False,
        ),
    ] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Members of the ensemble; the recipe's number by default.")
    ] = None,
    average: Annotated[
        Literal["logits", "probabilities"] | None,
        typer.Option(help="What is averaged over the members at every token; the recipe's by default."),
    ] = None,
    context: Annotated[str, typer.Option("--input", metavar="TEXT", help="The input that the question is about.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling; the masks are the adapter's own.")] = 0,
    base: Annotated[str | None, typer.Option(help="Base model, where it has moved since training.")] = None,
) -> None:
    """Answer with a trained adapter, streamed, and say how sure it was."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    import torch
    from transformers.utils.logging import disable_progress_bar

    from eval.answer import load_answerer, question_prompt

    disable_progress_bar()
    answerer = load_answerer(adapter, ensemble, instances, average, base)
    print(answerer.in_words(), file=sys.stderr)
    torch.manual_seed(seed)
    for question in questions(prompt):
        try:
            sure = answerer.answer(question_prompt(answerer.recipe, question, context), max_new_tokens, temperature)
            print(f"[{sure.in_words()}]", flush=True)
        except UserError as error:
            if prompt is not None or not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)  # a conversation goes on


if __name__ == "__main__":
    run_command(ask)
