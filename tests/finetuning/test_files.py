"""Laws of reading: every script reads a table as it was written, or says in which line it cannot."""

import csv
import io
import json

import pytest

from modeling_gemma_encoder._scripts.files import is_local, read_lines
from modeling_gemma_encoder._scripts.tables import read_file, read_table
from modeling_gemma_encoder.ranking.reading import read_collection
from modeling_gemma_encoder.ranking.trec import read_qrels, read_run

MARK = "\ufeff"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "id,text\n1,good film,\n2,bad film,\n", "x.csv, line 2: 3 fields, and the first line names 2"),
        ("x.csv", "label,text\npos,good, film\n", "x.csv, line 2: 3 fields"),
        ("x.csv", "q,a,label\nwhy,because\n", "x.csv, line 2: 2 fields"),
        ("x.csv", 'id,text\n1,"two\nlines"\n2,a,b\n', "x.csv, line 4: 3 fields"),
        ("x.csv", 'id,text\n1,"never closed\n2,b\n', "x.csv, line 2: unexpected end of data"),
        ("x.csv", "text,label,text\na,b,c\n", "x.csv, line 1: names the column 'text' twice"),
        ("x.tsv", "text\tlabel\na b\n", "x.tsv, line 2: 1 fields"),
        ("x.tsv", "text\tlabel\n\na\t1\nb\tc\t0\n", "x.tsv, line 4: 3 fields"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_named_as_an_editor_counts(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / name, ["text"])


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("google/gemma-2-2b", False),
        ("gpt2", False),
        ("owner/data:config/with/slashes:train", False),
        ("owner/repo/model-Q4_K_M.gguf", False),
        ("runs/glue/cola/seed-1", True),
        ("runs/", True),
        ("./x", True),
        ("~/x", True),
        ("/x/y.gguf", True),
    ],
)
def test_a_name_that_cannot_be_the_hubs_is_a_place_here(name, local):
    assert is_local(name) == local


@pytest.mark.parametrize("mark", ["", MARK])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, mark, ends):
    """Of all formats, by what was written."""
    rows = [{"text": "é a", "label": 1}, {"text": "b", "label": 0}]
    texts = {
        "x.csv": ["text,label", "é a,1", "b,0"],
        "x.tsv": ["text\tlabel", "é a\t1", "b\t0"],
        "x.jsonl": list(map(json.dumps, rows)),
        "x.json": [json.dumps(rows)],
    }
    for name, lines in texts.items():
        (tmp_path / name).write_bytes((mark + ends.join([*lines, ""])).encode())
        assert list(read_file(tmp_path / name, ["text"])) == rows, name
    for name, lines in (
        ("queries.tsv", ["q1\train"]),
        ("passages.tsv", ["p1\ta", "p2\tb"]),
        ("qrels.tsv", ["q1\t0\tp1\t1", "q1\t0\tp2\t0"]),
        ("a.run", ["q1 Q0 p1 1 0.5 x"]),
    ):
        (tmp_path / name).write_bytes((mark + ends.join([*lines, ""])).encode())
    found = read_collection(str(tmp_path))
    assert (dict(found.queries), dict(found.passages)) == ({"q1": "rain"}, {"p1": "a", "p2": "b"})
    assert found.qrels == {"q1": {"p1": 1, "p2": 0}} and read_run(tmp_path / "a.run") == {"q1": {"p1": 0.5}}


def test_a_mark_loses_no_column_and_no_blank_line_matters(tmp_path):
    (tmp_path / "x.jsonl").write_text(MARK + '{"id": "1", "text": "x"}\n{"id": "2", "text": "y", "title": "T"}\n\n')
    assert read_file(tmp_path / "x.jsonl")["title"][:] == [None, "T"]
    (tmp_path / "x.csv").write_text(MARK + ",text,label\n0,a,1\n  \n\n1,b,0\n")
    rows = read_file(tmp_path / "x.csv", ["text"])
    assert rows.column_names == ["Unnamed: 0", "text", "label"] and rows["label"][:] == [1, 0]


def test_blanks_around_the_fields_of_a_run_are_none_of_them(tmp_path):
    (tmp_path / "x.run").write_text("q1 \tQ0 \tp1 \t1 \t0.5 \ttag\nq1 Q0  p2 2 0.25 tag\n")
    assert read_run(tmp_path / "x.run") == {"q1": {"p1": 0.5, "p2": 0.25}}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.run"])
