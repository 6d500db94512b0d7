"""What the systems, and the training, took."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from eval.numbers import FIXED_SPACE, TIMES, duration


def seconds_by_system(ours: Mapping[str, Any]) -> dict[str, float]:
    """Of the systems that were timed."""
    return {name: system["seconds"] for name, system in ours["systems"].items() if system.get("seconds")}


def relative_times(ours: Mapping[str, Any]) -> dict[str, float]:
    """Times against the deterministic adapter's; none where either was not timed or took kept answers."""
    seconds = {name: spent for name, spent in seconds_by_system(ours).items() if not ours["systems"][name].get("kept")}
    reference = seconds.get("deterministic")
    return {name: spent / reference for name, spent in seconds.items()} if reference else {}


def kept_sentences(ours: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """How many requests were not computed again."""
    kept = {name: system for name, system in ours["systems"].items() if system.get("kept") and name in labels}
    if not kept:
        return []
    words = [f"{system['kept']:,} of {system['requests']:,} ({labels[name]})" for name, system in kept.items()]
    return [
        f"Requests answered from the answers kept of an earlier run: {', '.join(words)}; their time is not counted."
    ]


def cost_rows(ours: Mapping[str, Any], labels: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(system, time, ratio to the deterministic adapter) for every system that was timed."""
    ratios = relative_times(ours)
    return [
        (labels[name], duration(spent), f"{ratios[name]:.2f}{FIXED_SPACE}{TIMES}" if name in ratios else "")
        for name, spent in seconds_by_system(ours).items()
        if name in labels
    ]


def cost_sentences(ours: Mapping[str, Any]) -> list[str]:
    """The ensemble's price, and what training took."""
    training = (ours.get("provenance") or {}).get("training") or {}
    ratios = relative_times(ours)
    found = []
    if "ensemble" in ratios and ours.get("ensemble"):
        times = f"{ratios['ensemble']:.2f} times"
        found.append(f"{ours['ensemble']['instances']} members took {times} as long as the single adapter.")
    if {"started", "finished"} <= training.keys():
        spent = datetime.fromisoformat(training["finished"]) - datetime.fromisoformat(training["started"])
        found.append(f"Training took {duration(spent.total_seconds())}.")
    history = ours.get("history") or []
    speeds = [line["tokens_per_second"] for line in history if line.get("tokens_per_second")]
    memory = [line["peak_memory_bytes"] for line in history if line.get("peak_memory_bytes")]
    if speeds:
        found.append(
            f"It ran at {sorted(speeds)[len(speeds) // 2]:,.0f} tokens/s (median of the log)"
            + (f" with a peak of {max(memory) / 2**30:.2f} GiB of memory." if memory else ".")
        )
    return found
