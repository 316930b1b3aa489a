"""Laws on a real Gemma: what is held for tiny decoders, at the sizes that Gemma 3 270M's activations have.

`make test-gemma` makes the checkpoint and runs these; they are skipped where it is not there. Each says its time and
its peak memory.
"""

import copy
import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, pad
from sentence_transformers import CrossEncoder
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from modeling_gemma_encoder import (
    POOLERS,
    RANKING_LOSSES,
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
    quantize_int8,
    verify_attention,
)
from modeling_gemma_encoder.adapters import add_lora, four_bit, merge
from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16
from modeling_gemma_encoder.pretraining.corpus import docstrings
from modeling_gemma_encoder.ranking.scoring import score_pairs
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

GEMMA = Path(os.environ.get("GEMMA", ROOT / "gemma-3-270m"))
pytestmark = [
    pytest.mark.gemma,
    pytest.mark.skipif(not (GEMMA / "config.json").exists(), reason="no Gemma here: make gemma"),
]
QUERY = "how to read the lines of a file one after another"


@pytest.fixture(autouse=True)
def _measured(request, capsys):
    """Says how long a test took and its peak memory, its children's too where they took more."""
    clear, began = Path("/proc/self/clear_refs"), time.perf_counter()
    if clear.exists():
        clear.write_text("5")
    yield
    line = f"\n{request.node.name}: {time.perf_counter() - began:.1f} s"
    if clear.exists():
        peak = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
        line += f", {int(peak.split()[1]) / 1e6:.1f} GB at most"
    with capsys.disabled():
        print(line, end="", flush=True)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(GEMMA)


@pytest.fixture(scope="session")
def of_pairs(tokenizer):
    return set_template(copy.deepcopy(tokenizer), pair=RANKING_TEMPLATE)


@pytest.fixture(scope="session")
def passages() -> list[str]:
    """40 paragraphs of the standard library's documentation."""
    found = {}
    for docstring in docstrings("python"):
        found[docstring.text[:400]] = None
        if len(found) == 40:
            break
    return list(found)


