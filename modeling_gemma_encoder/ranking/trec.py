"""Files in TREC's format: judgments (qrels) and rankings, each a `TrecRun`.

Judgments are query id -> passage id -> grade; a `TrecRun` is query id -> passage id -> score.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

from .._scripts.files import read_lines

Qrels = dict[str, dict[str, int]]  # query id -> passage id -> grade
TrecRun = dict[str, dict[str, float]]  # query id -> passage id -> score

GRADE = re.compile(r"[-+]?[0-9]+(\.0*)?")


def read_qrels(path: Path) -> Qrels:
    """
    Read judgments: TREC's `qid 0 pid grade`, or BEIR's `qid pid grade` below a header.

    A line that has tabs is split at its tabs only.

    Raises:
        ValueError: a line has neither form, its grade is not a whole number, or it contradicts an
            earlier line.
    """
    found = defaultdict(dict)
    for number, (line, where) in enumerate(read_lines(path)):
        fields = [field.strip() for field in line.rstrip().split("\t")] if "\t" in line else line.split()
        if number == 0 and len(fields) in (3, 4) and not re.search("[0-9]", "".join(fields)):
            continue  # a header has no digits
        if len(fields) not in (3, 4) or not GRADE.fullmatch(fields[-1]):
            raise ValueError(f"{where}: {line!r} is not `qid 0 pid grade` with a whole number as the grade.")
        qid, pid, grade = fields[0], fields[-2], int(float(fields[-1]))
        if found[qid].setdefault(pid, grade) != grade:
            raise ValueError(
                f"{where}: {qid} {pid} was judged {found[qid][pid]} before, and is judged {grade} here; remove one."
            )
    return dict(found)


def read_run(path: Path) -> TrecRun:
    """
    Read a ranking in TREC's format, `qid Q0 pid rank score tag`.

    Raises:
        ValueError: a line has another form, its score is NaN, or a query has the same passage
            twice.
    """
    found = defaultdict(dict)
    for line, where in read_lines(path):
        try:
            fields = line.split("\t") if line.count("\t") == 5 else line.split()
            qid, _, pid, _, score, _ = map(str.strip, fields)
            score = float(score)
        except ValueError:
            raise ValueError(f"{where}: {line!r} is not `qid Q0 pid rank score tag`.") from None
        if pid in found[qid]:
            raise ValueError(f"{where}: {qid} {pid} is there twice; remove one of the two lines.")
        if math.isnan(score):
            raise ValueError(f"{where}: the score of {qid} {pid} is NaN.")
        found[qid][pid] = score
    return dict(found)


def write_run(run: TrecRun, path: Path, tag: str) -> None:
    """
    Write a ranking in TREC's format, the best passage of each query first.

    The file appears only when it is complete. Fields are separated by tabs if an id contains white
    space, so that `read_run` finds the same ids, and by spaces otherwise.
    """
    ids = [*run, *(pid for scores in run.values() for pid in scores)]
    tag = re.sub(r"\s+", "-", tag)
    separator = "\t" if any(re.search(r"\s", one) for one in ids) else " "
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for qid, scores in run.items():
            for rank, pid in enumerate(ranked(scores), start=1):
                file.write(separator.join((qid, "Q0", pid, str(rank), repr(scores[pid]), tag)) + "\n")
    part.replace(path)


def ranked(scores: Mapping[str, float]) -> list[str]:
    """
    Return passage ids by their scores, the best first.

    Equal scores are ordered by the CRC-32 of the id, which is independent of the passage's
    relevance.
    """
    return sorted(scores, key=lambda pid: (-scores[pid], crc32(pid.encode()), pid))
