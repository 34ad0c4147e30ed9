"""One commit to the Hub, and the proof that it arrived."""

import hashlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..catalog import config_of
from ..errors import UserError, printable
from ..files import sha256
from .files import FILES
from .retry import attempt

T = TypeVar('T')


class Pushed(NamedTuple):
    """Where the files are: the commit, the revision to load them from, and whether this push made the commit."""

    commit: str
    revision: str
    new: bool
    url: str


def push(
    folder: str | Path,
    repo_id: str,
    model: nn.Module,
    private: bool = False,
    create_pr: bool = False,
    revision: str = 'main',
    token: str | None = None,
    attempts: int = 4,
    wait: float = 2.0,
) -> Pushed:
    """Create the repository if need be, put the files there in one commit, download them again and compare.

    Does nothing but compare where the repository holds the same files. Whatever fails, the repository has the whole
    commit or nothing of it, and the same call finishes the job.

    Args:
        folder: What `write_files` wrote.
        repo_id: `owner/name`.
        model: The model that was written; what is downloaded must have its logits.
        private: Create the repository as a private one.
        create_pr: Open a pull request in place of committing to `revision`.
        revision: The branch; created if need be.
        token: In place of the one huggingface_hub finds.
        attempts: Tries of each step while the Hub is overloaded or out of reach.
        wait: Seconds after the first failed try; doubles with each, and a longer Retry-After takes precedence.

    Raises:
        UserError: What failed and what to do about it.
    """
    folder = Path(folder)
    check_target(repo_id, revision)
    token = token or get_token()
    if token is None:
        raise UserError('there is no Hugging Face token; run `hf auth login`, or set HF_TOKEN')
    if not (token.isascii() and token.isprintable() and ' ' not in token):
        raise UserError('the Hugging Face token holds characters that no token has; run `hf auth login` again')
    api = HfApi(token=token)

    def step(what: str, action: Callable[[], T]) -> T:
        return attempt(what, action, repo_id=repo_id, token=token, attempts=attempts, wait=wait)

    step('check the token', lambda: api.whoami())
    if private and step('look for the repository', lambda: _is_public(api, repo_id)):
        raise UserError(
            f'{repo_id} is there already, and public: nothing was sent. Make it private on the Hub first, choose '
            'another name, or leave --private out'
        )
    step('create the repository', lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if revision != 'main' and not create_pr and not revision.startswith('refs/'):
        step(f'create the branch {revision}', lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    before = step('read the repository', lambda: api.model_info(repo_id, revision=revision))
    if private and not before.private:  # somebody else made it in between
        raise UserError(f'{repo_id} is public, although a private one was asked for: nothing was sent')
    pushed = step('commit the files', lambda: _commit(api, folder, repo_id, revision, create_pr))
    pushed = pushed._replace(new=pushed.new and pushed.commit != before.sha)
    step('download what was pushed', lambda: _verify(api, folder, repo_id, pushed.commit, model))
    return pushed


def check_target(repo_id: str, revision: str = 'main') -> None:
    """Make sure that a model can have this name on the Hub and this branch, as far as the names alone can tell.

    Raises:
        UserError: It cannot.
    """
    shown = printable(repo_id)
    try:
        if not repo_id.isprintable():  # older clients let a newline at the end pass
            raise HFValidationError
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(
            f'{shown!r} is not a repository on the Hub; give it as owner/name, of letters, digits, -_.'
        ) from None
    if repo_id.count('/') != 1:
        raise UserError(f'{shown!r} must name its owner, as in me/{shown}')
    # the rules of git for the names of branches
    odd = re.search(r'[^!-~]|[~^:?*\[\\@]|\.\.|//|/\.|\.lock(/|$)|^[./-]|[./]$', revision)
    if odd or not revision or len(revision) > 200:
        raise UserError(f'{printable(revision)!r} is not the name of a branch')


def _is_public(api: HfApi, repo_id: str) -> bool:
    """Whether there is such a repository that everybody can see."""
    try:
        return not api.model_info(repo_id).private
    except RepositoryNotFoundError:
        return False


def _commit(api: HfApi, folder: Path, repo_id: str, revision: str, create_pr: bool) -> Pushed:
    """Commit what differs. A pull request whose answer got lost is found, not opened twice.

    create_commit leaves out the files that the repository has, and makes no commit where it has all of them.
    """
    head = api.model_info(repo_id, revision=revision).sha
    if create_pr:
        wanted = {name: _oids(folder / name) for name in FILES}
        for proposal in api.get_repo_discussions(repo_id, discussion_type='pull_request', discussion_status='open'):
            info = api.model_info(repo_id, revision=proposal.git_reference, files_metadata=True)
            there = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in info.siblings or ()}
            if all(there.get(name) in oids for name, oids in wanted.items()):
                return Pushed(str(info.sha), str(proposal.git_reference), False, proposal.url)
    made = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, folder / name) for name in FILES],
        commit_message=f'Add {repo_id.rpartition("/")[2]}',
        revision=revision,
        create_pr=create_pr,
        parent_commit=head,  # a commit of somebody else's in between is refused, not overwritten
    )
    if made.pr_url is not None:
        return Pushed(made.oid, str(made.pr_revision), True, made.pr_url)
    return Pushed(made.oid, revision, True, made.commit_url)


def _oids(path: Path) -> tuple[str, str]:
    """How the Hub may name this content: its sha256 if it keeps it as a large file, else its git blob id."""
    blob = hashlib.sha1(b'blob %d\0' % path.stat().st_size)
    with path.open('rb') as f:
        while chunk := f.read(1 << 20):
            blob.update(chunk)
    return sha256(path), blob.hexdigest()


def _verify(api: HfApi, folder: Path, repo_id: str, commit: str, model: nn.Module) -> None:
    """Download a commit's files into a fresh cache; raises a UserError unless they are those of `folder`."""
    with tempfile.TemporaryDirectory() as cache:
        for name in FILES:
            path = Path(hf_hub_download(repo_id, name, revision=commit, cache_dir=cache, token=api.token))
            served, ours = sha256(path), sha256(folder / name)
            if served != ours:
                raise UserError(
                    f'{repo_id} serves another {name} than was pushed (sha256 {served} instead of {ours}); '
                    'delete that file there and push again'
                )
        loaded = timm.create_model(f'local-dir:{path.parent}', pretrained=True).eval()
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        images = torch.randn(2, *config_of(loaded)['input_size'])
        difference = (loaded(images) - model(images)).abs().max().item()
    if not difference <= 1e-5:
        raise UserError(f'the model loaded from {repo_id} has other logits than the one pushed, by up to {difference}')


def load_line(repo_id: str, revision: str = 'main') -> str:
    """The line of Python that loads a pushed model."""
    at = '' if revision == 'main' else f'@{revision}'
    return f"model = timm.create_model('hf-hub:{repo_id}{at}', pretrained=True)"
