"""Refuses to compare runs that did not answer the same questions, and says which differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eval.analysis.analyse import OVERALL
from eval.analysis.answers import Answers
from eval.compare.runs import Run, Unit, units
from eval.numbers import listed
from pipeline.errors import UserError

SHOWN = 3
"""Documents that a message names."""
SNIPPET = 60
"""Characters of a prompt around the first difference."""


@dataclass(frozen=True)
class Problem:
    """One thing in which two runs differ."""

    first: Run
    second: Run
    text: str


def refuse(problems: Sequence[Problem]) -> None:
    """One message of all problems.

    Raises:
        UserError: there are problems.
    """
    if not problems:
        return
    parts = ["These runs cannot be compared document by document: they were not asked the same."]
    seen: set[tuple[str, str]] = set()
    for problem in problems:
        pair = (problem.first.label, problem.second.label)
        if pair not in seen:
            seen.add(pair)
            parts += [f"  {run.label}: {run.folder}" for run in (problem.first, problem.second)]
        parts.append(f"- {problem.text}")
    parts.append("Evaluate both with equal tasks, eval.limit, eval.num_fewshot and eval.prompt, and compare again.")
    raise UserError("\n".join(parts))


def common_units(runs: Sequence[Run], tasks: Sequence[str]) -> list[Unit]:
    """What is compared, in the order of the first run.

    Args:
        runs: at least two.
        tasks: names asked for; all, if empty.

    Raises:
        UserError: a task asked for that a run has not; without asking, tasks that not all runs have, or none at all.
    """
    by_run = [{unit.name: unit for unit in units(run)} for run in runs]
    first = by_run[0]
    for name in tasks:
        lacking = [run.label for run, known in zip(runs, by_run, strict=True) if name not in known]
        if lacking:
            known = listed(sorted(set(first).union(*by_run)))
            raise UserError(f"--task {name}: not in {listed(lacking)}; the runs' tasks are {known}")
    common = [name for name in first if all(name in known for known in by_run)]
    if not common:
        lines = [f"  {run.label}: {listed(list(known)) or 'none'}" for run, known in zip(runs, by_run, strict=True)]
        raise UserError("\n".join(["These runs cannot be compared: they have no task in common.", *lines]))
    if not tasks and any(len(known) > len(common) for known in by_run):
        lines = [
            f"  only in {run.label}: {listed([name for name in known if name not in common])}"
            for run, known in zip(runs, by_run, strict=True)
            if len(known) > len(common)
        ]
        whole = [name for name in common if first[name].in_family]
        asked = " ".join(f"--task {name}" for name in whole or common)
        raise UserError(
            "\n".join(["These runs have different tasks.", *lines, f"What all have is compared by {asked}"])
        )
    if not tasks:
        return [first[name] for name in common]
    leaves = {leaf for name in tasks for leaf in first[name].leaves}
    return [
        replace(first[name], in_family=name in tasks)
        for name in common
        if name in tasks or (set(first[name].leaves) <= leaves and name != OVERALL)
    ]


def setting_problems(runs: Sequence[Run], found: Sequence[Unit]) -> list[Problem]:
    """Task versions, few-shot examples, limits, prompts and parts of groups that differ from the first run's."""
    leaves = dict.fromkeys(leaf for unit in found for leaf in unit.leaves)
    first = runs[0]
    problems = []
    for run in runs[1:]:
        theirs = {unit.name: unit for unit in units(run)}

        def tell(what: str, ours: Any, other: Any, run: Run = run) -> None:
            if ours != other:
                problems.append(
                    Problem(first, run, f"{what}: {_said(ours)} in {first.label}, {_said(other)} in {run.label}")
                )

        for unit in found:
            tell(f"tasks of the group {unit.name}", list(unit.leaves), list(theirs[unit.name].leaves))
        tell("eval.limit", first.ours.get("limit"), run.ours.get("limit"))
        tell("eval.prompt", first.ours.get("prompt"), run.ours.get("prompt"))
        for leaf in leaves:
            for what, key in (("version", "versions"), ("few-shot examples", "n-shot")):
                tell(f"{leaf}, {what}", first.results.get(key, {}).get(leaf), run.results.get(key, {}).get(leaf))
    return problems


def _said(value: Any) -> str:
    return "none" if value is None else listed([str(item) for item in value]) if isinstance(value, list) else str(value)


def document_problems(first: Run, second: Run, ours: Answers, theirs: Answers) -> list[Problem]:
    """Documents of one task that only one run has, or that differ in content or in their requests."""
    problems = []
    mine = {int(doc): place for place, doc in enumerate(ours.doc_ids)}
    other = {int(doc): place for place, doc in enumerate(theirs.doc_ids)}
    for run, ids in ((first, sorted(mine.keys() - other.keys())), (second, sorted(other.keys() - mine.keys()))):
        if ids:
            problems.append(f"{len(ids)} documents are in {run.label} only ({_named(ids)})")
    both = sorted(mine.keys() & other.keys())
    changed = [d for d in both if ours.doc_hashes[mine[d]] != theirs.doc_hashes[other[d]]]
    if changed:
        problems.append(f"{len(changed)} of {len(both)} documents have another content ({_named(changed)})")
    same = [d for d in both if ours.doc_hashes[mine[d]] == theirs.doc_hashes[other[d]]]
    asked = [d for d in same if ours.request_hashes[mine[d]] != theirs.request_hashes[other[d]]]
    if asked:
        where = _first_difference(ours.prompts[mine[asked[0]]], theirs.prompts[other[asked[0]]])
        problems.append(
            f"{len(asked)} of {len(both)} documents were asked in other words: prompt, choices or generation settings "
            f"({_named(asked)}){where}"
        )
    targets = [d for d in same if ours.targets[mine[d]] != theirs.targets[other[d]]]
    if targets:
        at = targets[0]
        problems.append(
            f"{len(targets)} of {len(both)} documents have another right answer ({_named(targets)}): at document {at} "
            f"{ours.targets[mine[at]]!r} and {theirs.targets[other[at]]!r}"
        )
    counts = f"{len(mine)} documents in {first.label}, {len(other)} in {second.label}"
    return [Problem(first, second, f"{ours.task}, {counts}: {text}") for text in problems]


def _named(ids: Iterable[int]) -> str:
    """``document 7`` or ``first documents 1, 2, 3``."""
    found = list(ids)
    if len(found) == 1:
        return f"document {found[0]}"
    return f"the first are documents {', '.join(str(doc) for doc in found[:SHOWN])}"


def _first_difference(ours: str, theirs: str) -> str:
    """The two texts from just before their first difference; empty where they are equal."""
    if ours == theirs:
        return ", with equal prompts: the choices or the generation settings differ"
    shorter = min(len(ours), len(theirs))
    same = np.array([a == b for a, b in zip(ours, theirs, strict=False)], dtype=np.bool_)
    at = shorter if same.all() else int(np.argmin(same))
    start = max(at - SNIPPET // 3, 0)
    return f"; from character {start} on: {_cut(ours, start)} and {_cut(theirs, start)}"


def _cut(text: str, start: int) -> str:
    end = start + SNIPPET
    return repr(text[start:end]) + ("..." if len(text) > end else "")
