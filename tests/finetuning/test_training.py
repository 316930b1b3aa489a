"""Laws of the stock Trainer: batch size and accumulation never change a step, and training learns."""

import numpy as np
import pytest
import torch
from helpers import build, encoder_config, pad, texts
from matplotlib.axes import Axes
from transformers import Trainer, TrainingArguments

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder._scripts.training import mean_losses, plot_losses, refuse_another_run, under_fsdp
from modeling_gemma_encoder.callbacks import StepTimer
from modeling_gemma_encoder.finetuning.reports import plot_run

NO_DROPOUT = {"attention_dropout": 0, "feedforward_dropout": 0}
LENGTHS = (9, 3, 5, 7, 2, 8, 4, 6)


def arguments(folder, **fields) -> TrainingArguments:
    defaults = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), **{**defaults, **fields})


def collate_texts(examples):
    return {
        **pad([example["ids"] for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


def collate_lists(examples):
    documents = [ids for example in examples for ids in example["documents"]]
    batch = {name: values.unflatten(0, (len(examples), -1)) for name, values in pad(documents).items()}
    return {**batch, "labels": torch.tensor([example["label"] for example in examples])}


def step(model, data, collate, folder, batch_size, accumulation):
    """The weights after one plain SGD step: their change is the gradient."""
    args = arguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, args, train_dataset=data, data_collator=collate)
    loss = trainer.train().training_loss
    return loss, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


CLASSIFIERS = [
    {"num_labels": 3, "labels": [0, 2, 1, 1, 0, 2, 2, 0]},
    {"num_labels": 3, "labels": [0, -100, -100, -100, 0, 2, -100, 0]},
    {"num_labels": 1, "labels": [0.5, 1.0, -1.0, 2.0, 0.0, 0.1, 3.0, 1.0]},
    {"num_labels": 2, "labels": [[0.0, 1.0], [1.0, 1.0]] * 4},
]


@pytest.mark.parametrize("case", CLASSIFIERS, ids=["single-label", "some-ignored", "regression", "multi-label"])
def test_accumulation_never_changes_a_step_of_a_classifier(case, tmp_path):
    data = [{"ids": ids, "label": label} for ids, label in zip(texts(LENGTHS), case["labels"], strict=True)]
    several = "multi_label_classification" if isinstance(case["labels"][0], list) else None
    config = encoder_config(num_labels=case["num_labels"], problem_type=several, **NO_DROPOUT)
    results = [
        step(build(GemmaEncoderForSequenceClassification, config), data, collate_texts, tmp_path, batch, accumulation)
        for batch, accumulation in ((8, 1), (4, 2), (1, 8))
    ]
    check_same(results, build(GemmaEncoderForSequenceClassification, config))


def test_accumulation_never_changes_a_step_of_a_ranker(tmp_path):
    documents = texts(LENGTHS * 3)
    labels = [[1, 0, 0], [0, 2, 1], [0, 0, 1], [1, 0, -100], [0, 1, 0], [3, 0, 0], [0, 0, 0], [0, 0, 1]]
    data = [{"documents": documents[3 * row : 3 * row + 3], "label": label} for row, label in enumerate(labels)]
    config = encoder_config(**NO_DROPOUT)
    results = [
        step(build(GemmaEncoderForRanking, config), data, collate_lists, tmp_path, batch, accumulation)
        for batch, accumulation in ((8, 1), (4, 2), (1, 8))
    ]
    check_same(results, build(GemmaEncoderForRanking, config))


def check_same(results, start):
    (loss, weights), *others = results
    for other_loss, other_weights in others:
        assert other_loss == pytest.approx(loss, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    moved = {name for name, parameter in start.named_parameters() if not torch.allclose(parameter, weights[name])}
    assert {"model.layers.0.self_attn.q_proj.weight", "classifier.out_proj.weight"} <= moved


def test_the_trainer_trains_evaluates_and_predicts(tmp_path):
    """A text's label is whether its first token is below 50: the loss falls and held-out texts are told apart."""
    torch.manual_seed(0)
    sequences = texts(LENGTHS * 120, seed=1)
    data = [{"ids": ids, "label": int(ids[0] < 50)} for ids in sequences]
    model = GemmaEncoderForSequenceClassification(encoder_config(pooling="first_k", **NO_DROPOUT))

    def accuracy(predictions):
        return {"accuracy": np.mean(predictions.predictions.argmax(-1) == predictions.label_ids)}

    args = arguments(
        tmp_path,
        max_steps=240,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=120,
        gradient_checkpointing=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=data[:800],
        eval_dataset=data[800:],
        data_collator=collate_texts,
        compute_metrics=accuracy,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics and metrics["eval_accuracy"] >= 0.9
    model.verify_attention()


def test_a_run_that_knew_fewer_options_goes_on_with_their_defaults(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 1}')
    now, defaults = {"seed": 1, "lora_dropout": 0.05, "new": [1]}, {"lora_dropout": 0.05}
    refuse_another_run(now, tmp_path, "checkpoint-1", True, defaults)
    with pytest.raises(ValueError, match=r"another run \(lora_dropout: 0.05 -> 0.1\)"):
        refuse_another_run({**now, "lora_dropout": 0.1}, tmp_path, "checkpoint-1", True, defaults)
    with pytest.raises(ValueError, match=r"another run \(seed: 1 -> 2\)"):
        refuse_another_run({**now, "seed": 2}, tmp_path, "checkpoint-1", True, defaults)


@pytest.mark.parametrize("variable", ["false", "true"])
def test_fsdp_is_seen_however_weights_are_loaded(tmp_path, monkeypatch, variable):
    assert not under_fsdp(arguments(tmp_path))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", variable)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert under_fsdp(arguments(tmp_path))


def test_the_trainer_predicts_ragged_lists(tmp_path):
    documents = texts(LENGTHS * 3)
    lists = [{"documents": documents[3 * row : 3 * row + 3], "label": [1, 0, 0]} for row in range(4)]
    lists += [{"documents": documents[12:14], "label": [0, 1]} for _ in range(4)]
    args = arguments(tmp_path, per_device_eval_batch_size=4, remove_unused_columns=False)
    trainer = Trainer(build(GemmaEncoderForRanking, encoder_config()), args, data_collator=collate_lists)
    predictions = trainer.predict(lists)
    assert predictions.predictions.shape == (8, 3) and "test_loss" in predictions.metrics
    assert (predictions.label_ids[4:, 2] == -100).all()


class CountingLoss(torch.nn.Module):
    """A model whose loss of a row is what the row says."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, values, labels=None):
        return {"loss": values.mean() + 0 * self.weight.sum()}


def test_points_of_a_training_curve_are_means_of_equally_many_steps(tmp_path):
    """The loss of step n is n, so the mean over the four steps up to n is n - 1.5."""

    def train(resume=None, **fields):
        fields = {"save_strategy": "steps", "save_steps": 6, "per_device_train_batch_size": 1, **fields}
        fields |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
        data = [{"values": float(n)} for n in range(1, 31)]
        trainer = Trainer(CountingLoss(), arguments(tmp_path, **fields), train_dataset=data, callbacks=[StepTimer()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.log_history

    def points(history):
        return {entry["step"]: pytest.approx(loss) for entry, loss in mean_losses(history)}

    train(max_steps=6, logging_steps=4, logging_first_step=True)  # steps 5 and 6 were not logged when it stopped
    resumed = train(str(tmp_path / "checkpoint-6"), max_steps=22, logging_steps=4)
    assert points(resumed) == {4: 2.5, 12: 10.5, 16: 14.5, 20: 18.5}
    # The last epoch is cut short after 10 of its 30 steps.
    assert points(train(max_steps=70, logging_strategy="epoch")) == {30: 15.5, 60: 15.5}


def test_a_history_that_does_not_say_how_many_steps_is_read_by_its_steps():
    history = [{"step": step, "loss": loss} for step, loss in ((1, 9.0), (10, 4.0), (20, 3.0), (25, 7.0))]
    assert [(entry["step"], loss) for entry, loss in mean_losses(history)] == [(10, 4.5), (20, 3.0)]
    assert mean_losses([{"step": 5, "eval_loss": 1.0}]) == []


def test_plots_have_the_points_of_mean_losses(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *xy, **style: drawn.append(xy) or plot(axes, *xy, **style))
    losses = ((1, 9.0), (10, 4.0), (20, 3.0), (25, 7.0))
    history = [{"step": step, "loss": loss, "num_input_tokens_seen": 100 * step} for step, loss in losses]
    plot_losses(history, [], tmp_path / "training.png")
    report = {"history": history, "task": "a", "seed": 1}
    plot_run(None, report, {}, tmp_path)
    assert drawn == [((1000, 2000), (4.5, 3.0)), ((10, 20), (4.5, 3.0))]
