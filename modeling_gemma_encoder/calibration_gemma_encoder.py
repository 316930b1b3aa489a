"""Logits into probabilities that can be believed: divided by a temperature that was fitted on held-out labels."""

import torch


def probabilities(logits: torch.Tensor, config, one_of_several: bool) -> torch.Tensor:
    """
    softmax(z / T) over the last dimension, or, where each logit stands by itself, sigmoid((z - b) / T).

    T is `config.calibration_temperature`, b `config.calibration_bias` (temperature scaling: Guo et al., arXiv
    1706.04599; the bias is Platt's, which scores need whose zero means nothing, such as those of a listwise loss).

    Raises:
        ValueError: nothing was fitted. `modeling_gemma_encoder.calibration.fit` does.
    """
    if config.calibration_temperature is None:
        raise ValueError("`config.calibration_temperature` is None: fit it on held-out labels first.")
    if one_of_several:
        return (logits.float() / config.calibration_temperature).softmax(-1)
    return ((logits.float() - config.calibration_bias) / config.calibration_temperature).sigmoid()
