"""What is served: the model, what its scores are, and the limits, which `/info` tells."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration_gemma_encoder import probabilities
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..version import __version__

PROBABILITIES = "calibrated probabilities"
UNCALIBRATED = "probabilities that are not calibrated"
LOGITS = "logits"
VALUES = "values of the regression"


@dataclass(frozen=True)
class Description:
    """
    Hold what clients are told of the model, and make scores of its logits.

    Args:
        max_length: The most tokens of a text or pair.
        max_client_batch_size: The most texts of a request.
        request_seconds: How long a request may take; None: as long as it needs.
        auto_truncate: Cut texts with too many tokens unless a request says otherwise.
    """

    model: str
    config: GemmaEncoderConfig
    ranks: bool
    dtype: str
    device: str
    max_length: int
    tokens_per_batch: int
    max_client_batch_size: int = 1000
    request_seconds: float | None = 60
    auto_truncate: bool = True
    version: str = field(default=__version__)

    @property
    def model_id(self) -> str:
        """Return the repository's name, or that of the folder, without where it is."""
        return Path(self.model).resolve().name if Path(self.model).exists() else self.model

    @property
    def scores(self) -> str:
        """Say what scores are."""
        if self.is_regression:
            return VALUES
        if self.config.calibration_temperature is not None:
            return PROBABILITIES
        return LOGITS if self.ranks else UNCALIBRATED

    @property
    def is_regression(self) -> bool:
        one = self.config.problem_type is None and self.config.num_labels == 1
        return not self.ranks and (one or self.config.problem_type == "regression")

    def relevance(self, logits: np.ndarray, raw: bool) -> np.ndarray:
        """Return the scores (documents,) of a ranker's logits (documents, 1): calibrated
        probabilities if there is a temperature, else the logits."""
        scores = logits[:, 0]
        return scores if raw or self.config.calibration_temperature is None else self._calibrated(scores, False)

    def shares(self, logits: np.ndarray, raw: bool, function: str | None = None) -> np.ndarray:
        """Return the scores of labels (texts, num_labels): calibrated probabilities if there is a
        temperature, else softmax or sigmoid as the Inference API has it; a regression's and a
        ranker's are its numbers. `function` is "softmax", "sigmoid" or "none" of the logits
        instead."""
        if function in ("softmax", "sigmoid"):
            values = torch.from_numpy(logits)
            return (values.softmax(-1) if function == "softmax" else values.sigmoid()).numpy()
        if raw or function == "none" or self.is_regression:
            return logits
        several = self.config.problem_type == "multi_label_classification"
        if self.config.calibration_temperature is not None:
            return self._calibrated(logits, not several and not self.ranks)
        values = torch.from_numpy(logits)
        return logits if self.ranks else (values.sigmoid() if several else values.softmax(-1)).numpy()

    def predictions(self, row: np.ndarray) -> list[dict[str, Any]]:
        """Return labels with their scores, the best first."""
        order = np.argsort(-row, kind="stable").tolist()
        return [{"score": float(row[place]), "label": str(self.config.id2label[place])} for place in order]

    def info(self, limits: dict[str, Any]) -> dict[str, Any]:
        """Return what `/info` says: the fields of Text Embeddings Inference, and what scores are."""
        labels = {str(place): str(name) for place, name in self.config.id2label.items()}
        of_type = {"id2label": labels, "label2id": {name: int(place) for place, name in labels.items()}}
        calibration = None
        if self.config.calibration_temperature is not None:
            calibration = {"temperature": self.config.calibration_temperature, "bias": self.config.calibration_bias}
        return {
            "model_id": self.model_id,
            "model_sha": getattr(self.config, "_commit_hash", None),
            "model_dtype": self.dtype,
            "model_type": {"reranker" if self.ranks else "classifier": of_type},
            "scores": self.scores,
            "calibration": calibration,
            "max_concurrent_requests": limits["max_concurrent_requests"],
            "max_input_length": self.max_length,
            "max_batch_tokens": self.tokens_per_batch,
            "max_batch_requests": None,
            "max_client_batch_size": self.max_client_batch_size,
            "auto_truncate": self.auto_truncate,
            "tokenization_workers": 1,
            "version": self.version,
        }

    def _calibrated(self, logits: np.ndarray, one_of_several: bool) -> np.ndarray:
        return probabilities(torch.from_numpy(logits), self.config, one_of_several).numpy()
