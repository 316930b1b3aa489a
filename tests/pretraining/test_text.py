"""Laws of text for training: nothing is lost, nothing is both read and held out."""

import copy
import json
from pathlib import Path

import click
import numpy as np
import pytest
from datasets import Dataset

from modeling_gemma_encoder.pretraining import corpus as text
from modeling_gemma_encoder.pretraining.blocks import load_blocks, pack
from modeling_gemma_encoder.pretraining.corpus import TextArguments, docstrings, join_lines, load_documents, read_text

TEXTS = ["The first text.\nIt goes on.\n\nA second paragraph.", "Another, shorter one.", "A third. " * 40]


def test_join_lines_by_hand():
    assert join_lines("One\nline  here.\n\n \nAnother\n  one.\n") == "One line here.\n\nAnother one."


def test_blocks_are_the_texts_in_order(nano_tokenizer):
    blocks = np.array(pack({"text": TEXTS}, nano_tokenizer, block_size=8, join=False)["input_ids"])
    assert blocks.shape[1] == 8 and (blocks[:, 0] == nano_tokenizer.bos_token_id).all()
    stream = [
        token
        for text in TEXTS
        for token in [*nano_tokenizer(text, add_special_tokens=False)["input_ids"], nano_tokenizer.eos_token_id]
    ]
    assert blocks[:, 1:].ravel().tolist() == stream[: len(stream) // 7 * 7]


def test_blocks_of_a_tokenizer_without_a_start_are_text_alone(nano_tokenizer):
    """Qwen's have no <bos>."""
    tokenizer = copy.deepcopy(nano_tokenizer)
    tokenizer.bos_token = None
    blocks = np.array(pack({"text": TEXTS}, tokenizer, block_size=7, join=False)["input_ids"])
    with_start = np.array(pack({"text": TEXTS}, nano_tokenizer, block_size=8, join=False)["input_ids"])
    assert np.array_equal(blocks, with_start[:, 1:])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token for the end of a text"):
        pack({"text": TEXTS}, tokenizer, block_size=7, join=False)


def write(folder, kind: str) -> str:
    path = folder / f"books.{kind}"
    if kind == "parquet":
        Dataset.from_dict({"text": TEXTS, "title": ["a", "b", "c"]}).to_parquet(path)
    elif kind == "csv":
        quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
        path.write_text("n,text\n" + "".join(f"1,{text}\n" for text in quoted))
    elif kind == "txt":
        path.write_text("\n\n".join(text.replace("\n", " ") for text in TEXTS))
    else:
        path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "txt"])
def test_any_file_gives_its_texts(kind, streaming, tmp_path):
    path = write(tmp_path, kind)
    rows = read_text(path, TextArguments(text=[path], streaming=streaming))
    expected = [text.replace("\n", " ") for text in TEXTS] if kind == "txt" else TEXTS
    assert [row["text"].strip() for row in rows] == [text.strip() for text in expected]
    assert all(set(row) == {"text"} for row in rows)


def test_a_folder_gives_the_texts_of_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a", "jsonl")
    write(tmp_path / "b", "jsonl")
    assert len(read_text(str(tmp_path), TextArguments(text=[str(tmp_path)]))) == 2 * len(TEXTS)


def test_another_column_can_be_the_text(tmp_path):
    path = write(tmp_path, "parquet")
    rows = read_text(path, TextArguments(text=[path], text_column="title"))
    assert rows["text"][:] == ["a", "b", "c"]


def test_streaming_gives_the_same_blocks(nano_tokenizer, tmp_path):
    path = write(tmp_path, "jsonl")
    blocks = []
    for streaming in (False, True):
        options = TextArguments(text=[path], validation_text=[path], streaming=streaming, block_size=8)
        train, held_out = load_blocks(*load_documents(options, seed=0), nano_tokenizer, options, seed=0)
        assert list(held_out) == ["books"]
        blocks.append(sorted(tuple(row["input_ids"]) for row in train))
    assert blocks[0] == blocks[1]


