"""What a run leaves in its folder: predictions and scores of each split, a description of the
training, and plots."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, Trainer

from .._scripts.files import write
from .._scripts.provenance import provenance
from ..callbacks import StepTimer
from .data import Data
from .reports import plot_run
from .tasks import Task, most_frequent, predictions_of


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts for each split, and how good that is.

    Args:
        scores: The metrics of the splits that have labels.
        majority: The same metrics of the most frequent training label.
    """

    predictions: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]
    scores: dict[str, dict[str, float]]
    majority: dict[str, dict[str, float]]


def evaluate(task: Task, data: Data, trainer: Trainer) -> Evaluation:
    """Predict every split, and score those that have labels."""
    trainer.compute_metrics = None  # it scores the first split's rows, and not those of the others
    found = Evaluation({}, {}, {}, {})
    for split, rows in {**data.validation, **data.test}.items():
        output = trainer.predict(data.encoded[split], metric_key_prefix=split)
        found.logits[split] = output.predictions
        found.predictions[split] = predictions_of(task, output.predictions, output.label_ids)
        if "label" in task.read(rows[0]):
            found.scores[split] = task.metric(found.predictions[split], rows)
            if data.train:
                found.majority[split] = task.metric(most_frequent(task, data.train, rows), rows)
    return found


def describe(data: Data, trainer: Trainer, model: PreTrainedModel, timer: StepTimer) -> dict:
    """Return the size, the speed and the course of a training."""
    # DeepSpeed leaves a part of each parameter on a device, and says how large the whole is.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {
        "rows": {split: len(rows) for split, rows in data.encoded.items()},
        "cut": {split: float(np.mean(rows["cut"])) for split, rows in data.encoded.items()},
        "max_length": data.max_length,
        "steps": trainer.state.global_step,
        "learning_rate": trainer.args.learning_rate,
        "real_tokens_per_second": timer.real_tokens_per_second(),
        "parameters": {"all": sum(size for size, _ in sizes), "trained": sum(size for size, free in sizes if free)},
        "history": trainer.state.log_history,
        **provenance(),
    }


def write_results(task: Task, data: Data, report: dict, evaluation: Evaluation, folder: Path) -> None:
    """Write predictions, plots and, last, `results.json` into the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, predicted in evaluation.predictions.items():
        found = {"predictions": predicted.tolist(), "logits": evaluation.logits[split].tolist()}
        write(folder / f"predictions-{split}.json", json.dumps(found))
    validated = {split: (evaluation.predictions[split], rows) for split, rows in data.validation.items()}
    plot_run(task, report, validated, folder)
    write(folder / "results.json", json.dumps(report, indent=2))


def predictions(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the predictions and logits of a split of a finished run, in the order of its rows."""
    found = json.loads((folder / f"predictions-{split}.json").read_text())
    return np.array(found["predictions"]), np.array(found["logits"])
