"""Strict readers of the tables that people write: .csv, .tsv, .jsonl, .json and .parquet."""

import csv
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

from datasets import Dataset, load_dataset

from .files import _lines, open_text, read_lines


def line_of(path: Path, row: int) -> int | None:
    """Return the line where a row of a .csv, .tsv or .jsonl file begins, counted from 1; None for
    other files."""
    if path.suffix in (".csv", ".tsv"):
        places = (where for _, where in islice(read_table(path), 1, None))
    elif path.suffix == ".jsonl":
        places = (where for _, where in read_lines(path))
    else:
        return None
    where = next(islice(places, row, None), None)
    return where and int(where.rpartition(" ")[2])


def read_table(path: Path) -> Iterator[tuple[list[str], str]]:
    """Yield each row of a .csv or .tsv file and the place where it begins. The first row has the
    names of the columns.

    In .csv a text in quotes may hold commas and line ends. In .tsv tabs separate fields, and quotes
    are part of the text; a warning is printed where a field begins and ends with one.

    Raises:
        ValueError: A row has more or fewer fields than there are names, a name is there twice, or a
            quote is not closed. The message has the file and the line, as an editor counts them.
    """
    names = None
    for row, where in _tab_separated(path) if path.suffix == ".tsv" else _comma_separated(path):
        if names is None:
            names = row
            if path.suffix == ".csv" and len(names) == 1 and ";" in names[0]:
                raise ValueError(f"{where}: {names[0]!r} is separated by semicolons; save it with commas, or as .tsv.")
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
    """Warn that the quotes around a field are part of the text; once, however often a file is read."""
    print(
        f"WARNING: {where}: a field begins and ends with a quote, and in .tsv quotes are read as part of the text; "
        "if they only surround a field, save it as .csv",
        flush=True,
    )


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


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def at_row(place: str, row: int, path: Path | None) -> str:
    """Return what a message calls a row of a split, counted from 0, with its line in a file that
    has one."""
    line = path and line_of(path, row)
    return f"{place}, row {row}" if line is None else f"{place}, row {row} (line {line})"


def fill_texts(rows: Dataset, texts: Sequence[str], place: str) -> Dataset:
    """
    Replace each null with an empty text, which an empty field of a .csv file is, too.

    Raises:
        ValueError: A column is empty in every row.
    """
    for column in texts:
        if column not in rows.column_names or not len(rows):
            continue
        values = list(rows[column])
        if all(value is None or (isinstance(value, str) and not value.strip()) for value in values):
            raise ValueError(f"{place}: {column!r} is empty in every row.")
        if None in values and all(isinstance(value, str) for value in values if value is not None):
            filled = f"{column}, filled"  # added before the old one is removed, as a table without columns has no rows
            rows = rows.add_column(filled, [value or "" for value in values])
            rows = rows.remove_columns(column).rename_column(filled, column)
    return rows


def read_file(path: Path, texts: Sequence[str] | None = ()) -> Dataset:
    """
    Return the rows of a .jsonl, .json, .csv, .tsv or .parquet file.

    In .csv and .tsv nothing stands for a missing value: "NA" is a word. See `read_table`.

    Args:
        texts: The columns of .csv and .tsv that are text even where they hold numbers; None: all
            columns.

    Raises:
        ValueError: The file is missing, empty, of another kind, or cannot be read.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end with one of {', '.join(FORMATS)}.")
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    try:
        if FORMATS[path.suffix] == "csv":
            return _read_columns(path, texts)
        return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:
        if str(error).startswith(str(path)):  # the message has the place already
            raise
        if isinstance(cause := error.__cause__ or error, UnicodeDecodeError):
            cause = f"byte {cause.start} is not UTF-8; save it in that encoding"
        raise ValueError(f"{path} cannot be read: {cause}") from error


def _read_columns(path: Path, texts: Sequence[str] | None) -> Dataset:
    (names, _), *rows = list(read_table(path)) or [([], path)]
    names = [name or f"Unnamed: {number}" for number, name in enumerate(names)]  # an index, which pandas names so
    columns = {name: [row[number] for row, _ in rows] for number, name in enumerate(names)}
    kept = columns if texts is None else texts
    return Dataset.from_dict({name: cells if name in kept else as_numbers(cells) for name, cells in columns.items()})


WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,14})")

DECIMAL = re.compile(WHOLE.pattern + r"(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?")

TRUTH = {"true": True, "false": False}


def as_numbers(cells: list[str]) -> list[str] | list[int] | list[float] | list[bool]:
    """Return cells as numbers if all are, with no more digits than a float keeps; "007" is a name."""
    bare = [cell.strip() for cell in cells]
    if all(cell.lower() in TRUTH for cell in bare):
        return [TRUTH[cell.lower()] for cell in bare]
    for form, kind in ((WHOLE, int), (DECIMAL, float)):
        if all(map(form.fullmatch, bare)):
            return list(map(kind, bare))
    return cells
