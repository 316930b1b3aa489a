"""Laws of the round trip: what real clients push to a Hub comes back with the same scores, pinned, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import NANO, ROOT, TEMPLATE
from hub_server import Hub, Repo
from huggingface_hub import constants
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.adapters import add_lora
from modeling_gemma_encoder.hub import publishing as hub_code
from modeling_gemma_encoder.hub.file_checks import Check
from modeling_gemma_encoder.hub.publishing import stage
from modeling_gemma_encoder.hub.run_record import RunRecord
from modeling_gemma_encoder.templates import set_template

BIN = Path(sys.executable).parent
PAIR = ("how do cats purr", "They vibrate their larynx.")


@pytest.fixture
def hub(tmp_path):
    with Hub() as server:
        server.home = tmp_path / "home"
        yield server


@pytest.fixture
def online(hub, monkeypatch):
    """Publishing in this process, to `hub`."""
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(hub.home)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def publish(source, repo_id, token="hf_me", base=str(NANO), base_revision=None, **options):
        run = RunRecord(command="python train.py")
        form = {"base": base, "base_revision": base_revision, "licence": "apache-2.0"}
        ready = stage(str(source), hub.home / f"staged-{len(hub.requests)}", repo_id, TEMPLATE, run, **form)
        return hub_code.publish(ready, token=token, **options)

    return publish


def run(hub, *command, token: str | None = "hf_me", home: str = "", cwd=ROOT) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(hub.home) + home, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def python(hub, code: str, *args, **options):
    """The JSON that `code` prints last in a fresh process."""
    result = run(hub, sys.executable, "-c", code, *map(str, args), **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@torch.no_grad()
def score(model, tokenizer) -> list[float]:
    return model.eval()(**tokenizer(*PAIR, return_tensors="pt")).logits[0].tolist()


FRESH_PROCESS = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = []
for source in sys.argv[2:]:
    repo, _, revision = source.partition("@")
    pinned = {"revision": revision or "main", "trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(repo, **pinned)
    model = AutoModelForSequenceClassification.from_pretrained(repo, dtype=torch.float32, **pinned).eval()
    with torch.no_grad():
        found.append(model(**tokenizer(*json.loads(sys.argv[1]), return_tensors="pt")).logits[0].tolist())
assert "modeling_gemma_encoder" not in sys.modules
print(json.dumps(found))
"""


def fresh_scores(hub, *sources, **options) -> list[list[float]]:
    return python(hub, FRESH_PROCESS, json.dumps(PAIR), *sources, cwd=hub.home.parent, **options)


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.own_process
def test_a_published_ranker_comes_back_pinned_tagged_and_private(hub, trained):
    command = [sys.executable, "examples/publish.py", "--model", str(trained), "--repo_id", "me/ranker", "--tag", "v1"]
    command += ["--base_model", "google/gemma-2-2b"]
    result = run(hub, *command, "--private", "--language", "en")
    assert result.returncode == 0, result.stderr
    repo = hub.repos["me/ranker"]
    assert list(repo.messages.values()) == ["initial commit", "Publish a Gemma Encoder", "Pin the commit in the card"]
    pinned = list(repo.commits)[1]
    card = repo.commits[repo.tags["v1"]]["README.md"].decode()
    assert f'"revision": "{pinned}"' in card and "pipeline_tag: text-ranking" in card and "license: gemma" in card
    assert repo.commits[pinned]["NOTICE"].startswith(b"Gemma is provided under and subject to the Gemma Terms of Use")
    assert not [path for path in repo.commits[pinned] if path.endswith((".bin", ".pt"))]
    expected = score(GemmaEncoderForRanking.from_pretrained(trained), AutoTokenizer.from_pretrained(trained))
    close(fresh_scores(hub, f"me/ranker@{pinned}"), [expected])
    check = run(hub, sys.executable, "-m", "modeling_gemma_encoder.hub", "verify", "me/ranker", "--revision", pinned)
    assert check.returncode == 0, check.stdout + check.stderr
    assert f"{'commit':<24} {pinned}" in check.stdout
    assert repo.commits[pinned]["README.md"].decode().count("<commit>") == card.count(f'"{pinned}"') > 0
    check = run(hub, sys.executable, "-m", "modeling_gemma_encoder.hub", "verify", "me/ranker", token=None, home="2")
    assert check.returncode == 2 and "Repository Not Found" in check.stderr


