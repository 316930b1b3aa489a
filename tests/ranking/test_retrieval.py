"""Laws of judged collections: what is read is what was written, and contradictions are named."""

from math import log

import pytest
from datasets import Dataset
from helpers import PASSAGES, QRELS, QUERIES, jsonl, write_collection

from modeling_gemma_encoder.ranking import reading
from modeling_gemma_encoder.ranking.bm25 import add_run, bm25, retrieve
from modeling_gemma_encoder.ranking.collection import Collection, Texts
from modeling_gemma_encoder.ranking.reading import read_collection
from modeling_gemma_encoder.ranking.sources import lists_of
from modeling_gemma_encoder.ranking.trec import ranked, read_run, write_run


@pytest.fixture
def folder(tmp_path):
    return write_collection(tmp_path)


def test_folders_of_trec_msmarco_and_beir_are_one_collection(folder, tmp_path_factory):
    expected = read_collection(str(folder))
    assert expected == Collection(QUERIES, PASSAGES, {"1": {"a": 2, "c": 0}, "2": {"b": 1, "d": 0}})

    msmarco = tmp_path_factory.mktemp("msmarco")
    for name, texts in (("queries", QUERIES), ("collection", PASSAGES)):
        (msmarco / f"{name}.tsv").write_text("".join(f"{one}\t{text}\n" for one, text in texts.items()))
    (msmarco / "qrels.tsv").write_text(QRELS.replace(" ", "\t"))
    assert read_collection(str(msmarco)) == expected

    beir = tmp_path_factory.mktemp("beir")
    jsonl(beir / "queries.jsonl", [{"_id": qid, "text": text} for qid, text in QUERIES.items()])
    titled = [{"_id": pid, "title": text.split()[0], "text": text.partition(" ")[2]} for pid, text in PASSAGES.items()]
    jsonl(beir / "corpus.jsonl", titled)
    (beir / "qrels").mkdir()
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t2\n1\tc\t0\n2\tb\t1\n2\td\t0\n")
    assert read_collection(str(beir)) == expected


def test_labelled_pairs_are_grouped_by_their_texts(tmp_path):
    rows = [("q", "x", 1), ("q", "y", 0), ("other", "y", 1), ("other", "z", 0), ("q", "x", 0), ("none", "x", 0)]
    jsonl(tmp_path / "pairs.jsonl", [dict(zip(("question", "answer", "label"), row, strict=True)) for row in rows])
    found = read_collection(str(tmp_path / "pairs.jsonl"), pairs=("question", "answer", "label"))
    texts = {
        found.queries[qid]: {found.passages[pid]: grade for pid, grade in grades.items()}
        for qid, grades in found.qrels.items()
    }
    assert texts == {"q": {"x": 1, "y": 0}, "other": {"y": 1, "z": 0}, "none": {"x": 0}}
    assert len(found.without_incomparable("it").qrels) == 2  # nothing is relevant to "none"


def test_quotation_marks_of_tsv_are_only_that(tmp_path):
    (tmp_path / "pairs.tsv").write_text('query\tpassage\tlabel\nq\t"unclosed\t1\nq\tplain\t0\nq1\tsay "no"\t1\n')
    found = read_collection(str(tmp_path / "pairs.tsv"))
    assert list(found.passages.values()) == ['"unclosed', "plain", 'say "no"'] and len(found.qrels) == 2


def test_a_beir_folder_with_several_splits_must_be_told_which(folder):
    (folder / "qrels.txt").unlink()
    (folder / "qrels").mkdir()
    for split, pid in (("train", "a"), ("test", "b")):
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n1\t{pid}\t1\n")
    with pytest.raises(ValueError, match="splits test, train: say which"):
        read_collection(str(folder))
    assert read_collection(f"{folder}:train").qrels == {"1": {"a": 1}}
    assert read_collection(f"{folder}:test").qrels == {"1": {"b": 1}}
    with pytest.raises(ValueError, match="has no qrels"):
        read_collection(f"{folder}:dev")


