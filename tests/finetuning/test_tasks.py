"""How rows of a task become what is read: columns, templates, spans, truncation, labels, and what is refused."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import NANO
from transformers import AutoTokenizer

from modeling_gemma_encoder._scripts.tables import read_file
from modeling_gemma_encoder.finetuning import superglue
from modeling_gemma_encoder.finetuning.metrics import accuracy
from modeling_gemma_encoder.finetuning.tasks import Source, Task, by_label, most_frequent, predictions_of, say_empty
from modeling_gemma_encoder.finetuning.truncation import mark, share, truncate
from modeling_gemma_encoder.ranking.data import collate_lists

PAIR = Task(("first", "second"), by_label(accuracy), ("no", "yes"))


def write(folder, split: str, rows: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(folder=folder)


@pytest.fixture
def tokenizer(nano_tokenizer):
    from copy import deepcopy

    return PAIR.set_template(deepcopy(nano_tokenizer))


def test_marks_stand_around_the_span():
    marked, (start, end) = mark("The bank was closed .", (4, 8))
    assert marked == "The [ bank ] was closed ."
    assert marked[start:end] == "[ bank ]"


def test_marks_of_two_spans_may_touch_or_nest():
    assert mark("his mother", (0, 10), (0, 3))[0] == "[ [ his ] mother ]"
    assert mark("abcd", (0, 2), (2, 4))[0] == "[ ab ][ cd ]"


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (2, 99)])
def test_a_span_outside_of_its_text_is_refused(span):
    with pytest.raises(ValueError, match="is empty or outside of 'a text'"):
        mark("a text", span)


@pytest.mark.parametrize(
    ("room", "lengths", "shares"),
    [(10, [3, 4], [3, 4]), (10, [3, 20], [3, 7]), (10, [20, 3], [7, 3]), (10, [9, 9], [5, 5]), (5, [8], [5])],
)
def test_the_longer_text_is_cut_first(room, lengths, shares):
    assert share(room, lengths) == shares


def test_tokens_are_those_that_a_user_gets_from_the_tokenizer(tokenizer):
    for second in ("A second text.", None):
        pair = ("A first text.",) if second is None else ("A first text.", second)
        ours = truncate(tokenizer, "A first text.", second, 64, {"first": (2, 7)})
        assert ours == tokenizer(*pair)["input_ids"]


def test_truncation_spares_neither_text_and_takes_the_same_from_both_ways(tokenizer):
    first, second = "one two three four five six seven eight nine ten " * 8, "a short second text"
    cut = tokenizer(first, second, truncation=True, max_length=32)["input_ids"]
    kept = truncate(tokenizer, first, second, 32, {"first": (0, 3)})
    assert len(cut) == len(kept) == 32
    assert cut == kept
    assert tokenizer.decode(kept).endswith("a short second text")


@pytest.mark.parametrize("word", [0, 1, 40, 79])
def test_truncation_never_drops_a_span(tokenizer, word):
    words = [f"word{number}" for number in range(80)]
    text = " ".join(words)
    start = sum(len(other) + 1 for other in words[:word])
    marked, keep = mark(text, (start, start + len(words[word])))
    ids = truncate(tokenizer, marked, "second " * 50, 40, {"first": keep})
    assert len(ids) == 40
    assert f"[ {words[word]} ]" in tokenizer.decode(ids)


def test_a_span_that_does_not_fit_is_an_error(tokenizer):
    text, keep = mark("word " * 60, (0, 299))
    with pytest.raises(ValueError, match=r"of which .* fit into the 32 that are read"):
        truncate(tokenizer, text, None, 32, {"first": keep})


def test_what_was_encoded_before_is_not_part_of_the_name_in_the_cache(tokenizer):
    rows = Dataset.from_dict({"first": ["a text"], "second": ["b"], "label": [0]})
    before = PAIR.fingerprint(rows, tokenizer, 64)
    PAIR.encode({"first": "a text " * 50, "second": "b", "label": 0}, tokenizer, 16)
    assert PAIR.fingerprint(rows, tokenizer, 64) == before
    assert PAIR.fingerprint(rows, tokenizer, 65) != before


def test_texts_longer_than_what_was_cut_before_are_whole_again(tokenizer):
    """Truncation is set in the tokenizer's backend, and must not stay there."""
    text = "word " * 60
    tokenizer(text, truncation=True, max_length=8)
    assert truncate(tokenizer, text, None, 200, {"first": (0, 4)}) == tokenizer(text)["input_ids"]


def test_labels_may_be_numbers_names_or_booleans(tmp_path):
    rows = [{"first": "a", "second": "b", "label": label} for label in ("no", "yes")]
    assert PAIR.load(write(tmp_path / "names", "train", rows), "train")["label"] == [0, 1]
    rows = [{"first": "a", "second": "b", "label": label} for label in (False, True)]
    assert PAIR.load(write(tmp_path / "booleans", "train", rows), "train")["label"] == [0, 1]


def test_test_rows_without_labels_have_none(tmp_path):
    rows = [{"first": "a", "second": "b", "label": -1}]
    loaded = PAIR.load(write(tmp_path, "test", rows), "test", labelled=False)
    assert "label" not in loaded.column_names


