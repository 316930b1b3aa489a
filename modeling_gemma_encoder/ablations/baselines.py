"""What an encoder is compared with on the same rows: bags of words, the stock causal classifier,
random weights."""

import json
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from .._scripts.files import write
from ..checkpoints import decoder_of, load_upstream
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..finetuning.arguments import FineTuningArguments, encoder_options
from ..finetuning.data import Data
from ..finetuning.model import freeze_embeddings
from ..finetuning.tasks import Task, most_frequent


def head_of(task: Task) -> dict:
    """Return the fields with which upstream's configs describe a task."""
    return {"num_labels": task.outputs, "problem_type": task.problem}


def stock(task: Task, options: FineTuningArguments) -> PreTrainedModel:
    """Make `Gemma*ForSequenceClassification` as it comes: causal attention, last token, no dropout.

    Raises:
        ValueError: The checkpoint is an encoder's, which the stock class does not read.
    """
    if GemmaEncoderConfig.from_pretrained(options.model).architectures:
        raise ValueError(f"The stock classifier needs a decoder's checkpoint; {options.model} is an encoder's.")
    model = load_upstream(AutoModelForSequenceClassification, options.model, torch.float32, **head_of(task))
    model.config.pad_token_id = model.config.pad_token_id or 0
    if options.freeze_embeddings:
        freeze_embeddings(model)
    return model


def scratch(task: Task, options: FineTuningArguments) -> PreTrainedModel:
    """Make the encoder with random weights instead of the decoder's."""
    model = task.head(GemmaEncoderConfig.from_pretrained(options.model, **encoder_options(options), **head_of(task)))
    if options.attn_implementation:
        model.set_attn_implementation(options.attn_implementation)
    return model


def bert(task: Task, options: FineTuningArguments) -> PreTrainedModel:
    """Make a BERT (arXiv 1810.04805) with random weights, the decoder's width and depth, and about
    as many parameters.

    A feed-forward block has two matrices in BERT and three in Gemma, and BERT's attention is as
    wide as its states.
    """
    decoder = GemmaEncoderConfig.from_pretrained(options.model).text_config
    width, layers = decoder.hidden_size, decoder.num_hidden_layers
    wanted = decoder_of(options.model).num_parameters() - decoder.vocab_size * width
    inner = (wanted // layers - 4 * width**2) // (2 * width)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": max(inner, width)}
    shape |= {"num_attention_heads": decoder.num_attention_heads, "vocab_size": decoder.vocab_size}
    shape |= {"max_position_embeddings": decoder.max_position_embeddings, "pad_token_id": decoder.pad_token_id or 0}
    return BertForSequenceClassification(BertConfig(**shape, **head_of(task)))


MAKERS = {"stock": stock, "scratch": scratch, "bert": bert}


def bag_of_words(task: Task, data: Data, folder: Path, name: str, seed: int) -> dict:
    """Train a linear model on TF-IDF of words and pairs of words, and return the run's report, also
    `results.json`.

    It is a logistic or ridge regression with scikit-learn's defaults. Of two texts it reads both
    bags, what they share, and where they differ.
    """

    def texts(rows: Dataset) -> list[tuple[str, str]]:
        read = [task.read(row) for row in rows]
        return [(row["first"], row.get("second") or "") for row in read]

    train = texts(data.train)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit([text for pair in train for text in pair])

    def bags(pairs: list[tuple[str, str]]):
        first, second = (words.transform(side) for side in zip(*pairs, strict=True))
        return scipy.sparse.hstack([first, second, first.multiply(second), abs(first - second)]).tocsr()

    model = Ridge() if task.problem == "regression" else LogisticRegression(max_iter=1000)
    if task.problem == "multi_label_classification":
        model = OneVsRestClassifier(model)
    model.fit(bags(train), data.train["label"])
    report = {"task": name, "seed": seed, "model": "TF-IDF", "scores": {}, "majority": {}}
    for split, rows in data.validation.items():
        predicted = np.asarray(model.predict(bags(texts(rows))))
        write(folder / f"predictions-{split}.json", json.dumps({"predictions": predicted.tolist()}))
        report["scores"][split] = task.metric(predicted, rows)
        report["majority"][split] = task.metric(most_frequent(task, data.train, rows), rows)
    write(folder / "results.json", json.dumps(report, indent=2))
    return report
