"""Laws of tables of one's own: cells mean what they say, and a trained model reads new rows as it read its own."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path

import classify
import datasets
import pandas
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import r2_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from modeling_gemma_encoder import GemmaEncoderConfig
from modeling_gemma_encoder._scripts.tables import read_file
from modeling_gemma_encoder.finetuning import own_table
from modeling_gemma_encoder.finetuning.model import weighted_loss
from modeling_gemma_encoder.finetuning.tasks import Task
from modeling_gemma_encoder.hub.run_record import read_run_record

FEW = ("--max_steps", 3, "--per_device_train_batch_size", 4, "--use_cpu", "True", "--disable_tqdm", "True")


@pytest.fixture
def run(monkeypatch, decoder):
    def run(*arguments, model=decoder):
        words = ["classify.py", "--model", model, *FEW, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        classify.main()

    return run


def write_csv(path: Path, columns: dict[str, list]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def table(folder: Path, labels: list, **options) -> own_table.Table:
    file = write_csv(folder / "train.csv", {"text": [f"text {n}" for n in range(len(labels))], "label": labels})
    return own_table.Table(own_table.TableArguments(train_file=str(file), **options))


def test_a_training_that_would_only_warm_up_is_refused(run, tmp_path, capsys):
    file = write_csv(tmp_path / "train.csv", {"text": ["good", "bad"] * 4, "label": ["a", "b"] * 4})
    flags = ("--train_file", file, "--output_dir", tmp_path / "out", "--max_steps", -1, "--num_train_epochs", 1)
    flags += ("--per_device_train_batch_size", 8, "--do_eval", "False")
    with pytest.raises(SystemExit):
        run(*flags)
    assert "--num_train_epochs 1: the only step warms up" in (error := capsys.readouterr().err)
    assert "A step reads 8 of the 7 training rows. Give --warmup_steps 0" in error  # one of 8 is held out
    run(*flags, "--warmup_steps", 0)  # in the same folder
    run(*flags[:-4], "--do_eval", "False", "--max_steps", 1, "--output_dir", tmp_path / "one")
    assert "WARNING: the only step warms up" in capsys.readouterr().out  # of steps that were asked for


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        (["pos", "neg"], "single_label_classification", ["neg", "pos"]),
        (["1", "0", "10"], "single_label_classification", ["0", "1", "10"]),
        (["1.0", "2.0"], "single_label_classification", ["1", "2"]),
        (["001", "007"], "single_label_classification", ["001", "007"]),
        (["NA", "None"], "single_label_classification", ["NA", "None"]),
        (["0.5", "1", "-2e3"], "regression", []),
        (["1.0000", "0.0000", "1"], "single_label_classification", ["0", "1"]),
        (["+1", "-1", "1"], "single_label_classification", ["1", "-1"]),
        (["1", "1 ", " 0"], "single_label_classification", ["0", "1"]),
        (["1e5", "2e5"], "single_label_classification", ["1e5", "2e5"]),
        (["1234567890123456789", "1234567890123456788"], "single_label_classification", None),
        (["٣", "٤"], "single_label_classification", None),
        (["yes", "yes ", "no"], "single_label_classification", ["no", "yes", "yes "]),
    ],
)
def test_labels_are_what_they_look_like(tmp_path, labels, problem, names):
    found = table(tmp_path, labels)
    names = sorted(labels) if names is None else names
    assert (found.problem, found.names) == (problem, names)
    values = found.rows("train")["label"]
    assert values == ([float(label) for label in labels] if problem == "regression" else values)
    assert problem == "regression" or set(values) == set(names)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["pos", "", "neg"], {}, "'label' is empty in row 1"),
        (["0.5", " ", "1.5"], {}, "'label' is empty in row 1"),
        (["0.5", "1.5", "nan"], {}, "'label' is 'nan' in row 2, and a number in other rows"),
        (["0.5", "N/A"], {}, "'label' is 'N/A' in row 1, and a number in other rows"),
        (
            ["0,5", "1,5", "2,25"],
            {},
            "'label' holds '0,5' and as many classes as rows: write 0.5 for --problem regression",
        ),
        (["pos", "neg"], {"class_names": ["a", "b"]}, "--class_names is for lists of zeros and ones"),
        (["0.5", "2,5"], {"problem": "regression"}, "'label' is '2,5' in row 1, which is not a number"),
    ],
)
def test_a_cell_that_is_no_label_is_named(tmp_path, labels, options, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, labels, **options)


def test_names_that_differ_by_blanks_or_case_are_said(tmp_path, capsys):
    assert table(tmp_path, ["yes", "no", "Yes", "yes "]).names == ["Yes", "no", "yes", "yes "]
    assert "'Yes', 'yes', 'yes ' are classes of their own" in capsys.readouterr().out


def test_names_that_are_one_number_are_said(tmp_path, capsys):
    assert table(tmp_path, ["1e5", "100000", "2"]).names == ["2", "100000", "1e5"]
    assert "'100000', '1e5' are classes of their own" in capsys.readouterr().out


def lists(folder: Path, labels: list[list], **options) -> own_table.Table:
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return own_table.Table(own_table.TableArguments(train_file=str(folder / "train.jsonl"), **options))


@pytest.mark.parametrize(
    ("labels", "options", "names", "read"),
    [
        ([[1, 0, 1], [0, 0, 0]], {}, ["0", "1", "2"], [["0", "2"], []]),
        ([[1, 0], [0, 1]], {"class_names": ["toxic", "rude"]}, ["toxic", "rude"], [["toxic"], ["rude"]]),
        ([[1.0, 0.0], [1.0, 1.0]], {}, ["0", "1"], [["0"], ["0", "1"]]),
        ([[True, False], [True, True]], {}, ["0", "1"], [["0"], ["0", "1"]]),
        ([["a", "b"], ["b"]], {}, ["a", "b"], [["a", "b"], ["b"]]),
        ([["1", "0"], ["0", "1"]], {}, ["0", "1"], [["1", "0"], ["0", "1"]]),
        ([[3, 7], [7]], {}, ["3", "7"], [["3", "7"], ["7"]]),
    ],
)
def test_lists_of_zeros_and_ones_say_of_each_class_whether_it_is_one(tmp_path, labels, options, names, read):
    """By hand: places of the ones. Lists of names stay names."""
    found = lists(tmp_path, labels, **options)
    assert (found.problem, found.names) == ("multi_label_classification", names)
    assert found.rows("train")["label"][:] == read


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([[1, 0, 1], [0, 1]], {}, r"'label' is \[1, 0, 1\] in row 0, and not in all rows as many zeros and ones"),
        ([[1, 0], [0, 1]], {"class_names": ["a"]}, "--class_names gives 1 names; .* holds 2 zeros and ones"),
        ([[1, 0], [0, 1]], {"class_names": ["a", "a"]}, "--class_names gives a name twice: a, a"),
    ],
)
def test_lists_that_are_neither_names_nor_flags_are_refused(tmp_path, labels, options, message):
    with pytest.raises(ValueError, match=message):
        lists(tmp_path, labels, **options)


@pytest.mark.parametrize(
    ("labels", "found", "hint"),
    [
        ([["a", "b"], ["a", None]], '["a", null]', "leave null out, and write [] where no label applies"),
        ([["a", "b"], [None]], "[null]", "leave null out, and write [] where no label applies"),
        ([[1, 0, 1], [1, None, 0]], "[1, null, 0]", "write 0 or 1 in place of null"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_null_within_a_list_is_named_by_its_row(tmp_path, labels, found, hint, split):
    path, named = tmp_path / "train.jsonl", split == "validation"
    if named:
        known = lists(tmp_path, [labels[0], [*labels[0]]])
        path = tmp_path / "dev.jsonl"
        known.files["validation"] = str(path)
        path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    with pytest.raises(ValueError) as raised:
        known.rows("validation") if named else lists(tmp_path, labels)
    assert str(raised.value) == f"{path}, row 1 (line 2): 'label' is {found}; {hint}."


def test_rows_without_labels_stay_without(tmp_path):
    found = lists(tmp_path, [[1, 0, 1], [0, 0, 0]])
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": [0, 1, 0]}\n{"text": "b", "label": null}\n')
    found.files["test"] = str(tmp_path / "test.jsonl")
    assert found.rows("test")["label"][:] == [["1"], None]


def test_numbers_of_named_classes_are_no_flags(tmp_path):
    kind = datasets.Features({"text": datasets.Value("string"), "label": [datasets.ClassLabel(names=["x", "y"])]})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [[0, 1], [1, 0]]}, features=kind)
    rows.to_parquet(tmp_path / "train.parquet")
    found = own_table.Table(own_table.TableArguments(train_file=str(tmp_path / "train.parquet")))
    assert found.names == ["x", "y"] and found.rows("train")["label"][:] == [["x", "y"], ["y", "x"]]


def test_columns_of_zeros_and_ones_may_have_blanks(tmp_path):
    (tmp_path / "train.csv").write_text("text,toxic,rude\na, 1, 0\nb, 0,1.\n")
    given = {"train_file": str(tmp_path / "train.csv"), "label_column": ["toxic", "rude"]}
    assert own_table.Table(own_table.TableArguments(**given)).rows("train")["label"][:] == [["toxic"], ["rude"]]
    (tmp_path / "train.csv").write_text("text,toxic,rude\na,1,0\nb,2,1\n")
    with pytest.raises(ValueError, match="'toxic' is 2 in row 1; several columns"):
        own_table.Table(own_table.TableArguments(**given))


def test_flags_of_other_rows_are_as_many_as_in_training(tmp_path):
    found = lists(tmp_path, [[1, 0, 1], [0, 0, 0]])
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": [1, 1]}\n')
    found.files["validation"] = str(tmp_path / "dev.jsonl")
    with pytest.raises(
        ValueError, match=r"dev\.jsonl, row 0: 'label' is \[1, 1\], and must be a list of 3 zeros and ones"
    ):
        found.rows("validation")


def test_names_that_are_partly_numbers_are_names_when_that_is_said(tmp_path):
    assert table(tmp_path, ["1", "2", "other"], problem="single_label_classification").names == ["1", "2", "other"]


def test_a_column_of_several_that_is_missing_is_named(tmp_path):
    train = write_csv(tmp_path / "train.csv", {"text": ["a", "b"], "toxic": [0, 1], "rude": [1, 0]})
    other = write_csv(tmp_path / "dev.csv", {"text": ["a", "b"], "toxic": [0, 1]})
    given = {"train_file": str(train), "validation_file": str(other), "label_column": ["toxic", "rude"]}
    with pytest.raises(ValueError, match=r"dev\.csv has no column rude; it has text, toxic"):
        own_table.Table(own_table.TableArguments(**given)).rows("validation")


def test_another_encoding_is_said(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,label\nété,a\nhiver,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8; save it in that encoding"):
        own_table.Table(own_table.TableArguments(train_file=str(tmp_path / "latin.csv")))


@pytest.fixture
def trained(run, tmp_path):
    """A classifier of long texts, cut to 12 tokens, and its table."""
    texts = [f"{'rain' if n % 2 else 'sun'} " + "and wind " * n for n in range(12)]
    file = write_csv(tmp_path / "train.csv", {"text": texts, "label": ["wet" if n % 2 else "dry" for n in range(12)]})
    run("--train_file", file, "--max_length", 12, "--learning_rate", 1e-2, "--output_dir", tmp_path / "out")
    return file, tmp_path / "out" / "seed-42"


def test_a_trained_model_needs_no_table_and_reads_as_in_training(run, trained, tmp_path, capsys):
    """Rows come back as they were written; pipelines, cut as the tokenizer says, say the same as `predictions.csv`."""
    texts = ["sun " + "and wind " * 30, "rain", "a lone\rreturn", "two\nlines\r\nor three, "]
    ids, prices = ["000", "001", "1e5", " "], ["1.50", "", "1", "NA"]
    new = write_csv(tmp_path / "new.csv", {"id": ids, "price": prices, "text": texts})
    flags = ("--do_train", "False", "--do_eval", "False", "--do_predict", "--test_file", new)
    run(*flags, "--output_dir", tmp_path / "predicted", model=trained[1])
    said = capsys.readouterr().out
    assert "classes dry, wet" in said and f"\n\nResults are in {tmp_path / 'predicted'}\n" in said  # no model, no plot
    written = tmp_path / "predicted" / "seed-42" / "predictions.csv"
    with written.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["price"], row["text"]) for row in rows] == list(zip(ids, prices, texts, strict=True))
    assert pandas.read_csv(written, dtype=str, keep_default_na=False)["text"].tolist() == texts
    assert AutoTokenizer.from_pretrained(trained[1]).model_max_length == 12
    answers = pipeline("text-classification", model=str(trained[1]))(texts, truncation=True)
    assert [row["prediction"] for row in rows] == [answer["label"] for answer in answers]
    assert [float(row["probability"]) for row in rows] == pytest.approx([a["score"] for a in answers], abs=1e-6)
    assert "| new.csv | 42 | test | 4 | predicted, not scored" in (tmp_path / "predicted" / "results.md").read_text()
    with pytest.raises(SystemExit):
        run(*flags, "--output_dir", tmp_path / "other")  # the decoder as it is
    assert "is not a trained classifier: give --train_file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*flags, "--problem", "regression", "--output_dir", tmp_path / "other", model=trained[1])
    assert "was trained for single_label_classification" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--do_train", "False", "--do_eval", "False", "--output_dir", tmp_path / "other", model=trained[1])
    assert "there is nothing to do" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--do_train", "False", "--output_dir", tmp_path / "other", model=trained[1])
    assert "--do_eval needs --validation_file; or give --do_eval false" in capsys.readouterr().err


def test_pairs_are_read_as_the_trained_model_reads_them(run, tmp_path):
    columns = {"q": [f"question {n}" for n in range(8)], "a": ["yes", "no"] * 4, "label": ["x", "y"] * 4}
    file, template = write_csv(tmp_path / "pairs.csv", columns), "Question: {first} Answer: {second}"
    flags = ("--text_column", "q", "a", "--learning_rate", 1e-2)
    run("--train_file", file, "--template", template, *flags, "--output_dir", tmp_path / "out")
    model = tmp_path / "out" / "seed-42"
    flags += ("--do_train", "False", "--do_eval", "False", "--do_predict", "--test_file", file)
    run(*flags, "--output_dir", tmp_path / "new", model=model)
    with (tmp_path / "new" / "seed-42" / "predictions.csv").open() as rows:
        found = [float(row["probability"]) for row in csv.DictReader(rows)]
    pairs = [{"text": q, "text_pair": a} for q, a in zip(columns["q"], columns["a"], strict=True)]
    answers = pipeline("text-classification", model=str(model))(pairs)
    assert found == pytest.approx([answer["score"] for answer in answers], abs=1e-4)


@pytest.mark.parametrize(("first", "other"), [([0.5, 2.0], ["0.5", "2"]), ([0, 1], ["0.0", "1"]), (["007"], ["007"])])
def test_tables_of_other_kinds_have_the_same_labels(tmp_path, first, other):
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate([*first, *first, "x"][: 2 * len(first)])]
    if len(first) == 1:
        rows[1]["label"] = "x"
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dev = write_csv(tmp_path / "dev.csv", {"text": ["a"] * len(other), "label": other})
    found = own_table.Table(own_table.TableArguments(train_file=str(train), validation_file=str(dev)))
    assert found.rows("validation")["label"] == found.rows("train")["label"][: len(other)]


def test_a_word_among_numbers_is_named_wherever_it_is(tmp_path):
    train = write_csv(tmp_path / "train.csv", {"text": ["a", "b"], "label": ["0.5", "1"]})
    dev = write_csv(tmp_path / "dev.csv", {"text": ["a", "b"], "label": ["0.5", "?"]})
    found = own_table.Table(own_table.TableArguments(train_file=str(train), validation_file=str(dev)))
    with pytest.raises(ValueError, match=r"dev\.csv, row 1: 'label' is '\?', which is not a number"):
        found.rows("validation")


def test_scores_are_of_the_rows_that_were_predicted_last(run, trained, tmp_path):
    flags = ("--train_file", trained[0], "--max_length", 12, "--learning_rate", 1e-2, "--output_dir", tmp_path / "out")
    run(*flags, "--do_predict", "--test_file", trained[0])
    assert "test" in json.loads((trained[1] / "results.json").read_text())["scores"]
    run(*flags, "--do_predict", "--test_file", write_csv(tmp_path / "new.csv", {"text": ["a", "b"]}))
    found = json.loads((trained[1] / "results.json").read_text())
    assert found["scores"].keys() == found["majority"].keys() == {"validation"}


def test_a_head_for_other_classes_is_not_read_as_ours(run, trained, tmp_path, capsys):
    other = write_csv(tmp_path / "other.csv", {"text": [f"text {n}" for n in range(12)], "label": ["bad", "good"] * 6})
    flags = ("--train_file", other, "--output_dir", tmp_path / "fresh")
    with pytest.raises(SystemExit):
        run(*flags, model=trained[1])
    assert "has a head for the classes dry, wet, the data has bad, good" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # nothing is to be measured but what was trained
        run(*flags, "--ignore_mismatched_sizes", "--do_train", "False", model=trained[1])
    assert "in `id2label` and `label2id` of its config.json." in capsys.readouterr().err
    run(*flags, "--ignore_mismatched_sizes", "--learning_rate", 0, model=trained[1])
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder)
        for folder in (trained[1], tmp_path / "fresh/seed-42")
    )
    assert after.config.id2label == {0: "bad", 1: "good"}
    assert not torch.equal(before.classifier.out_proj.weight, after.classifier.out_proj.weight)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before.get_parameter(weight), after.get_parameter(weight))


def read_predictions(folder: Path) -> tuple[list[dict], dict]:
    """The rows of `predictions.csv`, and what `predictions-test.json` has."""
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / "predictions-test.json").read_text())


def test_predictions_have_the_probability_of_every_class_to_the_last_digit(run, trained, tmp_path, capsys):
    """By the definition of softmax; what is written comes back as the same float."""
    new = write_csv(tmp_path / "new.csv", {"text": ["sun", "rain", "wind and rain"]})
    flags = ("--do_train", "False", "--do_eval", "False", "--do_predict", "--test_file")
    run(*flags, new, "--output_dir", tmp_path / "new", model=trained[1])
    rows, found = read_predictions(tmp_path / "new" / "seed-42")
    assert list(rows[0]) == ["text", "prediction", "probability", "probability_dry", "probability_wet"]
    for row, (dry, wet) in zip(rows, found["logits"], strict=True):
        right = {"dry": 1 / (1 + math.exp(wet - dry)), "wet": 1 / (1 + math.exp(dry - wet))}
        given = {name: float(row[f"probability_{name}"]) for name in right}
        assert given == pytest.approx(right, rel=1e-14)
        assert all(repr(value) == row[f"probability_{name}"] for name, value in given.items())
        assert float(row["probability"]) == max(given.values()) == given[row["prediction"]]
    taken = write_csv(tmp_path / "taken.csv", {"text": ["sun"], "probability_dry": [1]})
    with pytest.raises(SystemExit):
        run(*flags, taken, "--output_dir", tmp_path / "taken", model=trained[1])
    assert "has a column 'probability_dry' already; rename it" in capsys.readouterr().err
    assert not [*(tmp_path / "taken").iterdir()]


def test_predictions_of_several_labels_have_the_probability_of_each(run, tmp_path):
    columns = {"text": [f"text {n}" for n in range(8)], "toxic": [0, 1] * 4, "rude": [1, 1, 0, 0] * 2}
    file = write_csv(tmp_path / "several.csv", columns)
    flags = ("--label_column", "toxic", "rude", "--do_predict", "--test_file", file)
    run("--train_file", file, *flags, "--validation_file", file, "--output_dir", tmp_path / "out")
    rows, found = read_predictions(tmp_path / "out" / "seed-42")
    for row, logits in zip(rows, found["logits"], strict=True):
        given = {name: float(row[f"probability_{name}"]) for name in ("toxic", "rude")}
        right = [1 / (1 + math.exp(-logit)) for logit in logits]
        assert list(given.values()) == pytest.approx(right, rel=1e-14)
        assert row["prediction"] == "|".join(name for name, value in given.items() if value > 0.5)
    again = ("--do_train", "False", "--validation_file", file, "--output_dir", tmp_path / "again")  # columns as trained
    run(*again, model=tmp_path / "out" / "seed-42")
    first, second = (json.loads((tmp_path / name / "seed-42/results.json").read_text()) for name in ("out", "again"))
    assert second["scores"]["validation"] == first["scores"]["validation"]


def test_lists_come_back_as_they_were_written(run, tmp_path):
    """As JSON, with pandas and with csv; a null is an empty cell, and a prediction has | between its classes."""
    rows = [
        {"text": "sun", "label": [1, 0, 1], "tags": ["é", 'say "x"'], "more": {"of": [1, 2]}, "id": "7"},
        {"text": "rain, or so", "label": [0, 1, 0], "tags": [], "more": {"of": []}, "id": "8"},
        {"text": "wind", "label": [1, 1, 1], "tags": None, "more": None, "id": "9"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--validation_file", file, "--do_predict", "--test_file", file, "--output_dir", tmp_path / "out")
    run("--train_file", file, "--class_names", "x", "y", "z", *flags)
    found, predicted = read_predictions(tmp_path / "out" / "seed-42")
    read = pandas.read_csv(tmp_path / "out" / "seed-42" / "predictions.csv", dtype=str, keep_default_na=False)
    assert found == read.to_dict("records")
    for row, given, flags in zip(rows, found, predicted["predictions"], strict=True):
        for name in ("label", "tags", "more"):
            assert (json.loads(given[name]) if given[name] else None) == row[name]
        assert (given["text"], given["id"]) == (row["text"], row["id"])
        assert given["prediction"] == "|".join(name for name, flag in zip("xyz", flags, strict=True) if flag)
    assert found[0]["label"] == "[1, 0, 1]" and found[0]["tags"] == json.dumps(rows[0]["tags"], ensure_ascii=False)


def test_a_card_names_the_file_of_each_score(run, tmp_path):
    """Of a tenth that was held out, and of a test file; a second one takes the place of the first."""
    columns = {"text": [f"text {n}" for n in range(40)], "label": ["a", "b"] * 20}
    train, test = write_csv(tmp_path / "train_text.csv", columns), write_csv(tmp_path / "test_text.csv", columns)
    flags = ("--train_file", train, "--output_dir", tmp_path / "out", "--do_predict", "--test_file")
    for file, rows in ((test, 40), (write_csv(tmp_path / "new.csv", {key: columns[key][:8] for key in columns}), 8)):
        run(*flags, file)
        tables = "\n".join(read_run_record(tmp_path / "out" / "seed-42").results)
        assert "| validation: a tenth of each class of train_text.csv, held out, 4 rows, x 100 |" in tables
        assert f"| test: {file.name}, {rows} rows, x 100 |" in tables and tables.count("x 100") == 2


def test_a_number_is_written_as_it_was_predicted(run, tmp_path):
    file = write_csv(
        tmp_path / "stars.csv", {"text": [f"text {n}" for n in range(8)], "label": [n / 2 for n in range(8)]}
    )
    run("--train_file", file, "--do_predict", "--test_file", file, "--output_dir", tmp_path / "out")
    rows, found = read_predictions(tmp_path / "out" / "seed-42")
    assert [float(row["prediction"]) for row in rows] == [logit for (logit,) in found["logits"]]


def test_a_trained_model_reads_the_columns_it_was_trained_on(run, tmp_path, capsys):
    """Unless others are named; the new file's `text` and `label` are something else."""
    texts = [f"{'rain' if n % 2 else 'sun'} and {n} winds" for n in range(12)]
    columns = {"review": texts, "sky": ["wet", "dry"] * 6, "text": ["same"] * 12, "label": ["x", "y"] * 6}
    file, model = write_csv(tmp_path / "reviews.csv", columns), tmp_path / "out" / "seed-42"
    flags = ("--text_column", "review", "--label_column", "sky", "--learning_rate", 1e-2)
    run("--train_file", file, "--validation_file", file, *flags, "--output_dir", tmp_path / "out")
    flags = ("--do_train", "False", "--validation_file", file, "--do_predict", "--test_file", file, "--output_dir")
    run(*flags, tmp_path / "again", model=model)
    first, second = (json.loads((tmp_path / name / "seed-42/results.json").read_text()) for name in ("out", "again"))
    assert second["scores"]["validation"] == first["scores"]["validation"]
    answers = pipeline("text-classification", model=str(model))(texts, truncation=True)
    rows, _ = read_predictions(tmp_path / "again" / "seed-42")
    assert [float(row["probability"]) for row in rows] == pytest.approx([a["score"] for a in answers], abs=1e-6)
    run(*flags, tmp_path / "named", "--text_column", "text", model=model)
    rows, _ = read_predictions(tmp_path / "named" / "seed-42")
    assert len({row["probability"] for row in rows}) == 1
    other = write_csv(tmp_path / "other.csv", {"text": ["a"]})
    with pytest.raises(SystemExit):
        run("--do_train", "False", "--do_eval", "False", "--do_predict", "--test_file", other, model=model)
    assert "other.csv has no column review, which --model was trained on; it has text. --text_column names" in (
        capsys.readouterr().err
    )


