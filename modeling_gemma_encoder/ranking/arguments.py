"""Command-line options of training a ranker, and the defaults of `TrainingArguments` for it."""

from dataclasses import dataclass, field

from ..finetuning.tasks import Task
from ..templates import RANKING_TEMPLATE
from .measures import MEASURES

# Lists of 36 passages, 32 lists in a step, at a constant rate: after RankT5 (arXiv 2210.10634,
# section 5).
TASK = Task(
    ("query", "passage"),
    None,
    problem="choice",
    template=RANKING_TEMPLATE,
    max_length=256,
    epochs=1,
    batch_size=4,
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
    """Options of what a ranker is trained and evaluated on."""

    train_data: list[str] = field(
        default_factory=lambda: ["sentence-transformers/msmarco-bm25"],
        metadata={"help": "Folders and files, or one data set on the Hub, `name[:config[:split]]`."},
    )
    train_run: str | None = field(
        default=None,
        metadata={"help": "Adds candidates to a folder's queries: a file in TREC's format, or `bm25`, its 100 best."},
    )
    list_size: int = field(default=36, metadata={"help": "The most documents in a list."})
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
            "help": "What to rerank: `bm25`, the 100 best of all passages, for everything that is evaluated. Or for "
            "each of --eval_data, after one for the --held_out queries if they have one, `bm25` or a file in TREC's "
            "format. Default: the judged passages."
        },
    )
    eval_depth: int | None = field(default=None, metadata={"help": "Rerank only so many of a run's best passages."})
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage", "label"], metadata={"help": "Columns of files of pairs."}
    )
    relevance_level: int = field(
        default=1,
        metadata={"help": "The least grade that is relevant, in binary measures and in counts; 2 for TREC DL."},
    )
    measures: list[str] = field(
        default_factory=lambda: list(MEASURES), metadata={"help": "Measures, as ir_measures names them."}
    )

    def validate(self) -> None:
        """Raise ValueError if an option has an impossible value or contradicts another."""
        if self.list_size < 2:
            raise ValueError(f"--list_size must be at least 2; got {self.list_size}.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held_out must be a share, at least 0 and below 1; got {self.held_out}.")
        if len(self.pair_columns) != 3:
            given = " ".join(self.pair_columns)
            raise ValueError(f"--pair_columns must name three columns, of query, passage and label; got {given}.")
        if not self.eval_run:
            return
        collections = len(self.eval_data or ())
        evaluated = collections + 1 if self.held_out else collections
        if self.eval_run == ["bm25"]:
            if not evaluated:
                raise ValueError("--eval_run bm25 needs --eval_data or --held_out, whose queries it is for.")
        elif len(self.eval_run) not in (collections, evaluated):
            raise ValueError(
                f"--eval_run names {len(self.eval_run)} files for {collections} of --eval_data; "
                "give one for each, or bm25 alone for all."
            )

    def trec_runs(self) -> tuple[str | None, list[str | None]]:
        """
        Return what is reranked for the held-out queries, and for each of --eval_data.

        Each is `bm25`, a file in TREC's format, or None for the judged passages.
        """
        collections = len(self.eval_data or ())
        if not self.eval_run:
            return None, [None] * collections
        if self.eval_run == ["bm25"]:
            return "bm25", ["bm25"] * collections
        first = len(self.eval_run) - collections
        return self.eval_run[0] if first else None, self.eval_run[first:]
