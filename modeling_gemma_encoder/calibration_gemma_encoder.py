"""Calibrated probabilities: logits are divided by a temperature that was fitted on held-out labels."""

import torch


def probabilities(logits: torch.Tensor, config, one_of_several: bool) -> torch.Tensor:
    """Return softmax(z / T) over the last dimension if a text has one of several classes, else
    sigmoid((z - b) / T).

    T is `config.calibration_temperature` and b is `config.calibration_bias`. Temperature scaling:
    Guo et al., arXiv 1706.04599. The bias is Platt's; scores need it if their zero has no meaning,
    as with a listwise loss.

    Raises:
        ValueError: no temperature was fitted.
    """
    if config.calibration_temperature is None:
        raise ValueError(
            "`config.calibration_temperature` is None: fit it on held-out labels first, with "
            "`modeling_gemma_encoder.calibration.fit`."
        )
    if one_of_several:
        return (logits.float() / config.calibration_temperature).softmax(-1)
    return ((logits.float() - config.calibration_bias) / config.calibration_temperature).sigmoid()