def test_the_held_out_tenth_has_a_tenth_of_each_class(tmp_path):
    """And never all of a class; by hand, of 100, 31 and 20 rows, and three classes with 3 further rows in all."""
    labels = ["a"] * 100 + ["b"] * 31 + ["c"] * 20 + ["once", "twice", "thrice", "thrice", "twice", "thrice"]
    found = table(tmp_path, labels)
    said = found.hold_out()
    train, validation = found.rows("train"), found.rows("validation")
    held = {name: list(validation["label"]).count(name) for name in validation.unique("label")}
    rare = held.pop("twice", 0) + held.pop("thrice", 0)
    assert (held["a"], held["b"], held["c"]) in [(10, 4, 2), (10, 3, 3), (11, 3, 2)]  # 16 of 151
    assert held.keys() == {"a", "b", "c"} and rare == 1 and set(train["label"]) == set(labels)
    assert sorted([*train["text"], *validation["text"]]) == sorted(f"text {n}" for n in range(len(labels)))
    assert (
        "17 of 157 rows are held out, a tenth of each class; classes with fewer than 10 rows (once, thrice, twice)"
        in said
    )
    again = table(tmp_path, labels)
    again.hold_out()
    assert again.rows("validation").to_dict() == validation.to_dict()
    with pytest.raises(ValueError, match="no class has two rows: give --validation_file"):
        table(tmp_path, ["a", "b", "c"]).hold_out()


