"""Laws of ablations: one choice differs, rates are chosen on rows nobody is scored on, and nothing runs twice."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ablations as script
import numpy as np
import pytest
import superglue
import torch
from datasets import Dataset
from helpers import run_here
from matplotlib.figure import Figure
from scipy.stats import bootstrap, pearsonr
from transformers import BertForSequenceClassification, Gemma2ForSequenceClassification

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.ablations.baselines import MAKERS, bag_of_words
from modeling_gemma_encoder.ablations.catalog import STUDIES
from modeling_gemma_encoder.ablations.cells import Cell, hold_out
from modeling_gemma_encoder.ablations.reports import difference_table, notes, plot, score_table
from modeling_gemma_encoder.ablations.statistics import (
    LeftOut,
    add_answers,
    add_differences,
    averages,
    difference_and_error,
    jackknife_error,
    split_in_parts,
)
from modeling_gemma_encoder.ablations.studies import Plan, Study, as_options, run_studies
from modeling_gemma_encoder.ablations.tasks import read_own_table
from modeling_gemma_encoder.checkpoints import decoder_of
from modeling_gemma_encoder.finetuning.arguments import FineTuningArguments
from modeling_gemma_encoder.finetuning.data import Data, digest
from modeling_gemma_encoder.finetuning.metrics import accuracy
from modeling_gemma_encoder.finetuning.tasks import Task, by_label

PAIR = Task(("first", "second"), by_label(accuracy), ("no", "yes"))
FEW = ["--max_steps", 2, "--per_device_train_batch_size", 4, "--max_length", 32, "--use_cpu", "True", "--seeds", 1, 2]


def make_data(size: int) -> Data:
    rows = Dataset.from_list([{"first": f"a {n}", "second": "b", "label": n % 2, "n": n} for n in range(size)])
    official = Dataset.from_list([{"first": "x", "second": "y", "label": 1, "n": -1}])
    encoded = {"train": rows.select_columns("n"), "validation": official.select_columns("n")}
    return Data(rows, {"validation": official}, {}, encoded, {"train": digest(rows)}, None, 32)


def test_rows_set_aside_are_not_trained_on():
    data = make_data(200)
    choose, report = hold_out(data, None, seed=1)
    aside, trained = choose.validation["validation"]["n"], report.train["n"]
    assert len(aside) == 20 and not set(aside) & set(trained) and sorted([*aside, *trained]) == list(range(200))
    assert choose.train["n"] == trained and report.validation["validation"]["n"] == [-1]
    for one in (choose, report):  # what is encoded are the same rows
        assert one.encoded["train"]["n"] == trained
        assert one.encoded["validation"]["n"] == one.validation["validation"]["n"]
    assert choose.digests["validation"] != report.digests.get("validation")
    few = [hold_out(data, 30, seed)[1].train["n"] for seed in (1, 2, 1)]
    assert few[0] == few[2] != few[1] and len(few[0]) == 30 and not set(few[0]) & set(aside)
    assert len(hold_out(make_data(20_000), None, 0)[0].validation["validation"]) == 1000


def test_rows_of_a_group_are_set_aside_together():
    """MultiRC's answers about a paragraph: what is chosen on has paragraphs of its own."""
    data = make_data(200)
    train = data.train.add_column("paragraph", [f"p {n * n % 37 % 30}" for n in range(200)])
    choose, _ = hold_out(replace(data, train=train), None, 1, "paragraph")
    aside, trained = choose.validation["validation"]["paragraph"], choose.train["paragraph"]
    assert 20 <= len(aside) < 60 and len(aside) + len(trained) == 200 and not set(aside) & set(trained)
    with pytest.raises(ValueError, match="the same 'paragraph'"):
        hold_out(replace(data, train=data.train.add_column("paragraph", ["p"] * 200)), None, 1, "paragraph")
    for name in ("boolq", "multirc", "record"):
        assert superglue.TASKS[name].group in superglue.TASKS[name].texts


