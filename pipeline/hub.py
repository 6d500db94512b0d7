"""Names that may be local paths or Hub ids, and what to say when one cannot be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.exceptions import DatasetNotFoundError
from httpx2 import ConnectError, ConnectTimeout, HTTPError, NetworkError, RemoteProtocolError, TimeoutException
from huggingface_hub import _CACHED_NO_EXIST, HfApi, constants, get_token, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from pipeline.errors import UserError
from pipeline.recipe.problems import shortened

BROKEN_OFF = (NetworkError, TimeoutException, RemoteProtocolError)
"""What is left of a download when huggingface_hub has tried it again often enough (its own list, utils/_http.py)."""
UNREACHABLE = (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    ConnectionError,
    TimeoutError,
    ConnectError,
    ConnectTimeout,
)
CLIENT_CLOSED = "client has been closed"
"""httpx2's words where another thread found no network and closed the client that they share (huggingface_hub 2.4,
utils/_http.py, close_session)."""
XET_FAILED = "File reconstruction error"
"""hf_xet's words (1.8) for a download that it gave up; most large files of the Hub come through it."""
PICKLES = (
    "A pickle can run code when it is read, so none is. Take a model in safetensors, or convert this one where you "
    "trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), and its tokenizer likewise."
)


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a local path: Hub ids are ``name`` or ``owner/name``."""
    return (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in {".json", ".jsonl", ".parquet"}
    )


def check_local(name: str, key: str) -> None:
    """Raise ``UserError`` for a name that can only be a local path and does not exist."""
    if looks_like_path(name) and not os.path.exists(os.path.expanduser(name)):
        raise UserError(
            f"{key}: found {shortened(name)!r}, which does not exist (looked from {Path.cwd()}).\n"
            "Expected a file or folder; give its path from the working directory, or an absolute one."
        )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that led to it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _gated_status(error: BaseException) -> int | None:
    """HTTP status with which a gated repository refused, or None where the error is of another kind."""
    if isinstance(error, GatedRepoError):
        return error.response.status_code
    # datasets re-raises without the cause (5.2, dataset_module_factory): its words are all that is left of it
    if isinstance(error, DatasetNotFoundError) and "is a gated dataset" in str(error):
        return 401 if "must be authenticated" in str(error) else 403
    return None


def _fetched(name: str, key: str, revision: str) -> str:
    """How to have it without a network: datasets does not look into the cache that ``hf download`` fills (5.2)."""
    if key.startswith("data."):
        return (
            "Where there is a network, `launch/check.py RECIPE` fetches it; then copy the cache (HF_HOME) here. Or "
            f"fetch its files with `hf download {name} --repo-type dataset --local-dir FOLDER`, and give those of your "
            f"split in {key}, one source each."
        )
    command = f"hf download {name}" + (f" --revision {revision}" if revision != "main" else "")
    return f"Where there is a network, `{command}` fetches it; then copy the cache (HF_HOME) here."


def _not_here(name: str, key: str, revision: str) -> str:
    reason = " (HF_HUB_OFFLINE is set)" if is_offline_mode() else ""
    return (
        f"{key}: {name!r} is neither a local path nor in the local Hub cache, and the Hub cannot be reached{reason}.\n"
        + _fetched(name, key, revision)
    )


def _no_safetensors(name: str, key: str, revision: str) -> str:
    """transformers finds no weights in safetensors, and says no more of a network that failed while it looked."""
    if _has_pickles_alone(name, revision):
        return f"{key}: {name!r} has no weights in safetensors.\n{PICKLES}"
    if is_offline_mode():
        return _not_here(name, key, revision)
    return (
        f"{key}: no weights in safetensors were found for {name!r}: it has none, or the network failed.\n"
        f"{_fetched(name, key, revision)}\n{PICKLES}"
    )


def _has_pickles_alone(name: str, revision: str) -> bool:
    """Whether this is certain: of a folder, or of a repository by what the cache keeps of it and the Hub answered."""
    if os.path.exists(os.path.expanduser(name)):
        return True
    wanted = [constants.SAFETENSORS_SINGLE_FILE, constants.SAFETENSORS_INDEX_FILE]
    pickles = [constants.PYTORCH_WEIGHTS_NAME, f"{constants.PYTORCH_WEIGHTS_NAME}.index.json"]
    return all(try_to_load_from_cache(name, file, revision=revision) is _CACHED_NO_EXIST for file in wanted) or any(
        isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in pickles
    )


def _again(name: str) -> str:
    """A hint for errors that name no cause: transformers says of some downloads that broke off that a file lacks."""
    return "" if os.path.exists(os.path.expanduser(name)) else "\nIf the network failed meanwhile, start again."


def _says_unreachable(words: str) -> bool:
    """Whether an error that kept nothing but its words is of a network that is not there."""
    return "couldn't connect" in words.lower() or CLIENT_CLOSED in words


def _broken_off(error: BaseException) -> bool:
    """Whether a download failed that had begun."""
    if isinstance(error, RuntimeError):
        return XET_FAILED in str(error)
    return isinstance(error, BROKEN_OFF) and not isinstance(error, UNREACHABLE)


def _hub_message(name: str, key: str, revision: str, error: BaseException) -> str | None:
    """Plain words for a Hub error, or None where the error is of another kind."""
    causes = list(_chain(error))
    status = next(
        (e.response.status_code for e in causes if isinstance(e, HfHubHTTPError) and e.response is not None), None
    )
    gated = next(filter(None, map(_gated_status, causes)), None)
    if gated:
        page = f"datasets/{name}" if key.startswith("data.") else name
        return (
            f"{key}: {name!r} is a gated repository on the Hub (HTTP {gated}): it needs an accepted licence and a "
            f"login.\nOpen https://huggingface.co/{page}, accept its terms, then run `hf auth login` or set HF_TOKEN."
        )
    if any(isinstance(e, (RepositoryNotFoundError, DatasetNotFoundError)) for e in causes):
        return (
            f"{key}: the Hub knows no {name!r}, or it is private (HTTP {status or 404}).\n"
            "Check the spelling; for a private repository run `hf auth login` or set HF_TOKEN."
        )
    if status in (401, 403):
        return f"{key}: the Hub refused {name!r} (HTTP {status}). Run `hf auth login` or set HF_TOKEN."
    if any("cannot be loaded with `safetensors`" in str(e) for e in causes):  # transformers' words, 5.23
        return _no_safetensors(name, key, revision)
    if any("trust_remote_code=True" in str(e) for e in causes):
        return (
            f"{key}: {name!r} brings Python code of its own, and base.trust_remote_code is false.\n"
            "Read that code; then set base.trust_remote_code=true, with the commit that you read in base.revision."
        )
    broken = next(filter(_broken_off, causes), None)
    if broken is not None:
        return (
            f"{key}: the download of {name!r} from the Hub broke off: {type(broken).__name__}: {broken}\n"
            f"Start again: files that are whole stay in the cache. {_fetched(name, key, revision)}"
        )
    if any(isinstance(e, UNREACHABLE) or _says_unreachable(str(e)) for e in causes):
        return _not_here(name, key, revision)
    if any(isinstance(e, EntryNotFoundError) for e in causes):
        return f"{key}: {name!r} lacks a file that is needed: {error}"
    return None


@contextmanager
def hub_errors(name: str, key: str, revision: str = "main") -> Iterator[None]:
    """Turn what Hugging Face libraries raise for an unreachable, gated or missing repository into ``UserError``.

    Args:
        name: the path or Hub id being loaded.
        key: the recipe key it stands under.
        revision: of the repository.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in (CLIENT_CLOSED, XET_FAILED)):
            raise  # of a computation
        message = _hub_message(name, key, revision, error)
        raise UserError(message or f"{key}: {name!r} cannot be loaded: {error}{_again(name)}") from error


