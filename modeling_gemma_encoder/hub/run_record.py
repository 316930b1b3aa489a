"""Read what a training run left in its folder: its settings, its command and its measurements, as a
card shows them.

`run.json`, `training.json` and `results.json` are written by the scripts that train and evaluate.
Tables are Markdown.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult

from .._scripts.files import read
from .._scripts.provenance import describe_rows, masked, own_name

# The Hub's names of metrics, where they differ from the names in `results.json`.
HUB_METRICS = {"nDCG@10": "ndcg_at_10", "RR@10": "mrr_at_10", "AP": "map", "R@100": "recall_at_100"}
RERANKED = {
    "judged pool": "the judged pool",
    "bm25": "BM25's ranking of the whole collection",
    "its own": "the candidates that come with the data set",
}


@dataclass
class RunRecord:
    """Hold what is known of a model's training and measurements."""

    command: str | None = None
    training: list[tuple[str, str]] = field(default_factory=list)  # rows of a table
    results: list[str] = field(default_factory=list)  # Markdown tables
    scores: list[EvalResult] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    of_pairs: bool = False  # whether the model was trained on pairs of texts
    kind: str = "text-classification"  # task of `scores`, unless they measure a ranking


@dataclass(frozen=True)
class Split:
    """Hold the scores of one split of a task, and where its rows come from."""

    task: str
    name: str
    scores: dict[str, float]
    majority: dict[str, float]  # scores of the constant guess
    source: dict[str, str] | None
    num_rows: int | None

    @property
    def title(self) -> str:
        """Return the first cell of the split's table."""
        of = f"{self.name}: {describe_rows(self.source)}" if self.source else f"{self.task}, {self.name}"
        rows = f", {self.num_rows:,} rows" if self.num_rows else ""
        return f"{of}{rows}, x 100"

    def eval_results(self, kind: str) -> list[EvalResult]:
        """Return the scores as the metadata of a card has them."""
        source = self.source or {"data": self.task}
        split = self.name if "part" in source else source.get("split", self.name)
        data = source["data"], describe_rows(source)
        return [EvalResult(kind, *data, metric, value, dataset_split=split) for metric, value in self.scores.items()]


def read_run_record(folder: Path) -> RunRecord:
    """Read what `glue.py`, `superglue.py`, `classify.py`, `msmarco.py` and `uptrain.py` leave in a
    run's folder."""
    began, found = read(folder / "run.json"), read(folder / "results.json")
    trained = {**read(folder / "training.json"), **found}
    command = trained.get("command")
    record = RunRecord(
        command=command and masked(command),
        training=_training_rows(began, trained),
        of_pairs=len(began.get("texts", [])) > 1,
    )
    if began.get("problem") == "regression":
        record.kind = "text-regression"
    _add_tasks(record, found, _read_summary(folder))
    _add_uptraining(record, found.get("masked_perplexity", {}))
    for path in sorted(folder.glob("*/results.json")):
        add_ranking(record, Path(path.parent.name).stem, read(path))
    return record


def _training_rows(began: dict, trained: dict) -> list[tuple[str, str]]:
    """Return the rows of a card's table of training, without those of which the run says nothing."""
    known = {**trained, **began}
    texts = began.get("train_data") or began.get("text") or []
    last_step = max((entry["step"] for entry in trained.get("history", [])), default=None)
    recipe = {
        "data": began.get("task") or ", ".join(map(own_name, texts)),
        "objective": began.get("objective"),
        "hidden tokens": began.get("mask_rate"),
        "learning rate": known.get("learning_rate"),
        "schedule": began.get("lr_scheduler_type"),
        "batch": began.get("batch_size"),
        "steps": trained.get("steps") or last_step,
        "trained on texts of up to": began.get("max_length") and f"{began['max_length']} tokens",
        # Every run has the flag; only a run over lists of documents uses it.
        "ranking loss": began.get("train_data") and began.get("ranking_loss"),
        "list size": began.get("list_size"),
        "precision": {True: "bf16 autocast", False: "fp32"}.get(known.get("bf16")),
        "adapter rank": began.get("lora_r"),
        "seed": began.get("seed"),
        "training rows": (trained.get("rows") or {}).get("train"),
        "tokens": trained.get("tokens"),
        "hardware": trained.get("hardware"),
    }
    return [(name, str(value)) for name, value in recipe.items() if value not in (None, "")]


def _read_summary(folder: Path) -> list[dict]:
    """Return the means over seeds that stand above a run's folder: one level up of `classify.py`,
    two of `glue.py`."""
    roots = folder.parent, folder.parent.parent
    summaries = [read(root / "results.json").get("summary") for root in roots]
    return next(filter(None, summaries), [])


