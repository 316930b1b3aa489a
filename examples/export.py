"""Export a classifier or ranker to ONNX or torch.export's .pt2, so that it scores without this
package.

    python examples/export.py --model my-ranker --output exported              # exported/model.onnx, tokenizer.json ...
    python examples/export.py --model my-ranker --output exported --format torch

Both formats take `input_ids` and `attention_mask` (batch, seq_len) of any batch and length, padded
on either side, and return `logits`. They are compared with the model before they are put into
--output. They compute on padding, too, so that a short text beside a long one costs as much as the
long one. settings.json has the names of the labels, the most tokens of a text, and which text of a
pair is cut. With onnxruntime and tokenizers alone:

    settings = json.load(open("exported/settings.json"))
    tokenizer = Tokenizer.from_file("exported/tokenizer.json")
    tokenizer.enable_padding(pad_id=settings["pad_token_id"])
    tokenizer.enable_truncation(settings["max_length"], strategy=settings["truncation"])
    texts = [("how do cats purr", "They vibrate."), ("how do cats purr", "Dogs bark.")]  # or "one text", "another"
    read = tokenizer.encode_batch(texts)
    inputs = {"input_ids": [text.ids for text in read], "attention_mask": [text.attention_mask for text in read]}
    logits = InferenceSession("exported/model.onnx").run(["logits"], inputs)[0]
    labels = [settings["id2label"][str(row.argmax())] for row in logits]  # of a classifier; others return numbers
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from modeling_gemma_encoder import GemmaEncoderConfig, GemmaEncoderForRanking  # registers our classes
from modeling_gemma_encoder._scripts.command_line import ScriptParser, failing, interruptible
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.checkpoints import load_tokenizer

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
TOLERANCE = 1e-4  # largest difference of a logit


@dataclass
class ExportArguments:
    """Options of what is exported, and where it goes."""

    model: str = field(metadata={"help": "A classifier or ranker: a folder, or a repository on the Hub."})
    output: str = field(metadata={"help": "A folder that does not exist yet."})
    format: Literal["onnx", "torch"] = field(default="onnx", metadata={"help": "onnx, or torch for torch.export."})
    max_batch: int = field(default=4096, metadata={"help": "The largest batch that can be scored."})

    def validate(self) -> None:
        """Raise ValueError if the output exists, or the model is a decoder in a GGUF file."""
        if self.model.endswith(".gguf"):
            raise ValueError(f"--model {self.model} has no trained head. Fine-tune it first, and name the result.")
        if Path(self.output).exists():
            raise ValueError(f"--output {self.output} is there already: delete it, or name another.")


class Logits(torch.nn.Module):
    """Wrap a model so that it takes and returns tensors, and the export has no class of ours or of
    transformers."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def searchsorted(sorted_sequence, values, out_int32=False, right=False, side=None, sorter=None):
    """Translate torch.searchsorted to ONNX, which lacks it: count the sorted numbers that each
    value reaches."""
    from onnxscript import opset18 as op

    if not right:
        raise NotImplementedError("`right` must be True; got False.")
    one, zero = op.Constant(value_ints=[1]), op.Constant(value_ints=[0])
    reached = op.GreaterOrEqual(op.Unsqueeze(values, one), op.Unsqueeze(sorted_sequence, zero))
    return op.ReduceSum(op.Cast(reached, to=7), one, keepdims=0)  # 7: int64


def load(checkpoint: str) -> Logits:
    """Load a checkpoint in fp32, to run on padded batches; raise ValueError if it has no trained
    head."""
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        trust_remote_code=False,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{checkpoint} is not a trained classifier or ranker: {', '.join(missing)} would be random.")
    if not type(model).__module__.endswith("gemma_encoder"):
        raise ValueError(f"{checkpoint} must be a Gemma Encoder; it is a {type(model).__name__}.")
    return Logits(model).eval()


