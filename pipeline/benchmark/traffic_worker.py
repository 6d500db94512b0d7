"""One rank of the trainings whose collectives are counted: ``torchrun ... -m pipeline.benchmark.traffic_worker``.

Arguments: a JSON file with a list of jobs, and a folder for the counts of each rank.

What counts is torch's flight recorder, which sees every collective of every library at the boundary of torch's process
group, with shapes and dtypes, for gloo as for NCCL. Beside it stand the kernel's bytes of the loopback device: in a
network namespace of their own these ranks alone use it.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed
from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]  # torch has no stub of it
from transformers.integrations import unset_hf_deepspeed_config

from pipeline import distributed
from pipeline.process.rank import rank
from pipeline.recipe import load_recipe
from pipeline.train import train

BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Long": 8, "Int": 4, "Byte": 1, "Bool": 1, "Double": 8, "Char": 1}
"""Of the recorder's dtypes."""


class Recorder:
    """Collectives since it was last asked."""

    def __init__(self) -> None:
        self._seen = -1

    def new(self) -> Counter[tuple[str, str, int]]:
        """How many of each collective, dtype, and bytes of the whole tensor."""
        found: Counter[tuple[str, str, int]] = Counter()
        if not torch.distributed.is_initialized():
            return found
        entries = json.loads(_dump_fr_trace_json())["entries"]
        for entry in entries:
            if entry["record_id"] > self._seen:
                found[_kind(entry)] += 1
        self._seen = max((entry["record_id"] for entry in entries), default=self._seen)
        return found


def _kind(entry: dict[str, Any]) -> tuple[str, str, int]:
    """Name, dtype, and bytes: of a gathering those that come out, of anything else those that go in."""
    side = "output" if "gather" in entry["profiling_name"] else "input"
    sizes, dtypes = entry[f"{side}_sizes"], entry[f"{side}_dtypes"]
    size = sum(math.prod(shape) * BYTES[dtype] for shape, dtype in zip(sizes, dtypes, strict=True))
    return entry["profiling_name"].rpartition(":")[2], dtypes[0] if dtypes else "", size


def loopback_bytes() -> int:
    """That the loopback device has passed on."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def main() -> None:
    """Train all jobs one after another."""
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    recorder, counts = Recorder(), {}
    for job in jobs:
        distributed.SHRUNK = job["shrunk"]
        recipe = load_recipe(Path(job["recipe"]), job["overrides"])
        recorder.new()
        before = loopback_bytes()
        train(recipe)
        torch.distributed.barrier()
        wire = loopback_bytes() - before
        torch.distributed.barrier()  # nobody goes on before all have read
        counts[job["name"]] = {"wire": wire, "collectives": [[*kind, n] for kind, n in recorder.new().items()]}
        unset_hf_deepspeed_config()
    (folder / f"rank-{rank()}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
