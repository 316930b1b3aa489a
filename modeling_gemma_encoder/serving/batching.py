"""Batches of all requests that wait, by tokens.

A request is a list of token sequences. Whenever the model is free, it gets a batch of up to
`tokens_per_batch` tokens. A long list is split, the longest sequences first, and others give what
is about as long, which is computed faster. The requests that have been given the fewest tokens so
far come first, as in least attained service (Rai et al., SIGMETRICS 2003), so that a short request
waits for the batch that runs, not for the long lists before it. A quarter of the tokens is for
the oldest request, which therefore ends however many new ones arrive.

The model is unpadded, so that what a sequence is batched with changes its score by rounding only.
"""

import logging
import math
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from .errors import Overloaded, RequestError, Unhealthy, Unscorable

logger = logging.getLogger(__name__)

SHARE_OF_OLDEST = 0.25
MOST_BROKEN = 3
IDLE = 1.0  # seconds without a request, after which there is time to tidy up


@dataclass(eq=False)
class Job:
    """Hold the sequences of a request, and what is known of their scores."""

    rows: Sequence[list[int]]
    future: Future = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None  # when its first batch began
    computing: float = 0.0  # seconds of the batches that it was in
    served: int = 0  # tokens that were taken
    credit: float = 0.0  # tokens that it may have before others, as the oldest
    scores: list = field(default_factory=list)
    missing: int = 0  # rows without a score
    total: int = 0  # tokens
    waiting: list[int] = field(default_factory=list)  # places of rows, the shortest first

    def __post_init__(self):
        self.scores, self.missing = [None] * len(self.rows), len(self.rows)
        self.total = sum(map(len, self.rows))
        self.waiting = sorted(range(len(self.rows)), key=self._length)

    def pop(self, target: float, limit: float) -> int | None:
        """Remove and return the place of the longest row of at most `target` tokens, or of the
        shortest; None if it has more than `limit`."""
        place = max(0, bisect_right(self.waiting, min(target, limit), key=self._length) - 1)
        if self._length(self.waiting[place]) > limit:
            return None
        row = self.waiting.pop(place)
        self.served += self._length(row)
        return row

    def _length(self, place: int) -> int:
        return len(self.rows[place])


def take(jobs: Sequence[Job], budget: int) -> list[tuple[Job, int]]:
    """
    Return the next batch, pairs (job, place of a row), and count its tokens as served.

    Args:
        jobs: Those with rows that wait, the oldest first.
        budget: The most tokens of the batch. A row that is longer is a batch by itself.
    """
    batch, left, oldest = [], budget, jobs[0]
    oldest.credit += SHARE_OF_OLDEST * budget

    def turn(place: int) -> tuple[int, int]:
        job = jobs[place]
        first = job is oldest and len(job.rows[job.waiting[-1]]) <= job.credit
        return -1 if first else job.served, place

    turns = [turn(place) for place in range(len(jobs))]
    heapify(turns)
    target = math.inf
    while turns:
        job = jobs[place := heappop(turns)[1]]
        row = job.pop(target, left if batch else math.inf)
        if row is None:
            continue
        batch.append((job, row))
        target = len(batch[0][0].rows[batch[0][1]])  # of the first row
        left -= len(job.rows[row])
        if job is oldest:
            job.credit -= len(job.rows[row])
        if job.waiting:
            heappush(turns, turn(place))
    return batch


