"""Publishing: a training's output becomes a folder that stands on its own, is verified, and goes to the Hub whole.

    python -m modeling_gemma_encoder.hub verify REPO_OR_FOLDER     # loads it as a stranger would; a table of checks

`examples/publish.py` is the command that publishes.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

import torch
import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from . import modeling_gemma_encoder
from .cards import Run, code_licence, licence_of, make_card, notice, parameters_of
from .checkpoint_gemma_encoder import WEIGHTS
from .configuration_gemma_encoder import GemmaEncoderConfig
from .files import write
from .pretrained_gemma_encoder import find_adapter
from .verification import CODE, FILE, PACKAGE, PICKLED, Check, dtypes, hash_of, verify, write_golden

# Files of a repository that are another model's when a new one does not have them.
OURS = ("adapter_config.json", "config.json", "NOTICE", FILE, "tokenizer.model", "special_tokens_map.json")


class NotVerified(RuntimeError):
    """What was to be published is not what was trained; `checks` say how."""

    def __init__(self, checks: list[Check]):
        super().__init__("Not published:\n" + "\n".join(str(check) for check in checks if not check.passed))
        self.checks = checks


@dataclass
class Staged:
    """A folder that is ready to be published, and how its card is made again once the commit is known."""

    folder: Path
    card: dict

    def write_card(self, revision: str | None) -> None:
        write(self.folder / "README.md", str(make_card(**self.card, revision=revision)))


def stage(
    source: str,
    folder: Path,
    repo_id: str,
    template: Path,
    run: Run,
    base: str | None = None,
    base_revision: str | None = None,
    licence: str | None = None,
    dtype: str | None = None,
    inputs: list | None = None,
    language: list[str] | None = None,
    limits: str | None = None,
    max_shard_size: str = "5GB",
) -> Staged:
    """
    Everything that is published of a trained model, in a folder of its own: weights, config, code, tokenizer,
    licence and notice, card, golden outputs.

    Args:
        source: Folder of a training, or a repository: a model, or an adapter.
        base: The checkpoint it was made of. Default: what an adapter names.
        base_revision: Commit of the base that an adapter is loaded over from now on.
        licence: Of the weights. Default: the base's.
        dtype: To publish in, as "bfloat16". Default: as saved.
        inputs: Golden inputs besides our own.

    Raises:
        ValueError: `source` has no trained head or no tokenizer, an adapter's base is a local folder, `folder` is not
            empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. What is published is put together in a folder of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    adapter = find_adapter(source, {})
    config = GemmaEncoderConfig.from_pretrained(source)
    if not config.architectures:
        raise ValueError(f"{source} is a decoder as it is: train an encoder of it first.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no tokenizer: save it beside the model, the template is in it.") from error
    model_class = getattr(modeling_gemma_encoder, config.architectures[0])
    if adapter:
        base = base or adapter["base_model_name_or_path"]
        _stage_adapter(source, folder, adapter, base, base_revision, config)
    else:
        form = {"dtype": getattr(torch, dtype)} if dtype else {}
        model, loading = model_class.from_pretrained(source, output_loading_info=True, **form)
        if new := sorted(loading["missing_keys"]):
            raise ValueError(f"{source} is not trained: {', '.join(new)} would be random.")
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        del model
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    base = base or config.text_config._name_or_path or "an unnamed decoder"
    licence = licence_of(base, config.text_config.model_type, licence)
    write(folder / "LICENSE", code_licence().rstrip("\n"))
    if text := notice(base, licence):
        write(folder / "NOTICE", text)
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    staged = Staged(
        folder,
        {
            **{"template": template, "repo_id": repo_id, "base": base, "config": model.config, "tokenizer": tokenizer},
            **{"run": run, "licence": licence, "parameters": parameters_of(model), "dtypes": dtypes(folder)},
            **{"adapter": bool(adapter), "language": language, "limits": limits},
        },
    )
    staged.card["config"].architectures = config.architectures
    staged.write_card(None)
    write_golden(folder, model, tokenizer, inputs)
    return staged


