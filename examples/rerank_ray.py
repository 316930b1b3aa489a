"""Scores passages for queries on many machines, or many GPUs of one, with Ray Data.

    python examples/rerank_ray.py --model my-ranker --input pairs/ --output scored/ --workers 8 --gpus_per_worker 1

--input is a .jsonl or .parquet file, or a folder of one kind, with columns `query` and `passage`; --output a folder of
Parquet with the same columns and `score`, in no order: have an id in the rows. It runs on the Ray cluster it is started
on (`ray job submit`, RAY_ADDRESS), or else on this machine; every machine needs this package, and sees the model and
the folders by the same path. A worker that dies is replaced and its rows are scored again; what it had not handed on
is lost with it, so every row is in the output once. The output appears when all of it is there; an interrupted run
starts anew, unlike `rerank.py`'s.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pandas
import ray
import torch

from modeling_gemma_encoder._scripts.command_line import ScriptParser, fail, failing, interruptible
from modeling_gemma_encoder.ranking.scoring import ScoringArguments, choose, load_ranker, score_pairs

READERS = {".jsonl": "read_json", ".json": "read_json", ".parquet": "read_parquet"}


@dataclass(kw_only=True)
class RayArguments(ScoringArguments):
    COUNTS: ClassVar = (*ScoringArguments.COUNTS, "workers", "rows_per_batch")

    input: str = field(metadata={"help": "A .jsonl or .parquet file, or a folder of such."})
    output: str = field(metadata={"help": "A folder that is not there yet."})
    workers: int = field(default=2, metadata={"help": "Processes, each with the model."})
    gpus_per_worker: float = field(
        default=0.0, metadata={"help": "1 where there are GPUs; 0.5 puts two workers on one."}
    )
    cpus_per_worker: float = field(
        default=1.0,
        metadata={"help": "Cores of each, and threads where there is no GPU. Reading and writing need one too."},
    )
    rows_per_batch: int = field(default=1000, metadata={"help": "Rows handed to a worker together."})

    def problem(self) -> str | None:
        if Path(self.output).exists():
            return f"--output {self.output} is there already: delete it, or name another"
        if not Path(self.input).exists():
            return f"--input {self.input} does not exist"
        if self.device is not None:
            return "--device: workers have the GPUs that --gpus_per_worker gives them, or none"
        return super().problem()


class Scorer:
    """A worker: loads the model once, and scores the batches it is handed."""

    def __init__(self, args: RayArguments):
        if args.gpus_per_worker == 0:
            torch.set_num_threads(max(1, int(args.cpus_per_worker)))
        device = None if args.gpus_per_worker else "cpu"
        self.args, (self.model, self.tokenizer) = args, load_ranker(args.model, args.dtype, device)

    def __call__(self, rows: pandas.DataFrame) -> pandas.DataFrame:
        pairs = list(zip(rows["query"], rows["passage"], strict=True))
        if wrong := next((pair for pair in pairs if not all(isinstance(text, str) for text in pair)), None):
            raise ValueError(f"{wrong!r} are not two texts")
        scores = score_pairs(self.model, self.tokenizer, pairs, self.args.max_length, self.args.tokens_per_batch)
        return rows.assign(score=scores)


def read(path: Path) -> ray.data.Dataset:
    """Rows of a file or folder. Raises ValueError where it holds other files or columns."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    kinds = {READERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"--input {path} must hold files of one kind of {', '.join(READERS)}.")
    rows = getattr(ray.data, kinds.pop())([str(file) for file in files])
    columns = rows.schema().names
    if missing := {"query", "passage"} - set(columns):
        raise ValueError(f"--input {path} has the columns {', '.join(columns)}: no {' and no '.join(sorted(missing))}.")
    if "score" in columns:
        raise ValueError(f"--input {path} has a column `score` already, which would be overwritten.")
    return rows


@interruptible()
def main():
    parser = ScriptParser(RayArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]
    if problem := args.problem():
        fail(parser, problem)
    ray.init(ignore_reinit_error=True)
    needed, there = args.workers * args.cpus_per_worker + 1, ray.cluster_resources().get("CPU", 0)
    if needed > there:  # Ray would wait for ever
        fail(
            parser,
            f"--workers {args.workers} of --cpus_per_worker {args.cpus_per_worker:g} and a core to read and write are "
            f"{needed:g} cores; the cluster has {there:g}.",
        )
    needed, there = args.workers * args.gpus_per_worker, ray.cluster_resources().get("GPU", 0)
    if needed > there:
        fail(
            parser,
            f"--workers {args.workers} of --gpus_per_worker {args.gpus_per_worker:g} are {needed:g} GPUs; the cluster "
            f"has {there:g}.",
        )
    with failing(parser):
        rows = read(Path(args.input))
        args.dtype, _ = choose(args.dtype, None if args.gpus_per_worker else "cpu")  # the same for all workers
    total = rows.count()
    # A batch is what a worker takes, loses when it dies, and is asked for again: smaller blocks than a file's.
    blocks = max(math.ceil(total / args.rows_per_batch), args.workers)
    scored = rows.repartition(blocks).map_batches(
        Scorer,
        fn_constructor_args=(args,),
        batch_size=args.rows_per_batch,
        batch_format="pandas",
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker,
    )
    part = Path(args.output + ".part")
    shutil.rmtree(part, ignore_errors=True)
    scored.write_parquet(str(part.absolute()))
    written = ray.data.read_parquet(str(part.absolute())).count()
    if written != total:
        raise SystemExit(f"{written:,} rows were written of {total:,}: {part} is not complete")
    part.replace(args.output)
    print(f"Scores of {total:,} rows are in {args.output}")


if __name__ == "__main__":
    main()
