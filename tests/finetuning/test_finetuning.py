"""GLUE, SuperGLUE and a user's own table, from the command line to the server's files, on tiny models and few rows."""

import csv
import json
import re
import sys
from pathlib import Path

import classify
import glue
import msmarco
import numpy as np
import pytest
import rerank
import superglue
import torch
from helpers import NANO
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, pipeline

from modeling_gemma_encoder import GemmaEncoderConfig
from modeling_gemma_encoder.finetuning import own_table
from modeling_gemma_encoder.finetuning.arguments import ENCODER_OPTIONS, FineTuningArguments
from modeling_gemma_encoder.finetuning.reports import average, markdown, plot_run, summarize, without_scores
from modeling_gemma_encoder.finetuning.run import TrainerInOrder
from modeling_gemma_encoder.finetuning.suite import left_by

NLI = {"premise": "A man plays a guitar.", "hypothesis": "A man makes music."}
TWO = {"sentence1": "The cat sat on the mat.", "sentence2": "A cat is sitting."}
# A row of each task with the Hub's columns; labels are added, one class after the other.
GLUE = {
    "cola": {"sentence": "They drank the pub dry."},
    "sst2": {"sentence": "a joyless film"},
    "mrpc": TWO,
    "stsb": TWO,
    "qqp": {"question1": "How old is it?", "question2": "What is its age?"},
    "mnli": NLI,
    "qnli": {"question": "Who plays?", "sentence": "A man plays a guitar."},
    "rte": TWO,
    "wnli": TWO,
    "ax": NLI,
}
SUPERGLUE = {
    "boolq": {"question": "is it raining", "passage": "Rain -- It rains a lot."},
    "cb": NLI,
    "copa": {"premise": "It rained.", "choice1": "It is wet.", "choice2": "It is dry.", "question": "effect"},
    "multirc": {"paragraph": "It rained. Nobody went out.", "question": "Who went out?", "answer": "Nobody"},
    "record": {
        "passage": "Ada met Grace.\n@highlight\nThey talked.",
        "query": "@placeholder met Grace.",
        "entities": ["Ada", "Grace"],
        "answers": ["Ada"],
    },
    "rte": NLI,
    "wic": {
        "word": "bank",
        "sentence1": "The bank was closed .",
        "sentence2": "He sat on the bank .",
        "start1": 4,
        "end1": 8,
        "start2": 14,
        "end2": 18,
    },
    "wsc": {"text": "Ann thanked Sue because she had helped .", "span1_index": 0, "span1_text": "Ann"},
    "axb": TWO,
    "axg": NLI,
}
SUPERGLUE["wsc"] |= {"span2_index": 4, "span2_text": "she"}


