"""What job scripts start in these tests in place of python: it records how it was called, and ends as it is told to.

BEHAVIOUR   finish            ends well
            stop              waits for a signal and exits with 75, as ranks do that have agreed; ends well next time
            stop at once    exits with 75 at every start
            killed            waits for a signal and exits with 143, as ranks do that could not agree; well next time
            crash             rank 0 exits with 1, the others as killed
RECORDS     file, of JSON lines
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pipeline.process.rank import adopt_slurm_task

adopt_slurm_task()
arguments = sys.argv[1:]
behaviour = os.environ["BEHAVIOUR"]
again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
seen: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: seen.append(number))

values = dict(word.split("=", 1) for word in arguments if "=" in word)
kept = Path(values.get("output", "."), values.get("name", "."), "kept")
JOB = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HF_TOKEN")
record = {
    "job": "_".join(os.environ[name] for name in JOB if name in os.environ) or os.environ["SLURM_JOB_ID"],
    "arguments": arguments,
    "folder": os.getcwd(),
    "again": again,
    "found": kept.exists(),
    **{name: os.environ.get(name) for name in names},
}
with open(os.environ["RECORDS"], "a") as records:
    records.write(json.dumps(record) + "\n")
if "output" in values:
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(behaviour)

if behaviour == "stop at once":
    sys.exit(75)
if behaviour == "crash" and os.environ["RANK"] == "0":
    sys.exit(1)
if behaviour == "finish" or again:
    sys.exit(0)
deadline = time.monotonic() + 100
while not seen and time.monotonic() < deadline:
    time.sleep(0.05)
os._exit(75 if behaviour == "stop" else 143)  # as ours do: python's clean-up would give SIGTERM back its own effect
