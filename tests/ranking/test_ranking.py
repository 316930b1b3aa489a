"""Laws of reranking: scores do not depend on the batch, and measures are those of hand and of other libraries."""

import copy
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.ranking.bm25 import add_run, bm25, retrieve
from modeling_gemma_encoder.ranking.collection import Collection
from modeling_gemma_encoder.ranking.evaluation import (
    baselines,
    compare,
    evaluate,
    random_order,
)
from modeling_gemma_encoder.ranking.measures import heading, measure, measure_lists, parse_measures
from modeling_gemma_encoder.ranking.scoring import load_ranker, rerank, score_pairs
from modeling_gemma_encoder.ranking.trec import read_run
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

PAIRS = [(f"query {n % 3}", "some words " * (n * 7 % 11)) for n in range(12)]


@pytest.fixture(scope="module")
def ranker(decoder):
    torch.manual_seed(0)
    model = GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32).eval()
    return model, set_template(AutoTokenizer.from_pretrained(decoder), pair=RANKING_TEMPLATE)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 100_000])
def test_scores_are_in_order_and_of_any_batch(ranker, tokens_per_batch):
    model, tokenizer = ranker
    found = score_pairs(model, tokenizer, PAIRS, tokens_per_batch=tokens_per_batch)
    for (query, document), score in zip(PAIRS, found, strict=True):
        alone = tokenizer([query], [document], return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(model(**alone).logits.item(), abs=1e-5)


def test_no_pairs_have_no_scores_and_the_mode_of_the_model_comes_back(ranker):
    model, tokenizer = ranker
    assert score_pairs(model, tokenizer, []).shape == (0,)
    model.train()
    score_pairs(model, tokenizer, PAIRS[:1])
    assert model.training
    model.eval()


def test_what_is_no_ranker_is_refused(decoder, tmp_path):
    GemmaEncoderForSequenceClassification.from_pretrained(decoder, num_labels=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a ranker but a GemmaEncoderForSequenceClassification"):
        load_ranker(str(tmp_path))
    with pytest.raises(ValueError, match="not a trained ranker"):
        load_ranker(str(decoder))
    with pytest.raises(ValueError, match=r"There is no folder \./not/there"):
        load_ranker("./not/there")
    with pytest.raises(ValueError, match=r"There is no folder my-rankr\. Repositories"):
        load_ranker("my-rankr")


def test_texts_are_cut_as_the_tokenizer_was_saved_to(ranker):
    model, tokenizer = ranker
    long, before = [("query", "many words " * 50)], tokenizer.model_max_length
    tokenizer.model_max_length = 32
    assert score_pairs(model, tokenizer, long) == score_pairs(model, tokenizer, long, max_length=32)
    assert score_pairs(model, tokenizer, long) != score_pairs(model, tokenizer, long, max_length=64)
    tokenizer.model_max_length = before


def test_a_score_that_is_none_is_named(ranker):
    model, tokenizer = ranker
    bias = model.classifier.out_proj.bias
    before = bias.data.clone()
    bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"score of \('query .*`logits` has values that are infinite or NaN"):
        score_pairs(model, tokenizer, PAIRS)
    bias.data.copy_(before)


def test_a_pair_without_tokens_is_named(ranker):
    model, tokenizer = ranker
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_bos_token, tokenizer.chat_template = False, None
    with pytest.raises(ValueError, match=r"\('', ''\) has no token"):
        score_pairs(model, tokenizer, [("rain", "It rains."), ("", "")])


QRELS = {"q": {"a": 2, "b": 0, "c": 1, "d": 0}, "r": {"x": 1, "y": 0}, "absent": {"z": 1}}
RUN = {"q": {"b": 4.0, "a": 3.0, "u": 2.5, "c": 2.0, "d": 1.0}, "r": {"y": 1.0, "x": 0.0}}


def test_measures_are_those_of_the_hand():
    found = measure(QRELS, RUN, parse_measures(["RR@10", "nDCG@10", "AP", "R@2", "RR@1"]))
    assert found["RR@10"] == {"q": 1 / 2, "r": 1 / 2, "absent": 0}
    assert found["RR@1"] == {"q": 0, "r": 0, "absent": 0}
    assert found["R@2"] == {"q": 1 / 2, "r": 1, "absent": 0}
    assert found["AP"]["q"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    # Grades as gains, as trec_eval has them; u was not judged, c is fourth.
    expected = (2 / np.log2(3) + 1 / np.log2(5)) / (2 / np.log2(2) + 1 / np.log2(3))
    assert found["nDCG@10"]["q"] == pytest.approx(expected)


def test_the_gain_of_ndcg_is_the_one_that_its_heading_names():
    """Grades 2, 0, 1, 3 in this order; the best is 3, 2, 1, 0. A grade g is worth g, or 2^g - 1."""
    qrels, run = {"q": {"a": 2, "b": 0, "c": 1, "d": 3}}, {"q": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}}
    linear = (2 + 1 / 2 + 3 / np.log2(5)) / (3 + 2 / np.log2(3) + 1 / 2)
    exponential = (3 + 1 / 2 + 7 / np.log2(5)) / (7 + 3 / np.log2(3) + 1 / 2)
    names = ["nDCG@10", "nDCG(dcg='exp-log2')@10", "RR@10"]
    for order in (names, names[::-1]):
        found = measure(qrels, run, parse_measures(order))
        assert [found[name]["q"] for name in names] == pytest.approx([linear, exponential, 1])
    assert measure({"q": {"a": 0}}, run, parse_measures(names))[names[1]] == {"q": 0}
    assert [heading(name) for name in names] == [f"{names[0]} (linear gain)", f"{names[1]} (exponential gain)", "RR@10"]
    found = measure({"r": {"x": 1, "y": 0}}, RUN, parse_measures(names))  # of grades 0 and 1 both are the same
    assert found[names[0]]["r"] == found[names[1]]["r"] == pytest.approx(1 / np.log2(3))


def test_a_level_of_relevance_counts_where_grades_do_not():
    names = [str(one) for one in parse_measures(["nDCG@10", "RR@10", "AP(rel=1)", "R@100"], relevance_level=2)]
    assert names == ["nDCG@10", "RR(rel=2)@10", "AP", "R(rel=2)@100"]
    found = measure(QRELS, RUN, parse_measures(["RR@10"], relevance_level=2))["RR(rel=2)@10"]
    assert found == {"q": 1 / 2, "r": 0, "absent": 0}
    with pytest.raises(ValueError, match="'MRR10' is not a measure"):
        parse_measures(["MRR10"])


def test_lists_measure_as_sklearn_says_and_padding_does_not_count():
    draw = np.random.default_rng(0)
    labels, scores = draw.integers(0, 4, (5, 8)), draw.normal(size=(5, 8))
    expected = np.mean([ndcg_score(labels[i : i + 1], scores[i : i + 1], k=5) for i in range(5)])
    measures = parse_measures(["nDCG@5"])
    assert measure_lists(scores, labels, measures)["nDCG@5"] == pytest.approx(expected)
    padded = np.pad(labels, ((0, 0), (0, 3)), constant_values=-100), np.pad(scores, ((0, 0), (0, 3)), constant_values=9)
    assert measure_lists(padded[1], padded[0], measures)["nDCG@5"] == pytest.approx(expected)


def test_equal_scores_measure_the_same_whatever_their_order():
    qrels = {"q": {str(n): int(n == 7) for n in range(20)}}
    one = {"q": {str(n): 0.0 for n in range(20)}}
    other = {"q": {str(n): 0.0 for n in reversed(range(20))}}
    measures = parse_measures(["RR@10", "nDCG@10", "AP"])
    assert measure(qrels, one, measures) == measure(qrels, other, measures)


def test_random_order_is_the_same_wherever_it_is_drawn():
    """Queries and passages that come out of sets come in another order in every process."""
    qrels = {f"q{n}": {f"p{n}-{i}": i % 2 for i in range(5)} for n in range(4)}
    texts = {pid: "text" for grades in qrels.values() for pid in grades}
    turned = {qid: dict(reversed(grades.items())) for qid, grades in reversed(qrels.items())}
    queries = dict.fromkeys(qrels, "query")
    runs = [random_order(Collection(queries, texts, judged)) for judged in (qrels, turned)]
    assert runs[0] == runs[1] and len({max(scores, key=scores.get)[-1] for scores in runs[0].values()}) > 1
    assert random_order(Collection(queries, texts, qrels), seed=1) != runs[0]


def test_random_order_is_worth_what_the_hand_says():
    qrels = {f"q{n}": {f"{n}-{i}": int(i == 0) for i in range(4)} for n in range(3000)}
    collection = Collection(dict.fromkeys(qrels, ""), {}, qrels)
    found = measure(qrels, random_order(collection), parse_measures(["RR@10"]))["RR@10"]
    assert np.mean([*found.values()]) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, abs=0.02)