def test_studies_share_the_cells_that_are_the_same():
    given = FineTuningArguments(model="m", pooling="mean", attention="bidirectional")
    assert as_options({"pooling": "mean", "attention": "bidirectional"}, given) == ()
    assert as_options({"pooling": "mean", "attention": "causal"}, given) == (("attention", "causal"),)
    studies = {
        "attention": Study({"causal": {"attention": "causal"}, "bidirectional": {"attention": "bidirectional"}}),
        "pooling": Study({"mean": {"pooling": "mean"}, "last": {"pooling": "last_k"}}),
    }
    asked = []

    def run_all(cells: list[Cell]):
        asked.append(cells)
        for cell in cells:  # while choosing, the smaller rate is better for `last`, the larger for all else
            last = ("pooling", "last_k") in cell.options
            value = -cell.learning_rate if last else cell.learning_rate
            value = value if cell.choosing else 0.5 + cell.seed / 100
            yield {"scores": {"v": {"a": value, "b": value}}, "majority": {"v": {"a": 0.2, "b": 0.4}}}

    plan = Plan(studies, ("t",), given, (0.1, 0.2), (1, 2))
    found = run_studies(plan, run_all)
    choosing, final = asked
    assert len(choosing) == 3 * 2 and all(cell.choosing and cell.seed == 0 for cell in choosing)
    assert len(final) == 3 * 2 and not any(cell.choosing for cell in final)
    assert len({cell.folder(Path("x")) for cell in [*choosing, *final]}) == 12
    assert found["pooling"]["t"]["mean"] == found["attention"]["t"]["bidirectional"]
    assert found["pooling"]["t"]["last"]["learning_rate"] == 0.1
    assert found["pooling"]["t"]["mean"]["learning_rate"] == 0.2
    assert found["pooling"]["t"]["mean"]["scores"] == pytest.approx([0.51, 0.52])
    assert found["pooling"]["t"]["mean"]["simple"] == {"majority": pytest.approx(0.3)}

    def but(missing):  # a variant without one of its cells is left out, and then the study has nothing to compare
        return lambda cells: (None if missing(c) else r for c, r in zip(cells, run_all(cells), strict=True))

    causal = ("attention", "causal")
    for missing in (lambda c: c.choosing and causal in c.options and c.learning_rate == 0.1, lambda c: c.seed == 2):
        kept = run_studies(plan, but(missing))
        assert kept == ({} if missing(final[-1]) else {"pooling": found["pooling"]})


def test_means_and_errors_are_those_of_a_calculator():
    """0.2, 0.4, 0.6: mean 0.4, sample deviation 0.2, error 0.2 / sqrt(3) = 0.11547. 0.5, 0.7, 0.6: 0.6, error 0.057735.
    Over both tasks 0.5, error sqrt(0.11547^2 + 0.057735^2) / 2 = 0.0645497."""
    of_study = {
        "one": {"a": {"scores": [0.2, 0.4, 0.6], "metric": "accuracy", "simple": {"majority": 0.3}}},
        "two": {"a": {"scores": [0.5, 0.7, 0.6], "metric": "AP", "simple": {"majority": 0.1, "BM25": 0.4}}},
    }
    assert averages(of_study, "a") == pytest.approx((0.5, 0.0645497), abs=1e-6)
    lines = score_table("title", Study({"a": {}}, paper={"a": 89.4}), of_study).splitlines()
    assert lines[2] == "| majority, or random order | 30.0 | 10.0 | 20.0 |  |"
    assert lines[3] == "| BM25 |  | 40.0 |  |  |"
    assert lines[4] == "| a | 40.0 ± 11.5 | 60.0 ± 5.8 | 50.0 ± 6.5 | 89.4 |"
    assert lines[0] == "| title | one (accuracy) | two (AP) | average | the paper's GLUE average, Gemma 2 2B |"
    of_study["two"]["b"] = of_study["two"]["a"]  # a variant that one task lacks, and another that all lack
    lines = score_table("title", Study({"a": {}, "b": {}, "c": {}}), of_study).splitlines()
    assert lines[5:] == ["| b |  | 60.0 ± 5.8 |  |"]
    (first, *_, last) = score_table("title", Study({"a": {}}), {"one": of_study["one"]}).splitlines()
    assert first == "| title | one (accuracy) |" and last == "| a | 40.0 ± 11.5 |"