def test_a_pull_request_and_a_branch_leave_main_alone_and_old_files_go(hub, online, trained):
    hub.repos["other/ranker"] = repo = Repo(private=False)
    old = {"README.md": b"theirs", "model-00001-of-00002.safetensors": b"old"}
    repo.branches["main"] = repo.add(old, "theirs")
    for wrong, said in (({"private": True}, "is public"), ({"tag": "v1", "create_pr": True}, "do not go together")):
        with pytest.raises(ValueError, match=said):
            online(trained, "other/ranker", token="hf_other", **wrong)
    first = dict(repo.branches)
    commit = online(trained, "other/ranker", create_pr=True)
    assert commit.pr_url.endswith("discussions/1") and commit.pr_revision == "refs/pr/1"
    assert repo.branches["main"] == first["main"]
    proposed = repo.commits[repo.branches["refs/pr/1"]]
    assert "model.safetensors" in proposed and "model-00001-of-00002.safetensors" not in proposed
    assert proposed["README.md"] != b"theirs"
    online(trained, "other/ranker", token="hf_other", revision="trial")
    assert repo.branches["main"] == first["main"]
    close(*fresh_scores(hub, "other/ranker@trial", "other/ranker@refs/pr/1"))
    repo.branches["own"] = repo.add({**repo.commits[repo.branches["trial"]], "notes.txt": b"work"}, "a branch's own")
    with pytest.raises(ValueError, match=r"holds other files: notes\.txt"):
        online(trained, "other/ranker", token="hf_other", revision="own")


def test_files_of_others_stay_unless_they_are_to_be_replaced(hub, online, trained):
    hub.repos["me/ranker"] = repo = Repo(private=False)
    theirs = {"modules.json": b"[]", "onnx/model.onnx": b"old", "optimizer.pt": b"old", "README.md": b"old"}
    repo.branches["main"] = repo.add(theirs, "old")
    with pytest.raises(ValueError, match=r"holds other files: modules\.json, onnx/model\.onnx\. Pass `replace`"):
        online(trained, "me/ranker")
    online(trained, "ranker", replace=True, tag="v1")
    with pytest.raises(ValueError, match="`tag` v1 is there already"):
        online(trained, "ranker", tag="v1")
    assert not {"modules.json", "onnx/model.onnx", "optimizer.pt"} & set(hub.files("me/ranker"))
    assert 'CrossEncoder("me/ranker", **pinned)' in hub.files("me/ranker")["README.md"].decode()


def test_what_fails_verification_or_arrives_broken_is_refused(hub, online, trained, monkeypatch):
    hub.lost.add("config.json")
    with pytest.raises(hub_code.NotVerified, match=r"FAILED\s+config\.json\s+arrived changed"):
        online(trained, "me/ranker")
    hub.lost.clear()
    monkeypatch.setattr(hub_code, "verify", lambda folder, device: [Check("outputs", False, "differ by 1.0")])
    with pytest.raises(hub_code.NotVerified, match=r"outputs\s+differ by 1.0"):
        online(trained, "me/another")
    assert "me/another" not in hub.repos


PUSH = """
import json, sys, torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
folder, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
def scores(model):
    with torch.no_grad():
        return model.eval()(**tokenizer(*%r, return_tensors="pt")).logits[0].tolist()
ranker = AutoModelForSequenceClassification.from_pretrained(folder)
ranker.push_to_hub("pushed", private=True)
tokenizer.push_to_hub("pushed")
ranker.save_pretrained(output + "/saved", push_to_hub=True, repo_id="me/saved")
tokenizer.push_to_hub("me/saved")
expected = [scores(ranker)] * 2
model = GemmaEncoderForSequenceClassification.from_pretrained(%r, num_labels=2, dtype=torch.float32)
rows = Dataset.from_list([{**tokenizer(text), "labels": i %% 2} for i, text in enumerate(["good", "bad"] * 4)])
arguments = TrainingArguments(
    output, push_to_hub=True, hub_model_id="me/trained", max_steps=2, report_to="none", use_cpu=True, save_steps=1
)
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
print(json.dumps([*expected, scores(trainer.model)]))
""" % (PAIR, str(NANO))  # noqa: UP031


def test_push_to_hub_of_models_tokenizers_and_the_trainer(hub, trained, tmp_path):
    expected = python(hub, PUSH, trained, tmp_path / "output")
    assert hub.repos["me/pushed"].private and not hub.repos["me/trained"].private
    for found, right in zip(fresh_scores(hub, "me/pushed", "me/saved", "me/trained"), expected, strict=True):
        close(found, right)