def test_a_difference_is_tested_by_its_signs():
    """By hand: with n equal differences only all signs equal reach the mean, 2 of 2^n, seen or drawn."""
    ours, theirs = {str(n): 1.0 + n * 1e-9 for n in range(10)}, {str(n): 0.0 for n in range(10)}
    found = compare(ours, theirs)
    assert found["difference"] == pytest.approx(1) and found["p"] == pytest.approx(2 / 2**10)
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    draw = np.random.default_rng(0)
    noise = {str(n): value for n, value in enumerate(draw.normal(size=200))}
    assert compare(noise, dict.fromkeys(noise, 0.0))["p"] > 0.01
    assert not found["too_few"] and not compare(theirs, theirs)["too_few"]  # ten, though none differs
    del ours["0"]
    assert compare(ours, theirs)["p"] is compare(ours, theirs)["interval"] is None  # of nine
    assert compare(ours, theirs)["too_few"]


def pooled(irrelevant: int) -> tuple[Collection, dict]:
    """Twelve queries of ten judged passages, the last irrelevant; we are right, others in the first query alone."""
    qrels = {f"q{n}": {f"{n}-{i}": int(i < 10 - irrelevant) for i in range(10)} for n in range(12)}
    best = {qid: {pid: -float(i) for i, pid in enumerate(grades)} for qid, grades in qrels.items()}
    worst = {qid: {pid: -score for pid, score in scores.items()} for qid, scores in best.items()} | {"q0": best["q0"]}
    return Collection(dict.fromkeys(qrels, ""), {}, qrels), {"ours": best, "BM25": worst, "random order": worst}


