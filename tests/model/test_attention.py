"""Laws of attention: it equals upstream's own, reaches exactly as far as the config says, and never sees padding."""

import copy
from itertools import pairwise, product

import pytest
import torch
from helpers import (
    ATTENTIONS,
    FAMILIES,
    FAMILY_BACKENDS,
    FUSED,
    UNPADDED,
    WINDOW,
    backends,
    build,
    decoder_config,
    encoder_config,
    pad,
    set_backend,
    texts,
)
from transformers import AttentionInterface, AutoModel

from modeling_gemma_encoder import (
    POOLERS,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
    verify_attention,
)
from modeling_gemma_encoder.attention_gemma_encoder import split_by_length, unpad, with_buckets

BATCH = texts((10, 6, 3))


def upstream(family: str, attention: str, encoder) -> torch.nn.Module:
    """Upstream's own eager model with the encoder's weights; `is_causal=False` makes it bidirectional."""
    config = decoder_config(family)
    config.is_causal = attention == "causal"
    config._attn_implementation = "eager"
    model = AutoModel.from_config(config).eval()
    model.load_state_dict(encoder.model.state_dict())
    return model


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("family", "backend"), [case for case in FAMILY_BACKENDS if case[1] != "flex_attention"])
def test_states_equal_upstream(family, backend, attention):
    """Flex attention, which compiles, is held to the scores of the others below."""
    encoder = build(GemmaEncoderModel, encoder_config(family, attention=attention))
    reference = upstream(family, attention, encoder)
    batch = pad(BATCH)
    real = batch["attention_mask"][..., None]
    set_backend(encoder, backend)
    with torch.no_grad():
        expected = reference(**batch, use_cache=False).last_hidden_state * real
        states = encoder(**batch).last_hidden_state
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_upstream(family, attention):
    config = encoder_config(family, attention=attention, attention_dropout=0, feedforward_dropout=0)
    encoder = build(GemmaEncoderModel, config)
    reference = upstream(family, attention, encoder)
    batch = pad(BATCH)
    real = batch["attention_mask"][..., None]
    direction = torch.randn(3, 10, 32) * real
    (reference(**batch, use_cache=False).last_hidden_state * direction).sum().backward()
    for backend in backends(family):
        if backend in (FUSED, "flex_attention"):  # no backward on CPU; see test_fused
            continue
        set_backend(encoder, backend)
        encoder.zero_grad()
        (encoder(**batch).last_hidden_state * direction).sum().backward()
        for (name, parameter), expected in zip(encoder.model.named_parameters(), reference.parameters(), strict=True):
            scale = max(1.0, expected.grad.abs().max().item())
            torch.testing.assert_close(parameter.grad / scale, expected.grad / scale, atol=1e-4, rtol=0, msg=name)


def test_bidirectional_training_upstream_is_followed():
    """EmbeddingGemma's own flag halves its window and counts it exclusively; our reach must be the same."""
    fields = {"use_bidirectional_attention": True, "sliding_window": 8}
    encoder = build(GemmaEncoderModel, encoder_config("gemma3_text", decoder=fields))
    config = decoder_config("gemma3_text", **fields)
    config._attn_implementation = "eager"
    reference = AutoModel.from_config(config).eval()
    reference.load_state_dict(encoder.model.state_dict())
    ids = texts((14,))[0][None]
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(ids).last_hidden_state, reference(ids, use_cache=False).last_hidden_state, atol=1e-5, rtol=1e-5
        )


def reach_matrix(model, length: int, left_padding: int = 0) -> torch.Tensor:
    """(length, length): whether changing token j changes the state of token i; found by changing each token."""
    ids = torch.arange(1, length + 1).repeat(length + 1, 1)
    for j in range(length):
        ids[j + 1, j] = 50
    mask = torch.ones_like(ids)
    ids, mask = (torch.nn.functional.pad(x, (left_padding, 0)) for x in (ids, mask))
    with torch.no_grad():
        states = model(ids, attention_mask=mask).last_hidden_state[:, left_padding:]
    return ((states[1:] - states[:1]).abs().amax(-1) > 1e-6).T


def one_layer(family: str, layer_type: str = "full_attention") -> dict:
    """Fields of a decoder of one layer. Gemma 1 and Llama do not name its type; Gemma 4's last layer is always full."""
    fields = {"num_hidden_layers": 1}
    if family not in ("gemma", "llama"):
        fields["layer_types"] = [layer_type]
    if family == "gemma4_text":
        fields["num_kv_shared_layers"] = 0
    return fields


