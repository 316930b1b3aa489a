"""Files that people write and programs read: strict readers of lines and tables, small files written whole."""

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TextIO


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def is_local(name: str) -> bool:
    """Whether it names a place here, which may be missing, and nothing on the Hub, `owner/name` or a GGUF file."""
    bare = name.partition(":")[0]
    several = bare.endswith("/") or (bare.count("/") > 1 and not bare.endswith(".gguf"))
    return several or name.startswith((".", "/", "~")) or Path(name).exists()


def read(path: Path) -> dict:
    """A JSON file's content; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


@contextmanager
def open_text(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    """Open a file in UTF-8, with or without a byte order mark. Any other encoding raises ValueError with its line."""
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
    """Yield the lines that are not blank, without their ends, and where each is; only a line feed ends one."""
    for line, where in _lines(path):
        if line.strip():
            yield line, where


def line_of(path: Path, row: int) -> int | None:
    """Return the line where a row of a .csv, .tsv or .jsonl file begins, counted from 1; None for other files."""
    if path.suffix in (".csv", ".tsv"):
        places = (where for _, where in islice(read_table(path), 1, None))
    elif path.suffix == ".jsonl":
        places = (where for _, where in read_lines(path))
    else:
        return None
    where = next(islice(places, row, None), None)
    return where and int(where.rpartition(" ")[2])


def read_table(path: Path) -> Iterator[tuple[list[str], str]]:
    """
    Yield the rows of a .csv or .tsv file and where each begins; the first has the columns' names.

    A text in quotes may hold commas and line ends in .csv; in .tsv a tab parts fields, and quotes are only that, of
    which a warning is printed where a field begins and ends with one.

    Raises:
        ValueError: a row has more or fewer fields than there are names, a name is there twice, or a quote is not
            closed. The message has file and line, as an editor counts them.
    """
    names = None
    for row, where in _tab_separated(path) if path.suffix == ".tsv" else _comma_separated(path):
        if names is None:
            names = row
            if path.suffix == ".csv" and len(names) == 1 and ";" in names[0]:
                raise ValueError(f"{where}: {names[0]!r} is parted by semicolons; save it with commas, or as .tsv.")
            if twice := [name for number, name in enumerate(names) if name in names[:number]]:
                raise ValueError(f"{where}: names the column {twice[0]!r} twice; rename one.")
        elif len(row) != len(names):
            if len(row) == 1 and not row[0].strip():
                continue  # a line of blanks
            hint = "; a text with a comma needs quotes" if path.suffix == ".csv" and len(row) > len(names) else ""
            raise ValueError(f"{where}: {len(row)} fields, and the first line names {len(names)}: {names}{hint}.")
        yield row, where


QUOTED = re.compile(r'".*"')


def _tab_separated(path: Path) -> Iterator[tuple[list[str], str]]:
    quoted = False
    for line, where in _lines(path):
        if line:
            fields = line.split("\t")
            if not quoted and any(map(QUOTED.fullmatch, fields)):
                quoted = True
                _say_quoted(where)
            yield fields, where


@cache
def _say_quoted(where: str) -> None:
    """Say that the quotes around a field are read, once however often the file is."""
    print(
        f"WARNING: {where}: a field begins and ends with a quote, and in .tsv quotes are read as part of the text; "
        "where they only surround a field, save it as .csv",
        flush=True,
    )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield lines without their ends, and where each is. Raises ValueError for lines that end in returns alone."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and not line.endswith("\n") and "\r" in line.rstrip("\r"):
                raise ValueError(f"{path}: lines end in carriage returns alone; save it with line feeds (Unix)")
            yield line.rstrip("\r\n"), f"{path}, line {number}"


def _comma_separated(path: Path) -> Iterator[tuple[list[str], str]]:
    csv.field_size_limit(2**31 - 1)  # or a text of more than 131,072 letters is an error
    begins = 1
    with open_text(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for row in reader:
                where, begins = f"{path}, line {begins}", reader.line_num + 1
                if row:
                    yield row, where
        except csv.Error as error:
            raise ValueError(f"{path}, line {begins}: {error}; a quote within a text in quotes is doubled") from error
