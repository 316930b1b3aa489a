"""Texts and batches of the lengths that real ones have."""

from functools import cache

import numpy as np
import torch

from modeling_gemma_encoder.pretraining.corpus import docstrings

# Deciles of token counts with Gemma 3's tokenizer. Passages: those of TREC DL 2020's judgments, of the first 40 of one
# query (23849) and of all.
PASSAGES = {
    "alike": (45, 51, 55, 64, 69, 73, 80, 85, 93, 106, 121),
    "mixed": (22, 56, 64, 70, 75, 80, 87, 96, 113, 136, 445),
}
# Sentences: a batch of like lengths, 60 tokens in the mean, and QNLI's.
SENTENCES = {
    "alike": (40, 45, 48, 52, 57, 60, 63, 66, 69, 75, 81),
    "mixed": (19, 35, 40, 45, 48, 52, 57, 62, 69, 81, 242),
}
SHORT = (12,) * 11  # as SST-2's and CoLA's are in the mean
BATCH = 32
SHORT_BATCH = 16


Pairs = list[tuple[str, str]]


def draw_lengths(deciles: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """Return `count` token counts, drawn from the distribution with these deciles."""
    shares = np.random.default_rng(seed).random(count)
    return np.interp(shares, np.linspace(0, 1, len(deciles)), deciles).astype(int)


@cache
def read_text() -> str:
    """Return the documentation strings of huggingface_hub as one text."""
    return " ".join(found.text for found in docstrings("huggingface_hub"))


def make_pairs(tokenizer, count: int, lengths: str = "alike", seed: int = 0) -> Pairs:
    """Return one query with `count` passages, as long as `PASSAGES` says of these lengths, cut from
    `read_text`."""
    query = "how does the garbage collector find cycles"
    taken = len(tokenizer(query, "")["input_ids"])
    sizes, rng = draw_lengths(PASSAGES[lengths], count, seed), np.random.default_rng(seed)
    ids = tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    starts = rng.integers(0, len(ids) - 500, size=count)
    spans = [ids[i : i + max(1, n - taken)] for i, n in zip(starts, sizes, strict=True)]
    return [(query, tokenizer.decode(span)) for span in spans]


def count_tokens(tokenizer, pairs: Pairs) -> list[int]:
    """Return the number of tokens of each pair, without padding."""
    return list(map(len, tokenizer(*zip(*pairs, strict=True))["input_ids"]))


def count_padded(lengths: list[int]) -> int:
    """Return the number of tokens of padded batches, sorted by length, with their padding."""
    longest_first = sorted(lengths, reverse=True)
    batches = [longest_first[start : start + BATCH] for start in range(0, len(lengths), BATCH)]
    return sum(len(batch) * batch[0] for batch in batches)


def make_batch(sizes: np.ndarray, device: str) -> dict[str, torch.Tensor]:
    """Return a padded batch of random tokens and labels, with texts of these token counts."""
    shape = (len(sizes), int(sizes.max()))  # (batch, seq_len)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, size in enumerate(sizes):
        values = np.random.default_rng(row).integers(5, 8000, size=size)
        ids[row, :size], mask[row, :size] = torch.tensor(values), 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randn(len(sizes))}
    return {name: values.to(device) for name, values in batch.items()}
