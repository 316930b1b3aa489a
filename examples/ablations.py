"""What the paper claims matters, on your decoder: attention, pooling, dropout, one choice changed at a time.

    python examples/ablations.py --study attention pooling --tasks cola mrpc stsb --model google/gemma-3-270m --bf16
    python examples/ablations.py --study dropout dropout_place --tasks cola wic --model examples/nano --data_dir data
    python examples/ablations.py --study start --starts examples/nano runs/nano-mlm --tasks sst2 --model examples/nano
    python examples/ablations.py --study attention --tasks cola --model google/gemma-2-2b --bf16 --workers 8
    python examples/ablations.py --study pooling --table train.csv dev.csv --table_flags "--label_column stars" ...

Studies are in `STUDIES`; `--variants causal bidirectional` takes these rows of them. `start` compares checkpoints: of
decoders of other sizes and families, or up-trained. Tasks are GLUE's and SuperGLUE's, from the Hub or from
`--data_dir`: <task>/, glue/<task>/ or superglue/<task>/ in it. For every variant and task the learning rate is the one
of `--learning_rates` that does best on a tenth of the training rows (a thousand at most), which are set aside; then
`--seeds` are trained and scored on the official validation rows, with several metrics averaged as GLUE does.
Everything else is what `glue.py` takes, every flag of `TrainingArguments` included. Your own table is a further task
by `--table`, as `classify.py` reads it. A reranker is one by `--ranking`, with the variants, rates and seeds, and
everything else from `--ranking_flags`.

A cell that is finished is read, an interrupted command goes on when it is given again, and studies share cells.
`--finished_only` makes tables and plots of what is there, of several commands, or while one runs elsewhere. With
`--workers` cells run side by side on Ray: a GPU each, or a share of the cores. Leaves in `--output_dir` tables and a
plot of each study, `results.json`, and `cells/`, each with its own `results.json` and predictions. Scores have the
standard error of the seeds; differences, from the first variant or what the study names, that of seeds and rows.
Variants whose answers are equal, or nearly always the same, are named in words under their table.
Tables and plots are of what was asked for last.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from modeling_gemma_encoder._scripts.command_line import YamlScriptParser, fail, failing, interruptible
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder._scripts.provenance import provenance
from modeling_gemma_encoder.ablations.reports import difference_table, notes, plot, score_table
from modeling_gemma_encoder.ablations.statistics import LeftOut, add_answers, add_differences, split_in_parts
from modeling_gemma_encoder.ablations.studies import Bench, Cell, Study, as_options, run_studies
from modeling_gemma_encoder.checkpoints import load_tokenizer
from modeling_gemma_encoder.configuration_gemma_encoder import GemmaEncoderConfig
from modeling_gemma_encoder.finetuning import glue, own_table, superglue
from modeling_gemma_encoder.finetuning.arguments import COMMON, FineTuningArguments, training_defaults
from modeling_gemma_encoder.finetuning.metrics import of_columns, pearson_and_spearman
from modeling_gemma_encoder.finetuning.model import check_model
from modeling_gemma_encoder.finetuning.suite import HelpOfSuites
from modeling_gemma_encoder.finetuning.suite import validate as validate_runs
from modeling_gemma_encoder.finetuning.tasks import Source, Task, by_label

SUITES = {"glue": ("nyu-mll/glue", glue.TASKS), "superglue": ("aps/super_glue", superglue.TASKS)}


def dropout(attention: float, feedforward: float) -> dict:
    return {"attention_dropout": attention, "feedforward_dropout": feedforward}


def pooling(name: str, **options) -> dict:
    return {"pooling": name, **options}


ROWS = (250, 1000, 4000, None)
# The paper's numbers: GLUE averages of Gemma 2 2B, arXiv 2503.02656. Radii, K, probes and rows are our choice.
STUDIES = {
    "attention": Study(
        {
            "causal": {"attention": "causal"},
            "bidirectional": {"attention": "bidirectional"},
            **{f"radius {n}": {"attention": "bidirectional", "attention_window": n} for n in (1, 4, 16)},
        },
        paper={"causal": 84.5, "bidirectional": 89.4},
    ),
    "pooling": Study(
        {
            "mean": pooling("mean"),
            "first token": pooling("first_k", pooling_k=1),
            "last token": pooling("last_k", pooling_k=1),
            "last 4": pooling("last_k", pooling_k=4),
            "query probe": pooling("query_probe", pooling_num_probes=1),
            "4 query probes": pooling("query_probe", pooling_num_probes=4),
            "4 key-value probes": pooling("kv_probe", pooling_num_probes=4),
        },
        paper={"mean": 89.4, "last token": 89.1, "query probe": 89.0},
    ),
    "dropout": Study(
        {str(rate): dropout(rate, rate) for rate in (0.0, 0.05, 0.1, 0.15)}, paper={"0.0": 87.2, "0.1": 89.4}
    ),
    "dropout_place": Study(
        {
            "none": dropout(0.0, 0.0),
            "attention": dropout(0.1, 0.0),
            "feed-forward": dropout(0.0, 0.1),
            "both": dropout(0.1, 0.1),
        },
        paper={"none": 87.2, "both": 89.4},
    ),
    "baselines": Study(
        {
            "TF-IDF with logistic regression": {"kind": "words"},
            "BERT's shape with random weights": {"kind": "bert"},
            "Gemma Encoder with random weights": {"kind": "scratch"},
            "Gemma*ForSequenceClassification": {"kind": "stock"},
            "Gemma Encoder": {},
        },
        reference="Gemma Encoder",
    ),
    "rows": Study(
        {
            f"{name} on {rows or 'all'} rows": {**changed, "max_train_samples": rows}
            for name, changed in (("mean", pooling("mean")), ("query probe", pooling("query_probe")))
            for rows in ROWS
        },
        reference={f"query probe on {rows or 'all'} rows": f"mean on {rows or 'all'} rows" for rows in ROWS},
    ),
}
NAMES = "; ".join(f"{study}: {', '.join(found.variants)}" for study, found in STUDIES.items())
RANDOM = ("bert", "scratch")  # kinds of variants whose embeddings have learned nothing yet
# Made of the command line: `start` has a variant for each of --starts, `padding` one for each side.
MADE = ("start", "padding")
# What every task has for itself unless the command line says otherwise.
OF_TASK = ("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size")
# What every variant has unless it says otherwise: the config's defaults, spelled out.
PLAIN = {"attention": "bidirectional", "pooling": "mean", "pooling_k": 1, "pooling_num_probes": 1, **dropout(0.1, 0.1)}


@dataclass
class AblationArguments:
    study: list[str] = field(metadata={"help": "Of " + ", ".join([*STUDIES, *MADE]) + ", or `all` but start."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Of GLUE and SuperGLUE."})
    variants: list[str] | None = field(
        default=None, metadata={"help": f"Of the studies these alone. Default: all. {NAMES}"}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Default: the Hub."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Default: a half, once and twice glue.py's for this size of decoder."}
    )
    starts: list[str] = field(default_factory=list, metadata={"help": "Checkpoints that the study `start` compares."})
    table: list[str] | None = field(
        default=None,
        metadata={"help": "Files of your own, to train on and to evaluate, or one, of which a tenth is evaluated."},
    )
    table_flags: str = field(
        default="", metadata={"help": "In one string, what classify.py is to be told of it, such as --label_column x."}
    )
    ranking: list[str] | None = field(
        default=None,
        metadata={
            "help": "Judged data, for msmarco.py, to train on and to evaluate: a further task, scored by nDCG@10."
        },
    )
    ranking_flags: str = field(
        default="", metadata={"help": "In one string, what msmarco.py is to be told besides, such as --list_size 16."}
    )
    workers: int = field(default=1, metadata={"help": "Cells at a time; more than one needs Ray."})
    keep_models: bool = field(default=False, metadata={"help": "Keep the weights of every cell."})
    finished_only: bool = field(
        default=False, metadata={"help": "Train nothing: tables and plots of the cells that are in --output_dir."}
    )


def cannot_ablate(own: AblationArguments, options, args, studies: dict[str, Study], tasks: dict) -> str | None:
    """What cannot be, in the words of the command line, before anything is trained."""
    if own.workers < 1:
        return f"--workers must be at least 1, got {own.workers}"
    if args.world_size > 1:
        return "accelerate launch and torchrun are for glue.py; here cells run side by side by --workers"
    if own.workers > 1:
        if find_spec("ray") is None:
            return '--workers needs Ray: pip install ".[ray]"'
        if 0 < (gpus := torch.cuda.device_count()) < own.workers:
            return f"--workers {own.workers} need a GPU each; there are {gpus}"
    if options.total_batch_size is not None:
        return "--total_batch_size is for glue.py; tasks have batches of their own, or --per_device_train_batch_size"
    if args.do_predict or not (args.do_train and args.do_eval):
        return "--do_predict, and not to train or evaluate, are for glue.py"
    if "baselines" in studies:
        if chooses := [name for name, (task, _) in tasks.items() if task.problem == "choice"]:
            return f"--study baselines: {', '.join(chooses)} choose among candidates, which stock classifiers do not"
        if options.lora_r or options.dtype != "float32":
            return "--study baselines trains all weights: without --lora_r and --dtype"
        made = [name for name, found in studies["baselines"].variants.items() if found.get("kind") in RANDOM]
        if options.freeze_embeddings and made:
            return f"--freeze_embeddings would leave those of {' and '.join(made)} random: choose --variants"
        if GemmaEncoderConfig.from_pretrained(options.model).architectures:
            return f"--study baselines needs a decoder as --model: {options.model} is an encoder's checkpoint"
    if own.ranking:
        if len(own.ranking) != 2 or own.ranking[0] == own.ranking[1]:
            return "--ranking names two places, data to train on and other data to evaluate"
        if missing := [place for place in own.ranking if not Path(place).exists()]:
            return f"--ranking: there is no {', '.join(missing)}"
        if wrong := {"baselines", "rows"} & set(studies):
            return f"--ranking has no study {', '.join(sorted(wrong))}"
        if options.lora_r:
            return "--ranking: give --lora_r in --ranking_flags, with learning rates for both"
    return None


def source_of(name: str, data_dir: str | None) -> Source:
    suite = next(suite for suite, (_, tasks) in SUITES.items() if name in tasks)
    dataset, tasks = SUITES[suite]
    folder = None
    if data_dir:
        places = [Path(data_dir) / name, Path(data_dir) / suite / name]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise ValueError(f"--data_dir: there is neither a folder {places[0]} nor {places[1]}")
    return Source(dataset, tasks[name].config or name, folder)


def read_own_table(own: AblationArguments) -> dict[str, tuple[Task, own_table.Table]]:
    if own.table is None:
        return {}
    if len(own.table) > 2:
        raise ValueError("--table names one file or two, to train on and to evaluate")
    files = dict(zip(("train_file", "validation_file"), own.table, strict=False))
    flags = [word for name, file in files.items() for word in (f"--{name}", file)] + shlex.split(own.table_flags)
    (table,) = HfArgumentParser(own_table.TableArguments).parse_args_into_dataclasses(args=flags)
    own_flags = ("text_column", "label_column", "problem", "template")
    plain = own_table.TableArguments(**files)
    if wrong := [key for key in vars(plain) if key not in own_flags and getattr(table, key) != getattr(plain, key)]:
        raise ValueError(f"--table_flags takes --{', --'.join(own_flags)}, and no --{', --'.join(wrong)}")
    try:
        table.validate(do_train=True, do_eval=True, do_predict=False)
    except ValueError as error:
        raise ValueError(f"--table_flags: {error}") from error
    name, task, source = own_table.task_of(table)
    source.hold_out()
    if task.problem == "regression":  # without R², which has no least value and would drown the others in a mean
        several = task.label_columns
        metric = partial(of_columns, pearson_and_spearman, several) if several else pearson_and_spearman
        task = replace(task, metric=by_label(metric))
    return {name: (task, source)}


def padded_on(side: str, model: str, root: Path) -> str:
    """The same checkpoint with a tokenizer that pads on this side, in a folder of where it is and when it changed."""
    source = Path(model).resolve()
    if not source.is_dir():
        raise ValueError(f"--study padding needs a folder as --model, got {model}: examples/convert_gguf.py makes one.")
    state = [str(source), *(f"{path.name} {path.stat().st_mtime_ns}" for path in sorted(source.iterdir()))]
    folder = root / "padding" / sha256("\n".join(state).encode()).hexdigest()[:8] / side
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(model).iterdir():
            if path.is_file() and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path.resolve())
        for path in folder.glob("token*"):
            path.unlink()
        load_tokenizer(model, padding_side=side).save_pretrained(folder)
    return str(folder)


def chosen_studies(own: AblationArguments, model: str, root: Path) -> dict[str, Study]:
    """Raises ValueError for a study that there is not, or cannot be."""
    names = [*STUDIES, "padding"] if "all" in own.study else own.study
    if unknown := [name for name in names if name not in (*STUDIES, *MADE)]:
        raise ValueError(f"--study: {', '.join(unknown)} is none of {', '.join([*STUDIES, *MADE])}, all")
    studies = {}
    for name in names:
        if name == "start":
            if len(own.starts) < 2 or len({Path(start).name for start in own.starts}) < len(own.starts):
                raise ValueError("--study start compares two --starts or more, of different names")
            studies[name] = Study({Path(start).name: {"model": start} for start in own.starts})
        elif name == "padding":
            if not Path(model).is_dir():
                raise ValueError(f"--study padding needs a local folder as --model, not {model}")
            studies[name] = Study({side: {"model": padded_on(side, model, root)} for side in ("right", "left")})
        else:
            studies[name] = STUDIES[name]
    if own.variants is not None:
        known = {variant: None for study in studies.values() for variant in study.variants}
        if unknown := [name for name in own.variants if name not in known]:
            raise ValueError(f"--variants: {', '.join(unknown)} is none of {', '.join(known)}{meant(unknown, known)}")
        for name, study in studies.items():
            studies[name] = replace(study, variants={v: o for v, o in study.variants.items() if v in own.variants})
        studies = {name: study for name, study in studies.items() if study.variants}
    return studies


def meant(unknown: list[str], known: Iterable[str]) -> str:
    """A question after the names that there are not: which of those there are was meant, if some are like them."""
    words = [word.strip() for name in unknown for word in name.split(",")]
    if all(word in known for word in words):  # `causal,bidirectional`
        return f". Names have blanks between them: --variants {shlex.join(words)}"
    close = [get_close_matches(name.replace(",", " with"), known, 1, cutoff=0.5) for name in unknown]
    return f". Did you mean {', '.join(repr(name) for (name,) in close)}?" if all(close) else ""


@dataclass(frozen=True)
class Ranking:
    """Cells of a reranker, by `msmarco.py`, learning rates chosen on about a fifth of the queries."""

    model: str
    plain: dict
    data: tuple[str, str]
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        place = Path(self.data[1]).resolve()
        return place.parent.name if place.stem in ("train", "validation", "dev", "test") else place.stem

    def __call__(self, cell: Cell, folder: Path) -> dict:
        train, judged = self.data
        options = {"model": self.model, **self.plain, **dict(cell.options)}
        options |= {"learning_rate": cell.learning_rate, "seed": cell.seed, "train_data": train, "held_out": 0.2}
        options |= {} if cell.choosing else {"eval_data": judged}
        words = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
        words += self.flags
        finished = folder / "results.json"
        if finished.exists():
            report = json.loads(finished.read_text())
            before, now = by_flag(report["flags"]), by_flag(words)
            if changed := [flag for flag in before | now if before.get(flag) != now.get(flag)]:
                which = ", ".join(f"{flag}: {before.get(flag)} -> {now.get(flag)}" for flag in changed)
                raise ValueError(f"{folder} holds another run ({which}). Choose another --output_dir, or delete it.")
            return report
        script = Path(__file__).parent / "msmarco.py"
        with (folder / "log.txt").open("a") as log:
            words_with_place = [sys.executable, str(script), *words, "--output_dir", str(folder)]
            if subprocess.run(words_with_place, stdout=log, stderr=subprocess.STDOUT).returncode:
                raise ValueError(f"msmarco.py failed, see {folder / 'log.txt'}")
        places = [path for path in folder.glob("*/results.json") if (path.parent.name == "held-out") == cell.choosing]
        if not places:
            raise ValueError(f"msmarco.py measured nothing: {train} has too few queries to set some aside.")
        means = json.loads(places[0].read_text())["means"]
        first = next(iter(means["Gemma Encoder"]))
        names = {"scores": "Gemma Encoder", "majority": "random order", "BM25": "BM25"}
        report = {key: {"judged": {first: means[name][first]}} for key, name in names.items()}
        write(finished, json.dumps({**report, "flags": words}, indent=2))
        return {**report, "flags": words}


class LeftOutQueries:
    """As `LeftOut`, of the queries that a reranker's cells are judged by."""

    def answers(self, folder: Path) -> list[np.ndarray]:
        """What each measure gives each query."""
        places = [path for path in folder.glob("*/results.json") if path.parent.name != "held-out"]
        if not places:
            raise FileNotFoundError(f"{folder} has no values of its queries")
        measures = json.loads(places[0].read_text())["per_query"]["Gemma Encoder"]
        return [np.array([value for _, value in sorted(queries.items())]) for queries in measures.values()]

    def always(self, folder: Path) -> None:
        """Nothing: a ranking has no class that it could always name."""

    def __call__(self, folder: Path) -> np.ndarray:
        """The cell's mean without each part of the queries, see `differences`; empty where there is one query."""
        values = self.answers(folder)[0]
        part = split_in_parts(len(values))
        return np.array([values[part != number].mean() for number in range(part.max() + 1) if len(values) > 1])


