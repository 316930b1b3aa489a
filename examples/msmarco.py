"""Trains a reranker on lists of passages for a query, and measures it on collections that were judged.

    python examples/msmarco.py --model google/gemma-3-270m --bf16                       # MS MARCO, from the Hub
    python examples/msmarco.py --model google/gemma-3-270m --train_data sentence-transformers/msmarco \
        --eval_data sentence-transformers/NanoBEIR-en:NanoMSMARCO
    python examples/msmarco.py --model examples/nano --train_data trec_dl/dl2020 --eval_data trec_dl/dl2023

Training data, in whose place `name:config:split` names others with the same columns:

    sentence-transformers/msmarco-bm25   query, positive, negative_1 ... negative_50 (config `triplet-50`)
    sentence-transformers/msmarco        queries with a thousand labelled passages (`labeled-list`), or a teacher's
                                         margins (`bert-ensemble-margin-mse`, for --ranking_loss margin_mse)
    Tevatron/msmarco-passage-new         queries with the ids of positive and negative passages
    a folder                             queries, passages, qrels (.jsonl, .tsv, .txt), perhaps with --train_run
    a file                               labelled pairs, whose columns --pair_columns names

Of a query's passages every epoch draws another list: a relevant one, and --list_size - 1 of the others. Then the
candidates of --eval_data are reranked. The same command goes on where it was interrupted.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zlib import crc32

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, Trainer, set_seed

from modeling_gemma_encoder import GemmaEncoderForRanking, verify_attention
from modeling_gemma_encoder.data import FreshLists, RankingCollator, RankingDataset
from modeling_gemma_encoder.finetuning import build
from modeling_gemma_encoder.ranking import MEASURES, evaluate, measure_lists, parse_measures, random_order, rerank
from modeling_gemma_encoder.retrieval import Collection, Texts, bm25, lists_of, read_collection, read_run
from modeling_gemma_encoder.runs import RECIPE, write
from modeling_gemma_encoder.suites import fail, make_parser, parse
from modeling_gemma_encoder.tasks import Task
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, encode_pairs
from modeling_gemma_encoder.training import StepTimer, last_checkpoint, refuse_another_run

# Our choice, after RankT5 (arXiv 2210.10634, section 5): lists of 36, 32 of them a step. It trains at a constant rate.
TASK = Task(
    ("query", "passage"), None, problem="choice", template=RANKING_TEMPLATE, max_length=256, epochs=1, batch_size=4
)
DEFAULTS = {
    "gradient_accumulation_steps": 8,
    "lr_scheduler_type": "constant_with_warmup",
    "remove_unused_columns": False,  # the collator needs the texts
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
}
CONFIGS = {"sentence-transformers/msmarco-bm25": "triplet-50", "sentence-transformers/msmarco": "labeled-list"}
CORPORA = {"Tevatron/msmarco-passage-new": "Tevatron/msmarco-passage-corpus-new"}
TEACHERS = ("margin_mse", "kl")


@dataclass
class RankingArguments:
    train_data: list[str] = field(
        default_factory=lambda: ["sentence-transformers/msmarco-bm25"],
        metadata={"help": "Folders and files together, or one data set on the Hub, `name[:config[:split]]`."},
    )
    train_run: str | None = field(
        default=None,
        metadata={"help": "Further candidates of a folder's queries: a TREC run file, or `bm25`, its 100 best."},
    )
    list_size: int = field(default=36, metadata={"help": "Documents of a list, at most."})
    held_out: float = field(
        default=0.0, metadata={"help": "Share of the queries of --train_data that are evaluated instead, by their ids."}
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Folders, files, or judged data on the Hub, `name[:split]`."}
    )
    eval_run: list[str] | None = field(
        default=None, metadata={"help": "A TREC run file for each of --eval_data to rerank. Default: what was judged."}
    )
    eval_depth: int | None = field(default=None, metadata={"help": "Reranks the best so many of a run."})
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage", "label"], metadata={"help": "Columns of files of pairs."}
    )
    relevance_level: int = field(
        default=1, metadata={"help": "Least grade that counts as relevant in measures that know no grades; TREC DL: 2."}
    )
    measures: list[str] = field(default_factory=lambda: list(MEASURES), metadata={"help": "As ir_measures calls them."})

    def problem(self) -> str | None:
        if self.list_size < 2:
            return f"--list_size must be at least 2, got {self.list_size}"
        if not 0 <= self.held_out < 1:
            return f"--held_out is a share, at least 0 and below 1, got {self.held_out}"
        if len(self.pair_columns) != 3:
            return f"--pair_columns are three, of query, passage and label, got {' '.join(self.pair_columns)}"
        if self.eval_run and len(self.eval_run) != len(self.eval_data or ()):
            return f"--eval_run names {len(self.eval_run)} files for {len(self.eval_data or ())} of --eval_data"
        return None


# 1. Lists to train on


class Rows(Sequence):
    """Rows of a data set as lists, each made when it is read."""

    def __init__(self, rows: Dataset, read: Callable[[dict], dict]):
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        return self.read(self.rows[number])


def of_texts(row: dict) -> dict:
    negatives = [text for name, text in row.items() if name.startswith("negative") and text]
    return {"query": row["query"], "documents": [row["positive"], *negatives], "labels": [1] + [0] * len(negatives)}


def of_labels(row: dict) -> dict:
    return {"query": str(row["query_id"]), "documents": list(map(str, row["doc_ids"])), "labels": row["labels"]}


def of_ids(row: dict) -> dict:
    positive, negative = row["positive_document_ids"], row["negative_document_ids"]
    labels = [1] * len(positive) + [0] * len(negative)
    return {
        "query": row.get("query") or row["query_text"],
        "documents": [str(one) for one in (*positive, *negative)],
        "labels": labels,
    }


def of_passages(row: dict) -> dict:
    positive, negative = row["positive_passages"], row["negative_passages"]
    texts = [f"{one.get('title') or ''} {one['text']}".strip() for one in (*positive, *negative)]
    return {"query": row["query"], "documents": texts, "labels": [1] * len(positive) + [0] * len(negative)}


def of_margins(row: dict) -> dict:
    documents = [str(row["positive_id"]), str(row["negative_id"])]
    return {"query": str(row["query_id"]), "documents": documents, "labels": [row["score"], 0.0]}


READERS = {  # by the columns that tell them
    ("query", "positive", "negative"): of_texts,
    ("query", "positive", "negative_1"): of_texts,
    ("query_id", "doc_ids", "labels"): of_labels,
    ("query_id", "positive_document_ids", "negative_document_ids"): of_ids,
    ("query", "positive_passages", "negative_passages"): of_passages,
    ("query_id", "positive_id", "negative_id", "score"): of_margins,
}


def hub_lists(source: str, list_size: int, seed: int, from_teacher: bool) -> RankingDataset:
    name, config, split = [*source.split(":"), None, None][:3]
    rows = load_dataset(name, config or CONFIGS.get(name), split=split or "train")
    read = next((read for columns, read in READERS.items() if set(columns) <= set(rows.column_names)), None)
    if read is None:
        forms = "; ".join(", ".join(columns) for columns in READERS)
        raise ValueError(f"{source} has the columns {', '.join(rows.column_names)}. Lists have one of: {forms}.")
    if (read is of_margins) != from_teacher:
        raise ValueError(
            f"{source}: a teacher's scores go with --ranking_loss {' and '.join(TEACHERS)}, labels with others."
        )
    texts = {}
    if read in (of_labels, of_margins):
        corpus, queries = load_dataset(name, "corpus", split="train"), load_dataset(name, "queries", split="train")
        texts["passages"] = Texts(corpus["passage_id"], corpus["passage"])
        texts["queries"] = Texts(queries["query_id"], queries["query"])
    elif read is of_ids:
        corpus = load_dataset(CORPORA.get(name, f"{name}-corpus"), split="train")
        texts["passages"] = Texts(corpus["docid"], corpus["text"])
    return RankingDataset(Rows(rows, read), list_size, seed, from_teacher=from_teacher, **texts)


def local_lists(ranking: RankingArguments, seed: int) -> tuple[RankingDataset, Collection]:
    """Lists of the queries to train on of all folders and files, and the queries that are held out."""
    queries, passages, rows, held_out = {}, {}, [], Collection({}, {}, {})
    for number, source in enumerate(ranking.train_data):
        found = read_collection(source, pairs=tuple(ranking.pair_columns))
        run = None
        if ranking.train_run:
            run = bm25(found, depth=100) if ranking.train_run == "bm25" else read_run(Path(ranking.train_run))
            Collection(found.queries, found.passages, found.qrels, run).check(ranking.train_run)
        rename = (lambda one, number=number: f"{number}-{one}") if len(ranking.train_data) > 1 else str
        passages |= {rename(pid): text for pid, text in found.passages.items()}
        queries |= {rename(qid): text for qid, text in found.queries.items()}
        is_out = {qid: crc32(found.queries[qid].encode()) % 1000 < 1000 * ranking.held_out for qid in found.qrels}
        held_out.qrels |= {
            rename(qid): {rename(pid): grade for pid, grade in found.qrels[qid].items()}
            for qid in found.qrels
            if is_out[qid]
        }
        found.qrels = {qid: grades for qid, grades in found.qrels.items() if not is_out[qid]}
        lists, without = lists_of(found, run)
        if without:
            print(
                f"{source}: {without} of {len(found.qrels)} queries have no relevant passage or no other one: left out"
            )
        for row in lists:
            rows.append({**row, "query": rename(row["query"]), "documents": [rename(pid) for pid in row["documents"]]})
    if not rows:
        raise ValueError(
            f"{', '.join(ranking.train_data)}: no query has both a relevant passage and another one; --train_run bm25 "
            "finds others."
        )
    held_out.queries, held_out.passages = queries, passages
    return RankingDataset(rows, ranking.list_size, seed, passages, queries), held_out


# 2. Collections to be measured on


def judged(ranking: RankingArguments, held_out: Collection) -> dict[str, Collection]:
    found = {"held-out": held_out} if held_out.qrels else {}
    for number, source in enumerate(ranking.eval_data or ()):
        name, _, split = source.partition(":")
        collection = read_collection(name, split or None, tuple(ranking.pair_columns))
        if ranking.eval_run:
            collection.run = read_run(Path(ranking.eval_run[number]))
            collection.check(ranking.eval_run[number])
        short = Path(split or name).name
        found[short if short not in found else f"{number}-{short}"] = collection
    return found


# 3. Everything


def main():
    parser = make_parser(RankingArguments, "runs/msmarco", __doc__)
    parser.set_defaults(**DEFAULTS)
    ranking, options, args = parse(parser, TASK)
    if problem := ranking.problem():
        fail(parser, problem)
    try:
        measures = parse_measures(ranking.measures, ranking.relevance_level)
        from_teacher = options.ranking_loss in TEACHERS
        local = all(Path(source).exists() for source in ranking.train_data)
        held_out = Collection({}, {}, {})
        if local:
            lists, held_out = local_lists(ranking, args.seed)
            if from_teacher:
                raise ValueError(
                    f"--ranking_loss {options.ranking_loss} needs a teacher's scores, which qrels are not."
                )
        elif len(ranking.train_data) > 1 or ranking.held_out or ranking.train_run:
            raise ValueError("--train_data of several places, --held_out and --train_run are for folders and files.")
        else:
            lists = hub_lists(ranking.train_data[0], ranking.list_size, args.seed, from_teacher)
        collections = judged(ranking, held_out)
        tokenizer = TASK.set_template(AutoTokenizer.from_pretrained(options.model))
        max_length = options.max_length or TASK.max_length
        for collection in collections.values():  # a query that does not fit is found now, not after training
            encode_pairs(
                tokenizer, [(collection.queries[qid], "text " * max_length) for qid in collection.qrels], max_length
            )
        folder, checkpoint = Path(args.output_dir), last_checkpoint(Path(args.output_dir))
        run = {**asdict(ranking), **asdict(options), **{key: getattr(args, key) for key in RECIPE}}
        run |= {
            "lists": len(lists),
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        }
        finished = folder / "training.json"
        refuse_another_run(
            {
                key: value
                for key, value in run.items()
                if not key.startswith("eval_") and key not in ("measures", "relevance_level")
            },
            folder,
            str(finished) if finished.exists() else checkpoint,
            args.process_index == 0,
        )
    except (ValueError, OSError) as error:
        fail(parser, str(error))
    to_evaluate = ", ".join(collections) or "nothing"
    print(f"{len(lists):,} queries to train on, lists of {ranking.list_size}; to evaluate: {to_evaluate}")

    set_seed(args.seed)
    if finished.exists() or not args.do_train:
        model = GemmaEncoderForRanking.from_pretrained(
            folder if finished.exists() else options.model, dtype=torch.float32
        )
        model.to(args.device)
    else:
        model, timer, lists_out = build(TASK, options), StepTimer(), None
        args.include_num_input_tokens_seen = "non_padding"
        if first := next(iter(collections.values()), None):  # for --eval_strategy
            lists_out = RankingDataset(lists_of(first)[0], ranking.list_size, args.seed, first.passages, first.queries)
        trainer = Trainer(
            model,
            args,
            train_dataset=lists,
            eval_dataset=lists_out,
            compute_metrics=lambda output: measure_lists(output.predictions, output.label_ids, measures),
            data_collator=RankingCollator(tokenizer, max_length),
            processing_class=tokenizer,
            callbacks=[FreshLists(lists), timer],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        verify_attention(trainer.model)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # scores in fp32
        if trainer.is_world_process_zero():
            history = {"history": trainer.state.log_history, "real_tokens_per_second": timer.real_tokens_per_second()}
            write(finished, json.dumps(history, indent=2))
    for name, collection in collections.items() if args.process_index == 0 else ():
        runs = {
            "Gemma Encoder": rerank(model, tokenizer, collection, ranking.eval_depth, max_length),
            "BM25": bm25(collection),
            "random order": random_order(collection, ranking.eval_depth),
        }
        found = evaluate(
            collection, runs, measures, folder / name, facts={"trained_on": ranking.train_data, **asdict(options)}
        )
        print(
            f"\n{name}, {found['queries']} queries, {'a run' if collection.run else 'judged pool'}\n\n{found['table']}"
        )
    print(f"\nThe model, runs, tables and plots are in {folder}")


if __name__ == "__main__":
    main()
