"""Measure the peak memory and the time of a ranker's training step over the length of its list.

    python benchmarks/list_memory.py --model examples/nano --chunk 8 --sizes 8 16 32 64 128

A list is scored whole or in chunks. Each measurement runs in a process of its own. Memory is the
growth of the peak over what the model and its gradients hold before the step: resident memory on
a CPU, under Linux, and allocated memory on a GPU. Time is the median of three steps.

Memory and time are measured in different processes. Where memory is measured, glibc gives freed
memory back at once. Otherwise it keeps that memory, and its fragments grow with the list too.

The script prints a table, and writes list_memory.png and list_memory.json.
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

GIVE_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


# 1. One measurement, in a process of its own


def reset_peak(device: str) -> int:
    """Reset the peak of memory to what is held now, and return it in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux resets VmHWM
    return read_status("VmRSS")


def read_peak(device: str) -> int:
    """Return the peak of memory since `reset_peak`, in bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else read_status("VmHWM")


def read_status(name: str) -> int:
    """Return an entry of the process's status under Linux, in bytes."""
    text = Path("/proc/self/status").read_text()
    entries = dict(line.split(":", 1) for line in text.splitlines())
    return int(entries[name].split()[0]) * 1024


def take_step(ranker: GemmaEncoderForRanking, size: int, tokens: int) -> None:
    """Compute the loss and the gradients of a list of `size` documents of `tokens` tokens each."""
    shape = (1, size, tokens)  # (batch, num_docs, seq_len)
    ids = torch.randint(5, ranker.config.vocab_size, shape, device=ranker.device)
    labels = torch.zeros(1, size, device=ranker.device)
    labels[0, 0] = 1
    ranker(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()


def measure(model: str, size: int, chunk: int | None, tokens: int) -> dict[str, float]:
    """Return the memory, in megabytes, and the seconds of a training step.

    Args:
        chunk: The documents that are scored at a time; None: all.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    ranker = GemmaEncoderForRanking.from_pretrained(model, dtype=torch.float32, list_chunk_size=chunk)
    ranker.to(device).train()
    take_step(ranker, 2, tokens)  # makes the gradients and buffers, which are not counted
    gc.collect()
    before, times = reset_peak(device), []
    for _ in range(3):
        began = time.perf_counter()
        take_step(ranker, size, tokens)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    megabytes = (read_peak(device) - before) / 1e6
    return {"megabytes": megabytes, "seconds": float(np.median(times))}


# 2. All measurements


def measure_apart(args: argparse.Namespace, size: int, chunk: int) -> dict[str, float]:
    """Return what `measure` returns, with memory and time from different processes."""
    command = [sys.executable, __file__, "--model", args.model, "--tokens", args.tokens]
    command += ["--cell", size, chunk]
    measured = {}
    for name, environment in (("seconds", {}), ("megabytes", GIVE_BACK)):
        process = subprocess.run(
            [str(word) for word in command],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        measured[name] = json.loads(process.stdout.splitlines()[-1])[name]
    return measured


def measure_all(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return the measurements of each way of scoring, one for each size of a list."""
    ways = {"the whole list": 0, f"chunks of {args.chunk}": args.chunk}
    results = {name: [] for name in ways}
    for size in args.sizes:
        for name, chunk in ways.items():
            results[name].append(measure_apart(args, size, chunk))
            print(f"{size} documents, {name}: {results[name][-1]}", flush=True)
    return results


# 3. The table and the plot


def markdown(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """Return a table with a row for each size of a list."""
    columns = " | ".join(f"{name}: MB | s" for name in results)
    lines = [f"| documents of {args.tokens} tokens | {columns} |"]
    lines.append("| ---: |" + " ---: | ---: |" * len(results))
    for size, *measured in zip(args.sizes, *results.values(), strict=True):
        cells = [f"{one['megabytes']:.0f} | {one['seconds']:.2f}" for one in measured]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, float]]], sizes: list[int], path: Path) -> None:
    """Save a plot of memory and one of time over the size of a list, side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    labels = {"megabytes": "peak memory of a step, MB", "seconds": "time of a step, s"}
    for panel, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for name, measured in results.items():
            panel.plot(sizes, [one[key] for one in measured], marker=".", label=name)
        panel.set(xlabel="documents of a list", ylabel=label, xlim=(0, None), ylim=(0, None))
        panel.legend()
    figure.savefig(path, dpi=120)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. `--cell` is for the processes that measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/nano")
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100, help="Tokens of a document.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/list_memory"))
    parser.add_argument("--cell", nargs=2, type=int, help=argparse.SUPPRESS)
    return parser


def main():
    args = make_parser().parse_args()
    if args.cell:
        size, chunk = args.cell
        print(json.dumps(measure(args.model, size, chunk or None, args.tokens)))
        return
    results = measure_all(args)
    print(f"\n{markdown(results, args)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": args.model,
        "tokens": args.tokens,
        "sizes": args.sizes,
        "results": results,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write(args.output_dir / "list_memory.json", json.dumps(facts, indent=2))
    plot(results, args.sizes, args.output_dir / "list_memory.png")


if __name__ == "__main__":
    main()
