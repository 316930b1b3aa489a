"""Training: the tables "training" and "short"."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from measures.models import Case, make_models, pool_all
from measures.texts import BATCH, SENTENCES, SHORT, SHORT_BATCH, draw_lengths, make_batch
from measures.timing import layer_weights, make_products, ratio, take_turns
from modeling_gemma_encoder.callbacks import keep_freed_memory


def make_step(model: nn.Module, batch: dict[str, torch.Tensor], bf16: bool) -> Callable[[], None]:
    """Return a function that takes a training step as the Trainer does, in bf16 by autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def step():
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_training(case: Case) -> dict:
    """Return the row of a case in the table of training. Weights are in fp32 in both dtypes."""
    options = case.options
    sizes = np.minimum(draw_lengths(SENTENCES[options.lengths], BATCH, options.seed), 256)
    stock, ours, batch, products = prepare_training(case, sizes)
    bf16 = case.dtype == torch.bfloat16
    ways = {"ours": make_step(ours, batch, bf16), "stock": make_step(stock, batch, bf16), "products": products}
    seconds = take_turns(ways, options.rounds)
    return {
        **case.facts(),
        "texts": BATCH,
        "tokens": int(sizes.sum()),
        "padded / real tokens": float(BATCH * sizes.max() / sizes.sum()),
        "steps/s": 1 / statistics.median(seconds["ours"]),
        "x stock": ratio(seconds, "stock", "ours"),
        "products / ours": ratio(seconds, "products", "ours"),
        "seconds": seconds,
    }


def measure_short(case: Case) -> dict:
    """Return the row of a case in the table of short texts, where the optimizer costs as much as
    the layers."""
    sizes = draw_lengths(SHORT, SHORT_BATCH, case.options.seed)
    _, ours, batch, products = prepare_training(case, sizes)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-5, fused=True)
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in ours.parameters():
        parameter.grad = None  # those of the step that is measured are its own

    def least():
        for parameter in ours.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        products()
        optimizer.step()

    seconds = take_turns({"ours": make_step(ours, batch, case.dtype == torch.bfloat16)}, case.options.rounds)
    seconds |= take_turns({"least": least}, case.options.rounds)
    return {
        **case.facts(),
        "texts": SHORT_BATCH,
        "tokens": int(sizes.sum()),
        "steps/s": 1 / statistics.median(seconds["ours"]),
        "ours / least": ratio(seconds, "ours", "least"),
        "seconds": seconds,
    }


def prepare_training(case: Case, sizes: np.ndarray):
    """Return stock's model and ours, with dropout, a batch of texts of these token counts, and the
    yardstick."""
    options, tokens = case.options, int(sizes.sum())
    if options.keep_memory:
        keep_freed_memory()  # for all ways, as the `KeepMemory` callback does
    with tempfile.TemporaryDirectory() as folder:
        in_fp32 = replace(case, dtype=torch.float32)
        stock, ours = make_models(in_fp32, options.vocab_size, Path(folder), dropout=0.1)
    weights = [weight.to(case.dtype) for weight in layer_weights(ours)]
    products = make_products(weights, tokens, tokens, backward=True)
    return stock, pool_all(ours), make_batch(sizes, options.device), products