def test_blank_texts_are_no_documents_and_newlines_are_read_whole(nano_tokenizer):
    def encode(text):
        return nano_tokenizer(text, add_special_tokens=False)["input_ids"]

    texts = ["", None, "a\n\n\n\nb", "  \n", "c"]
    blocks = np.array(pack({"text": texts}, nano_tokenizer, block_size=4, join=False)["input_ids"])
    stream = [*encode("a\n\n\n\nb"), 1, *encode("c"), 1]
    assert blocks[:, 1:].ravel().tolist() == stream[: len(stream) // 3 * 3]
    assert np.array(pack({"text": ["", None]}, nano_tokenizer, 4, join=True)["input_ids"]).size == 0


def test_one_document_in_a_hundred_is_held_out_by_default(monkeypatch, tmp_path):
    paths = []
    for name in ("some", "more"):
        paths.append(str(tmp_path / f"{name}.jsonl"))
        rows = [json.dumps({"text": f"Text number {number} of {name}."}) + "\n" for number in range(100)]
        Path(paths[-1]).write_text("".join(rows))
    train, held_out = load_documents(TextArguments(text=paths), seed=0)
    assert len(train["text"]) == 198 and len(held_out["held_out"]) == 2
    assert not set(train["text"]["text"]) & set(held_out["held_out"]["text"])
    monkeypatch.setattr(text, "all_docstrings", lambda: {"read": False, "kept": True})
    train, held_out = load_documents(TextArguments(text=[*paths, "docstrings"]), seed=0)
    assert set(train) == {"docstrings", "text"} and set(held_out) == {"docstrings", "held_out"}
    assert train["docstrings"]["text"][:] == ["read"] and held_out["docstrings"]["text"][:] == ["kept"]
    (tmp_path / "one.txt").write_text("One document.")
    with pytest.raises(ValueError, match="give --validation_text"):
        load_documents(TextArguments(text=[str(tmp_path / "one.txt")]), seed=0)


def test_sources_of_one_name_are_kept_apart(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path, "jsonl"), write(tmp_path / "other", "jsonl")]
    _, held_out = load_documents(TextArguments(text=paths, validation_text=paths), seed=0)
    assert list(held_out) == ["books", paths[1]]


def test_docstrings_are_held_out_by_file(monkeypatch):
    found = list(docstrings("click"))
    assert found == list(docstrings("click"))  # the same files whoever asks
    assert 0 < sum(docstring.held_out for docstring in found) < len(found) / 2
    monkeypatch.setattr(text, "installed_packages", lambda: ["click", "peft"])
    text.all_docstrings.cache_clear()
    options = TextArguments(text=["docstrings"], validation_text=["docstrings"])
    train, held_out = (list(load_documents(options, seed=0)[part]["docstrings"]["text"]) for part in (0, 1))
    text.all_docstrings.cache_clear()
    assert train and held_out and not set(train) & set(held_out)
    assert any(text.startswith(join_lines(click.echo.__doc__)[:80]) for text in train + held_out)


def test_bad_sources_are_named(nano_tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt: there is no such file"):
        read_text("nothing.txt", TextArguments(text=["nothing.txt"]))
    path = write(tmp_path, "parquet")
    with pytest.raises(ValueError, match=r"--text_column body: .* has the columns text, title"):
        read_text(path, TextArguments(text=[path], text_column="body"))
    write(tmp_path, "jsonl")
    with pytest.raises(ValueError, match="files of one kind"):
        read_text(str(tmp_path), TextArguments(text=[str(tmp_path)]))
    options = TextArguments(text=[path], validation_text=[path], block_size=5000)
    with pytest.raises(ValueError, match="does not fill one block of --block_size 5000"):
        load_blocks(*load_documents(options, seed=0), nano_tokenizer, options, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_field_too_many_in_a_csv_is_named_by_its_line(streaming, tmp_path):
    """pandas would read the first column as an index, and the texts out of the one after theirs."""
    path = tmp_path / "notes.csv"
    path.write_text("text,author\nIt rains, again,me,\nThe sun,you,\n")
    with pytest.raises(ValueError, match=r"notes\.csv, line 2: 4 fields, and the first line names 2"):
        list(read_text(str(path), TextArguments([], streaming=streaming)))
    path.write_text("\ufefftext\nsun\n", encoding="utf-8")
    assert [row["text"] for row in read_text(str(path), TextArguments([], streaming=streaming))] == ["sun"]
    with pytest.raises(ValueError, match=r"--text_column body: .*notes\.csv, line 1 has the columns text"):
        list(read_text(str(path), TextArguments([], text_column="body", streaming=streaming)))
