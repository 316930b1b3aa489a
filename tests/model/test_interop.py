"""Laws of other libraries' use of a ranker: sentence-transformers' scores are ours, and it can train one."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification, verify_attention
from modeling_gemma_encoder.ranking.measures import measure, parse_measures
from modeling_gemma_encoder.ranking.scoring import score_pairs
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

PAIRS = [("rain", "It rains in Spain."), ("what is a cat", "A cat is an animal. " * 9), ("sun", ""), ("sun", "A star.")]


@pytest.fixture(scope="module")
def folder(decoder, tmp_path_factory):
    """A ranker as it is published."""
    return save_ranker(decoder, tmp_path_factory.mktemp("ranker"), "kv_probe")


@pytest.fixture(scope="module")
def averaging(decoder, tmp_path_factory):
    """One that twenty steps teach whatever dropout draws: with probes, two seeds in five learned nothing by then."""
    return save_ranker(decoder, tmp_path_factory.mktemp("averaging"), "mean")


def save_ranker(decoder, folder, pooling: str):
    torch.manual_seed(0)
    model = GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32, pooling=pooling)
    model.save_pretrained(folder)
    set_template(AutoTokenizer.from_pretrained(decoder), pair=RANKING_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    model = GemmaEncoderForRanking.from_pretrained(folder, dtype=torch.float32).eval()
    return score_pairs(model, AutoTokenizer.from_pretrained(folder), PAIRS)


def cross_encoder(folder) -> CrossEncoder:
    return CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, trust_remote_code=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_cross_encoder_predicts_our_logits(folder, ours, batch_size):
    found = cross_encoder(folder).predict(PAIRS, batch_size=batch_size)
    np.testing.assert_allclose(found, ours, atol=1e-5)
    assert ours.min() < 0  # or a sigmoid would not be seen


def test_cross_encoder_ranks_by_our_logits(folder):
    model = GemmaEncoderForRanking.from_pretrained(folder, dtype=torch.float32).eval()
    documents = ["A star.", "It rains.", "", "Rain and sun, all day."]
    scores = score_pairs(model, AutoTokenizer.from_pretrained(folder), [("sun", text) for text in documents])
    found = cross_encoder(folder).rank("sun", documents)
    assert [one["corpus_id"] for one in found] == np.argsort(-scores).tolist()
    np.testing.assert_allclose([one["score"] for one in found], np.sort(scores)[::-1], atol=1e-5)


def test_what_cross_encoder_saves_scores_the_same(folder, ours, tmp_path):
    cross_encoder(folder).save_pretrained(str(tmp_path))
    np.testing.assert_allclose(cross_encoder(tmp_path).predict(PAIRS), ours, atol=1e-5)
    again = GemmaEncoderForRanking.from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(score_pairs(again, AutoTokenizer.from_pretrained(tmp_path), PAIRS), ours, atol=1e-5)
    assert list(tmp_path.glob("*_gemma_encoder.py"))  # the code travels along


PAIRWISE = {"query": ["rain", "rain", "sun", "sun"], "document": ["Good.", "Bad.", "Good.", "Bad."]}
LISTWISE = {"query": ["rain", "sun"], "documents": [["Good.", "Bad.", "No."], ["Good.", "No.", "Bad."]]}
TRIPLETS = {"query": ["rain", "sun"], "positive": ["Good.", "Good."], "negative": ["Bad.", "Bad."]}
TRAINING = {
    losses.BinaryCrossEntropyLoss: {**PAIRWISE, "label": [1.0, 0.0, 1.0, 0.0]},
    losses.LambdaLoss: {**LISTWISE, "labels": [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]},
    losses.ListNetLoss: {**LISTWISE, "labels": [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]},
    losses.MarginMSELoss: {**TRIPLETS, "label": [3.0, 2.0]},
}


@pytest.mark.parametrize("loss", TRAINING, ids=lambda loss: loss.__name__)
def test_cross_encoder_trainer_trains_it(averaging, tmp_path, loss):
    model = cross_encoder(averaging)
    right, wrong = [("rain", "Good."), ("sun", "Good.")], [("rain", "Bad."), ("sun", "Bad.")]
    args = CrossEncoderTrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=20,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = CrossEncoderTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict(TRAINING[loss]), loss=loss(model)
    )
    trainer.train()
    margins = model.predict(right) - model.predict(wrong)
    assert (margins > 0.5).all()
    verify_attention(model.model)
    model.save_pretrained(str(tmp_path / "saved"))
    np.testing.assert_allclose(cross_encoder(tmp_path / "saved").predict(right), model.predict(right), atol=1e-5)


def test_the_reranking_evaluator_measures_what_we_measure(folder):
    documents = {"rain": ["It rains.", "A star.", "Some rain."], "sun": ["A star.", "Nothing.", "It rains."]}
    positive = {"rain": {"It rains.", "Some rain."}, "sun": {"A star."}}
    samples = [
        {"query": query, "positive": sorted(positive[query]), "documents": texts} for query, texts in documents.items()
    ]
    evaluator = CrossEncoderRerankingEvaluator(samples, at_k=10, always_rerank_positives=False, show_progress_bar=False)
    theirs = evaluator(cross_encoder(folder))
    model = GemmaEncoderForRanking.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    qrels = {query: {text: int(text in positive[query]) for text in texts} for query, texts in documents.items()}
    scores = {
        query: dict(zip(texts, score_pairs(model, tokenizer, [(query, text) for text in texts]), strict=True))
        for query, texts in documents.items()
    }
    run = {query: {text: float(score) for text, score in found.items()} for query, found in scores.items()}
    found = measure(qrels, run, parse_measures(["AP", "RR@10", "nDCG@10"]))
    for measured, name in (("AP", "map"), ("RR@10", "mrr@10"), ("nDCG@10", "ndcg@10")):
        assert np.mean([*found[measured].values()]) == pytest.approx(theirs[name], abs=1e-6), name


@pytest.mark.parametrize("num_labels", [1, 2])
def test_cross_encoder_returns_a_regressors_numbers(decoder, tmp_path, num_labels):
    """They may be below 0 and above 1: a sigmoid of them is no prediction."""
    model = GemmaEncoderForSequenceClassification.from_pretrained(
        decoder, dtype=torch.float32, num_labels=num_labels, problem_type="regression"
    )
    model.classifier.out_proj.bias.data.fill_(4.0)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        first, second = zip(*PAIRS, strict=True)
        expected = model.eval()(**tokenizer(list(first), list(second), padding=True, return_tensors="pt")).logits
    assert expected.min() > 1
    found = cross_encoder(tmp_path).predict(PAIRS)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)


def test_a_ranker_that_becomes_a_regressor_or_classifier_is_one(folder, tmp_path):
    """The activation belongs to the head that is saved."""
    GemmaEncoderForSequenceClassification.from_pretrained(
        folder, num_labels=2, problem_type="single_label_classification", ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert cross_encoder(tmp_path).predict(PAIRS).shape == (4, 2)
