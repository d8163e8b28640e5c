"""Publishes a package on the hub in one commit; checks before and after, and can be repeated after an interruption."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import build_hf_headers, validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash

from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.export.checkpoint import RunCheckpoint
from fedtune.export.package import MANIFEST, Package, hub_base, redact
from fedtune.hub import LOG_IN, PASSING, UnreachableError, ask, ask_about, patiently
from fedtune.runs.directory import file_sha256

Contents = Mapping[str, bytes | Path]
"""Files by name, the manifest included."""


@dataclass(frozen=True)
class Published:
    """A package on the hub; the result of the target `hf-hub`."""

    repo: str
    url: str
    """The address of its page."""
    commit: str | None
    """The commit that holds the package; None after a dry run."""
    sizes: Mapping[str, int]
    """Bytes by file name, the manifest included."""
    created: bool
    """Whether the repository is new; after a dry run, whether it would be."""
    unchanged: bool
    """Whether the hub already held every file, so that nothing was sent."""
    notes: tuple[str, ...]
    """What the user should know: visibility, gating, what was not checked."""

    @property
    def location(self) -> str:
        """The address of the page."""
        return self.url

    @property
    def status(self) -> str:
        """The commit, or that none was needed."""
        return "the hub already has every file" if self.unchanged else f"commit {self.commit}"


def publish(
    checkpoint: RunCheckpoint,
    package: Package,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Published:
    """Upload `package` to the repository `repo`, which is created (private unless `public`) if it does not exist.

    Files that the manifest of a former package lists and this one lacks are deleted; other files stay, and so does the
    visibility of an existing repository. After an interruption, the same call continues and ends in the same state.

    Args:
        checkpoint: The adapter and its run; its base model is looked up on the hub.
        package: The files, as `package()` checked them.
        repo: The id of the repository, `owner/name`.
        public: Whether everyone can see a new repository.
        revision: A branch, created from the main branch if it does not exist; None means the main branch.
        message: The commit message; None names the adapter and the run.
        dry_run: Only ask the hub and send nothing; a reason why the upload would fail becomes a note.

    Raises:
        UsageError: `repo` or `revision` is not a name that the hub accepts, or the hub refuses the model card.
        MissingError: there is no token, no permission, or no such base model, or the hub is unreachable or refuses.
        FedTuneError: the hub holds other contents than were sent.
    """
    _check_names(repo, revision)
    sizes = package.sizes()
    api = HfApi()
    exists: bool | None = None
    try:
        exists, notes = _preflight(api, hub_base(checkpoint.config), repo, public)
    except MissingError as error:
        if not dry_run:
            raise
        notes = [f"It cannot be published yet: {error}"]
    url = f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")
    if dry_run:
        return Published(repo, url, None, sizes, exists is False, False, tuple(notes))
    with _explained(repo, api.endpoint, notes):
        if not exists:
            patiently(lambda: api.create_repo(repo, private=not public, exist_ok=True))
        if revision is not None:
            patiently(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        text = message or f"{checkpoint.name} of {checkpoint.run.path.resolve().name}, exported by fedtune"
        contents = {**package.files, MANIFEST: package.manifest()}
        commit, unchanged = _commit(api, repo, revision or "main", contents, text)
        _compare(api, repo, commit, contents)
    return Published(repo, url, commit, sizes, not exists, unchanged, tuple(notes))


# --- checks before the upload -----------------------------------------------------------------------------------------


def _check_names(repo: str, revision: str | None) -> None:
    try:
        validate_repo_id(repo)
        fits = repo.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise UsageError(f"{repo!r} is not the name of a repository on the hub.", hint="Example: --repo USER/NAME")
    if revision is None:
        return
    bad = re.fullmatch(r"[0-9a-f]{40}|refs/.*|.*\.\..*|.*[/.]", revision)
    if bad or not re.fullmatch(r"[A-Za-z0-9][\w./-]*", revision, re.ASCII):
        raise UsageError(f"{revision!r} is not the name of a branch.", hint="Example: --revision rank-16")


def _preflight(api: HfApi, base: str | None, repo: str, public: bool) -> tuple[bool, list[str]]:
    """Return whether `repo` exists, and notes for the user; raise a MissingError if the upload would fail."""
    if get_token() is None:
        raise MissingError("Publishing needs a token of the hub; none was found.", hint=LOG_IN)
    try:
        _check_account(patiently(lambda: ask(api.whoami)), repo, api.endpoint)
        notes = _about_base(api, base)
        info = _existing(api, repo)
    except UnreachableError as error:
        raise MissingError(
            f"Nothing can be sent: {error}.", hint="Check the network; --to folder works without it."
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(error, repo, api.endpoint) from error
    if info is None:
        return False, notes
    if not info.private and not public:
        notes.append(f"{repo} is public already and stays public: everyone will see the files.")
    if info.private and public:
        notes.append(f"{repo} is private and stays private; make it public at {api.endpoint}/{repo}/settings.")
    if info.gated:
        notes.append(f"{repo} is gated and stays gated: readers must request access.")
    return True, notes


def _check_account(account: Mapping[str, Any], repo: str, endpoint: str) -> None:
    """Raise a MissingError if the hub's `whoami` says that the token may not write to `repo`."""
    namespace = repo.partition("/")[0].casefold()
    user = str(account.get("name"))
    others = {str(each.get("name")).casefold(): each for each in account.get("orgs") or ()}
    tokens = f"{endpoint}/settings/tokens"
    if namespace != user.casefold():
        if namespace not in others:
            raise MissingError(
                f"You are logged in as {user}, who is not a member of {repo.partition('/')[0]}.",
                hint=f"Publish as --repo {user}/{repo.partition('/')[2]}, or log in as another user: hf auth login",
            )
        if others[namespace].get("roleInOrg") == "read":
            raise MissingError(
                f"As a member of {repo.partition('/')[0]} you may read but not write.", hint="Ask one of its admins."
            )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise MissingError(
            "Your token may only read.", hint=f"Create one that may write at {tokens}, then: hf auth login"
        )
    scoped = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scoped is not None:
        names = (namespace, repo.casefold())
        granted = (each for each in scoped if str(each.get("entity", {}).get("name")).casefold() in names)
        if not any("repo.write" in each.get("permissions", ()) for each in granted):
            raise MissingError(
                f"Your fine-grained token may not write to {repo}.",
                hint=f"Give it write access to the repositories of {repo.partition('/')[0]} at {tokens}.",
            )