def check_push(repo_id: str) -> None:
    """Make sure that the Hub will take an upload: a right name, a network, and a token of the environment.

    Args:
        repo_id: ``owner/name``, or ``name`` for the token's owner.

    Raises:
        UserError: says which of them is wrong.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: found {repo_id!r}, expected owner/name: {error}") from error
    if get_token() is None:
        raise UserError("--push-to-hub: no token. Set HF_TOKEN, or run `hf auth login`; it needs write access.")
    with _push_errors(repo_id):
        HfApi().whoami()


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a folder to a model repository, which is created where it is not there yet.

    Returns:
        The repository's address.

    Raises:
        UserError: the Hub refused, or could not be reached.
    """
    with _push_errors(repo_id):
        address = HfApi().create_repo(repo_id, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload by lora-dropout")
    return str(address)


@contextmanager
def _push_errors(repo_id: str) -> Iterator[None]:
    """What the Hub's client raises, in our words."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push-to-hub: {repo_id!r}: HF_HUB_OFFLINE is set; unset it to upload.") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"--push-to-hub: the Hub refused {repo_id!r} (HTTP {error.response.status_code}).\n"
            "Check the name, and that the token of HF_TOKEN or `hf auth login` may write there."
        ) from error
    except (HTTPError, OSError) as error:
        raise UserError(f"--push-to-hub: the Hub cannot be reached for {repo_id!r}: {error}") from error
