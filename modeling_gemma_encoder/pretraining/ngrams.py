"""Unigram and trigram models, the baselines of a language model's perplexity.

Blocks are integer arrays (num_blocks, block_size). As in a causal language model, the first token
of a block is given and the others are predicted, each from tokens of its own block.
"""

import numpy as np


class NGramModel:
    """Predict tokens by a unigram model with add-one smoothing, and by a trigram model with
    Kneser-Ney smoothing.

    Kneser-Ney is interpolated, as in Chen and Goodman, "An Empirical Study of Smoothing Techniques
    for Language Modeling" (1998), section 3, with one discount an order, n1 / (n1 + 2 n2),
    estimated from the counts of counts.
    """

    def __init__(self, blocks: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        self.base = vocab_size + 1  # one more: the place before a block
        first, second, third = self._contexts(blocks)
        self.unigrams = np.bincount(third, minlength=self.base)

        trigrams, counts = np.unique((first * self.base + second) * self.base + third, return_counts=True)
        self.trigram = _Discounted(trigrams, counts, self.base)
        # Lower orders count in how many contexts a token was seen, not how often.
        bigrams, counts = np.unique(trigrams % self.base**2, return_counts=True)
        self.bigram = _Discounted(bigrams, counts, self.base)
        continuations, counts = np.unique(bigrams % self.base, return_counts=True)
        self.unigram = _Discounted(continuations, counts, self.base)

    def unigram_probabilities(self, blocks: np.ndarray) -> np.ndarray:
        """Return the probability of each predicted token, (num_blocks * (block_size - 1),)."""
        counts = self.unigrams[self._contexts(blocks)[2]]
        return (counts + 1) / (self.unigrams.sum() + self.vocab_size)

    def trigram_probabilities(self, blocks: np.ndarray) -> np.ndarray:
        """Return the probability of each predicted token, (num_blocks * (block_size - 1),)."""
        first, second, third = self._contexts(blocks)
        lower = np.full(len(third), 1 / self.vocab_size)
        lower = self.unigram.interpolate(third, lower)
        lower = self.bigram.interpolate(second * self.base + third, lower)
        return self.trigram.interpolate((first * self.base + second) * self.base + third, lower)

    def _contexts(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the two tokens before each predicted token, and the token, (num_blocks *
        (block_size - 1),) each."""
        blocks = np.asarray(blocks, dtype=np.int64)
        before = np.full((len(blocks), 1), self.vocab_size)
        first = np.concatenate([before, blocks[:, :-2]], axis=1)
        return first.ravel(), blocks[:, :-1].ravel(), blocks[:, 1:].ravel()


class _Discounted:
    """Hold the counts of one order's n-grams, coded as integers whose last digit to `base` is the
    predicted token."""

    def __init__(self, ngrams: np.ndarray, counts: np.ndarray, base: int):
        self.ngrams, self.counts, self.base = ngrams, counts, base
        once, twice = np.sum(counts == 1), np.sum(counts == 2)
        self.discount = once / max(once + 2 * twice, 1)
        # N-grams of one context are neighbors, so that their totals are sums over slices.
        self.contexts, starts = np.unique(ngrams // base, return_index=True)
        self.totals = np.add.reduceat(counts, starts)
        self.kinds = np.diff(np.append(starts, len(ngrams)))

    def interpolate(self, ngrams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Return max(count - discount, 0) / total + discount * kinds / total * lower, or `lower` in
        a new context."""
        found, count = _look_up(self.ngrams, self.counts, ngrams)
        count = np.where(found, count - self.discount, 0)
        known, total = _look_up(self.contexts, self.totals, ngrams // self.base)
        _, kinds = _look_up(self.contexts, self.kinds, ngrams // self.base)
        return np.where(known, (count + self.discount * kinds * lower) / total, lower)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each wanted key is among the sorted `keys`, and its value, which means nothing
    where it is not."""
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return keys[places] == wanted, values[places]


def perplexity(probabilities: np.ndarray) -> float:
    """Return the exponential of the mean negative log-probability."""
    return float(np.exp(-np.mean(np.log(probabilities))))