def test_the_relevant_share_of_the_pool_is_printed_and_saved(tmp_path):
    collection, runs = pooled(irrelevant=8)
    found = evaluate(collection, runs, parse_measures(["RR@10"]), tmp_path)
    pool = {"candidates": 120, "relevant": 24, "relevant_share": 0.2, "relevance_level": 1, "warning": None}
    assert json.loads((tmp_path / "results.json").read_text())["pool"] == found["pool"] == pool
    text = (tmp_path / "results.md").read_text()
    assert "Ranked: judged pool, 120 passages, 24 of them relevant (20.0%)" in text and "WARNING" not in text
    assert "RR@10 against BM25: +81.5 over 12 queries" in text  # 11/12 of 1 - 1/9
    assert found["compared"]["RR@10, ours - BM25"]["p"] == pytest.approx(2 / 2**11, abs=5e-4)


@pytest.mark.parametrize(
    "irrelevant,random_is_right,reason",
    [
        (1, False, "90.0% of the judged pool is relevant"),
        (8, True, "random order beats BM25"),
        (1, True, "90.0% of the judged pool is relevant and random order beats BM25"),
    ],
)
def test_no_difference_is_claimed_where_the_order_tells_little(tmp_path, irrelevant, random_is_right, reason):
    collection, runs = pooled(irrelevant)
    if random_is_right:
        runs["random order"] = runs["ours"]
    found = evaluate(collection, runs, parse_measures(["AP"]), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert f"WARNING: {reason}, so that no difference is claimed; rerank a run" in text
    assert "against" not in text and "p = " not in text
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["pool"]["warning"].startswith(reason) and found["compared"] == saved["compared"]
    assert all(one["p"] is one["interval"] is None for one in saved["compared"].values())


def test_the_relevant_share_is_of_the_level_of_relevance(tmp_path):
    """Of ten passages four have grade 2 and two grade 1: 60 % are relevant from 1 on, 40 % from 2 on."""
    collection, runs = pooled(irrelevant=4)
    for number, grades in enumerate(collection.qrels.values()):
        grades |= {f"{number}-{i}": 2 for i in range(4)}
    pools, texts = {}, {}
    for level in (1, 2):
        collection.relevance_level = level
        evaluate(collection, runs, parse_measures(["AP"], level), tmp_path)
        pools[level] = json.loads((tmp_path / "results.json").read_text())["pool"]
        texts[level] = (tmp_path / "results.md").read_text()
    assert [pools[1][key] for key in ("relevant", "relevant_share", "relevance_level")] == [72, 0.6, 1]
    assert [pools[2][key] for key in ("relevant", "relevant_share", "relevance_level")] == [48, 0.4, 2]
    assert "WARNING: 60.0% of the judged pool is relevant" in texts[1] and "against" not in texts[1]
    assert "120 passages, 48 of them relevant (40.0%, from grade 2 on)" in texts[2] and "WARNING" not in texts[2]
    assert "AP(rel=2) against BM25: +" in texts[2] and ", p = " in texts[2]


def test_most_of_a_runs_candidates_may_be_relevant(tmp_path):
    """They are what a first stage found, and not what somebody chose to judge."""
    collection, runs = pooled(irrelevant=1)
    collection.run = runs["BM25"]
    found = evaluate(collection, runs, parse_measures(["AP"]), tmp_path)
    assert found["pool"]["relevant_share"] == 0.9 and found["pool"]["warning"] is None
    assert "Ranked: a run's candidates, 120 passages" in found["table"] and "AP against BM25: +" in found["table"]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"queries_trained_on": 5}, "\n\n12 queries, 5 of them trained on\n"),
        ({"queries_trained_on": 0}, "\n\n12 queries, 0 of them trained on\n"),
        ({"queries_trained_on": None}, "\n\n12 queries, trained on or not is unknown (no queries.json)\n"),
        ({}, None),
    ],
)
def test_the_table_on_disk_says_how_many_queries_were_trained_on(tmp_path, facts, said):
    evaluate(*pooled(irrelevant=8), parse_measures(["AP"]), tmp_path, facts)
    text = (tmp_path / "results.md").read_text()
    assert text.endswith(said) if said else "trained on" not in text


