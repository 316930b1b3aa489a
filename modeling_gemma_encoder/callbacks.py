"""Callbacks for the Trainer: `KeepMemory` makes training on a CPU faster, `StepTimer` measures its
speed."""

import ctypes
import statistics
import sys
import time
from pathlib import Path

import psutil
from transformers import TrainerCallback

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc, malloc.h
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 2**10, 65536
RESERVE = 1 / 8  # of the memory: if less is left, freed memory is given back
# What a container may use, and what it uses: control groups of version 2, and of version 1.
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def keep_freed_memory() -> bool:
    """Set this process's allocator to keep freed memory, and return whether that was possible (it
    is with glibc alone).

    By default every large tensor is mapped when it is made and unmapped when it is freed, and its
    pages are fetched one by one in between. This happens in every step to the gradient of a
    vocabulary of 262,144 tokens, 670 MB for Gemma 3 270M; benchmarks/README.md has the times. With
    freed memory kept, the process stays at its largest size, and grows by the gaps between tensors
    of varying sizes.
    """
    return set_allocator(mmap_max=0, trim_threshold=-1)


def give_back_memory() -> None:
    """Undo `keep_freed_memory`, and give back to the system what is free."""
    if set_allocator(DEFAULT_MMAP_MAX, DEFAULT_TRIM_THRESHOLD):
        ctypes.CDLL(None).malloc_trim(0)


def set_allocator(mmap_max: int, trim_threshold: int) -> bool:
    """Set glibc's limits of mapped tensors and of kept bytes, and return whether that was possible."""
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, mmap_max)) and bool(libc.mallopt(M_TRIM_THRESHOLD, trim_threshold))


def memory_left(groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the share of the memory that is left: of the machine's or of this container's, the
    smaller."""
    memory = psutil.virtual_memory()
    shares = [memory.available / memory.total]
    for limit, used in LIMITS:
        try:
            most = int((groups / limit).read_text())  # or "max"
            shares.append(1 - int((groups / used).read_text()) / most)
        except (OSError, ValueError):
            continue
    return min(shares)


class KeepMemory(TrainerCallback):
    """Keep freed memory for the next step if the Trainer trains on a CPU; see `keep_freed_memory`.

    As soon as less than an eighth of the memory is left, freed memory is given back from then on.
    """

    def __init__(self):
        self.keeps = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.keeps = args.device.type == "cpu" and memory_left() > RESERVE and keep_freed_memory()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.keeps and memory_left() < RESERVE:
            give_back_memory()
            self.keeps = False

    on_prediction_step = on_step_begin


class StepTimer(TrainerCallback):
    """Time each optimizer step once its batch is loaded; compiling, evaluation and pauses do not
    change the median.

    The number of steps that a logged training loss is the mean of is logged beside it, as
    `loss_steps`.
    """

    def __init__(self):
        self.seconds: list[float] = []
        self.tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = state.num_input_tokens_seen
        self.logged = state.global_step  # the Trainer forgets the losses between its last log and a checkpoint

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)
        self.tokens = state.num_input_tokens_seen - self.before

    def on_log(self, args, state, control, **kwargs):
        if "loss" in state.log_history[-1]:
            state.log_history[-1]["loss_steps"] = state.global_step - self.logged
            self.logged = state.global_step

    def tokens_per_second(self, state) -> float | None:
        """Return the tokens of a step over the median step's time; None when no step was taken."""
        if not self.seconds:
            return None
        return state.num_input_tokens_seen / state.global_step / statistics.median(self.seconds)

    def real_tokens_per_second(self) -> float | None:
        """Return the tokens of all steps since training began or was resumed, over their time; for
        steps of any length.

        Padding does not count if the Trainer's `include_num_input_tokens_seen` is "non_padding".
        """
        return self.tokens / sum(self.seconds) if self.seconds else None
