"""Fixtures of all tests, which tests are slow, and what must be set before transformers and torch are imported."""

import gc
import os

os.environ["PYTHONPATH"] = os.pathsep.join(  # of processes that tests start
    [os.path.join(os.path.dirname(__file__), "startup"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
).rstrip(os.pathsep)
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may need the network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: tests side by side share the cores

from pathlib import Path

import pytest
import torch
from helpers import NANO, decoder_config
from slow_tests import NIGHTLY, SLOW
from transformers import AutoModelForCausalLM, AutoTokenizer


def pytest_collection_modifyitems(items):
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        names = {*map(str, path.parents), str(path), f"{path}::{item.originalname}", f"{path}::{item.name}"}
        if not names.isdisjoint((*SLOW, *NIGHTLY)):
            item.add_marker("slow")
        if not names.isdisjoint(NIGHTLY):
            item.add_marker("nightly")
    # Files with slow tests first, so that no worker ends long before the other.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    # What was imported stays. Else each collection by accelerate or by us looks at it again, in half of a test's time.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nano_tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """Folder of a tiny Gemma 2 with nano's tokenizer."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = decoder_config("gemma2", vocab_size=8192, max_position_embeddings=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder)
    return folder