def _about_base(api: HfApi, base: str | None) -> list[str]:
    """Return notes about the base model; raise a MissingError if the hub has no model of that name."""
    if base is None:
        return ["The base model is not on the hub, so the card does not name it."]
    try:
        gated = patiently(lambda: ask_about("base model", base, lambda: api.model_info(base))).gated
    except MissingError as error:
        if not isinstance(error.__cause__, GatedRepoError):
            raise
        gated = "manual"
    return [f"The base model {base} is gated: users of the adapter must request access to it."] if gated else []


def _existing(api: HfApi, repo: str) -> ModelInfo | None:
    """Return the hub's record of `repo`, None if it does not exist; raise a MissingError if the token may not write to it."""
    try:
        info = patiently(lambda: ask(lambda: api.model_info(repo)))
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        return None
    try:
        patiently(lambda: ask(lambda: api.auth_check(repo, write=True)))
    except HfHubHTTPError as error:
        # Any other 4xx comes from a hub without this endpoint.
        if error.response.status_code in (401, 403):
            raise
    return info


# --- upload -----------------------------------------------------------------------------------------------------------


def _commit(api: HfApi, repo: str, branch: str, contents: Contents, message: str) -> tuple[str, bool]:
    """Return the commit at which `branch` holds `contents`, and whether it already held them."""
    tried = False

    def attempt() -> str:
        # Each attempt first reads the branch, so that a commit whose response was lost is not made twice. With
        # `parent_commit` the hub refuses the commit if another one has come in between.
        nonlocal tried
        head = str(api.model_info(repo, revision=branch).sha)
        there = _files(api, repo, head)
        leftover = _former(api, repo, head, there) - contents.keys()
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in sorted(leftover)),
            *(CommitOperationAdd(name, contents[name]) for name in _differing(contents, there)),
        ]
        if not changes:
            return head
        tried = True
        return api.create_commit(repo, changes, commit_message=message, revision=branch, parent_commit=head).oid

    return patiently(attempt), not tried