class Batcher:
    """
    Score the rows of many requests in one thread, in batches by tokens.

    Args:
        score: Called with rows of token ids; returns (rows, num_labels).
        tokens_per_batch: The most tokens of a batch.
        max_waiting_tokens: Requests are refused while more than this waits.
        observe: Called before each batch with its rows and tokens.
        rest: Called when nothing has waited for a second.
    """

    def __init__(
        self,
        score: Callable[[list[list[int]]], np.ndarray],
        tokens_per_batch: int,
        max_waiting_tokens: int,
        observe: Callable[[int, int], None] = lambda rows, tokens: None,
        rest: Callable[[], None] = lambda: None,
    ):
        self.score, self.observe, self.rest = score, observe, rest
        self.tokens_per_batch, self.max_waiting_tokens = tokens_per_batch, max_waiting_tokens
        self.broken = 0  # batches in a row for which the model itself failed
        self.rate = 0.0  # tokens per second, of the last batches
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    def submit(self, rows: Sequence[list[int]]) -> Job:
        """
        Add a request, whose `future` will have its scores (rows, num_labels), and return it.

        To give it up, cancel the future; its rows are then left out of later batches.

        Raises:
            Overloaded: More tokens wait than are allowed.
            Unhealthy: The batcher was closed, or has died.
        """
        job = Job(rows)
        with self._changed:
            if self._closed or not self.thread.is_alive():
                raise Unhealthy("The server is shutting down.")
            waiting = self._waiting_tokens()
            if waiting and waiting + job.total > self.max_waiting_tokens:
                seconds = min(60, max(1, round(waiting / self.rate))) if self.rate else 1
                raise Overloaded(f"{waiting:,} tokens wait already. Try again in {seconds} s.", seconds)
            if not rows:
                job.future.set_result(np.empty((0, 1), dtype=np.float32))
                return job
            self._jobs.append(job)
            self._changed.notify()
        return job

    def waiting(self) -> tuple[int, int]:
        """Return how many requests and tokens wait."""
        with self._changed:
            return len(self._jobs), self._waiting_tokens()

    def healthy(self) -> bool:
        """Return whether the thread is alive, and the model has not failed for the last three
        batches."""
        return self.thread.is_alive() and self.broken < MOST_BROKEN

    def close(self, timeout: float | None = None) -> None:
        """Accept no more requests, score those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.thread.join(timeout)

    def _waiting_tokens(self) -> int:
        return sum(job.total - job.served for job in self._jobs if not job.future.done())

    def _next(self) -> list[tuple[Job, int]] | None:
        """Wait for requests and return the next batch, or None once there will be no more."""
        with self._changed:
            rested = False
            while True:
                self._jobs = [job for job in self._jobs if job.waiting and not job.future.done()]
                if self._jobs:
                    return take(self._jobs, self.tokens_per_batch)
                if self._closed:
                    return None
                if not self._changed.wait(None if rested else IDLE) and not rested:
                    rested = True
                    self._changed.release()
                    try:
                        self.rest()
                    finally:
                        self._changed.acquire()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            begin, tokens = time.monotonic(), sum(len(job.rows[place]) for job, place in batch)
            for job in {id(job): job for job, _ in batch}.values():
                job.started = job.started or begin
            self.observe(len(batch), tokens)
            self._score(batch)
            seconds = max(time.monotonic() - begin, 1e-6)
            self.rate = 0.8 * self.rate + 0.2 * tokens / seconds if self.rate else tokens / seconds
            for job in {id(job): job for job, _ in batch}.values():
                job.computing += seconds
                if not job.missing and job.future.set_running_or_notify_cancel():
                    job.future.set_result(np.stack(job.scores))

    def _score(self, batch: list[tuple[Job, int]]) -> None:
        """Put the scores of a batch into its requests. If one cannot be scored, only this one
        fails."""
        jobs = {id(job): job for job, _ in batch}
        try:
            scores = self.score([job.rows[place] for job, place in batch])
            self.broken = 0
            for (job, place), of_row in zip(batch, scores, strict=True):
                job.scores[place] = of_row
                job.missing -= 1
        except Exception as error:  # whatever it is, the thread goes on
            if len(jobs) > 1:
                for job in jobs.values():
                    self._score([(job, place) for of, place in batch if of is job])
                return
            (job,) = jobs.values()
            job.missing = -1
            if not isinstance(error, RequestError | ValueError):  # not the texts, but the model or its device
                self.broken += 1
                logger.exception("A batch could not be scored.")
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error if isinstance(error, RequestError) else Unscorable(str(error)))
