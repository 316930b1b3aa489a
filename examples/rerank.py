"""Scores passages for queries: one query from the command line, or a file, however long.

    python examples/rerank.py --model my-ranker --query "how do cats purr" --passages "They vibrate." "Dogs bark."
    python examples/rerank.py --model my-ranker --input pairs.jsonl --output scored.jsonl
    python examples/rerank.py --model my-ranker --input top1000.tsv --output scored.tsv
    python examples/rerank.py --model my-ranker --data trec_dl/dl2020 --run bm25.run --output reranked.run

| input | a row | output |
| --- | --- | --- |
| .jsonl | `query` and `passage`, or `passages`, a list | the row, and `score` or `scores` |
| .csv | columns `query`, `passage`, or --pair_columns, and others | the row, and `score` |
| .tsv | query, passage; or qid, pid, query, passage, as MS MARCO's top 1000 | the row, and the score |
| --data and --run | a TREC run file over a folder, or `folder:split`, with queries and passages | a TREC run file |

Scores are logits, higher is better. Rows come out in their order. Batches are of like length and hold
--tokens_per_batch tokens. Every --rows_at_once rows what is scored is on disk, in <output>.rows: after an interruption
the same command goes on there, and nothing is lost or written twice. <output> is there when all of it is, and beside
it <output>.rows.json, what it was made with: the same command again changes nothing, another is refused.
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

from modeling_gemma_encoder._scripts.command_line import ScriptParser, fail, failing, interruptible
from modeling_gemma_encoder._scripts.files import read_lines, write
from modeling_gemma_encoder._scripts.tables import read_table
from modeling_gemma_encoder.ranking.collection import check_ids, name_and_split, read_texts
from modeling_gemma_encoder.ranking.scoring import ScoringArguments, choose, load_ranker, score_pairs
from modeling_gemma_encoder.ranking.trec import TrecRun, ranked, read_run, write_run
from modeling_gemma_encoder.templates import encode_pairs


@dataclass(kw_only=True)
class RerankArguments(ScoringArguments):
    COUNTS: ClassVar = (*ScoringArguments.COUNTS, "rows_at_once", "depth")

    query: str | None = field(default=None, metadata={"help": "One query, whose --passages are printed, best first."})
    passages: list[str] | None = field(default=None, metadata={"help": "Texts, for --query."})
    input: str | None = field(default=None, metadata={"help": "A .jsonl, .csv or .tsv file."})
    data: str | None = field(default=None, metadata={"help": "A folder, or `folder:split`, with texts, for --run."})
    run: str | None = field(default=None, metadata={"help": "A TREC run file."})
    depth: int | None = field(default=None, metadata={"help": "The best so many of the run only."})
    output: str | None = field(default=None, metadata={"help": "Where to write scores."})
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage"], metadata={"help": "As a .csv or .jsonl file calls them."}
    )
    rows_at_once: int = field(default=1000, metadata={"help": "Rows scored together and then written."})

    def problem(self) -> str | None:
        ways = {"--query": self.query, "--input": self.input, "--run": self.run}
        given = [flag for flag, value in ways.items() if value is not None]
        if len(given) != 1:
            return f"give one of {', '.join(ways)}, not {' and '.join(given) or 'none'}"
        if self.query is not None and not self.passages:
            return "--query needs --passages: there is nothing to rank"
        if self.run and not self.data:
            return "--run needs --data, the folder with its queries and passages"
        if self.data and not Path(name_and_split(self.data)[0]).is_dir():
            return f"--data {self.data} is no folder: give one with queries and passages, as `folder` or `folder:split`"
        if self.query is None and not self.output:
            return "--output is needed"
        if self.input and Path(self.input).suffix not in (".jsonl", ".csv", ".tsv"):
            return f"--input {self.input} is neither .jsonl nor .csv nor .tsv"
        ends = {Path(self.input).suffix, Path(self.output).suffix} if self.input and self.output else set()
        if len(ends & {".jsonl", ".csv", ".tsv"}) > 1:
            return f"--output {self.output} would hold what --input {self.input} does: end it alike"
        if len(self.pair_columns) != 2:
            return f"--pair_columns are two, of query and passage, got {' '.join(self.pair_columns)}"
        if self.pair_columns != ["query", "passage"] and not (self.input or "").endswith((".csv", ".jsonl")):
            return "--pair_columns are of a .csv or .jsonl --input"
        if self.run and self.output and Path(self.output).suffix in (".jsonl", ".csv", ".tsv"):
            return f"--output {self.output} would hold a TREC run, as --run: name it so"
        if self.query is not None and self.output:
            return "--output is for --input and --run; what --query finds is printed"
        if self.depth is not None and not self.run:
            return f"--depth {self.depth} is of a run: give --run"
        return super().problem()


# 1. Rows: their pairs, and what is written of them


def read_row(line: str, where: str, columns: list[str]) -> tuple[dict | list, list[tuple[str, str]]]:
    """A line's row, and its (query, passage) pairs. Raises ValueError that says where and what is wrong."""
    if where.rpartition(", line ")[0].endswith(".tsv"):
        row = line.split("\t")
        if len(row) not in (2, 4):
            raise ValueError(f"{where}: {len(row)} columns, not query, passage or qid, pid, query, passage")
        return row, [(row[-2], row[-1])]
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}") from error
    return pairs_of(row if isinstance(row, dict) else {}, where, columns)


