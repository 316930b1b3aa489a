"""The encoder and its heads: a Gemma decoder's own layers, run bidirectionally, pooled, and given a task.

Gemma Encoder: arXiv 2503.02656. Shapes: padded inputs (batch, seq_len), inside the encoder (total_tokens, hidden) and
offsets (batch + 1), pooled (batch, hidden), logits (batch, num_labels) or (batch, num_docs).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.models.gemma.modeling_gemma import GemmaPreTrainedModel
from transformers.utils import can_return_tuple

from .attention_gemma_encoder import (
    UNPADDED,
    layer_reach,
    layer_type_of,
    padded_mask,
    restore_attentions,
    unpad,
    verify_attention,
    with_dense_masks,
)
from .configuration_gemma_encoder import GemmaEncoderConfig
from .losses_gemma_encoder import CLASSIFICATION_LOSSES, IGNORE, RANKING_LOSSES
from .pooling_gemma_encoder import POOLERS, ProbePooler

# Multimodal Gemma checkpoints keep the decoder in a text tower, under one of these names.
TEXT_TOWER = {r"^(model\.)?language_model\.(model\.)?(?=layers|embed_tokens|norm|per_layer)": "model."}
# Of such checkpoints, and of language models, what an encoder has no use for.
NOT_OURS = [r"lm_head", r"vision_tower", r"audio_tower", r"multi_modal_projector", r"embed_vision", r"embed_audio"]


class GemmaEncoderPreTrainedModel(GemmaPreTrainedModel):
    """Loading and saving: any Gemma decoder checkpoint loads, and what is saved carries its own code."""

    config: GemmaEncoderConfig
    # Scores stay apart: neither bf16 rounding nor 4-bit loading may touch the head.
    _keep_in_fp32_modules = ["classifier"]
    _keep_in_fp32_modules_strict = ["classifier"]
    _keys_to_ignore_on_load_unexpected = NOT_OURS
    _can_record_outputs = None  # the decoder records its own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, key_mapping=None, **kwargs):
        """As upstream; the text tower of a multimodal checkpoint is found by its parameter names."""
        key_mapping = {**TEXT_TOWER, **(key_mapping or {})}
        return super().from_pretrained(pretrained_model_name_or_path, *args, key_mapping=key_mapping, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As upstream; parameters are always saved under our names, never under those they were loaded from."""
        return super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As upstream, with unpadded execution as the default; the decoder has a say (Gemma 2 refuses "sdpa")."""
        requested = requested_attention or self.config.text_config._attn_implementation or UNPADDED
        if not is_init_check:
            self.model.get_correct_attn_implementation(requested)
        return super().get_correct_attn_implementation(requested, is_init_check)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        """As upstream, except where it would be silently wrong.

        Raises:
            ValueError: `use_reentrant=True` on a Gemma 4 whose layers share keys and values: their gradient is lost.
        """
        shares = self.config.text_config.to_dict().get("num_kv_shared_layers")
        if shares and (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`use_reentrant=True` loses gradients of a Gemma 4 whose layers share keys and values; pass "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)  # Gemma's own norms are 1 + weight and start at zero; torch's are not
        elif isinstance(module, ProbePooler):
            init.normal_(module.probes)
        else:
            super()._init_weights(module)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As upstream; the decoder resizes, since Gemma 4 has a second embedding to keep in step."""
        embeddings = self.model.resize_token_embeddings(*args, **kwargs)
        self.config.text_config.vocab_size = embeddings.num_embeddings
        return embeddings


