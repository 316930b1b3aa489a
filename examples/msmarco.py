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

Of a query's passages every epoch draws another list: a relevant one, and --list_size - 1 of the others. Then what was
judged of --eval_data, and of the queries that --held_out kept from training, is reranked, or with --eval_run bm25 the
100 best of the whole collection. nDCG@10 has linear gain, and BM25 is fitted on the whole collection. Where the judged
pool is mostly relevant, or random order beats BM25, no difference is claimed. The same command goes on where it was
interrupted.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers import Trainer, set_seed

from modeling_gemma_encoder import GemmaEncoderConfig, verify_attention
from modeling_gemma_encoder._scripts.command_line import fail, failing, interruptible
from modeling_gemma_encoder._scripts.files import is_local, write
from modeling_gemma_encoder._scripts.provenance import provenance
from modeling_gemma_encoder._scripts.tables import FORMATS
from modeling_gemma_encoder._scripts.training import (
    checkpoint_to_resume,
    count_steps,
    defaults_of,
    plot_losses,
    refuse_another_run,
    replacing_weights,
    resumable,
    rows_per_step,
    train_from,
)
from modeling_gemma_encoder.callbacks import StepTimer
from modeling_gemma_encoder.checkpoints import load_tokenizer
from modeling_gemma_encoder.finetuning.model import build
from modeling_gemma_encoder.finetuning.run import IDENTIFYING_ARGUMENTS
from modeling_gemma_encoder.finetuning.suite import make_parser, parse
from modeling_gemma_encoder.losses_gemma_encoder import DISTILLATION_LOSSES
from modeling_gemma_encoder.ranking.arguments import DEFAULTS, TASK, RankingArguments
from modeling_gemma_encoder.ranking.bm25 import add_run
from modeling_gemma_encoder.ranking.collection import Collection, lists_of, read_collection
from modeling_gemma_encoder.ranking.data import FreshLists, RankingCollator, RankingDataset
from modeling_gemma_encoder.ranking.evaluation import baselines, evaluate, measure_lists, parse_measures
from modeling_gemma_encoder.ranking.queries import count_trained_on, say_trained_on, write_queries
from modeling_gemma_encoder.ranking.scoring import load_ranker, rerank
from modeling_gemma_encoder.ranking.sources import hub_lists, local_lists
from modeling_gemma_encoder.templates import encode_pairs

# What does not make another run.
FREE = (
    "total_batch_size",
    "measures",
    "relevance_level",
    "max_eval_samples",
    "preprocessing_num_workers",
    "attn_implementation",
)


# 1. What is measured, and what fits


def judged(ranking: RankingArguments, held_out: Collection) -> dict[str, Collection]:
    held_out.relevance_level = ranking.relevance_level
    found = {"held-out": held_out.without_incomparable("held-out")} if held_out.qrels else {}
    for number, (source, run) in enumerate(zip(ranking.eval_data or (), ranking.runs()[1], strict=True)):
        collection = read_collection(source, tuple(ranking.pair_columns))
        collection.relevance_level = ranking.relevance_level
        if run:
            add_run(collection, run, ranking.eval_depth)
        short = Path(source).name.replace(":", "-")
        found[short if short not in found else f"{number}-{short}"] = collection.without_incomparable(source)
    if ranking.eval_depth and (pools := [name for name, collection in found.items() if collection.run is None]):
        raise ValueError(f"--eval_depth {ranking.eval_depth} is of a run: give --eval_run, also for {', '.join(pools)}")
    return found


def check_lengths(tokenizer, lists: RankingDataset, queries: list[str], max_length: int) -> None:
    """Queries that leave no room for a document are found now, not while training; says how often documents are cut."""
    for start in range(0, len(queries), 10_000):
        encode_pairs(tokenizer, [(query, "text") for query in queries[start : start + 10_000]], max_length)
    if len(lists):
        some = [
            lists[int(i)] for i in np.random.default_rng(0).choice(len(lists), size=min(100, len(lists)), replace=False)
        ]
        pairs = [(row["query"], document) for row in some for document in row["documents"]]
        cut = np.mean([len(ids) > max_length for ids in encode_pairs(tokenizer, pairs)])
        print(f"Of {len(pairs):,} documents drawn {cut:.1%} are cut to {max_length} tokens")


