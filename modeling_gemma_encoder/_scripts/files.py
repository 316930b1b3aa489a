"""Files that people write and programs read: strict readers of lines and tables, small files
written whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def write(path: Path, text: str) -> None:
    """Write a text file whole, or leave the one that is there."""
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def is_local(name: str) -> bool:
    """Return whether a name is a path, which may not exist, and not `owner/name` or a GGUF file on
    the Hub."""
    bare = name.partition(":")[0]
    several = bare.endswith("/") or (bare.count("/") > 1 and not bare.endswith(".gguf"))
    return several or name.startswith((".", "/", "~")) or Path(name).exists()


def is_missing(checkpoint: str) -> bool:
    """Return whether a name is that of a folder or file which does not exist. Decoders and rankers on
    the Hub all have an owner, as in `owner/name`."""
    return not Path(checkpoint).expanduser().exists() and (is_local(checkpoint) or "/" not in checkpoint)


def read(path: Path) -> dict:
    """Return the content of a JSON file; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


@contextmanager
def open_text(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    """Open a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: The file has another encoding; the message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        raise ValueError(_not_in_utf8(path)) from None


def _not_in_utf8(path: Path) -> str:
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"{path}, line {number}: byte {place + error.start} is not UTF-8; save it in that encoding"
            place += len(line)
    return f"{path} is not UTF-8; save it in that encoding"


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line that is not blank, without its end, and its place. Only a line feed ends a
    line."""
    for line, where in _lines(path):
        if line.strip():
            yield line, where


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line without its end, and its place. Raise ValueError for lines that end in
    carriage returns alone."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and not line.endswith("\n") and "\r" in line.rstrip("\r"):
                raise ValueError(f"{path}: lines end in carriage returns alone; save it with line feeds (Unix)")
            yield line.rstrip("\r\n"), f"{path}, line {number}"
