"""int8 weights for scoring: linear layers take half of bf16's memory, and are faster on processors
that multiply int8.

Weights are rounded once, each output by the largest weight of its row; states are rounded when they
arrive, each token by its largest value (the vector-wise scheme of LLM.int8, arXiv 2208.07339,
section 2.1, without its outliers). Products are summed exactly, in int32. Embedding, norms,
attention, pooler and head stay as they are.
"""

import torch
from torch import nn

ROWS = 512  # tokens at a time, so that their int32 sums stay in a processor's cache


class Int8Linear(nn.Module):
    """Compute y = x W^T + bias with W = diag(weight_scale) weight.

    `weight` is (out_features, in_features) in int8, `weight_scale` and `bias` are (out_features,).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(out_features, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """Round a linear layer's weights to int8."""
        weight, scale = quantize(linear.weight.detach().float())
        made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight.data, made.weight_scale.data = weight, scale[:, 0]
        if linear.bias is not None:
            made.bias.data = linear.bias.detach().clone()
        return made

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """
        Map states (..., in_features) to (..., out_features), in the dtype of `states`.

        Raises:
            RuntimeError: a gradient is needed. int8 weights are for scoring.
        """
        if torch.is_grad_enabled() and states.requires_grad:
            raise RuntimeError(
                "int8 weights cannot be trained, and have no gradient. Load the checkpoint that they were made from."
            )
        tokens = states.reshape(-1, self.in_features)
        parts = [self._multiply(part) for part in tokens.split(ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*states.shape[:-1], self.out_features)

    def _multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        rounded, scale = quantize(tokens)
        count = len(rounded)
        if rounded.is_cuda and count <= 16:  # fewer rows than its kernel takes
            rounded = nn.functional.pad(rounded, (0, 0, 0, 17 - count))
        sums = torch._int_mm(rounded, self.weight.t())[:count]
        output = sums.float().mul_(self.weight_scale.float()).mul_(scale)
        return (output if self.bias is None else output.add_(self.bias)).to(tokens.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows (n, k) to int8, and return them with the factor of each row, (n, 1) in fp32."""
    scale = rows.abs().amax(1, keepdim=True).float().div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return rows.float().div(scale).round_().to(torch.int8), scale


def hold_int8(model: nn.Module) -> None:
    """Replace the linear layers of an encoder's decoder by empty int8 layers, which a checkpoint
    fills."""
    _replace(model, lambda linear: Int8Linear(linear.in_features, linear.out_features, linear.bias is not None))


def quantize_int8(model: nn.Module) -> nn.Module:
    """
    Round the linear layers of an encoder's decoder to int8, in place, and return the model.

    `save_pretrained` and `from_pretrained` keep them. Scores change by a few hundredths of their
    spread; measure what that changes for you (`benchmarks/README.md`, int8).

    Raises:
        ValueError: `model` is not a Gemma Encoder, or its layers are quantized or have adapters
            already.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != "gemma_encoder" or not hasattr(model, "model"):
        raise ValueError(f"`model` must be a Gemma Encoder, got {type(model).__name__}.")
    found = {type(module) for module in model.model.layers.modules() if hasattr(module, "in_features")}
    if found != {nn.Linear}:
        names = ", ".join(sorted(kind.__name__ for kind in found - {nn.Linear}))
        raise ValueError(
            f"The decoder's layers must be plain linear layers; they are {names} already. Merge adapters, or load the "
            "checkpoint without quantization."
        )
    _replace(model, Int8Linear.of)
    model.config.int8_weights = True
    return model


def _replace(model: nn.Module, make) -> None:
    for parent in list(model.model.layers.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, make(module).train(module.training))
