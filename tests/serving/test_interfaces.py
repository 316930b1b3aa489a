"""Laws of the interfaces: scores are the model's own, in the forms that TEI, Jina and Cohere document."""

import asyncio
import random
import re

import httpx
import numpy as np
import pytest
import torch
from servers import save, serving
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.ranking.scoring import load_ranker, score_pairs

QUERY = "how do cats purr"
TEXTS = ["Dogs bark.", "Cats purr by vibrating the larynx.", "", "The harbour froze in January. " * 12, "Purr."]


@pytest.fixture(scope="module")
def own(ranker):
    """Scores of pairs as the model gives them, each alone."""
    model, tokenizer = load_ranker(ranker, "float32", "cpu")

    def score(query, texts, **options):
        return np.array([score_pairs(model, tokenizer, [(query, text)], **options)[0] for text in texts])

    return score


def post(server, path, body, **options):
    return httpx.post(server.url + path, json=body, timeout=60, **options)


def test_rerank_gives_all_scores_the_best_first(ranking_server, own):
    answer = post(ranking_server, "/rerank", {"query": QUERY, "texts": TEXTS})
    expected = own(QUERY, TEXTS)
    assert [rank["index"] for rank in answer.json()] == np.argsort(-expected).tolist()
    assert [rank["score"] for rank in answer.json()] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert all(set(rank) == {"index", "score"} for rank in answer.json())
    assert answer.headers["x-compute-type"] == "cpu" and int(answer.headers["x-compute-tokens"]) > 100
    with_texts = post(ranking_server, "/rerank", {"query": QUERY, "texts": TEXTS, "return_text": True}).json()
    assert [rank["text"] for rank in with_texts] == [TEXTS[rank["index"]] for rank in with_texts]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_documents_are_reranked_as_jina_and_cohere_document_it(ranking_server, own, path):
    documents = [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]
    answer = post(ranking_server, path, {"model": "any", "query": QUERY, "documents": documents, "top_n": 2}).json()
    expected = own(QUERY, TEXTS)
    best = np.argsort(-expected)[:2].tolist()
    assert [result["index"] for result in answer["results"]] == best
    assert [result["relevance_score"] for result in answer["results"]] == pytest.approx(expected[best], abs=1e-5)
    assert answer["model"] == "ranker" and answer["id"] and answer["usage"]["total_tokens"] > 100
    assert answer["meta"]["api_version"] == {"version": "2" if path == "/v2/rerank" else "1"}
    texts = [result.get("document", {}).get("text") for result in answer["results"]]
    assert texts == ([None, None] if path == "/v2/rerank" else [TEXTS[place] for place in best])
    whole = post(ranking_server, path, {"query": QUERY, "documents": documents, "return_documents": False}).json()
    assert len(whole["results"]) == 5 and not any("document" in result for result in whole["results"])


def test_scores_do_not_depend_on_the_company(ranking_server, own):
    """32 clients at once, lists of all sizes, and every score is that of the pair alone."""
    words = ["cats", "dogs", "purr", "bark", "harbour", "larynx", "January", "froze", "the", "a", "of", "by"]
    draw = random.Random(0)
    lists = [
        (
            " ".join(draw.choices(words, k=draw.randint(1, 9))),
            [" ".join(draw.choices(words, k=draw.choice((1, 5, 20, 60)))) for _ in range(draw.choice((1, 1, 3, 12)))],
        )
        for _ in range(64)
    ]

    async def ask(clients):
        waiting, answers = list(enumerate(lists)), {}

        async def client():
            async with httpx.AsyncClient(base_url=ranking_server.url, timeout=120) as http:
                while waiting:
                    place, (query, texts) = waiting.pop()
                    answers[place] = (await http.post("/rerank", json={"query": query, "texts": texts})).json()

        await asyncio.gather(*(client() for _ in range(clients)))
        return [answers[place] for place in range(len(lists))]

    together = asyncio.run(ask(32))
    for (query, texts), answer in zip(lists, together, strict=True):
        scores = {rank["index"]: rank["score"] for rank in answer}
        assert [scores[place] for place in range(len(texts))] == pytest.approx(own(query, texts), abs=1e-5)