# 2. Everything


@interruptible()
def main():
    parser = make_parser(RankingArguments, "runs/msmarco", __doc__)
    parser.set_defaults(**DEFAULTS)
    ranking, options, args = parse(parser, TASK)
    with resumable(args, Path(args.output_dir) / "training.json"):
        train_and_evaluate(parser, ranking, options, args)


def train_and_evaluate(parser, ranking, options, args):
    """Everything, as the command line says."""
    if problem := ranking.problem() or cannot_do(options, args):
        fail(parser, problem)
    folder = Path(args.output_dir)
    finished, held_out = folder / "training.json", Collection({}, {}, {})
    local = [source for source in ranking.train_data if is_file_or_folder(source)]
    with failing(parser):
        loss = options.ranking_loss
        if loss is None and args.do_train:
            loss = GemmaEncoderConfig.from_pretrained(options.model).ranking_loss
        from_teacher = loss in DISTILLATION_LOSSES
        measures = parse_measures(ranking.measures, ranking.relevance_level)
        if local and len(local) < len(ranking.train_data):
            raise ValueError(
                f"--train_data {' '.join(set(ranking.train_data) - set(local))}: there is no such folder or file"
            )
        if local and from_teacher:
            raise ValueError(f"--ranking_loss {loss} needs a teacher's scores, which qrels are not.")
        if not local and (len(ranking.train_data) > 1 or ranking.held_out or ranking.train_run):
            raise ValueError("--train_data of several places, --held_out and --train_run are for folders and files.")
        if local:
            form = {"pairs": tuple(ranking.pair_columns), "run": ranking.train_run, "held_out": ranking.held_out}
            form |= {"eval_run": ranking.runs()[0], "eval_depth": ranking.eval_depth}
            lists, queries, digest, held_out = local_lists(
                ranking.train_data, ranking.list_size, args.seed, options.max_train_samples, **form
            )
        else:
            form = (ranking.train_data[0], ranking.list_size, args.seed, from_teacher, options.max_train_samples)
            lists, queries, digest = hub_lists(*form)
        collections = judged(ranking, held_out)
        lists_out = None
        if args.eval_strategy != "no":
            first = next(iter(collections.values()), Collection({}, {}, {}))
            rows = lists_of(first, first.run)[0]
            if not rows:
                raise ValueError(
                    f"--eval_strategy {args.eval_strategy} needs --eval_data or --held_out to make lists of."
                )
            lists_out = RankingDataset(rows, ranking.list_size, args.seed, first.passages, first.queries)
        tokenizer = TASK.set_template(load_tokenizer(options.model))
        positions = GemmaEncoderConfig.from_pretrained(options.model).max_position_embeddings
        max_length = min(options.max_length or TASK.max_length, positions)
        tokenizer.model_max_length = max_length  # saved with the model: it is read as it was trained
        evaluated = [c.queries[qid] for c in collections.values() for qid in c.qrels]
        check_lengths(tokenizer, lists, [*queries, *evaluated], max_length)
        checkpoint = checkpoint_to_resume(args)
        run = {**asdict(ranking), **asdict(options), **{key: getattr(args, key) for key in IDENTIFYING_ARGUMENTS}}
        run = {key: value for key, value in run.items() if not key.startswith("eval_") and key not in FREE}
        run["batch_size"] = rows_per_step(args)
        run |= {"lists": digest, "max_length": max_length}
        if args.do_train:
            done = str(finished) if finished.exists() else checkpoint
            refuse_another_run(
                run, folder, done, args.process_index == 0, {**defaults_of(ranking), **defaults_of(options)}
            )
        elif not finished.exists():
            load_ranker(options.model, device="cpu")  # or a random head would be measured
    if args.process_index == 0:
        if args.do_train:
            kept = [held_out.queries[qid] for qid in held_out.qrels]
            write_queries(folder, queries, kept, base=options.model)
        model_of = folder if args.do_train or finished.exists() else options.model
        seen = {name: count_trained_on(model_of, collection) for name, collection in collections.items()}
        to_evaluate = ", ".join(collections) or "nothing"
        if ranking.held_out and not held_out.qrels:
            to_evaluate += f" (--held_out {ranking.held_out} of so few queries is none)"
        steps = f"{count_steps(args, len(lists)):,} steps, " if args.do_train and not finished.exists() else ""
        print(
            f"{len(lists):,} queries to train on, {steps}lists of up to {ranking.list_size}; to evaluate: {to_evaluate}"
        )
        for name, count in seen.items():
            if count:
                print(f"WARNING: {count} of {len(collections[name].qrels)} queries of {name} are also trained on")

    set_seed(args.seed)
    if args.do_train and not finished.exists():
        model = train(ranking, options, args, lists, lists_out, tokenizer, max_length, measures, checkpoint, finished)
    else:
        model, tokenizer = load_ranker(str(folder if finished.exists() else options.model), device=str(args.device))
        if options.attn_implementation:
            model.set_attn_implementation(options.attn_implementation)
    if args.do_eval and model is None and collections:
        print(f"A sharded model is not evaluated here: evaluate_ranking.py --model {folder}")
    for name, collection in collections.items() if args.do_eval and model and args.process_index == 0 else ():
        ours = rerank(model, tokenizer, collection, ranking.eval_depth, max_length)
        runs = {"Gemma Encoder": ours, **baselines(collection, ranking.eval_depth)}
        facts = {"trained_on": ranking.train_data, **asdict(options), "queries_trained_on": seen[name]}
        facts |= collection.reranked(ranking.eval_depth)
        found = evaluate(collection, runs, measures, folder / name, facts)
        print(f"\n{name}, {found['queries']} queries, {say_trained_on(seen[name])}\n\n{found['table']}")
    if args.process_index == 0:
        print(f"\nEverything is in {folder}")