def write_rows(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, name: str, row: dict, task) -> None:
    """Six rows to train on, four to validate, and three to test, whose labels are hidden as on the Hub."""
    splits = {"train": 6, **dict.fromkeys(task.validation, 4), **dict.fromkeys(task.test, 3)}
    if task.train_on:
        del splits["train"]
    for split, size in splits.items():
        rows = []
        for number in range(size):
            index = {"paragraph": number // 2, "question": number // 2, "answer": number}
            index = {"passage": number, "query": 10 + number} if name == "record" else index
            one = {**row, "idx": index if name in ("multirc", "record") else number}
            if name != "record":
                label = float(number) if name == "stsb" else number % max(len(task.labels), 1)
                one["label"] = label if split not in task.test else -1
            else:  # lists of different lengths
                one["entities"] = ["Ada", "Grace", "Jean", "Mary"][: 2 + number % 3]
                one["answers"] = [] if split in task.test else one["answers"]
            rows.append(one)
        write_rows(folder / name, split, rows)


@pytest.fixture
def run(monkeypatch, decoder):
    """Runs a script's `main` as a command line would."""

    def run(main, *arguments, model=decoder):
        monkeypatch.setattr(
            sys, "argv", ["script", "--model", str(model), "--disable_tqdm", "True", *map(str, arguments)]
        )
        main()

    return run


def run_glue():
    glue.run_suite(glue.SUITE, "runs/glue")


def run_superglue():
    superglue.run_suite(superglue.SUITE, "runs")


FEW = ("--max_steps", 1, "--per_device_train_batch_size", 4, "--max_length", 48, "--use_cpu", "True")


def test_every_task_of_glue_runs_to_the_servers_files(run, tmp_path):
    for name, row in GLUE.items():
        write_task(tmp_path / "data", name, row, glue.TASKS[name])
    run(
        run_glue,
        "--task",
        "all",
        "--data_dir",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "out",
        *FEW,
        "--do_predict",
    )
    files = {path.name: path.read_text() for path in (tmp_path / "out" / "submission-seed-42").iterdir()}
    names = {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX"}
    assert set(files) == {f"{name}.tsv" for name in names}
    words = {"MNLI-m": glue.TASKS["mnli"].labels, "MNLI-mm": glue.TASKS["mnli"].labels, "AX": glue.TASKS["mnli"].labels}
    words |= {"QNLI": ("entailment", "not_entailment"), "RTE": ("entailment", "not_entailment")}
    for name in names:
        header, *lines = files[f"{name}.tsv"].splitlines()
        assert header == "index\tprediction"
        indices, answers = zip(*(line.split("\t") for line in lines), strict=True)
        assert indices == ("0", "1", "2")
        if name == "STS-B":
            assert all(0 <= float(answer) <= 5 for answer in answers)
        else:
            assert set(answers) <= set(words.get(name, ("0", "1")))
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["task"] for row in report["summary"]} == set(GLUE) - {"ax"}
    mnli = [row for row in report["summary"] if row["task"] == "mnli"]
    assert [row["split"] for row in mnli] == ["validation_matched", "validation_mismatched"]
    assert (tmp_path / "out" / "stsb" / "seed-42" / "predictions-validation.png").exists()
    assert (tmp_path / "out" / "cola" / "seed-42" / "predictions-validation.png").exists()


def test_every_task_of_superglue_runs_to_the_servers_files(run, tmp_path):
    for name, row in SUPERGLUE.items():
        write_task(tmp_path / "data", name, row, superglue.TASKS[name])
    flags = ("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *FEW, "--do_predict")
    run(run_superglue, "--task", "all", *flags)
    folder = tmp_path / "out" / "submission-seed-42"
    files = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}
    names = {"BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC", "AX-b", "AX-g"}
    assert set(files) == {f"{name}.jsonl" for name in names}
    labels = {"BoolQ": {"false", "true"}, "WiC": {"false", "true"}, "WSC": {"False", "True"}, "COPA": {0, 1}}
    labels |= {name: {"entailment", "not_entailment"} for name in ("RTE", "AX-b", "AX-g")}
    labels["CB"] = {"entailment", "contradiction", "neutral"}
    for name, allowed in labels.items():
        assert [line["idx"] for line in files[f"{name}.jsonl"]] == [0, 1, 2]
        assert {line["label"] for line in files[f"{name}.jsonl"]} <= allowed
    assert [line["idx"] for line in files["ReCoRD.jsonl"]] == [10, 11, 12]
    for line, entities in zip(files["ReCoRD.jsonl"], (2, 3, 4), strict=True):
        assert line["label"] in ["Ada", "Grace", "Jean", "Mary"][:entities]
    first, second = files["MultiRC.jsonl"]
    assert [first["idx"], second["idx"]] == [0, 1]
    assert [answer["idx"] for answer in first["passage"]["questions"][0]["answers"]] == [0, 1]
    assert {answer["label"] for answer in first["passage"]["questions"][0]["answers"]} <= {0, 1}


def test_a_saved_model_reads_pairs_and_names_classes_as_it_was_trained_to(run, tmp_path):
    write_task(tmp_path / "data", "rte", NLI, superglue.TASKS["rte"])
    run(run_superglue, "--task", "rte", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *FEW)
    folder = tmp_path / "out" / "rte" / "seed-42"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(tokenizer(NLI["premise"], NLI["hypothesis"])["input_ids"], skip_special_tokens=True)
    assert text == "A man plays a guitar.\nA man makes music."
    classify_pair = pipeline("text-classification", model=str(folder))
    answer = classify_pair({"text": NLI["premise"], "text_pair": NLI["hypothesis"]}, top_k=None)
    assert {one["label"] for one in answer} == {"entailment", "not_entailment"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


class Stop(Exception):
    pass


def interrupted_after(steps: int):
    """A training step that ends the run once `steps` were taken."""
    step, seen = TrainerInOrder.training_step, []

    def interrupted(self, *args, **kwargs):
        if len(seen) == steps:
            raise Stop
        seen.append(None)
        return step(self, *args, **kwargs)

    return interrupted


def test_an_interrupted_run_resumes_to_the_same_weights(run, tmp_path, monkeypatch):
    write_task(tmp_path / "data", "mrpc", TWO, glue.TASKS["mrpc"])
    flags = ("--task", "mrpc", "--data_dir", tmp_path / "data", "--num_train_epochs", 3, "--use_cpu", "True")
    flags += ("--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 2, "--output_dir")
    run(run_glue, *flags, tmp_path / "whole")

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(TrainerInOrder, "training_step", interrupted_after(5))
        run(run_glue, *flags, tmp_path / "parts")
    assert not (tmp_path / "parts" / "mrpc" / "seed-42" / "results.json").exists()
    run(run_glue, *flags, tmp_path / "parts")
    whole, parts = (weights(tmp_path / name / "mrpc" / "seed-42") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=0)


def test_a_finished_task_is_not_run_again_and_another_run_is_refused(run, tmp_path, monkeypatch, capsys):
    write_task(tmp_path / "data", "sst2", GLUE["sst2"], glue.TASKS["sst2"])
    flags = ("--task", "sst2", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *FEW)
    run(run_glue, *flags)
    table = (tmp_path / "out" / "results.md").read_text()

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(TrainerInOrder, "train", never)
    run(run_glue, *flags)
    assert (tmp_path / "out" / "results.md").read_text() == table
    run(run_glue, *flags, "--do_predict")  # the finished model predicts, without training
    assert (tmp_path / "out" / "submission-seed-42" / "SST-2.tsv").exists()
    with pytest.raises(SystemExit):
        run(run_glue, *flags, "--learning_rate", "1e-3")
    assert "holds another run (learning_rate: 0.0005 -> 0.001)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--metric_for_best_model", "f1"), "--metric_for_best_model must be one of loss, accuracy; got f1"),
        (("--resume_from_checkpoint", "not/there"), "--resume_from_checkpoint not/there is not a checkpoint"),
    ],
)
def test_what_the_trainer_would_look_for_in_vain_is_said_before_training(run, tmp_path, capsys, extra, message):
    write_task(tmp_path / "data", "sst2", GLUE["sst2"], glue.TASKS["sst2"])
    flags = ("--task", "sst2", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *FEW)
    with pytest.raises(SystemExit):
        run(run_glue, *flags, *extra)
    assert message in capsys.readouterr().err


