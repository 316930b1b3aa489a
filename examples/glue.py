"""Fine-tune a Gemma Encoder on tasks of GLUE (arXiv 1804.07461).

    python examples/glue.py --task sst2 --model google/gemma-3-270m
    python examples/glue.py --task all --model google/gemma-3-1b-pt --lora_r 16 --bf16 --seeds 1 2 3 --do_predict
    accelerate launch examples/glue.py --task mnli ax --model google/gemma-2-2b --bf16 --gradient_checkpointing
    python examples/glue.py --task cola mrpc --model examples/nano --data_dir glue        # glue/cola/train.jsonl ...

The data is `nyu-mll/glue` on the Hub, or what is in `--data_dir`. A task is a row of the table
`TASKS` in `modeling_gemma_encoder/finetuning/glue.py`: add a row to train on a task of your own.

Every flag of `TrainingArguments` works, and `--help` lists them all. The defaults depend on the
size of the decoder: see `LEARNING_RATES` in `modeling_gemma_encoder/finetuning/arguments.py`.

Each run has a folder `<output_dir>/<task>/seed-<n>` with the model, `results.json` and plots. The
same command again resumes what was interrupted and skips what is finished. `--do_predict` writes
test predictions as the GLUE server wants them to `<output_dir>/submission-seed-<n>`.
"""

import numpy as np
from datasets import Dataset

from modeling_gemma_encoder.finetuning.glue import TASKS, UNSCORED
from modeling_gemma_encoder.finetuning.suite import Suite, run_suite
from modeling_gemma_encoder.finetuning.superglue import TASKS as SUPERGLUE
from modeling_gemma_encoder.finetuning.tasks import Task

# 1. Say how the test server calls its files, by task or by task and split, and which tasks it wants labels of in words.
FILES = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "qnli": "QNLI", "rte": "RTE"}
FILES |= {"wnli": "WNLI", "ax": "AX", ("mnli", "test_matched"): "MNLI-m", ("mnli", "test_mismatched"): "MNLI-mm"}
WORDS = ("mnli", "qnli", "rte", "ax")


# 2. Write test predictions as https://gluebenchmark.com/faq describes them.
def submission(name: str, task: Task, split: str, rows: Dataset, predictions: np.ndarray) -> tuple[str, str]:
    """Return the name and the text of the file to submit for a split."""
    if task.problem == "regression":
        answers = [f"{value:.3f}" for value in predictions.clip(0, 5)]
    else:
        answers = [task.labels[value] if name in WORDS else str(value) for value in predictions]
    indices = rows["idx"] if "idx" in rows.column_names else range(len(rows))
    lines = [f"{index}\t{answer}" for index, answer in zip(indices, answers, strict=True)]
    return f"{FILES.get(name) or FILES[name, split]}.tsv", "\n".join(["index\tprediction", *lines])


# 3. Train, evaluate and predict what the command line says. Data of SuperGLUE is answered with the script for it.
SUITE = Suite(TASKS, "nyu-mll/glue", submission, UNSCORED, other_script="superglue.py", other_tasks=SUPERGLUE)

if __name__ == "__main__":
    run_suite(SUITE, "runs/glue", __doc__)