def pairs_of(row: dict, where: str, columns: list[str]) -> tuple[dict, list[tuple[str, str]]]:
    query, passage = columns
    passages = passages_of(row, passage)
    passages = passages if isinstance(passages, list) else [passages]
    if {"score", "scores"} & row.keys():
        raise ValueError(f"{where}: the row has a score already, which would be overwritten")
    if not all(isinstance(text, str) for text in [row.get(query), *passages]):
        raise ValueError(f"{where}: a row has a text `{query}`, and a text `{passage}` or a list of them, `passages`")
    if not passages:
        raise ValueError(f"{where}: the query {row[query]!r} has no passages")
    return row, [(row[query], text) for text in passages]


def passages_of(row: dict, column: str) -> str | list[str] | None:
    return row[column] if column in row else row.get("passages")


def write_row(row: dict | list, scores: list[float], columns: list[str]) -> str:
    if isinstance(row, list):
        return "\t".join([*row, repr(scores[0])])
    many = isinstance(passages_of(row, columns[1]), list)
    return json.dumps({**row, **({"scores": scores} if many else {"score": scores[0]})}, ensure_ascii=False)


def read_csv(path: Path, columns: list[str]) -> Iterator[tuple[dict, list[tuple[str, str]]]]:
    """Rows under a header, and their pairs; a text in quotes may have several lines."""
    names = None
    for row, where in read_table(path):
        if names is not None:
            yield pairs_of(dict(zip(names, row, strict=True)), where, columns)
            continue
        names = row
        if missing := {*columns} - {*names}:
            raise ValueError(
                f"{path}: the first line names {', '.join(names)}, and no {' and no '.join(sorted(missing))}: "
                "--pair_columns"
            )


def write_csv(part: Path, output: Path) -> None:
    """The rows of `part`, a JSON object a line, under a header: whole, or not at all."""
    whole = output.with_name(output.name + ".part")
    with part.open(encoding="utf-8") as lines, whole.open("w", encoding="utf-8", newline="") as file:
        rows = map(json.loads, lines)
        first = next(rows)
        writer = csv.DictWriter(file, first.keys())
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(rows)
    whole.replace(output)


def rows_of(args: RerankArguments) -> Iterator[tuple[dict | list, list[tuple[str, str]]]]:
    """Rows of the input, in its order."""
    if args.input and args.input.endswith(".csv"):
        yield from read_csv(Path(args.input), args.pair_columns)
    elif args.input:
        for line, where in read_lines(Path(args.input)):
            yield read_row(line, where, args.pair_columns)
    else:
        (queries, passages), run = read_texts(args.data), read_run(Path(args.run))
        check_ids("run", run, queries, passages, args.run)
        for qid, scores in run.items():
            for pid in ranked(scores)[: args.depth]:
                yield [qid, pid], [(queries[qid], passages[pid])]


# 2. The input, from where it was left


