"""Laws of ranking lists: drawn anew every epoch and alike for whoever reads them; queries are never cut."""

import numpy as np
import pytest
import torch
from helpers import pad
from transformers import AutoTokenizer, Trainer, TrainingArguments

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder.ranking.data import FreshLists, RankingCollator, RankingDataset, collate_lists
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, encode_pairs, set_template

ROWS = [
    {"query": f"query {n}", "documents": [f"document {n} {i}" for i in range(20)], "labels": [3, 0, 1] + [0] * 17}
    for n in range(6)
]


@pytest.fixture
def tokenizer(decoder):
    return set_template(AutoTokenizer.from_pretrained(decoder), pair=RANKING_TEMPLATE)


def test_a_list_has_a_relevant_document_and_others_none_twice_each_with_its_label():
    lists = RankingDataset(ROWS, list_size=5)
    for epoch in range(20):
        lists.set_epoch(epoch)
        for number, row in enumerate(ROWS):
            found = lists[number]
            assert found["query"] == row["query"] and len(set(found["documents"])) == 5
            assert found["labels"][0] > 0
            assert found["labels"] == [row["labels"][row["documents"].index(text)] for text in found["documents"]]


def test_every_epoch_draws_anew_and_the_draw_is_of_seed_epoch_and_row_alone():
    def draws(seed, epoch, order):
        lists = RankingDataset(ROWS, list_size=5, seed=seed)
        lists.set_epoch(epoch)
        return {number: lists[number]["documents"] for number in order}

    assert draws(0, 1, range(6)) == draws(0, 1, reversed(range(6)))
    assert draws(0, 1, range(6)) != draws(0, 2, range(6))
    assert draws(0, 1, range(6)) != draws(1, 1, range(6))


def test_negatives_are_drawn_uniformly():
    lists, counts = RankingDataset(ROWS[:1], list_size=6), np.zeros(20)
    for epoch in range(4000):
        lists.set_epoch(epoch)
        for document in lists[0]["documents"]:
            counts[int(document.rpartition(" ")[2])] += 1
    # One of documents 0 and 2 comes first; of the 19 others 5: by hand 1/2 + 1/2 * 5/19, and 5/19.
    np.testing.assert_allclose(counts[[0, 2]] / 4000, 0.5 + 2.5 / 19, atol=0.03)
    np.testing.assert_allclose(np.delete(counts, [0, 2]) / 4000, 5 / 19, atol=0.03)


def test_a_teachers_scores_make_no_document_the_relevant_one():
    rows = [{"query": "q", "documents": ["a", "b", "c"], "labels": [-1.5, -2.5, -3.5]}]
    found = RankingDataset(rows, list_size=2, from_teacher=True)[0]
    assert len(found["documents"]) == 2
    assert found["labels"] == [{"a": -1.5, "b": -2.5, "c": -3.5}[text] for text in found["documents"]]
    assert (
        len(RankingDataset(rows, list_size=2)[0]["documents"]) == 2
    )  # nothing relevant: defined, and nothing to learn
    with pytest.raises(ValueError, match="'q', row 0, has no documents"):
        RankingDataset([{"query": "q", "documents": [], "labels": []}], list_size=2)[0]


def test_ids_become_texts():
    rows = [{"query": "1", "documents": ["7", "8"], "labels": [1, 0]}]
    found = RankingDataset(rows, 2, passages={"7": "seven", "8": "eight"}, queries={"1": "one"})[0]
    assert found == {"query": "one", "documents": ["seven", "eight"], "labels": [1.0, 0.0]}


def test_a_batch_is_the_tokens_of_the_template(tokenizer):
    lists = [
        {"query": "rain", "documents": ["It rains.", "Sun."], "labels": [2, 0]},
        {"query": "a longer query", "documents": ["One."], "labels": [1]},
    ]
    batch = RankingCollator(tokenizer)(lists)
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)  # without the template
    expected = [plain(f"Query: {q} Document: {d}")["input_ids"] for q, d in [("rain", "It rains."), ("rain", "Sun.")]]
    decoded = [tokenizer.decode(ids) for ids in expected]
    rows = [row[mask.bool()] for row, mask in zip(batch["input_ids"][0], batch["attention_mask"][0], strict=True)]
    assert [tokenizer.decode(row) for row in rows] == decoded
    assert rows[0].tolist() == tokenizer("rain", "It rains.")["input_ids"]
    assert batch["labels"].tolist() == [[2, 0], [1, -100]]
    assert batch["attention_mask"][1, 1].sum() == 0


