"""What a user reads when the Hub refuses, breaks off or is not there: real requests to a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest

from pipeline.errors import UserError
from pipeline.hub import check_local, hub_errors, looks_like_path

# owner -> HTTP status and the Hub's X-Error-Code
ANSWERS = {
    "gated401": (401, "GatedRepo"),
    "gated403": (403, "GatedRepo"),
    "private": (401, "RepoNotFound"),
    "gone": (404, "RepoNotFound"),
    "banned": (403, ""),
    "broken": (200, ""),
    "xet": (200, ""),
    "pickled": (404, "EntryNotFound"),
}
REFUSED = ["gated401", "gated403", "private", "gone", "banned"]
HAS = {"id": "pickled/thing", "sha": "1" * 40, "siblings": [{"rfilename": "config.json"}, {"rfilename": "a.bin"}]}
CONFIG = json.dumps(
    {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
).encode()

KINDS = {"tokenizer": "base.model", "config": "base.model", "model": "base.model", "data": "data.train.0.path"}
NOT_REACHED = ["config", "data"]
BROKEN_OFF = ["model", "data"]

ASK = """
import json
import sys

from pipeline.process.environment import prepare_environment

prepare_environment()  # as every command does

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


print(json.dumps({asked: message(*asked.split()) for asked in sys.argv[1:]}))
"""


class Hub(BaseHTTPRequestHandler):
    """Refuses by the owner's name, breaks off, or has a configuration without weights."""

    def do_HEAD(self) -> None:
        here = f"http://{self.headers['Host']}"
        owner = next((name for name in ANSWERS if f"/{name}/" in self.path), "gone")
        status, code = (200, "") if self.body() or self.path == "/token" else ANSWERS[owner]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if owner in ("broken", "xet", "pickled"):
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("ETag", '"1"')
        if owner == "xet":
            self.send_header("X-Xet-Hash", "a" * 64)
            self.send_header("X-Xet-Refresh-Route", f"{here}/token")
        if self.path == "/token":
            self.send_header("X-Xet-Cas-Url", here)  # which refuses whatever is asked for there
            self.send_header("X-Xet-Access-Token", "x")
            self.send_header("X-Xet-Token-Expiration", "9999999999")
        length = 9 if owner in ("broken", "xet") else len(self.body())
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def body(self) -> bytes:
        """What one repository has."""
        if self.path.startswith("/api/models/pickled/"):
            return json.dumps(HAS).encode()
        return CONFIG if "/pickled/" in self.path and self.path.endswith("/config.json") else b""

    def do_GET(self) -> None:
        """Of other bodies nothing arrives but their length."""
        self.do_HEAD()
        self.wfile.write(self.body())

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Silence."""


def asking(endpoint: str, asked: list[str], repository: Path, cache: Path) -> subprocess.Popen[str]:
    """Names with the kinds of their loads, one after the other, in a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.Popen(
        [sys.executable, "-c", ASK, *asked],
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
def unreachable(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes that try again for 23 s, by kind of load; one process would share one client of the Hub.

    Nobody listens on port 1, and no test that runs beside this one can be given it: connections are refused.
    """
    processes = {
        kind: asking("http://127.0.0.1:1", [f"some/thing {kind}"], repository, tmp_path_factory.mktemp(f"no-{kind}"))
        for kind in NOT_REACHED
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def answered(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, unreachable: dict[str, subprocess.Popen[str]]
) -> Iterator[dict[str, str]]:
    """While the other processes wait for their network."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = [f"{owner}/thing {kind}" for owner in REFUSED for kind in KINDS]
    asked += [f"broken/thing {kind}" for kind in BROKEN_OFF] + ["xet/thing config", "pickled/thing model"]
    yield messages_of(
        asking(f"http://127.0.0.1:{server.server_port}", asked, repository, tmp_path_factory.mktemp("hub"))
    )
    server.shutdown()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_is_named_with_its_status(answered: dict[str, str], kind: str, status: int) -> None:
    message = answered[f"gated{status}/thing {kind}"]
    assert message.startswith(f"{KINDS[kind]}: 'gated{status}/thing' is a gated repository on the Hub (HTTP {status})")
    assert "accept its terms" in message and "hf auth login" in message and "HF_TOKEN" in message
    page = "datasets/" if kind == "data" else ""
    assert f"https://huggingface.co/{page}gated{status}/thing" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("owner", ["private", "gone"])
def test_an_unknown_or_private_repository(answered: dict[str, str], kind: str, owner: str) -> None:
    message = answered[f"{owner}/thing {kind}"]
    assert f"{KINDS[kind]}: the Hub knows no '{owner}/thing', or it is private" in message
    assert "Check the spelling" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_without_a_reason(answered: dict[str, str], kind: str) -> None:
    assert "HTTP 403" in answered[f"banned/thing {kind}"]


@pytest.mark.parametrize("kind", BROKEN_OFF)
def test_a_download_that_breaks_off(answered: dict[str, str], kind: str) -> None:
    message = answered[f"broken/thing {kind}"]
    assert message.startswith(f"{KINDS[kind]}: the download of 'broken/thing' from the Hub broke off: RemoteProtocol")
    assert "Start again" in message


def test_a_download_that_the_hubs_storage_refuses(answered: dict[str, str]) -> None:
    """hf_xet raises RuntimeError."""
    message = answered["xet/thing config"]
    assert message.startswith("base.model: the download of 'xet/thing' from the Hub broke off: RuntimeError: ")
    assert "Start again" in message


def test_a_repository_without_safetensors(answered: dict[str, str]) -> None:
    message = answered["pickled/thing model"]
    assert message.startswith("base.model: 'pickled/thing' has no weights in safetensors.")
    assert "AutoModelForCausalLM" in message and "network" not in message


@pytest.mark.slow
@pytest.mark.parametrize("kind", NOT_REACHED)
def test_no_network(unreachable: dict[str, subprocess.Popen[str]], kind: str) -> None:
    message = messages_of(unreachable[kind])[f"some/thing {kind}"]
    assert message.startswith(f"{KINDS[kind]}: 'some/thing' is neither a local path nor in the local Hub cache")
    assert "cannot be reached" in message
    assert ("hf download some/thing --repo-type dataset" if kind == "data" else "`hf download some/thing`") in message


def caused(error: Exception, cause: Exception) -> Exception:
    """An error that another led to, as libraries wrap those of the network."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx2.ConnectError("[Errno -2] Name or service not known"), "cannot be reached"),
        (httpx2.ConnectTimeout("timed out"), "cannot be reached"),
        (RuntimeError("Cannot send a request, as the client has been closed."), "cannot be reached"),
        (caused(OSError("Can't load it"), RuntimeError("as the client has been closed.")), "cannot be reached"),
        (httpx2.ReadTimeout("timed out"), "broke off: ReadTimeout: timed out"),
        (httpx2.ReadError("[Errno 104] Connection reset by peer"), "broke off: ReadError"),
        (caused(OSError("Can't load it"), httpx2.RemoteProtocolError("peer closed")), "broke off: RemoteProtocolError"),
        (
            RuntimeError("Task error: File reconstruction error: CAS Client Error: Request middleware error: error s"),
            "broke off: RuntimeError: Task error",
        ),
        (httpx2.UnsupportedProtocol("Request URL is missing an 'http://' protocol"), "cannot be loaded: Request URL"),
        (
            OSError("some/thing does not appear to have files named"),
            "named\nIf the network failed meanwhile, start again.",
        ),
    ],
)
def test_errors_of_the_network_are_told_in_words(error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=r"base\.model: .*some/thing") as told, hub_errors("some/thing", "base.model"):
        raise error
    assert words in str(told.value)


OFFLINE = r"is neither a local path .* \(HF_HUB_OFFLINE is set\)\.\n.*`hf download some/thing --revision v1`"
PICKLED = "'some/thing' has no weights in safetensors"
UNCLEAR = "no weights in safetensors were found for 'some/thing': it has none, or the network failed"


@pytest.mark.parametrize(
    ("kept", "offline", "words"),
    [
        ([], True, OFFLINE),
        ([], False, UNCLEAR),
        ([".no_exist/1/model.safetensors"], True, OFFLINE),  # it may be sharded
        ([".no_exist/1/model.safetensors"], False, UNCLEAR),
        ([".no_exist/1/model.safetensors", ".no_exist/1/model.safetensors.index.json"], True, PICKLED),
        (["snapshots/1/pytorch_model.bin"], True, PICKLED),
        (["snapshots/1/pytorch_model.bin.index.json"], False, PICKLED),
    ],
)
def test_weights_that_are_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[str], offline: bool, words: str
) -> None:
    """transformers says the same of a base whose weights are pickles and of one that it could not look for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    for name, content in {"refs/v1": "1", "snapshots/1/config.json": "{}", **dict.fromkeys(kept, "")}.items():
        file = tmp_path / "models--some--thing" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    with pytest.raises(UserError, match=f"(?s){words}"), hub_errors("some/thing", "base.model", "v1"):
        raise OSError("some/thing is a model that cannot be loaded with `safetensors`")


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no weights in safetensors"), hub_errors(str(tmp_path), "base.model"):
        raise OSError("it is a model that cannot be loaded with `safetensors`")


def test_other_errors_of_a_computation_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), hub_errors("some/thing", "base.model"):
        raise RuntimeError("out of memory")


def test_a_local_path_has_nothing_to_do_with_the_network(tmp_path: Path) -> None:
    with pytest.raises(UserError) as told, hub_errors(str(tmp_path), "base.model"):
        raise OSError("no file named config.json")
    assert "network" not in str(told.value)


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
