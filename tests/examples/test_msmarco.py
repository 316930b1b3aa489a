"""Laws of training a reranker: every form of the data gives the same lists, and a run is what it says it is."""

import json
import sys

import msmarco
import pytest
import torch
from datasets import Dataset
from evaluate_ranking import main as evaluate_main
from helpers import PASSAGES, jsonl, write_collection
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder.hub.run_record import read_run_record
from modeling_gemma_encoder.ranking import sources as lists_module
from modeling_gemma_encoder.ranking.arguments import RankingArguments
from modeling_gemma_encoder.ranking.bm25 import retrieve
from modeling_gemma_encoder.ranking.collection import Collection
from modeling_gemma_encoder.ranking.queries import count_trained_on, only_held_out, write_queries
from modeling_gemma_encoder.ranking.reading import read_collection
from modeling_gemma_encoder.ranking.trec import write_run
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

CORPUS = [{"docid": pid, "text": text} for pid, text in PASSAGES.items()]
FORMS = {
    "texts": {None: [{"query": "rain", "positive": PASSAGES["a"], "negative": PASSAGES["b"]}]},
    "fifty": {
        None: [{"query": "rain", "positive": PASSAGES["a"], "negative_1": PASSAGES["b"], "negative_2": PASSAGES["c"]}]
    },
    "labels": {
        None: [{"query_id": "1", "doc_ids": ["b", "a", "c"], "labels": [0, 1, 0]}],
        "corpus": [{"passage_id": pid, "passage": text} for pid, text in PASSAGES.items()],
        "queries": [{"query_id": "1", "query": "rain"}],
    },
    "ids": {
        None: [
            {
                "query_id": "1",
                "query_text": "rain",
                "positive_document_ids": ["a"],
                "negative_document_ids": ["b", "c"],
            }
        ],
        "ids-corpus": CORPUS,
    },
    "passages": {
        None: [
            {
                "query": "rain",
                "positive_passages": [{"docid": "a", "title": "", "text": PASSAGES["a"]}],
                "negative_passages": [{"docid": "b", "title": "The sun", "text": "is a star."}],
            }
        ]
    },
    "margins": {
        None: [{"query_id": "1", "positive_id": "a", "negative_id": "b", "score": 2.5}],
        "corpus": [{"passage_id": pid, "passage": text} for pid, text in PASSAGES.items()],
        "queries": [{"query_id": "1", "query": "rain"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_hub_gives_the_same_lists(form, monkeypatch):
    def load(name, config=None, split=None):
        tables = FORMS[form]
        return Dataset.from_list(tables[name if name in tables else config])

    monkeypatch.setattr(lists_module, "load_dataset", load)
    lists = lists_module.hub_lists(form, list_size=3, seed=0, from_teacher=form == "margins")
    found = lists.dataset[0]
    assert lists.queries == ["rain"]
    labels = dict(zip(found["documents"], found["labels"], strict=True))
    assert found["query"] == "rain"
    assert labels[PASSAGES["a"]] - labels[PASSAGES["b"]] == (2.5 if form == "margins" else 1)
    if PASSAGES["c"] in labels:
        assert labels[PASSAGES["c"]] == 0
    with pytest.raises(ValueError, match="teacher's scores"):
        lists_module.hub_lists(form, list_size=3, seed=0, from_teacher=form != "margins")


def test_other_columns_are_named(monkeypatch):
    monkeypatch.setattr(lists_module, "load_dataset", lambda *_, **__: Dataset.from_list([{"question": "q"}]))
    with pytest.raises(ValueError, match=r"columns question\. Lists have one of: query, positive, negative; "):
        lists_module.hub_lists("someone/data", 3, 0, False)


@pytest.fixture
def folder(tmp_path):
    return write_collection(tmp_path)


def command(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    main()


def test_a_training_that_would_only_warm_up_is_refused_before_it_claims_its_folder(
    folder, decoder, tmp_path_factory, monkeypatch, capsys
):
    output = tmp_path_factory.mktemp("runs") / "ranker"
    flags = ["--model", decoder, "--train_data", folder, "--list_size", 2, "--max_length", 32, "--use_cpu"]
    flags += ["--num_train_epochs", 1, "--output_dir", output]
    with pytest.raises(SystemExit):
        command(monkeypatch, msmarco.main, *flags)
    assert "--num_train_epochs 1: the only step warms up: its learning rate is 0." in capsys.readouterr().err
    assert not (output / "run.json").exists()
    command(monkeypatch, msmarco.main, *flags, "--warmup_steps", 0)
    assert "2 queries to train on, 1 step, lists" in capsys.readouterr().out
    assert (output / "model.safetensors").exists()


def test_a_reranker_is_trained_measured_resumed_and_loaded(folder, decoder, tmp_path_factory, monkeypatch, capsys):
    runs = tmp_path_factory.mktemp("runs")
    pairs = runs / "pairs.jsonl"
    jsonl(pairs, [{"query": "rain", "passage": text, "label": int("ain" in text)} for text in PASSAGES.values()])
    flags = ["--model", decoder, "--train_data", folder, "--train_run", "bm25", "--list_size", 3, "--max_length", 32]
    flags += ["--eval_data", folder, pairs, "--gradient_accumulation_steps", 1, "--num_train_epochs", 3, "--use_cpu"]
    flags += ["--ranking_loss", "lambdarank", "--attention_dropout", 0.0, "--output_dir", runs / "ranker"]
    flags += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"]
    command(monkeypatch, msmarco.main, *flags)
    printed = capsys.readouterr().out
    assert "2 queries to train on" in printed and printed.count("| BM25 |") == 2
    assert f"WARNING: 2 of 2 queries of {folder.name} are also trained on" in printed
    saved = json.loads((runs / "ranker" / folder.name / "results.json").read_text())
    assert saved["queries"] == saved["queries_trained_on"] == 2 and saved["ranking_loss"] == "lambdarank"
    assert (saved["run"], saved["depth"]) == ("judged pool", None)
    card = "".join(read_run_record(runs / "ranker").results)
    assert "Reranked: the judged pool; 4 passages, 2 of them relevant (50.0%)." in card
    assert "\n\n2 queries are too few for more than these means." in card
    other = ["--do_train", "False", "--eval_strategy", "no", "--load_best_model_at_end", "False"]
    command(monkeypatch, msmarco.main, *flags, *other, "--train_data", pairs)  # which it has not learned from
    saved = json.loads((runs / "ranker" / folder.name / "results.json").read_text())
    assert saved["queries_trained_on"] == 2  # as its folder says
    capsys.readouterr()

    model = AutoModelForSequenceClassification.from_pretrained(runs / "ranker", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs / "ranker")
    assert type(model).__name__ == "GemmaEncoderForRanking" and model.config.ranking_loss == "lambdarank"
    assert "Query: a Document: b" in tokenizer.decode(tokenizer("a", "b")["input_ids"])
    assert tokenizer.model_max_length == 32
    assert json.loads((runs / "ranker" / "tokenizer.json").read_text())["truncation"] is None
    assert (runs / "ranker" / "training.png").exists()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    command(monkeypatch, msmarco.main, *flags)  # finished: measured again, trained no further
    again = json.loads((runs / "ranker" / folder.name / "results.json").read_text())
    assert again["means"] == saved["means"]
    model = AutoModelForSequenceClassification.from_pretrained(runs / "ranker", dtype=torch.float32)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(SystemExit):
        command(monkeypatch, msmarco.main, *flags, "--list_size", 4)
    assert "holds another run (list_size: 3 -> 4)" in capsys.readouterr().err

    evaluation = ["--model", runs / "ranker", "--data", folder, "--max_length", 32, "--output_dir", runs / "evaluation"]
    command(monkeypatch, evaluate_main, *evaluation)
    alone = json.loads((runs / "evaluation" / "results.json").read_text())
    assert alone["means"]["Gemma Encoder"] == saved["means"]["Gemma Encoder"]
    command(monkeypatch, evaluate_main, *evaluation, "--run", "bm25", "--depth", 2)
    alone = json.loads((runs / "evaluation" / "results.json").read_text())
    assert (alone["run"], alone["depth"]) == ("bm25", 2)


def test_held_out_queries_are_not_trained_on(folder, decoder, tmp_path, monkeypatch, capsys):
    queries = {str(n): f"query number {n}" for n in range(40)}
    jsonl(folder / "queries.jsonl", [{"qid": qid, "text": text} for qid, text in queries.items()])
    (folder / "qrels.txt").write_text("".join(f"{qid} 0 a 1\n{qid} 0 b 0\n" for qid in queries))
    both = [str(folder), str(folder)]
    form = {"train_data": both, "list_size": 2}
    training = lists_module.local_lists(RankingArguments(**form, held_out=0.25), seed=0)
    lists, asked, held_out = training.dataset, training.queries, training.held_out
    of_each, printed = 40 - len(asked) // 2, capsys.readouterr().out
    said = f"{folder}: held out {of_each} of 40 queries (about 0.25 of them, drawn by their texts)\n"
    assert printed == said * 2
    lists_module.local_lists(RankingArguments(**form), seed=0)
    assert "held out" not in capsys.readouterr().out
    assert set(asked) == {lists[number]["query"] for number in range(len(lists))}
    assert len(lists_module.local_lists(RankingArguments(**form), seed=0, limit=7).dataset) == 7
    trained = {lists[number]["query"] for number in range(len(lists))}
    measured = {held_out.queries[qid] for qid in held_out.qrels}
    assert trained | measured == set(queries.values()) and not trained & measured
    assert 4 <= len(measured) <= 16 and len(held_out.qrels) == 2 * len(measured)  # of each of the two folders
    held_out.check("held-out")


@pytest.fixture
def many(tmp_path):
    """Thirty queries, each with a relevant passage and an irrelevant one, and passages that nobody judged."""
    queries = {str(n): f"rain number{n}" for n in range(30)}
    passages = {f"{n}-{word}": f"{word} number{n}" for n in range(30) for word in ("rain", "sun", "unjudged")}
    jsonl(tmp_path / "queries.jsonl", [{"qid": qid, "text": text} for qid, text in queries.items()])
    jsonl(tmp_path / "passages.jsonl", [{"pid": pid, "text": text} for pid, text in passages.items()])
    (tmp_path / "qrels.txt").write_text("".join(f"{qid} 0 {qid}-rain 1\n{qid} 0 {qid}-sun 0\n" for qid in queries))
    return tmp_path


def test_held_out_queries_rerank_bm25s_best_of_the_whole_collection(many, tmp_path_factory):
    both = [str(many), str(many)]
    form = {"list_size": 2, "held_out": 0.3, "eval_run": ["bm25"], "eval_depth": 3}

    def read(places):
        return lists_module.local_lists(RankingArguments(train_data=places, **form), seed=0)

    training = read(both[:1])
    asked, held_out = training.queries, training.held_out
    expected = retrieve(read_collection(str(many)), depth=3)
    assert held_out.run == {qid: expected[qid] for qid in held_out.qrels} and 1 < len(held_out.run) < 29
    assert not {held_out.queries[qid] for qid in held_out.run} & set(asked)
    assert any("unjudged" in pid for scores in held_out.run.values() for pid in scores)
    # Of two folders each query has the passages of its own.
    of_both = read(both).held_out
    marked = {f"{n}-{q}": {f"{n}-{p}": s for p, s in held_out.run[q].items()} for n in (0, 1) for q in held_out.run}
    assert of_both.run == marked and of_both.first_stage == "BM25"
    # A run file has candidates of the queries that are trained on, too.
    write_run(expected, tmp_path_factory.mktemp("run") / "it.run", tag="it")
    form["eval_run"] = [str(next(tmp_path_factory.getbasetemp().glob("run*/it.run")))]
    assert read(both[:1]).held_out.run == held_out.run


def test_what_a_training_held_out_is_measured_alone(many, decoder, tmp_path_factory, monkeypatch, capsys):
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--model", decoder, "--train_data", many, "--held_out", 0.4, "--eval_run", "bm25", "--eval_depth", 4]
    flags += ["--list_size", 2, "--max_steps", 1, "--use_cpu", "--save_strategy", "no", "--output_dir", runs / "ranker"]
    command(monkeypatch, msmarco.main, *flags)
    ours = json.loads((runs / "ranker" / "held-out" / "results.json").read_text())
    assert ours["means"].keys() == {"Gemma Encoder", "BM25", "random order"} and ours["queries_trained_on"] == 0
    assert ours["pool"]["candidates"] == 4 * ours["queries"] and 1 < ours["queries"] < 29
    assert f"held-out, {ours['queries']} queries, 0 of them trained on" in capsys.readouterr().out

    assert (ours["run"], ours["depth"]) == ("bm25", 4)
    card = "".join(read_run_record(runs / "ranker").results)
    assert "Reranked: BM25's ranking of the whole collection, the 4 best of each query; " in card
    assert f"; {4 * ours['queries']} passages, {ours['queries']} of them relevant (25.0%)." in card

    evaluation = ["--model", runs / "ranker", "--data", many, "--run", "bm25", "--depth", 4, "--output_dir", runs / "e"]
    command(monkeypatch, evaluate_main, *evaluation, "--held_out_of", runs / "ranker")
    alone = json.loads((runs / "e" / "results.json").read_text())
    assert alone["per_query"]["BM25"] == ours["per_query"]["BM25"] and alone["queries_trained_on"] == 0
    assert alone["means"]["Gemma Encoder"] == pytest.approx(ours["means"]["Gemma Encoder"])
    command(monkeypatch, evaluate_main, *evaluation)
    everything = json.loads((runs / "e" / "results.json").read_text())
    assert everything["queries"] == 30 and everything["queries_trained_on"] == 30 - ours["queries"]
    assert f"30 queries, {30 - ours['queries']} of them trained on; reranked: bm25" in capsys.readouterr().out
    assert f"30 queries, {30 - ours['queries']} of them trained on\n" in (runs / "e" / "results.md").read_text()

    (runs / "ranker" / "queries.json").rename(runs / "queries.json")
    command(monkeypatch, evaluate_main, *evaluation)
    assert json.loads((runs / "e" / "results.json").read_text())["queries_trained_on"] is None
    assert "30 queries, trained on or not is unknown (no queries.json)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(monkeypatch, evaluate_main, *evaluation, "--held_out_of", runs / "ranker")
    assert "has no queries.json, which msmarco.py writes" in capsys.readouterr().err


def test_both_scripts_measure_and_count_at_the_level_of_relevance(folder, decoder, tmp_path, monkeypatch, capsys):
    """Of five passages two have grade 2 and one grade 1: three are relevant from 1 on, and two from 2 on."""
    passages = {f"p{n}": f"passage {n}" for n in range(5)}
    jsonl(folder / "passages.jsonl", [{"pid": pid, "text": text} for pid, text in passages.items()])
    grades = dict(zip(passages, (2, 2, 1, 0, 0), strict=True))
    (folder / "qrels.txt").write_text("".join(f"{q} 0 {pid} {grade}\n" for q in "12" for pid, grade in grades.items()))
    model = ["--model", decoder, "--train_data", folder, "--held_out", 0.8, "--eval_data", folder, "--list_size", 2]
    model += ["--max_steps", 1, "--use_cpu", "--save_strategy", "no", "--output_dir", tmp_path / "ranker"]
    for level, share, warned in ((1, 0.6, True), (2, 0.4, False)):
        command(monkeypatch, msmarco.main, *model, "--relevance_level", level)
        ours = json.loads((tmp_path / "ranker" / folder.name / "results.json").read_text())
        evaluation = ["--model", tmp_path / "ranker", "--data", folder, "--output_dir", tmp_path / "evaluation"]
        command(monkeypatch, evaluate_main, *evaluation, "--relevance_level", level)
        theirs = json.loads((tmp_path / "evaluation" / "results.json").read_text())
        for pool in (ours["pool"], theirs["pool"]):
            assert (pool["relevant_share"], pool["relevance_level"]) == (share, level)
            assert ("of the judged pool is relevant" in (pool["warning"] or "")) == warned
        held_out = json.loads((tmp_path / "ranker" / "held-out" / "results.json").read_text())
        assert held_out["pool"]["relevant_share"] == share
        assert ("WARNING: 60.0% of the judged pool" in capsys.readouterr().out) == warned


def test_a_model_was_trained_on_the_queries_of_the_one_it_began_with(tmp_path):
    for name, base in (("first", "someone/decoder"), ("second", str(tmp_path / "first"))):
        (tmp_path / name / "checkpoint-5").mkdir(parents=True)
        write_queries(tmp_path / name, [f"{name} query"], ["kept"], base)
    collection = Collection({"1": "first query", "2": "second query", "3": "kept"}, {}, {"1": {}, "2": {}, "3": {}})
    assert count_trained_on(tmp_path / "first", collection) == 1
    assert count_trained_on(tmp_path / "second" / "checkpoint-5", collection) == 2
    assert count_trained_on("someone/decoder", collection) is None
    assert only_held_out(collection, str(tmp_path / "second"), "it").qrels == {"3": {}}
    del collection.qrels["3"]
    with pytest.raises(ValueError, match=r"it has none of the 1 queries that .*second held out"):
        only_held_out(collection, str(tmp_path / "second"), "it")
    write_queries(tmp_path / "first", ["a"], [], "someone/decoder")
    with pytest.raises(ValueError, match="first held out no queries: train with --held_out"):
        only_held_out(collection, str(tmp_path / "first"), "it")


def test_the_share_that_is_held_out_is_called_about_so_much(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        command(monkeypatch, msmarco.main, "--help")
    assert "About this share of --train_data's queries" in capsys.readouterr().out


def test_every_evaluated_collection_has_its_run():
    def runs(**given):
        ranking = RankingArguments(**given)
        ranking.validate()
        return ranking.trec_runs()

    assert runs(eval_data=["a", "b"], held_out=0.1) == (None, [None, None])
    assert runs(eval_data=["a", "b"], held_out=0.1, eval_run=["bm25"]) == ("bm25", ["bm25", "bm25"])
    assert runs(held_out=0.1, eval_run=["x.run"]) == ("x.run", [])
    assert runs(eval_data=["a"], held_out=0.1, eval_run=["x.run"]) == (None, ["x.run"])
    assert runs(eval_data=["a"], held_out=0.1, eval_run=["bm25", "x.run"]) == ("bm25", ["x.run"])


def test_a_checkpoint_that_learned_from_a_teacher_is_not_given_grades(folder, decoder, tmp_path, monkeypatch, capsys):
    model = GemmaEncoderForRanking.from_pretrained(decoder, ranking_loss="kl", dtype=torch.float32)
    model.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "student")
    with pytest.raises(SystemExit):
        required = ["--model", tmp_path / "student", "--train_data", folder, "--output_dir", tmp_path / "run"]
        command(monkeypatch, msmarco.main, *required)
    assert "--ranking_loss kl needs a teacher's scores" in capsys.readouterr().err
    command(monkeypatch, msmarco.main, *required, "--do_train", "False", "--eval_data", folder, "--use_cpu")
    assert (tmp_path / "run" / folder.name / "results.json").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--list_size", 1], "--list_size must be at least 2"),
        (["--measures", "MRR10"], "is not a measure"),
        (["--held_out", 1.0], "--held_out must be a share"),
        (["--ranking_loss", "kl"], "needs a teacher's scores"),
        (["--train_run", "not-there.run"], "not-there.run"),
        (["--eval_run", "a", "b"], "--eval_run names 2 files for 0"),
        (["--eval_run", "bm25"], "--eval_run bm25 needs --eval_data or --held_out"),
        (["--max_length", 14], "leaves no room for a document after the query"),
        (["--max_length", 8], "leaves no room for a query and a document"),
        (["--eval_strategy", "epoch"], "needs --eval_data or --held_out"),
        (["--eval_depth", 3, "--eval_data", "same"], "--eval_depth 3 is of a run"),
        (["--do_predict"], "--do_predict does nothing here"),
        (["--max_eval_samples", 3], "do nothing here"),
        (["--do_train", "false"], "is not a trained ranker"),
        (["--train_data", "same", "./not-there"], "./not-there is neither a folder nor a file"),
        (["--train_data", "same", "someone/data"], "someone/data: there is no such folder or file"),
    ],
)
def test_what_cannot_be_is_said_before_training(folder, decoder, tmp_path, monkeypatch, capsys, flags, message):
    jsonl(folder / "queries.jsonl", [{"qid": "1", "text": "rain " * 9}, {"qid": "2", "text": "sun"}])
    required = ["--model", decoder, "--train_data", folder, "--output_dir", tmp_path / "run"]
    flags = [folder if flag == "same" else flag for flag in flags]
    with pytest.raises(SystemExit):
        command(monkeypatch, msmarco.main, *required, *flags)
    assert message in capsys.readouterr().err


def test_the_template_is_rankt5s(nano_tokenizer):
    assert RANKING_TEMPLATE == "Query: {first} Document: {second}"
    tokenizer = set_template(AutoTokenizer.from_pretrained(nano_tokenizer.name_or_path), pair=RANKING_TEMPLATE)
    assert tokenizer.decode(tokenizer("q", "d")["input_ids"]) == "<bos>Query: q Document: d"
