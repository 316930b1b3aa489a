"""Laws of the page: its buttons give what the model gives, in a real browser too where there is one."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from helpers import NANO, ROOT, run_script
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
TEXT, QUERY, DOCUMENTS = "A fine film.", "rain", ["It rains.", "The sun shines on a harbour.", "A star."]


def serve(folder: Path):
    """The process of the page, and its address."""
    command = [sys.executable, "-u", "examples/app.py", "--model", str(folder), "--dtype", "float32"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()  # or the pipe fills
            return process, found[0]
    raise AssertionError(f"ended with {process.wait()}")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    names = {"id2label": {0: "no", 1: "maybe", 2: "yes"}}
    GemmaEncoderForSequenceClassification.from_pretrained(NANO, pooling="query_probe", **names).save_pretrained(folder)
    set_template(AutoTokenizer.from_pretrained(NANO)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page(classifier):
    process, address = serve(classifier)
    yield address
    process.kill()


def test_it_classifies_as_the_model_does(page, classifier):
    model = GemmaEncoderForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    client = Client(page, verbose=False)
    for texts in ((TEXT, ""), (TEXT, "Another.")):
        given = client.predict(*texts, api_name="/classify")
        with torch.no_grad():
            expected = model(**tokenizer(*filter(None, texts), return_tensors="pt")).logits[0].softmax(-1).tolist()
        shares = {row["label"]: row["confidence"] for row in given["confidences"]}
        assert shares == pytest.approx(dict(zip(("no", "maybe", "yes"), expected, strict=True)), abs=1e-5)
    with pytest.raises(AppError, match="no text"):
        client.predict(" ", "", api_name="/classify")


@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_a_browser_shows_it_and_asks_no_other_host(page, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        tab, asked = browser.new_page(), []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page)
        tab.get_by_role("button", name="Classify", exact=True).click()
        tab.get_by_text("maybe").first.wait_for()
        tab.get_by_role("tab", name="Look inside").click()
        tab.get_by_role("button", name="Look", exact=True).click()
        tab.locator("img[src*='base64'], img[src*='/file=']").first.wait_for()
        tab.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert all(url.startswith((page, "data:", "blob:")) for url in asked)
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_it_ranks_as_the_model_does(tmp_path):
    torch.manual_seed(0)
    model = GemmaEncoderForRanking.from_pretrained(NANO, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    tokenizer = set_template(AutoTokenizer.from_pretrained(NANO), pair=RANKING_TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        batch = tokenizer([QUERY] * 3, DOCUMENTS, padding=True, return_tensors="pt")
        scores = model(**batch).logits[:, 0].tolist()
    process, address = serve(tmp_path)
    try:
        client = Client(address, verbose=False)
        table = client.predict(QUERY, "\n".join(["", *DOCUMENTS, " "]), api_name="/rerank")
    finally:
        process.kill()
    expected = sorted(zip(scores, DOCUMENTS, strict=True), reverse=True)
    assert [row[2] for row in table["data"]] == [document for _, document in expected]
    assert [row[1] for row in table["data"]] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_what_is_no_head_is_said(decoder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script("examples/app.py", "--model", decoder)
    assert "is not a trained classifier or ranker" in capsys.readouterr().err
