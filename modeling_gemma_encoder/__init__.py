"""Gemma Encoder (arXiv 2503.02656): Gemma decoders as bidirectional encoders, for Hugging Face
transformers.

Importing this package registers its classes, so that `AutoModel...from_pretrained` needs no remote
code. It needs torch and transformers only; what stands in `_LAZY` is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from .configuration_gemma_encoder import GemmaEncoderConfig
from .losses_gemma_encoder import RANKING_LOSSES
from .modeling_gemma_encoder import (
    GemmaEncoderForMaskedLM,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)
from .pooling_gemma_encoder import POOLERS
from .pretrained_gemma_encoder import GemmaEncoderPreTrainedModel
from .quantization_gemma_encoder import quantize_int8
from .verification_gemma_encoder import verify_attention
from .version import __version__

if TYPE_CHECKING:
    from .callbacks import KeepMemory
    from .ranking.data import FreshLists, RankingCollator, RankingDataset
    from .ranking.scoring import load_ranker, score_pairs
    from .templates import RANKING_TEMPLATE, set_template

__all__ = [
    "POOLERS",
    "RANKING_LOSSES",
    "RANKING_TEMPLATE",
    "FreshLists",
    "GemmaEncoderConfig",
    "GemmaEncoderForMaskedLM",
    "GemmaEncoderForRanking",
    "GemmaEncoderForSequenceClassification",
    "GemmaEncoderModel",
    "GemmaEncoderPreTrainedModel",
    "KeepMemory",
    "RankingCollator",
    "RankingDataset",
    "__version__",
    "load_ranker",
    "quantize_int8",
    "score_pairs",
    "set_template",
    "verify_attention",
]

_LAZY = {
    "FreshLists": ".ranking.data",
    "KeepMemory": ".callbacks",
    "RANKING_TEMPLATE": ".templates",
    "RankingCollator": ".ranking.data",
    "RankingDataset": ".ranking.data",
    "load_ranker": ".ranking.scoring",
    "score_pairs": ".ranking.scoring",
    "set_template": ".templates",
}

AutoConfig.register("gemma_encoder", GemmaEncoderConfig)
AutoModel.register(GemmaEncoderConfig, GemmaEncoderModel)
AutoModelForMaskedLM.register(GemmaEncoderConfig, GemmaEncoderForMaskedLM)
AutoModelForSequenceClassification.register(
    GemmaEncoderConfig, (GemmaEncoderForSequenceClassification, GemmaEncoderForRanking)
)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
