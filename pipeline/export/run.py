"""An adapter for use without this project: as it is, merged into its base, or as the members of its ensemble.

The three forms, each a folder with a model card and a ``manifest.json`` that ties it to the adapter it came from:

- *plain*: peft's own files. Equation 2 without its scale (``rescale: false``) is already folded into alpha.
- *merged*: a model of its own in 16 bits, sharded.
- *ensemble*: ``member-0`` to ``member-<N-1>``, each a plain adapter.

The base's weights are read for a merge only; the others know its layers from its configuration.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError

from pipeline.adapter.check import check_adapter, why_unmasked
from pipeline.adapter.files import (
    CONFIG_FILE,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    AdapterSettings,
    read_peft_config,
    read_settings,
)
from pipeline.base import DTYPES, load_tokenizer
from pipeline.errors import UserError
from pipeline.export.manifest import MANIFEST_FILE, Form, read_manifest
from pipeline.export.members import MemberWriter
from pipeline.export.merge import check_mergeable, check_shard_size, merge_type, merged_model
from pipeline.preflight.estimate import in_words
from pipeline.recipe import Recipe, load_recipe, schema
from pipeline.run.folder import RECIPE_FILE, check_writable, read_history, read_provenance
from pipeline.run.model_card import rates_in_words, write_export_card
from pipeline.run.provenance import git_state, now, versions
from pipeline.run.whole_file import write_json

AVERAGES = {
    "logits": "at every token, the mean of the members' logits in float32, then one softmax",
    "probabilities": "at every token, the mean of the members' probabilities, each by its own softmax in float32",
}
CONTAINER_ROOM = 1.05
"""Of the files' size: the tokenizer, headers and texts beside the weights."""


@dataclass(frozen=True)
class Options:
    """What the user asks for. None is the recipe's own, or none needed."""

    form: Form = "plain"
    base: str | None = None
    """Where the base is now."""
    instances: int | None = None
    balanced: bool | None = None
    dtype: str | None = None
    max_shard_size: str | None = None

    def check(self) -> None:
        """Raise ``UserError`` for an option that the form has no use for, or a value that cannot be read."""
        uses = {"--instances": "ensemble", "--balanced": "ensemble", "--dtype": "merged", "--max-shard-size": "merged"}
        values = (self.instances, self.balanced, self.dtype, self.max_shard_size)
        for (option, form), value in zip(uses.items(), values, strict=True):
            if value is not None and form != self.form:
                raise UserError(f"{option}: belongs to --form {form}, found --form {self.form}, where it has no effect")
        if self.max_shard_size is not None:
            check_shard_size(self.max_shard_size)


@dataclass(frozen=True)
class Source:
    """The adapter that is exported, and what is known of it."""

    folder: Path
    settings: AdapterSettings | None
    recipe: Recipe | None
    base: schema.Base

    @property
    def name(self) -> str:
        """Of the run, or of the folder."""
        return self.folder.name if self.recipe is None else self.recipe.name

    def ensemble(self, options: Options) -> schema.Ensemble:
        """The recipe's ensemble, with the options on top."""
        known = schema.Ensemble() if self.recipe is None else self.recipe.eval.ensemble
        asked = {"instances": options.instances, "balanced": options.balanced}
        return known.model_copy(update={key: value for key, value in asked.items() if value is not None})


def read_source(folder: Path, base: str | None) -> Source:
    """The adapter in a folder, with its recipe where it has one.

    Raises:
        UserError: no adapter; its base is not known.
    """
    settings, peft = read_settings(folder), read_peft_config(folder)
    recipe = None
    if (folder / RECIPE_FILE).exists():
        recipe = load_recipe(folder / RECIPE_FILE, [] if base is None else [f"base.model={json.dumps(base)}"])
        return Source(folder, settings, recipe, recipe.base)
    name = base or peft.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder / CONFIG_FILE}: does not name the base model: give it with --base MODEL")
    known = schema.Base(model=name, revision=peft.get("revision") or "main", quantization="none")
    return Source(folder, settings, recipe, known)


