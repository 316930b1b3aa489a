"""Model cards: what a run left in its folder, as tables a reader can check, and the Hub's metadata."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from .._scripts.files import is_local, read
from .._scripts.provenance import masked, own_name
from ..configuration_gemma_encoder import GemmaEncoderConfig
from .licenses import GEMMA_NOTICE, origin_of

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
# Metrics as the Hub calls them, where it has another name than we.
METRICS = {"nDCG@10": "ndcg_at_10", "RR@10": "mrr_at_10", "AP": "map", "R@100": "recall_at_100"}
LIMITS = (
    "It has the biases of its decoder and of its training data, which nobody filtered for this. Measured on the data "
    "above and nothing else: not on other languages, domains or lengths, not for fairness, not against adversaries. "
    "Do not let it decide about people."
)


@dataclass
class Run:
    """What is known of a model's training and measurements."""

    command: str | None = None
    training: list[tuple[str, str]] = field(default_factory=list)  # rows of a table
    results: list[str] = field(default_factory=list)  # Markdown tables
    scores: list[EvalResult] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    of_pairs: bool = False  # whether it was trained on pairs of texts
    kind: str = "text-classification"  # of what `scores` measure, where it is no ranking


def read_run(folder: Path) -> Run:
    """From what `glue.py`, `superglue.py`, `classify.py`, `msmarco.py` and `uptrain.py` leave in a run's folder."""
    began, found = read(folder / "run.json"), read(folder / "results.json")
    trained = {**read(folder / "training.json"), **found}
    known = {**trained, **began}
    texts = began.get("train_data") or began.get("text") or []
    command = trained.get("command")
    run = Run(command=command and masked(command), of_pairs=len(began.get("texts", [])) > 1)
    run.kind = "text-regression" if began.get("problem") == "regression" else run.kind
    recipe = {
        "data": began.get("task") or ", ".join(map(own_name, texts)),
        "objective": began.get("objective"),
        "hidden tokens": began.get("mask_rate"),
        "learning rate": known.get("learning_rate"),
        "schedule": began.get("lr_scheduler_type"),
        "batch": began.get("batch_size"),
        "steps": trained.get("steps") or max((entry["step"] for entry in trained.get("history", [])), default=None),
        "trained on texts of up to": began.get("max_length") and f"{began['max_length']} tokens",
        "ranking loss": began.get("train_data") and began.get("ranking_loss"),
        "list size": began.get("list_size"),
        "precision": {True: "bf16 autocast", False: "fp32"}.get(known.get("bf16")),
        "adapter rank": began.get("lora_r"),
        "seed": began.get("seed"),
        "training rows": (trained.get("rows") or {}).get("train"),
        "tokens": trained.get("tokens"),
        "hardware": trained.get("hardware"),
    }
    run.training = [(name, str(value)) for name, value in recipe.items() if value not in (None, "")]
    roots = folder.parent, folder.parent.parent  # of `classify.py`; of `glue.py`, which has a folder a task
    summaries = [read(root / "results.json").get("summary") for root in roots]
    _add_classification(run, found, next(filter(None, summaries), []))
    _add_uptraining(run, found.get("masked_perplexity", {}))
    for path in sorted(folder.glob("*/results.json")):
        add_ranking(run, Path(path.parent.name).stem, read(path))
    return run


def _add_classification(run: Run, found: dict, summary: list[dict]) -> None:
    guess = "training mean" if run.kind == "text-regression" else "most frequent answer"
    for split, scores in found.get("scores", {}).items():
        majority = found.get("majority", {}).get(split, {})
        seeds = {row["metric"]: row for row in summary if (row["task"], row["split"]) == (found["task"], split)}
        columns = {
            "this model": [_percent(value) for value in scores.values()],
            "the same recipe": [_over_seeds(seeds.get(name)) for name in scores],
            guess: [_percent(majority.get(name)) for name in scores],
        }
        columns = {head: cells for head, cells in columns.items() if any(cells)}
        named = [name.replace("_", " ") for name in scores]
        source = found.get("sources", {}).get(split)
        title = f"{split}: {_rows_in_words(source)}" if source else f"{found['task']}, {split}"
        if rows_of := found.get("rows", {}).get(split):
            title += f", {rows_of:,} rows"
        lines = [
            f"| {title}, x 100 | {' | '.join(columns)} |",
            "| --- |" + " ---: |" * len(columns),
            *(f"| {' | '.join(cells)} |" for cells in zip(named, *columns.values(), strict=True)),
        ]
        run.results.append("\n".join(lines))
        source = source or {"data": found["task"]}
        data = source["data"], _rows_in_words(source)
        of_split = split if "part" in source else source.get("split", split)
        run.scores += [
            EvalResult(run.kind, *data, name, value, dataset_split=of_split) for name, value in scores.items()
        ]


