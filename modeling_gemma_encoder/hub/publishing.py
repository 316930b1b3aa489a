"""Publishing: a training's output becomes a folder that stands on its own, is verified, and goes to the Hub whole.

    python -m modeling_gemma_encoder.hub verify REPO_OR_FOLDER     # loads it as a stranger would; a table of checks

`examples/publish.py` is the command that publishes.
"""

import json
import shutil
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

import torch
import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from .. import modeling_gemma_encoder
from .._scripts.files import is_local, write
from ..checkpoint_gemma_encoder import WEIGHTS
from ..checkpoints import load_tokenizer
from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..gguf_gemma_encoder import split_gguf
from ..peft_gemma_encoder import CROSS_ENCODER_FILES, write_cross_encoder_files
from ..pretrained_gemma_encoder import find_adapter
from .licenses import GEMMA_TERMS, code_licence, licence_of, notice
from .model_card import Run, make_card
from .verification import CODE, PACKAGE, PICKLED, STARRED, Check, dtypes, hash_of, verify, write_golden

# Files of ours that another model may lack, and the one that is the Hub's.
OURS = ("adapter_config.json", "NOTICE", GEMMA_TERMS)
KEPT = ".gitattributes"


class NotVerified(RuntimeError):
    """What was to be published is not what was trained; `checks` say how."""

    def __init__(self, checks: list[Check]):
        super().__init__("Checks failed:\n" + "\n".join(str(check) for check in checks if not check.passed))
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
        base: The checkpoint it was made of. Default: what an adapter names. None is known of a model that was trained
            without our scripts: then the card names none, and `licence` is needed.
        base_revision: Commit of the base that an adapter is loaded over from now on.
        licence: Of the weights. Default: the base's.
        dtype: To publish in, as "bfloat16". Default: as saved.
        inputs: Golden inputs besides our own.

    Raises:
        ValueError: `source` has no trained head or no tokenizer, neither base nor licence is known, an adapter's base
            is a local folder, `folder` is not empty.
    """
    target, folder = Path(folder), Path(folder).with_name(f"{Path(folder).name}.part")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty. What is published is put together in a folder of its own.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        models = sorted(str(path.parent) for path in Path(source).glob("**/config.json"))
        raise ValueError(
            f"{source} has no config.json, so it is no model; below it are: {', '.join(models) or 'none'}."
        )
    adapter = find_adapter(source, {})
    config = GemmaEncoderConfig.from_pretrained(source)
    if not config.architectures:
        raise ValueError(f"{source} is a decoder as it is: train an encoder of it first.")
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no tokenizer: save it beside the model, the template is in it.") from error
    base = base or (adapter or {}).get("base_model_name_or_path") or config.text_config._name_or_path or None
    if base is None and licence is None:
        raise ValueError(
            f"{source} does not say which decoder it was made of: give `base` (--base_model), under whose licence it "
            "is, or, for a decoder of your own, `licence` (--license)."
        )
    model_class = getattr(modeling_gemma_encoder, config.architectures[0])
    if adapter:
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
    licence = licence_of(base, config.text_config.model_type, licence) if base else licence
    write(folder / "LICENSE", code_licence().rstrip("\n"))
    if text := notice(base, licence):
        write(folder / "NOTICE", text)
        if base and (terms := Path(base) / GEMMA_TERMS).is_file():
            shutil.copyfile(terms, folder / GEMMA_TERMS)
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.architectures = config.architectures
    card = {"template": template, "repo_id": repo_id, "base": base, "config": model.config, "tokenizer": tokenizer}
    card |= {"run": run, "licence": licence, "parameters": model.num_parameters(), "dtypes": dtypes(folder)}
    staged = Staged(folder, {**card, "adapter": bool(adapter), "language": language, "limits": limits})
    staged.write_card(None)
    write_golden(folder, model, tokenizer, inputs)
    if target.exists():
        target.rmdir()
    staged.folder = folder.rename(target)
    return staged


def _stage_adapter(source: str, folder: Path, adapter: dict, base: str, revision: str | None, config) -> None:
    if is_local(base) or split_gguf(base)[1] is not None:
        raise ValueError(
            f"The adapter was trained over {base}, which others do not have or PEFT does not read: publish that "
            "decoder first (examples/convert_gguf.py makes a checkpoint of a GGUF file), and give its repository as "
            "`base` (--base_model). Or merge the adapter."
        )
    where = transformers.utils.cached_file(source, "adapter_model.safetensors")
    shutil.copyfile(where, folder / "adapter_model.safetensors")
    from ..adapters import refuse_stock_head

    refuse_stock_head(folder / "adapter_model.safetensors")
    revision = revision or adapter.get("revision") or HfApi().model_info(base).sha  # a branch could be moved
    named = {**adapter, "base_model_name_or_path": base, "revision": revision}
    named.pop("auto_mapping", None)
    write(folder / "adapter_config.json", json.dumps(named, indent=2))
    config.save_pretrained(folder)
    write_cross_encoder_files(folder)
    for name in CODE:
        shutil.copyfile(PACKAGE / name, folder / name)


def publish(
    staged: Staged,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    replace: bool = False,
    message: str = "Publish a Gemma Encoder",
    token: str | None = None,
    device: str = "cpu",
) -> CommitInfo:
    """
    Verifies what was staged, uploads it in one commit and compares what arrived; a second commit has the card name the
    first. Weights and code of ours that the repository had before, and this model does not have, go; so do pickles.

    Args:
        private: Of a new repository, or what one that exists must be.
        revision: A branch, made if it is not there.
        tag: For the last commit.
        create_pr: Opens a pull request instead of committing.
        replace: Whatever else the repository holds goes too.

    Returns:
        The last commit; of a pull request the first.

    Raises:
        NotVerified: a check failed, before or after the upload; after it, the branch holds the broken commit.
        ValueError: `tag` is there already; `tag` and `create_pr` together; the repository holds other files, or is not
            as `private` says.
    """
    api, repo_id = HfApi(token=token), staged.card["repo_id"]
    if "/" not in repo_id:
        repo_id = staged.card["repo_id"] = f"{api.whoami()['name']}/{repo_id}"
    exists = api.repo_exists(repo_id)
    names = sorted(path.name for path in staged.folder.iterdir() if path.is_file())
    if tag and create_pr:
        raise ValueError("`tag` and `create_pr` do not go together: tag the commit that is merged.")
    if exists:
        refuse_conflicts(api, repo_id, names, private, revision, tag, replace)
    checks = verify(staged.folder, device=device)
    if not all(check.passed for check in checks):
        raise NotVerified(checks)
    if not (create_pr and exists):
        api.create_repo(repo_id, private=private, exist_ok=True)
    if revision and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    operations = [CommitOperationAdd(name, str(staged.folder / name)) for name in names]
    operations += [
        CommitOperationDelete(file.rfilename) for file in info.siblings if file.rfilename not in (*names, KEPT)
    ]
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, parent_commit=info.sha
    )
    checks = list(arrived(api, repo_id, commit.oid, staged.folder, names))
    if not all(check.passed for check in checks):
        raise NotVerified(checks)
    staged.write_card(commit.oid)
    card = CommitOperationAdd("README.md", str(staged.folder / "README.md"))
    where = commit.pr_revision if create_pr else revision
    of_card = api.create_commit(repo_id, [card], commit_message="Pin the commit in the card", revision=where)
    if tag:
        api.create_tag(repo_id, tag=tag, revision=of_card.oid)
    return commit if create_pr else of_card


def refuse_conflicts(
    api: HfApi,
    repo_id: str,
    names: list[str],
    private: bool | None,
    revision: str | None,
    tag: str | None,
    replace: bool,
) -> None:
    """Raises ValueError where the repository is not what is asked for, before anything is done to it."""
    refs = api.list_repo_refs(repo_id)
    there = revision in [ref.name for ref in refs.branches]
    info = api.model_info(repo_id, revision=revision if there else None)  # a new branch begins as the default one
    if private is not None and info.private != private:
        is_now = "private" if info.private else "public"
        raise ValueError(f"{repo_id} exists and is {is_now}: change it in its settings, or publish without `private`.")
    if tag and tag in [ref.name for ref in refs.tags]:
        raise ValueError(f"`tag` {tag} is there already, and stays what it is. Choose another.")
    others = [file.rfilename for file in info.siblings if file.rfilename not in (*names, KEPT)]
    ours = [*OURS, *(CROSS_ENCODER_FILES if "adapter_config.json" in others else ())]
    others = [name for name in others if not (WEIGHTS.fullmatch(name) or name.endswith(STARRED) or name in ours)]
    others = [name for name in others if "/" in name or not name.endswith(PICKLED)]
    if others and not replace:
        raise ValueError(f"{repo_id} holds other files: {', '.join(others)}. Pass `replace` to have them removed.")


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
