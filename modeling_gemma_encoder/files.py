"""Small files that people and other programs read: written whole or not at all."""

import json
from pathlib import Path


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def read(path: Path) -> dict:
    """A JSON file's content; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}
