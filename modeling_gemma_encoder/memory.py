"""Memory that a CPU's training steps use again and again, kept instead of given back and fetched anew."""

import ctypes
import sys

from transformers import TrainerCallback

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc, malloc.h


def keep_freed_memory() -> bool:
    """
    Tells this process's allocator to keep what is freed; whether it could be told (glibc alone takes this).

    By default every large tensor is mapped when it is made and unmapped when it is freed, and its pages are fetched one
    by one in between. The gradient of a vocabulary of 262,144 tokens, 670 MB for Gemma 3 270M, goes that way in every
    step; benchmarks/README.md says how long it takes. The process then stays as large as it once was, and grows by what
    lies unused between tensors of varying sizes: not for where memory is short.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))


class KeepMemory(TrainerCallback):
    """`keep_freed_memory` where the Trainer trains on a CPU."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type == "cpu":
            keep_freed_memory()