def export(adapter: Path, folder: Path, options: Options, overwrite: bool = False, progress: bool = True) -> Path:
    """Write one form of an adapter.

    Args:
        adapter: folder of a training run, or of any LoRA or AdaLoRA adapter of peft's.
        folder: is written whole or not at all.
        options: form and details.
        overwrite: an export there may be replaced.
        progress: show it.

    Returns:
        ``folder``.

    Raises:
        UserError: before anything is written.
    """
    options.check()
    source = read_source(adapter, options.base)
    check_output(folder, adapter, overwrite)
    masks = masks_of(source) if options.form == "ensemble" else None
    adapted = check_adapter(source.base, adapter, masks)
    console = Console(stderr=True, quiet=not progress)
    if options.form == "plain":
        check_disk(folder, sum(file.stat().st_size for file in source_files(source)))
        with written_aside(folder) as part:
            write_plain(source, part)
    elif options.form == "merged":
        dtype = merge_type(options.dtype, source.base)
        check_mergeable(source.base, adapted)
        size = model_bytes(adapted, dtype)
        check_disk(folder, size)
        said = f"Merging into {source.base.model} in {dtype}: {in_words(size)} of main memory and of disk"
        console.print(said, soft_wrap=True, markup=False, highlight=False)
        with written_aside(folder) as part:
            write_merged(source, dtype, options.max_shard_size or "5GB", part)
    else:
        assert masks is not None
        ensemble = source.ensemble(options)
        writer = MemberWriter(adapted, masks, ensemble.instances if ensemble.balanced else None)
        check_disk(folder, ensemble.instances * writer.bytes)
        with written_aside(folder) as part:
            write_ensemble(source, masks, ensemble, writer, part, console)
    return folder


def masks_of(source: Source) -> AdapterSettings:
    """Of the ensemble. Raises ``UserError`` for an adapter that has none: its members would all be alike."""
    if source.settings is None or not source.settings.masked:
        raise UserError(
            f"--form ensemble: {source.folder} {why_unmasked(source.settings)}, so it has no masks and no members.\n"
            "Export it with --form plain or --form merged."
        )
    return source.settings


# --- the forms -------------------------------------------------------------------------------------------------------


def source_files(source: Source) -> list[Path]:
    """What a plain export copies."""
    names = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, RECIPE_FILE)
    return [source.folder / name for name in names if (source.folder / name).exists()]


def write_plain(source: Source, folder: Path) -> None:
    """peft's files, with our settings and the recipe, for later ensembles."""
    for file in source_files(source):
        shutil.copyfile(file, folder / file.name)
    folded = source.settings is not None and not source.settings.rescale and source.settings.masked
    peft = read_peft_config(source.folder)
    expectation = "the mean of the masks needs no folding"
    if folded and source.settings is not None:
        expectation = (
            f"alpha is {peft['lora_alpha']:g} = {source.settings.alpha:g} (1-p)^2: the mean of the masks is folded in"
        )
        if peft.get("alpha_pattern"):
            own = ", ".join(f"{alpha:g} for `{pattern}`" for pattern, alpha in peft["alpha_pattern"].items())
            expectation += f"; layers of rate_pattern have another p, and so their own alpha in alpha_pattern: {own}"
    details = {"peft_type": peft["peft_type"], "expectation": expectation}
    kind = "A plain peft adapter"
    if peft["peft_type"] == "ADALORA":
        details["note"] = (
            "it stays AdaLoRA, in the form P Lambda Q that it was trained in: peft loads it; servers of LoRA do not, "
            "and take the members of its ensemble or the merged model"
        )
        kind += f" ({details['note']})"
    write_json(folder / MANIFEST_FILE, {**manifest("plain", source), **details})
    words = (
        f'{kind}: `PeftModel.from_pretrained(base, "<this folder>")`; '
        f"{expectation}.\n`{SETTINGS_FILE}` and `{RECIPE_FILE}`, where present, serve the test-time ensemble of the "
        "project lora-dropout."
    )
    write_card(source, words, "peft", folder)


