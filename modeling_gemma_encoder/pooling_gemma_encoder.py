"""Poolers turn the states of a sequence into one vector.

Every pooler maps token states (total_tokens, hidden) and sequence offsets (batch + 1) to (batch,
hidden) in fp32: sequence b owns the tokens offsets[b] .. offsets[b + 1] - 1, and tokens after
offsets[-1] belong to no sequence. There is no padding here, so it cannot matter. A sequence without
tokens is pooled to zeros.

`weights` takes the same arguments and returns the share (total_tokens,) of each token in its
sequence's vector.

Gemma Encoder (arXiv 2503.02656) names the five poolers; K, the number of probes and their heads are
our choice.
"""

import torch
from torch import nn


def owners(tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the sequence that each place in `tokens` belongs to, in its shape; `batch` if it
    belongs to none."""
    return torch.searchsorted(offsets[1:].to(tokens), tokens, right=True)


def sequence_ids(token_states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the sequence that each token belongs to, (total_tokens,)."""
    return owners(torch.arange(token_states.shape[0], device=token_states.device), offsets)


def segment_sum(values: torch.Tensor, sequences: torch.Tensor, batch: int) -> torch.Tensor:
    """Sum `values` (total_tokens, ...) over the tokens of each sequence, in fp32: (batch, ...)."""
    sums = values.new_zeros((batch + 1, *values.shape[1:]), dtype=torch.float32)
    return sums.index_add(0, sequences, values.float())[:batch]


def segment_mean(token_states: torch.Tensor, offsets: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Average the states of each sequence's tokens, or of those with `keep` (total_tokens,):
    (batch, hidden)."""
    batch = offsets.shape[0] - 1
    keep = token_states.new_ones(token_states.shape[0]) if keep is None else keep
    sequences = sequence_ids(token_states, offsets)
    sums = segment_sum(token_states.float() * keep.float()[:, None], sequences, batch)
    return sums / segment_sum(keep, sequences, batch).clamp(min=1)[:, None]


def segment_softmax(scores: torch.Tensor, sequences: torch.Tensor, batch: int) -> torch.Tensor:
    """Compute the softmax of `scores` (total_tokens, ...) over the tokens of each sequence, in
    fp32."""
    index = sequences.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    highest = scores.new_full((batch + 1, *scores.shape[1:]), -torch.inf)
    highest = highest.scatter_reduce(0, index, scores.detach(), "amax")
    exponentials = (scores - highest[sequences]).exp()
    sums = scores.new_zeros(highest.shape).index_add(0, sequences, exponentials)
    return exponentials / sums[sequences]


class MeanPooler(nn.Module):
    """Average all token states of a sequence."""

    def __init__(self, config):
        super().__init__()
        self.k = config.pooling_k

    def takes(self, offsets: torch.Tensor, total: int) -> torch.Tensor | None:
        """Return which of `total` tokens are averaged, (total,); None for all of them."""
        return None

    def forward(self, token_states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return segment_mean(token_states, offsets, self.takes(offsets, token_states.shape[0]))

    def weights(self, token_states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return the share of each token in its sequence's average, (total_tokens,)."""
        taken, sequences = self.takes(offsets, token_states.shape[0]), sequence_ids(token_states, offsets)
        shares = token_states.new_ones(token_states.shape[0]) if taken is None else taken.float()
        counts = segment_sum(shares, sequences, offsets.shape[0] - 1).clamp(min=1)
        return shares / torch.cat([counts, counts.new_ones(1)])[sequences]


class FirstKPooler(MeanPooler):
    """Average the first `pooling_k` token states, or all of a shorter sequence.

    Averaging keeps the head's size independent of K and of the length; the paper does not say how K
    > 1 states combine.
    """

    def takes(self, offsets: torch.Tensor, total: int) -> torch.Tensor:
        """Return which of `total` tokens are among the first `pooling_k` of their sequence,
        (total,)."""
        tokens = torch.arange(total, device=offsets.device)
        return tokens - offsets[owners(tokens, offsets)] < self.k


class LastKPooler(MeanPooler):
    """Average the last `pooling_k` token states, or all of a shorter sequence."""

    def takes(self, offsets: torch.Tensor, total: int) -> torch.Tensor:
        """Return which of `total` tokens are among the last `pooling_k` of their sequence,
        (total,)."""
        tokens = torch.arange(total, device=offsets.device)
        ends = torch.cat([offsets[1:], offsets[-1:]])[owners(tokens, offsets)]
        return ends - tokens <= self.k


class ProbePooler(nn.Module):
    """Hold what the two attention poolers share: learned latents and four projections.

    Token states are RMS-normalized first, because a decoder's final states can be large (norms of
    200 and more). The projections are not called q_proj and so on: an adapter for the decoder's
    layers must not attach to a fresh pooler.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.pooling_num_heads
        config.validate_pooling()  # fields may have been assigned since it was built
        self.probes = nn.Parameter(torch.randn(config.pooling_num_probes, config.hidden_size))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def heads(self, states: torch.Tensor) -> torch.Tensor:
        """Split states (..., hidden) into heads, (..., num_heads, head_dim), in fp32."""
        return states.unflatten(-1, (self.num_heads, -1)).float()


class QueryProbePooler(ProbePooler):
    r"""Use the paper's query probe: learned latents P (num_probes, hidden) attend to the tokens X
    of a sequence.

    For head h: A_h = softmax(Q_h K_h^T / sqrt(d)) over the tokens, with Q = P W_q, K = X W_k, V = X
    W_v. The outputs concat_h(A_h V_h) W_o are averaged over the probes.
    """

    def forward(self, token_states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        states = self.norm(token_states.to(self.norm.weight.dtype))
        sequences, weights = sequence_ids(states, offsets), self._weights(states, offsets)
        answers = segment_sum(weights[..., None] * self.heads(self.value(states)), sequences, offsets.shape[0] - 1)
        return self.output(answers.flatten(1).to(states.dtype)).float()

    def weights(self, token_states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return the attention weights, averaged over probes and heads, (total_tokens,)."""
        return self._weights(self.norm(token_states.to(self.norm.weight.dtype)), offsets).mean(-1)

    def _weights(self, states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return the mean weights of the probes, (total_tokens, num_heads).

        The mean over the probes commutes with the weighted sum and with W_o.
        """
        queries, keys = self.heads(self.query(self.probes)), self.heads(self.key(states))
        scores = torch.einsum("thd,phd->tph", keys, queries) * keys.shape[-1] ** -0.5
        return segment_softmax(scores, sequence_ids(states, offsets), offsets.shape[0] - 1).mean(1)


class KVProbePooler(ProbePooler):
    r"""Use the paper's key-value probe: the tokens X of a sequence attend to learned latents P
    (num_probes, hidden).

    For head h: Y_h = softmax(Q_h K_h^T / sqrt(d)) V_h over the probes, with Q = X W_q, K = P W_k, V
    = P W_v. The tokens' outputs concat_h(Y_h) W_o are averaged over the sequence.
    """

    def forward(self, token_states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        states = self.norm(token_states.to(self.norm.weight.dtype))
        queries = self.heads(self.query(states))
        keys, values = self.heads(self.key(self.probes)), self.heads(self.value(self.probes))
        weights = (torch.einsum("thd,phd->thp", queries, keys) * keys.shape[-1] ** -0.5).softmax(-1)
        answers = torch.einsum("thp,phd->thd", weights, values).flatten(1)  # (total_tokens, hidden)
        # W_o is linear, so averaging first gives the same, at one row for each sequence.
        return self.output(segment_mean(answers, offsets).to(states.dtype)).float()

    def weights(self, token_states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return equal shares: tokens differ in what they take from the probes, and not in how much
        they count."""
        sizes = offsets.diff().clamp(min=1)
        return 1 / torch.cat([sizes, sizes.new_ones(1)])[sequence_ids(token_states, offsets)]


POOLERS = {
    "mean": MeanPooler,
    "first_k": FirstKPooler,
    "last_k": LastKPooler,
    "query_probe": QueryProbePooler,
    "kv_probe": KVProbePooler,
}