def test_a_calibrated_ranker_gives_probabilities_and_raw_scores_where_asked(calibrated, own):
    with serving(calibrated) as server:
        body = {"query": QUERY, "texts": TEXTS}
        given = {rank["index"]: rank["score"] for rank in post(server, "/rerank", body).json()}
        logits = own(QUERY, TEXTS)
        by_hand = 1 / (1 + np.exp(-(logits - 0.5) / 2.0))
        assert [given[place] for place in range(5)] == pytest.approx(by_hand, abs=1e-6)
        raw = {rank["index"]: rank["score"] for rank in post(server, "/rerank", {**body, "raw_scores": True}).json()}
        assert [raw[place] for place in range(5)] == pytest.approx(logits, abs=1e-5)
        documents = post(server, "/v1/rerank", {"query": QUERY, "documents": TEXTS}).json()["results"]
        assert documents[0]["relevance_score"] == pytest.approx(max(by_hand), abs=1e-6)
        info = httpx.get(server.url + "/info").json()
    assert info["scores"] == "calibrated probabilities"
    assert info["calibration"] == {"temperature": 2.0, "bias": 0.5}


def test_texts_with_too_many_tokens_are_cut_at_the_asked_end_or_refused(ranker, own):
    tokenizer, long = AutoTokenizer.from_pretrained(ranker), "purr " * 30 + "harbour " * 30
    with serving(ranker, max_length=40) as server:
        body = {"query": QUERY, "texts": ["purr", long]}

        def score(**options):
            answer = {rank["index"]: rank["score"] for rank in post(server, "/rerank", {**body, **options}).json()}
            return answer[1]

        assert score() == score(truncate=True) == pytest.approx(own(QUERY, [long], max_length=40)[0], abs=1e-5)
        (template,) = tokenizer([QUERY], [""])["input_ids"]
        room = 40 - len(template)
        ids = tokenizer(long, add_special_tokens=False)["input_ids"]
        model, _ = load_ranker(ranker, "float32", "cpu")
        with torch.no_grad():  # the template ends with the document
            left = model(torch.tensor([template + ids[-room:]])).logits.item()
        assert score(truncation_direction="Left") == pytest.approx(left, abs=1e-5)
        assert score() == score(truncation_direction="right")
        refused = post(server, "/rerank", {**body, "truncate": False})
        assert refused.status_code == 413 and "at most 40 tokens; number 1 has" in refused.json()["error"]
        assert post(server, "/rerank", {**body, "texts": ["purr"], "truncate": False}).status_code == 200
        query = post(server, "/rerank", {"query": "purr " * 50, "texts": ["purr"]})
        assert query.status_code == 422 and query.json()["error_type"] == "tokenizer"
        assert re.search(r"The query has 10\d tokens, and a pair may have 40", query.json()["error"])
    with serving(ranker, max_length=40, auto_truncate=False) as server:
        assert post(server, "/rerank", body).status_code == 413
        assert post(server, "/rerank", {**body, "truncate": True}).status_code == 200


def test_max_tokens_per_doc_cuts_documents(ranking_server, own):
    body = {"query": QUERY, "documents": ["cats purr loudly and often", "cats"], "max_tokens_per_doc": 2}
    results = post(ranking_server, "/v2/rerank", body).json()["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    tokens = AutoTokenizer.from_pretrained(ranking_server.args.model)
    ids = tokens("cats purr loudly and often", add_special_tokens=False)["input_ids"]
    expected = own(QUERY, [tokens.decode(ids[:2]), "cats"])
    assert [scores[0], scores[1]] == pytest.approx(expected, abs=1e-5)


def test_predict_gives_labels_the_best_first(classifying_server, classifier):
    model = GemmaEncoderForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)

    def expected(*texts, raw=False):
        with torch.no_grad():
            logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0]
        shares = logits if raw else logits.softmax(-1)
        return sorted(zip(shares.tolist(), ("no", "maybe", "yes"), strict=True), reverse=True)

    def check(given, wanted):
        assert [row["label"] for row in given] == [label for _, label in wanted]
        assert [row["score"] for row in given] == pytest.approx([score for score, _ in wanted], abs=1e-5)

    def predict(inputs, **options):
        return post(classifying_server, "/predict", {"inputs": inputs, **options}).json()

    check(predict("A fine film."), expected("A fine film."))
    check(predict(["A fine film."]), expected("A fine film."))
    check(predict(["A fine film.", "Really."]), expected("A fine film.", "Really."))
    check(predict("A fine film.", raw_scores=True), expected("A fine film.", raw=True))
    batch = predict([["A fine film."], ["A fine film.", "Really."], ["Bad."]])
    for given, texts in zip(batch, (["A fine film."], ["A fine film.", "Really."], ["Bad."]), strict=True):
        check(given, expected(*texts))
    (nested,) = predict("A fine film.", parameters={"top_k": 1})
    check(nested, expected("A fine film.")[:1])
    logits = {label: score for score, label in expected("A fine film.", raw=True)}
    for name, function in (("sigmoid", torch.sigmoid), ("none", lambda values: values)):
        (nested,) = predict("A fine film.", parameters={"function_to_apply": name})
        for row in nested:
            assert row["score"] == pytest.approx(function(torch.tensor(logits[row["label"]])).item(), abs=1e-5)
    info = httpx.get(classifying_server.url + "/info").json()
    assert info["scores"] == "probabilities that are not calibrated"
    assert info["model_type"]["classifier"]["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}


@pytest.mark.parametrize(
    ("config", "by_hand", "says"),
    [
        ({"problem_type": "multi_label_classification", "num_labels": 3}, torch.sigmoid, "not calibrated"),
        ({"problem_type": "regression", "num_labels": 1}, lambda logits: logits, "regression"),
        ({"num_labels": 3, "calibration_temperature": 3.0}, lambda z: (z / 3).softmax(-1), "calibrated"),
    ],
)
def test_predict_gives_what_the_kind_of_problem_asks_for(tmp_path, config, by_hand, says):
    folder = save(tmp_path / "model", GemmaEncoderForSequenceClassification, **config)
    model = GemmaEncoderForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(folder)("Rain.", return_tensors="pt")).logits[0]
    with serving(folder) as server:
        given = post(server, "/predict", {"inputs": "Rain."}).json()
        assert says in httpx.get(server.url + "/info").json()["scores"]
    scores = {row["label"]: row["score"] for row in given}
    assert [scores[f"LABEL_{place}"] for place in range(len(logits))] == pytest.approx(
        by_hand(logits).tolist(), abs=1e-5
    )


