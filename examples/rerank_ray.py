"""Score passages for queries on many machines, or on many GPUs of one machine, with Ray Data.

    python examples/rerank_ray.py --model my-ranker --input pairs/ --output scored/ --workers 8 --gpus_per_worker 1

--input is a .jsonl or .parquet file, or a folder of one kind, with columns `query` and `passage`.
--output is a folder of Parquet files with the same columns and `score`, in no order, so that rows
should have an id. The script runs on the Ray cluster on which it is started (`ray job submit`,
RAY_ADDRESS), or else on this machine. Every machine needs this package, and the model and the
folders under the same paths.

A worker that dies is replaced, and the rows that it had not passed on are scored again, so that
every row is in the output once. The output appears when it is complete. Unlike `rerank.py`, an
interrupted run starts anew.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pandas
import ray
import torch

from modeling_gemma_encoder._scripts.command_line import ScriptParser, failing, interruptible
from modeling_gemma_encoder.ranking.scoring import ScoringArguments, choose, load_ranker, score_pairs

READERS = {".jsonl": "read_json", ".json": "read_json", ".parquet": "read_parquet"}


@dataclass(kw_only=True)
class RayArguments(ScoringArguments):
    """Options of what is scored, and of the workers."""

    COUNTS: ClassVar = (*ScoringArguments.COUNTS, "workers", "rows_per_batch")

    input: str = field(metadata={"help": "A .jsonl or .parquet file, or a folder of such files."})
    output: str = field(metadata={"help": "A folder that does not exist yet."})
    workers: int = field(default=2, metadata={"help": "Processes, each with the model."})
    gpus_per_worker: float = field(
        default=0.0, metadata={"help": "1 where there are GPUs; 0.5 puts two workers on one."}
    )
    cpus_per_worker: float = field(
        default=1.0,
        metadata={"help": "Cores of each worker, and its threads without a GPU. Reading and writing need one too."},
    )
    rows_per_batch: int = field(default=1000, metadata={"help": "Rows that a worker takes at a time."})

    def validate(self) -> None:
        """Raise ValueError if an option has an impossible value."""
        if Path(self.output).exists():
            raise ValueError(f"--output {self.output} is there already: delete it, or name another.")
        if not Path(self.input).exists():
            raise ValueError(f"--input {self.input} does not exist.")
        if self.device is not None:
            raise ValueError("--device does nothing here; workers have the GPUs of --gpus_per_worker, or none.")
        super().validate()

    def validate_resources(self, cluster: dict[str, float]) -> None:
        """Raise ValueError if the cluster has too few cores or GPUs, for which Ray would wait
        without end."""
        needed, available = self.workers * self.cpus_per_worker + 1, cluster.get("CPU", 0)
        if needed > available:
            raise ValueError(
                f"--workers {self.workers} of --cpus_per_worker {self.cpus_per_worker:g}, and a core to read and "
                f"write, need {needed:g} cores; the cluster has {available:g}."
            )
        needed, available = self.workers * self.gpus_per_worker, cluster.get("GPU", 0)
        if needed > available:
            raise ValueError(
                f"--workers {self.workers} of --gpus_per_worker {self.gpus_per_worker:g} need {needed:g} GPUs; the "
                f"cluster has {available:g}."
            )


class Scorer:
    """Load the model once in a worker, and score the batches that it is given."""

    def __init__(self, args: RayArguments):
        if args.gpus_per_worker == 0:
            torch.set_num_threads(max(1, int(args.cpus_per_worker)))
        device = None if args.gpus_per_worker else "cpu"
        self.args, (self.model, self.tokenizer) = args, load_ranker(args.model, args.dtype, device)

    def __call__(self, rows: pandas.DataFrame) -> pandas.DataFrame:
        pairs = list(zip(rows["query"], rows["passage"], strict=True))
        if wrong := next((pair for pair in pairs if not all(isinstance(text, str) for text in pair)), None):
            raise ValueError(f"`query` and `passage` must be texts; got {wrong!r}.")
        scores = score_pairs(self.model, self.tokenizer, pairs, self.args.max_length, self.args.tokens_per_batch)
        return rows.assign(score=scores)


# 1. Read


def read(path: Path) -> ray.data.Dataset:
    """Return the rows of a file or folder; raise ValueError if it has other kinds of files or
    columns."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    kinds = {READERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"--input {path} must hold files of one kind of {', '.join(READERS)}.")
    rows = getattr(ray.data, kinds.pop())([str(file) for file in files])
    columns = rows.schema().names
    if missing := {"query", "passage"} - set(columns):
        raise ValueError(f"--input {path} has the columns {', '.join(columns)}: no {' and no '.join(sorted(missing))}.")
    if "score" in columns:
        raise ValueError(f"--input {path} has a column `score` already, which would be overwritten; rename it.")
    return rows


# 2. Score


def score(rows: ray.data.Dataset, total: int, args: RayArguments) -> ray.data.Dataset:
    """Return the rows with their scores, which the workers compute when they are written."""
    # A worker takes a block at a time, and loses it when it dies, so that blocks are smaller than a
    # file's.
    blocks = max(math.ceil(total / args.rows_per_batch), args.workers)
    return rows.repartition(blocks).map_batches(
        Scorer,
        fn_constructor_args=(args,),
        batch_size=args.rows_per_batch,
        batch_format="pandas",
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker,
    )


# 3. Write


def write_whole(scored: ray.data.Dataset, total: int, output: Path) -> None:
    """Write the rows beside the output, count them, and put them into its place; exit if some are
    missing."""
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    scored.write_parquet(str(part.absolute()))
    written = ray.data.read_parquet(str(part.absolute())).count()
    if written != total:
        raise SystemExit(f"Only {written:,} of {total:,} rows were written; {part} is not complete.")
    part.replace(output)


@interruptible()
def main():
    parser = ScriptParser(RayArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]
    with failing(parser):
        args.validate()
    ray.init(ignore_reinit_error=True)
    with failing(parser):
        args.validate_resources(ray.cluster_resources())
        rows = read(Path(args.input))
        # Chosen here, so that it is the same for all workers.
        args.dtype, _ = choose(args.dtype, None if args.gpus_per_worker else "cpu")
    total = rows.count()
    write_whole(score(rows, total, args), total, Path(args.output))
    print(f"Scores of {total:,} rows are in {args.output}")


if __name__ == "__main__":
    main()