def test_documents_are_cut_and_queries_and_the_template_never(tokenizer):
    query, document = "how long is a query", "many words " * 50
    whole = tokenizer(query, document)["input_ids"]
    ids = encode_pairs(tokenizer, [(query, document), (query, "")], max_length=24)
    assert ids[0] == whole[:24] and len(ids[1]) < 24
    assert tokenizer.decode(ids[0]).startswith(f"<bos>Query: {query} Document:")
    with pytest.raises(ValueError, match=r"max_length.* of 12 .*'rain rain"):
        encode_pairs(tokenizer, [("a", document), ("rain " * 20, document)], max_length=12)
    template = len(tokenizer([""], [""])["input_ids"][0])
    for max_length in range(1, template + 2):
        with pytest.raises(ValueError, match="leaves no room for a"):
            encode_pairs(tokenizer, [("a", document)], max_length=max_length)
    assert len(encode_pairs(tokenizer, [("a", document)], max_length=template + 2)[0]) == template + 2
    assert len(tokenizer([query], [document])["input_ids"][0]) == len(whole)  # nothing is left behind of a call
    assert tokenizer.backend_tokenizer.truncation is None


def test_lists_without_documents_or_labels_are_named(tokenizer):
    collate = RankingCollator(tokenizer)
    with pytest.raises(ValueError, match="'rain' has 0 documents"):
        collate([{"query": "rain", "documents": [], "labels": []}])
    with pytest.raises(ValueError, match="'rain' has 1 documents and 2 labels"):
        collate([{"query": "rain", "documents": ["a"], "labels": [1, 0]}])
    with pytest.raises(ValueError, match="list_size"):
        RankingDataset(ROWS, list_size=1)


def test_an_empty_document_is_read_and_an_absent_one_is_not(decoder, tokenizer):
    torch.manual_seed(0)
    model = GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32).eval()
    lists = [{"query": "rain", "documents": ["", "x"]}, {"query": "sun", "documents": ["y"]}]
    with torch.no_grad():
        scores = model(**RankingCollator(tokenizer)(lists)).logits
        ids = tokenizer(["rain"], [""])["input_ids"][0]  # not ("rain", ""), which transformers reads as one text
        alone = model(**pad([torch.tensor(ids)])).logits
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[0, 0], alone[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stock_trainer_reads_fresh_lists_and_resumes_to_the_same_weights(tmp_path, decoder, tokenizer, workers):
    seen = []

    class Collator(RankingCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            batch.pop("read", None)
            seen.append([row["documents"] for row in rows])
            return batch

    def train(folder, resume=None, stop=None):
        torch.manual_seed(0)
        lists = RankingDataset(ROWS, list_size=4)
        args = TrainingArguments(
            str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            save_steps=2,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            learning_rate=1e-3,
        )
        model = GemmaEncoderForRanking.from_pretrained(decoder, dtype=torch.float32)
        trainer = Trainer(
            model, args, train_dataset=lists, data_collator=Collator(tokenizer), callbacks=[FreshLists(lists)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = train(tmp_path / "whole")
    if workers == 0:
        first, second = seen[:3], seen[3:6]
        assert {str(lists) for batch in first for lists in batch}.isdisjoint(
            str(lists) for batch in second for lists in batch
        )
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=0, rtol=0, msg=name)


def test_collate_lists_pads_lists_and_texts(tokenizer):
    tokenizer.padding_side = "right"
    rows = [
        {"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]], "labels": [1, 0]},
        {"input_ids": [[8]], "attention_mask": [[1]], "labels": [2]},
    ]
    batch = collate_lists(rows, tokenizer)
    assert batch["input_ids"].tolist() == [[[5, 6], [7, 0]], [[8, 0], [0, 0]]]
    assert batch["attention_mask"].tolist() == [[[1, 1], [1, 0]], [[1, 0], [0, 0]]]
    assert batch["labels"].tolist() == [[1, 0], [2, -100]]