def test_another_encoding_is_said_with_its_line(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("text,label\nplain,a\nété,b\n".encode(encoding))
    line = 3 if encoding == "latin-1" else 1
    with pytest.raises(ValueError, match=f"line {line}: byte .* is not UTF-8; save it in that encoding"):
        list(read_lines(tmp_path / name) if name == "x.run" else read_table(tmp_path / name))


TEXTS = ["a, b", 'say "x"', "two\nlines", "dos\r\nlines", "a\rlone return", " blanks ", "a\ttab", "\u2028\x0b\x85", "é"]


def test_what_python_writes_comes_back(tmp_path):
    """Any text, in quotes where it needs them; the line of each row is where an editor shows it."""
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([["text"], *([text] for text in TEXTS)])
    (tmp_path / "x.csv").write_text(file.getvalue(), newline="")
    assert read_file(tmp_path / "x.csv", ["text"])["text"][:] == TEXTS


def test_characters_that_only_unicode_calls_line_ends_end_no_line(tmp_path):
    (tmp_path / "x.run").write_text("q\u2028 Q0 p 1 0.5 x\nq\x85x Q0 p 1 0.5 x\n")
    assert [where[-1] for _, where in read_lines(tmp_path / "x.run")] == ["1", "2"]


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["1", "-2"], [1, -2]),
        (["1", "0.5"], [1.0, 0.5]),
        (["1e3", "2"], [1000.0, 2.0]),
        (["007", "1"], ["007", "1"]),
        (["1234567890123456789", "1234567890123456788"], ["1234567890123456789", "1234567890123456788"]),
        (["٣", "1"], ["٣", "1"]),
        (["", "1"], ["", "1"]),
        (["NA", "1"], ["NA", "1"]),
        (["+1", "1"], ["+1", "1"]),
        ([" 1", "0 "], [1, 0]),
        (["1.", "0."], [1.0, 0.0]),
    ],
)
def test_cells_are_numbers_where_nothing_is_lost(tmp_path, cells, read):
    (tmp_path / "x.csv").write_text("text,n\n" + "".join(f"a,{cell}\n" for cell in cells))
    assert read_file(tmp_path / "x.csv", ["text"])["n"][:] == read
    assert read_file(tmp_path / "x.csv", None)["n"][:] == cells


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("q1\tdoc 1\t1\nq1\tdoc 2\t0\n", {"doc 1": 1, "doc 2": 0}),
        ("query-id\tcorpus-id\tscore\nq1\ta\t2\n", {"a": 2}),
        ("q1\ta\t+1\nq1\tb\t0\n", {"a": 1, "b": 0}),
        ("q1 0 a 1.0\nq1 0 b 0\n", {"a": 1, "b": 0}),
        ("topic-id doc-id judgement\nq1 a 1\n", {"a": 1}),
        ("q1\t0\ta\t1\t\nq1 \t0\tb \t0\n", {"a": 1, "b": 0}),
    ],
)
def test_judgements_land_on_the_passage_that_was_judged(tmp_path, text, found):
    (tmp_path / "qrels.tsv").write_text(text)
    assert read_qrels(tmp_path / "qrels.tsv") == {"q1": found}


@pytest.mark.parametrize("text", ["q1\ta\tyes\nq1\tb\t1\n", "q1 0 a 0.5\n", "q1\ta\t٣\n"])
def test_a_grade_that_is_none_is_named_in_the_first_line_too(tmp_path, text):
    (tmp_path / "qrels.tsv").write_text(text)
    with pytest.raises(ValueError, match=r"qrels\.tsv, line 1: .* whole number"):
        read_qrels(tmp_path / "qrels.tsv")


@pytest.mark.parametrize("content", ["text\tlabel\rsun\tpos\rrain\tneg\r", "q1\tsun\rq2\train"])
def test_lines_that_end_in_returns_alone_are_refused(content, tmp_path):
    """As of old programs; one long line would be read as one row, or as names of columns."""
    path = tmp_path / "rows.tsv"
    path.write_bytes(content.encode())
    for read in (read_table, read_lines):
        with pytest.raises(ValueError, match=r"rows\.tsv: lines end in carriage returns alone"):
            list(read(path))


@pytest.mark.parametrize("content", ["text;label\nsun;pos\n", 'text;label\n"sun, rain";pos\n'])
def test_a_table_parted_by_semicolons_is_refused_as_one(content, tmp_path):
    """As spreadsheets write it where the comma is a decimal one."""
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"rows\.csv, line 1: 'text;label' is separated by semicolons"):
        list(read_table(path))


def test_a_quoted_tsv_is_said_once_with_its_first_line(tmp_path, capsys):
    """As csv and pandas write one; other quotes are a text's own."""
    quoted, plain = tmp_path / "quoted.tsv", tmp_path / "plain.tsv"
    rows = [["text", "label"], ["plain", "0"], ["a b", "1"], ['say "x"', "0"], ['"y" and "z', "1"]]
    with quoted.open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_MINIMAL).writerows(rows)
    plain.write_text('text\tlabel\nsay "x"\t0\n"\t1\nan inch, 1"\t1\n"so it begins\t0\n')
    for _ in range(2):
        assert read_file(quoted, ["text"])["text"][:] == ["plain", "a b", '"say ""x"""', '"""y"" and ""z"']
        assert read_file(plain, ["text"])["text"][:] == ['say "x"', '"', 'an inch, 1"', '"so it begins']
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1
    assert f"WARNING: {quoted}, line 4: " in said and "read as part of the text" in said and "save it as .csv" in said


def test_a_quoted_header_of_a_tsv_is_said_before_its_columns_are_missed(tmp_path, capsys):
    path = tmp_path / "x.tsv"
    path.write_text('"text"\t"label"\n"a"\t"1"\n')
    assert read_file(path, ["text"]).column_names == ['"text"', '"label"']
    assert f"{path}, line 1: " in capsys.readouterr().out
