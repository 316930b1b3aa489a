"""Publish a trained encoder or an adapter on the Hub, with its code, its license and a card that
tells how it was made.

    python examples/publish.py --model runs/glue/sst2/seed-1 --repo_id me/sst2-encoder --private
    python examples/publish.py --model my-ranker --repo_id me/ranker --tag v1 --results measured/dl2020
    python examples/publish.py --model my-adapter --repo_id me/adapter --base_model google/gemma-2-2b
    python examples/publish.py --model my-encoder --repo_id me/encoder --dry_run --output_dir staged   # uploads nothing

Log in first with `hf auth login`. The card's tables come from the files that training left beside
the model.

The model is put together in a folder, loaded in a fresh process, and refused if a check fails. Then
it is uploaded in one commit and compared with what arrived. A second commit has the card's snippets
pin the first.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors import SafetensorError

from modeling_gemma_encoder._scripts.command_line import ScriptParser, fail, in_words, interruptible
from modeling_gemma_encoder._scripts.files import is_local, read
from modeling_gemma_encoder._scripts.provenance import masked
from modeling_gemma_encoder.hub.publishing import Staged, publish, stage
from modeling_gemma_encoder.hub.run_record import RunRecord, add_ranking, read_run_record
from modeling_gemma_encoder.hub.verification import verify

TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"


@dataclass
class PublishingArguments:
    model: str = field(metadata={"help": "A training's folder, or a repository, of a model or an adapter."})
    repo_id: str = field(metadata={"help": "The repository on the Hub to publish in, owner/name."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "The checkpoint it was made of. Default: what the run's folder or the adapter names."},
    )
    base_revision: str | None = field(
        default=None, metadata={"help": "The commit of an adapter's base to load it over. Default: the newest."}
    )
    license: str | None = field(default=None, metadata={"help": "Of the weights. Default: the base model's."})
    private: bool = field(
        default=False, metadata={"help": "Make a new repository private; an existing one must be private."}
    )
    revision: str | None = field(default=None, metadata={"help": "The branch, which is made if it is not there."})
    tag: str | None = field(default=None, metadata={"help": "A tag for what is published now."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    replace: bool = field(default=False, metadata={"help": "Remove whatever else the repository holds."})
    message: str = field(default="Publish a Gemma Encoder", metadata={"help": "The message of the commit."})
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "The dtype of the published weights. Default: as saved."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "The largest size of a file of weights."})
    inputs: str | None = field(
        default=None,
        metadata={"help": "A .jsonl file of more golden inputs; each line is a text or a list of two texts."},
    )
    results: list[str] = field(
        default_factory=list,
        metadata={"help": "Other folders with results.json, as evaluate_ranking.py leaves them."},
    )
    datasets: list[str] = field(
        default_factory=list, metadata={"help": "The Hub's names of the data sets it was trained on."}
    )
    command: str | None = field(
        default=None, metadata={"help": "The command that trained it. Default: the one that the run wrote down."}
    )
    hardware: str | None = field(
        default=None, metadata={"help": "The hardware it was trained on. Default: as the run wrote down."}
    )
    language: list[str] = field(default_factory=list, metadata={"help": "Codes of its languages, as in `en`."})
    limits: str | None = field(default=None, metadata={"help": "What it should not be used for, and its biases."})
    template: str = field(default=str(TEMPLATE), metadata={"help": "The template of the card (Jinja)."})
    output_dir: str | None = field(
        default=None, metadata={"help": "A new or empty folder that keeps what was put together."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Put it together and verify it, but upload nothing."})
    device: str = field(default="cpu", metadata={"help": "The device of verification, which runs in fp32."})

    def validate(self) -> None:
        """Raise ValueError if a folder or file that is named is not there."""
        results = [str(Path(folder) / "results.json") for folder in self.results]
        for place in (self.model, *results, *([self.inputs] if self.inputs else [])):
            on_hub = place == self.model and place.count("/") == 1 and not is_local(place)
            if not on_hub and not Path(place).exists():
                raise ValueError(f"there is no folder or file {place}")


def require_login() -> None:
    """Raise ValueError unless the Hub knows the user, before anything is put together."""
    try:
        HfApi().whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise ValueError(f"log in first with `hf auth login`: {error}") from error


def run_record(args: PublishingArguments) -> RunRecord:
    """Return what is known of the training: what its folder says, and over it what the command line
    says."""
    record = read_run_record(Path(args.model))
    for folder in args.results:
        add_ranking(record, Path(folder).stem, read(Path(folder) / "results.json"))
    record.datasets = args.datasets
    if args.command:
        record.command = masked(args.command)
    if args.hardware:
        others = [row for row in record.training if row[0] != "hardware"]
        record.training = [*others, ("hardware", args.hardware)]
    return record


def stage_in(folder: Path, args: PublishingArguments) -> Staged:
    """Put the model together in a folder, with its card and golden outputs."""
    inputs = None
    if args.inputs:
        inputs = [json.loads(line) for line in Path(args.inputs).read_text().splitlines()]
    return stage(
        args.model,
        folder,
        args.repo_id,
        Path(args.template),
        run_record(args),
        base=args.base_model or read(Path(args.model) / "run.json").get("model"),
        base_revision=args.base_revision,
        licence=args.license,
        dtype=args.dtype,
        inputs=inputs,
        language=args.language or None,
        limits=args.limits,
        max_shard_size=args.max_shard_size,
    )


def verify_only(staged: Staged, args: PublishingArguments) -> None:
    """Print the checks of a staged folder, and end the process with 1 if one failed."""
    checks = verify(staged.folder, device=args.device)
    print("\n".join(map(str, checks)))
    where = f"see {staged.folder}" if args.output_dir else "--output_dir keeps it to look at"
    print(f"\nNothing was uploaded; {where}")
    sys.exit(0 if all(check.passed for check in checks) else 1)


def upload(staged: Staged, args: PublishingArguments) -> CommitInfo:
    """Publish a staged folder as the command line says."""
    return publish(
        staged,
        private=args.private or None,
        revision=args.revision,
        tag=args.tag,
        create_pr=args.create_pr,
        replace=args.replace,
        message=args.message,
        device=args.device,
    )


@interruptible("a commit that was made stays; look at the repository, and give the same command again")
def main():
    parser = ScriptParser(PublishingArguments, __doc__)
    (args,) = parser.parse_args_into_dataclasses()
    try:
        args.validate()
        if not args.dry_run:
            require_login()
        with tempfile.TemporaryDirectory() as temporary:
            staged = stage_in(Path(args.output_dir or temporary), args)
            if args.dry_run:
                verify_only(staged, args)
            commit = upload(staged, args)
    except (ValueError, OSError, RuntimeError, HfHubHTTPError, SafetensorError) as error:
        fail(parser, in_words(error, args) if isinstance(error, OSError) else str(error))
    print(f"\n{commit.pr_url or commit.commit_url}\n\nCheck it from anywhere:")
    where = commit.pr_revision or commit.oid
    print(f"    python -m modeling_gemma_encoder.hub verify {args.repo_id} --revision {where}")


if __name__ == "__main__":
    main()