def test_a_balanced_weight_is_worked_out_by_hand():
    """Of three rows and one: 4 / (2 x 3) and 4 / (2 x 1). The sum is over the rows, whatever parts they come in."""
    task = Task(("text",), None, ("often", "once"), class_weights="balanced")
    loss = weighted_loss(task, datasets.Dataset.from_dict({"label": [0, 0, 1, 0]}))
    probabilities = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.8, 0.2], [0.25, 0.75]])
    outputs, labels = {"logits": probabilities.log()}, torch.tensor([0, 0, 1, 0])
    of_rows = [2 / 3 * math.log(1 / 0.9), 2 / 3 * math.log(2), 2 * math.log(5), 2 / 3 * math.log(4)]
    assert loss(outputs, labels, torch.tensor(4)).item() == pytest.approx(sum(of_rows) / 4)
    assert loss(outputs, labels).item() == pytest.approx(sum(of_rows) / 4)
    parts = [loss({"logits": probabilities[part].log()}, labels[part], 4) for part in (slice(0, 1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx(sum(of_rows) / 4)
    with pytest.raises(ValueError, match="--class_weights balanced: no training row is once"):
        weighted_loss(task, datasets.Dataset.from_dict({"label": [0, 0]}))


def test_accumulation_never_changes_what_weighted_classes_learn(run, tmp_path):
    """The loss of the first step is the mean over all rows, by hand from the logits of a model that learned nothing."""
    labels = ["rain", *["sun"] * 6, "rain"]
    file = write_csv(tmp_path / "few.csv", {"text": [f"text {n} " * (1 + n % 3) for n in range(8)], "label": labels})
    flags = ("--train_file", file, "--validation_file", file, "--optim", "sgd", "--lr_scheduler_type", "constant")
    flags += ("--attention_dropout", 0, "--feedforward_dropout", 0, "--max_steps", 2, "--logging_steps", 1)
    flags += ("--warmup_steps", 0, "--do_eval", "False", "--max_grad_norm", 0)

    def train(name: str, rate: float, batch: int = 8, steps: int = 1, weights=("--class_weights", "balanced")):
        of_batch = ("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps)
        run(*flags, *weights, "--learning_rate", rate, *of_batch, "--output_dir", tmp_path / name)
        folder = tmp_path / name / "seed-42"
        history = json.loads((folder / "results.json").read_text())["history"]
        return folder, [entry["loss"] for entry in history if "loss" in entry]

    untrained, losses = train("untrained", 0)
    tokenizer, model = (kind.from_pretrained(untrained) for kind in (AutoTokenizer, AutoModelForSequenceClassification))
    texts = list(read_file(file, ["text"])["text"])
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.double()
    weights = [8 / (2 * labels.count(label)) for label in labels]
    of_rows = [
        weight * (row.exp().sum().log() - row[["rain", "sun"].index(label)]).item()
        for weight, row, label in zip(weights, logits, labels, strict=True)
    ]
    assert losses[0] == pytest.approx(sum(of_rows) / 8, rel=1e-4)

    whole, losses = train("whole", 0.1)
    expected = load_file(whole / "model.safetensors")
    for batch, steps in ((4, 2), (2, 4)):
        parts, found = train(f"{steps} parts", 0.1, batch, steps)
        assert found == pytest.approx(losses, abs=1e-4)
        for name, weight in load_file(parts / "model.safetensors").items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-4, msg=name)
    plain, _ = train("plain", 0.1, weights=())
    name = "classifier.out_proj.weight"
    assert not torch.allclose(load_file(plain / "model.safetensors")[name], expected[name], atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "flags", "message"),
    [
        ([0.5, 1.5, 2.5, 3.5], ("--class_weights", "balanced"), "is for one class a row; this is regression"),
        (["a", "b"] * 2, ("--class_weights", "balanced", "--label_smoothing_factor", 0.1), "are two losses: give one"),
        (["a", "b"] * 2, ("--class_weights", "balanced", "--do_train", "False"), "--class_weights balanced is for tr"),
        (
            ["a", "a", "a", "b"],
            ("--class_weights", "balanced", "--max_train_samples", 1),
            "--class_weights balanced: no training row is ",
        ),
        (
            [0.5, 1.5, 2.5, 3.5],
            ("--label_smoothing_factor", 0.1),
            "is for tasks with one class a row, and this is regr",
        ),
        ([1, 0, 1, 0], ("--label_column", "label", "more", "--label_smoothing_factor", 0.1), "is several labels a row"),
        (
            [1, 0, 1, 0],
            ("--label_column", "label", "more", "--class_weights", "balanced"),
            "is for one class a row; this is multi_label_classification",
        ),
        (
            [1, 0, 1, 0],
            ("--label_column", "label", "more", "--problem", "single_label_classification"),
            "takes one --label_column, got label, more",
        ),
    ],
)
def test_a_loss_that_is_none_of_the_problem_is_refused(run, tmp_path, capsys, labels, flags, message):
    columns = {"text": [f"text {n}" for n in range(4)], "label": labels, "more": [0, 1, 1, 0]}
    file = write_csv(tmp_path / "x.csv", columns)
    with pytest.raises(SystemExit):
        run("--train_file", file, "--validation_file", file, *flags, "--output_dir", tmp_path / "out")
    assert message in capsys.readouterr().err


def test_other_weights_are_another_run(run, tmp_path, capsys):
    """Also of a run that began before there were weights."""
    file = write_csv(tmp_path / "x.csv", {"text": [f"text {n}" for n in range(8)], "label": ["a", "b"] * 4})
    flags = ("--train_file", file, "--validation_file", file, "--output_dir", tmp_path / "out")
    run(*flags)
    began = json.loads((tmp_path / "out" / "seed-42" / "run.json").read_text())
    del began["class_weights"]
    (tmp_path / "out" / "seed-42" / "run.json").write_text(json.dumps(began))
    run(*flags)
    with pytest.raises(SystemExit):
        run(*flags, "--class_weights", "balanced")
    assert "holds another run (class_weights: None -> balanced)" in capsys.readouterr().err


def test_a_regression_learns_numbers_of_any_size(run, tmp_path):
    """Prices that one word decides; the mean and deviation of the model are those of the training rows."""
    prices = [250_000.0 if n % 2 else 120_000.0 for n in range(40)]
    texts = [f"a house with a {'garden' if n % 2 else 'cellar'} and {n % 7} rooms" for n in range(40)]
    file, folder = write_csv(tmp_path / "prices.csv", {"text": texts, "label": prices}), tmp_path / "out" / "seed-42"
    flags = ("--problem", "regression", "--validation_file", file, "--learning_rate", 3e-3)
    run("--train_file", file, *flags, "--max_steps", 50, "--output_dir", tmp_path / "out")
    config = GemmaEncoderConfig.from_pretrained(folder)
    assert (config.label_mean, config.label_std) == ([185_000.0], [65_000.0])
    assert json.loads((folder / "results.json").read_text())["scores"]["validation"]["r2"] > 0.9

    more = write_csv(tmp_path / "more.csv", {"text": texts[:4], "label": [1.0, 2.0, 3.0, 4.0]})
    run("--train_file", more, *flags, "--output_dir", tmp_path / "more", model=folder)
    assert GemmaEncoderConfig.from_pretrained(tmp_path / "more" / "seed-42").label_mean == [185_000.0]  # its head's
    flags += ("--standardize_labels", "false")
    run("--train_file", file, *flags, "--output_dir", tmp_path / "raw")
    assert GemmaEncoderConfig.from_pretrained(tmp_path / "raw" / "seed-42").label_mean is None


def test_several_columns_of_numbers_are_predicted_together(run, tmp_path, capsys):
    """Scores of each column and their mean, by scipy and scikit-learn of `predictions.csv`; names in the model."""
    columns = {"text": [f"{'rain ' * (n % 5)} and {n} winds" for n in range(12)], "label": ["some"] * 12}
    numbers = {"warmth": [n / 2 for n in range(12)], "wet": [n % 5 for n in range(12)], "x y": [-n for n in range(12)]}
    file, folder = write_csv(tmp_path / "weather.csv", {**columns, **numbers}), tmp_path / "out" / "seed-42"
    flags = ("--problem", "regression", "--label_column", "warmth", "wet", "x y", "--learning_rate", 1e-2)
    flags += ("--validation_file", file, "--do_predict", "--test_file", file)
    run("--train_file", file, *flags, "--output_dir", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "warmth", 1: "wet", 2: "x y"} and model.config.problem_type == "regression"
    rows, found = read_predictions(folder)
    given = {name: [float(row[f"prediction_{name}"]) for row in rows] for name in numbers}
    assert [list(row) for row in zip(*given.values(), strict=True)] == found["predictions"] == found["logits"]
    right = {}
    for name, values in numbers.items():
        right[f"pearson_{name}"] = pearsonr(given[name], values).statistic
        right[f"spearman_{name}"] = spearmanr(given[name], values).statistic
        right[f"r2_{name}"] = r2_score(values, given[name])
    means = {score: sum(right[f"{score}_{name}"] for name in numbers) / 3 for score in ("pearson", "spearman", "r2")}
    scores = json.loads((folder / "results.json").read_text())["scores"]
    assert scores["validation"] == scores["test"] == pytest.approx(means | right)
    assert (folder / "predictions-validation.png").stat().st_size > 5000

    again = ("--do_train", "False", "--validation_file", file, "--do_predict", "--test_file", file)
    run(*again, "--output_dir", tmp_path / "again", model=folder)
    assert read_predictions(tmp_path / "again" / "seed-42")[1]["logits"] == [pytest.approx(r) for r in found["logits"]]
    (folder / "run.json").unlink()  # as on the Hub
    run(*again, "--output_dir", tmp_path / "hub", model=folder)
    assert json.loads((tmp_path / "hub/seed-42/results.json").read_text())["scores"] == {
        split: pytest.approx(of_split) for split, of_split in scores.items()
    }
    for order, message in (
        (("wet", "warmth", "x y"), "has a head for the columns warmth, wet, x y, the data has wet, warmth, x y"),
        (("wet",), "predicts 3 numbers"),
    ):
        with pytest.raises(SystemExit):
            run(*again, "--label_column", *order, "--output_dir", tmp_path / "order", model=folder)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("", {"problem": "regression"}, r"x\.csv, row 1: 'b' is empty"),
        ("much", {"problem": "regression"}, r"x\.csv, row 1: 'b' is 'much', which is not a number"),
        ("0.5", {}, "'b' is 0.5 in row 1; several columns of labels hold 0 and 1, or numbers with --problem regr"),
    ],
)
def test_a_cell_of_several_columns_that_is_none_is_named(tmp_path, cell, options, message):
    file = write_csv(tmp_path / "x.csv", {"text": ["s", "t", "u"], "a": [0, 1, 1], "b": [0, cell, 1]})
    given = own_table.TableArguments(train_file=str(file), label_column=["a", "b"], **options)
    with pytest.raises(ValueError, match=message):
        own_table.Table(given)


