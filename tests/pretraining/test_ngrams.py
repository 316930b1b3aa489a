"""Laws of the n-gram baselines: probabilities, and those of the textbook formula."""

import itertools
from collections import Counter

import numpy as np
import pytest

from modeling_gemma_encoder.pretraining.ngrams import NGramModel, perplexity

VOCAB = 5
BLOCKS = np.random.default_rng(0).integers(0, VOCAB - 1, (6, 7))  # the last token is never seen


def kneser_ney(blocks: np.ndarray, context: tuple, token: int) -> float:
    """Interpolated Kneser-Ney, word for word, with dictionaries. The place before a block is None."""
    seen = [[None, *block.tolist()] for block in blocks]
    trigrams = Counter(tuple(row[i : i + 3]) for row in seen for i in range(len(row) - 2))
    bigrams = Counter(trigram[1:] for trigram in trigrams)  # in how many contexts
    unigrams = Counter(bigram[1:] for bigram in bigrams)

    def probability(orders: list[Counter], context: tuple, lower: float) -> float:
        for counts, length in zip(orders, range(len(orders)), strict=True):
            discount = _discount(counts)
            own = context[len(context) - length :]
            following = {ngram[-1]: count for ngram, count in counts.items() if ngram[:-1] == own}
            if following:
                total = sum(following.values())
                count = max(following.get(token, 0) - discount, 0)
                lower = count / total + discount * len(following) / total * lower
        return lower

    return probability([unigrams, bigrams, trigrams], context, 1 / VOCAB)


def _discount(counts: Counter) -> float:
    once, twice = (sum(count == number for count in counts.values()) for number in (1, 2))
    return once / (once + 2 * twice)


def test_trigram_probabilities_are_those_of_the_formula():
    model = NGramModel(BLOCKS, VOCAB)
    other = np.random.default_rng(1).integers(0, VOCAB, (3, 5))
    expected = [
        kneser_ney(BLOCKS, tuple(([None, *block])[i : i + 2]), block[i + 1])
        for block in other.tolist()
        for i in range(len(block) - 1)
    ]
    np.testing.assert_allclose(model.trigram_probabilities(other), expected, rtol=1e-9)


def test_probabilities_sum_to_one_after_any_two_tokens():
    model = NGramModel(BLOCKS, VOCAB)
    for context in itertools.product(range(VOCAB), repeat=2):
        blocks = np.array([[*context, token] for token in range(VOCAB)])
        assert model.trigram_probabilities(blocks).reshape(-1, 2)[:, 1].sum() == pytest.approx(1)
        assert model.unigram_probabilities(blocks).reshape(-1, 2)[:, 1].sum() == pytest.approx(1)


def test_unigram_probabilities_by_hand():
    model = NGramModel(np.array([[0, 1, 1, 2]]), vocab_size=4)  # 1, 1 and 2 are predicted, 0 is given
    np.testing.assert_allclose(model.unigram_probabilities(np.array([[3, 0, 1, 2]])), [1 / 7, 3 / 7, 2 / 7])


def test_perplexity_of_a_fair_die_is_its_number_of_sides():
    assert perplexity(np.full(10, 1 / 6)) == pytest.approx(6)
