"""Publishes a trained encoder, or an adapter: verified, with its code, template, licence and a card that says how it
was made and how good it is.

    python examples/publish.py --model runs/glue/sst2/seed-1 --repo_id me/sst2-encoder --private
    python examples/publish.py --model my-ranker --repo_id me/ranker --tag v1 --results measured/dl2020
    python examples/publish.py --model my-adapter --repo_id me/adapter --base_model google/gemma-2-2b
    python examples/publish.py --model my-encoder --repo_id me/encoder --dry_run --output_dir staged   # nothing leaves

`hf auth login` first. The card's tables come from what the training scripts left beside the model. What is published
is put together in a folder, loaded in a fresh process as a stranger would, and refused if a check fails; then it goes
up in one commit, is compared with what arrived, and a second commit has the card's snippets pin the first.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors import SafetensorError

from modeling_gemma_encoder._scripts.command_line import ScriptParser, fail, in_words, interruptible
from modeling_gemma_encoder._scripts.files import is_local, read
from modeling_gemma_encoder._scripts.provenance import masked
from modeling_gemma_encoder.hub.model_card import add_ranking, read_run
from modeling_gemma_encoder.hub.publishing import publish, stage
from modeling_gemma_encoder.hub.verification import verify

TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"


@dataclass
class PublishingArguments:
    model: str = field(metadata={"help": "Folder of a training, or a repository: a model or an adapter."})
    repo_id: str = field(metadata={"help": "On the Hub, owner/name."})
    base_model: str | None = field(
        default=None, metadata={"help": "What it was made of. Default: what the run's folder or the adapter says."}
    )
    base_revision: str | None = field(default=None, metadata={"help": "Commit of an adapter's base to load it over."})
    license: str | None = field(default=None, metadata={"help": "Of the weights. Default: the base model's."})
    private: bool = field(default=False, metadata={"help": "A new repository is; one that exists must be."})
    revision: str | None = field(default=None, metadata={"help": "A branch, made if it is not there."})
    tag: str | None = field(default=None, metadata={"help": "For what is published now."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    replace: bool = field(default=False, metadata={"help": "Remove whatever else the repository holds."})
    message: str = field(default="Publish a Gemma Encoder", metadata={"help": "Of the commit."})
    dtype: Literal["float32", "bfloat16"] | None = field(default=None, metadata={"help": "Default: as saved."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Of a file of weights."})
    inputs: str | None = field(
        default=None,
        metadata={"help": "A .jsonl file of more golden inputs, each line a text or a list of two."},
    )
    results: list[str] = field(
        default_factory=list, metadata={"help": "Other folders with results.json, as evaluate_ranking.py leaves them."}
    )
    datasets: list[str] = field(default_factory=list, metadata={"help": "Trained on, as the Hub calls them."})
    command: str | None = field(default=None, metadata={"help": "That trained it. Default: what the run wrote down."})
    hardware: str | None = field(default=None, metadata={"help": "It was trained on. Default: as the run wrote."})
    language: list[str] = field(default_factory=list, metadata={"help": "Codes, as en."})
    limits: str | None = field(default=None, metadata={"help": "What it should not be used for, and its biases."})
    template: str = field(default=str(TEMPLATE), metadata={"help": "Of the card (Jinja)."})
    output_dir: str | None = field(default=None, metadata={"help": "Empty or new: keeps what was put together."})
    dry_run: bool = field(default=False, metadata={"help": "Put it together and verify, and upload nothing."})
    device: str = field(default="cpu", metadata={"help": "For verification, which runs in fp32."})


@interruptible("a commit that was made stays; look at the repository, and give the same command again")
def main():
    parser = ScriptParser(PublishingArguments, __doc__)
    (args,) = parser.parse_args_into_dataclasses()
    results = [str(Path(folder) / "results.json") for folder in args.results]
    for folder in (args.model, *results, *([args.inputs] if args.inputs else [])):
        on_hub = folder == args.model and folder.count("/") == 1 and not is_local(folder)
        if not on_hub and not Path(folder).exists():
            fail(parser, f"there is no folder or file {folder}")
    if not args.dry_run:
        try:
            HfApi().whoami()
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            fail(parser, f"log in first, `hf auth login`: {error}")
    run = read_run(Path(args.model))
    for folder in args.results:
        add_ranking(run, Path(folder).stem, read(Path(folder) / "results.json"))
    run.command, run.datasets = masked(args.command) if args.command else run.command, args.datasets
    if args.hardware:
        run.training = [row for row in run.training if row[0] != "hardware"] + [("hardware", args.hardware)]
    base = args.base_model or read(Path(args.model) / "run.json").get("model")
    try:
        inputs = [json.loads(line) for line in Path(args.inputs).read_text().splitlines()] if args.inputs else None
        with tempfile.TemporaryDirectory() as temporary:
            staged = stage(
                args.model,
                Path(args.output_dir or temporary),
                args.repo_id,
                Path(args.template),
                run,
                base=base,
                base_revision=args.base_revision,
                licence=args.license,
                dtype=args.dtype,
                inputs=inputs,
                language=args.language or None,
                limits=args.limits,
                max_shard_size=args.max_shard_size,
            )
            if args.dry_run:
                checks = verify(staged.folder, device=args.device)
                print("\n".join(map(str, checks)))
                where = f"see {staged.folder}" if args.output_dir else "--output_dir keeps it to look at"
                print(f"\nNothing was uploaded; {where}")
                sys.exit(0 if all(check.passed for check in checks) else 1)
            commit = publish(
                staged,
                private=args.private or None,
                revision=args.revision,
                tag=args.tag,
                create_pr=args.create_pr,
                replace=args.replace,
                message=args.message,
                device=args.device,
            )
    except (ValueError, OSError, RuntimeError, HfHubHTTPError, SafetensorError) as error:
        fail(parser, in_words(error, args) if isinstance(error, OSError) else str(error))
    print(f"\n{commit.pr_url or commit.commit_url}\n\nCheck it from anywhere:")
    where = commit.pr_revision or commit.oid
    print(f"    python -m modeling_gemma_encoder.hub verify {args.repo_id} --revision {where}")


if __name__ == "__main__":
    main()
