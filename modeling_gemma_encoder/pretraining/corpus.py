"""Documents to train on, from files, from the Hub, or from the documentation of installed packages.

A data set of documents has one column, `text`.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from tqdm import tqdm

from .._scripts.files import is_local
from .._scripts.tables import read_table

STANDARD_LIBRARY = "python"
FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
TEXT_HELP = (
    "What to read: files or folders (.parquet, .jsonl, .json, .csv, .txt; every paragraph of a .txt is a document), a "
    "data set on the Hub as `name[:config[:split]]`, or `docstrings`, the documentation of every installed package."
)


@dataclass
class TextArguments:
    """Hold which text a script trains on; the fields are flags of the command line."""

    text: list[str] = field(metadata={"help": TEXT_HELP})
    validation_text: list[str] | None = field(
        default=None,
        metadata={
            "help": "As --text, held out; of `docstrings` other files. Default: of `docstrings` one file in ten, of "
            "all other text one document in a hundred."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Of Parquet, JSON, CSV and the Hub."})
    join_lines: bool = field(default=False, metadata={"help": "Undo hard line wrapping within paragraphs."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a training sequence."})
    streaming: bool = field(
        default=False, metadata={"help": "Read while training, text that fits on no disk; several texts alternate."}
    )
    validation_blocks: int = field(default=1000, metadata={"help": "Blocks evaluated of each held-out text, at most."})

    def validate(self) -> None:
        """Raise ValueError where flags contradict each other."""
        if self.streaming and self.validation_text is None:
            raise ValueError("--streaming needs --validation_text, because a stream cannot be split.")
        if self.block_size < 3:
            raise ValueError(f"--block_size must be at least 3 tokens; got {self.block_size}.")


class Docstring(NamedTuple):
    """Hold the documentation of a function or class, its lines joined, and whether its file is held
    out."""

    text: str
    held_out: bool


def join_lines(text: str) -> str:
    """Return a text with each paragraph in one line; an empty line separates paragraphs."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())


def installed_packages() -> list[str]:
    """Return the folder names of the standard library and of every package in site-packages."""
    folders = Path(sysconfig.get_paths()["purelib"]).iterdir()
    return [STANDARD_LIBRARY, *sorted(folder.name for folder in folders if (folder / "__init__.py").exists())]


def docstrings(package: str, min_length: int = 80) -> Iterator[Docstring]:
    """Yield documentation strings of an installed package, or of the standard library, `"python"`,
    without tests.

    Files come in a fixed shuffled order. One in ten is held out, by a hash of its path in the
    package. The held-out files are the same for every model, so that none is tested on what another
    one was trained on.

    Args:
        min_length: In characters; shorter ones say too little.
    """
    paths = sysconfig.get_paths()
    root = Path(paths["stdlib"]) if package == STANDARD_LIBRARY else Path(paths["purelib"]) / package
    skipped = {"site-packages", "tests", "test", "testing"}
    hashes = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not skipped & set(relative.parts):
            hashes[hashlib.sha256(f"{package}/{relative.as_posix()}".encode()).digest()] = path
    for digest, path in sorted(hashes.items()):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # some files are there to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = join_lines(ast.get_docstring(node) or "")
                if len(text) >= min_length:
                    yield Docstring(text, held_out=digest[-1] % 10 == 0)


@cache
def all_docstrings() -> dict[str, bool]:
    """Return documentation -> whether it is held out, of every installed package.

    A text that stands in several files is held out if one of them is.
    """
    texts = {}
    for package in tqdm(installed_packages(), desc="Reading docstrings"):
        for docstring in docstrings(package):
            texts[docstring.text] = texts.get(docstring.text, False) or docstring.held_out
    return texts


def read_text(source: str, options: TextArguments, held_out: bool = False) -> Dataset | IterableDataset:
    """Return the documents of a source, in one column, `text`.

    Args:
        source: Files or a folder, a data set on the Hub, or `docstrings`.
        held_out: Of `docstrings`, those of held-out files.

    Raises:
        FileNotFoundError, ValueError: The source does not exist, or is not of a kind that is read.
    """
    if source == "docstrings":
        texts = [text for text, is_out in all_docstrings().items() if is_out == held_out]
        rows = Dataset.from_dict({"text": texts})
        return rows.to_iterable_dataset() if options.streaming else rows
    if is_local(source) or Path(source).suffix in FILES or source.endswith("/"):
        return _read_files(source, options)
    name, config, split = [*source.split(":"), None, None][:3]
    rows = load_dataset(name, config or None, split=split or "train", streaming=options.streaming)
    return _as_text(rows, options.text_column, source)


