"""Scoring with a trained ranker: pairs of texts -> scores (num_pairs,), and a collection -> its
reranking.

Scores are logits in float32; higher is better.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .._scripts.files import is_missing
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..modeling_gemma_encoder import GemmaEncoderForRanking
from ..precision_gemma_encoder import computes_in_bf16
from ..quantization_gemma_encoder import quantize_int8
from ..templates import encode_pairs
from ..verification_gemma_encoder import verify_attention
from .collection import Collection
from .trec import TrecRun

logger = logging.get_logger(__name__)

AT_ONCE = 10_000  # pairs that are tokenized together

DTYPES = ("float32", "bfloat16", "int8")  # beside "auto"
Dtype = Literal["auto", "float32", "bfloat16", "int8"]
DTYPE = {"help": "auto is the faster of float32 and bfloat16 on the device; the head computes in float32."}


@dataclass(kw_only=True)
class ScoringArguments:
    """Options of a script that scores with a trained ranker."""

    COUNTS: ClassVar[tuple[str, ...]] = ("max_length", "tokens_per_batch")  # must be at least 1

    model: str = field(metadata={"help": "A trained reranker: a folder, or a repository on the Hub."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "The most tokens of a pair; passages are cut, queries never. Default: as in training."},
    )
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Default: 16384 on an accelerator, 2048 on a CPU, where more is no faster."}
    )
    dtype: Dtype = field(default="auto", metadata=DTYPE)
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator, where there is one."})

    def validate(self) -> None:
        """Raise ValueError if an option has an impossible value or contradicts another."""
        for name in self.COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1; got {value}.")


def fast_dtype(device: str | torch.device) -> str:
    """Return "bfloat16" if the device computes in it, and "float32" if it would convert back and
    forth."""
    return "bfloat16" if computes_in_bf16(device) else "float32"


def choose(dtype: str, device: str | None) -> tuple[str, str]:
    """
    Return the dtype and the device, with "auto" and None replaced by what is best on this machine.

    The device is the accelerator if there is one, and the dtype is the faster one on the device.

    Raises:
        ValueError: the machine has no such device.
    """
    available = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    device = available if device is None else device
    if str(device).partition(":")[0] not in ("cpu", available):
        raise ValueError(f"`device` must be on this machine, which has {available}; got {device}.")
    if dtype == "bfloat16" and not computes_in_bf16(device):
        logger.warning_once(
            f"`dtype` bfloat16 is many times slower than float32 on this {device}; auto would choose float32."
        )
    return fast_dtype(device) if dtype == "auto" else dtype, device


def load_ranker(
    checkpoint: str, dtype: str = "float32", device: str | None = None
) -> tuple[GemmaEncoderForRanking, PreTrainedTokenizerBase]:
    """
    Load a trained ranker and its tokenizer, and verify its attention.

    Args:
        dtype: "float32", "bfloat16", "int8" (weights only, see `quantize_int8`), or "auto" for the
            faster of the first two, see `choose`. The head computes in float32.
        device: None: the accelerator if there is one.

    Raises:
        ValueError: there is no such dtype, device or folder, or the checkpoint has no trained
            ranking head.
    """
    return load_trained(checkpoint, {"ranker": GemmaEncoderForRanking}, dtype, device)


def load_trained(
    checkpoint: str, kinds: dict[str, type[PreTrainedModel]], dtype: str, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of one of the kinds, name -> class, as `load_ranker` does."""
    dtype, device = choose(dtype, device)
    if is_missing(checkpoint):
        raise ValueError(f"There is no folder {checkpoint}. Repositories on the Hub have names like owner/name.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of 'auto', {', '.join(map(repr, DTYPES))}; got {dtype!r}.")
    config, wanted = GemmaEncoderConfig.from_pretrained(checkpoint), " or ".join(kinds)
    classes = {cls.__name__: cls for cls in kinds.values()}
    name = config.architectures[0] if config.architectures else next(iter(classes))
    if name not in classes:
        raise ValueError(f"{checkpoint} is not a {wanted} but a {name}.")
    loaded_as = fast_dtype(device) if dtype == "int8" else dtype
    model, loading = classes[name].from_pretrained(
        checkpoint, dtype=getattr(torch, loaded_as), output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{checkpoint} is not a trained {wanted}: {', '.join(missing)} would be random.")
    if dtype == "int8" and not config.int8_weights:
        quantize_int8(model)
    model = model.to(device).eval()
    verify_attention(model)
    return model, AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)


