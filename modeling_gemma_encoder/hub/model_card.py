"""Write a model's card: what the model is, its measurements and training, how to load it, and the
Hub's metadata."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from .._scripts.files import is_local
from ..configuration_gemma_encoder import GemmaEncoderConfig
from .licenses import GEMMA_NOTICE, origin_of
from .run_record import RunRecord
from .usage import Usage

PIPELINES = {
    "GemmaEncoderForRanking": "text-ranking",
    "GemmaEncoderForSequenceClassification": "text-classification",
    "GemmaEncoderForMaskedLM": "fill-mask",
    "GemmaEncoderModel": "feature-extraction",
}
KINDS = {
    "GemmaEncoderForRanking": "a reranker: a query and a document in, a score out",
    "GemmaEncoderForSequenceClassification": "a classifier",
    "GemmaEncoderForMaskedLM": "a masked language model on plain text, to be fine-tuned",
    "GemmaEncoderModel": "an encoder without a task",
}
REGRESSOR = "a regressor: a text in, a number out"
OLDEST_TRANSFORMERS = "5.20"  # that loads a checkpoint
LIMITS = (
    "It has the biases of its decoder and of its training data, which nobody filtered for this. It was measured on the "
    "data above and on nothing else: not on other languages, domains or lengths, not for fairness, not against "
    "adversaries. Do not let it decide about people."
)


@dataclass(frozen=True)
class CardRequest:
    """Hold what the person who publishes a model gives for its card."""

    template: Path  # Jinja
    repo_id: str
    run: RunRecord
    language: list[str] | None = None
    limits: str | None = None  # besides what holds for all models


@dataclass(frozen=True)
class ModelFacts:
    """Hold what a card says of the model itself."""

    config: GemmaEncoderConfig
    tokenizer: PreTrainedTokenizerBase
    base: str | None  # the checkpoint that was trained further; None where it has no name
    license: str  # of the weights
    parameters: int
    dtypes: dict[str, int]  # number of tensors of each
    adapter: bool = False

    @property
    def architecture(self) -> str:
        """Return the name of the model's class."""
        return (self.config.architectures or ["GemmaEncoderModel"])[0]

    @property
    def is_regressor(self) -> bool:
        """Return whether the model gives a number for a text; its class is that of classifiers."""
        # One output is a regression, as upstream has it.
        is_number = self.config.problem_type == "regression" or self.config.num_labels == 1
        return self.architecture == "GemmaEncoderForSequenceClassification" and is_number


def make_card(request: CardRequest, model: ModelFacts, revision: str | None = None) -> ModelCard:
    """Fill the template of `request`. The card's snippets pin the commit `revision`."""
    run, regressor = request.run, model.is_regressor
    usage = Usage(request.repo_id, model.architecture, model.adapter, regressor, run.of_pairs)
    kind = REGRESSOR if regressor else KINDS[model.architecture]
    return ModelCard.from_template(
        _metadata(request, model),
        template_path=str(request.template),
        name=_short_name(request.repo_id),
        what=f"{_describe_base(model.base)} as a bidirectional encoder "
        f"([Gemma Encoder](https://arxiv.org/abs/2503.02656)), trained as {kind}.",
        results="\n\n".join(run.results),
        usage=usage.snippet(revision),
        repo_id=request.repo_id,
        revision=revision,
        adapter=model.adapter,
        transformers=OLDEST_TRANSFORMERS,
        facts=_facts_table(model),
        command=run.command,
        training=_table(run.training) if run.training else "Nothing was left beside the model that says how.",
        limits="\n\n".join(filter(None, [request.limits, LIMITS])),
        license_text=_describe_license(model.license),
    )


def _short_name(repo_id: str) -> str:
    return repo_id.rpartition("/")[2]


def _metadata(request: CardRequest, model: ModelFacts) -> ModelCardData:
    """Return the card's YAML header, by which the Hub lists and filters models."""
    run, origin = request.run, origin_of(model.base)
    tags = ["gemma-encoder"]
    if "Ranking" in model.architecture:
        tags += ["sentence-transformers", "reranker"]
    if model.is_regressor:
        tags.append("regression")
    relation = "adapter" if model.adapter else "finetune"
    return ModelCardData(
        language=request.language,
        license=model.license,
        library_name="transformers",
        # The Hub has no pipeline for regressors, and a widget for classifiers would show their
        # number as a label.
        pipeline_tag=None if model.is_regressor else PIPELINES[model.architecture],
        base_model=origin,
        base_model_relation=None if origin is None else relation,
        datasets=run.datasets or None,
        metrics=sorted({score.metric_type for score in run.scores}) or None,
        tags=tags,
        model_name=_short_name(request.repo_id),
        eval_results=run.scores or None,
    )


def _describe_base(base: str | None) -> str:
    """Return what the model was made of: a repository, a local checkpoint of one, or a decoder
    without a name."""
    origin = origin_of(base)
    if base is None or origin == base or not is_local(base):
        return origin or "A decoder"
    local = f"local checkpoint `{Path(base).name}`"
    return f"{origin}, by way of the {local}," if origin else f"The {local}"


def _describe_license(license: str) -> str:
    """Return the sentences on the licenses of weights and code."""
    weights = f"Weights: {license}."
    if license == "gemma":
        weights = f"Weights: {GEMMA_NOTICE}. What was changed is in `NOTICE`."
    return f"{weights} Code (`*.py`): Apache-2.0, in `LICENSE`."


def _facts_table(model: ModelFacts) -> str:
    """Return a table of the decoder, the weights, and how texts are read."""
    config, tokenizer = model.config, model.tokenizer
    layers = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    text = tokenizer.decode(tokenizer("{first}")["input_ids"])
    pair = tokenizer.decode(tokenizer("{first}", "{second}")["input_ids"])
    rows = {
        "decoder": f"{config.text_config.model_type}, {layers}",
        "parameters": f"{model.parameters:,}",
        "weights": ", ".join(model.dtypes).replace("F32", "fp32").replace("BF16", "bf16"),
        "attention": config.attention + (f", radius {config.attention_window}" if config.attention_window else ""),
        "pooling": config.pooling,
        "a text": f"`{text}`",
        "a pair": f"`{pair}`".replace("\n", "\\n"),  # a line break would end the row
        "longest text": f"{min(tokenizer.model_max_length, config.max_position_embeddings):,} tokens",
    }
    if "Classification" in model.architecture:
        rows["number" if model.is_regressor else "labels"] = ", ".join(map(str, config.id2label.values()))
    return _table(rows.items())


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a Markdown table without a head, of pairs of a name and a value."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
