"""Secrets are left out of what is printed and of what is written.

Tokens belong into the environment (HF_TOKEN, WANDB_API_KEY) or into the files of `hf auth login`; nothing here reads
them. But they slip into command lines, recipes and messages of other libraries, and from there into provenance,
reports, logs and job scripts. Recipes that hold one are refused; everything else passes through :func:`redacted`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence

HIDDEN = "***"
TOKEN = re.compile(
    r"""\b(?: hf_[A-Za-z0-9]{16,} | hf_(?:oauth|jwt)_[\w.-]{16,}  # Hugging Face
        | gh[opsur]_[A-Za-z0-9]{20,} | github_pat_\w{20,}          # GitHub
        | sk-[\w-]{20,} | AKIA[0-9A-Z]{16} | xox[abp]-[\w-]{10,}   # OpenAI and others, Amazon, Slack
        )""",
    re.VERBOSE,
)
"""Access tokens that can be told by their form."""
_LOGIN = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
"""``user:password`` in an address."""
_NAME = re.compile(
    r"(?:^|[._-])(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|credentials?)$",
    re.IGNORECASE,
)
_MARKS = re.compile(r"(?:pad|eos|bos|unk|mask|cls|sep|boi|eoi|image|audio)_token$", re.IGNORECASE)
_SHORTEST = 8
"""Characters of a secret in the environment; what is shorter may be a word."""


def is_secret(name: str) -> bool:
    """Whether an option, key or variable of this name holds a secret: ``hub_token``, not ``pad_token``."""
    return _NAME.search(name) is not None and _MARKS.search(name) is None


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with ``***`` in place of tokens, of passwords in addresses, and of the environment's own secrets."""
    for name, value in environment.items():
        if len(value) >= _SHORTEST and is_secret(name):
            text = text.replace(value, HIDDEN)
    return _LOGIN.sub(HIDDEN, TOKEN.sub(HIDDEN, text))


def command_line(arguments: Sequence[str]) -> str:
    """A command as a shell takes it, without secrets: ``--token X``, ``--token=X`` and ``key.token=X`` lose theirs."""
    shown, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = is_secret(name.lstrip("-"))
        shown.append(HIDDEN if hide else f"{name}={HIDDEN}" if equals and secret else redacted(argument))
        hide = secret and not equals and argument.startswith("-")
    return shlex.join(shown)
