"""What a published folder does where only torch and transformers are installed; verification runs this file's text.

Run as `python fresh_process.py FOLDER INPUTS.json DEVICE`; prints one line of JSON.
"""

import json
import sys
from hashlib import sha256

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

AUTO = {"GemmaEncoderModel": AutoModel, "GemmaEncoderForMaskedLM": AutoModelForMaskedLM}
# Fields of a config that say where and by what it was written, not what it does.
ASIDE = ("transformers_version", "_name_or_path", "auto_map", "text_config._name_or_path")
LONGEST = 512  # tokens of an input
TOGETHER = 8  # inputs of a batch
VOCABULARY = 32  # tokens whose logits are looked at in a masked language model


def outputs(model, batch) -> torch.Tensor:
    """(batch, num_labels) logits of a head; (batch, hidden) without one; some of the vocabulary's."""
    found = model(**batch.to(model.device))
    if "logits" not in found:
        return found.pooler_output.float().cpu()
    if found.logits.ndim == 3:
        first = batch["attention_mask"].argmax(-1)
        return found.logits[torch.arange(len(first)), first, :VOCABULARY].float().cpu()
    return found.logits.float().cpu()


def settings(config) -> dict:
    """Every field of a config, those of its decoder as `text_config.name`."""
    fields = json.loads(json.dumps(config.to_dict()))
    fields |= {f"text_config.{name}": value for name, value in fields.pop("text_config").items()}
    return {name: value for name, value in fields.items() if name not in ASIDE and "transformers_version" not in name}


def reading(tokenizer) -> dict:
    """What of a tokenizer decides how texts are read, besides its template."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    added = sorted(str(token) for token in tokenizer.added_tokens_decoder.values())
    return {
        **{"tokenizer.model_max_length": tokenizer.model_max_length, "tokenizer.padding_side": tokenizer.padding_side},
        **{"tokenizer.truncation_side": tokenizer.truncation_side, "tokenizer.added_tokens": added},
        "tokenizer.vocabulary": sha256(vocabulary.encode()).hexdigest(),
    }


@torch.no_grad()
def observe(model, tokenizer, config, inputs: list) -> dict:
    """Tokens, outputs and settings of a model in fp32, and of its config as it is in the folder; `inputs` are texts and
    pairs of texts."""
    found = {**settings(config), **reading(tokenizer)}
    longest = min(tokenizer.model_max_length, model.config.max_position_embeddings, LONGEST)
    pairs = [[text] if isinstance(text, str) else text for text in inputs]
    encoded = [tokenizer(*pair, truncation=True, max_length=longest) for pair in pairs]
    alone = [outputs(model, tokenizer.pad([one], return_tensors="pt"))[0] for one in encoded]
    batches = [encoded[start : start + TOGETHER] for start in range(0, len(encoded), TOGETHER)]
    together = torch.cat([outputs(model, tokenizer.pad(batch, return_tensors="pt")) for batch in batches])
    reach = [module.reach for module in model.modules() if hasattr(module, "reach")]
    try:
        attention = model.verify_attention()
    except RuntimeError as error:
        attention = str(error)
    return {
        "class": type(model).__name__,
        "decoder": model.config.text_config.model_type,
        "settings": found,
        "reach": reach,
        "attention": attention,
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
