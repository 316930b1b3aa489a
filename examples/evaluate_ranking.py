"""Evaluate a reranker on a judged collection, against BM25 and random order.

    # What was judged of a folder, or the hundred best of a run
    python examples/evaluate_ranking.py --model my-ranker --data trec_dl/dl2020 --relevance_level 2
    python examples/evaluate_ranking.py --model my-ranker --data trec_dl/dl2019 --run bm25.run --depth 100

    # A data set on the Hub
    python examples/evaluate_ranking.py --model my-ranker --data sentence-transformers/NanoBEIR-en:NanoMSMARCO

    # Only queries that the training did not see
    python examples/evaluate_ranking.py --model my-ranker --data judged --run bm25 --held_out_of my-ranker

--data is a folder with queries, passages and qrels (see docs/ranking.md), a file of labeled pairs,
or a data set on the Hub with configs `queries`, `corpus` and `qrels` (or `default`), `name:split`
if it has several splits.

The script reranks a run, the 100 best of `--run bm25`, the Hub's own candidates, or else the judged
passages. A judged pool has no passages that nobody looked at, so that its numbers are higher than
those of a run and cannot be compared with them. The relevant share is printed. No difference is
claimed where most of the pool is relevant or random order beats BM25.

BM25 has the statistics of the whole collection. nDCG@10 has linear gain, as in trec_eval; for
exponential gain give `--measures "nDCG(dcg='exp-log2')@10"`. --held_out_of evaluates only the
queries that a training by msmarco.py held out. Equal scores are ordered by the CRC-32 of the
passage's id. Queries without candidates count 0. Queries without a grade above 0, or in a judged
pool without an irrelevant passage, are left out.

The output folder has the rankings in TREC's format, results.json, results.md and per_query.png.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from modeling_gemma_encoder._scripts.command_line import ScriptParser, failing, interruptible
from modeling_gemma_encoder.ranking.bm25 import add_run
from modeling_gemma_encoder.ranking.collection import Collection
from modeling_gemma_encoder.ranking.evaluation import baselines, evaluate
from modeling_gemma_encoder.ranking.measures import MEASURES, parse_measures
from modeling_gemma_encoder.ranking.queries import count_trained_on, only_held_out, say_trained_on
from modeling_gemma_encoder.ranking.reading import read_collection
from modeling_gemma_encoder.ranking.scoring import ScoringArguments, choose, load_ranker, rerank


@dataclass(kw_only=True)
class EvaluationArguments(ScoringArguments):
    """Options of what is evaluated, and how."""

    COUNTS: ClassVar = (*ScoringArguments.COUNTS, "depth")

    data: str = field(metadata={"help": "The judged collection."})
    run: str | None = field(default=None, metadata={"help": "What to rerank: a file in TREC's format, or `bm25`."})
    depth: int | None = field(default=None, metadata={"help": "Rerank only so many of a run's best passages."})
    held_out_of: str | None = field(
        default=None, metadata={"help": "Evaluate only the queries that the training in this folder held out."}
    )
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage", "label"], metadata={"help": "Columns of a file of pairs."}
    )
    relevance_level: int = field(
        default=1,
        metadata={"help": "The least grade that is relevant, in binary measures and in counts; 2 for TREC DL."},
    )
    measures: list[str] = field(
        default_factory=lambda: list(MEASURES), metadata={"help": "Measures, as ir_measures names them."}
    )
    seed: int = field(default=0, metadata={"help": "Of the random order."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: runs/evaluation/<model>-<data>."})

    @property
    def folder(self) -> Path:
        if self.output_dir:
            return Path(self.output_dir)
        return Path(f"runs/evaluation/{Path(self.model).name}-{Path(self.data).name.replace(':', '-')}")


def read_judged(args: EvaluationArguments) -> Collection:
    """Read the queries to evaluate, and the candidates to rerank; raise ValueError if there are
    none."""
    collection = read_collection(args.data, tuple(args.pair_columns))
    collection.relevance_level = args.relevance_level
    if args.held_out_of:
        collection = only_held_out(collection, args.held_out_of, args.data)
    if args.run:
        add_run(collection, args.run, args.depth)
    if args.depth and collection.run is None:
        raise ValueError(f"--depth {args.depth} is of a run; give --run.")
    return collection.without_incomparable(args.data)


@interruptible()
def main():
    parser = ScriptParser(EvaluationArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]

    # 1. Read the collection, and rerank it.
    with failing(parser):
        args.validate()
        measures = parse_measures(args.measures, args.relevance_level)
        collection = read_judged(args)
        args.dtype, args.device = choose(args.dtype, args.device)
        model, tokenizer = load_ranker(args.model, args.dtype, args.device)
        ours = rerank(model, tokenizer, collection, args.depth, args.max_length, args.tokens_per_batch)

    # 2. Compare with baselines, and write the report.
    runs = {"Gemma Encoder": ours, **baselines(collection, args.depth, args.seed)}
    facts = {
        "model": args.model,
        "data": args.data,
        "dtype": args.dtype,
        **collection.reranked(args.depth),
        "held_out_of": args.held_out_of,
        "queries_trained_on": count_trained_on(args.model, collection),
    }
    found = evaluate(collection, runs, measures, args.folder, facts)

    # 3. Print it.
    trained_on = say_trained_on(facts["queries_trained_on"])
    print(f"\n{args.data}, {found['queries']} queries, {trained_on}; reranked: {facts['run']}\n\n{found['table']}")
    print(f"\nRuns, table and plot are in {args.folder}")


if __name__ == "__main__":
    main()
