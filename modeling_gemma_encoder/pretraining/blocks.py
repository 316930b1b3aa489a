"""Blocks of tokens, made of documents."""

import re
from functools import partial

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from .corpus import TextArguments, join_lines


def pack(rows: dict, tokenizer, block_size: int, join: bool) -> dict:
    """
    Documents, each ended by <eos>, one after another in full blocks that begin with <bos> where the tokenizer has one;
    the rest is dropped. Raises ValueError where it has no <eos>.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no token for the end of a text, `eos_token`: set one and save it.")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = [np.array([], dtype=np.int32)]
    for text in rows["text"]:
        text = join_lines(text or "") if join else text or ""
        if text.strip():
            paragraphs = re.split(r"(?<=\n\n)(?!\n)", text)  # long texts are faster in pieces
            encoded = tokenizer(paragraphs, add_special_tokens=False, return_attention_mask=False, verbose=False)
            tokens += [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
            tokens.append(np.array([tokenizer.eos_token_id], dtype=np.int32))
    tokens = np.concatenate(tokens)
    width = block_size - len(start)
    blocks = tokens[: len(tokens) // width * width].reshape(-1, width)
    return {"input_ids": np.insert(blocks, [0] * len(start), start, axis=1)}


def mix(parts: list[Dataset] | list[IterableDataset], seed: int) -> Dataset | IterableDataset:
    """All rows of several data sets. Streams alternate row by row until each has ended, shuffled within a window."""
    if isinstance(parts[0], IterableDataset):
        rows = interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        return rows.shuffle(seed=seed, buffer_size=10_000)
    return concatenate_datasets(parts)


def load_blocks(documents: dict, held_out: dict, tokenizer, options: TextArguments, seed: int) -> tuple:
    """Blocks `input_ids` (block_size,): all to train on as one data set, and of each held-out source a sample.

    Raises:
        ValueError: a text does not fill one block.
    """
    into_blocks = partial(pack, tokenizer=tokenizer, block_size=options.block_size, join=options.join_lines)
    packing = {"function": into_blocks, "batched": True, "batch_size": 1000, "remove_columns": ["text"]}
    train = mix([rows.map(**packing) for rows in documents.values()], seed)
    samples = {name: sample(rows.map(**packing), options.validation_blocks, seed) for name, rows in held_out.items()}
    for name, rows in [("--text", train), *samples.items()]:
        if next(iter(rows), None) is None:
            told = "" if options.validation_text or name == "--text" else ", a hundredth of it set aside to evaluate,"
            much = f"one block of --block_size {options.block_size} tokens"
            raise ValueError(
                f"{name}: the text{told} does not fill {much}: give more, --validation_text or smaller blocks."
            )
    return train, samples


def sample(rows: Dataset | IterableDataset, number: int, seed: int) -> Dataset | IterableDataset:
    """Random rows of a data set, the first ones of a stream."""
    if isinstance(rows, IterableDataset):
        return rows.take(number)
    return rows if len(rows) <= number else rows.shuffle(seed=seed).select(range(number))


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """`input_ids` and, as upstream's causal language models shift them themselves, the same as `labels`."""
    input_ids = torch.tensor(np.array([row["input_ids"] for row in rows]), dtype=torch.long)
    return {"input_ids": input_ids, "labels": input_ids}
