"""Observe what a published folder does where only torch and transformers are installed.

Verification runs the text of this file as `python -c TEXT FOLDER INPUTS.json DEVICE`, so it imports
nothing of this package. It prints one line of JSON.
"""

import json
import sys
from hashlib import sha256

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

AUTO = {"GemmaEncoderModel": AutoModel, "GemmaEncoderForMaskedLM": AutoModelForMaskedLM}
# Fields of a config that say where and by what it was written, not what it does.
IGNORED = ("transformers_version", "_name_or_path", "auto_map", "text_config._name_or_path")
MAX_LENGTH = 512  # tokens of an input
BATCH_SIZE = 8
VOCABULARY = 32  # tokens whose logits are recorded of a masked language model


def outputs(model, batch) -> torch.Tensor:
    """Return logits (batch, num_labels); (batch, hidden) without a head; (batch, VOCABULARY) of a
    masked LM."""
    found = model(**batch.to(model.device))
    if "logits" not in found:
        return found.pooler_output.float().cpu()
    if found.logits.ndim == 3:  # (batch, seq_len, vocabulary): the first real token of each input stands for all
        first = batch["attention_mask"].argmax(-1)
        return found.logits[torch.arange(len(first)), first, :VOCABULARY].float().cpu()
    return found.logits.float().cpu()


def settings(config) -> dict:
    """Return every field of a config that decides what it does, those of its decoder as
    `text_config.name`."""
    fields = json.loads(json.dumps(config.to_dict()))
    fields |= {f"text_config.{name}": value for name, value in fields.pop("text_config").items()}
    return {name: value for name, value in fields.items() if name not in IGNORED and "transformers_version" not in name}


def reading(tokenizer) -> dict:
    """Return what decides how a tokenizer reads texts, besides its template, which the golden
    tokens show."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "tokenizer.model_max_length": tokenizer.model_max_length,
        "tokenizer.padding_side": tokenizer.padding_side,
        "tokenizer.truncation_side": tokenizer.truncation_side,
        "tokenizer.added_tokens": sorted(str(token) for token in tokenizer.added_tokens_decoder.values()),
        "tokenizer.vocabulary": sha256(vocabulary.encode()).hexdigest(),
    }


def attention_error(model) -> str | None:
    """Return what is wrong with the model's attention, None where it is as configured."""
    try:
        return model.verify_attention()
    except RuntimeError as error:
        return str(error)


@torch.no_grad()
def observe(model, tokenizer, config, inputs: list) -> dict:
    """
    Return the tokens, outputs and settings of a model.

    Args:
        model: In fp32 and eval mode.
        config: As it is in the folder, where the dtype of the weights stands.
        inputs: Texts and pairs of texts.
    """
    max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings, MAX_LENGTH)
    pairs = [[text] if isinstance(text, str) else text for text in inputs]
    encoded = [tokenizer(*pair, truncation=True, max_length=max_length) for pair in pairs]
    # Each input by itself, and then padded in batches: padding must not change the outputs.
    alone = [outputs(model, tokenizer.pad([one], return_tensors="pt"))[0] for one in encoded]
    batches = [encoded[start : start + BATCH_SIZE] for start in range(0, len(encoded), BATCH_SIZE)]
    together = torch.cat([outputs(model, tokenizer.pad(batch, return_tensors="pt")) for batch in batches])
    return {
        "class": type(model).__name__,
        "decoder": model.config.text_config.model_type,
        "settings": {**settings(config), **reading(tokenizer)},
        "reach": [module.reach for module in model.modules() if hasattr(module, "reach")],
        "attention": attention_error(model),
        "tokens": [one["input_ids"] for one in encoded],
        "outputs": [values.tolist() for values in alone],
        "padding_changes": (together - torch.stack(alone)).abs().max().item(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main():
    folder, inputs, device = sys.argv[1:]
    with open(inputs) as file:
        inputs = json.load(file)
    with open(folder + "/config.json") as file:
        architecture = json.load(file)["architectures"][0]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto = AUTO.get(architecture, AutoModelForSequenceClassification)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model, loading = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    found = observe(model.to(device).eval(), tokenizer, config, inputs)
    print(json.dumps({**found, "new": sorted(loading["missing_keys"])}))


if __name__ == "__main__":
    main()
