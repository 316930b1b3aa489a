r"""Put load on a server of a trained reranker, and compare it with scoring the same pairs offline.

    python benchmarks/serving.py --model my-ranker
    python benchmarks/serving.py --model my-ranker --dtype float32 --seconds 30 --rounds 3
    python benchmarks/serving.py --model my-ranker --only memory --requests 10000

load: pairs per second of `examples/serve.py` with 1, 8 and 32 clients, each of which sends a query
with `--documents` passages and waits for the answer, beside `score_pairs` on the same pairs in a
process of its own. p50 and p99 are of the time of a request.

peer: 32 clients that send `--short_documents` passages, of at most `--short_words` words, to ours
and to a plain server that calls `CrossEncoder.predict` in each request, with the same checkpoint.

memory: the server's resident memory after a tenth of `--requests` short requests, and after all,
under load and when it has been idle.

Everything runs on this machine, over loopback, clients and server on the same cores. Servers run
one after the other in each round. Ratios are medians over the rounds. The script writes
serving.json and serving.md in `--output_dir`.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import aiohttp
import numpy as np
import psutil
import transformers
from measures.texts import make_pairs

from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder._scripts.provenance import provenance
from modeling_gemma_encoder.checkpoints import load_tokenizer

ROOT = Path(__file__).parent.parent
CLIENTS = (1, 8, 32)
# What people write first: the model is called in each request.
PEER = """
import sys, torch, uvicorn, modeling_gemma_encoder
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder

app = FastAPI()
model = CrossEncoder(sys.argv[1], model_kwargs={"dtype": getattr(torch, sys.argv[2])})
class Request(BaseModel):
    query: str
    texts: list[str]
@app.post("/rerank")
def rerank(request: Request):
    scores = model.predict([(request.query, text) for text in request.texts])
    return [{"index": int(i), "score": float(scores[i])} for i in (-scores).argsort()]