def _read_files(source: str, options: TextArguments) -> Dataset | IterableDataset:
    names, kind = _find_files(source)
    if kind == "text":
        form = {"sample_by": "paragraph", "split": "train", "streaming": options.streaming}
        return _as_text(load_dataset(kind, data_files=names, **form), "text", source)
    if kind == "csv":  # pandas would take the first column for an index where a line has a field too many
        cells = partial(_cells, names, options.text_column)
        return IterableDataset.from_generator(cells) if options.streaming else Dataset.from_list([*cells()])
    rows = load_dataset(kind, data_files=names, split="train", streaming=options.streaming)
    return _as_text(rows, options.text_column, source)


def _find_files(source: str) -> tuple[list[str], str]:
    """Return the files of a source, and their kind, one of the values of `FILES`."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--text {source}: there is no such file or folder.")
    if path.is_file() and path.suffix not in FILES:
        raise ValueError(f"--text {source}: a file must be one of {', '.join(FILES)}.")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in FILES)
    kinds = {FILES[file.suffix] for file in files}
    if len(kinds) != 1:
        raise ValueError(f"--text {source}: the folder must hold files of one kind of {', '.join(FILES)}.")
    return [str(file) for file in files], kinds.pop()


def _as_text(rows: Dataset | IterableDataset, column: str, source: str) -> Dataset | IterableDataset:
    """Return a column alone, as `text`. Raise ValueError where it is known that there is none of
    this name."""
    if rows.column_names and column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise ValueError(f"--text_column {column}: {source} has the columns {columns}. Choose one of them.")
    rows = rows.select_columns(column)
    return rows if column == "text" else rows.rename_column(column, "text")


def _cells(names: list[str], column: str) -> Iterator[dict[str, str]]:
    """Yield the cells of a column of .csv files. Raise ValueError where a file has no such column."""
    for name in names:
        rows = read_table(Path(name))  # a row at a time: a stream may not fit into memory
        columns, where = next(rows, ([], name))
        if column not in columns:
            raise ValueError(
                f"--text_column {column}: {where} has the columns {', '.join(columns)}. Choose one of them."
            )
        yield from ({"text": row[columns.index(column)]} for row, _ in rows)


def load_documents(options: TextArguments, seed: int) -> tuple[dict, dict]:
    """Return documents to train on and held-out ones, each as a dict: short name of the source ->
    documents.

    Raises:
        FileNotFoundError, ValueError: A source cannot be read, or has too little to hold out.
    """
    train = {name: read_text(source, options) for name, source in _named(options.text).items()}
    if options.validation_text:
        named = _named(options.validation_text)
        return train, {name: read_text(source, options, held_out=True) for name, source in named.items()}
    held_out = {}
    if "docstrings" in train:  # files, not texts, are held out
        held_out["docstrings"] = read_text("docstrings", options, held_out=True)
    others = [rows for name, rows in train.items() if name not in held_out]
    if others:
        together = concatenate_datasets(others)
        if len(together) < 2:
            raise ValueError(
                "--text is a single document, which cannot be split to hold out a part. Either give more "
                "documents, or give --validation_text."
            )
        split = together.train_test_split(max(0.01, 1 / len(together)), seed=seed)
        held_out["held_out"] = split["test"]
        train = {**{name: rows for name, rows in train.items() if name in held_out}, "text": split["train"]}
    return train, held_out


def _named(sources: list[str]) -> dict[str, str]:
    """Return short name -> source, for tables: `books` for `books/validation.parquet`."""
    named = {}
    for source in sources:
        path = Path(source.split(":")[0])
        name = path.parent.name if path.stem in ("train", "validation", "test") and path.parent.name else path.stem
        named[source if name in named else name] = source
    return named
