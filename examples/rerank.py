"""Score passages for queries: of one query on the command line, or of a file of any length.

    # One query
    python examples/rerank.py --model my-ranker --query "how do cats purr" --passages "They vibrate." "Dogs bark."

    # Files of pairs
    python examples/rerank.py --model my-ranker --input pairs.jsonl --output scored.jsonl
    python examples/rerank.py --model my-ranker --input top1000.tsv --output scored.tsv

    # A ranking in TREC's format
    python examples/rerank.py --model my-ranker --data trec_dl/dl2020 --run bm25.run --output reranked.run

| input | a row | output |
| --- | --- | --- |
| .jsonl | `query` and `passage`, or `passages`, a list | the row, and `score` or `scores` |
| .csv | columns `query`, `passage`, or --pair_columns, and others | the row, and `score` |
| .tsv | query, passage; or qid, pid, query, passage, as MS MARCO's top 1000 | the row, and the score |
| --data and --run | a folder with texts, or `folder:split`, and a TREC run over it | a TREC run |

Scores are logits; higher is better. Rows keep their order. After every --rows_at_once rows, the
scored ones are on disk in <output>.rows. If the script is interrupted, the same command continues
after them; no row is lost or written twice. <output> appears when it is complete.
<output>.rows.json beside it has what it was made with: the same command changes nothing then, and
another one is refused.
"""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_gemma_encoder._scripts.command_line import ScriptParser, failing, interruptible
from modeling_gemma_encoder._scripts.files import read_lines, write
from modeling_gemma_encoder._scripts.tables import read_table
from modeling_gemma_encoder.ranking.collection import check_ids
from modeling_gemma_encoder.ranking.reading import name_and_split, read_texts
from modeling_gemma_encoder.ranking.scoring import ScoringArguments, choose, load_ranker, score_pairs
from modeling_gemma_encoder.ranking.trec import TrecRun, ranked, read_run, write_run
from modeling_gemma_encoder.templates import encode_pairs

SUFFIXES = (".jsonl", ".csv", ".tsv")  # files of pairs
Row = dict | list[str]  # of a .jsonl or .csv file, or of others
Pairs = list[tuple[str, str]]  # query and passage


@dataclass(kw_only=True)
class RerankArguments(ScoringArguments):
    """Options of what is scored, and where the scores go."""

    COUNTS: ClassVar = (*ScoringArguments.COUNTS, "rows_at_once", "depth")

    query: str | None = field(default=None, metadata={"help": "One query. Its --passages are printed, the best first."})
    passages: list[str] | None = field(default=None, metadata={"help": "Texts, for --query."})
    input: str | None = field(default=None, metadata={"help": "A .jsonl, .csv or .tsv file."})
    data: str | None = field(default=None, metadata={"help": "A folder, or `folder:split`, with texts, for --run."})
    run: str | None = field(default=None, metadata={"help": "A ranking in TREC's format."})
    depth: int | None = field(default=None, metadata={"help": "Score only so many of the run's best passages."})
    output: str | None = field(default=None, metadata={"help": "Where to write scores."})
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage"],
        metadata={"help": "The names of these columns in a .csv or .jsonl file."},
    )
    rows_at_once: int = field(default=1000, metadata={"help": "Rows that are scored together and then written."})

    def validate(self) -> None:
        """Raise ValueError if options are missing, contradict each other, or have impossible
        values."""
        ways = {"--query": self.query, "--input": self.input, "--run": self.run}
        given = [flag for flag, value in ways.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(ways)}; got {' and '.join(given) or 'none'}.")
        if self.query is not None and not self.passages:
            raise ValueError("--query needs --passages, the texts to rank.")
        if self.run and not self.data:
            raise ValueError("--run needs --data, the folder with its queries and passages.")
        if self.data and not Path(name_and_split(self.data)[0]).is_dir():
            raise ValueError(
                f"--data {self.data} is not a folder: give one with queries and passages, `folder` or `folder:split`."
            )
        if self.query is None and not self.output:
            raise ValueError("--output is needed, the file for the scores.")
        self._validate_files()
        if self.query is not None and self.output:
            raise ValueError("--output is for --input and --run; the scores of --query are printed.")
        if self.depth is not None and not self.run:
            raise ValueError(f"--depth {self.depth} is of a run; give --run.")
        super().validate()

    def _validate_files(self) -> None:
        """Raise ValueError if the names of files do not fit what they hold, or --pair_columns do
        not fit the input."""
        source, output = Path(self.input or "").suffix, Path(self.output or "").suffix
        if self.input and source not in SUFFIXES:
            raise ValueError(f"--input must be a .jsonl, .csv or .tsv file; got {self.input}.")
        if self.input and output in SUFFIXES and output != source:
            raise ValueError(
                f"--output {self.output} will have the format of --input {self.input}; give it the ending {source}."
            )
        if len(self.pair_columns) != 2:
            given = " ".join(self.pair_columns)
            raise ValueError(f"--pair_columns must name two columns, of query and passage; got {given}.")
        if self.pair_columns != ["query", "passage"] and source not in (".csv", ".jsonl"):
            raise ValueError("--pair_columns are of a .csv or .jsonl --input.")
        if self.run and output in SUFFIXES:
            raise ValueError(
                f"--output {self.output} would hold a TREC run, as --run does; give it another ending, such as .run."
            )


