"""Blocks of tokens, made of documents: a data set with one column, `input_ids`, (block_size,)."""

import re
from functools import partial

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from .corpus import TextArguments, join_lines


def pack(rows: dict, tokenizer, block_size: int, join: bool) -> dict:
    """Pack documents one after another into full blocks, and drop the rest.

    Each document ends with <eos>. Each block begins with <bos> where the tokenizer has one.

    Raises:
        ValueError: The tokenizer has no <eos>.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no token for the end of a text. Set its `eos_token` and save it.")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = [np.array([], dtype=np.int32)]
    for text in rows["text"]:
        text = join_lines(text or "") if join else text or ""
        if text.strip():
            paragraphs = re.split(r"(?<=\n\n)(?!\n)", text)  # tokenizers are slow on long texts
            encoded = tokenizer(paragraphs, add_special_tokens=False, return_attention_mask=False, verbose=False)
            tokens += [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
            tokens.append(np.array([tokenizer.eos_token_id], dtype=np.int32))
    tokens = np.concatenate(tokens)
    width = block_size - len(start)
    blocks = tokens[: len(tokens) // width * width].reshape(-1, width)
    return {"input_ids": np.insert(blocks, [0] * len(start), start, axis=1)}


def mix(parts: list[Dataset] | list[IterableDataset], seed: int) -> Dataset | IterableDataset:
    """Return all rows of several data sets.

    Streams alternate row by row until each of them has ended, and are shuffled within a window.
    """
    if isinstance(parts[0], IterableDataset):
        rows = interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        return rows.shuffle(seed=seed, buffer_size=10_000)
    return concatenate_datasets(parts)


def load_blocks(documents: dict, held_out: dict, tokenizer, options: TextArguments, seed: int) -> tuple:
    """Return the blocks to train on as one data set, and held-out source -> a sample of its blocks.

    Raises:
        ValueError: A text does not fill one block.
    """
    into_blocks = partial(pack, tokenizer=tokenizer, block_size=options.block_size, join=options.join_lines)
    packing = {"function": into_blocks, "batched": True, "batch_size": 1000, "remove_columns": ["text"]}
    train = mix([rows.map(**packing) for rows in documents.values()], seed)
    samples = {name: sample(rows.map(**packing), options.validation_blocks, seed) for name, rows in held_out.items()}
    for name, rows in [("--text", train), *samples.items()]:
        if next(iter(rows), None) is None:
            set_aside = not options.validation_text and name != "--text"
            what = "the hundredth of the text that is set aside to evaluate" if set_aside else "the text"
            raise ValueError(
                f"{name}: {what} does not fill one block of --block_size {options.block_size} tokens. Give more "
                "text, --validation_text, or a smaller --block_size."
            )
    return train, samples


def sample(rows: Dataset | IterableDataset, number: int, seed: int) -> Dataset | IterableDataset:
    """Return random rows of a data set, or the first rows of a stream; `number` of them at most."""
    if isinstance(rows, IterableDataset):
        return rows.take(number)
    return rows if len(rows) <= number else rows.shuffle(seed=seed).select(range(number))


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return `input_ids`, (batch, block_size), and the same as `labels`, which upstream's decoders
    shift."""
    input_ids = torch.tensor(np.array([row["input_ids"] for row in rows]), dtype=torch.long)
    return {"input_ids": input_ids, "labels": input_ids}