def by_flag(words: list[str]) -> dict[str, str]:
    """A command's flags and what follows each: `["--lr", "1", "--bf16"]` is `{"--lr": "1", "--bf16": ""}`."""
    values: dict[str, list[str]] = {}
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if flag:
            values[flag] = [value] if equals else []
        else:
            values[list(values)[-1]].append(value)
    return {flag: " ".join(given) for flag, given in values.items()}


def validation(task: Task, source: Source, options: FineTuningArguments) -> dict[str, Dataset]:
    """The rows that cells are scored on."""
    rows = {split: task.load(source, split) for split in task.validation}
    limit = options.max_eval_samples
    return {split: found.select(range(min(limit or len(found), len(found)))) for split, found in rows.items()}


class Workers:
    """Cells, one after the other here or side by side on Ray, with a bar."""

    def __init__(self, own: AblationArguments, *bench):
        self.count, self.bench, self.pool = 1 if own.finished_only else own.workers, (*bench, own.keep_models), None
        self.finished_only = own.finished_only

    def __call__(self, cells: list[Cell]) -> Iterable[dict | None]:
        if self.count == 1:
            bench = Bench(*self.bench)
            run_each = map(bench.read if self.finished_only else bench.run, cells)
        else:
            run_each = self.on_ray().map(lambda actor, cell: actor.run.remote(cell), cells)
        yield from tqdm(run_each, total=len(cells), desc="Cells", unit=" cells")

    def on_ray(self):
        import ray
        from ray.util import ActorPool

        if self.pool is None:
            folders = [str(Path(__file__).parent.resolve()), str(Path(__file__).parent.parent.resolve())]
            places = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
            quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": places, **quiet}}, log_to_driver=False)
            gpus, cores = ray.cluster_resources().get("GPU", 0), ray.cluster_resources()["CPU"]
            share = cores / self.count
            share = 0 if gpus else share if share < 1 else int(share)  # Ray takes parts of a core, or whole ones
            actor = ray.remote(num_gpus=1 if gpus else 0, num_cpus=share)(BenchElsewhere)
            self.pool = ActorPool([actor.remote(os.getcwd(), *self.bench) for _ in range(self.count)])
        return self.pool