@dataclass(frozen=True)
class Output:
    """Hold the places of an output: the complete file, the rows that are scored so far, and how
    they were made."""

    path: Path

    @property
    def rows(self) -> Path:
        return self.path.with_name(self.path.name + ".rows")

    @property
    def facts(self) -> Path:
        return self.path.with_name(self.path.name + ".rows.json")

    @property
    def files(self) -> set[Path]:
        """Return all files that are written, for a while or for good."""
        ends = ("", ".part", ".rows", ".rows.json", ".rows.json.part")
        return {self.path.resolve().with_name(self.path.name + end) for end in ends}


# 1. Read rows and their pairs, and write rows with their scores


def rows_of(args: RerankArguments) -> Iterator[tuple[Row, Pairs]]:
    """Yield the rows of the input in its order, with their pairs."""
    if args.input and args.input.endswith(".csv"):
        yield from read_csv(Path(args.input), args.pair_columns)
    elif args.input:
        for line, where in read_lines(Path(args.input)):
            yield read_row(line, where, args.pair_columns)
    else:
        (queries, passages), trec_run = read_texts(args.data), read_run(Path(args.run))
        check_ids("run", trec_run, queries, passages, args.run)
        for qid, scores in trec_run.items():
            for pid in ranked(scores)[: args.depth]:
                yield [qid, pid], [(queries[qid], passages[pid])]


def read_row(line: str, where: str, columns: list[str]) -> tuple[Row, Pairs]:
    """Return a line's row and its pairs; raise ValueError, with the place, if it has none."""
    if where.rpartition(", line ")[0].endswith(".tsv"):
        row = line.split("\t")
        if len(row) not in (2, 4):
            raise ValueError(
                f"{where}: a row must have query, passage or qid, pid, query, passage; got {len(row)} columns."
            )
        return row, [(row[-2], row[-1])]
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}") from error
    return pairs_of(row if isinstance(row, dict) else {}, where, columns)


def pairs_of(row: dict, where: str, columns: list[str]) -> tuple[dict, Pairs]:
    """Return a row and its pairs; raise ValueError, with the place, if it lacks a text or has a
    score."""
    query, passage = columns
    passages = passages_of(row, passage)
    passages = passages if isinstance(passages, list) else [passages]
    if {"score", "scores"} & row.keys():
        raise ValueError(f"{where}: the row has a score already, which would be overwritten; remove it.")
    if not all(isinstance(text, str) for text in [row.get(query), *passages]):
        raise ValueError(f"{where}: a row has a text `{query}`, and a text `{passage}` or a list of them, `passages`.")
    if not passages:
        raise ValueError(f"{where}: the query {row[query]!r} has no passages.")
    return row, [(row[query], text) for text in passages]


