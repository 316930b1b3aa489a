"""A check of every layer's attention by what it computes, and not by its settings."""

import torch
from torch import nn

from .attention_gemma_encoder import layer_reach, layer_type_of


@torch.no_grad()
def verify_attention(model: nn.Module, trials: int = 4) -> None:
    """Check that every layer of a Gemma Encoder attends as its config's `attention` says.

    Each layer's attention is given sequences of two random tokens, (a, b), (a, c) and (c, b): its
    output at the first token differs between the first two if, and only if, the last token reaches
    the first; its output at the last token differs between the first and third if, and only if, the
    first reaches the last. Two tokens do not measure how far a window reaches; for windows, the
    settings of each layer are compared with the config.

    It does not run on load, since a model may be loaded where it cannot run yet (meta device,
    sharded, offloaded). It costs one forward pass of `6 * trials` tokens, looks through wrappers
    (PEFT, DDP, torch.compile) and restores train mode. No other thread may use the model meanwhile.

    Raises:
        RuntimeError: `model` is not a Gemma Encoder, its states are not finite, or some layers do
            not attend as the config says.
    """
    encoder = next((module for module in model.modules() if is_encoder(module)), None)
    layers = [] if encoder is None else [module for module in encoder.modules() if hasattr(module, "reach")]
    if not layers:
        raise RuntimeError(f"{type(model).__name__} is not a Gemma Encoder: it has no attention layer of one.")
    seen = _probe(encoder, layers, trials)
    wrong = []
    for layer in layers:
        reach = layer_reach(encoder.config, layer_type_of(layer))
        if layer.reach != reach:
            wrong.append(f"layer {layer.layer_idx}: was built to reach {layer.reach} tokens, expected {reach}")
        expected = tuple(limit != 0 for limit in reach)
        if seen.get(layer) != expected:
            found = seen.get(layer, "it did not run")
            wrong.append(f"layer {layer.layer_idx}: sees (earlier, later) tokens: {found}, expected {expected}")
    if wrong:
        raise RuntimeError(
            f"The model does not run attention={encoder.config.attention!r}, "
            f"attention_window={encoder.config.attention_window} as its config says:\n" + "\n".join(wrong)
        )


def is_encoder(module: nn.Module) -> bool:
    """Return whether a module is a Gemma Encoder, which may be of a class from a checkpoint's own
    code."""
    is_named = getattr(getattr(module, "config", None), "model_type", None) == "gemma_encoder"
    return is_named and hasattr(type(module), "encode")


def _probe(encoder: nn.Module, layers: list[nn.Module], trials: int) -> dict[nn.Module, tuple[bool, bool]]:
    """Return whether each layer's attention lets a token see (an earlier, a later) token."""
    seen = {}

    def give_random_tokens(module, args, kwargs):
        states = kwargs["hidden_states"]
        a, b, c = torch.randn(3, trials, states.shape[-1], generator=torch.Generator().manual_seed(0)).to(states)
        sequences = torch.stack([a, b, a, c, c, b], dim=1)  # (trials, 6, hidden): three sequences of two tokens
        return args, {**kwargs, "hidden_states": sequences.view(states.shape)}

    def compare(module, args, output):
        states = output[0].reshape(trials, 6, -1).float()
        if not states.isfinite().all():
            raise RuntimeError(
                f"Layer {module.layer_idx} computes no finite numbers: its weights are broken, as by a training that "
                "diverged; lower its learning rate."
            )
        tolerance = 1e-4 + 2 * torch.finfo(output[0].dtype).eps
        first_reaches_last = (states[:, 1] - states[:, 5]).norm() > tolerance * states[:, 1].norm()
        last_reaches_first = (states[:, 0] - states[:, 2]).norm() > tolerance * states[:, 0].norm()
        seen[module] = (bool(first_reaches_last), bool(last_reaches_first))

    handles = [layer.register_forward_pre_hook(give_random_tokens, with_kwargs=True, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(compare) for layer in layers]
    training = [module for module in encoder.modules() if module.training]
    device = encoder.get_input_embeddings().weight.device
    ids = torch.zeros(3 * trials, 2, dtype=torch.long, device="cpu" if device.type == "meta" else device)
    try:
        encoder.eval()
        with torch.compiler.set_stance("force_eager"):  # compiled layers skip hooks
            encoder.encode(ids, torch.ones_like(ids))
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    return seen
