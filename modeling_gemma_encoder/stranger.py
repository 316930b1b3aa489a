"""What a published folder does where only torch and transformers are installed; verification runs this file's text.

python stranger.py FOLDER INPUTS DEVICE     # prints one line of JSON
"""

import json
import sys

import torch
import transformers
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

AUTO = {"GemmaEncoderModel": AutoModel, "GemmaEncoderForMaskedLM": AutoModelForMaskedLM}
# Fields of the config that decide scores.
SETTINGS = (
    *("attention", "attention_window", "pooling", "pooling_k", "pooling_num_probes", "pooling_num_heads"),
    *("classifier_hidden_sizes", "classifier_activation", "num_labels", "problem_type", "masked_lm_objective"),
    *("calibration_temperature", "calibration_bias", "sliding_window", "num_hidden_layers"),
)
LONGEST = 512  # tokens of an input
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


@torch.no_grad()
def observe(model, tokenizer, inputs: list) -> dict:
    """Tokens, outputs and settings of a model in fp32; `inputs` are texts and pairs of texts."""
    longest = min(tokenizer.model_max_length, model.config.max_position_embeddings, LONGEST)
    pairs = [[text] if isinstance(text, str) else text for text in inputs]
    encoded = [tokenizer(*pair, truncation=True, max_length=longest) for pair in pairs]
    alone = [outputs(model, tokenizer.pad([one], return_tensors="pt"))[0] for one in encoded]
    together = outputs(model, tokenizer.pad(encoded, return_tensors="pt"))
    settings = {name: getattr(model.config, name) for name in SETTINGS}
    settings["id2label"] = {str(label): name for label, name in model.config.id2label.items()}
    reach = [module.reach for module in model.modules() if hasattr(module, "reach")]
    try:
        attention = model.verify_attention()
    except RuntimeError as error:
        attention = str(error)
    return {
        "class": type(model).__name__,
        "decoder": model.config.text_config.model_type,
        "settings": settings,
        "reach": reach,
        "attention": attention,
        "tokens": [one["input_ids"] for one in encoded],
        "outputs": [values.tolist() for values in alone],
        "padding_changes": (together - torch.stack(alone)).abs().max().item(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main():
    folder, inputs, device = sys.argv[1:]
    with open(folder + "/config.json") as file:
        architecture = json.load(file)["architectures"][0]
    auto = AUTO.get(architecture, AutoModelForSequenceClassification)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model, loading = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    found = observe(model.to(device).eval(), tokenizer, json.loads(inputs))
    print(json.dumps({**found, "new": sorted(loading["missing_keys"])}))


if __name__ == "__main__":
    main()