AGAIN = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
pinned = {"revision": sys.argv[2], "trust_remote_code": True}
AutoModelForSequenceClassification.from_pretrained(sys.argv[1], **pinned).push_to_hub("me/again")
AutoTokenizer.from_pretrained(sys.argv[1], **pinned).push_to_hub("me/again")
assert "modeling_gemma_encoder" not in sys.modules
print("null")
"""


def test_uploaded_by_hand_published_again_from_remote_code_and_two_of_one_name(hub, staged, tmp_path):
    """The `hf` command; a model that was loaded as remote code; two owners' repositories in one process."""
    other = tmp_path / "other"
    model = GemmaEncoderForSequenceClassification.from_pretrained(NANO, num_labels=3, attention="causal")
    model.save_pretrained(other)
    tokenizer = set_template(AutoTokenizer.from_pretrained(NANO))
    tokenizer.save_pretrained(other)
    for folder, token, name in ((staged, "hf_me", "me/encoder"), (other, "hf_other", "other/encoder")):
        result = run(hub, BIN / "hf", "upload", name, folder, token=token)
        assert result.returncode == 0, result.stderr
    expected = [
        score(GemmaEncoderForRanking.from_pretrained(staged), AutoTokenizer.from_pretrained(staged)),
        score(model.float(), tokenizer),
    ]
    for found, right in zip(fresh_scores(hub, "me/encoder", "other/encoder"), expected, strict=True):
        close(found, right)
    python(hub, AGAIN, "me/encoder", hub.repos["me/encoder"].branches["main"], cwd=tmp_path)
    close(fresh_scores(hub, "me/again"), expected[:1])
    first, again = hub.files("me/encoder"), hub.files("me/again")
    assert {p: d for p, d in first.items() if p.endswith(".py")} == {
        p: d for p, d in again.items() if p.endswith(".py")
    }
    assert json.loads(first["config.json"])["auto_map"] == json.loads(again["config.json"])["auto_map"]
    result = run(hub, BIN / "hf", "download", "me/again", "--local-dir", tmp_path / "down")
    assert (
        result.returncode == 0 and (tmp_path / "down" / "model.safetensors").read_bytes() == again["model.safetensors"]
    )


PUBLISH_ADAPTERS = """
import json, sys
from pathlib import Path
from modeling_gemma_encoder.hub.publishing import publish, stage
from modeling_gemma_encoder.hub.run_record import RunRecord
for name, base, revision in (("over-raw", "me/raw", sys.argv[2]), ("over-encoder", "me/encoder", sys.argv[3])):
    source, folder = Path(sys.argv[1], name), Path(sys.argv[1], name + "-staged")
    form = {"base": base, "base_revision": revision, "licence": "apache-2.0"}
    publish(stage(str(source), folder, "me/" + name, Path("model_cards/template.md"), RunRecord(), **form))
print("null")
"""

ADAPTERS = """
import json, sys, torch
from transformers import AutoTokenizer, AutoModelForSequenceClassification
from peft import AutoPeftModelForSequenceClassification
from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
found = []
for repo in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(repo)
    model = GemmaEncoderForSequenceClassification.from_pretrained(repo).eval()
    with torch.no_grad():
        found.append(model(**tokenizer(*%r, return_tensors="pt")).logits[0].tolist())
wrong = []
for auto in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
    try:
        auto.from_pretrained(sys.argv[1])
    except Exception as error:
        wrong.append(str(error))
print(json.dumps([found, wrong]))
""" % (PAIR,)  # noqa: UP031


def test_adapters_over_a_raw_decoder_and_over_an_encoder(hub, staged, tmp_path):
    for repo, folder in (("me/raw", NANO), ("me/encoder", staged)):
        hub.repos[repo] = found = Repo(private=False)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        found.branches["main"] = found.add(files, "initial commit")
    tokenizer = set_template(AutoTokenizer.from_pretrained(NANO))
    expected = []
    for name, base, options in (
        ("over-raw", NANO, {"pooling": "kv_probe"}),
        ("over-encoder", staged, {"num_labels": 1}),
    ):
        torch.manual_seed(0)
        cls = GemmaEncoderForSequenceClassification
        adapted = add_lora(cls.from_pretrained(base, dtype=torch.float32, **{"num_labels": 3, **options}), r=4)
        for parameter in adapted.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
        adapted.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        expected.append(score(adapted, tokenizer))
        with pytest.raises(ValueError, match="others do not have"):
            stage(str(tmp_path / name), tmp_path / "refused" / name, f"me/{name}", TEMPLATE, RunRecord())
    revisions = [hub.repos[repo].branches["main"] for repo in ("me/raw", "me/encoder")]
    python(hub, PUBLISH_ADAPTERS, tmp_path, *revisions)
    for name, repo, revision in zip(("over-raw", "over-encoder"), ("me/raw", "me/encoder"), revisions, strict=True):
        assert json.loads(hub.files(f"me/{name}")["adapter_config.json"])["revision"] == revision
        assert f"base_model: {repo}" in hub.files(f"me/{name}")["README.md"].decode()
    found, wrong = python(hub, ADAPTERS, "me/over-raw", "me/over-encoder")
    for scores, right in zip(found, expected, strict=True):
        close(scores, right)
    assert len(wrong) == 2
