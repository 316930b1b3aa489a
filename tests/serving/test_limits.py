"""Laws of limits and of the process: too much is refused, nothing accepted is lost, nothing is open that
should not be."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from helpers import ROOT
from servers import serving, wait_until

BODY = {"query": "how do cats purr", "texts": ["Dogs bark.", "Cats purr."]}
LONG = {"query": "how do cats purr", "texts": ["cats purr " * 100] * 60}  # a second of work or more


def post(url, body=BODY, path="/rerank", **options):
    return httpx.post(url + path, json=body, timeout=60, **options)


def test_requests_beyond_the_limits_are_refused_and_others_are_not(ranker):
    limits = {"max_client_batch_size": 3, "max_body_bytes": 500, "token_file": None}
    with serving(ranker, **limits) as server:
        many = post(server.url, {**BODY, "texts": ["a"] * 4})
        assert many.status_code == 413 and "may have 3 texts; this one has 4" in many.json()["error"]
        large = post(server.url, {**BODY, "texts": ["a" * 600]})
        assert large.status_code == 413 and "may have 500 bytes" in large.json()["error"]

        def chunks():  # no length is given before
            yield from [b"a" * 100] * 20

        assert httpx.post(server.url + "/rerank", content=chunks()).status_code == 413
        assert post(server.url).status_code == 200


def test_a_token_is_asked_for_where_there_is_one(ranker, tmp_path):
    (tmp_path / "token").write_text("a-secret\n")
    with serving(ranker, token_file=str(tmp_path / "token")) as server:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "a-secret"}):
            refused = post(server.url, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert httpx.get(server.url + "/info").status_code == httpx.get(server.url + "/metrics").status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
        allowed = {"Authorization": "Bearer a-secret"}
        assert post(server.url, headers=allowed).status_code == 200
        assert "a-secret" not in httpx.get(server.url + "/info", headers=allowed).text


def test_a_full_queue_says_when_to_come_again(ranker):
    with serving(ranker, max_waiting_tokens=1000, tokens_per_batch=500) as server:
        thread = threading.Thread(target=post, args=(server.url, LONG))
        thread.start()
        wait_until(lambda: server.engine.batcher.waiting()[1])
        refused = post(server.url)
        assert refused.status_code == 429 and refused.json()["error_type"] == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        thread.join()
        assert post(server.url).status_code == 200


def test_more_requests_at_a_time_than_allowed_are_refused_before_they_are_read(ranker):
    with serving(ranker, max_concurrent_requests=1) as server:
        thread = threading.Thread(target=post, args=(server.url, LONG))
        thread.start()
        wait_until(lambda: server.engine.batcher.waiting()[1])
        refused = post(server.url)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert httpx.get(server.url + "/health").status_code == 200  # asked for by those who watch over it
        thread.join()
        assert post(server.url).status_code == 200


def test_a_request_has_a_deadline_and_then_frees_the_model(ranker):
    with serving(ranker, request_seconds=0.3, tokens_per_batch=200) as server:
        late = post(server.url, LONG)
        assert late.status_code == 504 and "within 0.3 s" in late.json()["error"]
        wait_until(lambda: server.engine.batcher.waiting() == (0, 0))
        assert post(server.url).status_code == 200


def test_a_long_query_is_not_read_once_for_each_of_many_texts(ranker):
    with serving(ranker, max_waiting_tokens=5000) as server:
        refused = post(server.url, {"query": "cats purr " * 30, "texts": ["a"] * 500})
        assert refused.status_code == 413 and "too many beside 500 documents" in refused.json()["error"]
        assert post(server.url, {"query": "cats purr " * 30, "texts": ["a"] * 5}).status_code == 200


def test_a_client_that_goes_away_frees_the_model(ranker):
    with serving(ranker, tokens_per_batch=200) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/rerank", json=LONG, timeout=0.5)
        begin = time.monotonic()
        wait_until(lambda: server.engine.batcher.waiting() == (0, 0))
        assert time.monotonic() - begin < 2
        text = httpx.get(server.url + "/metrics").text
        assert 'te_request_failure{err="disconnected"} 1.0' in text


def connect(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)


def test_a_slow_request_is_ended_and_holds_nobody_up(ranker):
    with serving(ranker, body_seconds=0.5) as server, connect(server.url) as slow:
        head = b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        slow.sendall(head + b'{"query"')
        assert post(server.url).status_code == 200
        answer = slow.makefile("rb").read().decode()  # until the server ends the connection
        assert answer.startswith("HTTP/1.1 408") and "within 0.5 s" in answer


def test_hundreds_of_requests_at_once_are_all_answered(ranker):
    async def ask(url):
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as http:
            answers = await asyncio.gather(*(http.post("/rerank", json=BODY) for _ in range(200)))
        return [(answer.status_code, answer.text) for answer in answers]

    with serving(ranker) as server:
        answers = asyncio.run(ask(server.url))
    assert {status for status, _ in answers} == {200}
    best = {(rank["index"], round(rank["score"], 4)) for _, text in answers for rank in json.loads(text)}
    assert len(best) == 2


def start(*words):
    """The process of the script and its address."""
    command = [sys.executable, "-u", "examples/serve.py", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            process.said = []
            threading.Thread(target=lambda: process.said.append(process.stdout.read()), daemon=True).start()
            return process, found[0]
    raise AssertionError(f"ended with {process.wait()}")


def test_the_script_listens_on_loopback_and_ends_after_its_last_answer(ranker):
    process, url = start("--model", ranker, "--port", 0, "--dtype", "float32")
    try:
        answers = []
        long = threading.Thread(target=lambda: answers.append(post(url, LONG)))
        long.start()
        wait_until(lambda: "te_queue_size 1.0" in httpx.get(url + "/metrics").text)
        listening = subprocess.run(["cat", f"/proc/{process.pid}/net/tcp"], capture_output=True, text=True).stdout
        port = f"{int(url.rpartition(':')[2]):04X}"
        addresses = [line.split()[1] for line in listening.splitlines()[1:] if line.split()[3] == "0A"]
        assert f"0100007F:{port}" in addresses and f"00000000:{port}" not in addresses
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(url))
        long.join(60)
        assert answers[0].status_code == 200 and len(answers[0].json()) == 60
        assert process.wait(20) in (0, -signal.SIGTERM)
        wait_until(lambda: process.said)
        assert "Ending when the open requests are answered" in process.said[0]
    finally:
        process.kill()


def refuses(url):
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no/such/folder"], "--model: there is no folder no/such/folder"),
        (["--model", "examples/nano", "--port", "0"], "is not a trained classifier or ranker"),
        (
            ["--model", "examples/nano", "--max_client_batch_size", "0"],
            "--max_client_batch_size must be at least 1; got 0",
        ),
        (["--model", "examples/nano", "--max_replicas", "2"], "--max_replicas needs --replicas"),
        (["--model", "examples/nano", "--replicas", "2", "--device", "cpu"], "--device does nothing on Ray"),
        (["--model", "examples/nano", "--port", "70000"], "--port must be from 0 to 65535"),
        (["--model", "examples/nano", "--host", "203.0.113.1"], "--host 203.0.113.1 --port 8080: "),
        (["--model", "examples/nano", "--token_file", "no-such-file"], "there is no file no-such-file"),
    ],
)
def test_wrong_options_are_told_in_a_line(monkeypatch, capsys, words, message):
    from modeling_gemma_encoder.serving import __main__ as serve

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["serve.py", *words])
    with pytest.raises(SystemExit) as ended:
        serve.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_server_needs_its_own_extra_only():
    """A process that has none of the libraries of training imports the whole server."""
    code = """if True:
        import sys
        names = "accelerate datasets evaluate matplotlib pandas peft sklearn scipy bm25s ray cohere"
        for name in (names + " gradio sentence_transformers ir_measures aiohttp onnx").split():
            assert name not in sys.modules
            sys.modules[name] = None  # as if it were not installed
        from modeling_gemma_encoder.serving.__main__ import main
        sys.argv = ["serve", "--help"]
        main()
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--max_client_batch_size" in result.stdout and "--ray_address" in result.stdout