def test_a_finished_run_is_of_its_rows(run, tmp_path):
    rows = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(10)]
    first, other = write_csv(tmp_path / "first.csv", rows), write_csv(tmp_path / "other.csv", rows[1:])
    flags = ("--validation_file", first, "--output_dir", tmp_path / "out", "--do_predict", *FEW)
    run(classify.main, "--train_file", first, "--test_file", first, *flags)
    folder = tmp_path / "out" / "seed-42"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    run(classify.main, "--train_file", first, "--test_file", other, *flags)  # only the test rows are others
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert len(json.loads((folder / "predictions-test.json").read_text())["predictions"]) == 9
    with pytest.raises(SystemExit):
        run(classify.main, "--train_file", other, "--test_file", first, *flags)


def test_what_was_not_asked_for_before_is_done_when_it_is(run, tmp_path, capsys):
    write_task(tmp_path / "data", "sst2", GLUE["sst2"], glue.TASKS["sst2"])
    flags = ("--task", "sst2", "--data_dir", tmp_path / "data", *FEW, "--output_dir")
    run(run_glue, *flags, tmp_path / "out", "--do_eval", "False")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["summary"] == []
    run(run_glue, *flags, tmp_path / "out")
    assert [row["metric"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["summary"]] == [
        "accuracy"
    ]
    run(run_glue, *flags, tmp_path / "untrained", "--do_train", "False")
    run(run_glue, *flags, tmp_path / "untrained", "--do_train", "False", "--do_predict")
    with pytest.raises(SystemExit):
        run(run_glue, *flags, tmp_path / "untrained")
    assert "holds another run (do_train: False -> True" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_predictions_keep_the_order_of_rows(run, tmp_path, strategy):
    """The stock Trainer shuffles evaluation too when it groups by length: MultiRC's answers would be others' rows'."""
    rows = [{**TWO, "sentence1": "word " * (1 + 7 * number % 13), "label": float(number % 5)} for number in range(13)]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / "stsb", split, rows)
    flags = ("--task", "stsb", "--data_dir", tmp_path / "data", *FEW, "--train_sampling_strategy", strategy)
    run(run_glue, *flags, "--do_predict", "--output_dir", tmp_path / "out")
    folder = tmp_path / "out" / "stsb" / "seed-42"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        alone = [
            model(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits.item() for row in rows
        ]
    assert len({round(value, 5) for value in alone}) > 6
    assert json.loads((folder / "predictions-test.json").read_text())["predictions"] == pytest.approx(alone, abs=1e-5)


def test_an_adapter_is_not_trained_further_by_mistake(run, tmp_path, capsys):
    write_task(tmp_path / "data", "sst2", GLUE["sst2"], glue.TASKS["sst2"])
    flags = ("--task", "sst2", "--data_dir", tmp_path / "data", *FEW, "--output_dir")
    run(run_glue, *flags, tmp_path / "first", "--lora_r", 2)
    adapter = tmp_path / "first" / "sst2" / "seed-42"
    with pytest.raises(SystemExit):
        run(run_glue, *flags, tmp_path / "second", model=adapter)
    assert "is an adapter, which is not trained further" in capsys.readouterr().err
    run(run_glue, *flags, tmp_path / "third", "--do_train", "False", model=adapter)  # but it can be evaluated
    first, third = (
        json.loads((tmp_path / name / "results.json").read_text())["summary"] for name in ("first", "third")
    )
    assert [row["mean"] for row in first] == [row["mean"] for row in third]


def test_the_previous_model_leaves_memory_before_the_next(run, tmp_path):
    import gc
    import weakref

    from modeling_gemma_encoder.finetuning import run as runs

    write_task(tmp_path / "data", "sst2", GLUE["sst2"], glue.TASKS["sst2"])
    alive, build = [], runs.build

    def remember(*args):
        assert not any(model() is not None for model in alive)
        model = build(*args)
        alive.append(weakref.ref(model))
        return model

    gc.disable()
    runs.build = remember
    try:
        flags = ("--task", "sst2", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--seeds", 1, 2)
        run(run_glue, *flags, *FEW)
    finally:
        runs.build = build
        gc.enable()
    assert len(alive) == 2


def test_seeds_differ_and_are_averaged(run, tmp_path):
    write_task(tmp_path / "data", "stsb", TWO, glue.TASKS["stsb"])
    flags = ("--task", "stsb", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--seeds", 1, 2)
    run(run_glue, *flags, *FEW)
    first, second = (weights(tmp_path / "out" / "stsb" / f"seed-{seed}") for seed in (1, 2))
    assert not torch.equal(first["classifier.out_proj.weight"], second["classifier.out_proj.weight"])
    row = json.loads((tmp_path / "out" / "results.json").read_text())["summary"][0]
    assert row["seeds"] == [1, 2]
    assert row["mean"] == pytest.approx(sum(row["scores"]) / 2)


def test_the_summary_is_that_of_a_calculator():
    runs = [
        {"task": "a", "seed": 1, "scores": {"validation": {"f1": 0.5, "accuracy": 0.7}}, "majority": {}},
        {"task": "a", "seed": 2, "scores": {"validation": {"f1": 0.7, "accuracy": 0.9}}, "majority": {}},
        {
            "task": "b",
            "seed": 1,
            "scores": {"validation": {"accuracy": 0.4}},
            "majority": {"validation": {"accuracy": 0.3}},
        },
    ]
    summary = summarize(runs)
    assert [row["mean"] for row in summary] == pytest.approx([0.6, 0.8, 0.4])
    assert summary[0]["deviation"] == pytest.approx(0.02**0.5)  # sqrt((0.1^2 + 0.1^2) / 1)
    assert summary[2]["deviation"] is None
    assert average(summary, {"a": ("validation",), "b": ("validation",)}) == pytest.approx((0.7 + 0.4) / 2)
    assert "| b | validation | accuracy | 30.0 | 40.0 |" in markdown(summary)
    sources = {("b", "validation"): {"data": "other.csv"}}
    assert "| b | validation: other.csv | accuracy | 30.0 | 40.0 |" in markdown(summary, sources)


@pytest.mark.parametrize(
    ("problems", "head"),
    [
        (["single_label_classification"], "majority"),
        (["regression"], "training mean"),
        (["regression", "single_label_classification"], "majority or training mean"),
        ([None], "majority"),  # of a run that is older
    ],
)
def test_who_guesses_a_number_says_the_training_mean(problems, head):
    guessed = {"validation": {"score": 0.25}}
    runs = [
        {"task": f"task {n}", "problem": problem, "seed": 1, "scores": {"validation": {"score": 0.5}}}
        for n, problem in enumerate(problems)
    ]
    lines = markdown(summarize([{**run, "majority": guessed} for run in runs])).splitlines()
    assert lines[0] == f"| task | split | metric x 100 | {head} | Gemma Encoder, seed 1 |"
    assert lines[2] == "| task 0 | validation | score | 25.0 | 50.0 |"


def test_rows_without_scores_are_said_to_be_read(tmp_path):
    lines = without_scores([{"task": "x", "seed": 1, "rows": {"train": 1200, "test": 34}}]).splitlines()
    assert lines[2:] == [
        "| x | 1 | train | 1,200 | trained on |",
        "| x | 1 | test | 34 | predicted, not scored: labels are missing |",
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "Results are"),
        (("model-00001-of-00002.safetensors",), "Models and results are"),
        (("learning_curve.png", "adapter_model.safetensors"), "Models, plots and results are"),
        (("predictions-validation.png", "predictions-test.json"), "Plots and results are"),
    ],
)
def test_the_end_names_only_what_there_is(tmp_path, files, said):
    for folder in ("seed-1", "seed-2"):
        (tmp_path / folder).mkdir()
    for name in files:
        (tmp_path / "seed-2" / name).touch()
    assert left_by([tmp_path / "seed-1", tmp_path / "seed-2"]) == said


@pytest.mark.parametrize(
    ("history", "drawn"),
    [
        ([{"step": 1, "loss": 0.7}], False),
        ([{"step": 1, "loss": 0.7}, {"step": 1, "eval_loss": 0.6, "eval_accuracy": 0.5}], False),
        ([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}], True),
        ([{"step": n, "eval_loss": 0.6, "eval_accuracy": 0.5} for n in (1, 2)], True),
        ([], False),
    ],
)
def test_a_curve_has_more_than_one_point(tmp_path, history, drawn):
    report = {"task": "x", "seed": 1, "scores": {"validation": {"accuracy": 0.5}}, "history": history}
    plot_run(glue.TASKS["sst2"], report, {}, tmp_path)
    assert (tmp_path / "learning_curve.png").exists() == drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "sst3"), "--task must be one of cola, .*, all; got sst3"),
        (("--task", "sst2", "--lora_alpha", 3), "need --lora_r"),
        (("--task", "sst2", "--load_in_4bit"), "--load_in_4bit needs --lora_r"),
        (("--task", "sst2", "--dtype", "bfloat16", "--force_bf16"), "--dtype bfloat16 needs --lora_r"),
        (("--task", "sst2", "--max_length", 0), "--max_length must be at least 1, got 0"),
        (("--task", "cola"), "cola: there is no folder .*/cola; folders in .*: .*sst2"),
        (("--task", "sst2", "--do_predict"), "sst2: .*test.jsonl does not exist"),
        (
            ("--task", "sst2", "--output_dir", "{data}/sst2/train.jsonl"),
            "--output_dir .* cannot be written: File exists",
        ),
        (("--task", "sst2", "--max_length", 2), "--max_length 2 leaves no room"),
        (("--task", "sst2", "--list_chunk_size", 4), "are for tasks that choose among candidates"),
        (("--label_smoothing_factor", 0.1, "--task", "stsb"), "factor 0.1 is for tasks with one .* this is regression"),
        (("--task", "sst2", "--lora_r", 2, "--lora_target_modules", "foo"), "has no layers named foo"),
        (("--task", "sst2", "--pooling", "kv_probe", "--pooling_num_heads", 3), "pooling_num_heads"),
        (("--task", "sst2", "--attention", "sideways"), "invalid choice: 'sideways'"),
        (("--task", "sst2", "--attn_implementation", "sdpa"), "cannot soft-cap attention scores, as Gemma 2 does"),
        (("--task", "sst2", "--attn_implementation", "flashy"), '"flashy". is not supported'),
        (("--task", "sst2", "--attn_implementation", "flex_attention"), "cannot drop attention weights here"),
        (
            ("--task", "sst2", "--attn_implementation", "gemma_encoder_fused", "--attention_dropout", 0),
            "trains on a GPU only",
        ),
        (("--task", "sst2", "--classifier_activation", "relu"), "is of --classifier_hidden_sizes, and there are none"),
        (("--task", "sst2", "--classifier_activation", "gelo"), "classifier_activation"),
        (("--task", "sst2", "--batch_eval_metrics"), "leave no predictions to score"),
        (
            ("--task", "sst2", "--seeds", 1, 2, "--resume_from_checkpoint", "x"),
            "--resume_from_checkpoint is of one run",
        ),
    ],
)
def test_bad_command_lines_end_before_any_training(run, tmp_path, capsys, arguments, message, monkeypatch):
    rows = [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}]
    for split in ("train", "validation"):
        write_rows(tmp_path / "sst2", split, rows)
    monkeypatch.setattr(TrainerInOrder, "train", None)
    arguments = [str(argument).replace("{data}", str(tmp_path)) for argument in arguments]
    with pytest.raises(SystemExit):
        run(run_glue, "--data_dir", tmp_path, "--output_dir", tmp_path / "out", *arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("script", [run_superglue, msmarco.main], ids=["superglue", "msmarco"])
def test_label_smoothing_of_rankings_is_refused(run, tmp_path, capsys, script):
    flags = ("--label_smoothing_factor", 0.1, "--output_dir", tmp_path / "out")
    flags += ("--task", "copa") if script is run_superglue else ("--train_data", tmp_path / "pairs.csv")
    with pytest.raises(SystemExit):
        run(script, *flags)
    assert (
        "--label_smoothing_factor 0.1 is for tasks with one class a row, and this is ranking" in capsys.readouterr().err
    )


def test_a_checkpoint_that_is_not_there_is_named(run, tmp_path, capsys, monkeypatch):
    for name in (tmp_path / "nowhere", "runs/glue/sst2/seed-1", "nowhere/", "my-encodr"):
        with pytest.raises(SystemExit):
            run(run_glue, "--task", "sst2", "--data_dir", tmp_path, model=name)
        assert capsys.readouterr().err.endswith(f"error: --model: there is no folder {name}\n")
    run_each = {run_glue: ["--task", "sst2"], rerank.main: ["--query", "q", "--passages", "p"]}
    for main, flags in run_each.items():  # this may be a repository; the Hub cannot be asked here
        with pytest.raises(SystemExit):
            monkeypatch.setattr(sys, "argv", ["script", "--model", "runs/nothing", *flags])
            main()
        said = capsys.readouterr().err
        assert "there is no folder runs/nothing here, and from the Hub: " in said and said.count("\n") == 1
    with pytest.raises(SystemExit):
        run(run_glue, "--task", "sst2", model="google/gemma-3-270m")
    assert capsys.readouterr().err.endswith("`make gemma` writes Gemma 3 270M to gemma-3-270m.\n")


def test_a_data_folder_that_is_not_there_is_named(run, tmp_path, capsys):
    (tmp_path / "rte").mkdir()
    for flags, message in (
        (["--data_dir", tmp_path / "nowhere"], f"--data_dir: there is no folder {tmp_path / 'nowhere'}"),
        (["--data_dir", tmp_path], f"sst2: there is no folder {tmp_path / 'sst2'}; folders in {tmp_path}: rte."),
    ):
        with pytest.raises(SystemExit):
            run(run_glue, "--task", "sst2", *flags)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_other_suites_data_names_its_script(run, tmp_path, capsys, suffix):
    for columns in (("sentence1", "sentence2"), ("premise", "hypothesis")):
        folder = tmp_path / columns[0] / "rte"
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            row = {**dict.fromkeys(columns, "a"), "label": 0}
            text = json.dumps(row) if suffix == "jsonl" else ",".join(row) + "\n" + ",".join(map(str, row.values()))
            (folder / f"{split}.{suffix}").write_text(text + "\n")
    for script, columns, other in (
        (run_glue, ("premise", "hypothesis"), "superglue.py"),
        (run_superglue, ("sentence1", "sentence2"), "glue.py"),
    ):
        with pytest.raises(SystemExit):
            run(script, "--task", "rte", "--data_dir", tmp_path / columns[0])
        place = tmp_path / columns[0] / "rte"
        said = f"error: rte: {place} has the columns {', '.join(columns)}, as {other} reads rte.\n"
        assert capsys.readouterr().err.endswith(said)


def test_the_other_suites_tasks_are_named(run, capsys):
    for script, task, other in ((run_glue, "cb", "superglue.py"), (run_superglue, "cola", "glue.py")):
        with pytest.raises(SystemExit):
            run(script, "--task", task)
        assert capsys.readouterr().err.endswith(f", all; got {task}, which {other} has.\n")
    assert glue.SUPERGLUE.keys() == superglue.TASKS.keys()
    assert superglue.GLUE.keys() == glue.TASKS.keys()
    assert glue.SUPERGLUE["rte"].texts == superglue.TASKS["rte"].texts
    assert superglue.GLUE["rte"].texts == glue.TASKS["rte"].texts


def test_a_misspelt_flag_is_named_before_one_that_is_missing(run, capsys):
    with pytest.raises(SystemExit):
        run(run_glue, "--taks", "sst2")
    assert "unrecognized arguments: --taks. Did you mean --task?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(run_glue)
    assert "the following arguments are required: --task" in capsys.readouterr().err


def test_options_that_are_not_given_are_the_checkpoints(run, tmp_path):
    """A model that was trained causal is evaluated causal, whatever the config's defaults are."""
    assert {"attention", "pooling", "attention_dropout", "feedforward_dropout"} <= ENCODER_OPTIONS
    assert all(getattr(FineTuningArguments(model="x"), name) is None for name in ENCODER_OPTIONS)
    write_task(tmp_path / "data", "stsb", TWO, glue.TASKS["stsb"])
    flags = ("--task", "stsb", "--data_dir", tmp_path / "data", *FEW, "--output_dir")
    run(run_glue, *flags, tmp_path / "first", "--attention", "causal", "--pooling", "last_k")
    folder = tmp_path / "first" / "stsb" / "seed-42"
    run(run_glue, *flags, tmp_path / "second", "--do_train", "False", "--do_predict", model=folder)
    run(run_glue, *flags, tmp_path / "first", "--attention", "causal", "--pooling", "last_k", "--do_predict")
    first, second = (
        json.loads((tmp_path / name / "stsb" / "seed-42" / "predictions-test.json").read_text())["predictions"]
        for name in ("first", "second")
    )
    assert first == pytest.approx(second, abs=1e-6)


def test_the_head_and_what_computes_attention_are_as_asked_for(run, tmp_path, monkeypatch):
    seen = []
    train = TrainerInOrder.train
    monkeypatch.setattr(
        TrainerInOrder, "train", lambda self, **options: (seen.append(self.model), train(self, **options))[1]
    )
    write_task(tmp_path / "data", "stsb", TWO, glue.TASKS["stsb"])
    flags = ("--task", "stsb", "--data_dir", tmp_path / "data", *FEW, "--output_dir")
    head = ("--classifier_hidden_sizes", 8, "--classifier_activation", "relu")
    run(run_glue, *flags, tmp_path / "out", *head, "--attn_implementation", "eager", "--attention_dropout", 0.0)
    (model,) = seen
    assert {model.config._attn_implementation, model.model.config._attn_implementation} == {"eager"}
    assert any(isinstance(module, torch.nn.ReLU) for module in model.modules())
    folder = tmp_path / "out" / "stsb" / "seed-42"
    assert GemmaEncoderConfig.from_pretrained(folder).classifier_activation == "relu"
    assert "eager" not in (folder / "config.json").read_text()  # of this run, and not of the model
    run(run_glue, *flags, tmp_path / "out", *head, "--attention_dropout", 0.0, "--do_predict")  # nor of what it found
    assert (folder / "predictions-test.json").exists() and len(seen) == 1
    assert json.loads((folder / "results.json").read_text())["rows"].keys() == {"train", "validation", "test"}


def test_a_head_for_other_classes_is_replaced_only_when_asked(run, tmp_path, capsys):
    write_task(tmp_path / "data", "sst2", GLUE["sst2"], glue.TASKS["sst2"])
    write_task(tmp_path / "data", "mnli", NLI, glue.TASKS["mnli"])
    flags = ("--data_dir", tmp_path / "data", *FEW, "--output_dir", tmp_path / "out")
    run(run_glue, "--task", "mnli", *flags)
    folder = tmp_path / "out" / "mnli" / "seed-42"
    with pytest.raises(SystemExit):
        run(run_glue, "--task", "sst2", *flags, model=folder)
    assert "has a head with 3 outputs, the task needs 2" in capsys.readouterr().err
    run(run_glue, "--task", "sst2", *flags, "--ignore_mismatched_sizes", model=folder)


def test_the_table_is_of_all_finished_tasks_in_the_folder(run, tmp_path):
    for name in ("sst2", "stsb"):
        write_task(tmp_path / "data", name, GLUE[name], glue.TASKS[name])
        run(run_glue, "--task", name, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *FEW)
    summary = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert {row["task"] for row in summary} == {"sst2", "stsb"}
    assert "Average of 2 tasks" in (tmp_path / "out" / "results.md").read_text()


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_users_csv_keeps_its_label_names(run, tmp_path):
    rows = [{"review": f"text {n}", "stars": (1, 3, 5)[n % 3]} for n in range(12)]
    train, test = write_csv(tmp_path / "train.csv", rows), write_csv(tmp_path / "test.csv", rows[:4])
    flags = ("--train_file", train, "--test_file", test, "--text_column", "review", "--label_column", "stars")
    run(classify.main, *flags, "--do_predict", "--output_dir", tmp_path / "out", *FEW)
    folder = tmp_path / "out" / "seed-42"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "1", 1: "3", 2: "5"}
    assert json.loads((folder / "results.json").read_text())["task"] == "train.csv"  # as tables and cards name it
    with (folder / "predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    assert [row["review"] for row in predictions] == ["text 0", "text 1", "text 2", "text 3"]
    assert {row["prediction"] for row in predictions} <= {"1", "3", "5"}
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in predictions)
    assert [row["stars"] for row in predictions] == ["1", "3", "5", "1"]  # as the user wrote them