def examples(vocab_size: int, lengths: tuple[int, ...], pad_left: bool = False) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens, one text of each length, padded on the right or on the left."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab_size, (len(lengths), max(lengths)), generator=draw)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    mask = mask.flip(-1) if pad_left else mask
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@torch.no_grad()
def export(model: Logits, path: Path, kind: str, max_batch: int) -> None:
    """Write a model for batches up to `max_batch` and texts up to its positions; `kind` is "onnx"
    or "torch"."""
    config = model.model.config
    batch = examples(config.vocab_size, (7, 3, 5))
    sizes = torch.export.Dim("batch", max=max_batch), torch.export.Dim("seq_len", max=config.max_position_embeddings)
    shapes = {name: dict(enumerate(sizes)) for name in batch}
    if kind == "torch":
        torch.export.save(torch.export.export(model, (), batch, dynamic_shapes=shapes), path)
    else:
        torch.onnx.export(
            model,
            (),
            path,
            kwargs=batch,
            dynamic_shapes=shapes,
            input_names=list(batch),
            output_names=["logits"],
            dynamo=True,
            external_data=model.model.num_parameters() > 400e6,  # more than 1.6 GB do not go into one ONNX file
            verbose=False,
            custom_translation_table={torch.ops.aten.searchsorted.Tensor: searchsorted},
        )


@torch.no_grad()
def difference(model: Logits, path: Path, kind: str) -> float:
    """Return the largest difference of a logit from the model's, over batches of sizes that were
    not traced."""
    longest = model.model.config.max_position_embeddings
    differences = []
    for lengths, pad_left in (((min(longest, 64), 1, 9, 2), False), ((4,), False), ((3, 11), True)):
        batch = examples(model.model.config.vocab_size, lengths, pad_left)
        if kind == "torch":
            found = torch.export.load(path).module()(**batch)
        else:
            from onnxruntime import InferenceSession

            found = InferenceSession(path).run(["logits"], {name: value.numpy() for name, value in batch.items()})[0]
        differences.append(np.abs(np.asarray(found) - model(**batch).numpy()).max())
    return float(max(differences))


def settings(config: GemmaEncoderConfig, tokenizer: PreTrainedTokenizerBase) -> dict:
    """
    Return how texts are read and what the outputs mean, for a program that has no config.

    A classifier has `id2label`, and a regressor has `numbers`, the names of its outputs.
    """
    ranks = GemmaEncoderForRanking.__name__ in config.architectures
    problem = "ranking" if ranks else config.problem_type or ("regression" if config.num_labels == 1 else None)
    return {
        "problem_type": problem or "single_label_classification",
        "id2label": None if problem in ("ranking", "regression") else config.id2label,
        "numbers": list(config.id2label.values()) if problem == "regression" else None,
        "max_length": min(tokenizer.model_max_length, config.max_position_embeddings),
        "truncation": "only_second" if ranks else "longest_first",
        "pad_token_id": tokenizer.pad_token_id,
    }


@interruptible()
def main():
    parser = ScriptParser(ExportArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]
    with failing(parser):
        args.validate()
        model = load(args.model)

    # 1. Export into a folder beside the output, which appears when it is complete.
    folder, name = Path(args.output), FILES[args.format]
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    export(model, part / name, args.format, args.max_batch)

    # 2. Compare with the model.
    if (worst := difference(model, part / name, args.format)) > TOLERANCE:
        raise SystemExit(f"The exported model differs from the model by {worst:.1e} in a logit; it is left in {part}.")

    # 3. Add what reads texts, without truncation: settings.json says how to cut them.
    tokenizer = load_tokenizer(args.model)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(part)
    write(part / "settings.json", json.dumps(settings(model.model.config, tokenizer), indent=2, ensure_ascii=False))
    part.replace(folder)
    sizes = ", ".join(f"{f.name} of {f.stat().st_size / 1e6:.1f} MB" for f in sorted(folder.glob(f"{name}*")))
    print(f"{folder}: {sizes}, scores differ by {worst:.0e} at most")


if __name__ == "__main__":
    main()