def check_inputs(config, input_ids, attention_mask, inputs_embeds) -> torch.Tensor:
    """The boolean mask (batch, seq_len) of the real tokens of well-formed inputs.

    Raises:
        ValueError: names the argument, its value and what to do. Values are not looked at inside torch.compile.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    name, inputs = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    expected = ["batch", "seq_len"] + [config.hidden_size] * (inputs_embeds is not None)
    shape = tuple(inputs.shape)
    if inputs.dim() != len(expected) or (inputs_embeds is not None and shape[-1] != config.hidden_size):
        raise ValueError(f"`{name}` must have shape ({', '.join(map(str, expected))}), got {shape}.")
    if 0 in shape:
        raise ValueError(f"`{name}` is empty: its shape is {shape}. Pass at least one sequence of one token.")
    if attention_mask is None:
        attention_mask = torch.ones(shape[:2], device=inputs.device)
    if attention_mask.shape != shape[:2]:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; it must be {shape[:2]} as `{name}` has, "
            "one for real tokens and zero for padding."
        )
    mask = attention_mask.to(device=inputs.device, dtype=torch.bool)
    if torch.compiler.is_compiling():
        return mask
    if input_ids is not None:
        if input_ids.is_floating_point():
            raise ValueError(f"`input_ids` must be integers, got {input_ids.dtype}; pass vectors as `inputs_embeds`.")
        lowest, highest = input_ids.where(mask, 0).aminmax()  # padding ids may be anything
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(
                f"`input_ids` has ids from {lowest} to {highest}, but the model's vocabulary has {config.vocab_size} "
                "tokens. Is this the model's tokenizer? Call `resize_token_embeddings` after adding tokens to it."
            )
    if (longest := mask.sum(-1).max()) > config.max_position_embeddings:
        raise ValueError(
            f"`{name}` has a sequence of {longest} tokens, more than `max_position_embeddings` "
            f"({config.max_position_embeddings}). Truncate when tokenizing."
        )
    return mask


class Encoded(NamedTuple):
    """What a head needs of a batch: its tokens, padding apart, and where they came from."""

    token_states: torch.Tensor  # (tokens, hidden): the real tokens first, in order
    offsets: torch.Tensor  # (batch + 1,)
    indices: torch.Tensor  # (tokens,) of the token states in (batch * seq_len)
    mask: torch.Tensor  # (batch, seq_len)
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


def drop_feedforward_output(module: nn.Module, args, output: torch.Tensor) -> torch.Tensor:
    """Forward hook on a feed-forward block's last module: the paper's dropout on its output."""
    return F.dropout(output, p=module.output_dropout, training=module.training)


class GemmaEncoderModel(GemmaEncoderPreTrainedModel):
    """A Gemma decoder as an encoder: token states, and one pooled vector for each sequence.

    `model` is upstream's own Gemma 1, 2, 3 or 4 text model with its own parameter names, so its checkpoints load as
    they are. Dropout follows the paper (section 3): on attention weights and on feed-forward outputs.
    """

    _keys_to_ignore_on_load_unexpected = [*NOT_OURS, r"^classifier\."]

    def __init__(self, config: GemmaEncoderConfig):
        super().__init__(config)
        config.text_config._attn_implementation = config._attn_implementation
        self.model = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.reach = layer_reach(config, layer_type_of(attention))
            attention.is_causal = config.attention == "causal"
            attention.attention_dropout = config.attention_dropout
            # Flash attention counts windows exclusively and takes them from here; the others take masks.
            attention.sliding_window = None if attention.reach[0] is None else attention.reach[0] + 1
            # The block ends with Gemma 2's second norm where there is one: dropped elements stay zero in the residual.
            last = getattr(layer, "post_feedforward_layernorm", layer.mlp)
            last.output_dropout = config.feedforward_dropout
            last.register_forward_hook(drop_feedforward_output)
        self.pooler = POOLERS[config.pooling](config)
        self.post_init()

    def encode(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Encoded:
        """Runs the decoder's layers on the real tokens of a batch."""
        mask = check_inputs(self.config, input_ids, attention_mask, inputs_embeds)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        implementation = self.model.config._attn_implementation
        if output_attentions and implementation not in (UNPADDED, "eager"):
            raise ValueError(
                f"`output_attentions=True` needs attn_implementation {UNPADDED!r} or 'eager', not {implementation!r}: "
                "the others never hold the attention weights."
            )
        run = self._run_padded if implementation in ("eager", "sdpa", "flex_attention") else self._run_unpadded
        return run(
            input_ids,
            inputs_embeds,
            mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=False,
        )

    def _run_unpadded(self, input_ids, inputs_embeds, mask, **kwargs) -> Encoded:
        """Every layer sees (1, total_tokens, hidden)."""
        unpadding = unpad(mask)
        if unpadding.max_length == 0:  # nothing but padding
            states = self.get_input_embeddings().weight.new_zeros(0, self.config.hidden_size)
            return Encoded(states, unpadding.offsets, unpadding.indices, mask, None, None)
        if input_ids is not None:
            input_ids = input_ids.flatten()[unpadding.indices][None]
        else:
            inputs_embeds = inputs_embeds.flatten(0, 1)[unpadding.indices][None]
        if self.model.config._attn_implementation == UNPADDED:
            kwargs["unpadding"] = with_dense_masks(unpadding, {layer.self_attn.reach for layer in self.model.layers})
        else:  # flash attention keeps sequences apart by their lengths
            offsets = unpadding.offsets.int()
            kwargs.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
            kwargs.update(max_length_q=unpadding.max_length, max_length_k=unpadding.max_length)
            if self.config.text_config.model_type == "gemma" and self.config.attention_window is not None:
                kwargs["sliding_window"] = self.config.attention_window + 1  # Gemma 1's layers do not pass their own
        outputs = self.model(
            input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=unpadding.positions[None], **kwargs
        )
        hidden_states, attentions = outputs.hidden_states, outputs.attentions
        if hidden_states is not None:
            hidden_states = tuple(to_padded(states[0], unpadding.indices, mask) for states in hidden_states)
        if attentions is not None:
            attentions = tuple(restore_attentions(weights, unpadding, mask.shape[1]) for weights in attentions)
        states = outputs.last_hidden_state[0]
        return Encoded(states, unpadding.offsets, unpadding.indices, mask, hidden_states, attentions)

    def _run_padded(self, input_ids, inputs_embeds, mask, **kwargs) -> Encoded:
        """Every layer sees (batch, seq_len, hidden), with masks of ours; shapes do not depend on the data."""
        if input_ids is not None:
            input_ids = input_ids.where(mask, 0)
        else:
            inputs_embeds = inputs_embeds.where(mask[..., None], 0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        decoder = self.model.config
        reaches = {layer_type_of(layer.self_attn): layer.self_attn.reach for layer in self.model.layers}
        masks = {kind: padded_mask(mask, positions, reach, decoder, self.dtype) for kind, reach in reaches.items()}
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            # Gemma 1 takes one mask; its layers are all of one type.
            attention_mask=masks["full_attention"] if decoder.model_type == "gemma" else masks,
            position_ids=positions,
            **kwargs,
        )
        hidden_states, attentions = outputs.hidden_states, outputs.attentions
        if hidden_states is not None:
            hidden_states = tuple(states.where(mask[..., None], 0) for states in hidden_states)
        if attentions is not None:
            real = mask[:, None, :, None] & mask[:, None, None, :]
            attentions = tuple(weights.where(real, 0) for weights in attentions)
        indices = mask.flatten().long().argsort(descending=True, stable=True)  # real tokens first, in order
        offsets = F.pad(mask.sum(-1).cumsum(0), (1, 0))
        states = outputs.last_hidden_state.flatten(0, 1)[indices]
        return Encoded(states, offsets, indices, mask, hidden_states, attentions)

    def pool(self, encoded: Encoded) -> torch.Tensor:
        """Token states -> (batch, hidden) in fp32, outside autocast."""
        with torch.autocast(encoded.token_states.device.type, enabled=False):
            return self.pooler(encoded.token_states, encoded.offsets)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: (batch, seq_len), padded on either side with any id.
            attention_mask: (batch, seq_len), nonzero for real tokens. None: all tokens are real.
            inputs_embeds: (batch, seq_len, hidden) instead of `input_ids`.

        Returns:
            `last_hidden_state` (batch, seq_len, hidden), zeros at padding, and `pooler_output` (batch, hidden) in
            fp32. A row of nothing but padding is pooled to zeros and leaves the others alone.

        Raises:
            ValueError: malformed inputs, naming the argument.
        """
        encoded = self.encode(input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=to_padded(encoded.token_states, encoded.indices, encoded.mask),
            pooler_output=self.pool(encoded),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def verify_attention(self) -> None:
        """Raises RuntimeError unless every layer attends as the config says; see `verify_attention`."""
        verify_attention(self)


def to_padded(states: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Token states (tokens, hidden) back in (batch, seq_len, hidden), zeros at padding."""
    padded = states.new_zeros(mask.numel(), states.shape[-1]).index_copy(0, indices, states)
    return padded.view(*mask.shape, -1).where(mask[..., None], 0)


