"""Callbacks for the Trainer: `KeepMemory` makes training on a CPU faster, `StepTimer` measures its
speed."""

import ctypes
import statistics
import sys
import time

from transformers import TrainerCallback

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc, malloc.h


def keep_freed_memory() -> bool:
    """Set this process's allocator to keep freed memory, and return whether that was possible (it
    is with glibc alone).

    By default every large tensor is mapped when it is made and unmapped when it is freed, and its
    pages are fetched one by one in between. This happens in every step to the gradient of a
    vocabulary of 262,144 tokens, 670 MB for Gemma 3 270M; benchmarks/README.md has the times. With
    freed memory kept, the process stays at its largest size, and grows by the gaps between tensors
    of varying sizes. Do not use it if memory is short.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))


class KeepMemory(TrainerCallback):
    """Keep freed memory for the next step if the Trainer trains on a CPU; see `keep_freed_memory`."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type == "cpu":
            keep_freed_memory()


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
