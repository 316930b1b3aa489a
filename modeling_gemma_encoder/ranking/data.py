"""What a ranker is trained on: lists of documents for a query, drawn from longer ones, and batches of them.

A list is {"query": text, "documents": [text], "labels": [number]}; a batch of lists has `input_ids` and
`attention_mask` (batch, num_docs, seq_len) and `labels` (batch, num_docs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..losses_gemma_encoder import IGNORE
from ..templates import encode_pairs


class RankingDataset(torch.utils.data.Dataset):
    """
    Lists of at most `list_size` documents, other ones every epoch.

    Of a query's documents one relevant one is drawn, label above 0, and then others from all that are left, with
    their labels. The draw depends on the seed, the epoch and the row, and on nothing else: an interrupted training
    goes on with the lists it would have read, and it does not matter which process or worker reads them.

    Args:
        rows: Each with `query`, `documents` and `labels`, of any length; without a label above 0 nothing is learned.
        passages: The texts, where `documents` are ids.
        queries: The texts, where `query` is an id.
        from_teacher: Labels are a teacher's scores, which make no document the relevant one: all are drawn alike.

    `FreshLists` tells the epoch; without it every epoch reads the same lists.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        list_size: int,
        seed: int = 0,
        passages: Mapping[str, str] | None = None,
        queries: Mapping[str, str] | None = None,
        from_teacher: bool = False,
    ):
        if list_size < 2:
            raise ValueError(f"`list_size` must be at least 2: one document has nothing to be above, got {list_size}")
        self.rows, self.list_size, self.seed, self.from_teacher = rows, list_size, seed, from_teacher
        self.passages, self.queries = passages, queries
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by workers that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        row = self.rows[number]
        labels = np.asarray(row["labels"])
        draw = np.random.default_rng([self.seed, int(self._epoch), number])
        if len(labels) == 0:
            raise ValueError(f"Query {row['query']!r}, row {number}, has no documents.")
        if self.from_teacher:
            chosen = draw.permutation(len(labels))[: self.list_size]
        else:
            relevant = np.flatnonzero(labels > 0)
            first = draw.choice(relevant) if len(relevant) else draw.integers(len(labels))
            rest = np.delete(np.arange(len(labels)), first)
            chosen = [first, *draw.permutation(rest)[: self.list_size - 1]]
        documents = [row["documents"][i] for i in chosen]
        return {
            "query": row["query"] if self.queries is None else self.queries[row["query"]],
            "documents": documents if self.passages is None else [self.passages[pid] for pid in documents],
            "labels": [float(labels[i]) for i in chosen],
        }


class FreshLists(TrainerCallback):
    """Has a `RankingDataset` draw other lists every epoch."""

    def __init__(self, dataset: RankingDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


@dataclass
class RankingCollator:
    """
    Lists -> a batch, each document read after its query by the tokenizer's template.

    Documents are cut to `max_length` tokens, queries and the template never. A list shorter than the longest is
    filled with documents of nothing but padding, labelled -100, which cost nothing: the model reads no padding.
    Pass `remove_unused_columns=False` to the Trainer, or it takes the texts away.

    Raises:
        ValueError: a list has no documents, or not a label for each, or a query leaves no room for a document.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        for row in rows:
            found = len(row["documents"]), len(row.get("labels", row["documents"]))
            if found[0] == 0 or found[0] != found[1]:
                raise ValueError(f"Query {row['query']!r} has {found[0]} documents and {found[1]} labels.")
        pairs = [(row["query"], document) for row in rows for document in row["documents"]]
        ids = iter(encode_pairs(self.tokenizer, pairs, self.max_length))
        lists = []
        for row in rows:
            documents = [next(ids) for _ in row["documents"]]
            labels = {"labels": row["labels"]} if "labels" in row else {}
            lists.append({"input_ids": documents, "attention_mask": [[1] * len(one) for one in documents], **labels})
        return collate_lists(lists, self.tokenizer)


def collate_lists(rows: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """Lists of documents, each a list of ids, as tensors (batch, num_docs, seq_len), labels (batch, num_docs).

    Shorter lists are filled with documents of nothing but padding, labelled -100.
    """
    num_docs = max(len(row["input_ids"]) for row in rows)
    empty = {"input_ids": [], "attention_mask": []}
    documents = [
        {name: row[name][number] for name in empty} if number < len(row["input_ids"]) else empty
        for row in rows
        for number in range(num_docs)
    ]
    padded = tokenizer.pad(documents, return_tensors="pt")
    batch = {name: values.unflatten(0, (len(rows), num_docs)).long() for name, values in padded.items()}
    if "labels" in rows[0]:
        labels = [[*row["labels"], *[IGNORE] * (num_docs - len(row["labels"]))] for row in rows]
        batch["labels"] = torch.tensor(labels, dtype=torch.float32)
    return batch
