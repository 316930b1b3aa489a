"""Laws of checkpoints: what is saved loads everywhere with the same scores, with or without this package."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, build, encoder_config, pad, texts
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_gemma_encoder
from modeling_gemma_encoder import (
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)

PACKAGE = Path(modeling_gemma_encoder.__file__).parent
STARRED = {path.name for path in PACKAGE.glob("*_gemma_encoder.py")}
BATCH = pad(texts((10, 6, 3)))
HEADS = [GemmaEncoderModel, GemmaEncoderForSequenceClassification, GemmaEncoderForRanking]


def scores(model):
    with torch.no_grad():
        outputs = model.eval()(**BATCH)
    return outputs.logits if "logits" in outputs else outputs.pooler_output


def test_the_code_that_travels_is_the_starred_files():
    closure = {Path(path).name for path in get_relative_import_files(PACKAGE / "modeling_gemma_encoder.py")}
    assert closure | {"modeling_gemma_encoder.py"} == STARRED
    assert len(STARRED) == 20


def test_starred_files_import_only_what_every_machine_has():
    allowed = {"torch", "transformers"} | set(sys.stdlib_module_names)
    for name in STARRED:
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module + ".py" in STARRED, name


@pytest.mark.parametrize("pooling", ["mean", "query_probe", "kv_probe"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_class", [*HEADS, GemmaEncoderForMaskedLM])
def test_a_checkpoint_holds_everything(model_class, family, pooling, tmp_path):
    config = encoder_config(family, pooling=pooling, attention_window=4, classifier_hidden_sizes=[16])
    model = build(model_class, config)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == STARRED | {"config.json", "model.safetensors"}
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(scores(loaded), scores(model), atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    head = (
        "GemmaEncoderForRanking" if model_class is GemmaEncoderForRanking else "GemmaEncoderForSequenceClassification"
    )
    assert config["auto_map"] == {
        "AutoConfig": "configuration_gemma_encoder.GemmaEncoderConfig",
        "AutoModel": "modeling_gemma_encoder.GemmaEncoderModel",
        "AutoModelForMaskedLM": "modeling_gemma_encoder.GemmaEncoderForMaskedLM",
        "AutoModelForSequenceClassification": f"modeling_gemma_encoder.{head}",
    }


@pytest.mark.parametrize("model_class", [*HEADS, GemmaEncoderForMaskedLM])
def test_auto_classes_need_no_remote_code_here(model_class, tmp_path):
    model = build(model_class, encoder_config())
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(encoder) is GemmaEncoderModel and not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(encoder.model.norm.weight, model.model.norm.weight)
    if model_class is not GemmaEncoderModel:
        auto = AutoModelForMaskedLM if model_class is GemmaEncoderForMaskedLM else AutoModelForSequenceClassification
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is model_class
        torch.testing.assert_close(scores(loaded), scores(model), atol=1e-6, rtol=1e-6)


STRANGER = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
folder, batch = sys.argv[1], json.loads(sys.argv[2])
batch = {name: torch.tensor(values) for name, values in batch.items()}
with torch.no_grad():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    pooled = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(**batch).pooler_output
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    logits = model(**batch).logits
    model.verify_attention()
    model.save_pretrained(folder + "/again")
    again = AutoModelForSequenceClassification.from_pretrained(folder + "/again", trust_remote_code=True).eval()
    again_logits = again(**batch).logits
assert "modeling_gemma_encoder" not in sys.modules and config.model_type == "gemma_encoder"
names = [type(model).__name__, type(again).__name__]
print(json.dumps([names, pooled.tolist(), logits.tolist(), again_logits.tolist()]))
"""


@pytest.mark.parametrize("model_class", HEADS)
def test_a_stranger_loads_it_with_the_same_scores(model_class, tmp_path):
    """A fresh process without this package, all three Auto classes, and a model saved again by the stranger."""
    folder = tmp_path / f"stranger-{model_class.__name__}"  # remote code is cached by folder name
    model = build(model_class, encoder_config("gemma2", pooling="query_probe", attention_window=4))
    model.save_pretrained(folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    batch = json.dumps({name: values.tolist() for name, values in BATCH.items()})
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), batch],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    names, pooled, logits, again = json.loads(result.stdout.splitlines()[-1])
    if model_class is GemmaEncoderModel:  # its head is new each time
        assert names == ["GemmaEncoderForSequenceClassification"] * 2
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(pooled), model(**BATCH).pooler_output, atol=1e-6, rtol=1e-6)
        return
    assert names == [model_class.__name__] * 2
    with torch.no_grad():
        expected = model(**BATCH)
        encoder = AutoModel.from_pretrained(folder).eval()
        torch.testing.assert_close(torch.tensor(pooled), encoder(**BATCH).pooler_output, atol=1e-6, rtol=1e-6)
    for theirs in (logits, again):
        torch.testing.assert_close(torch.tensor(theirs), expected.logits, atol=1e-6, rtol=1e-6)
    saved = json.loads((folder / "again" / "config.json").read_text())["auto_map"]
    assert saved == json.loads((folder / "config.json").read_text())["auto_map"]
    assert {path.name for path in (folder / "again").glob("*.py")} == STARRED


def test_the_text_classification_pipeline_runs(tmp_path, caplog):
    words = ["<pad>", "<unk>", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    model = build(
        GemmaEncoderForSequenceClassification,
        encoder_config(num_labels=3, id2label={0: "no", 1: "maybe", 2: "yes"}),
    )
    model.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    results = classify(["good film", "bad", "a good bad film"], batch_size=3, top_k=None)
    with torch.no_grad():
        expected = model(torch.tensor([[2, 4]])).logits.softmax(-1)[0]
    assert {row["label"]: row["score"] for row in results[0]} == {
        label: pytest.approx(expected[number].item(), abs=1e-5) for number, label in model.config.id2label.items()
    }


def test_half_a_checkpoint_is_reported(tmp_path):
    """A pooler that the checkpoint lacks is new, and said to be."""
    build(GemmaEncoderForSequenceClassification, encoder_config(pooling="mean")).save_pretrained(tmp_path)
    _, info = GemmaEncoderForSequenceClassification.from_pretrained(
        tmp_path, pooling="kv_probe", output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooler"}
