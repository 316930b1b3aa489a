"""Scoring: the tables "scoring" and "others", and how time grows with the tokens."""

import copy
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import AutoModelForCausalLM

from measures.models import PEERS, SHAPES, Case, make_config, make_models, make_peer, pool_all
from measures.texts import BATCH, Pairs, count_padded, count_tokens, make_pairs
from measures.timing import Ways, layer_weights, make_products, ratio, take_turns
from modeling_gemma_encoder import quantize_int8
from modeling_gemma_encoder.ranking.scoring import score_pairs

DECODER_BATCH = 8  # the logits of the whole vocabulary take much memory


@torch.no_grad()
def score_in_order(model, tokenizer, pairs: Pairs, size: int, word: int | None = None):
    """Return the scores of pairs, (num_pairs,), from padded batches in the order of the pairs.

    Args:
        size: The pairs of a batch.
        word: Score by a decoder's logit of this token after the last one, not by a classifier.
    """
    scores = []
    for start in range(0, len(pairs), size):
        texts = zip(*pairs[start : start + size], strict=True)
        batch = tokenizer(*texts, padding=True, return_tensors="pt").to(model.device)
        logits = model(**batch).logits  # (batch, 1), or (batch, seq_len, vocabulary)
        if word is not None:
            ends = batch["attention_mask"].sum(1) - 1
            logits = logits[torch.arange(len(ends)), ends][:, [word]]  # (batch, 1)
        scores.append(logits[:, 0].float())
    return torch.cat(scores).cpu().numpy()


def compare(ways: Ways, names: list[str]) -> tuple[np.ndarray, float]:
    """Return our scores, and the largest difference between them and those of the named ways."""
    ours = np.asarray(ways["ours"](), dtype=np.float32)
    scores = [np.asarray(ways[name](), dtype=np.float32) for name in names]
    return ours, max(float(np.abs(ours - other).max()) for other in scores)


def scoring_ways(case: Case, tokenizer, pairs: Pairs) -> tuple[Ways, float, float]:
    """Return the ways of scoring that are timed, the largest difference of scores, and the largest
    score."""
    options, lengths = case.options, count_tokens(tokenizer, pairs)
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = make_models(case, len(tokenizer), Path(folder))
        tokenizer.save_pretrained(folder)
        peer = CrossEncoder(
            folder,
            model_kwargs={"dtype": case.dtype},
            activation_fn=nn.Identity(),
            device=options.device,
        )
    rounded = quantize_int8(copy.deepcopy(ours))
    ways = {
        "ours": lambda: score_pairs(ours, tokenizer, pairs),
        "stock sorted": lambda: peer.predict(pairs, batch_size=BATCH, show_progress_bar=False),
        "stock unsorted": lambda: score_in_order(stock, tokenizer, pairs, BATCH),
        "ours, int8": lambda: score_pairs(rounded, tokenizer, pairs),
        "products": make_products(layer_weights(ours), sum(lengths), min(sum(lengths), 4096)),
    }
    scores, difference = compare(ways, ["stock sorted", "stock unsorted"])
    for model in (ours, rounded):
        pool_all(model)
    if options.layers == SHAPES[options.shape][2]:  # fewer layers of ours would not compare with all of theirs
        ways |= {name: make_peer(name, lengths, case) for name in PEERS}
    return ways, difference, float(np.abs(scores).max())


