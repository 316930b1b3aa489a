"""Fine-tunes a Gemma Encoder on tasks of SuperGLUE (arXiv 1905.00537): a task is a row of a table,
`TASKS` in `modeling_gemma_encoder/finetuning/superglue.py`.

    python examples/superglue.py --task cb wic --model google/gemma-3-270m
    python examples/superglue.py --task all --model google/gemma-2-2b --lora_r 16 --bf16 --seeds 1 2 3 --do_predict
    python examples/superglue.py --task cb --model examples/nano --data_dir superglue    # superglue/cb/train.jsonl ...

Data: `aps/super_glue` on the Hub, or `--data_dir`. All else is as `glue.py` says. Words that a question is about are
marked in the text, [ so ]; COPA and ReCoRD choose among candidates by the scores of a `GemmaEncoderForRanking`. AX-b
and AX-g are scored by the model of RTE.
"""

import json
from collections import defaultdict

import numpy as np
from datasets import Dataset

from modeling_gemma_encoder.finetuning.suite import run_suite
from modeling_gemma_encoder.finetuning.superglue import TASKS, UNSCORED
from modeling_gemma_encoder.finetuning.tasks import Task

# The server's files.

FILES = {"boolq": "BoolQ", "cb": "CB", "copa": "COPA", "multirc": "MultiRC", "record": "ReCoRD", "rte": "RTE"}
FILES |= {"wic": "WiC", "wsc": "WSC", "axb": "AX-b", "axg": "AX-g"}

# What `glue.py` reads, a name of a task of its own each, or other columns of one that is called the same.
GLUE = dict.fromkeys(("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "wnli", "ax"), ())
GLUE |= {"rte": ("sentence1", "sentence2")}


def submission(name: str, task: Task, split: str, rows: Dataset, predictions: np.ndarray) -> tuple[str, str]:
    """File name and text, as the sample submission of https://super.gluebenchmark.com has them."""
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
    """Answers within their questions within their paragraphs."""
    paragraphs = defaultdict(lambda: defaultdict(list))
    for index, label in zip(indices, predictions.tolist(), strict=True):
        paragraphs[index["paragraph"]][index["question"]].append({"idx": index["answer"], "label": label})
    lines = []
    for paragraph, questions in paragraphs.items():
        answered = [{"idx": question, "answers": answers} for question, answers in questions.items()]
        lines.append({"idx": paragraph, "passage": {"questions": answered}})
    return lines


if __name__ == "__main__":
    run_suite(TASKS, "aps/super_glue", "runs/superglue", submission, UNSCORED, __doc__, ("glue.py", GLUE))
