"""Small files that people and other programs read: written whole or not at all."""

import json
from pathlib import Path


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def is_local(name: str) -> bool:
    """Whether it names a place here, which may be missing, and nothing on the Hub."""
    return Path(name).exists() or name.startswith((".", "/", "~"))


def read(path: Path) -> dict:
    """A JSON file's content; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}