def is_file_or_folder(source: str) -> bool:
    """A data set on the Hub has no ending of a file; of a folder one of several qrels may be named, `folder:test`."""
    return is_local(source) or Path(source).suffix in FORMATS or Path(source.partition(":")[0]).is_dir()


def cannot_do(options, args) -> str | None:
    """Flags of other scripts, which would do nothing here."""
    if options.max_eval_samples is not None or options.preprocessing_num_workers is not None:
        return "--max_eval_samples and --preprocessing_num_workers do nothing here; see --eval_depth"
    if args.do_predict:
        return "--do_predict does nothing here: rerank.py writes scores"
    return None


def train(ranking, options, args, lists, lists_out, tokenizer, max_length, measures, checkpoint, finished):
    """Trains and saves. The model, to score in fp32, or None where it is in pieces."""

    def score(output) -> dict[str, float]:  # of drawn lists, not of all candidates: another name
        found = measure_lists(output.predictions, output.label_ids, measures)
        return {f"lists_{name}": value for name, value in found.items()}

    timer = StepTimer()
    args.include_num_input_tokens_seen = "non_padding"
    with replacing_weights(checkpoint):
        model = build(TASK, options)
    trainer = Trainer(
        model,
        args,
        train_dataset=lists,
        eval_dataset=lists_out,
        data_collator=RankingCollator(tokenizer, max_length),
        processing_class=tokenizer,
        compute_metrics=score,
        callbacks=[FreshLists(lists), timer],
    )
    train_from(trainer, checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        loss = f"{trainer.model.config.ranking_loss} loss of a list"
        plot_losses(history, [], finished.parent / "training.png", ylabel=loss)
        facts = {"history": history, "real_tokens_per_second": timer.real_tokens_per_second(), **provenance()}
        write(finished, json.dumps(facts, indent=2))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    verify_attention(trainer.model)
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


if __name__ == "__main__":
    main()
