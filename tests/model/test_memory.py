"""Laws of kept memory: what is freed and asked for again is not fetched from the system again, as long as there is
enough."""

import subprocess
import sys

import pytest

from modeling_gemma_encoder.callbacks import memory_left

SCRIPT = """
import resource, torch
from modeling_gemma_encoder.callbacks import keep_freed_memory

def fetched():
    for _ in range(3):
        torch.zeros(16 * 2**20).add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(16 * 2**20).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(fetched(), int(keep_freed_memory()), fetched())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_kept_memory_is_not_fetched_again():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    given_back, kept, fetched = map(int, run.stdout.split())
    if not kept:
        pytest.skip("another C library than glibc")
    assert fetched <= given_back / 4  # a small tensor may lie in the way once or twice


SHORTAGE = """
import os, torch
from types import SimpleNamespace
from modeling_gemma_encoder import callbacks

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

args, callback, before = SimpleNamespace(device=torch.device("cpu")), callbacks.KeepMemory(), megabytes()
callback.on_train_begin(args, None, None)
torch.zeros(128 * 2**20).add_(1)  # 512 MB
kept = megabytes() - before
callback.on_step_begin(args, None, None)
still = megabytes() - before
callbacks.memory_left = lambda: 0.1
callback.on_step_begin(args, None, None)
torch.zeros(128 * 2**20).add_(1)
print(int(callback.keeps), kept, still, megabytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_memory_is_given_back_when_little_is_left():
    run = subprocess.run([sys.executable, "-c", SHORTAGE], capture_output=True, text=True, check=True)
    keeps, kept, still, given_back = map(int, run.stdout.split())
    if kept < 500:
        pytest.skip("another C library than glibc, or memory is short here")
    assert not keeps and still > 500 and given_back < 100


def test_a_container_has_the_memory_that_it_may_use(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory_left(tmp_path) == pytest.approx(memory_left(tmp_path / "none"), abs=0.05)  # no limit
    (tmp_path / "memory.max").write_text("1010\n")
    assert memory_left(tmp_path) == pytest.approx(10 / 1010)
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("2000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1999\n")
    assert memory_left(tmp_path) == pytest.approx(1 / 2000)
