"""Lists of documents to train a ranker on, drawn from longer ones, and batches of them.

A list is {"query": text, "documents": [text], "labels": [number]}. A batch has `input_ids` and
`attention_mask` (batch, num_docs, seq_len), and `labels` (batch, num_docs).
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
    Draw a list of at most `list_size` documents for each query, other ones in every epoch.

    A list has one relevant document, with a label above 0, and others from all that are left, with
    their labels. The draw depends only on the seed, the epoch and the row. An interrupted training
    therefore goes on with the lists that it would have read, whatever process or worker reads them.

    Set the epoch with `FreshLists`; without it every epoch reads the same lists.

    Args:
        rows: Each with `query`, `documents` and `labels` of any length. A row without a label above
            0 teaches nothing.
        passages: The texts, if `documents` are ids.
        queries: The texts, if `query` is an id.
        from_teacher: Labels are the scores of a teacher. No document is the relevant one then; all
            are drawn alike.

    Raises:
        ValueError: `list_size` is below 2, or a row that is read has no documents.
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
            raise ValueError(
                f"`list_size` must be at least 2, as one document has nothing to be ranked above; got {list_size}."
            )
        self.rows, self.list_size, self.seed, self.from_teacher = rows, list_size, seed, from_teacher
        self.passages, self.queries = passages, queries
        # In shared memory, as workers may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Have the lists of this epoch drawn from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        row = self.rows[number]
        labels = np.asarray(row["labels"])
        if len(labels) == 0:
            raise ValueError(f"Query {row['query']!r}, row {number}, has no documents.")
        chosen = self._choose(labels, np.random.default_rng([self.seed, int(self._epoch), number]))
        documents = [row["documents"][i] for i in chosen]
        return {
            "query": row["query"] if self.queries is None else self.queries[row["query"]],
            "documents": documents if self.passages is None else [self.passages[pid] for pid in documents],
            "labels": [float(labels[i]) for i in chosen],
        }

    def _choose(self, labels: np.ndarray, draw: np.random.Generator) -> Sequence[int]:
        """Return the places of the documents that are drawn, a relevant one first."""
        if self.from_teacher:
            return draw.permutation(len(labels))[: self.list_size]
        relevant = np.flatnonzero(labels > 0)
        first = draw.choice(relevant) if len(relevant) else draw.integers(len(labels))
        rest = np.delete(np.arange(len(labels)), first)
        return [first, *draw.permutation(rest)[: self.list_size - 1]]


class FreshLists(TrainerCallback):
    """Have a `RankingDataset` draw other lists in every epoch of the Trainer."""

    def __init__(self, dataset: RankingDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


@dataclass
class RankingCollator:
    """
    Make a batch of lists, in which each document follows its query in the tokenizer's template.

    Documents are cut to fit `max_length` tokens; queries and the template are not. Shorter lists
    are padded as in `collate_lists`. Pass `remove_unused_columns=False` to the Trainer, or it
    removes the texts.

    Raises:
        ValueError: a list has no documents or not one label for each, or a query leaves no room for
            a document.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        for row in rows:
            documents, labels = len(row["documents"]), len(row.get("labels", row["documents"]))
            if documents == 0 or documents != labels:
                raise ValueError(f"Query {row['query']!r} has {documents} documents and {labels} labels.")
        pairs = [(row["query"], document) for row in rows for document in row["documents"]]
        ids = iter(encode_pairs(self.tokenizer, pairs, self.max_length))
        lists = []
        for row in rows:
            documents = [next(ids) for _ in row["documents"]]
            labels = {"labels": row["labels"]} if "labels" in row else {}
            lists.append({"input_ids": documents, "attention_mask": [[1] * len(one) for one in documents], **labels})
        return collate_lists(lists, self.tokenizer)


def collate_lists(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Pad lists of documents, each a list of ids, to tensors (batch, num_docs, seq_len), and
    labels (batch, num_docs).

    Shorter lists are filled with documents of padding only, labeled -100. They cost nothing, as the
    model does not read padding.
    """
    num_docs = max(len(row["input_ids"]) for row in rows)
    empty = {"input_ids": [], "attention_mask": []}
    documents = [
        {name: row[name][number] for name in empty} if number < len(row["input_ids"]) else empty
        for row in rows
        for number in range(num_docs)
    ]
    padded = tokenizer.pad(documents, return_tensors="pt")  # (batch * num_docs, seq_len)
    batch = {name: values.unflatten(0, (len(rows), num_docs)).long() for name, values in padded.items()}
    if "labels" in rows[0]:
        labels = [[*row["labels"], *[IGNORE] * (num_docs - len(row["labels"]))] for row in rows]
        batch["labels"] = torch.tensor(labels, dtype=torch.float32)
    return batch
