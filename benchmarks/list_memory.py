"""Peak memory and time of a ranker's training step over the length of its list, whole and in chunks.

    python benchmarks/list_memory.py --model examples/nano --chunk 8 --sizes 8 16 32 64 128

Each cell is a process of its own: the growth of its peak over what the model and its gradients held before the step
(resident memory on a CPU, under Linux; allocated memory on a GPU), and the median time of three steps. On a CPU memory
is measured in another process than time, which gives freed memory back at once: glibc keeps it otherwise, and its
fragments grow with the list too. Prints a table, and leaves list_memory.png and .json.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder._scripts.files import write

GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def forget_peak(device: str) -> int:
    """Bytes that are held now, from which on the peak counts."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins anew
    return resident("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(what: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024


def cell(model: str, size: int, chunk: int | None, tokens: int) -> dict:
    """One list of `size` documents of `tokens` tokens: forward, loss, backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    ranker = (
        GemmaEncoderForRanking.from_pretrained(model, dtype=torch.float32, list_chunk_size=chunk).to(device).train()
    )

    def step(size: int):
        ids = torch.randint(5, ranker.config.vocab_size, (1, size, tokens), device=device)
        labels = torch.zeros(1, size, device=device)
        labels[0, 0] = 1
        ranker(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()

    step(2)  # gradients and buffers are there now
    gc.collect()
    before, times = forget_peak(device), []
    for _ in range(3):
        began = time.perf_counter()
        step(size)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"megabytes": (peak(device) - before) / 1e6, "seconds": float(np.median(times))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/nano")
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100, help="of a document")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/list_memory"))
    parser.add_argument("--cell", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        size, chunk = args.cell
        print(json.dumps(cell(args.model, size, chunk or None, args.tokens)))
        return
    ways = {"the whole list": 0, f"chunks of {args.chunk}": args.chunk}
    found = {name: [] for name in ways}
    for size in args.sizes:
        for name, chunk in ways.items():
            words = [sys.executable, __file__, "--model", args.model, "--tokens", args.tokens, "--cell", size, chunk]
            measured = {}
            for key, environment in (("seconds", {}), ("megabytes", GIVE_BACK)):
                form = {"check": True, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **environment}}
                printed = subprocess.run(list(map(str, words)), **form).stdout
                measured[key] = json.loads(printed.splitlines()[-1])[key]
            found[name].append(measured)
            print(f"{size} documents, {name}: {found[name][-1]}", flush=True)
    lines = [f"| documents of {args.tokens} tokens | {' | '.join(f'{name}: MB | s' for name in ways)} |"]
    lines.append("| ---: |" + " ---: | ---: |" * len(ways))
    for row, size in enumerate(args.sizes):
        cells = [f"{found[name][row]['megabytes']:.0f} | {found[name][row]['seconds']:.2f}" for name in ways]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    print("\n" + "\n".join(lines))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {"model": args.model, "tokens": args.tokens, "sizes": args.sizes, "results": found}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write(args.output_dir / "list_memory.json", json.dumps(facts, indent=2))
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in zip(
        panels, ("megabytes", "seconds"), ("peak memory of a step, MB", "time of a step, s"), strict=True
    ):
        for name, values in found.items():
            panel.plot(args.sizes, [value[key] for value in values], marker=".", label=name)
        panel.set(xlabel="documents of a list", ylabel=label, xlim=(0, None), ylim=(0, None))
        panel.legend()
    figure.savefig(args.output_dir / "list_memory.png", dpi=120)


if __name__ == "__main__":
    main()
