"""Fine-tunes a Gemma Encoder on real text in a few minutes on a CPU, without downloading a model or data.

    python examples/demo.py                                  # the same as `make demo`
    python examples/demo.py --model google/gemma-3-270m      # the same as `make demo MODEL=...`
    python examples/demo.py --max_steps 50 --attention causal --pooling last_k

The text is documentation that is already on this machine: the docstrings of the Python standard library and of seven
installed packages. The task is to tell which of the eight a passage documents, with their names blanked out; files are
either for training or for testing. Every flag of `TrainingArguments` works too; `--max_steps -1` counts epochs.
"""

import ast
import json
import random
import re
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import transformers
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    Gemma2Config,
    GemmaTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification, verify_attention

LIBRARIES = ("python", "torch", "transformers", "numpy", "pandas", "scipy", "sklearn", "matplotlib")
NAMES = re.compile(
    r"(?i)(py)?torch|transformers|hugging ?face|numpy|pandas|scipy|scikit-learn|sklearn|matplotlib|python"
)
VOCABULARY, MAX_LENGTH = 8192, 96


@dataclass
class DemoArguments:
    model: str | None = field(
        default=None, metadata={"help": "A Gemma checkpoint. Default: a nano Gemma 2, made here."}
    )
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    pooling: Literal["mean", "first_k", "last_k", "query_probe", "kv_probe"] = "mean"
    passages: int = field(default=2000, metadata={"help": "Passages of each library, at most; about a tenth to test."})


