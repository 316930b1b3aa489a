r"""Train a reranker on lists of passages for each query, and evaluate it on judged collections.

    # MS MARCO from the Hub
    python examples/msmarco.py --model google/gemma-3-270m --bf16

    # A thousand labeled passages for each query, evaluated on NanoBEIR
    python examples/msmarco.py --model google/gemma-3-270m --train_data sentence-transformers/msmarco \
        --eval_data sentence-transformers/NanoBEIR-en:NanoMSMARCO

    # Your own folders
    python examples/msmarco.py --model examples/nano --train_data trec_dl/dl2020 --eval_data trec_dl/dl2023

Training data may have these forms; `name:config:split` names other data on the Hub with the same
columns:

    sentence-transformers/msmarco-bm25   query, positive, negative_1 ... negative_50 (config `triplet-50`)
    sentence-transformers/msmarco        queries with a thousand labeled passages (`labeled-list`), or a teacher's
                                         margins (`bert-ensemble-margin-mse`, for --ranking_loss
                                         margin_mse)
    Tevatron/msmarco-passage-new         queries with the ids of positive and negative passages
    a folder                             queries, passages, qrels (.jsonl, .tsv, .txt), perhaps with --train_run
    a file                               labeled pairs, whose columns --pair_columns names

In every epoch, a new list is drawn for each query: a relevant passage, and --list_size - 1 of the
others. After the training, the judged passages of --eval_data and of the queries that --held_out
kept from training are reranked, or with --eval_run bm25 the 100 best of the whole collection.
nDCG@10 has linear gain, and BM25 has the statistics of the whole collection. No difference is
claimed where most of the judged pool is relevant or random order beats BM25. The same command
resumes an interrupted training.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from modeling_gemma_encoder import GemmaEncoderConfig, verify_attention
from modeling_gemma_encoder._scripts.command_line import failing, interruptible
from modeling_gemma_encoder._scripts.files import is_local, write
from modeling_gemma_encoder._scripts.provenance import provenance
from modeling_gemma_encoder._scripts.tables import FORMATS
from modeling_gemma_encoder._scripts.training import (
    check_warmup,
    checkpoint_to_resume,
    defaults_of,
    plot_losses,
    refuse_another_run,
    replacing_weights,
    resumable,
    rows_per_step,
    say_steps,
    train_from,
)
from modeling_gemma_encoder.callbacks import KeepMemory, StepTimer
from modeling_gemma_encoder.checkpoints import load_tokenizer
from modeling_gemma_encoder.finetuning.arguments import FineTuningArguments
from modeling_gemma_encoder.finetuning.model import build
from modeling_gemma_encoder.finetuning.run import IDENTIFYING_ARGUMENTS
from modeling_gemma_encoder.finetuning.suite import make_parser, parse
from modeling_gemma_encoder.losses_gemma_encoder import DISTILLATION_LOSSES
from modeling_gemma_encoder.ranking.arguments import DEFAULTS, TASK, RankingArguments
from modeling_gemma_encoder.ranking.bm25 import add_run
from modeling_gemma_encoder.ranking.collection import Collection
from modeling_gemma_encoder.ranking.data import FreshLists, RankingCollator, RankingDataset
from modeling_gemma_encoder.ranking.evaluation import baselines, evaluate
from modeling_gemma_encoder.ranking.measures import measure_lists, parse_measures
from modeling_gemma_encoder.ranking.queries import count_trained_on, say_trained_on, write_queries
from modeling_gemma_encoder.ranking.reading import read_collection
from modeling_gemma_encoder.ranking.scoring import load_ranker, rerank
from modeling_gemma_encoder.ranking.sources import TrainingLists, hub_lists, lists_of, local_lists
from modeling_gemma_encoder.templates import encode_pairs

# Options that may differ when a run is continued: they do not change what is trained.
FREE = (
    "total_batch_size",
    "measures",
    "relevance_level",
    "max_eval_samples",
    "preprocessing_num_workers",
    "attn_implementation",
)


@dataclass(frozen=True)
class Command:
    """Hold the command line: our options, those of fine-tuning, and those of the Trainer."""

    ranking: RankingArguments
    options: FineTuningArguments
    args: TrainingArguments

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def report(self) -> Path:
        return self.folder / "training.json"  # written after the model, so that its presence means "trained"

    @property
    def trains(self) -> bool:
        return self.args.do_train and not self.report.exists()

    @property
    def is_main(self) -> bool:
        return self.args.process_index == 0

    def validate(self) -> None:
        """Raise ValueError for impossible values, and for flags of other scripts that would do
        nothing here."""
        self.ranking.validate()
        if self.options.max_eval_samples is not None or self.options.preprocessing_num_workers is not None:
            raise ValueError("--max_eval_samples and --preprocessing_num_workers do nothing here; see --eval_depth.")
        if self.args.do_predict:
            raise ValueError("--do_predict does nothing here; rerank.py writes scores.")


@dataclass(frozen=True)
class Data:
    """Hold all that is read before the training: lists, collections to evaluate, and the tokenizer."""

    lists: TrainingLists
    eval_lists: RankingDataset | None  # for the Trainer's own evaluation, with --eval_strategy
    collections: dict[str, Collection]
    measures: list
    tokenizer: PreTrainedTokenizerBase

    @property
    def max_length(self) -> int:
        return self.tokenizer.model_max_length

    @property
    def queries(self) -> list[str]:
        """Return the texts of all queries, to train on and to evaluate."""
        judged = [found.queries[qid] for found in self.collections.values() for qid in found.qrels]
        return [*self.lists.queries, *judged]


# 1. Read lists to train on, and collections to evaluate


def read_data(command: Command) -> Data:
    """Read all data; raise ValueError if some of it is missing or does not fit the options."""
    measures = parse_measures(command.ranking.measures, command.ranking.relevance_level)
    lists = read_lists(command)
    collections = read_collections(command.ranking, lists.held_out)
    eval_lists = make_eval_lists(command, collections)
    tokenizer = TASK.set_template(load_tokenizer(command.options.model))
    positions = GemmaEncoderConfig.from_pretrained(command.options.model).max_position_embeddings
    # Saved with the tokenizer, so that a ranker reads as many tokens as it was trained on.
    tokenizer.model_max_length = min(command.options.max_length or TASK.max_length, positions)
    data = Data(lists, eval_lists, collections, measures, tokenizer)
    check_lengths(data)
    return data


def read_lists(command: Command) -> TrainingLists:
    """Read the lists of --train_data, and hold out a share of the queries."""
    ranking, options, seed = command.ranking, command.options, command.args.seed
    loss = options.ranking_loss
    if loss is None and command.args.do_train:
        loss = GemmaEncoderConfig.from_pretrained(options.model).ranking_loss
    from_teacher = loss in DISTILLATION_LOSSES
    local = [source for source in ranking.train_data if is_file_or_folder(source)]
    if local:
        if unknown := set(ranking.train_data) - set(local):
            raise ValueError(f"--train_data {' '.join(unknown)}: there is no such folder or file.")
        if from_teacher:
            raise ValueError(f"--ranking_loss {loss} needs a teacher's scores, which folders and files do not have.")
        return local_lists(ranking, seed, options.max_train_samples)
    if len(ranking.train_data) > 1 or ranking.held_out or ranking.train_run:
        raise ValueError("Several --train_data, --held_out and --train_run are for folders and files only.")
    return hub_lists(ranking.train_data[0], ranking.list_size, seed, from_teacher, options.max_train_samples)


def is_file_or_folder(source: str) -> bool:
    """Return whether a source is `file`, `folder` or `folder:test`, and no data set on the Hub."""
    return is_local(source) or Path(source).suffix in FORMATS or Path(source.partition(":")[0]).is_dir()


def read_collections(ranking: RankingArguments, held_out: Collection) -> dict[str, Collection]:
    """Read the collections to evaluate, by a short name; the queries that are held out come first."""
    found = {}
    if held_out.qrels:
        held_out.relevance_level = ranking.relevance_level
        found["held-out"] = held_out.without_incomparable("held-out")
    for number, (source, run) in enumerate(zip(ranking.eval_data or (), ranking.trec_runs()[1], strict=True)):
        collection = read_collection(source, tuple(ranking.pair_columns))
        collection.relevance_level = ranking.relevance_level
        if run:
            add_run(collection, run, ranking.eval_depth)
        short = Path(source).name.replace(":", "-")
        name = f"{number}-{short}" if short in found else short
        found[name] = collection.without_incomparable(source)
    pools = [name for name, collection in found.items() if collection.run is None]
    if ranking.eval_depth and pools:
        raise ValueError(f"--eval_depth {ranking.eval_depth} is of a run; give --eval_run for {', '.join(pools)}, too.")
    return found


def make_eval_lists(command: Command, collections: dict[str, Collection]) -> RankingDataset | None:
    """Return lists of the first collection, to evaluate while training, or None if --eval_strategy
    is "no"."""
    ranking, args = command.ranking, command.args
    if args.eval_strategy == "no":
        return None
    first = next(iter(collections.values()), Collection({}, {}, {}))
    rows, _ = lists_of(first, first.run)
    if not rows:
        strategy = args.eval_strategy
        raise ValueError(f"--eval_strategy {strategy} needs --eval_data or --held_out, to make lists of.")
    return RankingDataset(rows, ranking.list_size, args.seed, first.passages, first.queries)


def check_lengths(data: Data) -> None:
    """Raise ValueError if a query leaves no room for a document; print how many documents are cut."""
    queries, dataset = data.queries, data.lists.dataset
    for start in range(0, len(queries), 10_000):
        pairs = [(query, "text") for query in queries[start : start + 10_000]]
        encode_pairs(data.tokenizer, pairs, data.max_length)
    if len(dataset):
        drawn = np.random.default_rng(0).choice(len(dataset), size=min(100, len(dataset)), replace=False)
        rows = [dataset[int(number)] for number in drawn]
        pairs = [(row["query"], document) for row in rows for document in row["documents"]]
        cut = np.mean([len(ids) > data.max_length for ids in encode_pairs(data.tokenizer, pairs)])
        print(f"Of {len(pairs):,} documents drawn {cut:.1%} are cut to {data.max_length} tokens")


# 2. Check that the folder holds no other run, and print the plan


def claim(command: Command, data: Data, checkpoint: str | None) -> None:
    """Write run.json, or raise ValueError if the folder has another run, all steps would warm up, or
    there is no trained ranker."""
    ranking, options, args = command.ranking, command.options, command.args
    run = {**asdict(ranking), **asdict(options), **{key: getattr(args, key) for key in IDENTIFYING_ARGUMENTS}}
    run = {key: value for key, value in run.items() if not key.startswith("eval_") and key not in FREE}
    run["batch_size"] = rows_per_step(args)
    run |= {"lists": data.lists.digest, "max_length": data.max_length}
    if args.do_train:
        done = str(command.report) if command.report.exists() else checkpoint
        if not done:
            check_warmup(args, len(data.lists.dataset))
        defaults = {**defaults_of(ranking), **defaults_of(options)}
        refuse_another_run(run, command.folder, done, command.is_main, defaults)
    elif not command.report.exists():
        load_ranker(options.model, device="cpu")  # raises for a decoder, whose random head would be evaluated


def note_queries(command: Command, data: Data) -> dict[str, int | None]:
    """Write which queries are trained on, and return how many queries of each collection are among
    them."""
    options, held_out = command.options, data.lists.held_out
    if command.args.do_train:
        kept = [held_out.queries[qid] for qid in held_out.qrels]
        write_queries(command.folder, data.lists.queries, kept, base=options.model)
    model = command.folder if command.args.do_train or command.report.exists() else options.model
    return {name: count_trained_on(model, collection) for name, collection in data.collections.items()}


def print_plan(command: Command, data: Data, trained_on: dict[str, int | None]) -> None:
    """Print what is trained on and evaluated, with a warning for queries that are both."""
    ranking, number = command.ranking, len(data.lists.dataset)
    steps = f"{say_steps(command.args, number)}, " if command.trains else ""
    evaluated = ", ".join(data.collections) or "nothing"
    if ranking.held_out and not data.lists.held_out.qrels:
        evaluated += f" (--held_out {ranking.held_out} of so few queries is none)"
    print(f"{number:,} queries to train on, {steps}lists of up to {ranking.list_size}; to evaluate: {evaluated}")
    for name, count in trained_on.items():
        if count:
            queries = len(data.collections[name].qrels)
            print(f"WARNING: {count} of {queries} queries of {name} are also trained on")


# 3. Train


def train(command: Command, data: Data, checkpoint: str | None) -> PreTrainedModel | None:
    """Train and save the ranker; return it, ready to score in fp32, or None if its weights are
    sharded."""

    def measure(output: EvalPrediction) -> dict[str, float]:
        found = measure_lists(output.predictions, output.label_ids, data.measures)
        # Lists are drawn, so that a measure of them is not the one of all candidates and has
        # another name.
        return {f"lists_{name}": value for name, value in found.items()}

    command.args.include_num_input_tokens_seen = "non_padding"
    timer = StepTimer()
    with replacing_weights(checkpoint):
        model = build(TASK, command.options)
    trainer = Trainer(
        model,
        command.args,
        train_dataset=data.lists.dataset,
        eval_dataset=data.eval_lists,
        data_collator=RankingCollator(data.tokenizer, data.max_length),
        processing_class=data.tokenizer,
        compute_metrics=measure,
        callbacks=[FreshLists(data.lists.dataset), timer, KeepMemory()],
    )
    train_from(trainer, checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_report(command, trainer, timer)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    verify_attention(trainer.model)
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def write_report(command: Command, trainer: Trainer, timer: StepTimer) -> None:
    """Write the plot of the losses, and then training.json, which marks the training as finished."""
    history, loss = trainer.state.log_history, trainer.model.config.ranking_loss
    plot_losses(history, [], command.folder / "training.png", ylabel=f"{loss} loss of a list")
    facts = {"history": history, "real_tokens_per_second": timer.real_tokens_per_second(), **provenance()}
    write(command.report, json.dumps(facts, indent=2))


# 4. Evaluate


def evaluate_all(command: Command, data: Data, model, tokenizer, trained_on: dict[str, int | None]) -> None:
    """Rerank each collection, compare with BM25 and random order, and write and print a report."""
    ranking = command.ranking
    for name, collection in data.collections.items():
        ours = rerank(model, tokenizer, collection, ranking.eval_depth, data.max_length)
        runs = {"Gemma Encoder": ours, **baselines(collection, ranking.eval_depth)}
        facts = {"trained_on": ranking.train_data, **asdict(command.options), "queries_trained_on": trained_on[name]}
        facts |= collection.reranked(ranking.eval_depth)
        found = evaluate(collection, runs, data.measures, command.folder / name, facts)
        print(f"\n{name}, {found['queries']} queries, {say_trained_on(trained_on[name])}\n\n{found['table']}")


def load(command: Command) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the ranker that was trained before, or else the one that --model names."""
    trained = command.folder if command.report.exists() else command.options.model
    model, tokenizer = load_ranker(str(trained), device=str(command.args.device))
    if command.options.attn_implementation:
        model.set_attn_implementation(command.options.attn_implementation)
    return model, tokenizer


@interruptible()
def main():
    parser = make_parser(RankingArguments, "runs/msmarco", __doc__)
    parser.set_defaults(**DEFAULTS)
    command = Command(*parse(parser, TASK))
    with resumable(command.args, command.report):
        with failing(parser):
            command.validate()
            data = read_data(command)
            checkpoint = checkpoint_to_resume(command.args)
            claim(command, data, checkpoint)
        trained_on = note_queries(command, data) if command.is_main else {}
        if command.is_main:
            print_plan(command, data, trained_on)
        set_seed(command.args.seed)
        if command.trains:
            model, tokenizer = train(command, data, checkpoint), data.tokenizer
        else:
            model, tokenizer = load(command)
        if command.args.do_eval and model is None and data.collections:
            print(f"A sharded model is not evaluated here: evaluate_ranking.py --model {command.folder}")
        if command.args.do_eval and model is not None and command.is_main:
            evaluate_all(command, data, model, tokenizer, trained_on)
        if command.is_main:
            print(f"\nEverything is in {command.folder}")


if __name__ == "__main__":
    main()
