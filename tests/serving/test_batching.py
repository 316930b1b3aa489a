"""Laws of batches: who is next, worked out by hand; nothing is lost, nothing waits without end."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from servers import wait_until

from modeling_gemma_encoder.serving.batching import Batcher, Job, take
from modeling_gemma_encoder.serving.errors import Overloaded, Unhealthy, Unscorable


def rows(*lengths):
    return [[length] * length for length in lengths]


def sums(batch):
    return np.array([[sum(row)] for row in batch], dtype=np.float32)


def lengths_of(batch, *jobs):
    return [(jobs.index(job), len(job.rows[place])) for job, place in batch]


def test_the_next_batch_is_as_worked_out_by_hand():
    long, short = Job(rows(4, 6, 5, 6, 6)), Job(rows(2, 3))
    # A quarter of 20 is for the oldest: 6. Then the one with the fewest tokens: 3, 2; then 6 again.
    # 17 are taken, and 6 or 5 do not fit into what is left.
    assert lengths_of(take([long, short], 20), long, short) == [(0, 6), (1, 3), (1, 2), (0, 6)]
    assert (long.served, short.served) == (12, 5)
    assert lengths_of(take([long], 20), long) == [(0, 6), (0, 5), (0, 4)]
    assert not long.waiting


def test_a_row_longer_than_the_budget_is_a_batch_by_itself():
    job = Job(rows(30, 1, 2))
    assert lengths_of(take([job], 10), job) == [(0, 30)]
    assert lengths_of(take([job], 10), job) == [(0, 2), (0, 1)]


def test_new_requests_come_before_long_lists_and_the_oldest_ends_all_the_same():
    oldest = Job(rows(*[10] * 8))
    for _ in range(4):  # every batch has new requests that could fill it
        new = [Job(rows(*[10] * 20)) for _ in range(3)]
        batch = take([oldest, *new], 40)
        served = {id(job): job.served for job in new}
        assert oldest.served and sorted(served.values()) == [10, 10, 10]
        assert sum(len(job.rows[place]) for job, place in batch) == 40
    assert oldest.served == 40


def test_the_oldest_has_a_quarter_of_the_tokens_however_long_its_rows():
    oldest, served = Job(rows(*[30] * 40)), 0
    for _ in range(40):
        new = Job(rows(*[10] * 8))
        batch = take([oldest, new] if oldest.waiting else [new], 40)
        served += new.served
        assert batch
    assert abs(oldest.served - 40 * 40 / 4) <= 40 and served >= 40 * 40 / 2


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_taken_once_and_no_batch_is_over_the_budget(seed):
    random = np.random.default_rng(seed)
    jobs = [Job(rows(*random.integers(1, 40, random.integers(1, 30)))) for _ in range(12)]
    left, taken = list(jobs), []
    while left:
        batch = take(left, 64)
        assert sum(len(job.rows[place]) for job, place in batch) <= 64
        taken += [(id(job), place) for job, place in batch]
        left = [job for job in left if job.waiting]
    assert sorted(taken) == sorted((id(job), place) for job in jobs for place in range(len(job.rows)))


class Paced:
    """A model that waits for a permit before each batch, and remembers them."""

    def __init__(self):
        self.permits, self.batches = threading.Semaphore(0), []

    def __call__(self, batch):
        self.permits.acquire()
        self.batches.append([len(row) for row in batch])
        if [13] * 13 in batch:
            raise ValueError("thirteen")
        return sums(batch)


@pytest.fixture
def paced():
    model = Paced()
    batcher = Batcher(model, tokens_per_batch=100, max_waiting_tokens=2000)
    yield model, batcher
    model.permits.release(10_000)
    batcher.close(5)


def test_a_short_request_waits_for_the_batch_that_runs_and_not_for_the_list_before_it(paced):
    model, batcher = paced
    long = batcher.submit(rows(*[10] * 150))
    wait_until(lambda: long.started)
    short = batcher.submit(rows(3))
    model.permits.release(2)
    assert short.future.result(5) == [[9]]
    assert len(model.batches) == 2 and not long.future.done()
    model.permits.release(100)
    assert long.future.result(5).tolist() == [[100]] * 150


def test_a_request_that_is_given_up_is_left_out_of_later_batches(paced):
    model, batcher = paced
    first, given_up = batcher.submit(rows(100)), batcher.submit(rows(*[7] * 50))
    wait_until(lambda: first.started)
    assert batcher.waiting() == (2, 350)
    given_up.future.cancel()
    assert batcher.waiting()[1] == 0
    last = batcher.submit(rows(2))
    model.permits.release(100)
    assert last.future.result(5) == [[4]] and model.batches == [[100], [2]]


def test_a_row_that_cannot_be_scored_fails_its_own_request_only(paced):
    model, batcher = paced
    first = batcher.submit(rows(100))
    wait_until(lambda: first.started)
    good, bad, also = batcher.submit(rows(3, 4)), batcher.submit(rows(5, 13)), batcher.submit(rows(6))
    model.permits.release(100)
    assert good.future.result(5).tolist() == [[9], [16]] and also.future.result(5) == [[36]]
    with pytest.raises(Unscorable, match="thirteen"):
        bad.future.result(5)
    assert batcher.submit(rows(2)).future.result(5) == [[4]]


def test_a_model_that_fails_again_and_again_is_unhealthy_until_it_scores(caplog):
    def score(batch):
        if [13] * 13 in batch:
            raise RuntimeError("the device is lost")
        return sums(batch)

    batcher = Batcher(score, 100, 10_000)
    for _ in range(3):
        assert batcher.healthy()
        with pytest.raises(Unscorable, match="the device is lost"):
            batcher.submit(rows(13)).future.result(5)
    assert not batcher.healthy() and "the device is lost" in caplog.text
    assert batcher.submit(rows(2)).future.result(5) == [[4]] and batcher.healthy()
    batcher.close(5)


def test_too_much_is_refused_with_a_time_and_one_large_request_is_not(paced):
    model, batcher = paced
    first = batcher.submit(rows(*[100] * 30))  # more than may wait, but nothing else does
    with pytest.raises(Overloaded) as refused:
        batcher.submit(rows(100))
    assert refused.value.retry_after >= 1 and "wait already" in str(refused.value)
    model.permits.release(100)
    assert len(first.future.result(5)) == 30
    assert batcher.submit(rows(100)).future.result(5) == [[10000]]


def test_closing_scores_what_waits_and_takes_no_more():
    batcher = Batcher(lambda batch: (time.sleep(0.01), sums(batch))[1], 10, 10_000)
    jobs = [batcher.submit(rows(5, 5, 5)) for _ in range(10)]
    batcher.close()
    assert all(job.future.result(0).tolist() == [[25]] * 3 for job in jobs)
    with pytest.raises(Unhealthy, match="shutting down"):
        batcher.submit(rows(1))


def test_no_text_has_no_scores(paced):
    assert paced[1].submit([]).future.result(1).shape == (0, 1)


def test_it_tidies_up_once_when_idle_and_keeps_nothing_of_what_it_scored(monkeypatch):
    monkeypatch.setattr("modeling_gemma_encoder.serving.batching.IDLE", 0.05)
    rests = []
    batcher = Batcher(sums, 100, 10_000, rest=lambda: rests.append(1))
    jobs = [batcher.submit(rows(*range(1, 20))) for _ in range(50)]
    for job in jobs:
        job.future.result(5)
    kept = [weakref.ref(job) for job in jobs]
    del job, jobs
    wait_until(lambda: rests)
    time.sleep(0.2)
    assert rests == [1]  # not again and again
    batcher.submit(rows(1)).future.result(5)
    wait_until(lambda: len(rests) == 2)
    gc.collect()
    assert not any(ref() for ref in kept)
    batcher.close(5)
