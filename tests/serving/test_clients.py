"""Real clients, each its own library, get the model's scores from a server."""

import re

import cohere
import httpx
import numpy as np
import pytest
from haystack import Document as HaystackDocument
from haystack.utils import Secret
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from helpers import ROOT
from huggingface_hub import InferenceClient
from langchain_cohere import CohereRerank
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from servers import serving

from modeling_gemma_encoder.ranking.scoring import load_ranker, score_pairs

QUERY = "how do cats purr"
TEXTS = ["Dogs bark.", "Cats purr by vibrating the larynx.", "The harbour froze in January.", "Purr."]
TOKEN = "a-secret"


@pytest.fixture(scope="module")
def url(ranker, tmp_path_factory):
    """The address of a server that asks for a token, as those on the open network should."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN)
    with serving(ranker, token_file=str(file)) as server:
        yield server.url


@pytest.fixture(scope="module")
def expected(ranker):
    """The texts' scores, and the texts with them, the best first."""
    scores = score_pairs(*load_ranker(ranker, "float32", "cpu"), [(QUERY, text) for text in TEXTS])
    return [(TEXTS[place], pytest.approx(float(scores[place]), abs=1e-5)) for place in np.argsort(-scores)]


def test_cohere(url, expected):
    for client in (cohere.ClientV2(TOKEN, base_url=url), cohere.Client(TOKEN, base_url=url)):
        answer = client.rerank(model="ours", query=QUERY, documents=TEXTS, top_n=3)
        assert [(TEXTS[result.index], result.relevance_score) for result in answer.results] == expected[:3]
    with pytest.raises(cohere.UnauthorizedError, match="Send the token"):
        cohere.ClientV2("wrong", base_url=url).rerank(model="ours", query=QUERY, documents=TEXTS)
    with pytest.raises(cohere.BadRequestError, match="no texts"):
        client.rerank(model="ours", query=QUERY, documents=[])


def test_langchain(url, expected):
    compressor = CohereRerank(model="ours", cohere_api_key=TOKEN, base_url=url, top_n=2)
    found = compressor.compress_documents([LangChainDocument(text) for text in TEXTS], QUERY)
    assert [(one.page_content, one.metadata["relevance_score"]) for one in found] == expected[:2]


def test_llama_index(url, expected):
    postprocessor = TextEmbeddingInference(base_url=url, top_n=2, auth_token=f"Bearer {TOKEN}")
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    found = postprocessor.postprocess_nodes(nodes, QueryBundle(QUERY))
    assert sorted((one.text, one.score) for one in found) == sorted(expected[:2])


def test_haystack(url, expected):
    ranker = HuggingFaceTEIRanker(url=url, top_k=2, token=Secret.from_token(TOKEN))
    found = ranker.run(QUERY, [HaystackDocument(content=text) for text in TEXTS])["documents"]
    assert [(one.content, one.score) for one in found] == expected[:2]
    with pytest.raises(RuntimeError, match="401"):
        HuggingFaceTEIRanker(url=url, token=Secret.from_token("wrong")).run(QUERY, [HaystackDocument(content="a")])


def test_inference_client(classifying_server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it refuses loopback, too
    url = classifying_server.url
    given = httpx.post(url + "/predict", json={"inputs": "A fine film."}).json()
    for address in (url, url + "/predict"):
        found = InferenceClient(address).text_classification("A fine film.")
        assert [(one.label, one.score) for one in found] == [(row["label"], row["score"]) for row in given]
        assert len(InferenceClient(address).text_classification("A fine film.", top_k=1)) == 1


def test_the_code_of_the_page_runs(ranking_server, classifying_server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    documents = ["They vibrate their larynx.", "Dogs bark."]
    scores = score_pairs(*load_ranker(ranking_server.args.model), [(QUERY, text) for text in documents])
    for block in blocks:
        names, server = {}, classifying_server if "InferenceClient" in block else ranking_server
        exec(block.replace("http://localhost:8080", server.url), names)
        assert names.get("label") in ("no", "maybe", "yes") or names["best"] == documents[int(np.argmax(scores))]