def test_empty_texts_are_said_once_by_their_place_in_the_file(run, tmp_path, capsys):
    """Of rows held out, and of a few of the training rows, too; each row has one line, and one is before them."""
    columns = {"text": [f"text {n}" for n in range(30)], "label": [n % 2 for n in range(30)]}
    plain = table(tmp_path, columns["label"])
    plain.hold_out()
    held, trained_on = plain.held_out.validation[1], plain.held_out.train[4]
    columns["text"][held] = columns["text"][trained_on] = ""
    file, other = write_csv(tmp_path / "x.csv", columns), tmp_path / "new.jsonl"
    other.write_text('{"text": "a"}\n{"text": null}\n')
    flags = ("--max_train_samples", 5, "--seeds", 1, 2, "--do_predict", "--test_file", other)
    run("--train_file", file, *flags, "--output_dir", tmp_path / "out")
    said = [line for line in capsys.readouterr().out.splitlines() if "empty text" in line]
    begin = "rows have an empty text; the first is"
    assert said == [
        f"x.csv, train: 1 of 27 {begin} {file}, row {trained_on} (line {trained_on + 2}), column 'text'",
        f"x.csv, validation: 1 of 3 {begin} {file}, row {held} (line {held + 2}), column 'text'",
        f"x.csv, test: 1 of 2 {begin} {other}, row 1 (line 2), column 'text'",
    ]


def test_a_text_without_a_token_is_named_by_its_row(run, decoder, tmp_path, capsys):
    """Of a tokenizer that begins with nothing, as Qwen's; also where some rows are drawn."""
    shutil.copytree(decoder, tmp_path / "qwen")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.backend_tokenizer.post_processor = None
    for flag in ("add_bos_token", "add_eos_token", "bos_token"):
        tokenizer.init_kwargs.pop(flag, None)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "qwen")
    texts = ["" if n == 7 else f"text {n}" for n in range(12)]
    file = write_csv(tmp_path / "x.csv", {"text": texts, "label": [n % 2 for n in range(12)]})
    for flags in ((), ("--max_train_samples", 11, "--seed", 3)):
        with pytest.raises(SystemExit):
            run(
                "--train_file",
                file,
                "--validation_file",
                file,
                *flags,
                "--output_dir",
                tmp_path / "out",
                model=tmp_path / "qwen",
            )
        assert f"{file}, row 7 (line 9): '' has no token" in capsys.readouterr().err