def _stage_adapter(source: str, folder: Path, adapter: dict, base: str, revision: str | None, config) -> None:
    if Path(base).exists() or base.startswith((".", "/", "~")):
        raise ValueError(
            f"The adapter was trained over {base}, which others do not have: publish that first, and give its "
            "repository as `base`."
        )
    where = transformers.utils.cached_file(source, "adapter_model.safetensors")
    shutil.copyfile(where, folder / "adapter_model.safetensors")
    if not any(name.endswith(".score.weight") for name in load_file(where)):
        from .adapters import refuse_stock_head

        refuse_stock_head(folder / "adapter_model.safetensors")
    named = {**adapter, "base_model_name_or_path": base, "revision": revision or adapter.get("revision")}
    named.pop("auto_mapping", None)
    write(folder / "adapter_config.json", json.dumps(named, indent=2))
    config.save_pretrained(folder)
    for name in CODE:
        shutil.copyfile(PACKAGE / name, folder / name)


def publish(
    staged: Staged,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str = "Publish a Gemma Encoder",
    token: str | None = None,
    device: str = "cpu",
) -> CommitInfo:
    """
    Verifies what was staged, uploads it in one commit, compares what arrived, and adds the card, which names that
    commit, in a second one. Weights and code that the repository had before and this model does not have go.

    Args:
        private: Of a new repository; one that exists stays as it is.
        revision: A branch, made if it is not there.
        tag: For the last commit.
        create_pr: Opens a pull request instead of committing.

    Returns:
        The last commit.

    Raises:
        NotVerified: a check failed, before or after the upload.
        ValueError: `tag` is there already; `tag` and `create_pr` together.
    """
    api, repo_id = HfApi(token=token), staged.card["repo_id"]
    exists = api.repo_exists(repo_id)
    if tag and create_pr:
        raise ValueError("`tag` and `create_pr` do not go together: tag the commit that is merged.")
    if tag and exists and tag in (ref.name for ref in api.list_repo_refs(repo_id).tags):
        raise ValueError(f"`tag` {tag} is there already, and stays what it is. Choose another.")
    checks = verify(staged.folder, device=device)
    if not all(check.passed for check in checks):
        raise NotVerified(checks)
    if not (create_pr and exists):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    names = sorted(path.name for path in staged.folder.iterdir() if path.is_file() and path.name != "README.md")
    old = [name for name in api.list_repo_files(repo_id, revision=revision) if _of_another_model(name, names)]
    operations = [CommitOperationAdd(name, str(staged.folder / name)) for name in names]
    operations += [CommitOperationDelete(name) for name in old]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    checks = list(arrived(api, repo_id, commit.oid, staged.folder, names))
    if not all(check.passed for check in checks):
        raise NotVerified(checks)
    staged.write_card(commit.oid)
    card = CommitOperationAdd("README.md", str(staged.folder / "README.md"))
    where = commit.pr_revision if create_pr else revision
    commit_of_card = api.create_commit(repo_id, [card], commit_message="Describe it", revision=where)
    if tag:
        api.create_tag(repo_id, tag=tag, revision=commit_of_card.oid)
    return commit if create_pr else commit_of_card


def _of_another_model(name: str, names: list[str]) -> bool:
    if name in names or "/" in name:
        return False
    return bool(WEIGHTS.fullmatch(name)) or name.endswith((".py", *PICKLED)) or name in OURS


def arrived(api: HfApi, repo_id: str, revision: str, folder: Path, names: list[str]) -> list[Check]:
    """Whether the Hub has what was sent, by the hashes it computes itself."""
    there = {info.path: info for info in api.get_paths_info(repo_id, names, revision=revision)}
    for name in names:
        info = there.get(name)
        if info is None:
            yield Check(name, False, "did not arrive")
        elif info.lfs is not None:
            same = info.lfs.sha256 == hash_of(folder / name)
            yield Check(name, same, "arrived" if same else "arrived changed")
        else:
            content = (folder / name).read_bytes()
            blob = sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            yield Check(name, info.blob_id == blob, "arrived" if info.blob_id == blob else "arrived changed")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m modeling_gemma_encoder.hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="load a folder or repository as a stranger would, and compare")
    check.add_argument("source", help="A folder, or a repository on the Hub.")
    check.add_argument("--revision", help="A branch, tag or commit.")
    check.add_argument("--trust_remote_code", action="store_true", help="Run code that is not this package's own.")
    check.add_argument("--device", default="cpu")
    check.add_argument("--json", action="store_true", help="For machines.")
    args = parser.parse_args()
    try:
        checks = verify(
            args.source, revision=args.revision, trust_remote_code=args.trust_remote_code, device=args.device
        )
    except (ValueError, OSError, HfHubHTTPError) as error:
        parser.exit(2, f"{parser.prog} verify: error: {error}\n")
    if args.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        print("\n".join(map(str, checks)))
    sys.exit(0 if all(check.passed for check in checks) else 1)


if __name__ == "__main__":
    main()
