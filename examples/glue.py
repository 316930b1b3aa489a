"""Fine-tunes a Gemma Encoder on tasks of GLUE (arXiv 1804.07461), or on your own: a task is a row of a table, `TASKS`
in `modeling_gemma_encoder/finetuning/glue.py`.

    python examples/glue.py --task sst2 --model google/gemma-3-270m
    python examples/glue.py --task all --model google/gemma-3-1b-pt --lora_r 16 --bf16 --seeds 1 2 3 --do_predict
    accelerate launch examples/glue.py --task mnli ax --model google/gemma-2-2b --bf16 --gradient_checkpointing
    python examples/glue.py --task cola mrpc --model examples/nano --data_dir glue        # glue/cola/train.jsonl ...

Data: `nyu-mll/glue` on the Hub, or `--data_dir`. Every flag of `TrainingArguments` works; `--help` shows them, and
`LEARNING_RATES` in `modeling_gemma_encoder/finetuning/arguments.py` has the defaults by the size of the decoder. Each
run has a folder `<output_dir>/<task>/seed-<n>` with the model, `results.json` and plots; the same command again resumes
what was interrupted and skips what is finished. `--do_predict` leaves test predictions as the GLUE server wants them
in `<output_dir>/submission-seed-<n>`.
"""

import numpy as np
from datasets import Dataset

from modeling_gemma_encoder.finetuning.glue import BOTH, TASKS, UNSCORED
from modeling_gemma_encoder.finetuning.suite import run_suite
from modeling_gemma_encoder.finetuning.tasks import Task

# The server's files: by task and split, and the tasks whose labels are words.
FILES = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "qnli": "QNLI", "rte": "RTE"}
FILES |= {"wnli": "WNLI", "ax": "AX", ("mnli", "test_matched"): "MNLI-m", ("mnli", "test_mismatched"): "MNLI-mm"}
WORDS = ("mnli", "qnli", "rte", "ax")

# What `superglue.py` reads, a name of a task of its own each, or other columns of one that is called the same.
SUPERGLUE = dict.fromkeys(("boolq", "cb", "copa", "multirc", "record", "wic", "wsc", "axb", "axg"), ())
SUPERGLUE |= {"rte": BOTH}


def submission(name: str, task: Task, split: str, rows: Dataset, predictions: np.ndarray) -> tuple[str, str]:
    """File name and text, as https://gluebenchmark.com/faq describes them."""
    if task.problem == "regression":
        answers = [f"{value:.3f}" for value in predictions.clip(0, 5)]
    else:
        answers = [task.labels[value] if name in WORDS else str(value) for value in predictions]
    indices = rows["idx"] if "idx" in rows.column_names else range(len(rows))
    lines = [f"{index}\t{answer}" for index, answer in zip(indices, answers, strict=True)]
    return f"{FILES.get(name) or FILES[name, split]}.tsv", "\n".join(["index\tprediction", *lines])


if __name__ == "__main__":
    run_suite(TASKS, "nyu-mll/glue", "runs/glue", submission, UNSCORED, __doc__, ("superglue.py", SUPERGLUE))