def test_minus_one_is_a_number_and_stands_for_no_label_only_where_all_are(tmp_path):
    """As in GLUE's test rows; a sentiment from -1 to 1 has one now and then."""
    number = Task(("text",), by_label(accuracy), problem="regression")
    for name, labels, loaded in (("some", [-1.0, 0.5], [-1.0, 0.5]), ("all", [-1.0, -1.0], None)):
        source = write(tmp_path / name, "test", [{"text": "a", "label": label} for label in labels])
        rows = number.load(source, "test", labelled=False)
        assert (rows["label"][:] if "label" in rows.column_names else None) == loaded


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"first": "a", "label": 0}], "has no column 'second'; it has 'first', 'label'"),
        ([{"first": "a", "second": "b"}], "has no column 'label'"),
        (
            [{"first": "a", "second": "b", "label": 2}],
            "row 0: the label must be one of no, yes, or its number, 0 to 1; got 2",
        ),
        ([{"first": "a", "second": "b", "label": "maybe"}], "the label must be one of no, yes, .* got 'maybe'"),
        ([{"first": "a", "second": "b", "label": -1}], "the label must be one of .*; got -1"),
        ([{"first": 1, "second": "b", "label": 0}, {"first": None, "second": "b", "label": 0}], "row 0: 'first' is 1,"),
    ],
)
def test_rows_that_are_not_the_tasks_are_refused_by_name(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        PAIR.load(write(tmp_path, "train", rows), "train")


def test_files_that_are_missing_or_empty_are_refused(tmp_path):
    source = write(tmp_path, "train", [])
    with pytest.raises(ValueError, match=r"train.jsonl is empty"):
        PAIR.load(source, "train")
    with pytest.raises(ValueError, match=r"validation.jsonl does not exist; splits there: train"):
        PAIR.load(source, "validation")


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("this is no json\n")
    with pytest.raises(ValueError, match=r"train.jsonl cannot be read"):
        PAIR.load(Source(folder=tmp_path), "train")


def test_in_a_csv_na_is_a_word_and_digits_are_text(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nNA,None\n007,yes\n")
    rows = read_file(tmp_path / "train.csv", texts=["text"])
    assert rows.to_dict() == {"text": ["NA", "007"], "label": ["None", "yes"]}


def test_a_header_without_rows_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("first,second,label\n")
    with pytest.raises(ValueError, match="has no rows"):
        PAIR.load(Source(folder=tmp_path), "train")


def test_several_labels_a_row_become_zeros_and_ones(tmp_path):
    task = Task(("text",), by_label(accuracy), ("a", "b", "c"), problem="multi_label_classification")
    source = write(tmp_path, "train", [{"text": "x", "label": ["c", "a"]}, {"text": "y", "label": []}])
    assert task.load(source, "train")["label"] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_predictions_by_problem():
    logits = np.array([[0.5, 2.0, -1.0], [3.0, -2.0, 0.1]])
    assert predictions_of(PAIR, logits).tolist() == [1, 0]
    several = Task(("text",), by_label(accuracy), problem="multi_label_classification")
    assert predictions_of(several, logits).tolist() == [[1, 1, 0], [1, 0, 1]]
    number = Task(("text",), by_label(accuracy), problem="regression")
    assert predictions_of(number, logits[:, :1]).tolist() == [0.5, 3.0]


def test_a_candidate_that_is_not_there_is_never_chosen():
    choice = Task(("text",), by_label(accuracy), problem="choice")
    scores, labels = np.array([[-3.0, -2.0, 0.0]]), np.array([[0, 1, -100]])
    assert predictions_of(choice, scores, labels).tolist() == [1]


def test_the_baseline_knows_the_training_labels_only():
    train, rows = Dataset.from_dict({"label": [1, 1, 0]}), Dataset.from_dict({"label": [0, 0]})
    assert most_frequent(PAIR, train, rows).tolist() == [1, 1]
    number = Task(("text",), by_label(accuracy), problem="regression")
    train = Dataset.from_dict({"label": [1.0, 2.0, 6.0]})
    assert most_frequent(number, train, rows).tolist() == [3.0, 3.0]


def test_shorter_lists_are_filled_with_padding_labelled_to_be_ignored(tokenizer):
    rows = [
        {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]], "labels": [1]},
        {"input_ids": [[5], [8, 9]], "attention_mask": [[1], [1, 1]], "labels": [0, 1]},
    ]
    tokenizer.padding_side = "right"
    batch = collate_lists(rows, tokenizer)
    assert batch["input_ids"].shape == (2, 2, 3)
    assert batch["attention_mask"].tolist() == [[[1, 1, 1], [0, 0, 0]], [[1, 0, 0], [1, 1, 0]]]
    assert batch["labels"].tolist() == [[1, -100], [0, 1]]
    assert batch["labels"].dtype == torch.float32