@pytest.mark.parametrize("window", [None, 0, 1, 2, 5])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    ("family", "layer_type"),
    [(family, "full_attention") for family in FAMILIES]
    + [("gemma2", "sliding_attention"), ("gemma3_text", "sliding_attention")],
)
def test_windows_reach_exactly(family, layer_type, attention, window):
    decoder = one_layer(family, layer_type)
    model = build(GemmaEncoderModel, encoder_config(family, decoder, attention=attention, attention_window=window))
    i, j = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    expected = torch.ones(9, 9, dtype=torch.bool) if attention == "bidirectional" else j <= i
    if layer_type == "sliding_attention":
        # Upstream: a causal window of W holds W tokens with the token itself, a bidirectional one W on each side.
        expected &= (i - j).abs() <= (WINDOW if attention == "bidirectional" else WINDOW - 1)
    if window is not None:
        expected &= (i - j).abs() <= window
    for backend in set(backends(family)) - {"flex_attention"}:
        set_backend(model, backend)
        for left_padding in (0, 4):
            assert torch.equal(reach_matrix(model, 9, left_padding), expected), (backend, left_padding)


# Compiled for each family, which takes long: those whose layers take one mask, and one for each type.
@pytest.mark.parametrize("family", ["gemma", "gemma3_text"])
def test_windows_reach_exactly_in_flex_attention(family):
    model = build(GemmaEncoderModel, encoder_config(family, one_layer(family), attention_window=2))
    set_backend(model, "flex_attention")
    i, j = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    assert torch.equal(reach_matrix(model, 9, left_padding=3), (i - j).abs() <= 2)


def test_flash_attention_is_given_the_same_reach():
    """Flash counts a window W as |i - j| < W, so every layer hands it its reach plus one (and no mask)."""
    model = GemmaEncoderModel(encoder_config("gemma2"))
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [WINDOW + 1, None] * 2
    model = GemmaEncoderModel(encoder_config("gemma2", attention_window=2))
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [3] * 4
    model = GemmaEncoderModel(encoder_config("gemma2", attention="causal"))
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [WINDOW, None] * 2
    assert all(layer.self_attn.is_causal for layer in model.model.layers)


def varlen_attention(module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, scaling, **kwargs):
    """Flash attention as its documentation describes it, one sequence at a time in plain torch."""
    assert attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert cu_seq_lens_q.dtype == torch.int32 and kwargs["max_length_q"] == cu_seq_lens_q.diff().max()
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        q, k, v = (states[0, :, start:end] for states in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.mT * scaling
        if kwargs.get("softcap") is not None:
            scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        if kwargs.get("sliding_window") is not None:
            scores = scores.masked_fill(distance.abs() >= kwargs["sliding_window"], -torch.inf)
        if module.is_causal:
            scores = scores.masked_fill(distance < 0, -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, 1).transpose(0, 1)[None], None


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attentions_arguments_mean_the_same(family, attention, window):
    """The kernel needs a GPU; what it is told does not."""
    AttentionInterface.register("varlen_reference", varlen_attention)
    model = build(GemmaEncoderModel, encoder_config(family, attention=attention, attention_window=window))
    with torch.no_grad():
        expected = model(**pad(BATCH, "left")).last_hidden_state
        set_backend(model, "varlen_reference")
        torch.testing.assert_close(model(**pad(BATCH, "left")).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "version"), [("gemma3_text", 3), ("gemma2", 2)], ids=["no dropout", "no dropout with soft-capping"]
)
def test_flash_attention_never_drops_dropout_silently(family, version):
    """transformers hands a kernel what it takes: FlashAttention 3 no dropout, 2 none with soft-capping."""
    model = build(GemmaEncoderModel, encoder_config(family)).train()
    model.model.config._attn_implementation_internal = f"flash_attention_{version}"
    with pytest.raises(ValueError, match="attention_dropout=0"):
        model(**pad(BATCH))


def layouts():
    """The same texts in other company: padded on either side, more, with any id, and in another order."""
    yield "right", pad(BATCH), [0, 1, 2]
    yield "left", pad(BATCH, "left"), [0, 1, 2]
    yield "more padding", pad(BATCH, "right", extra=7), [0, 1, 2]
    yield "another pad id", pad(BATCH, "left", extra=2, pad_id=98), [0, 1, 2]
    yield "another order", pad([BATCH[2], BATCH[0], BATCH[1]], "left"), [1, 2, 0]


def company_cases():
    """All poolers, attention modes, families and backends; flex attention, which compiles, has its own test."""
    for (family, backend), attention, pooling in product(FAMILY_BACKENDS, ATTENTIONS, POOLERS):
        if backend != "flex_attention":
            yield family, backend, attention, pooling