def load(model_class=GemmaEncoderForRanking, seed: int = 0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return model_class.from_pretrained(GEMMA, dtype=dtype, **options)


def ids_of(tokenizer, texts: list[str]) -> list[torch.Tensor]:
    return [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]


@torch.no_grad()
def score(model, sequences: list[torch.Tensor], size: int = 8, **how) -> torch.Tensor:
    batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
    return torch.cat([model(**pad(batch, **how)).logits[:, 0] for batch in batches])


# 1. The decoder


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_states_are_those_of_upstreams_gemma(attention, tokenizer, passages):
    """The last text is longer than the sliding window of 512 tokens."""
    batch = pad(ids_of(tokenizer, [*passages[:4], " ".join(passages[:12])[:3000]]), side="left")
    assert batch["attention_mask"].sum(-1).max() > 600
    upstream = AutoModel.from_pretrained(GEMMA, dtype=torch.float32).eval()
    upstream.config.is_causal = attention == "causal"
    ours = load(GemmaEncoderModel, attention=attention)
    verify_attention(ours)
    real = batch["attention_mask"].bool()
    expected = upstream(**batch, use_cache=False).last_hidden_state[real]
    found = ours(**batch).last_hidden_state[real]
    assert expected.norm(dim=-1).mean() > 50  # states of a real Gemma are large
    assert (found - expected).norm(dim=-1).max() < 1e-4 * expected.norm(dim=-1).mean()


@torch.no_grad()
def test_it_has_read_the_web(tokenizer):
    """The tokens that follow, by upstream: the weights are a language model's, and in their places."""
    decoder = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32)
    for text, follows in (("The capital of France is the city of", " Paris"), ("one two three four five", " six")):
        logits = decoder(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        assert tokenizer(follows, add_special_tokens=False)["input_ids"][0] in logits.topk(3).indices


# 2. Scores


def test_padding_company_order_and_batch_size_change_no_score(of_pairs, passages):
    model, sequences = load(), [torch.tensor(of_pairs(QUERY, text)["input_ids"]) for text in passages]
    alone = score(model, sequences, size=1)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = torch.empty_like(alone)
    shuffled[order] = score(model, [sequences[i] for i in order], size=16)
    for found in (shuffled, score(model, sequences, side="left"), score(model, sequences, extra=50, pad_id=7)):
        assert (found - alone).abs().max() < 1e-4 * alone.std()


def test_equal_passages_score_equally_wherever_they_are(of_pairs, passages):
    model, sequences = load(), [torch.tensor(of_pairs(QUERY, text)["input_ids"]) for text in passages[:8]]
    found = score(model, [sequences[0], *sequences, sequences[0]], size=10)
    assert (found[[1, 9]] - found[0]).abs().max() < 1e-4 * found.std()


BF16_BOUND = 0.1  # of the scores' standard deviation, for the same passage in other company


@pytest.mark.skipif(not computes_in_bf16("cpu"), reason="this processor has no bf16 instructions")
def test_in_bf16_company_changes_a_score_by_little_and_keeps_the_order(of_pairs, passages):
    model = load(dtype=torch.bfloat16)
    sequences = [torch.tensor(of_pairs(QUERY, text)["input_ids"]) for text in passages]
    alone, together = score(model, sequences, size=1), score(model, sequences, side="left", extra=9)
    changed = (together - alone).abs().max() / alone.std()
    assert changed < BF16_BOUND
    apart = (alone[:, None] - alone) > 2 * BF16_BOUND * alone.std()
    assert ((together[:, None] - together)[apart] > 0).all() and apart.sum() > 300


def test_int8_keeps_the_order(of_pairs, passages):
    from scipy.stats import spearmanr

    pairs = [(QUERY, text) for text in passages]
    model = load()
    whole = score_pairs(model, of_pairs, pairs)
    assert spearmanr(whole, score_pairs(quantize_int8(model), of_pairs, pairs)).statistic > 0.95


# 3. Training


@pytest.mark.parametrize("pooling", list(POOLERS))
def test_every_pooler_has_finite_losses_and_gradients(pooling, tokenizer, passages):
    model = load(GemmaEncoderForSequenceClassification, pooling=pooling, num_labels=3).train()
    model.get_input_embeddings().requires_grad_(False)
    model(**pad(ids_of(tokenizer, passages[:3])), labels=torch.tensor([0, 1, 2])).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradients[name].any() for name in gradients if name.startswith(("pooler", "model.layers.0.self_attn")))


