"""What is ablated: options of the command line, and what they cannot ask for together."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..finetuning.arguments import FineTuningArguments
from ..finetuning.tasks import Task
from .catalog import MADE, STUDIES
from .studies import Study

NAMES = "; ".join(f"{study}: {', '.join(found.variants)}" for study, found in STUDIES.items())
# Kinds of variants whose embeddings have learned nothing yet.
UNTRAINED = ("bert", "scratch")


@dataclass
class AblationArguments:
    """Hold which studies are run, on which tasks, with which seeds and learning rates."""

    study: list[str] = field(metadata={"help": f"One or more of {', '.join([*STUDIES, *MADE])}; or all, except start."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Tasks of GLUE and SuperGLUE."})
    variants: list[str] | None = field(
        default=None,
        metadata={"help": f"Run only these variants of the studies. Default: all. {NAMES}"},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the tasks' data. Default: the Hub."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Default: 0.5, 1 and 2 times the rate of glue.py for this size of decoder."},
    )
    starts: list[str] = field(default_factory=list, metadata={"help": "Checkpoints that the study `start` compares."})
    table: list[str] | None = field(
        default=None,
        metadata={
            "help": "Your own table: a file to train on and a file to evaluate, or one file, of which "
            "a tenth is evaluated."
        },
    )
    table_flags: str = field(
        default="",
        metadata={"help": "Flags of classify.py for it, in one string, such as `--label_column x`."},
    )
    ranking: list[str] | None = field(
        default=None,
        metadata={
            "help": "Judged data for msmarco.py, to train on and to evaluate. It is a further task, scored by nDCG@10."
        },
    )
    ranking_flags: str = field(
        default="",
        metadata={"help": "Flags of msmarco.py for it, in one string, such as `--list_size 16`."},
    )
    workers: int = field(default=1, metadata={"help": "Number of cells that run at a time. More than one needs Ray."})
    keep_models: bool = field(default=False, metadata={"help": "Keep the weights of every cell."})
    finished_only: bool = field(
        default=False,
        metadata={"help": "Train nothing. Make tables and plots of the cells that are finished in --output_dir."},
    )

    def validate(
        self,
        options: FineTuningArguments,
        args: TrainingArguments,
        studies: dict[str, Study],
        tasks: dict[str, Task],
    ) -> None:
        """Raise ValueError where flags contradict each other, before anything is trained."""
        self._validate_workers(args)
        if options.total_batch_size is not None:
            raise ValueError(
                "--total_batch_size is for glue.py. Here each task has its own batch size, or give "
                "--per_device_train_batch_size."
            )
        if args.do_predict or not (args.do_train and args.do_eval):
            raise ValueError(
                "--do_predict, --do_train false and --do_eval false are for glue.py: ablations always "
                "train and evaluate."
            )
        if "baselines" in studies:
            _validate_baselines(options, studies["baselines"], tasks)
        if self.ranking:
            _validate_ranking(self.ranking, options, studies)

    def _validate_workers(self, args: TrainingArguments) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1; got {self.workers}.")
        if args.world_size > 1:
            raise ValueError("accelerate launch and torchrun are for glue.py. Here --workers runs cells side by side.")
        if self.workers == 1:
            return
        if find_spec("ray") is None:
            raise ValueError('--workers above 1 needs Ray. Install it: pip install ".[ray]"')
        if 0 < (gpus := torch.cuda.device_count()) < self.workers:
            raise ValueError(
                f"--workers {self.workers} needs a GPU for each worker; there are {gpus}. Give fewer --workers."
            )


def _validate_baselines(options: FineTuningArguments, study: Study, tasks: dict[str, Task]) -> None:
    if chooses := [name for name, task in tasks.items() if task.problem == "choice"]:
        raise ValueError(
            f"--study baselines: the tasks {', '.join(chooses)} choose among candidates, which stock "
            "classifiers cannot do. Leave them out of --tasks."
        )
    if options.lora_r or options.dtype != "float32":
        raise ValueError("--study baselines trains all weights. Leave out --lora_r and --dtype.")
    untrained = [name for name, found in study.variants.items() if found.get("kind") in UNTRAINED]
    if options.freeze_embeddings and untrained:
        raise ValueError(
            f"--freeze_embeddings would keep the random embeddings of {' and '.join(untrained)}. Leave "
            "these variants out with --variants."
        )
    if GemmaEncoderConfig.from_pretrained(options.model).architectures:
        raise ValueError(f"--study baselines needs a decoder as --model; {options.model} is an encoder's checkpoint.")


def _validate_ranking(places: list[str], options: FineTuningArguments, studies: dict[str, Study]) -> None:
    if len(places) != 2 or places[0] == places[1]:
        raise ValueError(
            f"--ranking takes two places, data to train on and other data to evaluate; got {' '.join(places)}."
        )
    if missing := [place for place in places if not Path(place).exists()]:
        raise ValueError(f"--ranking: there is no {', '.join(missing)}.")
    if wrong := {"baselines", "rows"} & set(studies):
        raise ValueError(f"--ranking cannot be combined with --study {', '.join(sorted(wrong))}. Run them without it.")
    if options.lora_r:
        raise ValueError("--ranking needs --lora_r in --ranking_flags, and --learning_rates that suit both.")