class GemmaEncoderHead(nn.Module):
    """The task MLP: pooled (batch, hidden) -> (batch, num_outputs), in fp32.

    It normalises first: pooled Gemma states are large, and a fresh layer on them can diverge. Our choice.
    """

    def __init__(self, config: GemmaEncoderConfig, num_outputs: int):
        super().__init__()
        sizes = [config.hidden_size, *config.classifier_hidden_sizes]
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.layers = nn.ModuleList(nn.Linear(size, next_size) for size, next_size in pairwise(sizes))
        self.activation = ACT2FN[config.classifier_activation]
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(sizes[-1], num_outputs)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pooled.device.type, enabled=False):
            states = self.norm(pooled.to(self.norm.weight.dtype))
            for layer in self.layers:
                states = self.activation(layer(self.dropout(states)))
            return self.out_proj(self.dropout(states)).float()


class GemmaEncoderForSequenceClassification(GemmaEncoderModel):
    """A Gemma Encoder that classifies (one or several labels) or predicts numbers, by `problem_type`."""

    accepts_loss_kwargs = True  # the Trainer passes `num_items_in_batch`, and the loss divides by it
    _keys_to_ignore_on_load_unexpected = NOT_OURS

    def __init__(self, config: GemmaEncoderConfig):
        super().__init__(config)
        self.classifier = GemmaEncoderHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels: Class indices (batch,), probabilities (batch, num_labels), or targets (batch,) or
                (batch, num_labels), by `config.problem_type`. When that is None, one label means regression, integer
                labels one class of several, and floating labels several classes. -100 is ignored in all of them.
            num_items_in_batch: Number of labels the loss is averaged over. None: the number in this batch. The
                Trainer passes that of all accumulated batches, so that accumulation never changes a gradient.

        Returns:
            `logits` (batch, num_labels) in fp32, and `loss` with labels; zero when all of them are ignored.
        """
        encoded = self.encode(input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states)
        logits = self.classifier(self.pool(encoded))
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )

    def _loss(self, logits, labels, num_items_in_batch) -> torch.Tensor:
        problem_type = self.config.problem_type
        if problem_type is None and logits.shape[-1] == 1:
            problem_type = "regression"
        elif problem_type is None:
            floating = labels.is_floating_point()
            problem_type = "multi_label_classification" if floating else "single_label_classification"
        labels = labels.to(logits.device)
        expected = logits.shape[0] if problem_type == "single_label_classification" else logits.numel()
        if labels.numel() != expected or labels.shape[0] != logits.shape[0]:
            raise ValueError(
                f"`labels` of shape {tuple(labels.shape)} do not match logits of shape {tuple(logits.shape)} for "
                f"problem_type={problem_type!r}."
            )
        if problem_type == "single_label_classification" and not torch.compiler.is_compiling():
            lowest, highest = labels.where(labels != IGNORE, 0).aminmax()
            if lowest < 0 or highest >= logits.shape[-1]:
                raise ValueError(
                    f"`labels` has classes from {lowest} to {highest}, but the model has {logits.shape[-1]}: load it "
                    f"with `num_labels={int(highest) + 1}`, or mark rows to ignore with {IGNORE}."
                )
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORE).sum().clamp(min=1)
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device).clamp(min=1)
        return CLASSIFICATION_LOSSES[problem_type](logits, labels) / num_items_in_batch


class GemmaEncoderForRanking(GemmaEncoderModel):
    """A Gemma Encoder that scores documents for a query, trained on lists of them (RankT5, arXiv 2210.10634)."""

    accepts_loss_kwargs = False  # a list counts once whatever its length, which the Trainer's count does not know
    _keys_to_ignore_on_load_unexpected = NOT_OURS

    def __init__(self, config: GemmaEncoderConfig):
        if config.num_labels > 2:  # 2 is every config's default
            raise ValueError(f"`num_labels` must be 1 for ranking, one score a document, got {config.num_labels}")
        config.num_labels = 1
        super().__init__(config)
        self.classifier = GemmaEncoderHead(config, num_outputs=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids: Lists (batch, num_docs, seq_len) or flat (n, seq_len). A list shorter than num_docs is filled
                with documents of nothing but padding, labelled -100.
            labels: Relevance (batch, num_docs), graded or binary, -100 for documents that are not there. Flat inputs
                may have them too, as n = batch * num_docs.

        Returns:
            `logits` (batch, num_docs) for lists, (n, 1) for flat inputs, in fp32; higher is more relevant.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        lists = None
        if inputs is not None and inputs.dim() == (3 if inputs_embeds is None else 4):
            lists = inputs.shape[:2]
            input_ids = None if input_ids is None else input_ids.flatten(0, 1)
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)
            if attention_mask is not None and attention_mask.shape[:2] == lists:
                attention_mask = attention_mask.flatten(0, 1)
        encoded = self.encode(input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states)
        logits = self.classifier(self.pool(encoded))  # (n, 1)
        hidden_states, attentions = encoded.hidden_states, encoded.attentions
        if lists is not None:
            logits = logits.view(lists)
            hidden_states = hidden_states and tuple(states.unflatten(0, lists) for states in hidden_states)
            attentions = attentions and tuple(weights.unflatten(0, lists) for weights in attentions)
        loss = None
        if labels is not None:
            if labels.dim() != 2 or labels.numel() != logits.numel() or (lists and labels.shape != lists):
                raise ValueError(
                    f"`labels` of shape {tuple(labels.shape)} do not match scores of shape {tuple(logits.shape)}: one "
                    "label for each document of each list, (batch, num_docs)."
                )
            loss = RANKING_LOSSES[self.config.ranking_loss](logits.view(labels.shape), labels.to(logits.device))
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions)


GemmaEncoderModel.register_for_auto_class("AutoModel")
GemmaEncoderForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
GemmaEncoderForRanking.register_for_auto_class("AutoModelForSequenceClassification")
