"""The code of the README and of every page runs as it stands, with the nano decoder in the place of the ones it names.

Also: what a block says that it prints is what it prints, and every relative link and anchor leads somewhere.
"""

import contextlib
import io
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf_files import Q8_0, write_gguf
from helpers import NANO, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_gemma_encoder import RANKING_TEMPLATE, GemmaEncoderForRanking, set_template

FOLDERS = ("benchmarks", "docs", "examples", "model_cards")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def code_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# The code of cards, and SECURITY.md's, is for repositories on the Hub.
WITH_CODE = [
    named(page)
    for page in PAGES
    # That of docs/serving.md needs a server: tests/serving/test_clients.py.
    if code_of(page) and not named(page).startswith(("model_cards/", "SECURITY", "docs/serving"))
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Make a folder with what the blocks read."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "gemma").symlink_to(NANO)
    (folder / "my-gemma").symlink_to(NANO)
    rows = ["text,label", "It rains.,wet", "The sun is out.,dry", "Snow and a longer text.,cold", ""]
    (folder / "train.csv").write_text("\n".join(rows))
    (folder / "test.csv").write_text("\n".join([*rows[:3], ""]))  # a class is missing: ids must not shift
    # What `examples/msmarco.py` leaves, untrained.
    GemmaEncoderForRanking.from_pretrained(NANO, dtype=torch.float32).save_pretrained(folder / "my-ranker")
    set_template(AutoTokenizer.from_pretrained(NANO), pair=RANKING_TEMPLATE).save_pretrained(folder / "my-ranker")
    (folder / "folder").mkdir()
    decoder = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    write_gguf(decoder, folder / "folder" / "gemma-3-1b-Q8_0.gguf", kind=Q8_0)
    return folder


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """Return a function that runs a page's blocks one after another, once, and returns what they leave."""
    done = {}

    def run_page(page: str) -> SimpleNamespace:
        if page not in done:
            folder = tmp_path_factory.mktemp("page") / "here"
            shutil.copytree(prepared, folder, symlinks=True)
            done[page] = SimpleNamespace(folder=folder, names={}, printed=[])
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.chdir(folder)
                for block in code_of(ROOT / page):
                    if "langchain" not in block:  # not installed here
                        printed = io.StringIO()
                        with contextlib.redirect_stdout(printed):
                            exec(re.sub("google/gemma-[23]-\\w+", "gemma", block), done[page].names)
                        done[page].printed.append((block, printed.getvalue()))
        return done[page]

    return run_page


def test_there_is_code_in_the_readme_and_in_the_pages():
    counts = {page: len(code_of(ROOT / page)) for page in WITH_CODE}
    assert counts.pop("README.md") == 3
    assert sum(counts.values()) >= 15


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_block_runs_and_prints_what_it_says(page, run):
    for block, printed in run(page).printed:
        said = re.search(r"(?:^# .*\n)+\Z", block, re.MULTILINE)
        said = [line[2:] for line in said.group(0).splitlines()] if said else []
        assert printed.splitlines()[len(printed.splitlines()) - len(said) :] == said


def test_the_quickstart_says_what_it_prints():
    assert re.search(r"print\(.*\)\n(# \w+ 0\.\d\d\n){2}\Z", code_of(ROOT / "README.md")[0])


@pytest.mark.parametrize("page", ["README.md", "docs/fine-tuning.md"])
def test_an_encoder_is_trained_on_a_table(page, run):
    ran = run(page)
    assert type(ran.names["model"]).__name__ == "GemmaEncoderForSequenceClassification"
    assert ran.names["model"].config.id2label == {0: "cold", 1: "dry", 2: "wet"}
    assert ran.names["dataset"]["test"]["labels"][:] == [2, 1]
    assert (ran.folder / "my-encoder" / "attention_gemma_encoder.py").exists()


def test_an_encoder_has_logits(run):
    assert run("docs/fine-tuning.md").names["logits"].shape == (2, 3)


def test_a_ranker_is_loaded_and_scores(run):
    assert sorted(run("README.md").names["ranking"].tolist()) == [0, 1]
    assert run("docs/ranking.md").names["scores"].shape == (2,)


def test_a_ranker_is_trained(run):
    ran = run("docs/ranking.md")
    assert sorted(ran.names["best_first"].tolist()) == [0, 1] and ran.names["loss"].item() > 0
    assert ran.names["trainer"].state.global_step == 3  # one list an epoch
    assert GemmaEncoderForRanking.from_pretrained(ran.folder / "my-ranker").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(ran.folder / "my-ranker").model_max_length == 256


def test_an_adapter_is_saved_and_merged(run):
    ran = run("docs/adapters.md")
    assert (ran.folder / "my-adapter" / "adapter_model.safetensors").exists()
    assert type(ran.names["merged"]).__name__ == "GemmaEncoderForSequenceClassification"
    assert ran.names["merged"].config.pooling == "kv_probe"


def test_the_own_loss_is_worked_out_by_hand_and_has_no_parts():
    block = next(block for block in code_of(ROOT / "docs" / "fine-tuning.md") if "own_loss" in block)
    assert len(block.splitlines()) <= 12
    names = {"torch": torch}
    exec(block.partition("\n\n\nTrainer(")[0], names)
    probabilities = [[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]
    logits, labels = torch.tensor(probabilities).log(), torch.tensor([0, 2])
    rows = []
    for (of_row, label), weight in zip(((probabilities[0], 0), (probabilities[1], 2)), (1, 5), strict=True):
        smoothed = [0.9 * (number == label) + 0.1 / 3 for number in range(3)]
        cross_entropy = -sum(share * math.log(p) for share, p in zip(smoothed, of_row, strict=True))
        rows.append(weight * (1 - of_row[label]) ** 2 * cross_entropy)
    whole = names["own_loss"](SimpleNamespace(logits=logits), labels, 2)
    parts = [names["own_loss"](SimpleNamespace(logits=logits[n : n + 1]), labels[n : n + 1], 2) for n in (0, 1)]
    assert whole.item() == pytest.approx(sum(rows) / 2) == sum(parts).item()


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors, times = set(), Counter()
    for heading in re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        anchors.add(f"{anchor}-{times[anchor]}" if times[anchor] else anchor)
        times[anchor] += 1
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_and_anchor_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"https?:|mailto:|\{\{", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"]({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")
