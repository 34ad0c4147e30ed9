"""One commit to the Hub, and the proof that it arrived."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from .errors import HubError, attempt
from .files import FILES

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
    endpoint: str | None = None,
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
        endpoint: The Hub's address, in place of huggingface_hub's.
        attempts: Tries of each step while the Hub is overloaded or out of reach.
        wait: Seconds after the first failed try; doubles with each, and a longer wish of the Hub's is obeyed.

    Raises:
        HubError: What failed and what to do about it.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise HubError(
            f'{repo_id!r} is not a repository on the Hub; give it as owner/name, of letters, digits, -_.'
        ) from None
    if repo_id.count('/') != 1:
        raise HubError(f'{repo_id!r} must name its owner, as in me/{repo_id}')
    token = token or get_token()
    if token is None:
        raise HubError('there is no Hugging Face token; run `hf auth login`, or set HF_TOKEN')
    if not (token.isascii() and token.isprintable() and ' ' not in token):
        raise HubError('the Hugging Face token holds characters that no token has; run `hf auth login` again')
    api = HfApi(endpoint=endpoint, token=token)

    def step(what: str, action: Callable[[], T]) -> T:
        return attempt(what, action, repo_id=repo_id, token=token, attempts=attempts, wait=wait)

    step('check the token', lambda: api.whoami())
    step('create the repository', lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if revision != 'main' and not create_pr and not revision.startswith('refs/'):
        step(f'create the branch {revision}', lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    pushed = step('commit the files', lambda: _commit_once(api, folder, repo_id, revision, create_pr))
    step('download what was pushed', lambda: _verify(api, folder, repo_id, pushed.commit, model))
    return pushed


def _commit_once(api: HfApi, folder: Path, repo_id: str, revision: str, create_pr: bool) -> Pushed:
    """Commit unless the files are there already: a commit whose answer got lost is found, not made twice."""
    wanted = {name: _oids(folder / name) for name in FILES}

    def state(at: str) -> tuple[str, bool]:
        info = api.model_info(repo_id, revision=at, files_metadata=True)
        there = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in info.siblings}
        return info.sha, all(there.get(name) in oids for name, oids in wanted.items())

    head, same = state(revision)
    if same:
        return Pushed(head, revision, False, f'{api.endpoint}/{repo_id}/commit/{head}')
    if create_pr:
        for proposal in api.get_repo_discussions(repo_id, discussion_type='pull_request', discussion_status='open'):
            sha, same = state(proposal.git_reference)
            if same:
                return Pushed(sha, proposal.git_reference, False, proposal.url)
    made = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, folder / name) for name in FILES],
        commit_message=f'Add {repo_id.rpartition("/")[2]}',
        revision=revision,
        create_pr=create_pr,
        parent_commit=head,  # a commit of somebody else's in between is refused, not overwritten
    )
    if create_pr:
        return Pushed(made.oid, made.pr_revision, True, made.pr_url)
    return Pushed(made.oid, revision, True, made.commit_url)


def _oids(path: Path) -> tuple[str, str]:
    """How the Hub may name this content: its sha256 if it keeps it as a large file, else its git blob id."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b'blob %d\0' % path.stat().st_size)
    with path.open('rb') as f:
        while chunk := f.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def _verify(api: HfApi, folder: Path, repo_id: str, commit: str, model: nn.Module) -> None:
    """Download a commit's files into a fresh cache; raises a HubError unless they are those of `folder`."""
    with tempfile.TemporaryDirectory() as cache:
        for name in FILES:
            path = Path(
                hf_hub_download(repo_id, name, revision=commit, cache_dir=cache, token=api.token, endpoint=api.endpoint)
            )
            if _oids(path) != _oids(folder / name):
                raise HubError(
                    f'{repo_id} serves another {name} than was pushed (sha256 {_oids(path)[0]} instead of '
                    f'{_oids(folder / name)[0]}); delete that file there and push again'
                )
        loaded = timm.create_model(f'local-dir:{path.parent}', pretrained=True).eval()
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        images = torch.randn(2, *loaded.pretrained_cfg['input_size'])
        difference = (loaded(images) - model(images)).abs().max().item()
    if not difference <= 1e-5:
        raise HubError(f'the model loaded from {repo_id} has other logits than the one pushed, by up to {difference}')


def load_line(repo_id: str, revision: str = 'main') -> str:
    """The line of Python that loads a pushed model."""
    at = '' if revision == 'main' else f'@{revision}'
    return f"model = timm.create_model('hf-hub:{repo_id}{at}', pretrained=True)"
