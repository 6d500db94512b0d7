"""Small files, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Numbers of ``OSError`` of a disk that takes no more."""


def write_text(file: Path, text: str, durable: bool = True) -> None:
    """Write aside, synchronise, rename: whoever reads, or is killed, finds the old file or the new one.

    Args:
        file: in a folder that exists.
        text: its whole content.
        durable: synchronise its content before it gets its name; a heartbeat need not outlive the machine's end.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    temporary = file.with_name(file.name + ".part")
    with temporary.open("w") as opened:
        opened.write(text)
        opened.flush()
        if durable:
            os.fsync(opened.fileno())
    temporary.replace(file)


def write_json(file: Path, content: Any) -> None:
    """:func:`write_text` of JSON, with its keys in order."""
    write_text(file, json.dumps(content, indent=2, sort_keys=True) + "\n")
