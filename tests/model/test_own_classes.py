"""Laws of a user's own class: it comes back as what it is or not at all, never as the class it is derived from."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from helpers import NANO, build, encoder_config, pad, texts
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification, GemmaEncoderModel
from modeling_gemma_encoder.adapters import add_lora
from modeling_gemma_encoder.pooling_gemma_encoder import FirstKPooler, segment_mean

BATCH = pad(texts((7, 3)))
OWN = """
import torch
from {source} import {parent}

class Largest({parent}):
    def pool(self, encoded):
        parts = encoded.token_states.tensor_split(encoded.offsets[1:-1].tolist())
        return torch.stack([part.amax(0) for part in parts]).float()
"""
REGISTER = '\nLargest.register_for_auto_class("AutoModelForSequenceClassification")\n'


def import_file(path):
    """A module of a file, as `import` makes it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def own_class(folder, registered: bool, parent: str = "GemmaEncoderForSequenceClassification"):
    path = folder / f"own_{registered}_{parent}.py".lower()
    path.write_text(OWN.format(source="modeling_gemma_encoder", parent=parent) + (REGISTER if registered else ""))
    return import_file(path).Largest


@torch.no_grad()
def logits(model):
    return model.eval()(**BATCH).logits


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("parent", ["GemmaEncoderForSequenceClassification", "GemmaEncoderForRanking"])
def test_its_own_class_loads_it_and_no_other_does(registered, parent, tmp_path):
    model_class = own_class(tmp_path, registered, parent)
    model = build(model_class, encoder_config())
    stock = GemmaEncoderForSequenceClassification if parent.endswith("Classification") else GemmaEncoderForRanking
    same = build(stock, encoder_config())
    same.load_state_dict(model.state_dict())
    assert (logits(same) - logits(model)).abs().max() > 0.01  # or nothing would be seen
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(model_class.from_pretrained(tmp_path / "saved")), logits(model))
    others = (stock, GemmaEncoderModel, AutoModel, AutoModelForSequenceClassification)
    for other in others:
        with pytest.raises(ValueError, match=r"was saved by Largest, .*Largest\.from_pretrained"):
            other.from_pretrained(tmp_path / "saved")


def test_a_class_that_is_not_registered_says_how_when_it_is_saved(tmp_path, caplog):
    build(own_class(tmp_path, registered=False), encoder_config()).save_pretrained(tmp_path / "saved")
    assert 'Largest.register_for_auto_class("AutoModelForSequenceClassification")' in caplog.text


def test_a_registered_class_travels_with_the_files_of_its_parents(tmp_path):
    """A process that has not imported this package loads it, with `trust_remote_code`, to the same scores; the class's
    own file imports the package, which must be installed, where it does not import its parents by relative names."""
    model = build(own_class(tmp_path, registered=True), encoder_config())
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    name = "own_true_gemmaencoderforsequenceclassification"
    assert saved["auto_map"]["AutoModelForSequenceClassification"] == f"{name}.Largest"
    torch.save((BATCH, logits(model)), tmp_path / "expected.pt")
    program = (
        "import sys, torch\nfrom transformers import AutoModelForSequenceClassification\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "batch, expected = torch.load(sys.argv[2])\n"
        "assert type(model).__name__ == 'Largest'\n"
        "with torch.no_grad():\n    torch.testing.assert_close(model(**batch).logits, expected)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "saved"), str(tmp_path / "expected.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_an_adapter_of_an_own_class_is_no_other_classs(tmp_path):
    model_class = own_class(tmp_path, registered=False)
    model = add_lora(model_class.from_pretrained(NANO, dtype=torch.float32)).eval()
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(NANO).save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(model_class.from_pretrained(tmp_path / "saved")), logits(model))
    with pytest.raises(ValueError, match="was saved by Largest"):
        GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "saved")


def test_a_class_of_the_own_class_may_load_it(tmp_path):
    model_class = own_class(tmp_path, registered=False)

    class Smaller(model_class):
        pass

    model = build(model_class, encoder_config())
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(Smaller.from_pretrained(tmp_path / "saved")), logits(model))


def test_a_pooler_that_was_put_in_is_not_saved_without_a_word(tmp_path, caplog):
    class Own(torch.nn.Module):
        def forward(self, states, offsets):
            return segment_mean(states, offsets) * 2

    model = build(GemmaEncoderForSequenceClassification, encoder_config())
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "stock")
        assert "pooler" not in caplog.text
        model.pooler = Own()
        model.save_pretrained(tmp_path / "own")
    assert "`pooler` is of the class Own, not the MeanPooler of pooling='mean'" in caplog.text
    model.pooler = FirstKPooler(model.config)  # which is a MeanPooler too
    model.save_pretrained(tmp_path / "other")
    assert "`pooler` is of the class FirstKPooler, not the MeanPooler" in caplog.text


def test_a_class_has_another_name_than_its_parent():
    """Or nothing in a checkpoint would tell them apart."""
    with pytest.raises(TypeError, match="needs a name of its own"):
        type("GemmaEncoderForRanking", (GemmaEncoderForRanking,), {})


def test_weights_of_an_own_class_are_taken_where_that_is_said(tmp_path):
    model = build(own_class(tmp_path, registered=False), encoder_config())
    model.save_pretrained(tmp_path / "saved")
    stock = GemmaEncoderForSequenceClassification.from_pretrained(
        tmp_path / "saved", architectures=["GemmaEncoderForSequenceClassification"]
    )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in stock.state_dict().items())


def test_a_pooler_of_ones_own_and_a_class_of_ones_own_see_all_token_states(tmp_path):
    class OwnPooler(torch.nn.Module):
        def forward(self, states, offsets):
            return torch.stack([states[start:end].amax(0) for start, end in pairwise(offsets)])

    model = build(GemmaEncoderForSequenceClassification, encoder_config(pooling="last_k"))
    subclass = build(own_class(tmp_path, registered=False), model.config)
    subclass.load_state_dict(model.state_dict())
    model.pooler = OwnPooler()
    with torch.no_grad():
        encoded = model.encode(**BATCH)
        expected = model.classifier(OwnPooler()(encoded.token_states, encoded.offsets))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(subclass), expected, atol=1e-5, rtol=1e-5)