def test_bm25_has_one_row():
    passages = {"a": "sun", "b": "rain", "c": "the sun", "d": "wind"}
    collection = Collection({"q": "sun"}, passages, {"q": {"a": 1}})
    add_run(collection, "bm25", depth=3)
    rows = baselines(collection, depth=2)
    assert rows.keys() == {"BM25", "random order"} and rows["BM25"] == retrieve(collection, depth=2)
    assert rows["BM25"] == bm25(collection, depth=2)


def test_reranking_leaves_runs_tables_and_a_plot(ranker, tmp_path):
    model, tokenizer = ranker
    queries = {"1": "rain", "2": "sun", "3": "without candidates"}
    passages = {pid: f"passage {pid} " * n for n, pid in enumerate("abcdef", start=1)}
    collection = Collection(queries, passages, {"1": {"a": 1, "b": 0}, "2": {"c": 1, "d": 0}, "3": {"e": 1}})
    collection.run = {"1": {"a": 1.0, "b": 2.0, "c": 3.0}, "2": {"f": 1.0, "c": 0.5}}
    runs = {"ours": rerank(model, tokenizer, collection, depth=2), **baselines(collection, depth=2)}
    assert runs.keys() == {"ours", "BM25", "first stage", "random order"}
    candidates = [{qid: set(scores) for qid, scores in run.items()} for run in runs.values()]
    assert all(one == candidates[0] for one in candidates)  # all of them order the same passages
    assert runs["first stage"] == {"1": {"c": 3.0, "b": 2.0}, "2": {"f": 1.0, "c": 0.5}, "3": {}}
    assert {qid: set(scores) for qid, scores in runs["ours"].items()} == {"1": {"b", "c"}, "2": {"f", "c"}, "3": set()}
    found = evaluate(collection, runs, parse_measures(["nDCG@10", "R@100"]), tmp_path)
    assert read_run(tmp_path / "ours.run") == {qid: scores for qid, scores in runs["ours"].items() if scores}
    assert found["means"]["ours"]["R@100"] == pytest.approx(1 / 3)  # of 1 the best two lack a, of 3 there is nothing
    assert (tmp_path / "per_query.png").stat().st_size > 5000
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["means"] == found["means"] and set(saved["per_query"]["BM25"]["nDCG@10"]) == {"1", "2", "3"}
    assert (tmp_path / "results.md").read_text().startswith("| x 100 | nDCG@10 (linear gain) | R@100 |")
    assert saved["gains"] == {"nDCG@10": "linear"}