def test_errors_of_rows_are_those_of_textbooks(tmp_path):
    """Of a mean with a row left out at a time: sample deviation / sqrt(n); of a correlation: scipy's bootstrap."""
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    without = np.array([np.delete(values, n).mean() for n in range(6)])
    assert jackknife_error(without) == pytest.approx(values.std(ddof=1) / 6**0.5)
    rng = np.random.default_rng(0)
    first, noise = rng.normal(size=(2, 1000))
    task = Task(("first",), lambda found, rows: {"r": pearsonr(found, rows["label"]).statistic}, problem="regression")
    rows = Dataset.from_dict({"first": ["a"] * 1000, "label": first})
    found = jackknife_error(LeftOut(task, {"v": rows})(saved(tmp_path, first + noise)))
    drawn = bootstrap((first, first + noise), lambda a, b: pearsonr(a, b).statistic, paired=True, n_resamples=1000)
    assert found == pytest.approx(drawn.standard_error, rel=0.25)


def saved(folder: Path, predictions) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "predictions-v.json").write_text(json.dumps({"predictions": list(predictions)}))
    return folder


def test_rows_of_a_group_are_left_out_together():
    groups = [f"p {n % 30}" for n in range(90)]
    part = split_in_parts(90, groups, 10)
    assert len(set(part)) == 10 and all(len({part[n] for n in range(90) if n % 30 == g}) == 1 for g in range(30))
    assert sorted(split_in_parts(7)) == list(range(7))
    assert max(np.bincount(split_in_parts(1050))) == 11


def test_differences_are_of_the_same_seeds_and_rows(tmp_path):
    """`b` is right on one row of ten more: the error of a tenth, sqrt(0.1 * 0.9 / 9) = 0.1. `c` on two
    more by one seed of two: 0 and 0.2, an error of 0.1 by the seeds, in which that of the rows, 0.067, is once."""
    rows = Dataset.from_dict({"first": ["a"] * 10, "label": [1] * 10})
    task = Task(("first",), by_label(accuracy), ("no", "yes"))
    for name, right in (("a", (4, 4)), ("b", (5, 5)), ("c", (5, 7))):
        for seed in (0, 1):
            saved(tmp_path / f"{name}{seed}", [1] * right[seed] + [0] * (10 - right[seed]))
    study = Study({name: {} for name in ("a", "b", "c", "old", "nan")}, reference={"c": "b"})
    scores = {"a": [0.4, 0.4], "b": [0.5, 0.5], "c": [0.5, 0.7], "old": [0.4, 0.4], "nan": [0.4, np.nan]}
    cells = {name: [f"{name}0", f"{name}1"] for name in scores} | {"nan": ["a0", "a1"]}
    found = {"s": {"t": {name: {"scores": scores[name], "cells": cells[name]} for name in scores}}}
    lacking = add_differences({"s": study}, found, tmp_path, {"t": LeftOut(task, {"v": rows})})
    assert lacking == ["old0", "old1"]
    by_name = {name: row["difference"] for name, row in found["s"]["t"].items()}
    assert by_name["a"] == pytest.approx([0, 0]) and by_name["old"] is None and by_name["nan"] is None
    assert by_name["b"] == pytest.approx([0.1, 0.1])
    assert by_name["c"] == pytest.approx([0.1, 0.1])
    lines = difference_table("s", study, found["s"]).splitlines()
    assert lines[2:3] == ["| b - a | +10.0 ± 10.0 |"] and lines[4] == "| old - a |  |"
    assert lines[3].startswith("| c - b | +10.0 ±") and "seeds and rows" in lines[0]
    two = difference_table("s", study, {"t": found["s"]["t"], "u": found["s"]["t"]}).splitlines()
    assert two[0].endswith("| t | u | average |") and two[2] == "| b - a | +10.0 ± 10.0 | +10.0 ± 10.0 | +10.0 ± 7.1 |"
    found["s"]["u"] = {name: found["s"]["t"][name] for name in ("b", "c")}  # without what `b` is compared with
    add_differences({"s": study, "none": study}, found, tmp_path, {name: LeftOut(task, {"v": rows}) for name in "tu"})
    assert found["s"]["u"]["b"]["difference"] is None and found["s"]["u"]["c"]["difference"] is not None
    del found["s"]["u"]
    one = add_differences({"s": study}, found, tmp_path, {"t": LeftOut(task, {"v": rows.select([0])})})
    assert one == lacking and found["s"]["t"]["b"]["difference"] is None  # a single row


