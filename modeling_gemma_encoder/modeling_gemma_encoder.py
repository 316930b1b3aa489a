"""The encoder and its heads: a Gemma decoder's own layers, run bidirectionally, pooled, and given a
task.

Gemma Encoder: arXiv 2503.02656. Shapes: padded inputs are (batch, seq_len); inside the encoder
states are (total_tokens, hidden) with offsets (batch + 1,); pooled states are (batch, hidden);
logits are (batch, num_labels), (batch, num_docs) or (batch, seq_len, vocab_size).
"""

import copy
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .attention_gemma_encoder import UNPADDED, set_reach
from .calibration_gemma_encoder import probabilities
from .configuration_gemma_encoder import TASK_HEADS, GemmaEncoderConfig
from .encoding_gemma_encoder import Encoded, for_caller, in_chunks, previous_states, run_padded, run_unpadded
from .feedforward_gemma_encoder import with_fusing
from .inputs_gemma_encoder import check_inputs, check_labels, refuse_rows_without_tokens
from .losses_gemma_encoder import CLASSIFICATION_LOSSES, IGNORE, RANKING_LOSSES, mean_over, single_label_loss
from .norm_gemma_encoder import with_scaling
from .outputs_gemma_encoder import arranged, to_padded
from .peft_gemma_encoder import StockHeadGuard, refuse_lost_parts, refuse_shadow, refuse_unguarded
from .pooling_gemma_encoder import POOLERS
from .precision_gemma_encoder import refuse_non_finite, warn_of_slow_bf16
from .pretrained_gemma_encoder import NOT_OURS, GemmaEncoderPreTrainedModel
from .quantization_gemma_encoder import hold_int8
from .verification_gemma_encoder import verify_attention

# `CrossEncoder` takes the sigmoid of a single score by default; this setting leaves scores as they
# are.
AS_IT_IS = {"activation_fn": "torch.nn.modules.linear.Identity"}


def drop_feedforward_output(module: nn.Module, args, output: torch.Tensor) -> torch.Tensor:
    """Apply the paper's dropout to the output of a feed-forward block, as a forward hook on the
    block's last module."""
    return module.output_dropout(output)


