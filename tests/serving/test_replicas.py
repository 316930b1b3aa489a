"""On Ray Serve: a replica is killed under load, and every request is answered with the right scores."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx
import psutil
import pytest
from helpers import ROOT
from servers import free_port, wait_until

from modeling_gemma_encoder.ranking.scoring import load_ranker, score_pairs

pytest.importorskip("ray.serve", reason="needs ray[serve]", exc_type=ImportError)
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
QUERY, TEXTS = "how do cats purr", ["Dogs bark.", "Cats purr by vibrating the larynx. " * 20, "Purr."]


def scorers(parent: psutil.Process) -> list[psutil.Process]:
    """Processes of replicas of the model."""
    found = []
    for process in parent.children(recursive=True):
        try:
            if "ServeReplica" in "".join(process.cmdline()) and "Scorer" in "".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def served(ranker, tmp_path):
    port, log = free_port(), (tmp_path / "log").open("w+")
    words = ["--model", ranker, "--dtype", "float32", "--replicas", "2", "--cpus_per_replica", "0.5", "--port", port]
    command = [sys.executable, "examples/serve.py", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            if process.poll() is not None or "Serving" in (tmp_path / "log").read_text():
                break
            time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:  # the test failed: end what it started, and no other cluster of this machine
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()


def test_a_replica_is_killed_under_load_and_nothing_is_lost(served, ranker):
    process, url = served
    model, tokenizer = load_ranker(ranker, "float32", "cpu")
    expected = score_pairs(model, tokenizer, [(QUERY, text) for text in TEXTS])
    answers, end = [], threading.Event()

    def client():
        with httpx.Client(base_url=url, timeout=60) as http:
            while not end.is_set():
                answers.append(http.post("/rerank", json={"query": QUERY, "texts": TEXTS}))

    clients = [threading.Thread(target=client) for _ in range(8)]
    for one in clients:
        one.start()
    wait_until(lambda: len(answers) > 20, 60)
    before = scorers(psutil.Process(process.pid))
    assert len(before) == 2
    before[0].kill()
    count = len(answers)
    wait_until(lambda: len(answers) > count + 100, 90)
    wait_until(lambda: len({one.pid for one in scorers(psutil.Process(process.pid))} - {before[0].pid}) == 2, 90)
    end.set()
    for one in clients:
        one.join(60)
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        scores = {rank["index"]: rank["score"] for rank in answer.json()}
        assert [scores[place] for place in range(3)] == pytest.approx(expected, abs=1e-5)
    refused = httpx.post(url + "/rerank", json={"query": QUERY, "texts": []})
    assert refused.status_code == 400 and json.loads(refused.text)["error_type"] == "empty"
    assert httpx.post(url + "/rerank", json={"query": "purr " * 5000, "texts": ["a"]}).status_code == 422
    assert httpx.get(url + "/info").json()["model_type"]["reranker"]
    long = {"query": QUERY, "texts": TEXTS * 100}
    last = threading.Thread(target=lambda: answers.append(httpx.post(url + "/rerank", json=long, timeout=60)))
    last.start()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    last.join()
    assert answers[-1].status_code == 200 and len(answers[-1].json()) == 300  # it was answered first