def _rows_in_words(source: dict[str, str]) -> str:
    """Return the file or data set that rows are of, and which part of it was held out, as `results.json` has them."""
    data = f"{source['data']}, split {source['split']!r}" if "split" in source else source["data"]
    return f"{source['part']} of {data}, held out" if "part" in source else data


def _add_uptraining(run: Run, perplexities: dict[str, dict[str, float]]) -> None:
    rows = [f"| {name} | {found['before']:.1f} | {found['after']:.1f} |" for name, found in perplexities.items()]
    if rows:
        table = ["| perplexity of hidden tokens, held-out text | before | after |", "| --- | ---: | ---: |", *rows]
        run.results.append("\n".join(table))


def _over_seeds(row: dict | None) -> str:
    if row is None or len(row["seeds"]) < 2:
        return ""
    return f"{100 * row['mean']:.1f} ± {100 * row['deviation']:.1f}, seeds {', '.join(map(str, row['seeds']))}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def add_ranking(run: Run, name: str, found: dict) -> None:
    """Adds what `msmarco.py` and `evaluate_ranking.py` leave in `results.json`, of a collection of this name."""
    if "means" not in found:
        return
    measures = list(next(iter(found["means"].values())))
    rows = [
        f"| {ranker} | {' | '.join(f'{100 * means[measure]:.1f}' for measure in measures)} |"
        for ranker, means in found["means"].items()
    ]
    title = f"{name}, {found['queries']} queries, x 100" if "queries" in found else f"{name}, x 100"
    gains = found.get("gains", {})
    heads = [f"{measure} ({gains[measure]} gain)" if measure in gains else measure for measure in measures]
    table = [f"| {title} | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(measures), *rows]
    if "run" in found:
        table += ["", f"Reranked: {_what_was_reranked(found)}."]
    if warning := found.get("pool", {}).get("warning"):
        table += ["", f"No finding: {warning}."]
    elif any(difference.get("too_few") for difference in found.get("compared", {}).values()):
        table += ["", f"{found['queries']} queries are too few for more than these means."]
    if seen := found.get("queries_trained_on"):
        queries = found["queries"]
        table += ["", f"{seen} of these {queries} queries were also trained on, so this says little of new ones."]
    run.results.append("\n".join(table))
    ours = found["means"].get("Gemma Encoder", {})
    run.scores += [
        EvalResult("text-ranking", name, name, METRICS.get(measure, measure), value, metric_name=measure)
        for measure, value in ours.items()
    ]


RERANKED = {
    "judged pool": "the judged pool",
    "bm25": "BM25's ranking of the whole collection",
    "its own": "the candidates that come with the data set",
}


def _what_was_reranked(found: dict) -> str:
    """Say whose candidates an evaluation reranked, and how many of them are relevant."""
    what = RERANKED.get(found["run"]) or f"the run file `{Path(found['run']).name}`"
    if depth := found.get("depth"):
        what += f", the {depth} best of each query"
    if not (pool := found.get("pool")):
        return what
    level = pool.get("relevance_level", 1)
    share = f"{pool['relevant_share']:.1%}" + (f", from grade {level} on" if level != 1 else "")
    return f"{what}; {pool['candidates']:,} passages, {pool['relevant']:,} of them relevant ({share})"


# Licences


# The card


REGRESSOR = "a regressor: a text in, a number out"


def is_regressor(config: GemmaEncoderConfig) -> bool:
    """Whether a model says a number of a text, and is no classifier, though its class is called so."""
    named = bool(config.architectures) and config.architectures[0] == "GemmaEncoderForSequenceClassification"
    return named and (config.problem_type == "regression" or config.num_labels == 1)


def usage(
    repo_id: str, revision: str | None, architecture: str, adapter: bool, pair: bool, regressor: bool = False
) -> str:
    """A snippet that runs as it is."""
    pinned = f'pinned = {{"revision": "{revision or "<commit>"}", "trust_remote_code": True}}\n'
    name = f'"{repo_id}", **pinned'
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
    if adapter:
        return (
            "from transformers import AutoTokenizer\n\n"
            f"from modeling_gemma_encoder import {architecture}  # pip install the package gemma-encoder\n\n"
            f'pinned = {{"revision": "{revision or "<commit>"}"}}\n{tokenizer}'
            f"model = {architecture}.from_pretrained({name}).eval()"
        )
    classifier = f"model = AutoModelForSequenceClassification.from_pretrained({name}).eval()"
    if architecture == "GemmaEncoderForRanking":
        return (
            "from sentence_transformers import CrossEncoder  # pip install sentence-transformers\n\n"
            f"{pinned}ranker = CrossEncoder({name})\n"
            'ranker.rank("how do cats purr", ["They vibrate their larynx.", "Dogs bark."])\n\n'
            "# or with transformers alone\n"
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
            f"{tokenizer}{classifier}\n"
            'batch = tokenizer(["how do cats purr"], ["They vibrate their larynx."], return_tensors="pt")\n'
            "scores = model(**batch).logits  # higher is more relevant"
        )
    if regressor:
        texts = '["A first text."], ["A second one."]' if pair else '["A text."]'
        return (
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
            f"{pinned}{tokenizer}{classifier}\n"
            f'batch = tokenizer({texts}, truncation=True, return_tensors="pt")\n'
            "numbers = model(**batch).logits  # (texts, numbers of each)"
        )
    if architecture == "GemmaEncoderForSequenceClassification":
        text = '{"text": "A first text.", "text_pair": "A second one."}' if pair else '"A text."'
        return (
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline\n\n"
            f'{pinned}classify = pipeline("text-classification", {name})\n'
            f"classify({text}, truncation=True)\n\n# or\n{tokenizer}{classifier}"
        )
    if architecture == "GemmaEncoderForMaskedLM":
        return (
            "from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer\n\n"
            f"{pinned}{tokenizer}model = AutoModelForMaskedLM.from_pretrained({name}).eval()\n\n"
            f"# to be fine-tuned\nmodel = AutoModelForSequenceClassification.from_pretrained({name}, num_labels=2)"
        )
    return (
        "from transformers import AutoModel, AutoTokenizer\n\n"
        f"{pinned}{tokenizer}model = AutoModel.from_pretrained({name}).eval()"
    )


def how_it_reads(config: GemmaEncoderConfig, tokenizer: PreTrainedTokenizerBase, parameters: int, dtypes: dict) -> str:
    layers = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    rows = {
        "decoder": f"{config.text_config.model_type}, {layers}",
        "parameters": f"{parameters:,}",
        "weights": ", ".join(dtypes).replace("F32", "fp32").replace("BF16", "bf16"),
        "attention": config.attention + (f", radius {config.attention_window}" if config.attention_window else ""),
        "pooling": config.pooling,
        "a text": f"`{tokenizer.decode(tokenizer('{first}')['input_ids'])}`",
        "a pair": f"`{tokenizer.decode(tokenizer('{first}', '{second}')['input_ids'])}`".replace("\n", "\\n"),
        "longest text": f"{min(tokenizer.model_max_length, config.max_position_embeddings):,} tokens",
    }
    if config.architectures and "Classification" in config.architectures[0]:
        rows["number" if is_regressor(config) else "labels"] = ", ".join(map(str, config.id2label.values()))
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def make_card(
    template: Path,
    repo_id: str,
    base: str | None,
    config: GemmaEncoderConfig,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    licence: str,
    parameters: int,
    dtypes: dict[str, int],
    adapter: bool = False,
    revision: str | None = None,
    language: list[str] | None = None,
    limits: str | None = None,
) -> ModelCard:
    """
    The card of a model, from `template` (Jinja).

    Args:
        base: The checkpoint that was trained further; None where it has no name.
        revision: Commit that the snippets pin.
        limits: What to say of limits and biases, besides what holds for all.
    """
    architecture = (config.architectures or ["GemmaEncoderModel"])[0]
    origin = origin_of(base)
    of_base = origin or "A decoder"
    if base is not None and origin != base and is_local(base):
        local = f"local checkpoint `{Path(base).name}`"
        of_base = f"{origin}, by way of the {local}," if origin else f"The {local}"
    tags = ["sentence-transformers", "reranker"] if "Ranking" in architecture else []
    tags += ["regression"] if is_regressor(config) else []
    data = ModelCardData(
        language=language,
        license=licence,
        library_name="transformers",
        pipeline_tag=None if is_regressor(config) else PIPELINES[architecture],
        base_model=origin,
        base_model_relation=None if origin is None else ("adapter" if adapter else "finetune"),
        datasets=run.datasets or None,
        metrics=sorted({score.metric_type for score in run.scores}) or None,
        tags=["gemma-encoder", *tags],
        model_name=repo_id.rpartition("/")[2],
        eval_results=run.scores or None,
    )
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in run.training)]
    of_weights = f"Weights: {licence}."
    if licence == "gemma":
        of_weights = f"Weights: {GEMMA_NOTICE}. What was changed is in `NOTICE`."
    return ModelCard.from_template(
        data,
        template_path=str(template),
        name=repo_id.rpartition("/")[2],
        what=f"{of_base} as a bidirectional encoder ([Gemma Encoder](https://arxiv.org/abs/2503.02656)), trained as "
        f"{REGRESSOR if is_regressor(config) else KINDS[architecture]}.",
        results="\n\n".join(run.results),
        usage=usage(repo_id, revision, architecture, adapter, run.of_pairs, is_regressor(config)),
        repo_id=repo_id,
        revision=revision,
        adapter=adapter,
        transformers="5.20",
        facts=how_it_reads(config, tokenizer, parameters, dtypes),
        command=run.command,
        training="\n".join(table) if run.training else "Nothing was left beside the model that says how.",
        limits="\n\n".join(filter(None, [limits, LIMITS])),
        licence=f"{of_weights} Code (`*.py`): Apache-2.0, in `LICENSE`.",
    )
