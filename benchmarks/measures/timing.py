"""The yardstick, and how everything is timed."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

Ways = dict[str, Callable[[], object]]  # what is timed, by its name in the results


def layer_weights(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of all linear layers within the transformer layers."""
    linear = (part for part in model.model.layers.modules() if isinstance(part, nn.Linear))
    return [part.weight.detach() for part in linear]


def make_products(weights: list[torch.Tensor], tokens: int, at_once: int, backward: bool = False) -> Callable[[], None]:
    """Return a function that computes the matrix products of the weights over so many tokens.

    Args:
        at_once: The tokens of one product.
        backward: Compute also the two products of the backward pass.
    """
    sizes = [min(at_once, tokens - start) for start in range(0, tokens, at_once)]
    states = {w.shape[1]: torch.randn(at_once, w.shape[1]).to(w) for w in weights}
    gradients = {w.shape[0]: torch.randn(at_once, w.shape[0]).to(w) for w in weights}

    @torch.no_grad()
    def multiply():
        for size in sizes:
            for weight in weights:
                x = states[weight.shape[1]][:size]
                nn.functional.linear(x, weight)
                if backward:
                    g = gradients[weight.shape[0]][:size]
                    g @ weight
                    g.T @ x

    return multiply


def take_turns(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, after one round that does not count."""
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return how many times as long `slow` takes as `fast`, the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
