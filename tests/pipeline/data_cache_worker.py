"""Processes that want the same data at once, as the ranks of a node do.

    python data_cache_worker.py BASE SCENE=DATA [SCENE=DATA ...]

For each scene forks four processes, which tokenise DATA under the cache of ``LORA_DROPOUT_CACHE``; prints a line of
JSON, a list: ``{"tokenised": how often, "ends": {rank: what it got}, "killed": rank, "logs": text}``. Scenes: ``all``
lets them run; ``kill`` sends SIGKILL to the first that begins to tokenise; ``mistake`` ends all of them with rank 0, as
a launcher does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pipeline.process.environment import prepare_environment

prepare_environment()
from pipeline.base import load_tokenizer
from pipeline.data import cached_splits
from pipeline.errors import UserError
from pipeline.recipe import Recipe


def rank(number: int, recipe: Recipe, folder: Path) -> None:
    """One process; what it gets is left in ``folder/<number>``."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        end = cached_splits(recipe, load_tokenizer(recipe.base)).tokens_sha256
    except UserError as error:
        end = f"error: {error}"
    (folder / f"{number}.part").write_text(end)
    (folder / f"{number}.part").replace(folder / str(number))


def played(base: str, scene: str, data: str) -> dict[str, object]:
    recipe = Recipe.model_validate({"name": "t", "base": {"model": base}, "data": {"train": [{"path": data}]}})
    folder = Path(tempfile.mkdtemp(dir=os.environ["LORA_DROPOUT_CACHE"]))
    children = {}
    for number in range(4):
        child = os.fork()  # this process has no threads
        if child == 0:
            rank(number, recipe, folder)
            os._exit(0)
        children[number] = child

    def begun() -> list[int]:
        """Ranks that tokenise, or did."""
        return [number for number in children if "tokenising" in (folder / f"{number}.log").read_text()]

    killed = None
    if scene == "kill":
        while not all((folder / f"{number}.log").exists() for number in children) or not begun():
            time.sleep(0.001)
        (killed,) = begun()
        os.kill(children[killed], signal.SIGKILL)
    if scene == "mistake":
        os.waitpid(children.pop(0), 0)
        for child in children.values():
            os.kill(child, signal.SIGTERM)
    for child in children.values():
        os.waitpid(child, 0)
    logs = "".join(log.read_text() for log in folder.glob("*.log"))
    ends = {file.name: file.read_text() for file in folder.iterdir() if file.name.isdigit()}
    return {"tokenised": len(re.findall("^tokenising", logs, re.M)), "killed": killed, "ends": ends, "logs": logs}


if __name__ == "__main__":
    print(json.dumps([played(sys.argv[1], *scene.split("=")) for scene in sys.argv[2:]]))
