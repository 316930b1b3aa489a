"""Gemma Encoder (arXiv 2503.02656): Gemma decoders as bidirectional encoders, for Hugging Face transformers.

Importing this package registers its classes, so that `AutoModel...from_pretrained` needs no remote code.
"""

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

__all__ = [
    "POOLERS",
    "RANKING_LOSSES",
    "GemmaEncoderConfig",
    "GemmaEncoderForMaskedLM",
    "GemmaEncoderForRanking",
    "GemmaEncoderForSequenceClassification",
    "GemmaEncoderModel",
    "GemmaEncoderPreTrainedModel",
    "__version__",
    "quantize_int8",
    "verify_attention",
]

AutoConfig.register("gemma_encoder", GemmaEncoderConfig)
AutoModel.register(GemmaEncoderConfig, GemmaEncoderModel)
AutoModelForMaskedLM.register(GemmaEncoderConfig, GemmaEncoderForMaskedLM)
AutoModelForSequenceClassification.register(
    GemmaEncoderConfig, (GemmaEncoderForSequenceClassification, GemmaEncoderForRanking)
)
