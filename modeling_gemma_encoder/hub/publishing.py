"""Publish a staged folder on the Hub: verify it, upload it in one commit, and compare what arrived.

`examples/publish.py` is the command that publishes. `python -m modeling_gemma_encoder.hub verify` verifies again.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from hashlib import sha1
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..checkpoint_gemma_encoder import WEIGHTS
from ..peft_gemma_encoder import CROSS_ENCODER_FILES
from .file_checks import STARRED, Check
from .golden import hash_of
from .licenses import GEMMA_TERMS
from .staging import Staged, stage
from .verification import PICKLED, verify

__all__ = ["NotVerified", "Staged", "publish", "stage"]

# Files of ours that another model may lack, and the one that the Hub writes.
OURS = ("adapter_config.json", "NOTICE", GEMMA_TERMS)
KEPT = ".gitattributes"


class NotVerified(RuntimeError):
    """Report that what was to be published is not what was trained; `checks` say how they differ."""

    def __init__(self, checks: list[Check]):
        super().__init__("Checks failed:\n" + "\n".join(str(check) for check in checks if not check.passed))
        self.checks = checks


@dataclasses.dataclass(frozen=True)
class Destination:
    """Hold where a folder goes on the Hub, and how."""

    repo_id: str
    private: bool | None
    revision: str | None  # a branch
    tag: str | None
    create_pr: bool
    replace: bool

    def validate(self) -> None:
        """Raise ValueError for arguments that do not go together."""
        if self.tag and self.create_pr:
            raise ValueError(
                "`tag` and `create_pr` do not go together. Tag the commit once the pull request is merged."
            )


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
    Verify and upload a staged folder, and return the last commit, or the first of a pull request.

    A second commit has the card name the first. Pickles, weights and our code that this model lacks are removed.

    Args:
        private: Of a new repository, or what an existing one must be.
        revision: A branch, made if it is not there.
        tag: For the last commit.
        replace: Remove whatever else the repository holds.

    Raises:
        NotVerified: a check failed, before or after the upload; after it, the branch holds the broken commit.
        ValueError: the arguments do not go together, or do not fit the repository as it is.
    """
    api = HfApi(token=token)
    staged = _name_owner(staged, api)
    destination = Destination(staged.request.repo_id, private, revision, tag, create_pr, replace)
    exists = api.repo_exists(destination.repo_id)
    destination.validate()
    if exists:
        _refuse_conflicts(api, destination, staged.names)
    _require(verify(staged.folder, device=device))
    _make_repository(api, destination, exists)
    commit = _upload(api, destination, staged, message)
    _require(arrived(api, destination.repo_id, commit.oid, staged.folder, staged.names))
    of_card = _pin_card(api, destination, staged, commit)
    return commit if create_pr else of_card


def _require(checks: Iterable[Check]) -> None:
    """Raise NotVerified unless all checks passed."""
    checks = list(checks)
    if not all(check.passed for check in checks):
        raise NotVerified(checks)


def _name_owner(staged: Staged, api: HfApi) -> Staged:
    """Return `staged` for a repository of the user, where its name has no owner."""
    repo_id = staged.request.repo_id
    if "/" in repo_id:
        return staged
    request = dataclasses.replace(staged.request, repo_id=f"{api.whoami()['name']}/{repo_id}")
    return dataclasses.replace(staged, request=request)


def _refuse_conflicts(api: HfApi, destination: Destination, names: list[str]) -> None:
    """Raise ValueError where the repository is not what is asked for, before anything is done to it."""
    repo_id, private, tag = destination.repo_id, destination.private, destination.tag
    refs = api.list_repo_refs(repo_id)
    there = destination.revision in [ref.name for ref in refs.branches]
    # A new branch begins as the default one.
    info = api.model_info(repo_id, revision=destination.revision if there else None)
    if private is not None and info.private != private:
        is_now = "private" if info.private else "public"
        raise ValueError(
            f"{repo_id} exists and is {is_now}. Change that in its settings, or publish without `private`."
        )
    if tag and tag in [ref.name for ref in refs.tags]:
        raise ValueError(f"`tag` {tag} is there already and is not moved. Choose another name.")
    others = _files_of_others([file.rfilename for file in info.siblings], names)
    if others and not destination.replace:
        raise ValueError(f"{repo_id} holds other files: {', '.join(others)}. Pass `replace` to have them removed.")


def _files_of_others(there: list[str], names: list[str]) -> list[str]:
    """Return the files of a repository that neither we nor the Hub wrote; pickles on its top are removed anyway."""
    others = [name for name in there if name not in (*names, KEPT)]
    ours = [*OURS, *(CROSS_ENCODER_FILES if "adapter_config.json" in others else ())]
    others = [name for name in others if not (WEIGHTS.fullmatch(name) or name.endswith(STARRED) or name in ours)]
    return [name for name in others if "/" in name or not name.endswith(PICKLED)]


def _make_repository(api: HfApi, destination: Destination, exists: bool) -> None:
    """Make the repository and its branch where they are missing; a pull request needs neither in one that exists."""
    repo_id = destination.repo_id
    if not (destination.create_pr and exists):
        api.create_repo(repo_id, private=destination.private, exist_ok=True)
    if destination.revision and not destination.create_pr:
        api.create_branch(repo_id, branch=destination.revision, exist_ok=True)


def _upload(api: HfApi, destination: Destination, staged: Staged, message: str) -> CommitInfo:
    """Upload the staged files, and remove all others, in one commit."""
    repo_id, revision, names = destination.repo_id, destination.revision, staged.names
    info = api.model_info(repo_id, revision=revision)
    others = [file.rfilename for file in info.siblings if file.rfilename not in (*names, KEPT)]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, str(staged.folder / name)) for name in names),
            *(CommitOperationDelete(name) for name in others),
        ],
        commit_message=message,
        revision=revision,
        create_pr=destination.create_pr,
        parent_commit=info.sha,  # refused by the Hub if somebody else committed since
    )


def arrived(api: HfApi, repo_id: str, revision: str, folder: Path, names: list[str]) -> Iterator[Check]:
    """Yield whether the Hub has each file that was sent, by the hashes that it computes itself."""
    there = {info.path: info for info in api.get_paths_info(repo_id, names, revision=revision)}
    for name in names:
        info = there.get(name)
        if info is None:
            yield Check(name, False, "did not arrive")
            continue
        if info.lfs is not None:
            same = info.lfs.sha256 == hash_of(folder / name)
        else:
            same = info.blob_id == _git_hash(folder / name)
        yield Check(name, same, "arrived" if same else "arrived changed")


def _git_hash(path: Path) -> str:
    """Return the hash that git gives the content of a file."""
    content = path.read_bytes()
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _pin_card(api: HfApi, destination: Destination, staged: Staged, commit: CommitInfo) -> CommitInfo:
    """Upload the card once more, with the commit that it describes, and set the tag."""
    staged.write_card(commit.oid)
    card = CommitOperationAdd("README.md", str(staged.folder / "README.md"))
    where = commit.pr_revision if destination.create_pr else destination.revision
    of_card = api.create_commit(
        destination.repo_id, [card], commit_message="Pin the commit in the card", revision=where
    )
    if destination.tag:
        api.create_tag(destination.repo_id, tag=destination.tag, revision=of_card.oid)
    return of_card
