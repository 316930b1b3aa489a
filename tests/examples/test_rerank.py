"""Laws of serving a ranker: every row is scored once, in its place, also when it is killed on the way."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rerank
import torch
from helpers import jsonl
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder.ranking.scoring import choose, load_ranker, score_pairs
from modeling_gemma_encoder.ranking.trec import ranked, read_run
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

ROWS = [{"id": n, "query": f"query {n % 7}", "passage": "some words " * (n * 5 % 13)} for n in range(60)]


@pytest.fixture(scope="module")
def folder(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranker")
    torch.manual_seed(0)
    GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32).save_pretrained(folder)
    set_template(AutoTokenizer.from_pretrained(decoder), pair=RANKING_TEMPLATE).save_pretrained(folder)
    return folder


def expected(folder, pairs) -> np.ndarray:
    return score_pairs(*load_ranker(str(folder), device="cpu"), pairs, max_length=64)


def command(monkeypatch, folder, *flags):
    words = ["rerank", "--model", folder, "--device", "cpu", "--dtype", "float32", "--max_length", 64, *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    rerank.main()


def test_rows_come_out_in_order_with_their_scores(folder, tmp_path, monkeypatch):
    scores = expected(folder, [(row["query"], row["passage"]) for row in ROWS])
    jsonl(tmp_path / "in.jsonl", ROWS)
    command(
        monkeypatch, folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--rows_at_once", 7
    )
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in ("id", "query", "passage")} for row in found] == ROWS
    np.testing.assert_allclose([row["score"] for row in found], scores, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.rows.json"]

    lists = [{"query": f"query {n}", "passages": [f"text {i}" for i in range(n)]} for n in range(1, 6)]
    jsonl(tmp_path / "lists.jsonl", lists)
    command(monkeypatch, folder, "--input", tmp_path / "lists.jsonl", "--output", tmp_path / "lists.out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "lists.out.jsonl").read_text().splitlines()]
    scores = expected(folder, [(row["query"], text) for row in lists for text in row["passages"]])
    np.testing.assert_allclose([score for row in found for score in row["scores"]], scores, atol=1e-5)
    assert [len(row["scores"]) for row in found] == [1, 2, 3, 4, 5]


def test_tsv_keeps_its_columns(folder, tmp_path, monkeypatch):
    pairs = [("rain", "It rains."), ("sun", "A star.")]
    for name, rows in (
        ("two, with a comma", [list(pair) for pair in pairs]),
        ("four", [[f"q{n}", f"p{n}", *pair] for n, pair in enumerate(pairs)]),
    ):
        source, output = tmp_path / f"{name}.tsv", tmp_path / f"{name}.out.tsv"
        source.write_text("".join("\t".join(row) + "\r\n" for row in rows))
        command(monkeypatch, folder, "--input", source, "--output", output)
        found = [line.split("\t") for line in output.read_text().splitlines()]
        assert [row[:-1] for row in found] == rows
        np.testing.assert_allclose([float(row[-1]) for row in found], expected(folder, pairs), atol=1e-5)


def interrupt(*args):
    raise KeyboardInterrupt


def test_csv_keeps_its_columns_and_texts_of_several_lines(folder, tmp_path, monkeypatch, capsys):
    texts = ["It rains.", 'He said "no",\nand left.', "old\rMac", "", "ä" * 140_000]
    rows = [{"passages": str(n), "answer": text, "question": "rain, snow"} for n, text in enumerate(texts)]
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    with source.open("w", encoding="utf-8-sig", newline="") as file:  # with a mark in front, as Excel writes it
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    flags = ["--input", source, "--output", output, "--rows_at_once", 2, "--pair_columns", "question", "answer"]
    with monkeypatch.context() as context, pytest.raises(SystemExit) as ended:
        calls = iter([score_pairs])
        context.setattr(rerank, "score_pairs", lambda *args: next(calls, interrupt)(*args))
        command(monkeypatch, folder, *flags)
    assert not output.exists() and ended.value.code == 130
    how = f"Interrupted: 2 of 5 rows are in {output}.rows, and the same command goes on after them."
    assert capsys.readouterr().err.splitlines()[-1] == how
    scored = []
    monkeypatch.setattr(rerank, "score_pairs", lambda *args: (scored.append(len(args[2])), score_pairs(*args))[1])
    command(monkeypatch, folder, *flags)
    assert scored == [2, 1]  # and not the first two again
    with output.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    scores = expected(folder, [("rain, snow", text) for text in texts])
    np.testing.assert_allclose([float(row["score"]) for row in found], scores, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv", "out.csv.rows.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,text\na,b\n", "in.csv: the first line names query, text, and no passage: --pair_columns"),
        ("", "in.csv has no rows"),
        ("query,passage\na,b\nc\n", "in.csv, line 3: 1 fields, and the first line names 2"),
        ("query,passage\na,b,c\n", "in.csv, line 2: 3 fields, and the first line names 2"),
        ('query,passage\na,"b\n', "in.csv, line 2: unexpected end of data"),
        ("query,passage,score\na,b,1\n", "in.csv, line 2: the row has a score already"),
        ("query,passage\n", "in.csv has no rows"),
        ("id,query,passage,id\n1,a,b,2\n", "in.csv, line 1: names the column 'id' twice"),
    ],
)
def test_a_csv_that_cannot_be_read_is_not_begun(folder, tmp_path, monkeypatch, capsys, text, message):
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize(
    ("can", "dtype"), [({}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")]
)
def test_bf16_is_chosen_where_the_processor_computes_in_it(folder, tmp_path, monkeypatch, can, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert choose("auto", "cpu") == (dtype, "cpu")
    assert choose("float32", "cpu") == ("float32", "cpu")
    model, _ = load_ranker(str(folder), "auto", "cpu")
    assert (model.dtype, model.classifier.out_proj.weight.dtype) == (getattr(torch, dtype), torch.float32)
    # What was begun in one dtype does not go on in another.
    jsonl(tmp_path / "in.jsonl", ROWS)
    part = tmp_path / "out.jsonl.rows"
    part.write_text("")
    (tmp_path / "out.jsonl.rows.json").write_text(json.dumps({"dtype": "float16"}))
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl.rows.json").unlink()
    flags = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--dtype", "auto"]
    command(monkeypatch, folder, *flags)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(ROWS)


def test_a_run_is_reranked(folder, tmp_path, monkeypatch):
    queries, passages = {"1": "rain", "2": "sun"}, {"a": "It rains.", "b": "A star.", "c": ""}
    jsonl(tmp_path / "queries.jsonl", [{"qid": qid, "text": text} for qid, text in queries.items()])
    jsonl(tmp_path / "passages.jsonl", [{"pid": pid, "text": text} for pid, text in passages.items()])
    (tmp_path / "a.run").write_text("1 Q0 a 1 3.0 t\n1 Q0 b 2 2.0 t\n1 Q0 c 3 1.0 t\n2 Q0 c 1 1.0 t\n")
    flags = ["--data", tmp_path, "--run", tmp_path / "a.run", "--output", tmp_path / "b.run", "--depth", 2]
    command(monkeypatch, folder, *flags)
    found = read_run(tmp_path / "b.run")
    assert {qid: set(scores) for qid, scores in found.items()} == {"1": {"a", "b"}, "2": {"c"}}
    scores = expected(folder, [("rain", "It rains."), ("rain", "A star."), ("sun", "")])
    np.testing.assert_allclose([found["1"]["a"], found["1"]["b"], found["2"]["c"]], scores, atol=1e-5)
    lines = [line.split() for line in (tmp_path / "b.run").read_text().splitlines()]
    assert [line[2] for line in lines if line[0] == "1"] == ranked(found["1"])
    (tmp_path / "a.run").write_text("1 Q0 zzz 1 3.0 t\n")
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, *flags[:-4], "--output", tmp_path / "c.run")


def test_a_folder_is_named_as_in_training(folder, tmp_path, monkeypatch, capsys):
    """`folder:test` names the judgements of a BEIR folder; its queries and passages are those of the folder."""
    data = tmp_path / "beir"
    (data / "qrels").mkdir(parents=True)
    jsonl(data / "queries.jsonl", [{"_id": "1", "text": "rain"}])
    jsonl(data / "corpus.jsonl", [{"_id": "a", "text": "It rains."}, {"_id": "b", "text": "A star."}])
    for split in ("dev", "test"):
        (data / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t1\n")
    (tmp_path / "in.run").write_text("1 Q0 a 1 3.0 t\n1 Q0 b 2 2.0 t\n")
    flags = ["--run", tmp_path / "in.run", "--output", tmp_path / "out.run"]
    command(monkeypatch, folder, "--data", f"{data}:test", *flags)
    found, scores = read_run(tmp_path / "out.run")["1"], expected(folder, [("rain", "It rains."), ("rain", "A star.")])
    np.testing.assert_allclose([found["a"], found["b"]], scores, atol=1e-5)
    (tmp_path / "pairs.csv").touch()
    flags[-1] = tmp_path / "other.run"
    for name, message in (
        (f"{data}:tset", "beir has no qrels: none of qrels/tset.txt, qrels/tset.tsv"),
        (f"{data}s:test", "beirs:test is not a folder: give one with queries and passages"),
        (tmp_path / "pairs.csv", "pairs.csv is not a folder: give one with queries and passages"),
        ("someone/data:Nano", "--data someone/data:Nano is not a folder: give one with queries and passages"),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, folder, "--data", name, *flags)
        assert message in capsys.readouterr().err
    jsonl(data / "corpus.jsonl", [{"_id": "a", "text": "It rains."}, {"_id": "b", "text": "Another text."}])
    flags[-1] = tmp_path / "out.run"
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, "--data", f"{data}:test", *flags)
    assert "was made otherwise (files of " in capsys.readouterr().err


def test_one_query_is_answered_on_the_command_line(folder, monkeypatch, capsys):
    passages = ["It rains.", "A star.", "Nothing."]
    command(monkeypatch, folder, "--query", "rain", "--passages", *passages)
    printed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    scores = expected(folder, [("rain", text) for text in passages])
    assert [text for _, text in printed] == [passages[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([float(score) for score, _ in printed], np.sort(scores)[::-1], atol=1e-4)


def test_killed_anywhere_it_goes_on_and_nothing_is_lost_or_doubled(folder, tmp_path, monkeypatch):
    jsonl(tmp_path / "in.jsonl", ROWS * 20)
    flags = ["--input", tmp_path / "in.jsonl", "--rows_at_once", "10", "--tokens_per_batch", "100"]
    flags += ["--device", "cpu", "--dtype", "float32", "--max_length", "64", "--model", folder]
    part, output = tmp_path / "out.jsonl.rows", tmp_path / "out.jsonl"
    words = [sys.executable, rerank.__file__, *map(str, flags), "--output", str(output)]
    kills = 0
    for lines in (10, 300):  # it is killed after so many lines
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < lines):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert not output.exists()
        with part.open("a") as file:  # and what was being written is torn
            file.write('{"id": 3, "que')
    assert kills == 2
    command(monkeypatch, folder, *flags, "--output", output)
    whole = tmp_path / "whole.jsonl"
    command(monkeypatch, folder, *flags, "--output", whole)
    assert output.read_text() == whole.read_text() and len(whole.read_text().splitlines()) == len(ROWS) * 20


def test_another_input_does_not_go_on(folder, tmp_path, monkeypatch, capsys):
    jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--rows_at_once", 5]
    with monkeypatch.context() as patch:
        stop = iter([score_pairs, score_pairs])
        patch.setattr(rerank, "score_pairs", lambda *args: next(stop)(*args))
        with pytest.raises(RuntimeError):  # a generator's StopIteration, after two steps
            try:
                command(patch, folder, *flags)
            except StopIteration as error:
                raise RuntimeError from error
    assert len((tmp_path / "out.jsonl.rows").read_text().splitlines()) == 10
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, *flags, "--dtype", "bfloat16")
    assert "was begun otherwise (dtype)" in capsys.readouterr().err
    jsonl(tmp_path / "in.jsonl", ROWS[1:])
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, *flags)
    assert "was begun otherwise (files of " in capsys.readouterr().err
    assert len((tmp_path / "out.jsonl.rows").read_text().splitlines()) == 10


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "a.run"])
def test_a_finished_output_is_read_and_another_is_refused(folder, tmp_path, monkeypatch, capsys, name):
    jsonl(tmp_path / "in.jsonl", ROWS[:3])
    (tmp_path / "in.csv").write_text("query,passage\n" + "rain,It rains.\n" * 3)
    jsonl(tmp_path / "queries.jsonl", [{"qid": "1", "text": "rain"}])
    jsonl(tmp_path / "passages.jsonl", [{"pid": pid, "text": "It rains."} for pid in "abc"])
    (tmp_path / "a.run").write_text("".join(f"1 Q0 {pid} 1 3.0 t\n" for pid in "abc"))
    flags = ["--data", tmp_path, "--run"] if name == "a.run" else ["--input"]
    output = tmp_path / f"out{Path(name).suffix}"
    flags += [tmp_path / name, "--output", output, "--tokens_per_batch", 100]
    command(monkeypatch, folder, *flags)
    written, stat = output.read_bytes(), output.stat()
    capsys.readouterr()

    def never(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr(rerank, "score_pairs", never)
    monkeypatch.setattr(rerank, "load_ranker", never)
    for free in ([], ["--tokens_per_batch", 50], ["--rows_at_once", 1]):  # which change no score
        command(monkeypatch, folder, *flags, *free)
        assert capsys.readouterr().out.endswith(f"Nothing is left to do\nScores of 3 rows are in {output}\n")
    for other, named in ((["--max_length", 32], "max_length"), (["--dtype", "bfloat16"], "dtype")):
        with pytest.raises(SystemExit) as ended:
            command(monkeypatch, folder, *flags, *other)
        assert ended.value.code == 2
        assert f"{output} was made otherwise ({named}): delete it, or name another" in capsys.readouterr().err
    (tmp_path / name).write_text("".join((tmp_path / name).read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, *flags)
    said = capsys.readouterr().err
    assert "was made otherwise (files of " in said and f"files of {tmp_path / name})" in said
    assert (output.read_bytes(), output.stat().st_mtime_ns) == (written, stat.st_mtime_ns)


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"query": "q"}', "line 2: a row has a text `query`"),
        ('{"query": "q", "passages": []}', "line 2: the query 'q' has no passages"),
        ('{"query": "q", "passage": 3}', "line 2: a row has"),
        ('{"query": "q", "passage": "p", "score": 1}', "line 2: the row has a score already"),
        ('["q", "p"]', "line 2: a row has"),
        ('{"query": ', "line 2: Expecting value"),
        ('{"query": "' + "long " * 70 + '", "passage": "p"}', "leaves no room"),
    ],
)
def test_bad_rows_are_named(folder, tmp_path, monkeypatch, capsys, line, message):
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[1]) + "\n" + line + "\n")
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_flags_are_named(folder, decoder, tmp_path, monkeypatch, capsys):
    jsonl(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "there.jsonl").touch()
    for flags, message in (
        ([], "give one of --query, --input, --run"),
        (["--query", "q"], "--query needs --passages"),
        (["--query", "q", "--passages", "p", "--output", "x"], "--output is for"),
        (["--query", "q", "--passages", "p", "--depth", 3], "--depth 3 is of a run"),
        (["--input", tmp_path / "in.jsonl", "--output", tmp_path / "x", "--tokens_per_batch", 0], "at least 1; got 0"),
        (["--input", tmp_path / "in.jsonl"], "--output is needed"),
        (["--input", tmp_path / "in.jsonl", "--output", tmp_path / "x.csv"], "give it the ending .jsonl"),
        (
            ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "x", "--pair_columns", "q"],
            "must name two columns",
        ),
        (
            ["--input", tmp_path / "in.tsv", "--output", tmp_path / "x", "--pair_columns", "q", "p"],
            "of a .csv or .jsonl",
        ),
        (["--data", tmp_path, "--run", tmp_path / "r", "--output", tmp_path / "x.csv"], "would hold a TREC run"),
        (["--input", tmp_path / "in.jsonl", "--outptu", "x"], "--outptu x. Did you mean --output?"),
        (["--input", tmp_path / "in.jsonl", "--output", tmp_path / "there.jsonl"], "is there already"),
        (["--input", tmp_path / "in.txt", "--output", "x"], "--input must be a .jsonl, .csv or .tsv file; got"),
        (["--input", tmp_path / "no.jsonl", "--output", tmp_path / "x"], "no.jsonl"),
        (["--query", "q", "--passages", "p", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["--query", "q", "--passages", "p", "--model", decoder], "is not a trained ranker: classifier.norm.weight"),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, folder, *flags)
        assert message in capsys.readouterr().err, message
    assert not Path(tmp_path / "x").exists()