@pytest.mark.parametrize(("family", "backend", "attention", "pooling"), company_cases())
def test_company_never_changes_the_score(family, backend, attention, pooling):
    """Padding, batch size and order: every text scores as it does alone."""
    config = encoder_config(family, attention=attention, pooling=pooling, pooling_k=2, num_labels=3)
    model = build(GemmaEncoderForSequenceClassification, config)
    with torch.no_grad():
        alone = torch.cat([model(ids[None]).logits for ids in BATCH])
        set_backend(model, backend)
        for name, batch, order in layouts():
            torch.testing.assert_close(model(**batch).logits[order], alone, atol=2e-5, rtol=1e-5, msg=name)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "attention"), [*((family, "bidirectional") for family in FAMILIES), ("gemma2", "causal")]
)
def test_company_never_changes_the_score_in_flex_attention(family, attention):
    for pooling in POOLERS:
        config = encoder_config(family, attention=attention, pooling=pooling, pooling_k=2, num_labels=3)
        model = build(GemmaEncoderForSequenceClassification, config)
        with torch.no_grad():
            alone = torch.cat([model(ids[None]).logits for ids in BATCH])
            if pooling == "mean":
                set_backend(model, "flex_attention")
            else:  # compiled already
                model.set_attn_implementation("flex_attention")
            for side in ("right", "left"):
                torch.testing.assert_close(model(**pad(BATCH, side)).logits, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [UNPADDED, "eager"])
def test_outputs_come_back_in_the_shape_they_came_in(backend):
    model = build(GemmaEncoderModel, encoder_config("gemma2"))
    set_backend(model, backend)
    alone, batch = pad(BATCH[1:2]), pad(BATCH, "left", extra=2)
    with torch.no_grad():
        expected = model(**alone, output_hidden_states=True, output_attentions=True)
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    real = batch["attention_mask"][..., None].bool()
    for states in (outputs.last_hidden_state, *outputs.hidden_states):
        assert states.shape == (3, 12, 32) and states.masked_select(~real).abs().max() == 0
    assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
    for states, alone_states in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(states[1:2, 6:], alone_states, atol=1e-5, rtol=1e-5)
    for weights, alone_weights in zip(outputs.attentions, expected.attentions, strict=True):
        assert weights.shape == (3, 4, 12, 12)
        torch.testing.assert_close(weights[1:2, :, 6:, 6:], alone_weights, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(-1), real[:, None, :, 0].expand(-1, 4, -1).float())


def test_a_hole_in_the_mask_is_no_token():
    """Positions and windows count real tokens, so a masked token in the middle is as if it were not there."""
    model = build(GemmaEncoderModel, encoder_config("gemma2", attention_window=2))
    ids = BATCH[0][None]
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    for backend in (UNPADDED, "eager"):
        set_backend(model, backend)
        with torch.no_grad():
            pooled = model(ids, attention_mask=mask).pooler_output
            expected = model(torch.cat([ids[:, :4], ids[:, 5:]], 1)).pooler_output
        torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_verified_by_behaviour(family, attention):
    for backend in set(backends(family)) - {"flex_attention"}:
        model = build(GemmaEncoderModel, encoder_config(family, attention=attention))
        set_backend(model, backend)
        verify_attention(model.train())
        assert model.training and model.pooler.training
        lie = copy.deepcopy(model)
        lie.config.attention = "causal" if attention == "bidirectional" else "bidirectional"
        with pytest.raises(RuntimeError, match=r"layer 0: sees \(earlier, later\) tokens"):
            verify_attention(lie)


def test_a_layer_that_says_one_thing_and_does_another_is_found():
    """Every setting of the layer is right, but its kernel is causal: only behaviour can tell."""

    def one_causal_layer(module, *args, **kwargs):
        module.is_causal = module.layer_idx == 2
        return varlen_attention(module, *args, **kwargs)

    AttentionInterface.register("one_causal_layer", one_causal_layer)
    model = build(GemmaEncoderModel, encoder_config("gemma2"))
    verify_attention(model)
    set_backend(model, "one_causal_layer")
    found = r"layer 2: sees \(earlier, later\) tokens: \(True, False\), expected \(True, True\)$"
    with pytest.raises(RuntimeError, match=found) as error:
        model.verify_attention()
    assert str(error.value).count("layer ") == 1


def test_wrappers_and_compiled_models_are_verified_too():
    model = build(GemmaEncoderModel, encoder_config("gemma2"))
    verify_attention(torch.nn.DataParallel(model))
    stranger = torch.nn.Sequential(model)  # as sentence-transformers' models, which have an `encode` of their own
    stranger.__class__ = type("Stranger", (torch.nn.Sequential,), {"encode": None})
    verify_attention(stranger)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**pad(BATCH))
    verify_attention(compiled)
    model.model.layers[1].self_attn.reach = (None, 0)
    with pytest.raises(RuntimeError, match=r"layer 1: sees \(earlier, later\) tokens: \(True, False\)"):
        verify_attention(compiled)