class GemmaEncoderModel(GemmaEncoderPreTrainedModel):
    """Encode texts with a Gemma decoder, into token states and one pooled vector for each sequence.

    `model` is upstream's own text model, of Gemma 1, 2, 3 or 4, Llama, or Qwen 2 or 3, with its own
    parameter names, so its checkpoints load as they are. As in the paper, dropout is on attention
    weights and on feed-forward outputs.
    """

    _keys_to_ignore_on_load_unexpected = [*NOT_OURS, r"^classifier\."]

    def __init__(self, config: GemmaEncoderConfig, **unknown):
        super().__init__(config, **unknown)
        config.text_config._attn_implementation = config._attn_implementation
        self.model = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        with_scaling(self.model)
        for layer in self.model.layers:
            layer.mlp = with_fusing(layer.mlp)
            set_reach(layer.self_attn, config)
            layer.self_attn.attention_dropout = config.attention_dropout
            # The block ends with Gemma 2's second norm where there is one: dropped elements stay
            # zero in the residual.
            last = getattr(layer, "post_feedforward_layernorm", layer.mlp)
            last.output_dropout = nn.Dropout(config.feedforward_dropout)
            last.register_forward_hook(drop_feedforward_output)
        if config.int8_weights:
            hold_int8(self)
        self.pooler = POOLERS[config.pooling](config)
        self.register_state_dict_pre_hook(refuse_unguarded)
        self.post_init()

    def encode(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> Encoded:
        """Run the decoder's layers on the real tokens of a batch."""
        mask = check_inputs(self.config, input_ids, attention_mask, inputs_embeds)
        warn_of_slow_bf16(self.get_input_embeddings().weight)
        refuse_shadow(self)
        if self.training and torch.is_grad_enabled():
            refuse_lost_parts(self, frozen_alone=True)
        if input_ids is not None and attention_mask is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        implementation = self.model.config._attn_implementation
        if output_attentions and implementation not in (UNPADDED, "eager"):
            raise ValueError(
                f"`output_attentions=True` needs attn_implementation {UNPADDED!r} or 'eager'; got {implementation!r}, "
                "which never holds the attention weights."
            )
        run = run_padded if implementation in ("eager", "sdpa", "flex_attention") else run_unpadded
        return run(
            self,
            input_ids,
            inputs_embeds,
            mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=False,
        )

    def pool(self, encoded: Encoded) -> torch.Tensor:
        """Pool token states (tokens, hidden) into (batch, hidden), in fp32 and outside autocast."""
        states = encoded.token_states
        with torch.autocast(states.device.type, enabled=False):
            return self.pooler(states, encoded.offsets.to(states.device))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> BaseModelOutputWithPooling:
        """
        Return the states of all tokens and one pooled vector for each text.

        Args:
            input_ids: (batch, seq_len), padded on either side with any id.
            attention_mask: (batch, seq_len), nonzero for real tokens. None: all tokens are real.
            inputs_embeds: (batch, seq_len, hidden) instead of `input_ids`.
            output_hidden_states: True for the states of all layers, or a list of their numbers,
                where 0 is the embeddings; `hidden_states` has None for those that are not asked
                for.

        Returns:
            `last_hidden_state` (batch, seq_len, hidden), zeros at padding, and `pooler_output`
            (batch, hidden) in fp32. A row of nothing but padding is pooled to zeros and does not
            change the others. The states are copies of those the layers used; `retain_grad()` on a
            copy keeps the gradient of the original.

        Raises:
            TypeError, ValueError: an argument is malformed; the message names it.
        """
        encoded = self.encode(input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states)
        pooled = self.pool(encoded)
        self._refuse_non_finite("pooler_output", pooled)
        return BaseModelOutputWithPooling(
            last_hidden_state=arranged(
                encoded.token_states, partial(to_padded, indices=encoded.indices, mask=encoded.mask)
            ),
            pooler_output=pooled,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _refuse_non_finite(self, name: str, values: torch.Tensor) -> None:
        refuse_non_finite(name, values, self.get_input_embeddings().weight, self.training)

    def _add_head(self, config: GemmaEncoderConfig, num_outputs: int) -> None:
        self.classifier, self.score = GemmaEncoderHead(config, num_outputs), StockHeadGuard()
        self.post_init()

    def verify_attention(self) -> None:
        """Raise RuntimeError unless every layer attends as the config says; see `verify_attention`."""
        verify_attention(self)


class GemmaEncoderHead(nn.Module):
    """Map pooled states (batch, hidden) to (batch, num_outputs) by the task MLP, in fp32.

    The states are normalized first, which is our choice: they are large in Gemma, and training a
    new layer on them can diverge.
    """

    def __init__(self, config: GemmaEncoderConfig, num_outputs: int):
        super().__init__()
        sizes = [config.hidden_size, *config.classifier_hidden_sizes]
        fp32 = {"dtype": torch.float32}  # also when the decoder is loaded in bf16
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6, **fp32)
        self.layers = nn.ModuleList(nn.Linear(size, next_size, **fp32) for size, next_size in pairwise(sizes))
        self.activation = ACT2FN[config.classifier_activation]
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.out_proj = nn.Linear(sizes[-1], num_outputs, **fp32)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pooled.device.type, enabled=False):
            states = self.norm(pooled.to(self.norm.weight.dtype))
            for layer in self.layers:
                states = self.activation(layer(self.dropout(states)))
            return self.out_proj(self.dropout(states)).float()