class BenchElsewhere(Bench):
    """In a process of its own, where paths mean what they do here."""

    def __init__(self, working_directory: str, *bench):
        os.chdir(working_directory)
        super().__init__(*bench)


@interruptible()
def main():
    parser = YamlScriptParser((AblationArguments, FineTuningArguments, TrainingArguments), __doc__, HelpOfSuites)
    parser.set_defaults(output_dir="runs/ablations", **COMMON)
    parser.set_defaults(eval_strategy="no", save_strategy="no", disable_tqdm=True, **PLAIN)
    parser.set_defaults(**dict.fromkeys((*OF_TASK, "learning_rate", "seed")))
    known = {name: task for _, tasks in SUITES.values() for name, task in tasks.items()}
    given = parser.parse_args()
    if given.learning_rate is not None or given.seed is not None:
        fail(parser, "--learning_rate and --seed are for glue.py: give --learning_rates and --seeds")
    if not (given.tasks or given.table or given.ranking):
        fail(parser, "give --tasks, --table or --ranking, or several of them")
    if unknown := [name for name in given.tasks if name not in known or known[name].train_on]:
        fail(parser, f"--tasks: {', '.join(unknown)} is none that GLUE or SuperGLUE trains")
    with failing(parser):
        of_user = read_own_table(given)
        first = next(iter([known[name] for name in given.tasks] or known.values()))
        defaults = training_defaults(given.model, given.lora_r is not None, first)
        parser.set_defaults(seed=given.seeds[0], **defaults)
        own, options, args = parser.parse_args_into_dataclasses()
        root = Path(args.output_dir)
        studies = chosen_studies(own, options.model, root)
        if not own.tasks:  # GLUE's average is nothing to stand beside other data
            studies = {name: replace(study, paper={}) for name, study in studies.items()}
        tasks = {name: (known[name], source_of(name, own.data_dir)) for name in own.tasks} | of_user
        options.validate(args)
        validate_runs(args, [task for task, _ in tasks.values()], own.seeds, options)
        if problem := cannot_ablate(own, options, args, studies, tasks):
            fail(parser, problem)
        flags = tuple(shlex.split(own.ranking_flags))
        starts = [options.model, *(own.starts if "start" in studies else [])]
        for task, source in tasks.values():
            for start in starts:
                check_model(task, replace(options, model=start), args)
            for split in ("train", *task.validation):
                task.load(source, split)
        for changed in (changed for study in studies.values() for changed in study.variants.values() if tasks):
            fields = {key: value for key, value in changed.items() if key != "kind"}
            check_model(next(iter(tasks.values()))[0], replace(options, **fields), args)
        sizes = {training_defaults(start, False, first)["learning_rate"] for start in starts}
        if len(sizes) > 1 and own.learning_rates is None:
            fail(
                parser, f"--starts: by their sizes they would have other rates, {sizes}: give --learning_rates for all"
            )
    others = {}
    if own.ranking:
        ranking = Ranking(options.model, {k: getattr(options, k) for k in PLAIN}, tuple(own.ranking), flags)
        others = {ranking.name: ranking}
    rates = own.learning_rates or [factor * defaults["learning_rate"] for factor in (0.5, 1, 2)]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    workers = Workers(
        own, tasks, options, args, root, others, tuple(name for name in OF_TASK if getattr(given, name) is None)
    )
    names = [*tasks, *others]
    wanted = {(name, as_options(o, options)) for s in studies.values() for o in s.variants.values() for name in names}
    runs = len(wanted) * (len(own.seeds) + (len(rates) if len(rates) > 1 else 0))
    kept = "alone " * own.finished_only
    print(f"{runs} runs, to choose rates and then of each seed; those finished in {root} are {kept}read", flush=True)
    try:
        with failing(parser):
            found = run_studies(studies, names, options, rates, own.seeds, workers)
    except KeyboardInterrupt:
        done = len([*root.glob("cells/*/*/*/results.json")])
        how = f"the same command goes on, and reads the {done} cells that are finished in {root}"
        raise KeyboardInterrupt(how) from None
    if not found:
        fail(parser, f"--finished_only: no variant is finished in {root} with these --learning_rates and --seeds")
    studies = {name: study for name, study in studies.items() if name in found}
    left_out = {name: LeftOutQueries() for name in others}
    left_out |= {name: LeftOut(task, validation(task, source, options)) for name, (task, source) in tasks.items()}
    lacking = add_differences(studies, found, root, left_out)
    add_answers(found, root, left_out)
    tables = []
    for name, study in studies.items():
        several = len(own.seeds) > 1
        seeds = f"seed{'s' * several} {', '.join(map(str, own.seeds))}"
        title = f"{name.replace('_', ' ')} (x 100, {'mean ± standard error of ' * several}{seeds})"
        tables.append(score_table(title, study, found[name]))
        if (differences := difference_table(name.replace("_", " "), study, found[name])).count("\n") > 1:
            tables.append(differences)
        if in_words := notes(study, found[name]):
            tables.append(in_words)
        plot(f"{name.replace('_', ' ')}, {Path(options.model).name}, {seeds}", study, found[name], root / f"{name}.png")
    report = {"studies": found, "seeds": own.seeds, "learning_rates": rates, "torch": torch.__version__, **provenance()}
    write(root / "results.json", json.dumps(report, indent=2))
    write(root / "results.md", "\n\n".join(tables))
    print("\n" + "\n\n".join(tables) + f"\n\nTables, plots and cells are in {root}")
    if lacking:
        print(f"{len(lacking)} cells kept no predictions to compare; delete them to run them again: {lacking[0]} ...")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