def test_several_columns_of_flags_are_several_labels_a_row(run, tmp_path):
    rows = [{"text": f"text {n}", "toxic": n % 2, "insult": int(n % 3 == 0)} for n in range(10)]
    train = write_csv(tmp_path / "train.csv", rows)
    flags = ("--train_file", train, "--validation_file", train, "--label_column", "toxic", "insult")
    run(classify.main, *flags, "--output_dir", tmp_path / "out", *FEW)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "seed-42")
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.id2label == {0: "toxic", 1: "insult"}


def test_fractions_are_regression_and_lists_are_several_labels(tmp_path):
    write_rows(tmp_path, "numbers", [{"text": "a", "label": 0.5}, {"text": "b", "label": 2.0}])
    write_rows(tmp_path, "lists", [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}])
    write_rows(tmp_path, "minus", [{"text": "a", "label": -1}, {"text": "b", "label": 1}, {"text": "c", "label": 0}])

    def table(name):
        return own_table.Table(own_table.TableArguments(train_file=str(tmp_path / f"{name}.jsonl")))

    assert (table("numbers").problem, table("numbers").names) == ("regression", [])
    assert (table("lists").problem, table("lists").names) == ("multi_label_classification", ["x", "y"])
    assert set(table("minus").names) == {"-1", "0", "1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --train_file or --dataset"),
        (("--train_file", "{}/train.csv", "--label_column", "stars"), "has no column stars; it has text, label"),
        (("--train_file", "{}/train.csv", "--text_column", "body"), "has no column 'body'"),
        (("--train_file", "{}/absent.csv"), "absent.csv does not exist"),
        (("--train_file", "{}/train.csv", "--do_predict"), "--do_predict needs --test_file"),
        (("--train_file", "{}/train.csv", "--text_column", "a", "b", "c"), "one or two columns, got a, b, c"),
        (("--train_file", "{}/one.csv"), "'label' holds nothing but 'a'"),
        (("--train_file", "{}/null.jsonl"), "null.jsonl: 'text' is empty in every row"),
        (("--train_file", "{}/train.csv", "--template", "{first}"), "must contain {first} and {second}"),
        (
            ("--train_file", "{}/train.csv", "--test_file", "{}/taken.csv", "--do_predict"),
            "column 'prediction' already",
        ),
        (("--train_file", "{}/list.jsonl", "--problem", "single_label_classification"), "holds lists"),
    ],
)
def test_a_table_that_is_not_as_the_command_line_says_is_refused(run, tmp_path, capsys, arguments, message):
    write_csv(tmp_path / "train.csv", [{"text": f"a {n}", "label": n % 2} for n in range(10)])
    write_csv(tmp_path / "taken.csv", [{"text": f"a {n}", "prediction": n % 2} for n in range(10)])
    write_csv(tmp_path / "one.csv", [{"text": f"a {n}", "label": "a"} for n in range(10)])
    write_rows(tmp_path, "null", [{"text": None, "label": n % 2} for n in range(10)])
    write_rows(tmp_path, "list", [{"text": "a", "label": ["x", "y"]}])
    with pytest.raises(SystemExit):
        arguments = [argument.replace("{}", str(tmp_path)) for argument in arguments]
        run(classify.main, "--output_dir", tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err


def test_real_tokens_count_no_padding(run, tmp_path):
    rows = [{"sentence": "word " * (1 + 10 * (number % 2)), "label": number % 2} for number in range(4)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / "sst2", split, rows)
    flags = ("--task", "sst2", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out")
    run(run_glue, *flags, "--max_steps", 1, "--per_device_train_batch_size", 4, "--use_cpu", "True")
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokens = sum(len(tokenizer(row["sentence"])["input_ids"]) for row in rows)
    report = json.loads((tmp_path / "out" / "sst2" / "seed-42" / "results.json").read_text())
    assert report["history"][-1]["num_input_tokens_seen"] == tokens
    assert report["real_tokens_per_second"] > 0


def test_frozen_embeddings_do_not_change(run, tmp_path, decoder):
    write_task(tmp_path / "data", "sst2", GLUE["sst2"], glue.TASKS["sst2"])
    flags = ("--task", "sst2", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *FEW)
    run(run_glue, *flags, "--max_steps", 3, "--freeze_embeddings")
    before, after = weights(decoder), weights(tmp_path / "out" / "sst2" / "seed-42")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(before[name], after[name])


@pytest.mark.parametrize("extra", [(), ("--load_in_4bit",)], ids=["lora", "qlora"])
def test_adapters_train_resume_and_reload_from_the_command_line(run, tmp_path, monkeypatch, decoder, extra):
    if extra:
        pytest.importorskip("bitsandbytes")
    write_task(tmp_path / "data", "mrpc", TWO, glue.TASKS["mrpc"])
    flags = ("--task", "mrpc", "--data_dir", tmp_path / "data", "--max_steps", 4, "--save_strategy", "steps")
    flags += ("--save_steps", 2, "--per_device_train_batch_size", 2, "--lora_r", 4, "--pooling", "query_probe")
    flags += ("--use_cpu", "True", *extra, "--output_dir", tmp_path / "out")

    model = NANO if extra else decoder  # 4-bit blocks are larger than the tiny decoder's layers

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(TrainerInOrder, "training_step", interrupted_after(3))
        run(run_glue, *flags, model=model)
    run(run_glue, *flags, "--do_predict", model=model)
    folder = tmp_path / "out" / "mrpc" / "seed-42"
    report = json.loads((folder / "results.json").read_text())
    assert report["steps"] == 4
    assert report["parameters"]["trained"] < report["parameters"]["all"] / 2
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([TWO["sentence1"]] * 3, [TWO["sentence2"]] * 3, padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(-1).tolist()
    assert predicted == json.loads((folder / "predictions-test.json").read_text())["predictions"]


def test_help_does_not_show_defaults_that_are_not(monkeypatch, capsys):
    """The Trainer's own learning rate is not what a run has that says nothing."""
    monkeypatch.setattr(sys, "argv", ["glue.py", "--help"])
    with pytest.raises(SystemExit):
        run_glue()
    written = capsys.readouterr().out
    said = " ".join(written.split())
    own, _, upstreams = written.partition("options of transformers' TrainingArguments:")
    flags = {*map(str, re.findall(r"^  --(\w+)", own, re.MULTILINE))}
    assert {"task", "data_dir", "seeds", "model", "pooling", "lora_r", "config", "force_bf16"} <= flags
    assert not flags & TrainingArguments.__dataclass_fields__.keys()
    assert {"output_dir", "learning_rate"} <= {*re.findall(r"^  --(\w+)", upstreams, re.MULTILINE)}
    assert "(default: by the size of --model)" in said and "5e-05" not in said and said.count("the task's)") == 3