class GemmaEncoderForSequenceClassification(GemmaEncoderModel):
    """Classify texts, with one or several labels each, or predict numbers for them, by
    `config.problem_type`."""

    accepts_loss_kwargs = True  # the Trainer passes `num_items_in_batch`, and the loss divides by it
    _keys_to_ignore_on_load_unexpected = NOT_OURS

    def __init__(self, config: GemmaEncoderConfig, **unknown):
        if config.problem_type == "regression" and getattr(config, "sentence_transformers", None) is None:
            config = copy.deepcopy(config)
            config.sentence_transformers = copy.deepcopy(AS_IT_IS)
        super().__init__(config, **unknown)
        self._add_head(config, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> SequenceClassifierOutput:
        """
        Return the logits of each text, and the loss if labels are given.

        Args:
            labels: By `config.problem_type`: class indices (batch,) for one class of several; zeros
                and ones, or probabilities, (batch, num_labels) for several classes at once; numbers
                (batch,) or (batch, num_labels) for regression. If it is None, `num_labels=1` means
                regression, and integer labels mean one class of several; floating labels are an
                error, since the model would be saved as one of single classes. A label of -100 is
                always ignored.
            num_items_in_batch: Number of labels the loss is averaged over; by default the number in
                this batch. The Trainer passes that of all accumulated batches, so that accumulation
                never changes a gradient.

        Returns:
            `logits` (batch, num_labels) in fp32, which are in the labels' units for a regression.
            `loss` is zero if all labels are ignored; with `config.label_std`, errors are measured
            in units of it.
        """
        encoded = self.encode(input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states)
        logits = self.classifier(self.pool(encoded))
        if self.config.label_std is not None:
            logits = logits * logits.new_tensor(self.config.label_std) + logits.new_tensor(self.config.label_mean)
        self._refuse_non_finite("logits", logits)
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        if labels is not None or not self.training:
            refuse_rows_without_tokens(encoded.mask, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return calibrated probabilities of classes, or of each of several labels, (batch,
        num_labels)."""
        if self.config.problem_type == "regression" or logits.shape[-1] == 1:
            raise ValueError("This model is a regression, which has no probabilities.")
        return probabilities(logits, self.config, self.config.problem_type != "multi_label_classification")

    def _loss(self, logits, labels, num_items_in_batch) -> torch.Tensor:
        check_labels(labels)
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
                f"`labels` of shape {tuple(labels.shape)} and {labels.dtype} do not match logits of shape "
                f"{tuple(logits.shape)} for problem_type={problem_type!r}. Pass integers (batch,) for one class per "
                "text, or floats (batch, num_labels) for several labels per text."
            )
        if self.config.problem_type is None and problem_type == "multi_label_classification":
            raise ValueError(
                "`labels` are floats, and `problem_type` is None. For several labels per text, load the model with "
                'problem_type="multi_label_classification"; for several numbers per text, with "regression". It is '
                "saved with the model, and without it probabilities would be those of one class of several."
            )
        if problem_type == "single_label_classification" and not torch.compiler.is_compiling():
            lowest, highest = labels.where(labels != IGNORE, 0).aminmax()
            if lowest < 0 or highest >= logits.shape[-1]:
                raise ValueError(
                    f"`labels` has classes from {lowest} to {highest}, but the model has {logits.shape[-1]} classes, "
                    f"counted from 0. Load it with another `num_labels`, or give rows to be ignored the label {IGNORE}."
                )
        of_std = {}
        if problem_type == "regression" and self.config.label_std is not None:
            of_std["std"] = logits.new_tensor(self.config.label_std)
        return mean_over(CLASSIFICATION_LOSSES[problem_type](logits, labels, **of_std), labels, num_items_in_batch)


def without_lists(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> tuple[list[torch.Tensor | None], tuple[int, int] | None]:
    """Return the inputs with lists (batch, num_docs, ...) flattened to (n, ...), and the lists'
    shape, or None."""
    inputs = [input_ids, attention_mask, inputs_embeds]
    if input_ids is not None and input_ids.dim() == 3:
        list_shape = input_ids.shape[:2]
    elif inputs_embeds is not None and inputs_embeds.dim() == 4:
        list_shape = inputs_embeds.shape[:2]
    else:
        return inputs, None
    # A mask of another shape stays as it is, for `check_inputs` to name it.
    return [x.flatten(0, 1) if x is not None and x.shape[:2] == list_shape else x for x in inputs], list_shape


def in_lists(values: tuple | None, list_shape: tuple[int, int]) -> tuple | None:
    """Return states or attention weights (n, ...) of every layer as (batch, num_docs, ...)."""
    return for_caller(values, torch.Tensor.unflatten, dim=0, sizes=list_shape)


class GemmaEncoderForRanking(GemmaEncoderModel):
    """Score documents for a query, trained on lists of documents (RankT5, arXiv 2210.10634)."""

    # Every list counts once, whatever its length. The Trainer would count documents.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = NOT_OURS

    def __init__(self, config: GemmaEncoderConfig, **unknown):
        if config.num_labels > 2:  # 2 is every config's default
            raise ValueError(
                f"`num_labels` must be 1 for ranking, which gives each document one score; got {config.num_labels}."
            )
        # A classifier's scores are others, so its calibration does not fit a ranker's.
        others = config.problem_type is not None or TASK_HEADS[0] in (config.architectures or ())
        if others or config.num_labels != 1 or getattr(config, "sentence_transformers", None) is None:
            config = copy.deepcopy(config)
            config.num_labels = 1
            if others:
                config.problem_type, config.calibration_temperature, config.calibration_bias = None, None, 0.0
                config.label_mean = config.label_std = None
            config.sentence_transformers = copy.deepcopy(AS_IT_IS)
        super().__init__(config, **unknown)
        self._add_head(config, num_outputs=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> SequenceClassifierOutput:
        """
        Return the score of each document, and the loss if labels are given.

        Args:
            input_ids: Lists (batch, num_docs, seq_len) or flat (n, seq_len). A list shorter than
                num_docs is filled with documents of nothing but padding, labeled -100.
            labels: Relevance (batch, num_docs), graded or binary, -100 for documents that only fill
                a list. Flat inputs of n = batch * num_docs documents may have labels too.

        Returns:
            `logits` (batch, num_docs) for lists, (n, 1) for flat inputs, in fp32; higher is more
            relevant.
        """
        inputs, list_shape = without_lists(input_ids, attention_mask, inputs_embeds)
        if self.config.list_chunk_size is None or list_shape is None:
            encoded = self.encode(*inputs, output_attentions, output_hidden_states)
            logits = self.classifier(self.pool(encoded))  # (n, 1)
            hidden_states, attentions = encoded.hidden_states, encoded.attentions
            if labels is None and not self.training and list_shape is None:
                refuse_rows_without_tokens(encoded.mask)
        elif output_attentions or output_hidden_states:
            raise ValueError("`output_attentions` and `output_hidden_states` need `list_chunk_size=None`.")
        else:
            logits = in_chunks(self._score, self.config.list_chunk_size, *inputs)  # (n, 1)
            hidden_states, attentions = None, None
        if list_shape is not None:
            logits = logits.view(list_shape)  # (batch, num_docs)
            hidden_states, attentions = (in_lists(values, list_shape) for values in (hidden_states, attentions))
        self._refuse_non_finite("logits", logits)
        loss = None if labels is None else self._loss(logits, labels, list_shape)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the calibrated probability that each document is relevant, in the shape of
        `logits`."""
        return probabilities(logits, self.config, one_of_several=False)

    def _score(self, input_ids, attention_mask, inputs_embeds) -> torch.Tensor:
        encoded = self.encode(input_ids, attention_mask, inputs_embeds, False, False)
        return self.classifier(self.pool(encoded))

    def _loss(self, logits, labels, list_shape) -> torch.Tensor:
        check_labels(labels)
        matches = labels.shape == list_shape if list_shape else labels.dim() == 2 and labels.shape[1] > 1
        if not matches or labels.numel() != logits.numel():
            raise ValueError(
                f"`labels` of shape {tuple(labels.shape)} do not match scores of shape {tuple(logits.shape)}. Pass one "
                "label for each document of each list, (batch, num_docs)."
            )
        return RANKING_LOSSES[self.config.ranking_loss](logits.view(labels.shape), labels.to(logits.device))


class GemmaEncoderForMaskedLM(GemmaEncoderModel):
    """Predict masked tokens, to train an encoder on plain text before it is given a task.

    The head is the decoder's own: its embedding, or `lm_head` if that is not tied, and its
    soft-capping. `config.masked_lm_objective` says which state predicts a token: its own ("mlm",
    BERT, arXiv 1810.04805), or the one before it, as the decoder has learned ("mntp", masked
    next-token prediction, LLM2Vec, arXiv 2404.05961, section 2.1). There is no pooler.
    """

    accepts_loss_kwargs = True  # the Trainer passes `num_items_in_batch`, and the loss divides by it
    _keys_to_ignore_on_load_unexpected = [*NOT_OURS, r"^pooler\.", r"^classifier\."]

    def __init__(self, config: GemmaEncoderConfig, **unknown):
        super().__init__(config, **unknown)
        del self.pooler  # nothing would train it
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        output_hidden_states: bool | list[int] | None = None,
    ) -> MaskedLMOutput:
        """
        Return the logits of the vocabulary at each token, or the loss if labels are given.

        Args:
            labels: (batch, seq_len), the token that belongs where `input_ids` has a mask, and -100
                elsewhere, for either objective. "mntp" cannot predict a first token, and ignores
                its label.
            num_items_in_batch: Number of labels the loss is averaged over; by default the number in
                this batch.

        Returns:
            Without labels, `logits` (batch, seq_len, vocab_size), which are zeros at padding and,
            for "mntp", at first tokens. With labels, `loss` alone: only the states of labeled
            tokens are multiplied with the vocabulary, which for Gemma's 256k tokens is most of the
            work.
        """
        encoded = self.encode(input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states)
        states, logits, loss = encoded.token_states, None, None
        self._refuse_non_finite("last_hidden_state", states)
        if self.config.masked_lm_objective == "mntp":
            states = previous_states(states, encoded.offsets)
        if labels is None:
            logits = to_padded(self._predict(states), encoded.indices, encoded.mask)
        else:
            loss = self._loss(states, labels, encoded, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )

    def _predict(self, states: torch.Tensor) -> torch.Tensor:
        if self.config.tie_word_embeddings:
            weight = self.model.embed_tokens.weight
            if weight.is_meta and not states.is_meta:  # it was taken away again after the embedding's turn
                raise ValueError(
                    'The head is the embedding, which cannot be offloaded; `device_map` has it on "disk". Put it on a '
                    "device."
                )
            logits = F.linear(states, weight.to(states.device))
        else:
            logits = self.lm_head(states).to(states.device)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _loss(self, states, labels, encoded: Encoded, num_items_in_batch) -> torch.Tensor:
        check_labels(labels)
        if labels.shape != encoded.mask.shape:
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)}; it must be {tuple(encoded.mask.shape)} as `input_ids` has, "
                f"with the token where one is masked and {IGNORE} elsewhere."
            )
        labels = labels.to(states.device).where(encoded.mask.to(states.device), IGNORE)
        if self.config.masked_lm_objective == "mntp":
            labels = labels.where(encoded.mask.to(states.device).cumsum(-1) > 1, IGNORE)
        labels = labels.flatten()[encoded.indices.to(states.device)]
        is_labeled = labels != IGNORE
        if not torch.compiler.is_compiling():
            lowest, highest = labels.where(is_labeled, 0).aminmax()
            if lowest < 0 or highest >= self.config.vocab_size:
                raise ValueError(
                    f"`labels` has tokens from {lowest} to {highest}, but the model's vocabulary has "
                    f"{self.config.vocab_size}. Give tokens that are not to be predicted the label {IGNORE}."
                )
        loss = single_label_loss(self._predict(states[is_labeled]), labels[is_labeled])
        return mean_over(loss, labels, num_items_in_batch)


GemmaEncoderModel.register_for_auto_class("AutoModel")
GemmaEncoderForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
GemmaEncoderForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
GemmaEncoderForRanking.register_for_auto_class("AutoModelForSequenceClassification")