def test_a_model_is_not_asked_for_what_it_does_not_do(classifying_server):
    for path, name in (("/rerank", "texts"), ("/v1/rerank", "documents")):
        answer = post(classifying_server, path, {"query": "a", name: ["b"]})
        assert answer.status_code == 424 and "use /predict" in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/rerank", {"query": "a", "texts": []}, 400, "no texts"),
        ("/v1/rerank", {"query": "a", "documents": []}, 400, "no texts"),
        ("/rerank", {"query": 3, "texts": ["a", 4]}, 422, "`query`: Input should be a valid string; `texts.1`: Input"),
        ("/rerank", {"query": "a"}, 422, "`texts`: Field required"),
        ("/rerank", [], 422, "Input should be a valid dictionary"),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["b", {"title": "c"}]},
            422,
            "`documents.1`: Input should be a valid string; `documents.1.text`: Field",
        ),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 422, "`top_n`: Input should be greater than"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["title"]}, 422, "`rank_fields.0`"),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "`inputs`: must be a text, a pair"),
        ("/predict", {"inputs": [["a"], "b"]}, 422, "`inputs`: a batch must be lists"),
        ("/predict", {"inputs": []}, 422, "`inputs`"),
        ("/predict", {"inputs": "a", "parameters": {"top_k": "all"}}, 422, "`parameters.top_k`"),
        ("/rerank", b'{"query": "a"', 400, "This is no JSON"),
        ("/rerank", b'{"query": "\xff"}', 400, "error parsing the body"),
        ("/rerank", b"[" * 100_000, 400, "error parsing the body"),
        ("/nowhere", {}, 404, "Not Found"),
        ("/rerank", b'{"query": "\\ud800", "texts": ["a"]}', 422, "`query`: has half of a surrogate pair"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(ranking_server, path, body, status, words):
    raw = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"content-type": "application/json"}
    answer = httpx.post(ranking_server.url + path, headers=headers, **raw)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"] and answer.json()["error_type"] in ("validation", "empty")
    assert answer.json()["message"] == answer.json()["detail"] == answer.json()["error"]


def test_a_body_that_is_not_called_json_is_told_so(ranking_server):
    answer = httpx.post(ranking_server.url + "/rerank", content=b'{"query": "a", "texts": ["b"]}')
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]


def test_metrics_have_the_names_of_tei_and_count(ranker):
    with serving(ranker) as server:
        post(server, "/rerank", {"query": QUERY, "texts": TEXTS})
        post(server, "/rerank", {"query": QUERY, "texts": []})
        text = httpx.get(server.url + "/metrics").text
    for line in (
        'te_request_count{method="batch"} 2.0',
        'te_request_success{method="batch"} 1.0',
        'te_request_failure{err="empty"} 1.0',
        "te_batch_next_size_sum 5.0",
        "te_request_duration_count 1.0",
        "te_queue_size 0.0",
    ):
        assert line in text.splitlines()


def test_there_is_an_openapi_page(ranking_server):
    paths = httpx.get(ranking_server.url + "/openapi.json").json()["paths"]
    assert set(paths) >= {"/rerank", "/predict", "/v1/rerank", "/v2/rerank", "/health", "/info", "/metrics"}
    assert httpx.get(ranking_server.url + "/docs").status_code == 200
    assert httpx.get(ranking_server.url + "/health").status_code == 200
