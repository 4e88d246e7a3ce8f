"""The repository on the Hub: who asks, whether it may be written to, sending in one commit, and looking at it after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ft_export import __version__
from ft_export.errors import ExportError
from ft_export.hub.answers import answered, status_of
from ft_export.hub.staging import File, pushable
from ft_export.hub.wanted import MAIN, Wanted
from ft_export.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = ["Repository", "base_card", "data_sets", "token_of"]

MOVED = 412
"""What the Hub answers to a commit whose parent is no longer the branch's newest."""
SHOWN = 3
"""Names that a message lists at most."""


def token_of() -> str | None:
    """The token in ``HF_TOKEN`` or in huggingface_hub's own store, or None."""
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


class Repository:
    """A repository that a model is pushed to.

    Attributes:
        repo: ``USER/NAME``.
        exists: whether it was there when :meth:`check` looked.
        parent: the branch's commit that :meth:`differing` looked at, and that a push builds on.
    """

    def __init__(self, wanted: Wanted, token: str | None, progress: Progress) -> None:
        if token is None:
            raise ExportError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")
        from huggingface_hub import HfApi

        self.wanted, self.repo = wanted, wanted.repo
        self.api: HfApi = HfApi(token=token, library_name="ft-export", library_version=__version__)
        self.progress = progress
        self.exists = False
        self.parent: str | None = None

    def check(self) -> list[str]:
        """Refuse what the Hub would refuse, before anything is made or sent; say what is of note.

        Raises:
            ExportError: the token is no good or has no right to the name, or the repository is public where a private
                one is wanted.
        """
        who = answered(self.api.whoami, "asking who the token belongs to", self.repo, self.progress)
        owner = self.repo.partition("/")[0]
        organisations = [str(entry.get("name")) for entry in who.get("orgs") or [] if isinstance(entry, dict)]
        if owner.lower() not in {name.lower() for name in (str(who.get("name")), *organisations)}:
            also = f" and {', '.join(organisations)}" if organisations else ""
            raise ExportError(
                f"the token has no right to write to {self.repo} (403): it belongs to {who.get('name')}{also}; "
                f"use a token of {owner}, or another repo="
            )
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise ExportError(
                f"the token may only read, and pushing to {self.repo} writes (403): make one that may write at "
                "https://huggingface.co/settings/tokens"
            )
        private = self._private()
        self.exists = private is not None
        if private is False and self.wanted.private:
            raise ExportError(
                f"{self.repo} is there and everybody can see it, and a private one was asked for: nothing was sent; "
                "add private=no to push to it all the same, or name another repo="
            )
        if private and not self.wanted.private:
            return [f"{self.repo} is there and private: it stays so (its settings on the Hub can change that)"]
        return []

    def create(self) -> None:
        """Make the repository and the branch, where they are not there.

        Raises:
            ExportError: the Hub refuses, or made a repository that everybody can see where a private one is wanted.
        """
        if not self.exists:
            self._ask(
                lambda: self.api.create_repo(self.repo, private=self.wanted.private, exist_ok=True),
                "creating the repository",
            )
            if self.wanted.private and self._private() is not True:
                raise ExportError(f"{self.repo} was created and the Hub does not say it is private: nothing was sent")
        if self.wanted.revision != MAIN:
            self._ask(
                lambda: self.api.create_branch(self.repo, branch=self.wanted.revision, exist_ok=True),
                f"creating the branch {self.wanted.revision}",
            )

    def differing(self, files: Sequence[File], overwrite: bool) -> tuple[list[File], list[str]]:
        """What is to be sent, and what is to be removed: files of another model that would be taken for this one's.

        Raises:
            ExportError: the repository holds other files of those names, or other weights, and ``overwrite`` is false.
        """
        self.parent = self._head()
        there = self._tree(self.parent)
        send = [file for file in files if not _same(file, there.get(file.name))]
        ours = {file.name for file in files}
        gone = [] if self.wanted.is_gguf else sorted(name for name in there if name not in ours and _of_a_model(name))
        taken = [file.name for file in send if file.name in there] + gone
        if taken and not overwrite:
            more = f" and {len(taken) - SHOWN} more" if len(taken) > SHOWN else ""
            raise ExportError(
                f"{self.repo} holds another {', '.join(taken[:SHOWN])}{more}: pass --overwrite to replace what is "
                "there (its history keeps it), or name another repo=; nothing was sent"
            )
        return send, gone

    def push(self, files: Sequence[File], gone: Sequence[str], message: str) -> str:
        """Send the files one after another, then make them the repository's in one commit; return that commit.

        What arrived before an interruption is known to the Hub by its checksum and not sent again; until the commit
        nobody sees any of it.

        The commit is made only on top of the one that :meth:`differing` looked at: what somebody else has pushed since
        then is not overwritten.

        Raises:
            ExportError: the Hub refuses, stays busy, or is not reached; or the branch has moved since it was looked at.
        """
        if not files and not gone:
            return str(self.parent)
        try:
            return str(self._ask(lambda: self._send(files, gone, message), "sending the files"))
        except ExportError as error:
            if error.__cause__ is None or status_of(error.__cause__) != MOVED:
                raise
            return self._moved(files, gone)

    def _moved(self, files: Sequence[File], gone: Sequence[str]) -> str:
        """The branch's commit, if it is this push's own: its answer was lost, and it was asked for again.

        Raises:
            ExportError: it is somebody else's.
        """
        head = self._head()
        there = self._tree(head)
        if all(_same(file, there.get(file.name)) for file in files) and not any(name in there for name in gone):
            return head
        raise ExportError(
            f"{self.repo} was changed by another push while this one was sending (its branch {self.wanted.revision} "
            f"is at {head[:8]}, was at {str(self.parent)[:8]}): nothing of this one appears there; look at what came, "
            "and run the same command again, what has arrived is not sent again"
        )

    def check_arrived(self, files: Sequence[File], commit: str) -> list[dict[str, Any]]:
        """Compare what the Hub says it holds with the files here; return the Hub's list.

        Raises:
            ExportError: a file is missing there, or has another size or checksum.
        """
        there = self._tree(commit)
        for file in files:
            found = there.get(file.name)
            if found is None:
                raise ExportError(f"{self.repo} does not hold {file.name} after the push: push again")
            if not _same(file, found):
                held = found.lfs.sha256 if found.lfs else found.blob_id
                raise ExportError(
                    f"{self.repo} holds another {file.name} than was sent ({found.size} bytes, checksum {held}; here "
                    f"{file.size} bytes, sha256 {file.sha256}): push again with --overwrite"
                )
        return [
            {"name": entry.path, "size": entry.size, "git_id": entry.blob_id}
            | ({"sha256": entry.lfs.sha256} if entry.lfs else {})
            for entry in there.values()
        ]

    def _send(self, files: Sequence[File], gone: Sequence[str], message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = []
        for file in files:
            addition = CommitOperationAdd(file.name, file.path)
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: the file need not be read once more
            additions.append(addition)
        for number, addition in enumerate(sorted(additions, key=lambda one: one.upload_info.size)):
            self.progress(number, len(additions), "files sent")
            self.api.preupload_lfs_files(
                self.repo, [addition], revision=self.wanted.revision, free_memory=False, num_threads=1
            )
        self.progress(len(additions), len(additions), "files sent")
        made = self.api.create_commit(
            self.repo,
            [*additions, *(CommitOperationDelete(name) for name in gone)],
            commit_message=message,
            revision=self.wanted.revision,
            parent_commit=self.parent,
        )
        return str(made.oid)

    def _ask(self, call: Any, doing: str) -> Any:
        return answered(call, doing, self.repo, self.progress)

    def _private(self) -> bool | None:
        """Whether the repository is private; None where there is none."""

        def look() -> bool | None:
            try:
                return bool(self.api.model_info(self.repo).private)
            except Exception as error:
                if type(error).__name__ == "RepositoryNotFoundError" and status_of(error) == 404:
                    return None
                raise

        found: bool | None = self._ask(look, "looking for the repository")
        return found

    def _head(self) -> str:
        return str(self._ask(lambda: self.api.model_info(self.repo, revision=self.wanted.revision).sha, "looking"))

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        entries = self._ask(
            lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=revision)),
            "listing what the repository holds",
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def base_card(base: str, token: str | None, repo: str, progress: Progress, strict: bool) -> dict[str, Any] | None:
    """The metadata of the base model's card on the Hub, empty if it has none; None where no such model is to be seen.

    Args:
        strict: whether a Hub that is busy or not reached is an error; it is not where nothing is to be sent.
    """
    info = _look(lambda api: api.model_info(base), token, repo, progress, strict, f"looking for the base model {base}")
    if info is None:
        return None
    return dict(info.card_data.to_dict()) if info.card_data is not None else {}


def data_sets(names: Sequence[str], token: str | None, repo: str, progress: Progress, strict: bool) -> list[str]:
    """Those of the names that are data sets on the Hub."""

    def there(name: str) -> bool:
        doing = f"looking for the data set {name}"
        return _look(lambda api: api.dataset_info(name), token, repo, progress, strict, doing) is not None

    return [name for name in names if there(name)]


def _look(call: Any, token: str | None, repo: str, progress: Progress, strict: bool, doing: str) -> Any:
    from huggingface_hub import HfApi

    api = HfApi(token=token or False, library_name="ft-export", library_version=__version__)

    def look() -> Any:
        try:
            return call(api)
        except Exception as error:
            if status_of(error) in (401, 403, 404):
                return None
            raise

    try:
        return answered(look, doing, repo, progress, tries=5 if strict else 1)
    except ExportError:
        if strict:
            raise
        return None


def _of_a_model(name: str) -> bool:
    return pushable(name, adapter=True) or pushable(name, adapter=False)


def _same(file: File, there: RepoFile | None) -> bool:
    if there is None or there.size != file.size:
        return False
    return bool(there.lfs.sha256 == file.sha256 if there.lfs else there.blob_id == file.git_id())
