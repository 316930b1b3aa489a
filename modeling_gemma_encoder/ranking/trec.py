"""TREC's files: judgements (qrels), and rankings (runs)."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

from .._scripts.files import read_lines

TrecRun = dict[str, dict[str, float]]  # query id -> passage id -> score

GRADE = re.compile(r"[-+]?[0-9]+(\.0*)?")


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """
    Read TREC's `qid 0 pid grade`, or BEIR's `qid pid grade` below a header. Where a line has tabs, they alone part it.

    Raises:
        ValueError: a line is neither, its grade is no whole number, or it contradicts an earlier one.
    """
    found = defaultdict(dict)
    for number, (line, where) in enumerate(read_lines(path)):
        fields = [field.strip() for field in line.rstrip().split("\t")] if "\t" in line else line.split()
        if number == 0 and len(fields) in (3, 4) and not re.search("[0-9]", "".join(fields)):
            continue  # words alone are a header
        if len(fields) not in (3, 4) or not GRADE.fullmatch(fields[-1]):
            raise ValueError(f"{where}: {line!r} is not `qid 0 pid grade`, with a whole number for a grade.")
        qid, pid, grade = fields[0], fields[-2], int(float(fields[-1]))
        if found[qid].setdefault(pid, grade) != grade:
            raise ValueError(f"{where}: {qid} {pid} was judged {found[qid][pid]} before.")
    return dict(found)


def read_run(path: Path) -> TrecRun:
    """TREC's `qid Q0 pid rank score tag`. A passage twice for a query, or a score that is none, raises ValueError."""
    found = defaultdict(dict)
    for line, where in read_lines(path):
        try:
            fields = line.split("\t") if line.count("\t") == 5 else line.split()
            qid, _, pid, _, score, _ = map(str.strip, fields)
            score = float(score)
        except ValueError:
            raise ValueError(f"{where}: {line!r} is not `qid Q0 pid rank score tag`.") from None
        if pid in found[qid] or math.isnan(score):
            raise ValueError(f"{where}: {qid} {pid} " + ("is there twice." if pid in found[qid] else "is NaN."))
        found[qid][pid] = score
    return dict(found)


def write_run(run: TrecRun, path: Path, tag: str) -> None:
    """Write TREC's format, best first; all of it or nothing. Tabs part ids that hold blanks, as they are read."""
    ids = [*run, *(pid for scores in run.values() for pid in scores)]
    tag = re.sub(r"\s+", "-", tag)
    gap = "\t" if any(re.search(r"\s", one) for one in ids) else " "
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for qid, scores in run.items():
            for rank, pid in enumerate(ranked(scores), start=1):
                file.write(gap.join((qid, "Q0", pid, str(rank), repr(scores[pid]), tag)) + "\n")
    part.replace(path)


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Ids, best first. Equal scores: by the CRC-32 of the id, an order that has nothing to do with relevance."""
    return sorted(scores, key=lambda pid: (-scores[pid], crc32(pid.encode()), pid))
