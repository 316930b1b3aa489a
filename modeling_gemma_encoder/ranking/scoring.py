"""Reranking: a trained ranker, and pairs of texts -> scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .._scripts.files import is_local
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..modeling_gemma_encoder import GemmaEncoderForRanking
from ..precision_gemma_encoder import computes_in_bf16
from ..quantization_gemma_encoder import quantize_int8
from ..templates import encode_pairs
from ..verification_gemma_encoder import verify_attention
from .trec import TrecRun

if TYPE_CHECKING:
    from .collection import Collection

logger = logging.get_logger(__name__)

AT_ONCE = 10_000  # pairs that are tokenized together


Dtype = Literal["auto", "float32", "bfloat16", "int8"]
DTYPE = {"help": "auto is the faster of float32 and bfloat16 here; the head computes in float32."}


@dataclass(kw_only=True)
class ScoringArguments:
    """Flags of a script that scores with a trained ranker."""

    COUNTS: ClassVar[tuple[str, ...]] = ("max_length", "tokens_per_batch")  # at least 1

    model: str = field(metadata={"help": "A trained reranker: a folder, or a repository on the Hub."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a pair; passages are cut, queries never. Default: as in training."}
    )
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Default: 16384 on an accelerator, 2048 on a CPU, where more are no faster."}
    )
    dtype: Dtype = field(default="auto", metadata=DTYPE)
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator, where there is one."})

    def problem(self) -> str | None:
        """What cannot be, in the words of the command line."""
        for name in self.COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                return f"--{name} must be at least 1, got {value}"
        return None


def fast_dtype(device: str | torch.device) -> str:
    """bfloat16 where `device` computes in it, float32 where it would be converted back and forth."""
    return "bfloat16" if computes_in_bf16(device) else "float32"


def choose(dtype: str, device: str | None) -> tuple[str, str]:
    """What "auto" and None stand for here: what is fast on the device, and the accelerator where there is one."""
    there = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    device = there if device is None else device
    if str(device).partition(":")[0] not in ("cpu", there):
        raise ValueError(f"`device` {device} is not on this machine, which has {there}.")
    if dtype == "bfloat16" and not computes_in_bf16(device):
        logger.warning_once(f"`dtype` bfloat16 is many times slower than float32 on this {device}: auto chooses.")
    return fast_dtype(device) if dtype == "auto" else dtype, device


def load_ranker(
    checkpoint: str, dtype: str = "float32", device: str | None = None
) -> tuple[GemmaEncoderForRanking, PreTrainedTokenizerBase]:
    """
    A trained ranker, verified, on `device` or where there is one the accelerator, and its tokenizer.

    Args:
        dtype: float32, bfloat16, int8 (weights; see `quantize_int8`), or auto: the faster of the first two there
            (`choose`). The head computes in float32.

    Raises:
        ValueError: `dtype` is none of these, or the checkpoint has no trained head.
    """
    dtype, device = choose(dtype, device)
    if is_local(checkpoint) and not Path(checkpoint).exists():
        raise ValueError(f"There is no folder {checkpoint}.")
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"`dtype` must be auto, float32, bfloat16 or int8, got {dtype}")
    config = GemmaEncoderConfig.from_pretrained(checkpoint)
    if config.architectures and config.architectures[0] != GemmaEncoderForRanking.__name__:
        raise ValueError(f"{checkpoint} is no ranker, but a {config.architectures[0]}.")
    model, loading = GemmaEncoderForRanking.from_pretrained(
        checkpoint, dtype=getattr(torch, fast_dtype(device) if dtype == "int8" else dtype), output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{checkpoint} is no trained ranker: {', '.join(missing)} would be random.")
    if dtype == "int8" and not config.int8_weights:
        quantize_int8(model)
    model = model.to(device).eval()
    verify_attention(model)
    return model, AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    progress: tqdm | None = None,
) -> np.ndarray:
    """
    Scores (n,), fp32 logits, of (query, document) pairs, in their order.

    Batches are of texts of like length, the longest first, and hold at most `tokens_per_batch` tokens; which text is
    in which batch changes no score beyond rounding.

    Args:
        max_length: Tokens of a pair, documents are cut to fit. None: as the tokenizer says (`model_max_length`), which
            a training of ours sets, and never more than the decoder's positions.
        tokens_per_batch: None: 16,384 on an accelerator; 2,048 on a CPU, where what a layer makes of more no longer
            fits the caches.
        progress: A bar that is moved on.

    Raises:
        ValueError: a query leaves no room for a document, a pair has no token, or a score is not finite.
    """
    positions = model.config.get_text_config().max_position_embeddings
    ids = encode_pairs(tokenizer, pairs, min(max_length or tokenizer.model_max_length, positions))
    if tokenless := next((pair for pair, of_pair in zip(pairs, ids, strict=True) if not of_pair), None):
        raise ValueError(f"{tokenless!r} has no token: leave such pairs out, or let the tokenizer add a `bos_token`.")
    order, start = sorted(range(len(ids)), key=lambda i: -len(ids[i])), 0
    scores = np.empty(len(ids), dtype=np.float32)
    training = [module for module in model.modules() if module.training]
    model.eval()
    device = model.get_input_embeddings().weight.device
    if tokens_per_batch is None:
        tokens_per_batch = 2048 if device.type == "cpu" else 16384
    try:
        while start < len(order):
            batch = order[start : start + max(1, tokens_per_batch // max(1, len(ids[order[start]])))]
            start += len(batch)
            padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(device)
            try:
                logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
            except ValueError as error:
                raise ValueError(f"The score of {pairs[batch[0]]!r}, or of a pair beside it: {error}") from error
            scores[batch] = logits[:, 0].float().cpu().numpy()
            if progress is not None:
                progress.update(len(batch))
    finally:
        for module in training:
            module.training = True
    return scores


def rerank(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    collection: "Collection",
    depth: int | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
) -> TrecRun:
    """The collection's candidates with the model's scores; a judged query without candidates has none."""
    candidates = collection.candidates(depth)
    places = [(qid, pid) for qid, pids in candidates.items() for pid in pids]
    pairs = [(collection.queries[qid], collection.passages[pid]) for qid, pid in places]
    with tqdm(total=len(pairs), desc="Reranking", unit=" pairs") as progress:
        slices = [pairs[start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE)]
        parts = [score_pairs(model, tokenizer, some, max_length, tokens_per_batch, progress) for some in slices]
    run = {qid: {} for qid in candidates}
    for (qid, pid), score in zip(places, np.concatenate([np.empty(0), *parts]), strict=True):
        run[qid][pid] = float(score)
    return run
