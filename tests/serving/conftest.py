"""A ranker and a classifier of nano with untrained heads, and servers of them."""

import pytest
from servers import save, serving

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.templates import RANKING_TEMPLATE


@pytest.fixture(scope="session")
def ranker(tmp_path_factory):
    return save(tmp_path_factory.mktemp("serving") / "ranker", GemmaEncoderForRanking, {"pair": RANKING_TEMPLATE})


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory):
    """The same ranker with a temperature and a bias."""
    folder, numbers = tmp_path_factory.mktemp("serving") / "calibrated", {"calibration_temperature": 2.0}
    return save(folder, GemmaEncoderForRanking, {"pair": RANKING_TEMPLATE}, calibration_bias=0.5, **numbers)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    names = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "problem_type": "single_label_classification"}
    return save(tmp_path_factory.mktemp("serving") / "classifier", GemmaEncoderForSequenceClassification, **names)


@pytest.fixture(scope="session")
def ranking_server(ranker):
    with serving(ranker) as server:
        yield server


@pytest.fixture(scope="session")
def classifying_server(classifier):
    with serving(classifier) as server:
        yield server