def test_no_variants_name_has_a_comma():
    """It would part the names in lists and tables of them."""
    names = [name for study in STUDIES.values() for name in (*study.variants, *study.paper)]
    assert len(names) > 30 and not [name for name in names if "," in name]
    for study in STUDIES.values():
        references = study.reference.values() if isinstance(study.reference, dict) else [study.reference]
        assert {*references} - {None} <= {*study.variants} and {*study.paper} <= {*study.variants}


ROWS = Dataset.from_dict({"first": ["a"] * 40, "label": [1] * 30 + [0] * 10})


@pytest.mark.parametrize(
    ("predicted", "said"),
    [
        ([1] * 40, "yes for all rows"),
        ([0] * 40, "no for all rows"),
        ([1] * 39 + [0], "yes for 97.5% of the rows"),  # one of the ten that are not so
        ([1] * 38 + [0] * 2, None),
        ([1] * 30 + [0] * 10, None),
    ],
)
def test_answers_that_are_nearly_always_the_same_are_said(tmp_path, predicted, said):
    saved(tmp_path / "a", predicted)
    task = Task(("first",), by_label(accuracy), ("no", "yes"))
    assert LeftOut(task, {"v": ROWS}).always(tmp_path / "a") == said
    alike = ROWS.select([0] * 40)  # where all rows are so, nothing else is right
    assert LeftOut(task, {"v": alike}).always(tmp_path / "a") == ("no for all rows" if predicted == [0] * 40 else None)


def test_numbers_that_hardly_differ_and_lists_that_do_not_are_said(tmp_path):
    rows = Dataset.from_dict({"first": ["a"] * 4, "label": [0.0, 1.0, 2.0, 3.0]})  # spread by 1.118
    for spread, said in ((0.09, "about the same number"), (0.12, None)):
        saved(tmp_path / "a", [1.5 - spread, 1.5 + spread] * 2)
        assert LeftOut(Task(("first",), None, problem="regression"), {"v": rows}).always(tmp_path / "a") == said
    several = Task(("first",), None, ("wet", "cold"), problem="multi_label_classification")
    rows = Dataset.from_dict({"first": ["a"] * 3, "label": [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]})
    for row, said in (([0, 0], "none for all rows"), ([1, 1], "wet and cold for all rows")):
        saved(tmp_path / "a", [row] * 3)
        assert LeftOut(several, {"v": rows}).always(tmp_path / "a") == said


def test_equal_answers_and_constant_ones_stand_in_words_under_the_table(tmp_path):
    task, study = Task(("first",), by_label(accuracy), ("no", "yes")), Study({name: {} for name in "abcd"})
    right = [1] * 30 + [0] * 10
    for name, answers in (("a", right), ("b", [1] * 40), ("c", right), ("d", [1] * 40)):
        saved(tmp_path / f"{name}0", answers)
        saved(tmp_path / f"{name}1", right)
    saved(tmp_path / "d1", [1] * 40)  # another answer with one seed of two
    scores = {"a": [1.0, 1.0], "b": [0.75, 1.0], "c": [1.0, 1.0], "d": [0.75, 0.75]}
    rows = {name: {"scores": scores[name], "cells": [f"{name}0", f"{name}1"]} for name in "abcd"}
    found = {"s": {"t": rows | {"old": {"scores": [0.5], "cells": ["nowhere"]}}}}
    left_out = {"t": LeftOut(task, {"v": ROWS})}
    add_differences({"s": study}, found, tmp_path, left_out)
    add_answers(found, tmp_path, left_out)
    assert {name: row["equal_to"] for name, row in found["s"]["t"].items() if row["equal_to"]} == {"c": ["a"]}
    assert notes(study, found["s"]).splitlines() == [
        "- t: a, c give equal answers to every row.",
        "- t: b says yes for all rows (1 of 2 seeds), so its score is that of a constant.",
        "- t: d says yes for all rows (2 of 2 seeds), so its score is that of a constant.",
    ]
    table = difference_table("s", study, found["s"])
    assert "| c - a | equal answers |" in table and "| d - a | -25.0 ±" in table and "+0.0" not in table


