"""How a ranker is trained: options of the command line, and defaults."""

from dataclasses import dataclass, field

from ..finetuning.tasks import Task
from ..templates import RANKING_TEMPLATE
from .evaluation import MEASURES

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
        default=0.0,
        metadata={"help": "About this share of --train_data's queries, drawn by their texts, is evaluated instead."},
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Folders, files, or judged data on the Hub, `name[:split]`."}
    )
    eval_run: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to rerank: `bm25`, the 100 best of all passages, for all that is evaluated, or for each of "
            "--eval_data, the --held_out queries before them, it or a TREC run file. Default: what was judged."
        },
    )
    eval_depth: int | None = field(default=None, metadata={"help": "Reranks the best so many of a run."})
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage", "label"], metadata={"help": "Columns of files of pairs."}
    )
    relevance_level: int = field(
        default=1,
        metadata={"help": "Least grade that is relevant, in measures that know no grades and in counts; TREC DL: 2."},
    )
    measures: list[str] = field(default_factory=lambda: list(MEASURES), metadata={"help": "As ir_measures calls them."})

    def problem(self) -> str | None:
        if self.list_size < 2:
            return f"--list_size must be at least 2, got {self.list_size}"
        if not 0 <= self.held_out < 1:
            return f"--held_out is a share, at least 0 and below 1, got {self.held_out}"
        if len(self.pair_columns) != 3:
            return f"--pair_columns are three, of query, passage and label, got {' '.join(self.pair_columns)}"
        several, held = len(self.eval_data or ()), int(self.held_out > 0)
        if self.eval_run == ["bm25"]:
            return None if several + held else "--eval_run bm25 needs --eval_data or --held_out to rerank"
        if self.eval_run and len(self.eval_run) not in (several, several + held):
            return f"--eval_run names {len(self.eval_run)} files for {several} of --eval_data; bm25 alone is for all"
        return None

    def runs(self) -> tuple[str | None, list[str | None]]:
        """What is reranked of the queries that are held out, and of each of --eval_data; None for what was judged."""
        several = len(self.eval_data or ())
        if not self.eval_run:
            return None, [None] * several
        if self.eval_run == ["bm25"]:
            return "bm25", ["bm25"] * several
        return (None if len(self.eval_run) == several else self.eval_run[0]), self.eval_run[-several:][:several]