def test_queries_for_which_all_rankings_are_equal_are_left_out(folder, capsys):
    (folder / "qrels.txt").write_text(QRELS.replace("2 0 d 0", "2 0 d 1"))
    assert read_collection(str(folder)).without_incomparable("it").qrels.keys() == {"1"}
    assert "1 of 2 queries have only relevant passages" in capsys.readouterr().out
    (folder / "qrels.txt").write_text("1 0 a 1\n2 0 b 1\n")  # as MS MARCO has them
    with pytest.raises(ValueError, match="rerank a run, or `bm25`"):
        read_collection(str(folder)).without_incomparable("it")
    collection = read_collection(str(folder))
    collection.run = {"1": {"a": 1.0, "c": 0.5}}
    assert len(collection.without_incomparable("it").qrels) == 2
    assert "no passages for 1 of 2 queries, which count 0" in capsys.readouterr().out
    collection.run = {"other": {"a": 1.0}}
    with pytest.raises(ValueError, match="the run has none of the 2 queries"):
        collection.check("it")


@pytest.mark.parametrize(
    ("level", "kept", "said"),
    [
        (1, "02", ["1 of 7 queries have no relevant passage", "4 of 7 queries have only relevant passages judged"]),
        (
            2,
            "012",
            [
                "1 of 7 queries have no relevant passage",
                "2 of 7 queries have only relevant passages judged",
                "1 of 7 queries have passages of one grade alone judged",
                "1 of 3 queries have no passage from grade 2 on",
            ],
        ),
        (
            3,
            "0126",
            [
                "1 of 7 queries have no relevant passage",
                "2 of 7 queries have passages of one grade alone judged",
                "3 of 4 queries have no passage from grade 3 on",
            ],
        ),
    ],
)
def test_queries_are_left_out_by_the_level_of_relevance(level, kept, said, capsys):
    """Grades tell passages apart in nDCG where the level does not, and the level does where both are above 0."""
    grades = [(2, 0), (1, 2), (1, 0), (0, 0), (2, 2), (1, 1), (3, 2)]
    qrels = {str(number): dict(zip("ab", pair, strict=True)) for number, pair in enumerate(grades)}
    collection = Collection(dict.fromkeys(qrels, "query"), {"a": "", "b": ""}, qrels, relevance_level=level)
    assert "".join(collection.without_incomparable("it").qrels) == kept
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(said) and all(one in line for one, line in zip(said, printed, strict=True))
    collection.run = {qid: {"a": 1.0, "b": 0.5} for qid in qrels}
    assert "".join(collection.without_incomparable("it").qrels) == "012456"


@pytest.mark.parametrize("judged,one_split", [("qrels", False), ("default", True)])
def test_the_hubs_forms_are_the_same_collection(folder, monkeypatch, judged, one_split):
    """NanoBEIR: one repository, a split for each collection. MTEB: splits named after their configs."""
    tables = {
        "queries": [{"_id": qid, "text": text} for qid, text in QUERIES.items()],
        "corpus": [{"_id": pid, "text": text} for pid, text in PASSAGES.items()],
        judged: [
            {"query-id": q, "corpus-id": p, **({} if judged == "qrels" else {"score": 1.0})}
            for q, p in (("1", "a"), ("2", "b"))
        ],
        "bm25": [{"query-id": "1", "corpus-ids": ["d", "a"]}, {"query-id": "2", "corpus-ids": ["b"]}],
    }
    splits = {
        config: ["test" if config == judged else config] if one_split else ["NanoOne", "NanoTwo"] for config in tables
    }

    def load(name, config, split):
        assert name == "someone/data" and split in splits[config]
        if one_split or split == "NanoTwo":
            return Dataset.from_list(tables[config])
        raise AssertionError("the wrong split was read")

    monkeypatch.setattr(reading, "get_dataset_config_names", lambda name: list(tables))
    monkeypatch.setattr(reading, "get_dataset_split_names", lambda name, config: splits[config])
    monkeypatch.setattr(reading, "load_dataset", load)
    found = read_collection("someone/data" if one_split else "someone/data:NanoTwo")
    assert found.qrels == {"1": {"a": 1}, "2": {"b": 1}} and dict(found.passages.items()) == PASSAGES
    assert found.candidates() == {"1": ["d", "a"], "2": ["b"]} and found.candidates(1) == {"1": ["d"], "2": ["b"]}
    if not one_split:
        with pytest.raises(ValueError, match="say which"):
            read_collection("someone/data")
    del tables["corpus"]
    with pytest.raises(ValueError, match="corpus is missing"):
        read_collection("someone/data")


