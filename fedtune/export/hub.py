"""Publishes a package on the hub: checked before anything is sent, one commit, compared afterwards; safe to repeat."""

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
from fedtune.export.finished import FinishedRun
from fedtune.export.package import MANIFEST, Package, hub_base, strike
from fedtune.hub import LOG_IN, PASSING, UnreachableError, ask, ask_about, patiently
from fedtune.runs.directory import file_sha256

Contents = Mapping[str, bytes | Path]
"""Files by their names, the manifest included."""


@dataclass(frozen=True)
class Published:
    """What became of a package on the hub."""

    repo: str
    url: str
    """The page in the browser."""
    commit: str | None
    """The commit that holds the package; None after a dry run."""
    sizes: Mapping[str, int]
    """Bytes by file name, the manifest included."""
    created: bool
    """Whether the repository is new; after a dry run, whether it would be."""
    unchanged: bool
    """Whether all was there already, so that nothing was sent."""
    notes: tuple[str, ...]
    """What the user should know: visibility, gating, what was not checked."""


def publish(
    finished: FinishedRun,
    package: Package,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Published:
    """Make the repository `repo` hold `package`, creating it (private unless `public`) where there is none.

    What a former package listed in its manifest and this one lacks is deleted; no other file is touched, and the
    visibility of a repository that exists stays. After an interruption the same call goes on and ends in the same state.

    Args:
        finished: The run; its base model is looked up on the hub.
        package: The files, as `package()` checked them.
        repo: The repository's id, `owner/name`.
        public: Whether a new repository is for everyone to see.
        revision: A branch, created from the main one where it is missing; None means the main one.
        message: The commit's message; None names the adapter and the run.
        dry_run: Only ask, send nothing; what keeps the real call from working becomes a note.

    Raises:
        UsageError: `repo` or `revision` is no name that the hub takes, or it does not take the model card.
        MissingError: no token, no right to write there, no such base model, or the hub cannot be reached or refuses.
        FedTuneError: the hub holds something else than was sent.
    """
    _check_names(repo, revision)
    sizes = package.sizes()
    api = HfApi()
    exists: bool | None = None
    try:
        exists, notes = _preflight(api, hub_base(finished.config), repo, public)
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
        text = message or f"{finished.name} of {finished.run.path.resolve().name}, exported by fedtune"
        contents = {**package.files, MANIFEST: package.manifest()}
        commit, unchanged = _commit(api, repo, revision or "main", contents, text)
        _compare(api, repo, commit, contents)
    return Published(repo, url, commit, sizes, not exists, unchanged, tuple(notes))


# --- before anything is sent ------------------------------------------------------------------------------------------


def _check_names(repo: str, revision: str | None) -> None:
    try:
        validate_repo_id(repo)
        fits = repo.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise UsageError(f"{repo!r} is no name for a repository on the hub.", hint="Example: --repo USER/NAME")
    if revision is None:
        return
    bad = re.fullmatch(r"[0-9a-f]{40}|refs/.*|.*\.\..*|.*[/.]", revision)
    if bad or not re.fullmatch(r"[A-Za-z0-9][\w./-]*", revision, re.ASCII):
        raise UsageError(f"{revision!r} is no name for a branch.", hint="Example: --revision rank-16")


def _preflight(api: HfApi, base: str | None, repo: str, public: bool) -> tuple[bool, list[str]]:
    """Return whether `repo` exists, and what the user should know; raise a MissingError for what cannot work."""
    if get_token() is None:
        raise MissingError("Publishing needs a token of the hub, and there is none.", hint=LOG_IN)
    try:
        _check_account(patiently(lambda: ask(api.whoami)), repo, api.endpoint)
        notes = _about_base(api, base)
        info = _existing(api, repo)
    except UnreachableError as error:
        raise MissingError(
            f"Nothing can be sent: {error}.", hint="Check the network; --to folder needs none."
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(error, repo, api.endpoint) from error
    if info is None:
        return False, notes
    if not info.private and not public:
        notes.append(f"{repo} is public already and stays so: everyone sees what is sent.")
    if info.private and public:
        notes.append(f"{repo} is private and stays so; make it public at {api.endpoint}/{repo}/settings.")
    if info.gated:
        notes.append(f"{repo} is gated and stays so: whoever wants to read it must ask.")
    return True, notes


def _check_account(account: Mapping[str, Any], repo: str, endpoint: str) -> None:
    """Raise a MissingError where the hub's `whoami` says that the token may not write to `repo`."""
    namespace = repo.partition("/")[0].casefold()
    user = str(account.get("name"))
    others = {str(each.get("name")).casefold(): each for each in account.get("orgs") or ()}
    tokens = f"{endpoint}/settings/tokens"
    if namespace != user.casefold():
        if namespace not in others:
            raise MissingError(
                f"You are logged in as {user}, who is no member of {repo.partition('/')[0]}.",
                hint=f"Publish as --repo {user}/{repo.partition('/')[2]}, or log in as another user: hf auth login",
            )
        if others[namespace].get("roleInOrg") == "read":
            raise MissingError(
                f"As a member of {repo.partition('/')[0]} you may read, not write.", hint="Ask one of its admins."
            )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise MissingError(
            "Your token may only read.", hint=f"Make one that may write at {tokens}, then: hf auth login"
        )
    scoped = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scoped is not None:
        names = (namespace, repo.casefold())
        granted = (each for each in scoped if str(each.get("entity", {}).get("name")).casefold() in names)
        if not any("repo.write" in each.get("permissions", ()) for each in granted):
            raise MissingError(
                f"Your fine-grained token may not write to {repo}.",
                hint=f"Let it write to the repositories of {repo.partition('/')[0]} at {tokens}.",
            )


def _about_base(api: HfApi, base: str | None) -> list[str]:
    """Return what to say of the base model; raise a MissingError where the hub has none of that name."""
    if base is None:
        return ["The base model is not on the hub, so the card names none."]
    try:
        gated = patiently(lambda: ask_about("base model", base, lambda: api.model_info(base))).gated
    except MissingError as error:
        if not isinstance(error.__cause__, GatedRepoError):
            raise
        gated = "manual"
    return [f"The base model {base} is gated: users of the adapter must be let in there."] if gated else []


def _existing(api: HfApi, repo: str) -> ModelInfo | None:
    """Return the hub's record of `repo`, None where there is none; raise a MissingError where it may not be written."""
    try:
        info = patiently(lambda: ask(lambda: api.model_info(repo)))
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        return None
    try:
        patiently(lambda: ask(lambda: api.auth_check(repo, write=True)))
    except HfHubHTTPError as error:
        # Any other 4xx comes from an endpoint that does not know the question.
        if error.response.status_code in (401, 403):
            raise
    return info


# --- sending ----------------------------------------------------------------------------------------------------------


def _commit(api: HfApi, repo: str, branch: str, contents: Contents, message: str) -> tuple[str, bool]:
    """Return the commit at which `branch` holds `contents`, and whether it held them before."""
    tried = False

    def attempt() -> str:
        # Each try looks first what is there: a commit whose answer was lost is found, not made again. The parent keeps
        # this from being overtaken by another commit in between.
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
    """Raise a FedTuneError where the hub holds something else than `contents` at `commit`."""
    wrong = _differing(contents, patiently(lambda: _files(api, repo, commit)))
    if not wrong and patiently(lambda: _manifest(api, repo, commit)) != contents[MANIFEST]:
        wrong = [MANIFEST]
    if wrong:
        raise FedTuneError(
            f"At {commit[:8]} the hub holds something else than was sent to {repo}: {', '.join(wrong)}.",
            hint="Run the same command again.",
        )


def _files(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, revision=commit, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _differing(contents: Contents, there: Mapping[str, RepoFile]) -> list[str]:
    """Return which files are not `there`, or not the same: by sha256 in large file storage, by git's hash elsewhere."""

    def same(content: bytes | Path, file: RepoFile) -> bool:
        if file.lfs is None:
            return file.blob_id == git_hash(content if isinstance(content, bytes) else content.read_bytes())
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        return file.lfs.sha256 == digest

    return [name for name, content in contents.items() if name not in there or not same(content, there[name])]


def _manifest(api: HfApi, repo: str, commit: str) -> bytes:
    # Not through the library's cache: what the hub holds is in question.
    url = hf_hub_url(repo, MANIFEST, revision=commit, endpoint=api.endpoint)
    response = get_session().get(url, headers=build_hf_headers())
    hf_raise_for_status(response)
    return response.content


def _former(api: HfApi, repo: str, commit: str, there: Mapping[str, RepoFile]) -> set[str]:
    """Return the files that a former package put `there`, by its manifest; nothing where that is another's manifest."""
    if MANIFEST not in there:
        return set()
    try:
        listed = json.loads(_manifest(api, repo, commit))
    except ValueError:
        return set()
    if not isinstance(listed, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in listed.values()):
        return set()
    return listed.keys() & there.keys()


# --- what may go wrong ------------------------------------------------------------------------------------------------


@contextmanager
def _explained(repo: str, endpoint: str, notes: list[str]) -> Iterator[None]:
    """Turn what the hub client raises while sending into one sentence, and its warnings of the card into notes."""
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity(logging.ERROR)  # its warnings show addresses that let their reader upload
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        # The library's other warnings are not the user's concern.
        said = (_one_line(str(each.message)) for each in caught)
        notes += [f"The hub says of the card: {each.partition('- ')[2]}" for each in said if "README.md" in each]
    except FedTuneError:
        raise
    except Exception as error:
        if str(error).startswith("Invalid metadata"):
            raise UsageError(
                f"The hub does not take the model card: {_one_line(str(error))}.", hint="Mend what the card says."
            ) from error
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # an upload's thread wraps what it meets
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(cause, repo, endpoint) from error
        raise MissingError(
            f"Publishing {repo} broke off ({type(error).__name__}).",
            hint="Run the same command again: it goes on from there.",
        ) from error
    finally:
        huggingface_hub.logging.set_verbosity(verbosity)


def _refusal(error: HfHubHTTPError, repo: str, endpoint: str) -> MissingError:
    status = error.response.status_code
    if status == 401:
        first = "Unset HF_TOKEN, which goes before the login. " if os.environ.get("HF_TOKEN") else ""
        return MissingError(f"The hub at {endpoint} does not accept your token (401).", hint=first + LOG_IN)
    if status == 403:
        return MissingError(f"The hub at {endpoint} does not let your token write to {repo} (403).", hint=LOG_IN)
    said = _one_line(strike((error.server_message or "").replace(get_token() or "\0", "[removed]")))
    return MissingError(
        f"The hub at {endpoint} answers {status} for {repo}{': ' if said else ''}{said}.",
        hint="Run the same command again later: it goes on from there." if status in PASSING else "",
    )


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")[:300]