def docstrings(library: str, limit: int) -> list[tuple[str, bool]]:
    """Documentation of a library's functions and classes, and whether it is of a file for testing."""
    paths = sysconfig.get_paths()
    root = Path(paths["stdlib"]) if library == "python" else Path(paths["purelib"]) / library
    skipped = {"site-packages", "tests", "test"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    random.Random(0).shuffle(files)
    found = {}
    for path in files:
        for_testing = len(found) < limit // 10  # as many of every library
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # some files are there to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= 80:
                    found.setdefault(NAMES.sub("_", text), for_testing)
        if len(found) >= limit:
            break
    return list(found.items())[:limit]


def read_passages(limit: int) -> dict[str, Dataset]:
    rows = {"train": {}, "test": {}}
    for label, library in enumerate(LIBRARIES):
        for text, for_testing in docstrings(library, limit):
            rows["test" if for_testing else "train"].setdefault(text, label)
    rows["train"] = {text: label for text, label in rows["train"].items() if text not in rows["test"]}
    return {
        split: Dataset.from_dict({"text": list(labels), "label": list(labels.values())})
        for split, labels in rows.items()
    }


def make_nano_decoder(texts: list[str], folder: Path) -> None:
    """A Gemma tokenizer trained on the texts and a random Gemma 2 of two million parameters, as a checkpoint."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    words.normalizer = normalizers.Replace(" ", "▁")
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # Gemma's merges stay within words
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    trained = json.loads(words.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = GemmaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# What someone who downloads the checkpoint does: a fresh process, the Auto class, remote code, no package of ours.
RELOAD = """
import json, sys, torch
sys.modules["modeling_gemma_encoder"] = None  # not to be had
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
inputs = tokenizer(json.loads(sys.argv[2]), **json.loads(sys.argv[3]), return_tensors="pt")
with torch.no_grad():
    print(json.dumps(model(**inputs).logits.tolist()))
"""


def main():
    demo, _ = HfArgumentParser(DemoArguments).parse_args_into_dataclasses(return_remaining_strings=True)
    parser = HfArgumentParser((DemoArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="demo_output",
        max_steps=360,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=2e-5 if demo.model else 2e-3,  # our choice; random weights want a hundred times more
        lr_scheduler_type="linear",
        warmup_steps=36,
        weight_decay=0.01,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    demo, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    started = time.time()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    print("1. Reading documentation on this machine")
    data = read_passages(demo.passages)
    print(f"   {len(data['train']):,} passages to learn from, {len(data['test']):,} of other files to be tested on")

    checkpoint = demo.model
    if checkpoint is None:
        print("2. Training a tokenizer and making a nano Gemma 2 decoder (random weights)")
        checkpoint = folder / "decoder"
        make_nano_decoder(data["train"]["text"], checkpoint)
    else:
        print(f"2. Starting from {checkpoint}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenized = {
        name: rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH), batched=True)
        for name, rows in data.items()
    }

    print(f"3. Adapting the decoder: {demo.attention} attention, {demo.pooling} pooling, a head, dropout")
    model = GemmaEncoderForSequenceClassification.from_pretrained(
        checkpoint,
        attention=demo.attention,
        pooling=demo.pooling,
        id2label=dict(enumerate(LIBRARIES)),
        label2id={library: label for label, library in enumerate(LIBRARIES)},
        dtype=torch.float32,
    )
    verify_attention(model)

    print("4. Fine-tuning with the stock Trainer")
    trainer = Trainer(
        model,
        args,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda output: {"accuracy": np.mean(output.predictions.argmax(-1) == output.label_ids)},
    )
    trainer.train()
    output = trainer.predict(tokenized["test"])
    verify_attention(model)

    print("5. Saving, and loading again as a stranger would: a fresh process, AutoModel, no package of ours")
    trainer.save_model(folder / "encoder")
    texts = data["test"]["text"][:16]
    form = {"padding": True, "truncation": True, "max_length": MAX_LENGTH}
    command = [sys.executable, "-c", RELOAD, str(folder / "encoder"), json.dumps(texts), json.dumps(form)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    reloaded = json.loads(printed.splitlines()[-1])
    inputs = tokenizer(texts, **form, return_tensors="pt").to(model.device)
    with torch.no_grad():
        difference = (model.eval()(**inputs).logits.cpu() - torch.tensor(reloaded)).abs().max().item()
    if difference > 1e-4:
        raise SystemExit(f"The reloaded model scores differently, by {difference:.1e}")

    print("6. Comparing with simple baselines")
    train_labels, test_labels = np.array(data["train"]["label"]), np.array(data["test"]["label"])
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2)
    linear = LogisticRegression(C=10, max_iter=1000).fit(tfidf.fit_transform(data["train"]["text"]), train_labels)
    results = {
        "most frequent library": float(np.mean(test_labels == np.bincount(train_labels).argmax())),
        "TF-IDF + logistic regression": float(linear.score(tfidf.transform(data["test"]["text"]), test_labels)),
        f"Gemma Encoder ({demo.attention}, {demo.pooling})": output.metrics["test_accuracy"],
    }
    print(f"\n| held-out accuracy, {len(test_labels):,} passages | |\n| --- | --- |")
    for name, accuracy in results.items():
        print(f"| {name} | {accuracy:.1%} |")
    seconds = time.time() - started
    print(f"\nLargest difference of a score after reloading: {difference:.1g}. Everything took {seconds:.0f} s.")

    report = {"accuracy": results, "reload_difference": difference, "seconds": seconds, "seed": args.seed}
    report |= {
        "checkpoint": str(demo.model or "nano Gemma 2"),
        "passages": {split: len(rows) for split, rows in data.items()},
    }
    report |= {"attention": demo.attention, "pooling": demo.pooling, "steps": trainer.state.global_step}
    report |= {"learning_rate": args.learning_rate, "batch_size": args.per_device_train_batch_size}
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(trainer.state.log_history, output.label_ids, output.predictions.argmax(-1), folder / "results.png")
    print(f"Plot: {folder}/results.png   Numbers: {folder}/results.json   Model: {folder}/encoder")


def plot(history: list[dict], labels: np.ndarray, predictions: np.ndarray, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    left.plot(*zip(*points, strict=True), marker=".")
    left.set(xlabel="step", ylabel="training loss", title="Fine-tuning", ylim=(0, None))
    ConfusionMatrixDisplay.from_predictions(
        labels,
        predictions,
        labels=range(len(LIBRARIES)),
        display_labels=LIBRARIES,
        normalize="true",
        values_format=".0%",
        cmap="Blues",
        xticks_rotation=45,
        colorbar=False,
        im_kw={"vmin": 0, "vmax": 1},
        ax=right,
    )
    accuracy = np.mean(labels == predictions)
    right.set(xlabel="predicted", ylabel="documented", title=f"{len(labels):,} held-out passages: {accuracy:.1%} right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
