"""A ranker as training leaves it, and the folder that is published."""

import pytest
import torch
from helpers import NANO, TEMPLATE
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder.hub.model_card import Run
from modeling_gemma_encoder.hub.publishing import stage
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A ranker's folder, as after a training."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    GemmaEncoderForRanking.from_pretrained(NANO, pooling="kv_probe", dtype=torch.float32).save_pretrained(folder)
    tokenizer = set_template(AutoTokenizer.from_pretrained(NANO), pair=RANKING_TEMPLATE)
    tokenizer("cut", truncation=True, max_length=2)
    tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"pickled")
    (folder / "optimizer.pt").write_bytes(b"pickled")
    return folder


@pytest.fixture(scope="session")
def staged(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged") / "folder"
    stage(str(trained), folder, "me/ranker", TEMPLATE, Run(), base="examples/nano", licence="apache-2.0")
    return folder
