"""Fine-tune a Gemma Encoder on tasks of SuperGLUE (arXiv 1905.00537).

    python examples/superglue.py --task cb wic --model google/gemma-3-270m
    python examples/superglue.py --task all --model google/gemma-2-2b --lora_r 16 --bf16 --seeds 1 2 3 --do_predict
    python examples/superglue.py --task cb --model examples/nano --data_dir superglue    # superglue/cb/train.jsonl ...

The data is `aps/super_glue` on the Hub, or what is in `--data_dir`. A task is a row of the table
`TASKS` in `modeling_gemma_encoder/finetuning/superglue.py`. Flags and folders are those of
`glue.py`.

The words that a question is about are marked in the text, [ like this ]. COPA and ReCoRD choose
among candidates by the scores of a `GemmaEncoderForRanking`. AX-b and AX-g are scored with the
model of RTE, which is trained first.
"""

import json
from collections import defaultdict

import numpy as np
from datasets import Dataset

from modeling_gemma_encoder.finetuning.glue import TASKS as GLUE
from modeling_gemma_encoder.finetuning.suite import Suite, run_suite
from modeling_gemma_encoder.finetuning.superglue import TASKS, UNSCORED
from modeling_gemma_encoder.finetuning.tasks import Task

# 1. Say how the test server calls its files.
FILES = {"boolq": "BoolQ", "cb": "CB", "copa": "COPA", "multirc": "MultiRC", "record": "ReCoRD", "rte": "RTE"}
FILES |= {"wic": "WiC", "wsc": "WSC", "axb": "AX-b", "axg": "AX-g"}


# 2. Write test predictions as the sample submission of https://super.gluebenchmark.com has them.
def submission(name: str, task: Task, split: str, rows: Dataset, predictions: np.ndarray) -> tuple[str, str]:
    """Return the name and the text of the file to submit for a split."""
    indices = rows["idx"] if "idx" in rows.column_names else list(range(len(rows)))
    if name == "multirc":
        lines = multirc_lines(indices, predictions)
    elif name == "record":
        lines = [
            {"idx": index["query"], "label": entities[choice]}
            for index, entities, choice in zip(indices, rows["entities"], predictions, strict=True)
        ]
    else:
        labels = predictions.tolist() if name == "copa" else [task.labels[value] for value in predictions]
        if name == "wsc":
            labels = [label.capitalize() for label in labels]
        lines = [{"idx": index, "label": label} for index, label in zip(indices, labels, strict=True)]
    return f"{FILES[name]}.jsonl", "\n".join(map(json.dumps, lines))


def multirc_lines(indices: list[dict], predictions: np.ndarray) -> list[dict]:
    """Return the lines of MultiRC, which group answers by question, and questions by paragraph."""
    paragraphs = defaultdict(lambda: defaultdict(list))
    for index, label in zip(indices, predictions.tolist(), strict=True):
        paragraphs[index["paragraph"]][index["question"]].append({"idx": index["answer"], "label": label})
    lines = []
    for paragraph, questions in paragraphs.items():
        answered = [{"idx": question, "answers": answers} for question, answers in questions.items()]
        lines.append({"idx": paragraph, "passage": {"questions": answered}})
    return lines


# 3. Train, evaluate and predict what the command line says. Data of GLUE is answered with the script for it.
SUITE = Suite(TASKS, "aps/super_glue", submission, UNSCORED, other_script="glue.py", other_tasks=GLUE)

if __name__ == "__main__":
    run_suite(SUITE, "runs/superglue", __doc__)