@pytest.mark.parametrize("scores", [[0.691271] * 3, [0.6912710, 0.6912711, 0.6912712], [0.0, 0.0, 1e-9]])
def test_a_plots_axis_is_not_of_rounding(tmp_path, monkeypatch, scores):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    row = {"scores": scores, "metric": "accuracy", "simple": {"majority": scores[0]}}
    plot("s", Study({"a": {}, "b": {}}), {"t": {"a": row, "b": row}}, tmp_path / "s.png")
    axes = drawn[0].axes[0]
    low, high = axes.get_xlim()
    drawn[0].canvas.draw()
    assert high - low >= 2 and low <= 100 * min(scores) and 100 * max(scores) <= high
    assert np.diff(axes.get_xticks()).min() >= 0.1 and not axes.xaxis.get_offset_text().get_text()


def test_a_plots_axis_fits_scores_and_errors(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    row = {"scores": [0.1, 0.9], "metric": "accuracy", "simple": {}}  # 50 with an error of 40
    plot("s", Study({"a": {}, "b": {}}), {"t": {"a": row, "b": row}}, tmp_path / "s.png")
    low, high = drawn[0].axes[0].get_xlim()
    assert 0 < low < 10 and 90 < high < 100


def test_errors_of_differences_are_what_repeating_gives():
    """Variants, rows and seeds drawn again and again: the spread of the differences is the error that is reported."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        hard, spread = rng.normal(size=(1, 100)), 0.1 * rng.normal(size=(2, 3, 1))
        right = rng.normal(size=(2, 3, 100)) + hard + spread + [[[0.0]], [[0.2]]] > 0
        differences = right[1].mean(-1) - right[0].mean(-1)
        without = (right.sum(-1, keepdims=True) - right) / 99
        found.append(difference_and_error(differences, without[1] - without[0]))
    means, errors = np.array(found).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(means.std(), rel=0.15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for place, texts in (("glue/cola", ["sentence"]), ("superglue/cb", ["premise", "hypothesis"])):
        (folder / place).mkdir(parents=True)
        for split, size in (("train", 30), ("validation", 9)):
            rows = [{**{text: f"some {text} {n}" for text in texts}, "label": n % 2, "idx": n} for n in range(size)]
            (folder / place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def command(monkeypatch, decoder, folder, tmp_path):
    def command(*flags) -> dict:
        words = ["ablations.py", "--model", decoder, "--data_dir", folder, "--output_dir", tmp_path / "out", *FEW]
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*words, *flags)])
        script.main()
        return json.loads((tmp_path / "out" / "results.json").read_text())["studies"]

    return command


def test_a_study_runs_once_and_padding_is_equal(command, folder, tmp_path, capsys, monkeypatch):
    flags = ["--tasks", "cola", "cb", "--learning_rates", 1e-3, 1e-2]
    found = command("--study", "padding", *flags)
    for task in ("cola", "cb"):
        padding = found["padding"][task]
        assert padding["left"]["scores"] == padding["right"]["scores"]
        assert padding["left"]["chosen_on"] == padding["right"]["chosen_on"]
        assert padding["left"]["difference"] == [0, 0]
        assert padding["left"]["equal_to"] == ["right"] and padding["right"]["equal_to"] == []
    cell = tmp_path / "out" / found["padding"]["cb"]["left"]["cells"][0]
    predicted = np.array(json.loads((cell / "predictions-validation.json").read_text())["predictions"])
    rows = Dataset.from_json(str(folder / "superglue" / "cb" / "validation.jsonl"))
    scores = superglue.TASKS["cb"].metric(predicted, rows)
    assert np.mean([*scores.values()]) == pytest.approx(found["padding"]["cb"]["left"]["scores"][0])
    said = capsys.readouterr().out
    assert "| majority, or random order |" in said and "+0.0 ± 0.0" not in said
    assert "| left - right | equal answers | equal answers | equal answers |" in said
    assert "- cola: right, left give equal answers to every row." in said
    assert (tmp_path / "out" / "padding.png").exists()
    assert not list((tmp_path / "out" / "cells").rglob("*.safetensors"))
    cells = sorted((tmp_path / "out" / "cells").rglob("results.json"))
    assert len(cells) == 2 * 2 * (2 + 2)  # tasks x variants x (rates + seeds)

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("modeling_gemma_encoder.finetuning.run.TrainerInOrder.train", never)
    assert command("--study", "padding", *flags) == found
    assert command("--study", "padding", "attention", *flags, "--finished_only") == found
    with pytest.raises(SystemExit):
        command("--study", "attention", *flags, "--finished_only")
    assert "no variant is finished" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("--study", "padding", *flags, "--finished_only", "--max_eval_samples", 4)
    assert "was evaluated on other rows of validation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("--study", "padding", *flags, "--weight_decay", 0.5)
    assert "holds another run (weight_decay: 0.01 -> 0.5)" in capsys.readouterr().err


def test_side_by_side_is_the_same(command, decoder, folder, tmp_path):
    """On Ray in processes of their own, from another folder's command line."""
    pytest.importorskip("ray")
    flags = ["--study", "attention", "--tasks", "cola", "--learning_rates", "1e-3", "--seeds", "1"]
    flags += ["--variants", "causal", "bidirectional"]
    expected = command(*flags)
    words = [sys.executable, script.__file__, "--model", decoder, "--data_dir", folder, *FEW, *flags, "--workers", 2]
    words += ["--output_dir", "beside"]
    found = subprocess.run([str(word) for word in words], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    report = json.loads((tmp_path / "beside" / "results.json").read_text())["studies"]
    for name, of_variant in expected["attention"]["cola"].items():
        assert report["attention"]["cola"][name]["scores"] == pytest.approx(of_variant["scores"]), name


def test_baselines_are_what_they_are_called(command, decoder):
    options = FineTuningArguments(model=str(decoder), pooling="mean")
    made = {name: make(PAIR, options) for name, make in MAKERS.items()}
    assert type(made["stock"]) is Gemma2ForSequenceClassification
    assert getattr(made["stock"].config, "is_causal", True)
    assert type(made["bert"]) is BertForSequenceClassification
    assert type(made["scratch"]) is GemmaEncoderForSequenceClassification
    given = GemmaEncoderForSequenceClassification.from_pretrained(decoder, dtype=torch.float32)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(made["scratch"].get_parameter(weight), given.get_parameter(weight))
    torch.testing.assert_close(made["stock"].get_parameter(weight), given.get_parameter(weight))
    few = ["--tasks", "cb", "--learning_rates", 1e-3]
    one = command("--study", "baselines", "attention", "--variants", "BERT's shape with random weights", *few)
    found = command("--study", "baselines", *few)
    assert one.keys() == {"baselines"} and one["baselines"]["cb"].keys() == {"BERT's shape with random weights"}
    for row in one["baselines"]["cb"].values():
        assert row["scores"] == found["baselines"]["cb"]["BERT's shape with random weights"]["scores"]
    assert all(len(row["scores"]) == 2 and row["difference"] for row in found["baselines"]["cb"].values())
    assert found["baselines"]["cb"]["Gemma Encoder"]["difference"] == [0, 0]


def test_a_bert_has_about_the_decoders_parameters():
    options = FineTuningArguments(model="examples/nano")
    ours, theirs = decoder_of(options.model).num_parameters(), MAKERS["bert"](PAIR, options).num_parameters()
    assert theirs == pytest.approx(ours, rel=0.05)


def test_bags_of_words_see_what_two_texts_share(tmp_path):
    """Whether two texts are the same word can only be told from what they share or where they differ."""
    rng = np.random.default_rng(0)
    words = ["rain", "sun", "snow", "wind", "fog", "hail"]
    rows = [{"first": words[a], "second": words[b]} for a, b in rng.integers(0, 6, size=(600, 2))]
    rows = Dataset.from_list([{**row, "label": int(row["first"] == row["second"])} for row in rows])
    data = Data(rows.select(range(400)), {"validation": rows.select(range(400, 600))}, {}, {}, {}, None, 32)
    report = bag_of_words(PAIR, data, tmp_path, "same", 1)
    assert report["scores"]["validation"]["accuracy"] > 0.95 > report["majority"]["validation"]["accuracy"]
    assert json.loads((tmp_path / "results.json").read_text()) == report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--study", "colour", "--tasks", "cola"], "all; got colour"),
        (["--study", "attention", "--tasks", "ax"], "; got ax"),
        (["--study", "start", "--tasks", "cola"], "compares two --starts or more"),
        (
            ["--study", "attention", "--tasks", "cola", "--variants", "mean"],
            "must be one of causal, causal with last token, bidirectional",
        ),
        (["--study", "attention", "--tasks", "cola", "--variants", "causal,bidirectional"], "causal bidirectional"),
        (["--study", "attention", "--tasks", "cola", "--variants", "casual"], "Did you mean 'causal'?"),
        (
            ["--study", "baselines", "--tasks", "cola", "--variants", "TF-IDF, logistic regression"],
            "Did you mean 'TF-IDF with logistic regression'?",
        ),
        (["--study", "rows", "--tasks", "cola", "--variants", "mean, 250"], "Did you mean 'mean on 250 rows'?"),
        (["--study", "rows", "--tasks", "cola", "--variants", "query probe, all"], "'query probe on all rows'?"),
        (["--study", "attention", "--tasks", "mrpc"], "there is neither a folder"),
        (
            ["--study", "attention", "--tasks", "cola", "--data_dir", "nowhere"],
            "--data_dir: there is no folder nowhere",
        ),
        (["--study", "start", "--tasks", "cola", "--starts", "me/a", "./b"], "--starts: there is no folder ./b"),
        (["--study", "attention", "--tasks", "cola", "--workers", "0"], "at least 1; got 0"),
        (["--study", "attention", "--tasks", "cola", "--do_predict"], "are for glue.py"),
        (["--study", "baselines", "--tasks", "cola", "--lora_r", "4"], "trains all weights"),
        (["--study", "rows", "--tasks", "cola", "--ranking", "a", "b"], "there is no a, b"),
        (["--study", "attention"], "Give --tasks, --table or --ranking"),
        (["--study", "attention", "--table", "a.csv", "b.csv", "c.csv"], "--table takes one or two files"),
        (["--study", "attention", "--table", "a.csv", "b.csv"], "a.csv does not exist"),
        (["--study", "attention", "--table", "a", "b", "--table_flags", "--dataset x"], "but not --dataset"),
        (
            ["--study", "attention", "--table", "a", "b", "--table_flags", "--validation_file c"],
            "but not --validation_file",
        ),
        (["--study", "attention", "--table", "a", "b", "--table_flags", "--text_column a b c"], "one or two columns"),
        (["--study", "dropout", "--tasks", "cola", "--attn_implementation", "flex_attention"], "cannot drop attention"),
        (["--study", "attention", "--tasks", "cola", "--pooling_num_heads", "3", "--pooling", "kv_probe"], "num_heads"),
        (["--study", "attention", "--tasks", "cola", "--attn_implementation", "flash_attention_2"], "FlashAttention2"),
        (["--study", "attention", "--tasks", "cola", "--learning_rate", "1e-3"], "Give --learning_rates"),
        (["--study", "attention", "--tasks", "cola", "--ranking", "a", "a"], "other data to evaluate"),
    ],
)
def test_bad_command_lines_end_before_any_training(command, capsys, flags, message):
    with pytest.raises(SystemExit):
        command(*flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "metrics"),
    [
        (["bad", "good"], {"accuracy", "macro_f1"}),
        ([1.5, 2.0, 4.5], {"pearson", "spearman"}),
        ([["wet"], [], ["wet", "cold"]], {"micro_f1", "macro_f1"}),
    ],
)
def test_a_users_table_is_a_task_of_its_own(command, tmp_path, labels, metrics):
    for name, size in (("train", 30), ("dev", 12)):
        rows = [{"review": f"text {n} " + "rain " * (n % 5), "stars": labels[n % len(labels)]} for n in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--study", "attention", "baselines", "--variants", "causal", "Gemma Encoder"]
    flags += ["TF-IDF with logistic regression", "--learning_rates", 1e-3]
    flags += ["--table", tmp_path / "train.jsonl", tmp_path / "dev.jsonl"]
    found = command(*flags, "--table_flags", "--text_column review --label_column stars")
    assert found["attention"].keys() == found["baselines"].keys() == {"train.jsonl"}
    rows = {**found["attention"]["train.jsonl"], **found["baselines"]["train.jsonl"]}
    assert rows.keys() == {"causal", "Gemma Encoder", "TF-IDF with logistic regression"}
    assert all(len(row["scores"]) == 2 for row in rows.values())
    (report, *_) = tmp_path.glob("**/final/train.jsonl/*/results.json")
    assert json.loads(report.read_text())["scores"]["validation"].keys() == metrics


def test_several_numbers_of_a_users_table_are_scored_without_r2(tmp_path):
    """By hand: predictions that are the labels, and in one column their opposites."""
    rows = [{"text": f"text {n}", "a": n, "b": 7 * n % 30} for n in range(30)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, task, source = read_own_table([str(tmp_path / "x.jsonl")], "--problem regression --label_column a b")
    validation = task.load(source, "validation")
    scores = task.metric(np.array(validation["label"]) * [1, -1], validation)
    right = {f"{name}_{column}": sign for name in ("pearson", "spearman") for column, sign in (("a", 1), ("b", -1))}
    assert scores == pytest.approx({"pearson": 0, "spearman": 0, **right}, abs=1e-9)


def test_a_reranker_is_a_task_of_its_own(command, tmp_path, decoder, capsys, monkeypatch):
    """It is trained by `msmarco.py`; rates are chosen on queries set aside, and BM25 stands beside it."""
    monkeypatch.setattr("modeling_gemma_encoder.ablations.reranker.subprocess.run", run_here)
    for name, size in (("train", 10), ("judged", 4)):
        (tmp_path / name).mkdir()
        rows = [(f"{name}-{n}", f"{word} {n}") for n in range(size) for word in ("rain", "sun")]
        queries = [{"qid": f"q-{name}-{n}", "text": f"rain {n}"} for n in range(size)]
        passages = [{"pid": f"{pid}-{text.split()[0]}", "text": text} for pid, text in rows]
        for file, lines in (("queries", queries), ("passages", passages)):
            (tmp_path / name / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        qrels = [
            f"q-{name}-{n} 0 {name}-{n}-{word} {grade}"
            for n in range(size)
            for word, grade in (("rain", 1), ("sun", 0))
        ]
        (tmp_path / name / "qrels.txt").write_text("\n".join(qrels) + "\n")
    flags = ["--study", "padding", "--learning_rates", 1e-3, "--seeds", 1]
    flags += ["--ranking", tmp_path / "train", tmp_path / "judged"]
    flags += ["--ranking_flags", "--max_steps 1 --list_size 2 --use_cpu True --save_strategy no"]
    found = command(*flags)
    assert set(found["padding"]) == {"judged"}
    row = found["padding"]["judged"]["left"]
    assert row["scores"] == found["padding"]["judged"]["right"]["scores"] and len(row["scores"]) == 1
    assert row["difference"] == [0, 0]
    assert row["simple"]["BM25"] == 1.0 and 0 < row["simple"]["majority"] <= 1
    assert command(*flags) == found
    # The same flags in another order are the same run; values that changed places are not.
    flags[-1] = "--list_size 2 --max_steps=1 --use_cpu True --save_strategy no"
    assert command(*flags) == found
    flags[-1] = "--list_size 1 --max_steps 2 --use_cpu True --save_strategy no"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command(*flags)
    assert "holds another run (--max_steps: 1 -> 2, --list_size: 2 -> 1)" in capsys.readouterr().err