def test_wsc_finds_words_whose_number_or_case_is_wrong():
    text = "The city councilmen refused the demonstrators a permit because they advocated violence."
    start, end = superglue.find_words(text, 4, "The demonstrators")
    assert text[start:end] == "the demonstrators"
    assert superglue.find_words("they said they left", 3, "they") == (10, 14)
    assert superglue.find_words("Then the man said he left.", 2, "he") == (18, 20)  # not within "Then" or "the"
    text = "Stalin, Kamenev, and then Zinoviev"  # a phrase that is not in one piece: the word at its index
    assert superglue.find_words(text, 1, "Kamenev and Zinoviev") == (8, 16)
    with pytest.raises(ValueError, match="The word number 9 is not in"):
        superglue.find_words("a text", 9, "absent")


def test_wic_marks_the_word_in_both_sentences():
    row = {"sentence1": "Room and board .", "sentence2": "He nailed boards .", "start1": 9, "end1": 14}
    read = superglue.wic({**row, "start2": 10, "end2": 16})
    assert (read["first"], read["second"]) == ("Room and [ board ] .", "He nailed [ boards ] .")


def test_record_never_loses_the_candidate(tokenizer):
    row = {"passage": "word " * 300, "query": "long " * 100 + "@placeholder won " + "words " * 100, "idx": {}}
    row |= {"entities": ["Ada", "Grace Hopper"], "answers": ["Grace Hopper"]}
    encoded = superglue.TASKS["record"].encode(row, tokenizer, 64)
    assert encoded["labels"] == [0, 1]
    for ids, entity in zip(encoded["input_ids"], row["entities"], strict=True):
        assert len(ids) == 64
        assert f" {entity} won" in tokenizer.decode(ids)


def test_copa_asks_for_cause_or_effect_of_both_choices():
    row = {"premise": "It rained.", "choice1": "The street is wet.", "choice2": "The sun shone.", "label": 0}
    read = superglue.copa({**row, "question": "effect"})
    assert read == {
        "first": "It rained. What was the effect?",
        "second": ["The street is wet.", "The sun shone."],
        "label": [1, 0],
    }


def test_winogender_pairs_differ_in_a_pronoun_alone():
    rows = Dataset.from_dict(
        {
            "premise": ["The nurse lost his keys.", "The nurse lost her keys.", "He left.", "She left."],
            "hypothesis": ["The nurse had keys.", "The nurse had keys.", "A man left.", "A man left."],
            "label": [0, 0, 1, 1],
        }
    )
    scores = superglue.score_winogender(np.array([0, 0, 1, 0]), rows)
    assert scores == {"accuracy": 0.75, "gender_parity": 0.5}


def test_a_text_without_a_token_is_refused():
    """Qwen's tokenizers begin with nothing, so an empty text has none; two texts have the template's between them."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    task = Task(("text",), by_label(accuracy), ("no", "yes"))
    task.set_template(tokenizer)
    with pytest.raises(ValueError, match="'' has no token, as this tokenizer puts none around a text"):
        task.encode({"text": "", "label": 1}, tokenizer, 8)
    assert len(PAIR.encode({"first": "", "second": "", "label": 1}, tokenizer, 8)["input_ids"]) == 1


EMPTY = {
    "csv": 'first,second,label\n"two\nlines",b,yes\n,c,no\nd,e,no\n',
    "tsv": "first\tsecond\tlabel\na\tb\tyes\n\n\tc\tno\nd\te\tno\n",
    "jsonl": '{"first": "a", "second": "b", "label": 1}\n\n{"first": null, "second": "c", "label": 0}\n'
    '{"first": "d", "second": "e", "label": 0}\n',
    "json": '[{"first": "a", "second": "b", "label": 1}, {"second": "c", "label": 0}, {"first": "d", "second": "e", '
    '"label": 0}]',
}


@pytest.mark.parametrize(("kind", "line"), [("csv", 4), ("tsv", 4), ("jsonl", 3), ("json", None), ("parquet", None)])
def test_an_empty_field_and_a_null_are_the_same_empty_text(tmp_path, capsys, kind, line):
    """With the line of the first as an editor shows it, by hand."""
    if kind == "parquet":
        columns = {"first": ["a", None, "d"], "second": ["b", "c", "e"], "label": [1, 0, 0]}
        Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    else:
        (tmp_path / f"train.{kind}").write_text(EMPTY[kind])
    source = Source(folder=tmp_path)
    rows = PAIR.load(source, "train")
    assert (rows["first"][1:], rows["second"][:], rows["label"][:]) == (["", "d"], ["b", "c", "e"], [1, 0, 0])
    say_empty("pairs", source, "train", rows, PAIR.texts)
    place = f"{tmp_path / 'train'}.{kind}, row 1" + f" (line {line})" * (line is not None)
    said = f"pairs, train: 1 of 3 rows have an empty text; the first is {place}, column 'first'\n"
    assert capsys.readouterr().out.endswith(said)
    say_empty("pairs", source, "train", rows.select([0, 2]), PAIR.texts)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_a_column_that_is_empty_in_every_row_is_refused(tmp_path, empty):
    rows = [{"first": "a", "second": empty, "label": 0}, {"first": "b", "second": empty, "label": 1}]
    with pytest.raises(ValueError, match="split 'train': 'second' is empty in every row"):
        PAIR.load(write(tmp_path, "train", rows), "train")
