"""launch/export.py as a user runs it, with an upload; and the members it writes in a process without our code."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import get_peft_model, get_peft_model_state_dict

from eval.lm import EnsembleLM
from eval.lm.members import MaskedMembers
from pipeline.adapter.config import lora_config
from pipeline.adapter.files import adapter_dropout, load_adapter, read_settings, save_adapter, settings_of
from pipeline.base import load_base, load_tokenizer
from pipeline.errors import UserError
from pipeline.hub import check_push
from pipeline.recipe import load_recipe, recipe_to_yaml
from pipeline.recipe.schema import Ensemble

MEMBERS = 3
RECIPE = """
name: random-adapter
seed: 3
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{rank: 4, alpha: 8, dropout: {{rate: 0.4, rate_pattern: {{q_proj: 0.2}}}}}}
data: {{train: [{{path: {folder}/rows.jsonl}}]}}
"""
TEXTS = [("The old man", " went home"), ("She", " walked slowly to the river and saw him, and they never spoke again")]
STOCK = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, folder, tokens, out = sys.argv[1:]
ids = json.loads(tokens)
logits = []
for number in range({members}):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, f"{{folder}}/member-{{number}}").eval()
    with torch.no_grad():
        logits.append([model(torch.tensor([row])).logits[0] for row in ids])
torch.save(logits, out)
assert not {{"pipeline", "eval"}} & set(sys.modules)
"""


class Hub(BaseHTTPRequestHandler):
    """Takes an upload as the Hub does; what it was given is in the server's ``uploaded``."""

    def answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"name": "me", "type": "user", "orgs": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        uploaded, endpoint = self.server.uploaded, f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
        if self.path == "/api/repos/create":
            uploaded["created"] = json.loads(body)
            self.answer({"url": f"{endpoint}/me/members", "name": "me/members", "id": "me/members"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{endpoint}/me/members/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})  # the card's metadata is checked

    def log_message(self, *arguments: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.uploaded = {}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, pocket_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "rows.jsonl").write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    (folder / "r.yaml").write_text(RECIPE.format(base=pocket_base, folder=folder))
    recipe = load_recipe(folder / "r.yaml")
    torch.manual_seed(0)
    model = get_peft_model(load_base(recipe.base), lora_config(recipe.adapter))
    weights = {name: 0.08 * torch.randn_like(value) for name, value in get_peft_model_state_dict(model).items()}
    (folder / "adapter").mkdir()
    save_adapter(model, weights, settings_of(recipe.adapter, recipe.seed), folder / "adapter")
    (folder / "adapter" / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    return folder / "adapter"


def export(repository: Path, adapter: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, str(repository / "launch" / "export.py"), str(adapter), *arguments],
        cwd=adapter.parent,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def done(
    repository: Path, adapter: Path, hub: ThreadingHTTPServer, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """The ensemble, written and uploaded."""
    arguments = ["--form", "ensemble", "--instances", str(MEMBERS), "--push-to-hub", "me/members", "--private"]
    hub_variables = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    home = str(tmp_path_factory.mktemp("home"))
    return export(repository, adapter, *arguments, HF_HOME=home, **hub_variables)


def test_the_command(done: subprocess.CompletedProcess[str], adapter: Path, hub: ThreadingHTTPServer) -> None:
    assert done.returncode == 0, done.stderr
    folder = adapter.with_name("adapter-ensemble")
    assert f"ensemble export written to {folder}" in done.stdout
    assert f"uploaded to http://127.0.0.1:{hub.server_port}/me/members" in done.stdout
    assert "Writing members" in done.stderr
    assert [file.name for file in adapter.parent.iterdir() if file.name.startswith(".")] == [], "nothing half is left"
    uploaded = hub.uploaded  # type: ignore[attr-defined]
    created = uploaded.pop("created")
    assert created["name"] == "members" and (created.get("private") or created.get("visibility") == "private")
    written = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    assert uploaded.keys() == written.keys()
    assert all(content == written[name].read_bytes() for name, content in uploaded.items())


def test_members_in_a_process_without_our_code(
    done: subprocess.CompletedProcess[str], adapter: Path, pocket_base: Path, tmp_path: Path
) -> None:
    """Each equals the in-process member, and their average per token the in-process ensemble, by either rule."""
    assert done.returncode == 0, done.stderr
    recipe, settings = load_recipe(adapter / "recipe.yaml"), read_settings(adapter)
    assert settings is not None
    tokenizer = load_tokenizer(recipe.base)
    ids = [tokenizer(context + continuation)["input_ids"] for context, continuation in TEXTS]
    arguments = [str(pocket_base), str(adapter.with_name("adapter-ensemble")), json.dumps(ids), str(tmp_path / "out")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    stock_process = subprocess.run(
        [sys.executable, "-c", STOCK.format(members=MEMBERS), *arguments],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stock_process.returncode == 0, stock_process.stderr
    stock: list[list[torch.Tensor]] = torch.load(tmp_path / "out")  # member, text, (T, V)

    model = load_adapter(load_base(recipe.base, torch.device("cpu")), adapter)
    dropout = adapter_dropout(model, settings)
    for number in range(MEMBERS):
        for row, expected in zip(ids, stock[number], strict=True):
            with torch.no_grad(), dropout.members([number]):
                found = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    for average in ("logits", "probabilities"):
        ensemble = Ensemble(instances=MEMBERS, average=average)
        lm = EnsembleLM(model, tokenizer, batch_size=1, members=MaskedMembers(dropout, ensemble))
        sums = []
        for text, row in enumerate(ids):
            members = torch.stack([stock[number][text] for number in range(MEMBERS)])  # (N, T, V)
            mean = members.mean(0) if average == "logits" else members.softmax(-1).mean(0).log()
            expected = mean.log_softmax(-1)
            with torch.no_grad():
                found = lm._model_call(torch.tensor([row]))[0].log_softmax(-1)
            targets = torch.tensor(row[1:])[:, None]
            by_token = [scores[:-1].gather(1, targets)[:, 0] for scores in (found, expected)]
            torch.testing.assert_close(*by_token, atol=1e-5, rtol=1e-5)
            begun = len(tokenizer(TEXTS[text][0])["input_ids"])
            sums.append(float(by_token[1][begun - 1 :].sum()))
        requests = [Instance("loglikelihood", {}, pair, 0, ("t", n, 1)) for n, pair in enumerate(TEXTS)]
        scored = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        assert scored == pytest.approx(sums, abs=1e-4)


def test_bad_input_ends_with_status_2_and_no_traceback(repository: Path, adapter: Path) -> None:
    output = adapter.with_name("refused")
    failed = export(repository, adapter, "--form", "merged", "--dtype", "nf4", "--output", str(output))
    assert failed.returncode == 2
    assert "4 bits is lossy" in failed.stderr and "Traceback" not in failed.stderr
    assert not output.exists()


def test_an_upload_that_cannot_be_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"--push-to-hub: no token\. Set HF_TOKEN"):
        check_push("me/x")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(UserError, match=r"--push-to-hub: 'me/x': HF_HUB_OFFLINE is set; unset it to upload"):
        check_push("me/x")
    with pytest.raises(UserError, match=r"--push-to-hub: found 'a/b/c', expected owner/name"):
        check_push("a/b/c")