print("http://127.0.0.1:" + sys.argv[3], flush=True)
uvicorn.run(app, port=int(sys.argv[3]), log_level="warning")
"""
OFFLINE = """
import json, sys, time
from modeling_gemma_encoder import load_ranker, score_pairs
model, tokenizer = load_ranker(sys.argv[1], sys.argv[2])
pairs = json.load(sys.stdin)
score_pairs(model, tokenizer, pairs[:32])
begin = time.monotonic()
score_pairs(model, tokenizer, pairs)
print("pairs/s", len(pairs) / (time.monotonic() - begin))
"""


@contextmanager
def running(words: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server, and yield its address and its process once it answers."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                time.sleep(2)  # the plain server prints before it listens
                yield found[0], psutil.Process(process.pid)
                break
        else:
            raise SystemExit(f"The server ended with {process.wait()}.")
    finally:
        process.terminate()
        process.wait()


def ours(options: argparse.Namespace):
    return running(["examples/serve.py", "--model", options.model, "--dtype", options.dtype, "--port", "0"])


def peer(options: argparse.Namespace):
    return running(["-c", PEER, options.model, options.dtype, str(options.peer_port)])


async def ask(url: str, requests: list[dict], clients: int, seconds: float) -> dict:
    """Return pairs per second, and percentiles of the milliseconds of requests, of clients that
    send requests one after the other for so long. What is answered before each client has had its
    first answer is not counted, nor what is answered later than that."""
    answers, begin = [], time.monotonic()  # answers: (client, when, pairs, ms)

    async def client(number: int) -> None:
        place = number
        while time.monotonic() < begin + seconds:
            request, sent = requests[place % len(requests)], time.monotonic()
            async with session.post(f"{url}/rerank", json=request) as answer:
                scores = await answer.json() if answer.status == 200 else []
            answers.append((number, time.monotonic(), len(scores), 1000 * (time.monotonic() - sent)))
            place += clients

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*map(client, range(clients)))
    firsts = {number: when for number, when, *_ in reversed(answers)}
    start, end = max(firsts.values()), begin + seconds
    counted = [answer for answer in answers if start < answer[1] <= end]
    if not counted:
        raise SystemExit(f"--seconds {seconds:g} is too short: the first answers took {start - begin:.0f} s.")
    p50, p99 = np.percentile([ms for *_, ms in counted], (50, 99)).tolist()
    return {
        "pairs_per_second": sum(pairs for _, _, pairs, _ in counted) / (end - start),
        "p50_ms": p50,
        "p99_ms": p99,
        "requests": len(answers),
        "failed": sum(pairs == 0 for _, _, pairs, _ in answers),
    }


def measure(url: str, requests: list[dict], clients: int, seconds: float) -> dict:
    """Return what `ask` does, after some requests that are not counted."""
    asyncio.run(ask(url, requests, 1, min(3, seconds)))
    return asyncio.run(ask(url, requests, clients, seconds))


def score_offline(options: argparse.Namespace, pairs: list) -> float:
    """Return the pairs per second of `score_pairs` in a process of its own."""
    words = [sys.executable, "-c", OFFLINE, options.model, options.dtype]
    text = subprocess.run(words, cwd=ROOT, input=json.dumps(pairs), stdout=subprocess.PIPE, text=True, check=True)
    return float(text.stdout.split()[-1])


def requests_of(pairs: list, documents: int) -> list[dict]:
    """Return requests with so many passages each."""
    starts = range(0, len(pairs) - documents + 1, documents)
    return [{"query": pairs[0][0], "texts": [text for _, text in pairs[at : at + documents]]} for at in starts]


def measure_load(options: argparse.Namespace, pairs: list) -> list[dict]:
    """Return a row for each number of clients, medians over the rounds."""
    found = {clients: [] for clients in CLIENTS}
    for number in range(options.rounds):
        offline = score_offline(options, pairs)
        with ours(options) as (url, process):
            for clients in CLIENTS:
                row = measure(url, requests_of(pairs, options.documents), clients, options.seconds)
                row |= {"offline": offline, "x_offline": row["pairs_per_second"] / offline}
                found[clients].append(row | {"memory_mb": process.memory_info().rss / 1e6})
                print(f"round {number + 1}, {clients} clients: {row}", flush=True)
    return [{"clients": clients, **middle(rows)} for clients, rows in found.items()]


def measure_peer(options: argparse.Namespace, pairs: list) -> list[dict]:
    """Return a row for ours and for the plain server with short requests, medians over the rounds."""
    pairs = [(query, " ".join(text.split()[: options.short_words])) for query, text in pairs]
    rows, short = {"ours": [], "CrossEncoder.predict": []}, requests_of(pairs, options.short_documents)
    for number in range(options.rounds):
        for name, server in (("ours", ours), ("CrossEncoder.predict", peer)):
            with server(options) as (url, process):
                row = measure(url, short, CLIENTS[-1], options.seconds)
                rows[name].append(row | {"memory_mb": process.memory_info().rss / 1e6})
            print(f"round {number + 1}, {name}: {row}", flush=True)
    for own, others in zip(rows["ours"], rows["CrossEncoder.predict"], strict=True):
        own["x_peer"] = own["pairs_per_second"] / others["pairs_per_second"]
        others["x_peer"] = 1.0
    return [{"server": name, **middle(of_server)} for name, of_server in rows.items()]


def measure_memory(options: argparse.Namespace, pairs: list) -> list[dict]:
    """Return the server's resident memory in MB after a tenth of the requests, and after all: under
    load, and three seconds later, when freed memory was given back."""
    short, sizes = requests_of(pairs, 1), []
    with ours(options) as (url, process):
        done = 0
        while done < options.requests:
            done += asyncio.run(ask(url, short, CLIENTS[-1], options.seconds))["requests"]
            loaded = process.memory_info().rss / 1e6
            time.sleep(3)
            sizes.append({"requests": done, "loaded_mb": loaded, "idle_mb": process.memory_info().rss / 1e6})
            print(sizes[-1], flush=True)
    first = next(row for row in sizes if row["requests"] >= options.requests / 10)
    return [first, sizes[-1]]


def middle(rows: list[dict]) -> dict:
    """Return the medians of rows with the same numbers."""
    return {name: median(row[name] for row in rows) for name in rows[0]}


def table(rows: list[dict]) -> str:
    """Return rows as a table in Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] + ["---:"] * (len(names) - 1)]
    lines += [[row[name] if isinstance(row[name], str) else f"{row[name]:.4g}" for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A trained reranker.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", nargs="+", choices=("load", "peer", "memory"), default=["load", "peer", "memory"])
    parser.add_argument("--pairs", type=int, default=640, help="Passages, which requests take in turn.")
    parser.add_argument("--documents", type=int, default=20, help="Passages of a request.")
    parser.add_argument("--short_documents", type=int, default=1, help="The same, beside the plain server.")
    parser.add_argument("--short_words", type=int, help="The most words of these passages. Default: all.")
    parser.add_argument("--seconds", type=float, default=20, help="How long each load lasts.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000, help="Of the measure of memory.")
    parser.add_argument("--peer_port", type=int, default=8079)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/serving"))
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    pairs = make_pairs(load_tokenizer(options.model), options.pairs)
    measures = {"load": measure_load, "peer": measure_peer, "memory": measure_memory}
    found = {name: measures[name](options, pairs) for name in options.only}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    write(options.output_dir / "serving.json", json.dumps({"settings": settings, **found, **provenance()}, indent=2))
    text = "\n\n".join(f"{name}\n\n{table(rows)}" for name, rows in found.items())
    write(options.output_dir / "serving.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