def test_unknown_ids_are_named(folder):
    (folder / "qrels.txt").write_text(QRELS + "3 0 a 1\n")
    with pytest.raises(ValueError, match="qrels name '3', not among the 2 queries"):
        read_collection(str(folder))
    (folder / "qrels.txt").write_text(QRELS + "1 0 zzz 1\n")
    with pytest.raises(ValueError, match="qrels name 'zzz', not among the 4 passages"):
        read_collection(str(folder))
    (folder / "qrels.txt").write_text(QRELS)
    collection = read_collection(str(folder))
    collection.run = {"1": {"nowhere": 1.0}, "not judged": {"x": 1.0}}
    with pytest.raises(ValueError, match="run name 'nowhere'"):
        collection.check("it")


@pytest.mark.parametrize(
    "text,message",
    [
        ("1 0 a 1\n1 0 a 0\n", "line 2: 1 a was judged 1 before"),
        ("1 0 a 1\n1 a\n", "line 2: '1 a' is not"),
        ("1 0 a 1\n1 0 b yes\n", "line 2"),
        ("1 0 a 0\n", "no query has both a relevant passage and another"),
        ("", "no query was judged"),
    ],
)
def test_bad_judgements_are_named(folder, text, message):
    (folder / "qrels.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_collection(str(folder)).without_incomparable("it")


def test_bad_texts_are_named(folder, tmp_path):
    jsonl(folder / "passages.jsonl", [{"pid": "a", "text": "x"}, {"pid": "a", "text": "y"}])
    with pytest.raises(ValueError, match="'a' is there twice"):
        read_collection(str(folder))
    jsonl(folder / "passages.jsonl", [{"number": "a", "words": "x"}])
    with pytest.raises(ValueError, match=r"number, words\. It needs one of these: qid"):
        read_collection(str(folder))
    (folder / "passages.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no passages: none of passages\.jsonl"):
        read_collection(str(folder))
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        read_collection("./not/there")


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = {"1": {"a": 0.1, "b": -3.5, "c": 1e-7}, "2": {"d": 2.0}}
    write_run(run, tmp_path / "a.run", tag="tag")
    assert (tmp_path / "a.run").read_text().splitlines()[:2] == ["1 Q0 a 1 0.1 tag", "1 Q0 c 2 1e-07 tag"]
    assert read_run(tmp_path / "a.run") == run
    for line, message in (("1 Q0 a 1 0.5 t", "1 a is there twice"), ("2 Q0 e 1 nan t", "is NaN"), ("2 e 1", "is not")):
        (tmp_path / "b.run").write_text((tmp_path / "a.run").read_text() + line + "\n")
        with pytest.raises(ValueError, match=f"line 5: .*{message}"):
            read_run(tmp_path / "b.run")


def test_ties_have_an_order_that_no_list_order_changes():
    scores = {str(n): float(n % 2) for n in range(20)}
    order = ranked(scores)
    assert order == ranked(dict(reversed(scores.items())))
    assert [scores[pid] for pid in order] == [1.0] * 10 + [0.0] * 10
    assert order[:10] != sorted(order[:10]) and order[:10] != sorted(order[:10], reverse=True)


def test_texts_are_found_by_id_and_left_where_they_are():
    texts = Texts([10, 2, 33], ["ten", "two", "thirty-three"])
    assert dict(texts.items()) == {"10": "ten", "2": "two", "33": "thirty-three"} and len(texts) == 3
    assert "2" in texts and "3" not in texts and "99" not in texts
    with pytest.raises(ValueError, match="'2' is there twice"):
        Texts([2, 2], ["a", "b"])


def test_bm25_finds_the_words(folder):
    collection = read_collection(str(folder))
    run = bm25(collection)
    assert run["1"]["a"] > run["1"]["c"] == 0 and set(run["1"]) == {"a", "c"}
    best = retrieve(collection, depth=2)
    assert ranked(best["2"]) == ["b", "d"] and ranked(best["1"])[0] == "a"


def test_bm25_is_lucenes_by_hand(tmp_path):
    """log(1 + (N - n + 0.5) / (n + 0.5)) * tf / (tf + 1.5 * (0.25 + 0.75 * length / average)), one word a text."""
    collection = Collection({"q": "sun"}, {"a": "sun", "b": "rain", "c": "rain"}, {"q": {"a": 1, "b": 0, "c": 0}})
    assert bm25(collection)["q"]["a"] == pytest.approx(log(1 + 2.5 / 1.5) / 2.5, rel=1e-5)


def test_bm25_is_fitted_on_the_whole_collection_and_not_on_the_pool():
    """By hand as above: three passages, of which two were judged or retrieved."""
    passages = {"a": "sun", "b": "rain", "c": "rain"}
    judged = Collection({"q": "sun"}, passages, {"q": {"a": 1, "b": 0}})
    retrieved = Collection({"q": "sun"}, passages, {"q": {"a": 1}}, run={"q": {"a": 0.1, "b": 0.2}})
    for collection in (judged, retrieved):
        assert bm25(collection)["q"] == {"a": pytest.approx(log(1 + 2.5 / 1.5) / 2.5, rel=1e-5), "b": 0}


def test_the_candidates_of_bm25_are_the_best_of_all_passages(folder):
    collection = read_collection(str(folder))
    add_run(collection, "bm25", depth=3)
    assert collection.run == retrieve(read_collection(str(folder)), depth=3) and collection.first_stage == "BM25"
    write_run({"1": {"d": 1.0}}, folder / "other.run", tag="other")
    add_run(collection := read_collection(str(folder)), str(folder / "other.run"))
    assert collection.run == {"1": {"d": 1.0}} and collection.first_stage == "first stage"


def test_what_is_reranked_is_named_by_where_it_is_from(folder):
    collection = read_collection(str(folder))
    assert collection.reranked() == {"run": "judged pool", "depth": None}
    collection.run = {"1": {"d": 1.0}}
    assert collection.reranked(7) == {"run": "its own", "depth": 7}
    write_run(collection.run, folder / "other.run", tag="other")
    add_run(collection, str(folder / "other.run"))
    assert collection.reranked() == {"run": str(folder / "other.run"), "depth": None}
    for depth, best in ((3, 3), (None, 100)):
        add_run(collection, "bm25", depth)
        assert collection.reranked(depth) == {"run": "bm25", "depth": best}


def test_lists_are_what_was_judged_and_the_runs_passages(folder):
    collection = read_collection(str(folder))
    rows, without = lists_of(collection, {"1": {"a": 3.0, "d": 2.0}, "2": {}})
    assert without == 0
    grades = [dict(zip(row["documents"], row["labels"], strict=True)) for row in rows]
    assert grades == [{"a": 2, "c": 0, "d": 0}, {"b": 1, "d": 0}]
    collection.qrels = {"1": {"a": 1}, "2": {"b": 1}}
    assert lists_of(collection) == ([], 2)


@pytest.mark.parametrize("pid", ["p1", "passage 1", "a  b"])
def test_a_run_that_is_written_is_read_again(pid, tmp_path):
    """Whatever ids it has; those without blanks in the form that trec_eval reads."""
    run = {"q1": {pid: 1.5, "p2": 0.1 + 0.2}, "q2": {"p2": -1.0}}
    write_run(run, tmp_path / "own.run", tag="my own")
    assert read_run(tmp_path / "own.run") == run
    if " " not in pid:
        assert (tmp_path / "own.run").read_text().splitlines()[0] == "q1 Q0 p1 1 1.5 my-own"
