"""Measures a reranker, against BM25 and random order, on a collection that was judged.

    python examples/evaluate_ranking.py --model my-ranker --data trec_dl/dl2020 --relevance_level 2
    python examples/evaluate_ranking.py --model my-ranker --data trec_dl/dl2019 --run bm25.run --depth 100
    python examples/evaluate_ranking.py --model my-ranker --data sentence-transformers/NanoBEIR-en:NanoMSMARCO
    python examples/evaluate_ranking.py --model my-ranker --data judged --run bm25 --held_out_of my-ranker

--data is a folder with queries, passages and qrels (see the README here), a file of labelled pairs, or
a data set on the Hub with configs `queries`, `corpus` and `qrels` (or `default`), `name:split` where it has several.
Reranked is a run, the 100 best of `--run bm25`, the Hub's own candidates, or what was judged: a judged pool has no
passages that nobody looked at, so its numbers are above those of a run and cannot be compared with them. How much of
it is relevant is printed; where most is, or random order beats BM25, no difference is claimed.

BM25 is fitted on the whole collection. nDCG@10 has linear gain, as trec_eval has it; exponential gain is that of
`--measures "nDCG(dcg='exp-log2')@10"`. --held_out_of measures only the queries that a training by msmarco.py held out.

Leaves the runs in TREC's format, results.json, results.md and per_query.png. Equal scores are ordered by the CRC-32 of
the passage's id. Queries without candidates count 0; those without a grade above 0, or in a judged pool without an
irrelevant passage, are left out.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from modeling_gemma_encoder._scripts.command_line import ScriptParser, fail, failing, interruptible
from modeling_gemma_encoder.ranking.bm25 import add_run
from modeling_gemma_encoder.ranking.collection import read_collection
from modeling_gemma_encoder.ranking.evaluation import MEASURES, baselines, evaluate, parse_measures
from modeling_gemma_encoder.ranking.queries import count_trained_on, only_held_out, say_trained_on
from modeling_gemma_encoder.ranking.scoring import ScoringArguments, choose, load_ranker, rerank


@dataclass(kw_only=True)
class EvaluationArguments(ScoringArguments):
    COUNTS: ClassVar = (*ScoringArguments.COUNTS, "depth")

    data: str = field(metadata={"help": "What it is measured on."})
    run: str | None = field(default=None, metadata={"help": "A TREC run file to rerank, or `bm25`."})
    depth: int | None = field(default=None, metadata={"help": "Reranks the best so many of a run."})
    held_out_of: str | None = field(
        default=None, metadata={"help": "Measures only the queries that the training in this folder held out."}
    )
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage", "label"], metadata={"help": "Columns of a file of pairs."}
    )
    relevance_level: int = field(
        default=1,
        metadata={"help": "Least grade that is relevant, in measures that know no grades and in counts; TREC DL: 2."},
    )
    measures: list[str] = field(default_factory=lambda: list(MEASURES), metadata={"help": "As ir_measures calls them."})
    seed: int = field(default=0, metadata={"help": "Of the random order."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: runs/evaluation/<model>-<data>."})


@interruptible()
def main():
    parser = ScriptParser(EvaluationArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]
    if problem := args.problem():
        fail(parser, problem)
    with failing(parser):
        measures = parse_measures(args.measures, args.relevance_level)
        collection = read_collection(args.data, tuple(args.pair_columns))
        collection.relevance_level = args.relevance_level
        if args.held_out_of:
            collection = only_held_out(collection, args.held_out_of, args.data)
        if args.run:
            add_run(collection, args.run, args.depth)
        if args.depth and collection.run is None:
            raise ValueError(f"--depth {args.depth} is of a run: give --run")
        collection = collection.without_incomparable(args.data)
        args.dtype, args.device = choose(args.dtype, args.device)
        model, tokenizer = load_ranker(args.model, args.dtype, args.device)
        ours = rerank(model, tokenizer, collection, args.depth, args.max_length, args.tokens_per_batch)
    runs = {"Gemma Encoder": ours, **baselines(collection, args.depth, args.seed)}
    facts = {
        "model": args.model,
        "data": args.data,
        "dtype": args.dtype,
        **collection.reranked(args.depth),
        "held_out_of": args.held_out_of,
        "queries_trained_on": count_trained_on(args.model, collection),
    }
    folder = Path(
        args.output_dir or f"runs/evaluation/{Path(args.model).name}-{Path(args.data).name.replace(':', '-')}"
    )
    found = evaluate(collection, runs, measures, folder, facts)
    number, trained_on = found["queries"], say_trained_on(facts["queries_trained_on"])
    print(f"\n{args.data}, {number} queries, {trained_on}; reranked: {facts['run']}\n\n{found['table']}")
    print(f"\nRuns, table and plot are in {folder}")


if __name__ == "__main__":
    main()
