"""Evaluate one adapter: each system over all tasks on one loaded base, then write scores, samples and the report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import lm_eval
import torch
import torch.distributed as dist
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from rich.console import Console
from transformers.integrations import unset_hf_deepspeed_config

from eval.adapters import check_base, check_deep_ensemble
from eval.analysis.analyse import analyse
from eval.lm import EnsembleLM
from eval.lm.kept import kept_answers
from eval.lm.sharing import total
from eval.logs import CountedBar, current_task
from eval.nodes import adapter_on_every_node
from eval.prompt import TrainingPrompt
from eval.results import SystemScores, add_records, add_stderrs, our_section, write_folder
from eval.score_table import score_table
from eval.systems import description, mask_settings, members_record, mode_of, system, systems_of
from eval.tasks import load_tasks
from pipeline.adapter.check import check_adapter, check_settings
from pipeline.adapter.files import load_adapter, read_settings
from pipeline.base import load_base, load_tokenizer
from pipeline.errors import UserError
from pipeline.observation.evaluation import observed_evaluation
from pipeline.observation.rank_log import LOG
from pipeline.process.rank import is_main, world_size
from pipeline.recipe import Recipe, schema
from pipeline.run.folder import check_writable, run_folder
from pipeline.run.provenance import now
from pipeline.supervision.watch import watching

ANSWERS = "answers"
"""Beside the results of all runs of a recipe: finished answers, which the next run takes up."""


def evaluate(
    recipe: Recipe, adapter: Path, output_root: Path = Path("eval/outputs"), progress: bool = True
) -> Path | None:
    """Evaluate the recipe's systems on the recipe's tasks.

    Under a launcher every process calls this with the same arguments; they share the requests, and the first writes.

    Args:
        recipe: ``base`` is loaded as it was trained on, ``eval`` says what to do.
        adapter: the folder that training wrote.
        output_root: results go to ``<output_root>/<recipe.name>/<time>``; ``latest`` beside it points there.
        progress: announce each system on the screen, and show the scores.

    Returns:
        The folder; None on processes other than the first.

    Raises:
        UserError: results cannot be written; tasks, adapter or base cannot be had; an adapter that does nothing; out of
            memory.
    """
    started = now()
    check_writable("--output", output_root / recipe.name)
    observed = observed_evaluation(_own_run(recipe, adapter), recipe.supervision.heartbeat_seconds, current_task)
    with observed, watching() as watch, watch.keeping(_kept(recipe, output_root)):
        group = process_group()
        with adapter_on_every_node(adapter, group) as folder:
            return _evaluated(recipe, folder, output_root, progress, group, started)


def _kept(recipe: Recipe, output_root: Path) -> str:
    """What a signal leaves of an evaluation, in words after "stopped by SIGTERM"."""
    if _keeps_answers(recipe):
        answers = output_root / recipe.name / ANSWERS
        return f"while evaluating; finished answers are kept in {answers}, and the same command goes on"
    return "while evaluating; answers are not kept (eval.keep_answers), and the same command evaluates from the start"


def _keeps_answers(recipe: Recipe) -> bool:
    """In int8 scores depend on batch neighbours."""
    return recipe.eval.keep_answers and recipe.base.quantization != "int8"


def _own_run(recipe: Recipe, adapter: Path) -> Path | None:
    """The folder of the recipe's run, if its adapter is the one that is evaluated."""
    folder = run_folder(recipe)
    return folder if folder.is_dir() and folder.resolve() == adapter.resolve() else None