def rerank(args: RerankArguments) -> int:
    """Scores what is left of the input, and returns the number of its rows."""
    output = Path(args.output)
    part, facts = output.with_name(output.name + ".rows"), output.with_name(output.name + ".rows.json")
    if output.exists() and not facts.exists():
        raise ValueError(f"--output {output} is there already, without {facts.name}: delete it, or name another.")
    sizes, queries = [], set()
    for _, pairs in rows_of(args):  # a bad row is found now, not after hours
        sizes.append(len(pairs))
        queries.update(query for query, _ in pairs)
    if not sizes:
        raise ValueError(f"{args.input or args.run} has no rows.")
    args.dtype, args.device = choose(args.dtype, args.device)
    began = {key: value for key, value in asdict(args).items() if key not in ("tokens_per_batch", "device")}
    for place in (args.model, args.data, args.input or args.run):  # what the scores depend on
        began[f"files of {place}"] = stamp(Path(name_and_split(place)[0]), output) if place else None
    if facts.exists():
        refuse_another(began, json.loads(facts.read_text()), output, part)
    if output.exists():
        print("Nothing is left to do")
        return len(sizes)
    model, tokenizer = load_ranker(args.model, args.dtype, args.device)
    positions = model.config.max_position_embeddings
    max_length = min(args.max_length or tokenizer.model_max_length, positions)
    encode_pairs(tokenizer, [(query, "text") for query in queries], max_length)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = keep_whole(part, args.rows_at_once) if facts.exists() else 0
    write(facts, json.dumps(began, indent=2))
    if done:
        print(f"Going on after {done:,} of {len(sizes):,} rows")
    score_rows(args, model, tokenizer, part, sizes, done)
    if args.run:
        write_run(as_run(part), output, tag=Path(args.model).name)
        part.unlink()
    elif args.input.endswith(".csv"):
        write_csv(part, output)
        part.unlink()
    else:
        part.replace(output)
    return len(sizes)


def refuse_another(began: dict, before: dict, output: Path, part: Path) -> None:
    """Raises ValueError where scores that are there, all or some, were made of something else, or otherwise."""
    there = output if output.exists() else part
    free = ("output", "rows_at_once") if there is output else ()
    changed = ", ".join(name for name in began if name not in free and before.get(name) != began[name])
    if changed and there.exists():
        made = "made" if there is output else "begun"
        raise ValueError(f"{there} was {made} otherwise ({changed}): delete it, or name another --output.")


def score_rows(args: RerankArguments, model, tokenizer, part: Path, sizes: list[int], done: int) -> None:
    """Appends the rows after the first `done`, and their scores, to `part`, --rows_at_once at a time."""
    rows = islice(rows_of(args), done, None)
    with (
        part.open("a" if done else "w", encoding="utf-8", newline="\n") as file,
        tqdm(total=sum(sizes), initial=sum(sizes[:done]), desc="Scoring", unit=" pairs") as progress,
    ):
        while some := list(islice(rows, args.rows_at_once)):
            pairs = [pair for _, of_row in some for pair in of_row]
            try:
                scores = score_pairs(model, tokenizer, pairs, args.max_length, args.tokens_per_batch, progress)
            except KeyboardInterrupt:
                how = f"{done:,} of {len(sizes):,} rows are in {part}, and the same command goes on after them"
                raise KeyboardInterrupt(how) from None
            left = iter(scores.tolist())
            rows_out = (write_row(row, list(islice(left, len(of_row))), args.pair_columns) for row, of_row in some)
            file.write("".join(row + "\n" for row in rows_out))
            file.flush()
            os.fsync(file.fileno())
            done += len(some)


def keep_whole(part: Path, rows_at_once: int) -> int:
    """How many rows of an interrupted output are whole, in whole steps; what is written after them is cut off."""
    if not part.exists():
        return 0
    ends, place = [], 0
    with part.open("rb") as file:
        for line in file:
            place += len(line)
            if line.endswith(b"\n"):
                ends.append(place)
    done = len(ends) // rows_at_once * rows_at_once
    os.truncate(part, ends[done - 1] if done else 0)
    return done


def stamp(path: Path, output: Path) -> dict[str, list[int]]:
    """Sizes and times of a file, or of a folder's files but the output; nothing of a repository's, which has a
    revision."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    ours = {
        output.resolve().with_name(output.name + end) for end in ("", ".part", ".rows", ".rows.json", ".rows.json.part")
    }
    found = {file.name: file.stat() for file in files if file.exists() and file.resolve() not in ours}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def as_run(part: Path) -> TrecRun:
    run = defaultdict(dict)
    for line, _ in read_lines(part):
        qid, pid, score = line.split("\t")
        run[qid][pid] = float(score)
    return run


# 3. Everything


@interruptible()
def main():
    parser = ScriptParser(RerankArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]
    if problem := args.problem():
        fail(parser, problem)
    with failing(parser):
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
