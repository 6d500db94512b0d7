"""Export a trained adapter: plain, merged into its base, or as the members of its ensemble.

python launch/export.py outputs/pocket                                       a plain peft adapter
python launch/export.py outputs/pocket --form ensemble --instances 8         8 plain peft adapters
python launch/export.py outputs/pocket --form merged                         a 16-bit model
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # python puts launch/ first, where evaluate.py shadows a package

import typer

from launch.command import INTERRUPTED, run_command


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder that launch/sft.py wrote, or peft.")],
    form: Annotated[
        Literal["plain", "merged", "ensemble"],
        typer.Option(help="One plain adapter, a merged 16-bit model, or the ensemble's members as plain adapters."),
    ] = "plain",
    output: Annotated[Path | None, typer.Option(help="Folder to write; ADAPTER-FORM by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Members of the ensemble; the recipe's number, or 8, by default.")
    ] = None,
    balanced: Annotated[
        bool | None,
        typer.Option("--balanced/--independent", help="How members' masks are drawn; the recipe's by default."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of merged weights: bfloat16, float16 or float32; the recipe's by default.")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file of a merged model; 5GB by default.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, where it has moved since training.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload, too; the token is that of HF_TOKEN or `hf auth`.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the Hub repository as private.")] = False,
) -> None:
    """Write ADAPTER in a form that needs nothing of this project."""
    from pipeline.process.environment import prepare_environment

    prepare_environment()
    from pipeline.errors import UserError
    from pipeline.export.run import Options, default_folder
    from pipeline.export.run import export as run
    from pipeline.hub import check_push, push_folder

    if private and push_to_hub is None:
        raise UserError("--private: is about the Hub, and --push-to-hub is not given")
    if push_to_hub is not None:
        check_push(push_to_hub)
    options = Options(form, base, instances, balanced, dtype, max_shard_size)
    try:
        folder = run(adapter, output or default_folder(adapter, form), options, overwrite)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(f"{form} export written to {folder}")
    if push_to_hub is not None:
        print(f"uploaded to {push_folder(folder, push_to_hub, private)}")


if __name__ == "__main__":
    run_command(export)
