"""Fine-tune Gemma Encoders on real text in a few minutes on a CPU, without downloading a model or
data.

    python examples/demo.py                                  # the same as `make demo`
    python examples/demo.py --model gemma-3-270m             # the same as `make demo MODEL=...`, after `make gemma`
    python examples/demo.py --tasks classify --max_steps 50 --attention causal --pooling last_k

The text is documentation that is already on this machine: the docstrings of the Python standard
library and of seven installed packages, their names blanked out. Two tasks: tell which of the eight
a passage documents (classification), and find the passage that belongs to a summary line among
look-alikes (ranking). Files are either for training or for testing, and the nano decoder, from
which both start, has not read those for testing either. TF-IDF and BM25, which the encoder is
compared with, read the same passages, cut to the same tokens. A larger decoder reads fewer and
shorter ones (`SIZES`), and finds how a passage goes on, with causal attention, which takes fewer
lists to learn. Every flag of `TrainingArguments` works.
"""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import bm25s
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from transformers import (
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification, verify_attention
from modeling_gemma_encoder._scripts.command_line import ScriptParser, failing, interruptible
from modeling_gemma_encoder.checkpoints import load_tokenizer, parameters_of
from modeling_gemma_encoder.configuration_gemma_encoder import Attention, Pooling
from modeling_gemma_encoder.finetuning.model import freeze_embeddings, refuse_smoothing
from modeling_gemma_encoder.pretraining.corpus import docstrings
from modeling_gemma_encoder.ranking.data import RankingCollator
from modeling_gemma_encoder.ranking.scoring import choose
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template

NANO = Path(__file__).parent / "nano"
LIBRARIES = ("python", "torch", "transformers", "numpy", "pandas", "scipy", "sklearn", "matplotlib")
NAMES = re.compile(
    r"(?i)(py)?torch|transformers|hugging ?face|numpy|pandas|scipy|scikit-learn|sklearn|matplotlib|python"
)


@dataclass(frozen=True)
class Size:
    """Hold how much a demo of a few minutes reads, and how; our choice."""

    parameters: float  # of the decoders that it is for, at most
    passage: int  # tokens that are read
    query: int
    document: int
    pairs: Literal["summaries", "continuations"]  # what a query and its right document are
    passages: int  # of each library
    rows: int | None  # of those to learn from, how many classification does; None: all
    train_lists: tuple[int, int]  # ranking lists, and documents of each, one of them right
    test_lists: tuple[int, int]
    rank_attention: Attention  # unless --attention says it
    dropout: float  # on attention weights and feed-forward outputs
    freeze_embeddings: bool
    bf16: bool  # where the device has instructions for it
    training: dict  # defaults of `TrainingArguments`
    ranking: dict  # what ranking has instead


SIZES = (
    Size(
        parameters=100e6,
        passage=64,
        query=20,
        document=40,
        pairs="summaries",
        passages=2000,
        rows=None,
        train_lists=(2000, 8),
        test_lists=(200, 10),
        rank_attention="bidirectional",
        dropout=0.1,
        freeze_embeddings=False,
        bf16=False,
        training={"max_steps": 100, "per_device_train_batch_size": 32, "learning_rate": 5e-4},
        ranking={"max_steps": 40, "per_device_train_batch_size": 8},
    ),
    Size(
        parameters=math.inf,
        passage=32,
        query=20,
        document=20,
        pairs="continuations",
        passages=1000,
        rows=1024,
        train_lists=(288, 4),
        test_lists=(100, 10),
        rank_attention="causal",
        dropout=0.0,
        freeze_embeddings=True,
        bf16=True,
        training={"max_steps": 32, "per_device_train_batch_size": 32, "learning_rate": 1e-4},
        ranking={"max_steps": 72, "per_device_train_batch_size": 4, "logging_steps": 6},
    ),
)


@dataclass
class DemoArguments:
    model: str = field(default=str(NANO), metadata={"help": "A Gemma checkpoint."})
    tasks: list[str] = field(default_factory=lambda: ["classify", "rank"], metadata={"help": "classify, rank or both."})
    attention: Attention | None = field(
        default=None, metadata={"help": "Default: bidirectional, but a larger decoder ranks with causal attention."}
    )
    pooling: Pooling = "mean"
    passages: int | None = field(
        default=None,
        metadata={"help": "Passages of each library, at most; about a tenth to test. Default: by the decoder's size."},
    )
    ranking_steps: int | None = field(
        default=None, metadata={"help": "As --max_steps, which is classification's. Default: by the decoder's size."}
    )

    def attention_of(self, task: str) -> Attention:
        return self.attention or (self.size.rank_attention if task == "rank" else "bidirectional")

    @property
    def size(self) -> Size:
        return next(size for size in SIZES if parameters_of(self.model) <= size.parameters)


# 1. Data


def read_passages(limit: int) -> dict[str, dict[str, int]]:
    """Return split -> passage -> number of its library. An empty line separates paragraphs."""
    splits = {"train": {}, "test": {}}
    room = {"train": limit - limit // 10, "test": limit // 10}
    for label, library in enumerate(LIBRARIES):
        found = {"train": {}, "test": {}}
        for docstring in docstrings(library):
            split = "test" if docstring.held_out else "train"
            if len(found[split]) < room[split]:
                found[split].setdefault(NAMES.sub("_", docstring.text), label)
            if all(len(found[split]) >= room[split] for split in room):
                break
        for split, texts in found.items():
            splits[split] = {**texts, **splits[split]}
    splits["train"] = {text: label for text, label in splits["train"].items() if text not in splits["test"]}
    return splits


def cut(texts: Iterable[str], tokenizer, length: int) -> list[str]:
    """Return the first tokens of texts as text, so that all methods read the same."""
    texts = [" ".join(text.split()) for text in texts]
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
    return [text.strip() for text in tokenizer.batch_decode(ids)]


def summaries(passages: Iterable[str], tokenizer, form: Size) -> dict[str, str]:
    """Return passage without its summary line -> that line, each cut to its first tokens."""
    parts = [text.partition("\n\n") for text in passages]
    parts = [(summary, " ".join(rest.split())) for summary, _, rest in parts if len(summary) >= 20 and len(rest) >= 80]
    queries = cut([summary for summary, _ in parts], tokenizer, form.query)
    return dict(zip(cut([rest for _, rest in parts], tokenizer, form.document), queries, strict=True))


def continuations(passages: Iterable[str], tokenizer, form: Size) -> dict[str, str]:
    """Return how a passage goes on -> its first tokens. It is cut at a space, which stays with what
    follows."""
    texts = [" ".join(text.split()) for text in passages]
    queries = [begin.rpartition(" ")[0] for begin in cut(texts, tokenizer, form.query)]
    parts = zip(queries, texts, strict=True)
    parts = [(query, text[len(query) :].strip()) for query, text in parts if query and text.startswith(query)]
    documents = cut([rest for _, rest in parts], tokenizer, form.document)
    found = zip(documents, parts, strict=True)
    return {f" {document}": query for document, (query, rest) in found if len(rest) > len(document)}  # of full length


PAIRS = {"summaries": summaries, "continuations": continuations}
TEMPLATES = {"summaries": RANKING_TEMPLATE, "continuations": "{first}{second}"}


def make_lists(
    passages: dict[str, int], tokenizer, form: Size, how_many: tuple[int, int], seed: int
) -> tuple[Dataset, np.ndarray]:
    """Make ranking lists: a query, its right document, and the documents of highest BM25 score for
    it, see `PAIRS`.

    Documents that are the same once they are cut are one, so that BM25 and the encoder see the same
    text and every list has one right document. Where BM25 alone would not have found it, it is
    there all the same. Returns the lists, the right document first in each, and BM25's scores,
    (num_lists, size).
    """
    limit, size = how_many
    pairs = PAIRS[form.pairs](passages, tokenizer, form)
    documents, queries = list(pairs), list(pairs.values())
    words = {"stopwords": None, "show_progress": False}
    bm25 = bm25s.BM25()
    bm25.index(bm25s.tokenize(documents, **words), show_progress=False)
    rows, scores = [], []
    for number in np.random.default_rng(seed).permutation(len(pairs))[:limit]:
        found = bm25.get_scores(bm25s.tokenize(queries[number], return_ids=False, **words)[0])
        alike = [other for other in np.argsort(-found, kind="stable")[: size + 1] if other != number]
        chosen = [number, *alike[: size - 1]]
        labels = [1] + [0] * (len(chosen) - 1)
        rows.append({"query": queries[number], "documents": [documents[i] for i in chosen], "labels": labels})
        scores.append(found[chosen])
    return Dataset.from_list(rows), np.array(scores)


# 2. Fine-tuning


def load(demo: DemoArguments, task: str, model_class: type, **options):
    """Return the decoder with a fresh head."""
    rate, frozen = demo.size.dropout, demo.size.freeze_embeddings
    options |= {"attention_dropout": rate, "feedforward_dropout": rate, "dtype": torch.float32}
    model = model_class.from_pretrained(demo.model, attention=demo.attention_of(task), pooling=demo.pooling, **options)
    if frozen:
        freeze_embeddings(model)
    verify_attention(model)
    return model


def rows_to_classify(demo: DemoArguments, seed: int, tokenizer, passages: dict) -> dict[str, Dataset]:
    """Return split -> passages, cut to the same tokens for all that read them, and the numbers of
    their libraries."""
    data = {
        split: Dataset.from_dict({"text": cut(texts, tokenizer, demo.size.passage), "label": list(texts.values())})
        for split, texts in passages.items()
    }
    if demo.size.rows:
        data["train"] = data["train"].shuffle(seed=seed).select(range(min(demo.size.rows, len(data["train"]))))
    return data


def classify_without_encoder(data: dict[str, Dataset]) -> dict[str, float]:
    """Return the accuracies of what the encoder is compared with."""
    train_labels, test_labels = np.array(data["train"]["label"]), np.array(data["test"]["label"])
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2)
    linear = LogisticRegression(C=10, max_iter=1000).fit(tfidf.fit_transform(data["train"]["text"]), train_labels)
    return {
        "most frequent library": float(np.mean(test_labels == np.bincount(train_labels).argmax())),
        "TF-IDF + logistic regression": float(linear.score(tfidf.transform(data["test"]["text"]), test_labels)),
    }


def classify(demo: DemoArguments, args: TrainingArguments, tokenizer, passages: dict) -> dict:
    """Fine-tune a classifier of libraries, save it, and return what it reached beside its
    baselines."""
    data = rows_to_classify(demo, args.seed, tokenizer, passages)
    tokenized = {split: rows.map(lambda row: tokenizer(row["text"]), batched=True) for split, rows in data.items()}
    model = load(
        demo,
        "classify",
        GemmaEncoderForSequenceClassification,
        id2label=dict(enumerate(LIBRARIES)),
        label2id={library: label for label, library in enumerate(LIBRARIES)},
    )
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
    folder = Path(args.output_dir) / "classifier"
    trainer.save_model(folder)
    difference = reload(model, tokenizer, data["test"]["text"][:16], folder)
    accuracy = float(output.metrics["test_accuracy"])
    return {
        "title": f"accuracy, {len(data['test']):,} held-out passages",
        "results": {**classify_without_encoder(data), "Gemma Encoder": accuracy},
        "reload_difference": difference,
        "examples": {split: len(rows) for split, rows in data.items()},
        "losses": losses(trainer),
        "labels": (output.label_ids, output.predictions.argmax(-1)),
    }


def rank(demo: DemoArguments, args: TrainingArguments, tokenizer, passages: dict) -> dict:
    """Fine-tune a ranker of passages, save it, and return what it reached beside its baselines."""
    size, of_test = demo.size, demo.size.test_lists[1]
    train, _ = make_lists(passages["train"], tokenizer, size, size.train_lists, args.seed)
    test, bm25_scores = make_lists(passages["test"], tokenizer, size, size.test_lists, args.seed)

    set_template(tokenizer, pair=TEMPLATES[size.pairs])
    model = load(demo, "rank", GemmaEncoderForRanking)
    own = {**size.ranking, **({"max_steps": demo.ranking_steps} if demo.ranking_steps else {})}
    if args.per_device_train_batch_size != size.training["per_device_train_batch_size"]:  # it was given
        own["per_device_train_batch_size"] = max(args.per_device_train_batch_size // 4, 1)
    own["per_device_eval_batch_size"] = max(args.per_device_eval_batch_size // of_test, 1)
    args = replace(args, **own, remove_unused_columns=False, eval_strategy="no")
    trainer = Trainer(
        model, args, train_dataset=train, data_collator=RankingCollator(tokenizer), processing_class=tokenizer
    )
    trainer.train()
    scores = trainer.predict(test).predictions  # (num_lists, num_docs), the right document first
    verify_attention(model)
    trainer.save_model(Path(args.output_dir) / "ranker")
    return {
        "title": f"mean reciprocal rank, {len(test):,} held-out lists of {of_test}",
        "pairs": size.pairs,
        "results": {
            "random order": float(np.mean(1 / np.arange(1, of_test + 1))),
            "BM25": mean_reciprocal_rank(bm25_scores),
            "Gemma Encoder": mean_reciprocal_rank(scores),
        },
        "examples": {"train": len(train), "test": len(test)},
        "losses": losses(trainer),
    }


def mean_reciprocal_rank(scores: np.ndarray) -> float:
    """Return the measure for lists whose first document is the right one; among equal scores it
    counts as the last."""
    ranks = (scores >= scores[:, :1]).sum(1)
    return float(np.mean(1 / ranks))


def losses(trainer: Trainer) -> list[tuple[int, float]]:
    """Return the training losses that were logged, each with its step."""
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


# What someone who downloads the checkpoint does: a fresh process, the Auto class, remote code, no
# package of ours.
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


def reload(model, tokenizer, texts: list[str], folder: Path) -> float:
    """Return the largest difference of a score between the model and its copy, loaded without this
    package."""
    form = {"padding": True}
    command = [sys.executable, "-c", RELOAD, str(folder), json.dumps(texts), json.dumps(form)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    reloaded = torch.tensor(json.loads(printed.splitlines()[-1]))
    model = Accelerator().unwrap_model(model, keep_fp32_wrapper=False)  # not the mixed precision of training
    inputs = tokenizer(texts, **form, return_tensors="pt").to(model.device)
    with torch.no_grad():
        difference = (model.eval()(**inputs).logits.cpu() - reloaded).abs().max().item()
    if difference > 1e-4:
        raise SystemExit(f"The reloaded model's scores differ by {difference:.1e}; at most 1e-4 is allowed.")
    return difference


# 3. Everything


TASKS = {"classify": classify, "rank": rank}


def parse() -> tuple[DemoArguments, TrainingArguments]:
    """Return the flags, whose defaults depend on the size of the decoder."""
    demo, _ = HfArgumentParser(DemoArguments).parse_args_into_dataclasses(return_remaining_strings=True)
    parser = ScriptParser((DemoArguments, TrainingArguments), __doc__)
    with failing(parser):
        size = demo.size
    parser.set_defaults(
        **size.training,
        bf16=size.bf16 and choose("auto", None)[0] == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        output_dir="demo_output",
        per_device_eval_batch_size=64,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    demo, args = parser.parse_args_into_dataclasses()
    if unknown := set(demo.tasks) - set(TASKS):
        parser.error(f"--tasks must be one of {', '.join(TASKS)}; got {', '.join(sorted(unknown))}.")
    with failing(parser):
        refuse_smoothing("choice" if "rank" in demo.tasks else "single_label_classification", args)
    return demo, args


def fine_tune(demo: DemoArguments, args: TrainingArguments) -> dict[str, dict]:
    """Read passages and fine-tune an encoder for each task. Return task -> what it reached."""
    print("Reading documentation on this machine")
    passages = read_passages(demo.passages or demo.size.passages)
    train, test = (len(passages[split]) for split in ("train", "test"))
    print(f"{train:,} passages to learn from, {test:,} of other files to be tested on")
    tokenizer = load_tokenizer(demo.model)
    done = {}
    for task in demo.tasks:
        attention = demo.attention_of(task)
        print(f"\nFine-tuning {Path(demo.model).name} to {task}: {attention} attention, {demo.pooling} pooling")
        set_seed(args.seed)
        done[task] = {**TASKS[task](demo, args, tokenizer, passages), "attention": attention}
    return done


def show(done: dict[str, dict], seconds: float) -> None:
    """Print a table for each task."""
    for outcome in done.values():
        print(f"\n| {outcome['title']} | |\n| --- | ---: |")
        for name, value in outcome["results"].items():
            print(f"| {name} | {value:.1%} |" if "accuracy" in outcome["title"] else f"| {name} | {value:.3f} |")
    if "classify" in done:
        difference = done["classify"]["reload_difference"]
        print(f"\nLoaded again by a process without this package, scores differ by {difference:.0e}.")
    print(f"Everything took {seconds:.0f} s.")


def leave_results(demo: DemoArguments, args: TrainingArguments, done: dict[str, dict], seconds: float) -> None:
    """Draw the plot and write `results.json`."""
    folder = Path(args.output_dir)
    plot(done, folder / "results.png")
    report = {task: {name: v for name, v in outcome.items() if name != "labels"} for task, outcome in done.items()}
    report |= {"checkpoint": demo.model, "pooling": demo.pooling, "seed": args.seed}
    report |= {"learning_rate": args.learning_rate, "batch_size": args.per_device_train_batch_size, "seconds": seconds}
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"Plot: {folder}/results.png   Numbers: {folder}/results.json   Models: {folder}/classifier, {folder}/ranker")


def plot(done: dict, path: Path) -> None:
    """Save a plot with the losses and the results of each task."""
    figure = Figure(figsize=(8 * len(done), 4.5), layout="constrained")
    panels = figure.subplots(1, 2 * len(done))
    for left, right, (task, outcome) in zip(panels[::2], panels[1::2], done.items(), strict=True):
        left.plot(*zip(*outcome["losses"], strict=True), marker=".")
        left.set(xlabel="step", ylabel="training loss", title=f"Fine-tuning: {task}", ylim=(0, None))
        if "labels" in outcome:
            labels, predictions = outcome["labels"]
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
                text_kw={"fontsize": 7},
                ax=right,
            )
            accuracy = outcome["results"]["Gemma Encoder"]
            right.set(xlabel="predicted", ylabel="documented", title=f"{accuracy:.1%} of {len(labels):,} right")
        else:
            bars = right.bar(
                list(outcome["results"]), list(outcome["results"].values()), color=["silver", "gray", "C0"]
            )
            right.bar_label(bars, fmt="%.3f")
            right.set(ylabel="mean reciprocal rank", title=outcome["title"].partition(", ")[2], ylim=(0, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")


@interruptible()
def main():
    demo, args = parse()
    started = time.time()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    done = fine_tune(demo, args)
    seconds = time.time() - started
    show(done, seconds)
    leave_results(demo, args, done, seconds)


if __name__ == "__main__":
    main()
