"""A real training run, watched: where it writes, whom it calls, what it reads, and whether a token leaves a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.folder import RUN_FILES

SECRETS = {"HF_TOKEN": "hf_Canary7canary7Canary7canary7Canary", "WANDB_API_KEY": "a-canary-without-any-form"}
AUDIT = Path(__file__).with_name("audit")


@pytest.mark.slow
def test_a_run_writes_to_its_folder_and_the_caches_alone(small_base: Path, repository: Path, tmp_path: Path) -> None:
    """Noted by an audit hook, which sees what Python does, and by looking at what lies where afterwards."""
    for name in ("home", "temporary", "work"):
        (tmp_path / name).mkdir()
    rows = "".join(
        json.dumps({"instruction": f"After {n}?", "input": "", "output": f" {n + 1}"}) + "\n" for n in range(8)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "work" / "recipe.yaml").write_text(
        f"name: watched\nbase: {{model: {small_base}, quantization: none, dtype: float32}}\nadapter: {{rank: 2}}\n"
        f"data: {{train: [{{path: {tmp_path}/rows.jsonl, prompt: '{{{{ instruction }}}}'}}], max_length: 32}}\n"
        "training: {max_steps: 1, per_device_train_batch_size: 2, save_strategy: steps, save_steps: 1}\n"
    )
    environment = {
        "PATH": os.environ["PATH"],  # no variable of this process moves a cache
        "OMP_NUM_THREADS": "1",
        **SECRETS,
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
        "AUDIT_LOG": str(tmp_path / "audit.jsonl"),
        "PYTHONPATH": str(AUDIT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(repository / "launch" / "sft.py"), "recipe.yaml", "--no-eval"]
    ended = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()[-2000:]

    events = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    written = [Path(what) for event, what in events if not event.startswith(("socket.", "pickle."))]
    allowed = (tmp_path / "home" / ".cache", tmp_path / "temporary", tmp_path / "work" / "outputs", Path("/dev"))
    assert len(written) > 20
    assert not [path for path in written if not any(path.is_relative_to(folder) for folder in allowed)]
    assert not [what for event, what in events if event == "pickle.find_class"]
    assert not [what for event, what in events if event.startswith("socket.")]

    assert {path.name for path in (tmp_path / "work").iterdir()} == {"recipe.yaml", "outputs"}
    assert {path.name for path in (tmp_path / "home").iterdir()} <= {".cache"}
    assert {path.name for path in (tmp_path / "work" / "outputs" / "watched").iterdir()} <= RUN_FILES

    kinds = {path.suffix for path in (tmp_path / "work" / "outputs" / "watched").rglob("*") if path.is_file()}
    assert not kinds & {".pt", ".pth", ".bin", ".pkl", ".pickle"}
    for secret in SECRETS.values():
        assert secret.encode() not in ended.stdout + ended.stderr
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file