LABELS = {
    "single_label_classification": torch.tensor([0, 1, 2]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]),
    "regression": torch.tensor([[0.5, 1, 2], [-3, 100, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("head", [*LABELS, *RANKING_LOSSES])
def test_every_head_has_a_finite_loss_and_gradient(head, of_pairs, passages):
    batch = pad(ids_of(of_pairs, passages[:3]))
    if head in LABELS:
        model = load(GemmaEncoderForSequenceClassification, num_labels=3, problem_type=head)
        labels = LABELS[head]
    else:
        model, labels = load(ranking_loss=head), torch.tensor([[2.0, 0.0, 1.0]])
        batch = {name: values[None] for name, values in batch.items()}
    model.model.requires_grad_(False)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and model.classifier.out_proj.weight.grad.isfinite().all()
    assert model.classifier.out_proj.weight.grad.any()


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
def test_a_few_steps_of_masked_language_modeling_lower_the_loss(objective, tokenizer, passages):
    model = load(GemmaEncoderForMaskedLM, masked_lm_objective=objective)
    batch = pad(ids_of(tokenizer, passages[:4]))
    hidden = (torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.2) & batch[
        "attention_mask"
    ].bool()
    labels = batch["input_ids"].where(hidden, -100)
    batch["input_ids"] = batch["input_ids"].where(~hidden, tokenizer.mask_token_id)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-5), []
    for _ in range(4):
        losses.append(model(**batch, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0] - 0.5
    assert losses[0] < 2 * math.log(262_144)


# 4. Long texts


@pytest.mark.parametrize("length", [2000, 8000])
@torch.no_grad()
def test_a_long_text_is_read_to_its_end_and_beside_a_short_one(length, tokenizer, passages):
    text = " ".join(docstring.text for docstring, _ in zip(docstrings("python"), range(400), strict=False))
    ids = torch.tensor(tokenizer(text, truncation=True, max_length=length)["input_ids"])
    assert len(ids) == length
    model, short = load(), ids_of(tokenizer, passages[:1])[0]
    alone = torch.stack([score(model, [ids])[0], score(model, [short])[0]])
    assert alone.isfinite().all()
    torch.testing.assert_close(score(model, [ids, short]), alone, rtol=1e-4, atol=1e-4)
    other = ids.clone()
    other[-5:] = 1000
    assert (score(model, [other])[0] - alone[0]).abs() > 1e-6


# 5. The tokenizer

TEXTS = [
    "A plain text.",
    "naïve 漢字 かな עברית العربية हिन्दी",
    "😀👩‍👩‍👧🏳️‍🌈",
    " leading  and   trailing ",
    "\x00\x07\x1b[0m\u200b\ufeff",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_whole_after_one_bos(text, tokenizer):
    """Every character comes back, of any script; a text of nothing is <bos> alone."""
    templated = set_template(copy.deepcopy(tokenizer))
    ids = templated(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert ids == tokenizer(text)["input_ids"]


def test_a_pair_is_the_templates_words_and_both_texts(tokenizer, of_pairs):
    """By hand: <bos>, then each part's own tokens, one after another."""

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    query, document = "how do cats purr", "They vibrate."
    expected = [2, *plain("Query: "), *plain(query), *plain(" Document: "), *plain(document)]
    assert of_pairs(query, document)["input_ids"] == expected
    as_text = set_template(copy.deepcopy(tokenizer))
    assert as_text(query, document)["input_ids"] == [2, *plain(query), *plain("\n"), *plain(document)]
    assert as_text(query, "")["input_ids"] == [2, *plain(query)]  # upstream reads a pair with nothing as one text


def test_truncation_spares_the_template_and_the_query(of_pairs):
    query, document = "how do cats purr", "They vibrate. " * 100
    whole = of_pairs(query, document)["input_ids"]
    cut = of_pairs(query, document, truncation="only_second", max_length=40)["input_ids"]
    assert cut == whole[:40]
    of_pairs.backend_tokenizer.no_truncation()


def test_special_tokens_in_a_text_are_those_tokens_and_padding_is_none_of_them(tokenizer):
    ids = tokenizer("a <eos> <mask> b", add_special_tokens=False)["input_ids"]
    assert {tokenizer.eos_token_id, tokenizer.mask_token_id} <= set(ids)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id}) == 4


@pytest.mark.parametrize("text", ["aaaaaaaa", " " * 31, "\n" * 9, "ababababab", "=====", "mississippi theories"])
def test_repeated_pieces_that_could_be_merged_in_several_ways_come_back(text, tokenizer):
    """As SentencePiece merges: the pair that is the earliest in the vocabulary, of equal ones the leftmost."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) < len(text)
    vocabulary, parts = tokenizer.get_vocab(), list(text.replace(" ", "▁"))
    while pairs := [(vocabulary.get(a + b, math.inf), i) for i, (a, b) in enumerate(pairwise(parts))]:
        number, i = min(pairs)
        if number == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    assert ids == [vocabulary[part] for part in parts]


def test_digits_are_tokens_of_their_own(tokenizer):
    ids = tokenizer("year 2024", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[-4:]) == ["2", "0", "2", "4"]


# 6. Adapters


def train_a_little(model, batch, steps: int = 3) -> list[float]:
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(steps):
        loss = model(**batch, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_an_adapter_is_trained_saved_reloaded_and_merged(tokenizer, passages, tmp_path):
    batch = pad(ids_of(tokenizer, passages[:3]))
    adapted = add_lora(load(GemmaEncoderForSequenceClassification, num_labels=3), r=4)
    losses = train_a_little(adapted, batch)
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert sum(path.stat().st_size for path in (tmp_path / "adapter").glob("*.safetensors")) < 2e7
    with torch.no_grad():
        expected = adapted(**batch).logits
        again = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        merged = merge(tmp_path / "adapter", tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_over_4_bit_weights_learns(tokenizer, passages):
    pytest.importorskip("bitsandbytes")
    options = {"num_labels": 3, "quantization_config": four_bit(), "dtype": None}
    model = load(GemmaEncoderForSequenceClassification, **options)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    losses = train_a_little(add_lora(model, r=4), pad(ids_of(tokenizer, passages[:3])))
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]


# 7. Elsewhere

RELOAD = """
import json, sys, torch
sys.modules["modeling_gemma_encoder"] = None  # not to be had
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, pairs = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
queries, texts = map(list, zip(*pairs))
with torch.no_grad():
    print(json.dumps(model(**tokenizer(queries, texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()))
"""


@pytest.fixture(scope="module")
def saved(of_pairs, tmp_path_factory):
    """A ranker as a training leaves it, and what it scores."""
    folder = tmp_path_factory.mktemp("gemma") / "ranker"
    model = load()
    model.save_pretrained(folder)
    of_pairs.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"model": str(GEMMA)}))
    return folder


@pytest.fixture(scope="module")
def expected(saved, of_pairs, passages):
    pairs = [(QUERY, text) for text in passages[:6]]
    return pairs, score_pairs(load(), of_pairs, pairs)


def test_a_fresh_process_without_this_package_scores_the_same(saved, expected):
    pairs, scores = expected
    command = [sys.executable, "-c", RELOAD, str(saved), json.dumps(pairs)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    np.testing.assert_allclose(json.loads(printed.splitlines()[-1]), scores, atol=1e-4)


def test_cross_encoder_and_pipeline_score_the_same(saved, expected):
    pairs, scores = expected
    ranker = CrossEncoder(str(saved), device="cpu", model_kwargs={"dtype": torch.float32}, trust_remote_code=True)
    np.testing.assert_allclose(ranker.predict(pairs), scores, atol=1e-4)
    del ranker
    classify = pipeline("text-classification", str(saved), device="cpu", dtype=torch.float32, trust_remote_code=True)
    found = classify([{"text": query, "text_pair": text} for query, text in pairs], function_to_apply="none")
    np.testing.assert_allclose([row["score"] for row in found], scores, atol=1e-4)


def test_onnx_scores_the_same(saved, expected, tmp_path):
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

    command = [sys.executable, "examples/export.py", "--model", str(saved), "--output", str(tmp_path / "exported")]
    subprocess.run(command, check=True, cwd=ROOT)
    pairs, scores = expected
    reader = Tokenizer.from_file(str(tmp_path / "exported" / "tokenizer.json"))
    reader.enable_padding(pad_id=0)
    read = reader.encode_batch(pairs)
    inputs = {"input_ids": [pair.ids for pair in read], "attention_mask": [pair.attention_mask for pair in read]}
    found = InferenceSession(tmp_path / "exported" / "model.onnx").run(["logits"], inputs)[0]
    np.testing.assert_allclose(found[:, 0], scores, atol=1e-3)


def test_what_is_published_is_under_the_gemma_terms(saved, tmp_path):
    command = [sys.executable, "examples/publish.py", "--model", str(saved), "--repo_id", "me/ranker", "--dry_run"]
    command += ["--output_dir", str(tmp_path / "staged"), "--dtype", "bfloat16"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    assert "Gemma Terms of Use" in (tmp_path / "staged" / "NOTICE").read_text()
    assert "Gemma Terms of Use" in (tmp_path / "staged" / "GEMMA_TERMS.html").read_text()
    assert "license: gemma" in (tmp_path / "staged" / "README.md").read_text()
