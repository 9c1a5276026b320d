"""Reader of small JSON files and lines that another process may be writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path, *, must_be_readable: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file does not exist or is incomplete.

    A file that exists and cannot be read is empty too. With `must_be_readable` its OSError is raised.
    """
    try:
        return parse_json_object(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError:
        if must_be_readable:
            raise
        return {}


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Return the JSON object in a file or line; empty if it is not an object or is incomplete."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):  # incomplete, because its process was killed or is still writing
        return {}
    return tree if isinstance(tree, dict) else {}
