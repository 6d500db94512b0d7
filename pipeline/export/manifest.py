"""``manifest.json`` of an export: which form it has, and which adapter it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

Form = Literal["plain", "merged", "ensemble"]
MANIFEST_FILE = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Of an export; None where there is none of ours: other programs' files have that name, too."""
    try:
        found = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(found, dict) and found.get("form") in get_args(Form) and isinstance(found.get("source"), dict)
    return found if ours else None