def passages_of(row: dict, column: str) -> str | list[str] | None:
    """Return the passage or the passages of a row."""
    return row[column] if column in row else row.get("passages")


def read_csv(path: Path, columns: list[str]) -> Iterator[tuple[dict, Pairs]]:
    """Yield the rows below a header and their pairs; a text in quotes may have several lines."""
    names = None
    for row, where in read_table(path):
        if names is not None:
            yield pairs_of(dict(zip(names, row, strict=True)), where, columns)
            continue
        names = row
        if missing := {*columns} - {*names}:
            lacking = " and no ".join(sorted(missing))
            raise ValueError(
                f"{path}: the first line names {', '.join(names)}, and no {lacking}: --pair_columns says what they are "
                "called."
            )


def write_row(row: Row, scores: list[float], columns: list[str]) -> str:
    """Return the line of a row with its score or scores."""
    if isinstance(row, list):
        return "\t".join([*row, repr(scores[0])])
    several = isinstance(passages_of(row, columns[1]), list)
    scored = {"scores": scores} if several else {"score": scores[0]}
    return json.dumps({**row, **scored}, ensure_ascii=False)


def write_csv(rows: Path, output: Path) -> None:
    """Write rows, each a line of JSON, below a header; the file appears when it is complete."""
    part = output.with_name(output.name + ".part")
    with rows.open(encoding="utf-8") as lines, part.open("w", encoding="utf-8", newline="") as file:
        parsed = map(json.loads, lines)
        first = next(parsed)
        writer = csv.DictWriter(file, first.keys())
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(parsed)
    part.replace(output)


def as_trec_run(rows: Path) -> TrecRun:
    """Return the ranking in a file of query id, passage id and score."""
    trec_run = defaultdict(dict)
    for line, _ in read_lines(rows):
        qid, pid, score = line.split("\t")
        trec_run[qid][pid] = float(score)
    return trec_run


# 2. Find out what an earlier command has left


def describe(args: RerankArguments, output: Output) -> dict:
    """Return what the scores depend on: the options, and the state of all files that are read."""
    facts = {key: value for key, value in asdict(args).items() if key not in ("tokens_per_batch", "device")}
    for place in (args.model, args.data, args.input or args.run):
        facts[f"files of {place}"] = stamp(Path(name_and_split(place)[0]), output) if place else None
    return facts