def _compare(api: HfApi, repo: str, commit: str, contents: Contents) -> None:
    """Raise a FedTuneError if the hub holds other files than `contents` at `commit`."""
    wrong = _differing(contents, patiently(lambda: _files(api, repo, commit)))
    if not wrong and patiently(lambda: _manifest(api, repo, commit)) != contents[MANIFEST]:
        wrong = [MANIFEST]
    if wrong:
        raise FedTuneError(
            f"At commit {commit[:8]} the hub holds other contents than were sent to {repo}: {', '.join(wrong)}.",
            hint="Run the same command again.",
        )


def _files(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, revision=commit, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _differing(contents: Contents, there: Mapping[str, RepoFile]) -> list[str]:
    """Return the files that are missing or different on the hub, by sha256 in large file storage, by git's hash elsewhere."""

    def same(content: bytes | Path, file: RepoFile) -> bool:
        if file.lfs is None:
            return file.blob_id == git_hash(content if isinstance(content, bytes) else content.read_bytes())
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        return file.lfs.sha256 == digest

    return [name for name, content in contents.items() if name not in there or not same(content, there[name])]


def _manifest(api: HfApi, repo: str, commit: str) -> bytes:
    # Bypasses the cache of the library, to see what the hub really holds.
    url = hf_hub_url(repo, MANIFEST, revision=commit, endpoint=api.endpoint)
    response = get_session().get(url, headers=build_hf_headers())
    hf_raise_for_status(response)
    return response.content


def _former(api: HfApi, repo: str, commit: str, there: Mapping[str, RepoFile]) -> set[str]:
    """Return the files of a former package, by its manifest; none if the manifest has another form than fedtune's."""
    if MANIFEST not in there:
        return set()
    try:
        listed = json.loads(_manifest(api, repo, commit))
    except ValueError:
        return set()
    if not isinstance(listed, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in listed.values()):
        return set()
    return listed.keys() & there.keys()


# --- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(repo: str, endpoint: str, notes: list[str]) -> Iterator[None]:
    """Turn an exception of the hub client into one sentence, and its warnings about the card into notes."""
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity(
        logging.ERROR
    )  # its warnings contain addresses that give permission to upload
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        # Other warnings of the library concern its own use.
        said = (_one_line(str(each.message)) for each in caught)
        notes += [f"The hub says about the card: {each.partition('- ')[2]}" for each in said if "README.md" in each]
    except FedTuneError:
        raise
    except Exception as error:
        if str(error).startswith("Invalid metadata"):
            raise UsageError(
                f"The hub refuses the model card: {_one_line(str(error))}.", hint="Fix the run's config or --license."
            ) from error
        cause = (
            error.__cause__ if isinstance(error, RuntimeError) else error
        )  # the threads that upload wrap their errors
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(cause, repo, endpoint) from error
        raise MissingError(
            f"Publishing {repo} was interrupted ({type(error).__name__}).",
            hint="Run the same command again: it continues from there.",
        ) from error
    finally:
        huggingface_hub.logging.set_verbosity(verbosity)


def _refusal(error: HfHubHTTPError, repo: str, endpoint: str) -> MissingError:
    status = error.response.status_code
    if status == 401:
        first = "Unset HF_TOKEN, which takes precedence over the login. " if os.environ.get("HF_TOKEN") else ""
        return MissingError(f"The hub at {endpoint} does not accept your token (401).", hint=first + LOG_IN)
    if status == 403:
        return MissingError(f"The hub at {endpoint} does not let your token write to {repo} (403).", hint=LOG_IN)
    said = _one_line(redact((error.server_message or "").replace(get_token() or "\0", "[removed]")))
    return MissingError(
        f"The hub at {endpoint} answers {status} for {repo}{': ' if said else ''}{said}.",
        hint="Run the same command again later: it continues from there." if status in PASSING else "",
    )


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")[:300]