def write_merged(source: Source, dtype: str, max_shard_size: str, folder: Path) -> None:
    """A model of its own: sharded safetensors, configuration, generation configuration, tokenizer."""
    tokenizer = load_tokenizer(source.base)
    model = merged_model(source.base, source.folder, dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for shard in folder.glob("*.safetensors"):  # safetensors 0.8 lets their owner alone read them
        shutil.copymode(folder / "config.json", shard)
    tokenizer.save_pretrained(folder)
    trained_on = "unknown" if source.recipe is None else source.base.quantization
    note = f"in {dtype} weights"
    if trained_on in ("nf4", "int8"):
        note = (
            f"trained on the base's weights rounded to {trained_on}, and now on its {dtype} weights: close to what was "
            "trained and evaluated, not equal to it"
        )
    details = {"dtype": dtype, "trained_on": trained_on, "note": note}
    write_json(folder / MANIFEST_FILE, {**manifest("merged", source), **details})
    words = f'The adapter merged into its base, {note}:\n`AutoModelForCausalLM.from_pretrained("<this folder>")`.'
    write_card(source, words, "transformers", folder)


def write_ensemble(
    source: Source,
    masks: AdapterSettings,
    ensemble: schema.Ensemble,
    writer: MemberWriter,
    folder: Path,
    console: Console,
) -> None:
    """Member after member, each with a manifest of its own, so that it can be moved alone."""
    details = {
        "rate": masks.rate,
        "rate_pattern": dict(masks.rate_pattern),
        "mask_seed": masks.seed,
        "instances": ensemble.instances,
        "balanced": ensemble.balanced,
        "average": ensemble.average,
        "average_rule": AVERAGES[ensemble.average],
    }
    common = {**manifest("ensemble", source), **details}
    for number in track(range(ensemble.instances), "Writing members", console=console, disable=console.quiet):
        member = folder / f"member-{number}"
        member.mkdir()
        writer.write(number, member)
        write_json(member / MANIFEST_FILE, {**common, "member": number})
    members = {str(number): f"member-{number}" for number in range(ensemble.instances)}
    write_json(folder / MANIFEST_FILE, {**common, "members": members})
    balanced = " They are balanced: an ensemble of all of them, no fewer." if ensemble.balanced else ""
    words = (
        f"The {ensemble.instances} members of its test-time ensemble (equation 8), masks at "
        f"{rates_in_words(masks.rate, masks.rate_pattern)} in their weights:\n"
        f"`member-0` to `member-{ensemble.instances - 1}` are plain peft adapters, for stock peft "
        '(`PeftModel.from_pretrained(base, "<this folder>/member-0")`) and for servers of several adapters.\n'
        f"The ensemble is their average: {AVERAGES[ensemble.average]}.{balanced}\n"
        "Where a server gives no logits, take a vote over the members' answers."
    )
    write_card(source, words, "peft", folder)


def write_card(source: Source, words: str, library: str, folder: Path) -> None:
    """``README.md``, with the training where it is known."""
    record = read_provenance(source.folder)
    trained = None
    if source.recipe is not None and record is not None and is_whole(record):
        trained = (source.recipe, record, read_history(source.folder))
    write_export_card(source.name, words, source.base.model, library, folder, trained)


def is_whole(record: dict[str, Any]) -> bool:
    """Whether a run's provenance has what a model card says of it."""
    data = record.get("data")
    known = isinstance(data, list) and all(isinstance(entry, dict) and {"rows", "split"} <= {*entry} for entry in data)
    return known and isinstance(record.get("processes"), int) and isinstance(record.get("engine"), str)


def manifest(form: Form, source: Source) -> dict[str, Any]:
    """What ties an export to the adapter it came from, and to the base it was trained on."""
    known = source.recipe is not None  # how the base was stored stands in the recipe alone
    return {
        "form": form,
        "created": now(),
        "source": {
            "name": source.name,
            "folder": str(source.folder.resolve()),
            "sha256": {file.name: sha256(file) for file in source_files(source)},
        },
        "settings": None if source.settings is None else asdict(source.settings),
        "base": {
            "model": source.base.model,
            "revision": source.base.revision,
            "quantization": source.base.quantization if known else None,
            "dtype": source.base.dtype if known else None,
        },
        "versions": versions(),
        "git": git_state(),
    }


def sha256(file: Path) -> str:
    """Hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def model_bytes(adapted: PeftModel, dtype: str) -> int:
    """Of the merged model's weights, at most: a tied head is counted."""
    return sum(parameter.numel() for parameter in adapted.parameters()) * DTYPES[dtype].itemsize


# --- the folder ------------------------------------------------------------------------------------------------------


def default_folder(adapter: Path, form: Form) -> Path:
    """Beside the adapter, e.g. ``outputs/pocket-ensemble``."""
    resolved = adapter.resolve()
    return resolved.with_name(f"{resolved.name}-{form}")


def check_output(folder: Path, adapter: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something else.

    Raises:
        UserError: it is the adapter's; it cannot be written; it holds an export and ``overwrite`` is not set, or files
            that are no export.
    """
    if folder.resolve() in (adapter.resolve(), *adapter.resolve().parents):
        raise UserError(f"--output: {folder} holds the adapter itself; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file; choose a folder")
    check_writable("--output", folder)
    if not folder.exists() or not any(folder.iterdir()):
        return
    ours = read_manifest(folder) is not None
    if not overwrite:
        held = "an export" if ours else "files of something else"
        raise UserError(
            f"{folder}: already holds {held}; it is never overwritten silently.\n"
            "Choose another place with --output, or pass --overwrite to replace an export."
        )
    if not ours:
        raise UserError(
            f"{folder}: --overwrite replaces exports only, and this folder has no {MANIFEST_FILE} of one.\n"
            "Empty it yourself, or choose another place with --output."
        )


def check_disk(folder: Path, size: int) -> None:
    """Raise ``UserError`` where the disk has no room for the files."""
    existing = next(parent for parent in folder.resolve().parents if parent.exists())
    needed, free = int(size * CONTAINER_ROOM), shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder}: takes {in_words(needed)}, and {in_words(free)} are free in {existing}.\n"
            "Free some, or choose another disk with --output."
        )


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder beside the final one, which takes its place in the end, whole; an error leaves everything as it was.

    Raises:
        UserError: the disk is full, or cannot be written any more.
    """
    folder = folder.resolve()  # where a link leads
    part, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir()
        yield part
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot be written: {error}.\n"
            "Nothing of it is kept, and what was there is as it was. Make room, or choose another disk with --output."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