def stamp(path: Path, output: Output) -> dict[str, list[int]]:
    """
    Return the size and the time of a file, or of each file in a folder but those of the output.

    A repository on the Hub has none, and needs none, as it has a revision.
    """
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    found = {file.name: file.stat() for file in files if file.exists() and file.resolve() not in output.files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def refuse_another(facts: dict, output: Output) -> None:
    """Raise ValueError if the scores that are there, all or some, were made of something else."""
    before = json.loads(output.facts.read_text())
    complete = output.path.exists()
    there = output.path if complete else output.rows
    # A complete output is the same whatever steps it was written in.
    free = ("output", "rows_at_once") if complete else ()
    changed = ", ".join(name for name in facts if name not in free and before.get(name) != facts[name])
    if changed and there.exists():
        made = "made" if complete else "begun"
        raise ValueError(f"{there} was {made} otherwise ({changed}): delete it, or name another --output.")


def keep_whole(rows: Path, rows_at_once: int) -> int:
    """Cut off what follows the last complete step of an interrupted output, and return the number
    of rows left."""
    if not rows.exists():
        return 0
    ends, place = [], 0
    with rows.open("rb") as file:
        for line in file:
            place += len(line)
            if line.endswith(b"\n"):
                ends.append(place)
    done = len(ends) // rows_at_once * rows_at_once
    os.truncate(rows, ends[done - 1] if done else 0)
    return done


# 3. Score what is left


def rerank(args: RerankArguments) -> int:
    """Score what is left of the input, and return the number of its rows."""
    output = Output(Path(args.output))
    if output.path.exists() and not output.facts.exists():
        raise ValueError(
            f"--output {output.path} is there already, without {output.facts.name}: delete it, or name another."
        )
    sizes, queries = check_rows(args)
    args.dtype, args.device = choose(args.dtype, args.device)
    facts = describe(args, output)
    if output.facts.exists():
        refuse_another(facts, output)
    if output.path.exists():
        print("Nothing is left to do")
        return len(sizes)
    model, tokenizer = load_ranker(args.model, args.dtype, args.device)
    max_length = min(args.max_length or tokenizer.model_max_length, model.config.max_position_embeddings)
    encode_pairs(tokenizer, [(query, "text") for query in queries], max_length)  # raises for a query that is too long
    output.path.parent.mkdir(parents=True, exist_ok=True)
    done = keep_whole(output.rows, args.rows_at_once) if output.facts.exists() else 0
    write(output.facts, json.dumps(facts, indent=2))
    if done:
        print(f"Going on after {done:,} of {len(sizes):,} rows")
    score_rows(args, (model, tokenizer), output.rows, sizes, done)
    finish(args, output)
    return len(sizes)


def check_rows(args: RerankArguments) -> tuple[list[int], set[str]]:
    """Return the number of pairs of each row, and all queries; raise ValueError if there is none or
    a bad one."""
    sizes, queries = [], set()
    for _, pairs in rows_of(args):  # a bad row is found now and not after hours
        sizes.append(len(pairs))
        queries.update(query for query, _ in pairs)
    if not sizes:
        raise ValueError(f"{args.input or args.run} has no rows.")
    return sizes, queries


def score_rows(
    args: RerankArguments,
    ranker: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    path: Path,
    sizes: list[int],
    done: int,
) -> None:
    """Append the rows after the first `done`, with their scores, to a file, --rows_at_once at a
    time."""
    rows = islice(rows_of(args), done, None)
    with (
        path.open("a" if done else "w", encoding="utf-8", newline="\n") as file,
        tqdm(total=sum(sizes), initial=sum(sizes[:done]), desc="Scoring", unit=" pairs") as progress,
    ):
        while step := list(islice(rows, args.rows_at_once)):
            pairs = [pair for _, of_row in step for pair in of_row]
            try:
                scores = score_pairs(*ranker, pairs, args.max_length, args.tokens_per_batch, progress)
            except KeyboardInterrupt:
                how = f"{done:,} of {len(sizes):,} rows are in {path}, and the same command goes on after them"
                raise KeyboardInterrupt(how) from None
            left = iter(scores.tolist())
            lines = (write_row(row, list(islice(left, len(of_row))), args.pair_columns) for row, of_row in step)
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())  # on disk, also if the machine stops
            done += len(step)


def finish(args: RerankArguments, output: Output) -> None:
    """Make the complete output of all scored rows."""
    if args.run:
        write_run(as_trec_run(output.rows), output.path, tag=Path(args.model).name)
        output.rows.unlink()
    elif args.input.endswith(".csv"):
        write_csv(output.rows, output.path)
        output.rows.unlink()
    else:
        output.rows.replace(output.path)


@interruptible()
def main():
    parser = ScriptParser(RerankArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]
    with failing(parser):
        args.validate()
        if args.query is None:
            print(f"Scores of {rerank(args):,} rows are in {args.output}")
            return
        model, tokenizer = load_ranker(args.model, args.dtype, args.device)
        pairs = [(args.query, passage) for passage in args.passages]
        scores = score_pairs(model, tokenizer, pairs, args.max_length, args.tokens_per_batch)
    for place in (-scores).argsort(kind="stable"):
        print(f"{scores[place]:9.4f}  {args.passages[place]}")


if __name__ == "__main__":
    main()