def default_tokens_per_batch(device: str | torch.device) -> int:
    """Return 2,048 on a CPU, where the activations of more tokens would not fit its caches, and
    else 16,384."""
    return 2048 if torch.device(device).type == "cpu" else 16384


def most_tokens(config: GemmaEncoderConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """Return `max_length`, or if None the tokenizer's, and never more than the decoder's positions."""
    return min(max_length or tokenizer.model_max_length, config.get_text_config().max_position_embeddings)


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    progress: tqdm | None = None,
) -> np.ndarray:
    """Return the scores of (query, document) pairs in their order, (num_pairs,); batches change
    them only by rounding.

    Args:
        max_length: The most tokens of a pair; documents are cut to fit. None: the tokenizer's
            `model_max_length`, which training sets. It is never more than the decoder's positions.
        tokens_per_batch: None: 16,384 on an accelerator, and 2,048 on a CPU.
        progress: A bar that is advanced by each pair.

    Raises:
        ValueError: a query leaves no room for a document, a pair has no token, or a score is not
            finite.
    """
    ids = encode_pairs(tokenizer, pairs, most_tokens(model.config, tokenizer, max_length))
    if tokenless := next((pair for pair, of_pair in zip(pairs, ids, strict=True) if not of_pair), None):
        raise ValueError(f"{tokenless!r} has no token: leave such pairs out, or let the tokenizer add a `bos_token`.")
    device = model.get_input_embeddings().weight.device
    tokens_per_batch = tokens_per_batch or default_tokens_per_batch(device)
    scores = np.empty(len(ids), dtype=np.float32)
    with evaluating(model):
        for batch in batches_of([len(of_pair) for of_pair in ids], tokens_per_batch):
            padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(device)
            try:
                logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
            except ValueError as error:
                raise ValueError(f"The score of {pairs[batch[0]]!r}, or of a pair beside it: {error}") from error
            scores[batch] = logits[:, 0].float().cpu().numpy()  # (batch, 1) -> (batch,)
            if progress is not None:
                progress.update(len(batch))
    return scores


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Turn off dropout and gradients, and put back the training mode of every module at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def batches_of(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield batches of places of texts with like lengths, the longest first, padded to at most so
    many tokens."""
    order, start = sorted(range(len(lengths)), key=lambda i: -lengths[i]), 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        batch = order[start : start + max(1, tokens_per_batch // longest)]
        yield batch
        start += len(batch)


def rerank(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    collection: Collection,
    depth: int | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
) -> TrecRun:
    """Return the collection's candidates with the model's scores; see `Collection.candidates` and
    `score_pairs`."""
    candidates = collection.candidates(depth)
    places = [(qid, pid) for qid, pids in candidates.items() for pid in pids]
    pairs = [(collection.queries[qid], collection.passages[pid]) for qid, pid in places]
    with tqdm(total=len(pairs), desc="Reranking", unit=" pairs") as progress:
        slices = [pairs[start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE)]
        parts = [score_pairs(model, tokenizer, some, max_length, tokens_per_batch, progress) for some in slices]
    reranked = {qid: {} for qid in candidates}  # a query without candidates has an empty ranking
    for (qid, pid), score in zip(places, np.concatenate([np.empty(0), *parts]), strict=True):
        reranked[qid][pid] = float(score)
    return reranked
