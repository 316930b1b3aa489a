"""Laws of checkpoints: safetensors, whole and themselves; a config chooses no code; a save is all or nothing."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, build, encoder_config, pad, texts
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_adapters import adapted
from test_adapters import scores as adapter_scores

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification, GemmaEncoderModel

BATCH = pad(texts((10, 6, 3)))
load = GemmaEncoderForSequenceClassification.from_pretrained


@torch.no_grad()
def scores(model):
    return model.eval()(**BATCH).logits


@pytest.fixture
def model():
    return build(GemmaEncoderForSequenceClassification, encoder_config("gemma2", pooling="query_probe", num_labels=3))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def rewrite(folder, change, file="model.safetensors"):
    """The weights file anew, with its tensors changed."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def drop(prefix):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)]


def test_pickled_weights_are_never_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(folder)
    with pytest.raises(ValueError, match="use_safetensors"):
        load(folder, use_safetensors=False)


def test_pickled_adapters_are_never_read(tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["model.layers.1.", "model.norm", "pooler.", "classifier."])
@pytest.mark.parametrize("model_class", [GemmaEncoderForSequenceClassification, GemmaEncoderModel])
def test_weights_that_are_missing_are_not_made_up(folder, part, model_class):
    rewrite(folder, drop(part))
    if part == "classifier." and model_class is GemmaEncoderModel:
        model_class.from_pretrained(folder)  # it has no head
        return
    with pytest.raises(ValueError, match=rf"lacks .* weights of the model that its config.json describes: {part}"):
        model_class.from_pretrained(folder)


def test_a_head_may_be_new_where_none_was_saved_or_another_is_asked_for(folder, tmp_path):
    build(GemmaEncoderModel, encoder_config("gemma2")).save_pretrained(tmp_path / "headless")
    assert load(tmp_path / "headless", num_labels=5).config.num_labels == 5
    deeper = load(folder, classifier_hidden_sizes=[7], ignore_mismatched_sizes=True)
    assert deeper.classifier.out_proj.weight.shape == (3, 7)
    assert load(folder, num_labels=2, ignore_mismatched_sizes=True).config.num_labels == 2


def test_weights_of_a_deeper_model_are_refused_unless_fewer_layers_are_asked_for(folder):
    config = json.loads((folder / "config.json").read_text())["text_config"]
    fewer = {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    assert len(load(folder, text_config=fewer).model.layers) == 2
    edit(folder, text_config={**config, **fewer})
    with pytest.raises(ValueError, match=r"does not have: model\.layers\.2"):
        load(folder)


def test_a_file_that_is_cut_or_of_other_sizes_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises((SafetensorError, OSError)):
            load(folder)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)


def test_an_index_names_no_files_elsewhere(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a file of the checkpoint's own folder"):
        load(folder)


KERNELS = ["kernels-community/flash-attn", "evil/repo:forward", "paged|eager", "os.system", "../kernel"]


@pytest.mark.parametrize("name", KERNELS)
def test_a_config_never_chooses_an_attention_function(folder, name):
    """Upstream would fetch a kernel of that name and run it."""
    config = json.loads((folder / "config.json").read_text())
    fields = {"_attn_implementation": name, "attn_implementation": name, "experts_implementation": name}
    edit(folder, **fields, text_config={**config["text_config"], **fields})
    loaded = load(folder)
    assert loaded.config._attn_implementation == loaded.model.config._attn_implementation == "gemma_encoder_unpadded"
    with pytest.raises(ValueError, match="attn_implementation"):
        load(folder, attn_implementation=name)
    with pytest.raises(ValueError, match="attn_implementation"):
        loaded.set_attn_implementation(name)


def test_a_config_fetches_no_code_and_no_quantiser(folder):
    edit(folder, auto_map={"AutoConfig": "evil/repo--config.Config", "AutoModel": "evil/repo--model.Model"})
    loaded = load(folder)
    assert type(loaded).__module__ == "modeling_gemma_encoder.modeling_gemma_encoder"
    loaded.save_pretrained(folder)
    assert "evil" not in (folder / "config.json").read_text()
    edit(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match=r"bitsandbytes.*quant_method='mxfp4'"):
        load(folder)


def test_our_own_commands_never_ask_whether_to_run_remote_code():
    """An Auto class that is not told asks at a prompt, in a job that nobody watches."""
    scripts = [*ROOT.glob("modeling_gemma_encoder/**/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
    calls = [
        (path.name, node.lineno, {keyword.arg for keyword in node.keywords})
        for path in scripts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and getattr(node.func.value, "id", "").startswith("Auto")
    ]
    assert len(calls) > 10
    assert [call[:2] for call in calls if "trust_remote_code" not in call[2]] == []


KILLED = """
import os, sys
import transformers.modeling_utils as upstream
from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
folder, size = sys.argv[1:]
def half(tensors, filename, metadata=None):
    with open(filename, "wb") as file:
        file.write(b"half a file")
    os.kill(os.getpid(), 9)
model = GemmaEncoderForSequenceClassification.from_pretrained(folder)
upstream.safe_save_file = half
for parameter in model.parameters():
    parameter.data += 1
model.save_pretrained(folder, max_shard_size=size)
"""


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_save_that_is_killed_leaves_the_old_checkpoint(model, folder, size):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = subprocess.run([sys.executable, "-c", KILLED, str(folder), size], cwd=ROOT, capture_output=True)
    assert result.returncode == -9, result.stderr.decode()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    torch.testing.assert_close(scores(load(folder)), scores(model), atol=1e-6, rtol=0)
    load(folder).save_pretrained(folder)  # and the next save clears up
    assert {path.name for path in folder.iterdir()} == set(before)


@pytest.mark.parametrize("sizes", [("20KB", "5GB"), ("5GB", "20KB"), ("20KB", "60KB")])
def test_a_save_in_another_number_of_files_replaces_the_old_one(model, folder, sizes):
    """Upstream leaves model.safetensors beside new parts, and reads the old one."""
    model.save_pretrained(folder, max_shard_size=sizes[0])
    model.pooler.probes.data += 1
    model.save_pretrained(folder, max_shard_size=sizes[1])
    torch.testing.assert_close(scores(load(folder)), scores(model), atol=1e-6, rtol=0)
    weights = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    parts = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert weights == parts and (len(parts) == 1) == (sizes[1] == "5GB")


def test_an_adapter_that_is_saved_again_replaces_the_old_one(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    for parameter in model.parameters():
        parameter.data += 0.01 * parameter.requires_grad
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names
    torch.testing.assert_close(adapter_scores(load(tmp_path).eval()), adapter_scores(model), atol=1e-5, rtol=0)


OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise SystemExit("a network call")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from transformers import AutoConfig, AutoModelForSequenceClassification
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[1] + "-again")
from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
GemmaEncoderForSequenceClassification.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1] + "-again")
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_folder_is_loaded_and_saved_without_the_network(folder, offline, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(folder)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
