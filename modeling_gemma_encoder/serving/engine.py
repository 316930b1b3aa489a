"""The model behind a server: texts -> tokens -> logits, in batches of all requests."""

import asyncio
import ctypes
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_gemma_encoder import GemmaEncoderForRanking
from ..ranking.scoring import default_tokens_per_batch, evaluating, most_tokens
from ..templates import encode_pairs
from .batching import Batcher
from .errors import Late, TooLarge, Unscorable, Untokenizable
from .metrics import Metrics

Texts = Sequence[tuple[str, str | None]]  # each a text, or a pair


@dataclass(frozen=True)
class Cut:
    """Hold what happens to texts with too many tokens."""

    truncate: bool = True  # or refuse them
    side: str = "right"  # which end is cut
    per_document: int | None = None  # tokens to which each second text is cut first


@dataclass(frozen=True)
class Scored:
    """Hold the logits of a request (texts, num_labels), and what they cost, in tokens and
    seconds."""

    logits: np.ndarray
    tokens: int
    tokenizing: float
    queue: float
    inference: float


class Engine:
    """
    Score the texts of many requests with one model.

    Args:
        model: A trained classifier or ranker.
        max_length: The most tokens of a text or pair. None: the tokenizer's, and never more than
            the decoder's positions.
        tokens_per_batch: None: as `score_pairs`.
        max_waiting_tokens: Requests are refused while more than this waits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        max_waiting_tokens: int = 1_000_000,
        metrics: Metrics | None = None,
    ):
        self.model, self.tokenizer, self.metrics = model, tokenizer, metrics or Metrics()
        self.ranks = isinstance(model, GemmaEncoderForRanking)
        self.max_length = most_tokens(model.config, tokenizer, max_length)
        self.device = model.get_input_embeddings().weight.device
        tokens_per_batch = tokens_per_batch or default_tokens_per_batch(self.device)
        self.batcher = Batcher(self._score, tokens_per_batch, max_waiting_tokens, self.metrics.batch, give_back_memory)
        # One thread, as truncation is a state of the tokenizer.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")

    async def score(self, texts: Texts, cut: Cut = Cut(), seconds: float | None = None) -> Scored:
        """
        Return the logits of texts in their order. If this is cancelled, what waits is left out of
        later batches.

        Args:
            seconds: How long this may take.

        Raises:
            RequestError: The texts cannot be scored, or not in time; see `errors`.
        """
        try:
            return await asyncio.wait_for(self._scored(texts, cut), seconds)
        except asyncio.TimeoutError:
            raise Late(f"There was no answer within {seconds:g} s.") from None

    def encode(self, texts: Texts, cut: Cut) -> list[list[int]]:
        """
        Return the token ids of texts, cut to `max_length`. A ranker's queries are never cut.

        Raises:
            TooLarge: A text has too many tokens, and is not to be cut.
            Untokenizable: A query leaves no room for its document, or a text has no token.
        """
        self._check_queries(texts)
        if cut.per_document:
            texts = [(first, self._shorten(second, cut.per_document)) for first, second in texts]
        try:
            rows = self._encode(texts, None)
            if long := [place for place, row in enumerate(rows) if len(row) > self.max_length]:
                if not cut.truncate:
                    raise TooLarge(
                        f"A text must have at most {self.max_length:,} tokens; number {long[0]} has "
                        f"{len(rows[long[0]]):,}. With `truncate` it is cut."
                    )
                with truncating(self.tokenizer, cut.side):
                    shortened = self._encode([texts[place] for place in long], self.max_length)
                for place, row in zip(long, shortened, strict=True):
                    rows[place] = row
        except (ValueError, TypeError) as error:
            raise Untokenizable(str(error)) from error
        if not all(rows):
            raise Untokenizable(f"Text number {rows.index([])} has no token.")
        return rows

    async def healthy(self) -> bool:
        """Return whether the model scores, see `Batcher.healthy`."""
        return self.batcher.healthy()

    async def queue_size(self) -> int:
        """Return how many requests wait, or are in a batch."""
        return self.batcher.waiting()[0]

    def close(self) -> None:
        """Score what waits, and accept no more."""
        self.batcher.close()
        self._tokenizing.shutdown(wait=False)

    async def _scored(self, texts: Texts, cut: Cut) -> Scored:
        begin = time.monotonic()
        rows = await asyncio.get_running_loop().run_in_executor(self._tokenizing, self.encode, texts, cut)
        tokenizing = time.monotonic() - begin
        job = self.batcher.submit(rows)
        logits = await asyncio.wrap_future(job.future)
        return Scored(logits, job.total, tokenizing, job.started - job.arrived, job.computing)

    def _encode(self, texts: Texts, max_length: int | None) -> list[list[int]]:
        if self.ranks:
            return encode_pairs(self.tokenizer, [(first, second or "") for first, second in texts], max_length)
        cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
        rows: list[list[int]] = [[]] * len(texts)
        try:
            for is_pair in (False, True):  # they have templates of their own
                places = [place for place, (_, second) in enumerate(texts) if (second is not None) == is_pair]
                columns = list(zip(*(texts[place] for place in places), strict=True))[: 1 + is_pair]
                if places:
                    ids = self.tokenizer(*map(list, columns), verbose=False, **cut)["input_ids"]
                    for place, row in zip(places, ids, strict=True):
                        rows[place] = row
        finally:
            self.tokenizer.backend_tokenizer.no_truncation()
        return rows

    def _check_queries(self, texts: Texts) -> None:
        """Refuse a long query before it is made into tokens once for each of its documents."""
        for query, count in Counter(first for first, _ in texts).items():
            if len(query) * count > self.max_length:  # characters, so that most queries are not read twice
                tokens = len(self.tokenizer(query, add_special_tokens=False, verbose=False)["input_ids"])
                if self.ranks and tokens >= self.max_length:
                    raise Untokenizable(f"The query has {tokens:,} tokens, and a pair may have {self.max_length:,}.")
                if tokens * count > self.batcher.max_waiting_tokens:
                    raise TooLarge(f"The query has {tokens:,} tokens, too many beside {count:,} documents.")

    def _shorten(self, text: str | None, tokens: int) -> str | None:
        """Return the beginning of a text that has so many tokens."""
        if text is None:
            return None
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = offsets["offset_mapping"]
        return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]

    def _score(self, rows: list[list[int]]) -> np.ndarray:
        """Return the logits (rows, num_labels) of token ids, in float32."""
        padded = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
        with evaluating(self.model):
            logits = self.model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        if not torch.isfinite(logits).all():
            raise Unscorable("A score is not finite.")
        return logits.float().cpu().numpy()


def give_back_memory() -> None:
    """Give freed memory back to the system, with glibc. Batches of varying sizes leave much of it."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def truncating(tokenizer: PreTrainedTokenizerBase, side: str):
    """Have a tokenizer cut texts at one end, "left" or "right"."""
    before, tokenizer.truncation_side = tokenizer.truncation_side, side
    try:
        yield
    finally:
        tokenizer.truncation_side = before
