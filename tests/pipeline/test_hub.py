"""What a user reads when the Hub refuses, lacks or cannot be reached: real requests to a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.hub import check_local, looks_like_path

# owner -> HTTP status and the Hub's X-Error-Code
ANSWERS = {
    "gated401": (401, "GatedRepo"),
    "gated403": (403, "GatedRepo"),
    "private": (401, "RepoNotFound"),
    "gone": (404, "RepoNotFound"),
    "banned": (403, ""),
}

KINDS = {"tokenizer": "base.model", "config": "base.model", "model": "base.model", "data": "data.train.0.path"}
NOT_REACHED = ["config", "data"]

ASK = """
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from pipeline.base import load_base, load_config, load_tokenizer
from pipeline.data import load_rows
from pipeline.errors import UserError
from pipeline.recipe import schema


def message(name, kind):
    base = schema.Base(model=name, quantization="none", dtype="float32")
    try:
        if kind == "tokenizer":
            load_tokenizer(base)
        elif kind == "config":
            load_config(base)
        elif kind == "model":
            load_base(base)
        else:
            load_rows([schema.Source(path=name)])
    except UserError as error:
        return str(error)


names, kinds = sys.argv[1].split(), sys.argv[2].split()
asked = [(name, kind) for name in names for kind in kinds]
with ThreadPoolExecutor(1 if len(names) > 1 else len(kinds)) as pool:  # each retries for 23 s without a network
    answers = list(pool.map(message, *zip(*asked)))
print(json.dumps({f"{name} {kind}": answer for (name, kind), answer in zip(asked, answers)}))
"""


class Hub(BaseHTTPRequestHandler):
    """Refuses by the owner's name."""

    def do_GET(self) -> None:
        owner = next((name for name in ANSWERS if f"/{name}/" in self.path), "gone")
        status, code = ANSWERS[owner]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET
    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Silence."""


def asking(endpoint: str, names: list[str], kinds: list[str], repository: Path, cache: Path) -> subprocess.Popen[str]:
    """Each kind of load of each name, in a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.Popen(
        [sys.executable, "-c", ASK, " ".join(names), " ".join(kinds)],
        cwd=repository,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def messages_of(process: subprocess.Popen[str]) -> dict[str, str]:
    """What a user reads, by name and kind."""
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return dict(json.loads(said.splitlines()[-1]))


@pytest.fixture(scope="module")
def unreachable(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Nobody listens on port 1, and no test that runs beside this one can be given it: connections are refused."""
    cache = tmp_path_factory.mktemp("no-network")
    process = asking("http://127.0.0.1:1", ["some/thing"], NOT_REACHED, repository, cache)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def refused(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, unreachable: subprocess.Popen[str]
) -> Iterator[dict[str, str]]:
    """While the other process waits for its network."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [f"{owner}/thing" for owner in ANSWERS]
    cache = tmp_path_factory.mktemp("hub")
    yield messages_of(asking(f"http://127.0.0.1:{server.server_port}", names, list(KINDS), repository, cache))
    server.shutdown()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_is_named_with_its_status(refused: dict[str, str], kind: str, status: int) -> None:
    message = refused[f"gated{status}/thing {kind}"]
    assert message.startswith(f"{KINDS[kind]}: 'gated{status}/thing' is a gated repository on the Hub (HTTP {status})")
    assert "accept its terms" in message and "hf auth login" in message and "HF_TOKEN" in message
    page = "datasets/" if kind == "data" else ""
    assert f"https://huggingface.co/{page}gated{status}/thing" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("owner", ["private", "gone"])
def test_an_unknown_or_private_repository(refused: dict[str, str], kind: str, owner: str) -> None:
    message = refused[f"{owner}/thing {kind}"]
    assert f"{KINDS[kind]}: the Hub knows no '{owner}/thing', or it is private" in message
    assert "Check the spelling" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_without_a_reason(refused: dict[str, str], kind: str) -> None:
    assert "HTTP 403" in refused[f"banned/thing {kind}"]


@pytest.mark.slow
def test_no_network(unreachable: subprocess.Popen[str]) -> None:
    messages = messages_of(unreachable)
    for kind in NOT_REACHED:
        message = messages[f"some/thing {kind}"]
        assert message.startswith(f"{KINDS[kind]}: 'some/thing' is neither a local path nor in the local Hub cache")
        assert "cannot be reached" in message and "hf download" in message


def test_offline_mode_says_the_same() -> None:
    """The suite itself runs with HF_HUB_OFFLINE=1."""
    from pipeline.base import load_tokenizer
    from pipeline.recipe import schema

    with pytest.raises(UserError, match=r"base\.tokenizer: 'some/tokenizer' is neither a local path nor in the local"):
        load_tokenizer(schema.Base(model="some/model", tokenizer="some/tokenizer"))


@pytest.mark.parametrize("name", ["./x", "../x", "/x/y", "a/b/c", "rows.json", "owner/rows.jsonl", "~/x"])
def test_what_can_only_be_a_path_must_exist(name: str) -> None:
    assert looks_like_path(name)
    with pytest.raises(UserError, match=r"data\.train\.0\.path: found .* which does not exist"):
        check_local(name, "data.train.0.path")


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-2-7b-hf", "yahma/alpaca-cleaned"])
def test_hub_ids_are_no_paths(name: str) -> None:
    assert not looks_like_path(name)
    check_local(name, "base.model")
