"""Loading and saving: any Gemma decoder checkpoint loads, and what is saved carries its own code."""

import torch
from torch import nn
from transformers import AttentionInterface
from transformers import initialization as init
from transformers.models.gemma.modeling_gemma import GemmaPreTrainedModel

from .attention_gemma_encoder import UNPADDED
from .configuration_gemma_encoder import GemmaEncoderConfig
from .pooling_gemma_encoder import ProbePooler

# Multimodal Gemma checkpoints keep the decoder in a text tower, under one of these names.
TEXT_TOWER = {r"^(model\.)?language_model\.(model\.)?(?=layers|embed_tokens|norm|per_layer)": "model."}
# Of such checkpoints, and of language models, what an encoder has no use for.
NOT_OURS = [r"lm_head", r"vision_tower", r"audio_tower", r"multi_modal_projector", r"embed_vision", r"embed_audio"]


class GemmaEncoderPreTrainedModel(GemmaPreTrainedModel):
    """What every class here shares: loading any Gemma decoder, backends, initialisation and saving."""

    config: GemmaEncoderConfig
    # Scores stay apart: neither bf16 rounding nor 4-bit loading may touch the head. FSDP shards it apart for its dtype.
    _no_split_modules = ["GemmaEncoderHead"]
    _keep_in_fp32_modules = ["classifier"]
    _keep_in_fp32_modules_strict = ["classifier"]
    _keys_to_ignore_on_load_unexpected = NOT_OURS
    _can_record_outputs = None  # the decoder records its own

    def __init__(self, config: GemmaEncoderConfig, **unknown):
        if unknown:
            raise TypeError(
                f"{type(self).__name__} does not know {', '.join(unknown)}. An encoder's options are the "
                "fields of GemmaEncoderConfig; its decoder's are given as `text_config={...}`."
            )
        if config.model_type != GemmaEncoderConfig.model_type:
            raise ValueError(
                f"`config` has model_type={config.model_type!r}. Pass GemmaEncoderConfig(text_config=config), or no "
                "config to `from_pretrained`."
            )
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, key_mapping=None, **kwargs):
        """As upstream; the text tower of a multimodal checkpoint is found by its parameter names."""
        key_mapping = {**TEXT_TOWER, **(key_mapping or {})}
        return super().from_pretrained(pretrained_model_name_or_path, *args, key_mapping=key_mapping, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As upstream; parameters are always saved under our names, never under those they were loaded from."""
        return super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As upstream, with unpadded execution as the default, and the decoder has a say."""
        requested = requested_attention or self.config.text_config._attn_implementation or UNPADDED
        if requested.startswith("paged|") or requested not in ("eager", *AttentionInterface().valid_keys()):
            raise ValueError(
                f"Specified `attn_implementation={requested!r}` is not supported. Use {UNPADDED!r} (the default), "
                "'eager', 'sdpa', 'flex_attention', 'flash_attention_2' or 'flash_attention_3'."
            )
        if requested == "sdpa" and self.config.text_config.model_type == "gemma2":
            raise ValueError(
                "attn_implementation='sdpa' cannot soft-cap attention scores, as Gemma 2 does. Use the default, "
                f"{UNPADDED!r}, or 'eager'."
            )
        if not is_init_check:
            self.model.get_correct_attn_implementation(requested)
        return super().get_correct_attn_implementation(requested, is_init_check)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, *args, **kwargs):
        """As upstream, except where it would be silently wrong.

        Raises:
            ValueError: `use_reentrant=True` on a Gemma 4 whose layers share keys and values: their gradient is lost.
        """
        shares = getattr(self.config.text_config, "num_kv_shared_layers", 0)
        if shares and (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`use_reentrant=True` loses gradients of a Gemma 4 whose layers share keys and values; pass "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

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