def _evaluated(
    recipe: Recipe, adapter: Path, output_root: Path, progress: bool, group: dist.ProcessGroup | None, started: str
) -> Path | None:
    """:func:`evaluate`, with an adapter that every process can read."""
    settings = read_settings(adapter)
    check_base(recipe.base, adapter)
    check_settings(settings, recipe, adapter)
    systems, warnings = systems_of(recipe, settings, adapter)
    unset_hf_deepspeed_config()  # else a ZeRO-3 trainer of this process would have the base loaded in shards
    masks = mask_settings(settings, recipe)
    mode = mode_of(recipe.eval, systems)
    check_adapter(recipe.base, adapter, masks if "ensemble" in systems else None)
    check_deep_ensemble(recipe, adapter)
    if is_main():
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
    tasks = load_tasks(recipe.eval)
    prompt = TrainingPrompt(recipe).render if recipe.eval.prompt == "training" else None
    tokenizer = load_tokenizer(recipe.base)
    finished: dict[str, SystemScores] = {}
    with memory_advice(recipe.eval):
        model = load_adapter(load_base(recipe.base), adapter)
        for number, name in enumerate(systems, start=1):
            evaluated = system(name, model, recipe.eval, masks)
            lm = EnsembleLM(
                model,
                tokenizer,
                batch_size=recipe.eval.batch_size,
                members=evaluated.members,
                mode=mode,
                tokens_per_pass=recipe.eval.tokens_per_pass,
                training_prompt=prompt,
                group=group,
            )
            if _keeps_answers(recipe):
                adapters = [] if name == "base" else [adapter, *evaluated.further]
                answers = output_root / recipe.name / ANSWERS
                lm.store = kept_answers(answers, recipe.base, adapters, evaluated.identity, lm)
                if lm.store.corrupt:
                    lines = len(lm.store.corrupt)
                    warnings.append(f"Kept answers ({name}): {lines} damaged or cut off, and computed again.")
            if name != "base":
                lm.assert_adapter_active()
            CountedBar.system = description(name, recipe.eval)
            LOG.info("system", extra={"system": CountedBar.system, "number": number, "of": len(systems)})
            if progress and is_main():
                print(f"Evaluating {CountedBar.system} ({number} of {len(systems)})", flush=True)
            with evaluated.loaded(model):
                scores = system_scores(lm, tasks, recipe.eval)
                finished[name] = replace(scores, members=members_record(evaluated))
    if not is_main():
        return None
    section = our_section(recipe, adapter, settings, masks, finished, started, warnings)
    results = {**finished[systems[-1]].results, "lora_dropout": section}
    if progress:
        Console().print(score_table(results))  # before any file: a full disk does not cost the scores
    folder = write_folder(results, finished, output_root / recipe.name, started)
    if progress:
        print(f"results and report written to {folder}", flush=True)
    return folder


def process_group() -> dist.ProcessGroup | None:
    """The launcher's processes, on a CPU backend, with patience for ranks that finish early; None if there is one."""
    if world_size() == 1:
        return None
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo")
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def system_scores(lm: EnsembleLM, tasks: list[Task | Group], section: schema.Eval) -> SystemScores:
    """Run one system. Results are empty on all but the first process of a machine (lm-eval's choice)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),  # the tasks are loaded; its index would take 12 s
        num_fewshot=section.num_fewshot,
        batch_size=section.batch_size,
        limit=section.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=lm.training_prompt is not None,
        fewshot_as_multiturn=False,
    )
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    results = dict(results or {})
    samples = results.pop("samples", {})
    analysis = {}
    if results:
        add_stderrs(results, samples, tasks)
        add_records(samples, lm, tasks)
        analysis = analyse(samples, results)
    kept = total(lm.kept, lm.group)
    return SystemScores(results, samples, lm.requests, lm.seconds, peak, lm.mode, kept, analysis)


@contextmanager
def memory_advice(section: schema.Eval) -> Iterator[None]:
    """Turn an accelerator's out-of-memory error into what to change, what costs least first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        counts = {
            "eval.ensemble.instances": section.ensemble.instances if "ensemble" in section.systems else 1,
            "eval.mc_dropout.instances": section.mc_dropout.instances if "mc_dropout" in section.systems else 1,
        }
        further = len(section.deep_ensemble) if "deep_ensemble" in section.systems else 0
        members = max(*counts.values(), 1 + further)
        advice = []
        if section.batch_size == "auto":
            advice.append("eval.batch_size=1 and up, instead of auto (same scores)")
        elif section.batch_size > 1:
            advice.append(f"eval.batch_size={max(1, section.batch_size // 2)} (same scores, slower)")
        if members > 1:
            requests = 8 if section.batch_size == "auto" else section.batch_size
            rows = min(section.ensemble.rows_per_pass or members * requests, members * requests)
            advice.append(f"eval.ensemble.rows_per_pass={max(1, rows // 2)} (same scores, slower)")
        if section.num_fewshot != 0:
            advice.append("eval.num_fewshot lower (shorter prompts, another task)")
        advice += [f"{key}={count // 2} (a smaller ensemble)" for key, count in counts.items() if count > 1]
        advice.append("base.quantization=nf4, in training too, if it is not yet (another adapter)")
        numbered = "\n".join(f"  {number}. {line}" for number, line in enumerate(advice, start=1))
        raise UserError(f"out of memory in evaluation. Change, in this order:\n{numbered}") from error