def test_weights_that_are_no_numbers_are_said_to_be_broken():
    model = build(GemmaEncoderModel, encoder_config("gemma2"))
    torch.nn.init.constant_(model.model.layers[1].self_attn.q_proj.weight, torch.nan)
    with pytest.raises(RuntimeError, match="Layer 1 computes no finite numbers: its weights are broken"):
        verify_attention(model)


def test_a_config_changed_after_loading_is_found():
    model = build(GemmaEncoderModel, encoder_config("gemma2"))
    model.config.attention_window = 2
    with pytest.raises(RuntimeError, match=r"layer 1: was built to reach \(None, None\) tokens, expected \(2, 2\)"):
        verify_attention(model)


def test_flex_attention_never_drops_dropout_silently():
    model = build(GemmaEncoderModel, encoder_config("gemma2")).train()
    set_backend(model, "flex_attention")
    with pytest.raises(ValueError, match="attention_dropout=0"):
        model(**pad(BATCH))


def test_a_stock_model_is_no_encoder():
    with pytest.raises(RuntimeError, match="not a Gemma Encoder"):
        verify_attention(AutoModel.from_config(decoder_config("gemma2")))


def test_no_cache_is_built(monkeypatch):
    from transformers.models.gemma2 import modeling_gemma2

    monkeypatch.setattr(modeling_gemma2, "DynamicCache", None)
    for backend in (UNPADDED, "eager"):
        model = build(GemmaEncoderModel, encoder_config("gemma2"))
        set_backend(model, backend)
        model(**pad(BATCH))


def test_the_decoder_alone_refuses_to_run_unpadded():
    model = build(GemmaEncoderModel, encoder_config("gemma2"))
    with pytest.raises(ValueError, match="call the encoder"):
        model.model(BATCH[0][None])


def test_sequences_of_like_lengths_are_taken_together():
    """By hand: 100 is less than three quarters of 300, and three such save 3 x (300^2 - 100^2); a 10 saves little."""
    assert split_by_length([300, 290, 100, 90, 10]) == [2, 3]
    assert split_by_length([300, 240, 230]) == [3]
    assert split_by_length([30, 1, 1]) == [3]
    assert split_by_length([5]) == [1]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_buckets_change_nothing(family, attention):
    """Unlike lengths in any order, one of them 0, against upstream's padded eager attention; gradients too."""
    window = {} if family == "gemma" else {"sliding_window": 90}
    config = encoder_config(family, {"max_position_embeddings": 512, **window}, attention=attention)
    config.attention_dropout = config.feedforward_dropout = 0.0
    model = build(GemmaEncoderForSequenceClassification, config)
    batch = pad(texts((12, 300, 0, 40, 280, 100, 25)), side="left", extra=3)
    found = []
    for backend in (UNPADDED, "eager"):
        model.set_attn_implementation(backend)
        model.zero_grad()
        ignored = torch.full((7,), -100)  # a text without tokens fills a batch, it cannot be scored
        outputs = model(**batch, labels=ignored, output_hidden_states=True)
        outputs.logits.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((outputs.logits, outputs.hidden_states[-1], gradients))
    unpadding = with_buckets(unpad(batch["attention_mask"].bool(), longest_first=True), {(None, None)}, split=True)
    assert [(bucket.batch, bucket.length) for bucket in unpadding.buckets] == [(2, 300), (4, 100)]
    (logits, states, gradients), (expected, expected_states, expected_gradients) = found
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(states, expected_states, atol=1e-4, rtol=1e-4)
    for name, gradient in expected_gradients.items():
        close = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, atol=close, rtol=1e-3, msg=name)


@pytest.mark.parametrize("rotation", [{"rope_type": "linear"}, {"rope_type": "yarn"}], ids=["linear", "yarn"])
def test_scaled_positions_reach_as_far_as_the_model_is_told(rotation, tmp_path):
    """Long texts are refused until then; their states are upstream's."""
    rotation |= {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    stock = AutoModel.from_config(decoder_config("llama", rope_parameters=rotation, max_position_embeddings=8)).eval()
    for parameter in stock.parameters():
        parameter.data *= 5 if parameter.dim() > 1 else 1  # so that attention is far from uniform
    stock.save_pretrained(tmp_path)
    batch = pad(texts((20, 5)))
    with pytest.raises(ValueError, match=r"20 tokens.*max_position_embeddings=20"):
        GemmaEncoderModel.from_pretrained(tmp_path)(**batch)
    encoder = GemmaEncoderModel.from_pretrained(tmp_path, attention="causal", max_position_embeddings=20)
    with torch.no_grad():
        expected = stock(**batch).last_hidden_state * batch["attention_mask"][..., None]
        torch.testing.assert_close(encoder(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