def measure_scoring(case: Case) -> dict:
    """Return the row of a case in the table of scoring."""
    options, tokenizer = case.options, case.tokenizer()
    pairs = make_pairs(tokenizer, options.pairs, options.lengths, options.seed)
    lengths = count_tokens(tokenizer, pairs)
    ways, difference, largest = scoring_ways(case, tokenizer, pairs)
    correlation = float(np.corrcoef(ways["ours"](), ways["ours, int8"]())[0, 1])
    seconds = take_turns(ways, options.rounds)
    return {
        **case.facts(),
        "pairs": len(pairs),
        "tokens": sum(lengths),
        "padded / real tokens": count_padded(lengths) / sum(lengths),
        "largest difference of scores": difference,
        "largest score": largest,
        "pairs/s": len(pairs) / statistics.median(seconds["ours"]),
        "x stock sorted": ratio(seconds, "stock sorted", "ours"),
        "x stock unsorted": ratio(seconds, "stock unsorted", "ours"),
        "products / ours": ratio(seconds, "products", "ours"),
        **{f"{name} / ours": ratio(seconds, name, "ours") if name in ways else None for name in PEERS},
        "int8 x ours": ratio(seconds, "ours", "ours, int8"),
        "correlation of int8": correlation,
        "seconds": seconds,
    }


def other_ways(case: Case, tokenizer, pairs: Pairs) -> Ways:
    """Return the ways of scoring by stock, stock compiled and the head of a language model."""
    options = case.options
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = make_models(case, options.vocab_size, Path(folder))
    torch.manual_seed(0)
    if options.model:
        decoder = AutoModelForCausalLM.from_pretrained(options.model, dtype=case.dtype, trust_remote_code=False)
    else:
        decoder = AutoModelForCausalLM.from_config(make_config(case, options.vocab_size), dtype=case.dtype)
    decoder.eval().to(options.device)
    word = tokenizer.convert_tokens_to_ids("▁yes")
    ways = {
        "ours": lambda: score_pairs(ours, tokenizer, pairs),
        "stock": lambda: score_in_order(stock, tokenizer, pairs, BATCH),
        "LM head": lambda: score_in_order(decoder, tokenizer, pairs, DECODER_BATCH, word),
    }
    if shutil.which("g++") or shutil.which("clang++"):  # inductor needs a compiler
        compiled = torch.compile(stock, dynamic=True)
        ways["stock compiled"] = lambda: score_in_order(compiled, tokenizer, pairs, BATCH)
    return ways


def measure_others(case: Case) -> dict:
    """Return the row of a case in the table of other ways, with the pairs sorted by length."""
    options, tokenizer = case.options, case.tokenizer()
    pairs = make_pairs(tokenizer, max(8, options.pairs // 4), options.lengths, options.seed)
    pairs.sort(key=lambda pair: -len(tokenizer(*pair)["input_ids"]))
    ways = other_ways(case, tokenizer, pairs)
    compiled = "stock compiled" in ways
    # The scores of the language model's head are not comparable.
    _, difference = compare(ways, [name for name in ways if name not in ("ours", "LM head")])
    seconds = take_turns(ways, options.rounds)
    return {
        **case.facts(),
        "pairs": len(pairs),
        "largest difference of scores": difference,
        "x stock": ratio(seconds, "stock", "ours"),
        "x stock compiled": ratio(seconds, "stock compiled", "ours") if compiled else None,
        "x LM head": ratio(seconds, "LM head", "ours"),
        "seconds": seconds,
    }


def measure_growth(options) -> dict[str, list]:
    """Return the pairs, the tokens and the seconds of scoring more and more passages in fp32."""
    case = Case(options.families[-1], torch.float32, options)
    tokenizer = case.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        _, ours = make_models(case, len(tokenizer), Path(folder))
    pool_all(ours)
    counts = [options.pairs // 4, options.pairs // 2, options.pairs]
    if not options.quick:
        counts += [2 * options.pairs, 4 * options.pairs]
    pairs = make_pairs(tokenizer, counts[-1], options.lengths, options.seed)
    ways = {n: (lambda n=n: score_pairs(ours, tokenizer, pairs[:n])) for n in counts}
    seconds = take_turns(ways, max(2, options.rounds // 2))
    return {
        "pairs": counts,
        "tokens": [sum(count_tokens(tokenizer, pairs[:count])) for count in counts],
        "seconds": [statistics.median(seconds[count]) for count in counts],
    }