def _add_tasks(record: RunRecord, found: dict, summary: list[dict]) -> None:
    """Add a table and the scores of every split that `results.json` has."""
    for name, scores in found.get("scores", {}).items():
        split = Split(
            task=found["task"],
            name=name,
            scores=scores,
            majority=found.get("majority", {}).get(name, {}),
            source=found.get("sources", {}).get(name),
            num_rows=found.get("rows", {}).get(name),
        )
        seeds = {row["metric"]: row for row in summary if (row["task"], row["split"]) == (split.task, name)}
        record.results.append(_split_table(split, seeds, record.kind))
        record.scores += split.eval_results(record.kind)


def _split_table(split: Split, seeds: dict[str, dict], kind: str) -> str:
    """Return a table of the split's metrics: this model, the mean over seeds, the constant guess."""
    guess = "training mean" if kind == "text-regression" else "most frequent answer"
    columns = {
        "this model": [_percent(value) for value in split.scores.values()],
        "the same recipe": [_over_seeds(seeds.get(metric)) for metric in split.scores],
        guess: [_percent(split.majority.get(metric)) for metric in split.scores],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    metrics = [name.replace("_", " ") for name in split.scores]
    rows = [[name, *cells] for name, *cells in zip(metrics, *columns.values(), strict=True)]
    return _table([split.title, *columns], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; all columns but the first hold numbers and are aligned to the right."""
    line = "| --- |" + " ---: |" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows)])


def _over_seeds(row: dict | None) -> str:
    """Return mean and deviation over seeds, or nothing where there was one seed."""
    if row is None or len(row["seeds"]) < 2:
        return ""
    return f"{100 * row['mean']:.1f} ± {100 * row['deviation']:.1f}, seeds {', '.join(map(str, row['seeds']))}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _add_uptraining(record: RunRecord, perplexities: dict[str, dict[str, float]]) -> None:
    """Add a table of the perplexity of hidden tokens before and after up-training."""
    rows = [[name, f"{found['before']:.1f}", f"{found['after']:.1f}"] for name, found in perplexities.items()]
    if rows:
        record.results.append(_table(["perplexity of hidden tokens, held-out text", "before", "after"], rows))


def add_ranking(record: RunRecord, name: str, found: dict) -> None:
    """Add the `results.json` that `msmarco.py` or `evaluate_ranking.py` left of the collection
    `name`."""
    if "means" not in found:
        return
    measures = list(next(iter(found["means"].values())))
    gains = found.get("gains", {})
    title = f"{name}, {found['queries']} queries, x 100" if "queries" in found else f"{name}, x 100"
    heads = [f"{measure} ({gains[measure]} gain)" if measure in gains else measure for measure in measures]
    rows = [
        [ranker, *(f"{100 * means[measure]:.1f}" for measure in measures)] for ranker, means in found["means"].items()
    ]
    record.results.append("\n\n".join([_table([title, *heads], rows), *_ranking_remarks(found)]))
    ours = found["means"].get("Gemma Encoder", {})
    record.scores += [
        EvalResult("text-ranking", name, name, HUB_METRICS.get(measure, measure), value, metric_name=measure)
        for measure, value in ours.items()
    ]


def _ranking_remarks(found: dict) -> Iterator[str]:
    """Yield the sentences below a table of rankings: what was reranked, and what the numbers cannot
    show."""
    if "run" in found:
        yield f"Reranked: {_what_was_reranked(found)}."
    if warning := found.get("pool", {}).get("warning"):
        yield f"No finding: {warning}."
    elif any(difference.get("too_few") for difference in found.get("compared", {}).values()):
        yield f"{found['queries']} queries are too few for more than these means."
    if seen := found.get("queries_trained_on"):
        yield f"{seen} of these {found['queries']} queries were also trained on, so this says little of new ones."


def _what_was_reranked(found: dict) -> str:
    """Return whose candidates an evaluation reranked, and how many of them are relevant."""
    what = RERANKED.get(found["run"]) or f"the run file `{Path(found['run']).name}`"
    if depth := found.get("depth"):
        what += f", the {depth} best of each query"
    if not (pool := found.get("pool")):
        return what
    level = pool.get("relevance_level", 1)
    share = f"{pool['relevant_share']:.1%}" + (f", from grade {level} on" if level != 1 else "")
    return f"{what}; {pool['candidates']:,} passages, {pool['relevant']:,} of them relevant ({share})"
