"""Models to the Hugging Face Hub: a checkpoint that fits, its files, its model card, one commit, and the proof.

    model = build('senetv2_resnet20', checkpoint='model_best.pth.tar')
    facts = load_facts('facts.yaml')
    write_files(model, 'out', render_card(model, 'me/x', facts, count), facts)
    push('out', 'me/x', model)

What a user or a machine did wrong is a HubError whose text is one plain line. No text of this module holds the token.
"""
import argparse
import csv
import errno
import hashlib
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import timm
import torch
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo, resolve_input_data_config
from timm.models import clean_state_dict, get_pretrained_cfg, model_entrypoint, save_for_hf
from torch import nn

FILES = ('model.safetensors', 'config.json', 'README.md')
_HERE = Path(__file__).resolve().parent
CARDS = next(path for path in (_HERE / 'hub_cards', _HERE.parent / 'hub_cards') if path.is_dir())

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_RETRIED = (408, 412, 429, 500, 502, 503, 504)  # 412: somebody else committed in between
_CLIENTS = ('httpx', 'httpx2', 'requests', 'urllib3')  # what one version of huggingface_hub or another is built on
_logger = logging.getLogger(__name__)
T = TypeVar('T')


class HubError(Exception):
    """One plain line: what is wrong and what to do."""


# The model


def build(
        name: str,
        tag: str | None = None,
        checkpoint: str | Path | None = None,
        ema: bool = False,
        **model_args,
) -> nn.Module:
    """A model of this package with its weights, in eval mode.

    The hidden units that a lift adds are initialised from a fixed seed, so that the same tag gives the same file.

    Args:
        name: A model of timm_senetv2.
        tag: Pretrained tag of timm's registry. Or:
        checkpoint: A checkpoint of timm's training script, a state dict, or a safetensors file.
        ema: Take the checkpoint's averaged weights.
        **model_args: For `timm.create_model`, such as num_classes.

    Raises:
        HubError: An unknown model or tag, or a file that cannot be read or does not fit; names the first such tensor.
    """
    ours = [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith(f'{__package__}.')]
    if name not in ours:
        near = get_close_matches(name, ours, 1)
        raise HubError(f'{name} is not a model of timm_senetv2' + (f'; do you mean {near[0]}?' if near else ''))
    if (tag is None) == (checkpoint is None):
        raise HubError('give either a pretrained tag or a checkpoint')
    if ema and checkpoint is None:
        raise HubError('averaged (EMA) weights come from a checkpoint, a pretrained tag has none')
    known = [n.partition('.')[2] for n in timm.list_pretrained(f'{name}.*')]
    if tag is not None and tag not in known:
        raise HubError(f'{name} has no pretrained weights with the tag {tag!r}; it has {", ".join(known) or "none"}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if tag is not None:
            source = get_pretrained_cfg(f'{name}.{tag}').hf_hub_id
            model = _attempt(
                f'load the weights of {name}.{tag}',
                lambda: timm.create_model(f'{name}.{tag}', pretrained=True, **model_args),
                repo_id=source or '',
            )
        else:
            # what the config says of pretrained weights does not hold for the checkpoint
            model = timm.create_model(f'{name}.untrained', pretrained_cfg_overlay=dict(tag=None), **model_args)
    if checkpoint is not None:
        _load_checkpoint(model, Path(checkpoint), ema)
    for tensor_name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise HubError(f'{tensor_name} holds NaN or infinity: the training diverged')
    return model.eval()


def _load_checkpoint(model: nn.Module, path: Path, ema: bool) -> None:
    state = _read_checkpoint(path, ema)
    name = model.pretrained_cfg['architecture']
    own = model.state_dict()
    for key, tensor in own.items():
        if key not in state:
            raise HubError(f'{path} does not fit {name}: it lacks {key}, of shape {tuple(tensor.shape)}')
    for key, tensor in state.items():
        if key not in own:
            raise HubError(f'{path} does not fit {name}, which has no {key}')
        if tensor.shape != own[key].shape:
            hint = '; give the number of classes' if key.startswith(model.get_classifier(name_only=True)) else ''
            raise HubError(
                f'{path} does not fit {name}: its {key} has the shape {tuple(tensor.shape)} '
                f'instead of {tuple(own[key].shape)}{hint}'
            )
    model.load_state_dict(state)


def _read_checkpoint(path: Path, ema: bool) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise HubError(f'there is no file {path}')
    try:
        if path.suffix == '.safetensors':
            checkpoint = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm records its arguments as one
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except SafetensorError as e:
        raise HubError(f'{path} is damaged, or not a safetensors file: {e}') from None
    except Exception as e:  # torch.load raises a dozen types, by the kind of damage
        raise HubError(
            f'{path} cannot be read as a checkpoint: {str(e).splitlines()[0] if str(e) else type(e).__name__}'
        ) from None
    if not isinstance(checkpoint, dict):
        raise HubError(f'{path} holds no state dict but a {type(checkpoint).__name__}')
    wanted = ('state_dict_ema', 'model_ema') if ema else ('state_dict', 'model')
    key = next((key for key in wanted if isinstance(checkpoint.get(key), dict)), None)
    if ema and key is None:
        raise HubError(f'{path} holds no averaged (EMA) weights')
    state = checkpoint[key] if key else checkpoint
    odd = next((k for k, v in state.items() if not isinstance(v, torch.Tensor)), None)
    if odd is not None or not state:
        raise HubError(f'{path} holds no state dict' + (f': its {odd!r} is not a tensor' if odd is not None else ''))
    return clean_state_dict(state)


# The card


class Cost(Protocol):
    """What one image costs: parameters, multiply-adds, elements that convolutions and matrix products put out."""
    params: int
    macs: int
    activations: int


@dataclass(frozen=True)
class Facts:
    """What a model card says that neither the model nor timm's registry knows: the keys of a YAML file.

    summary: What the model is, in place of the first line of its entry function's docstring.
    datasets: Ids of data sets on the Hub. `imagenet-1k` also names the classes of a model with 1,000.
    license: In place of that of the pretrained cfg.
    labels: Class names, in place of those of the pretrained cfg.
    data_config: Preprocessing, in place of the pretrained cfg's: input_size, mean, std, crop_pct, interpolation.
    training: `command`, and `hyperparameters`, a mapping.
    results: Tables to quote. Each names a csv `file`, relative to the YAML file, its `metrics` (name to column), and
        the `dataset` (Hub id), `dataset_name` and `split` they were measured on. Quoted are the rows whose columns
        `model`, `tag` and `source_on_the_hub`, as far as the table has them, are the model's; `row` (column to value)
        narrows them further.
    limits: What a user has to know.
    """
    summary: str = ''
    datasets: list[str] = field(default_factory=list)
    license: str | None = None
    labels: list[str] | None = None
    data_config: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    limits: str = ''
    folder: Path = Path()


# The figures of the sources of lifted weights, and what they were measured on
_LIFTED_RESULTS = dict(
    file=str(CARDS.parent / 'results' / 'lift_sources.csv'),
    metrics={'Top-1 accuracy': 'top1', 'Top-5 accuracy': 'top5'},
    dataset='imagenet-1k',
    dataset_name='ImageNet-1k',
    split='validation',
)
_RESULT_KEYS = {'file', 'metrics', 'dataset', 'dataset_name', 'split'}
_KINDS = dict(
    summary=str, datasets=list, license=str, labels=list, data_config=dict, training=dict, results=list, limits=str)


def load_facts(path: str | Path) -> Facts:
    """Read a YAML file of facts.

    Raises:
        HubError: No such file, no YAML, or a key that has no meaning or the wrong type.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except OSError as e:
        raise HubError(f'cannot read {path}: {e.strerror}') from None
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        raise HubError(f'{path} is not YAML: {" ".join(str(e).split())}') from None
    if not isinstance(given, dict):
        raise HubError(f'{path} must hold a mapping of facts')
    for key, value in given.items():
        if key not in _KINDS:
            raise HubError(f'{path}: {key!r} is not a fact of a card; these are: {", ".join(_KINDS)}')
        if not isinstance(value, _KINDS[key]):
            raise HubError(f'{path}: {key} must be a {_KINDS[key].__name__}, got {value!r}')
    for result in given.get('results', []):
        if not isinstance(result, dict) or set(result) - {'row'} != _RESULT_KEYS:
            raise HubError(f'{path}: each of the results needs {", ".join(sorted(_RESULT_KEYS))}, and may have row')
    if 'training' in given and set(given['training']) != {'command', 'hyperparameters'}:
        raise HubError(f'{path}: training needs command and hyperparameters, and nothing else')
    return Facts(**given, folder=path.parent)


def facts_of(name: str, tag: str) -> Facts:
    """The facts of a released model.tag, from `hub_cards/`."""
    path = CARDS / f'{name}.{tag}.yaml'
    if not path.is_file():
        raise HubError(f'{name}.{tag} has no card in hub_cards; write its facts to a YAML file and give that')
    return load_facts(path)


def _quoted_rows(result: dict[str, Any], facts: Facts, identity: dict[str, str | None]) -> list[dict[str, str]]:
    path = facts.folder / result['file']
    try:
        with path.open(newline='', encoding='utf-8') as f:
            rows = list(csv.DictReader(f))
    except OSError as e:
        raise HubError(f'cannot read the results {path}: {e.strerror}') from None
    wanted = {key: str(value) for key, value in {**identity, **result.get('row', {})}.items() if value is not None}
    known = set(rows[0]) if rows else set()
    lost = [c for c in [*result['metrics'].values(), *result.get('row', {})] if c not in known]
    if lost:
        raise HubError(f'{path} has no column {lost[0]!r}')
    found = [row for row in rows if all(row[c] == value for c, value in wanted.items() if c in known)]
    if not found:
        raise HubError(f'{path} has no row for {identity["model"]}, which the card quotes from it')
    return found


def _results(model: nn.Module, facts: Facts) -> list[dict[str, Any]]:
    """What the card quotes: tables, each with the `values` found in its csv, name and number in percent."""
    cfg = model.pretrained_cfg
    tables = [*([_LIFTED_RESULTS] if cfg.get('hf_hub_id') else []), *facts.results]
    identity = dict(model=cfg['architecture'], tag=cfg.get('tag'), source_on_the_hub=cfg.get('hf_hub_id'))
    found = []
    for table in tables:
        values = []
        for row in _quoted_rows(table, facts, identity):
            at = f', {row["img_size"]} px' if 'img_size' in row else ''
            for name, column in table['metrics'].items():
                try:
                    values.append((f'{name}{at}', float(row[column])))
                except ValueError:
                    raise HubError(f'{table["file"]} holds {row[column]!r} as {column}, not a number') from None
        path = (facts.folder / table['file']).resolve()
        ours = path.is_relative_to(CARDS.parent)
        shown = f'{path.relative_to(CARDS.parent).as_posix()}` of timm-senetv2' if ours else f'{table["file"]}`'
        found.append(dict(table, values=values, shown=f'`{shown}'))
    return found


def render_card(
        model: nn.Module,
        repo_id: str,
        facts: Facts,
        count: Callable[[nn.Module, tuple[int, int, int]], Cost],
) -> ModelCard:
    """The model card, by the template in `hub_cards/`. The same arguments give the same text.

    Args:
        model: From `build`; its pretrained cfg says where the weights come from. The meta device will do.
        repo_id: Where the model is going to be, `owner/name`.
        facts: From `load_facts`.
        count: Counts the cost of a model for an image of a size (channels, height, width).

    Raises:
        HubError: No licence, or results that are not where the facts say.
    """
    cfg = model.pretrained_cfg
    name, source = cfg['architecture'], cfg.get('hf_hub_id')
    results = _results(model, facts)
    origin = dict(source_name=f'{source}, quoted from timm\'s results table', source_url=f'https://huggingface.co/{source}')
    license = facts.license or cfg.get('license')
    if not license:
        raise HubError(f'the card of {name} needs a license: give one among its facts')
    try:
        data = resolve_input_data_config(model, facts.data_config)
        test = resolve_input_data_config(model, facts.data_config, use_test_size=True)
    except ValueError as e:
        raise HubError(f'data_config does not suit {name}: {e}') from None
    metadata = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=license,
        datasets=facts.datasets or None,
        base_model=source,
        tags=['image-classification', 'timm', 'timm-senetv2', 'channel-attention'],
        model_name=repo_id.rpartition('/')[2],
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=table['dataset'],
                dataset_name=table['dataset_name'],
                dataset_split=table['split'],
                metric_type='accuracy',
                metric_name=metric,
                metric_value=value,
                **(origin if source else {}),
            )
            for table in results for metric, value in table['values']
        ] or None,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(CARDS / 'template.md'),
        name=name,
        repo_id=repo_id,
        repo_name=metadata.model_name,
        summary=facts.summary or (model_entrypoint(name).__doc__ or name).splitlines()[0],
        source=source,
        cost=count(model, data['input_size']),
        data=data,
        test=test,
        num_classes=model.num_classes,
        results=results,
        training=facts.training,
        limits=facts.limits,
    )


def _labels(model: nn.Module, facts: Facts) -> dict[str, Any]:
    names = facts.labels or model.pretrained_cfg.get('label_names')
    if not names and 'imagenet-1k' in facts.datasets and model.num_classes == 1000:
        imagenet = ImageNetInfo('imagenet-1k')
        return dict(label_names=imagenet.label_names(), label_descriptions=imagenet.label_descriptions(as_dict=True))
    if not names:
        return {}
    if len(names) != model.num_classes:
        raise HubError(f'{len(names)} labels were given for a model with {model.num_classes} classes')
    return dict(label_names=list(names))


def write_files(model: nn.Module, folder: str | Path, card: ModelCard, facts: Facts) -> None:
    """Write the three files of a repository: weights (safetensors), timm's config with the labels, and the card.

    They are written beside `folder` first, so that it never holds half a file.

    Raises:
        HubError: `folder` is a file, or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise HubError(f'{folder} is a file; give a folder')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as beside:
            save_for_hf(
                model, beside, model_config=_labels(model, facts), safe_serialization=True,
                data_config=facts.data_config)
            (Path(beside) / 'README.md').write_text(str(card), encoding='utf-8', newline='\n')
            folder.mkdir(exist_ok=True)
            for name in FILES:
                os.replace(Path(beside) / name, folder / name)
    except (OSError, SafetensorError) as e:
        # safetensors writes in Rust and raises its own type, with the system's message inside
        full = getattr(e, 'errno', None) in _FULL_DISK or os.strerror(errno.ENOSPC) in str(e)
        reason = 'the disk is full' if full else (getattr(e, 'strerror', None) or str(e))
        raise HubError(f'cannot write {folder}: {reason}') from None


# The push


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
        wait: float = 2.,
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
        raise HubError(f'{repo_id!r} is not a repository on the Hub; give it as owner/name, of letters, digits, -_.') \
            from None
    if repo_id.count('/') != 1:
        raise HubError(f'{repo_id!r} must name its owner, as in me/{repo_id}')
    token = token or get_token()
    if token is None:
        raise HubError('there is no Hugging Face token; run `hf auth login`, or set HF_TOKEN')
    if not (token.isascii() and token.isprintable() and ' ' not in token):
        raise HubError('the Hugging Face token holds characters that no token has; run `hf auth login` again')
    api = HfApi(endpoint=endpoint, token=token)

    def step(what: str, action: Callable[[], T]) -> T:
        return _attempt(what, action, repo_id=repo_id, token=token, attempts=attempts, wait=wait)

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
            path = Path(hf_hub_download(
                repo_id, name, revision=commit, cache_dir=cache, token=api.token, endpoint=api.endpoint))
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


# What goes wrong on the way


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _attempt(
        what: str,
        action: Callable[[], T],
        repo_id: str = '',
        token: str | None = None,
        attempts: int = 4,
        wait: float = 2.,
) -> T:
    """Do something with the Hub, several times if need be; a failure becomes a HubError without the token in it."""
    for attempt in range(attempts):
        try:
            return action()
        except HubError:
            raise
        except Exception as e:
            trace = traceback.format_exc()
            explained = _explain(e, repo_id)
            if explained is None:
                raise
            reason, retry, pause = explained
        if token:
            trace, reason = trace.replace(token, '<token>'), reason.replace(token, '<token>')
        _logger.debug('%s', trace)
        if not retry or attempt + 1 == attempts:
            raise HubError(f'could not {what}: {reason}')
        pause = max(wait * 2 ** attempt, min(pause, 60.))
        _logger.info('could not %s: %s; trying again in %.0f s', what, reason, pause)
        time.sleep(pause)
    raise AssertionError('unreachable')


def _explain(error: Exception, repo_id: str) -> tuple[str, bool, float] | None:
    """Why something with the Hub failed, whether trying again can help, and the seconds the Hub asks to wait.

    None for what is no failure of Hub, network, machine or file.
    """
    causes = list(_causes(error))
    full = next((e for e in causes if isinstance(e, OSError) and e.errno in _FULL_DISK), None)
    if full is not None:
        return 'the disk is full; free some space and run it again', False, 0.
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return 'huggingface_hub is in offline mode; unset HF_HUB_OFFLINE', False, 0.
    answer = next((e for e in causes if isinstance(e, HfHubHTTPError) and e.response is not None), None)
    if answer is not None:
        status = answer.response.status_code
        after = answer.response.headers.get('Retry-After', '')
        return _explain_status(answer, status, repo_id), status in _RETRIED, float(after) if after.isdigit() else 0.
    if any(
            isinstance(e, ConnectionError | TimeoutError) or type(e).__module__.partition('.')[0] in _CLIENTS
            for e in causes
    ):
        return 'the connection to the Hub failed; see to the network and run it again', True, 0.
    if not isinstance(error, OSError | RuntimeError | ValueError | SafetensorError):
        return None
    # an OSError that is left is the client's, for a download of the wrong size
    return ' '.join(str(error).split()) or type(error).__name__, isinstance(error, OSError), 0.


def _explain_status(error: HfHubHTTPError, status: int, repo_id: str) -> str:
    owner = repo_id.partition('/')[0]
    if isinstance(error, RevisionNotFoundError):
        return 'the Hub has no such revision'
    if isinstance(error, RepositoryNotFoundError):  # before 401, which the Hub also answers for what it hides
        return (f'{repo_id} is not there as a model repository that this token can see; '
                'if the name is taken by something else, choose another')
    if status == 401:
        return 'the Hub does not accept the token; run `hf auth login` again, or set HF_TOKEN to a valid one'
    if status == 403:
        return f'the token has no permission for this; use one that may write to the repositories of {owner}'
    if status == 412:
        return 'somebody else committed in the meantime; run it again'
    if status == 429:
        return 'the Hub asks for fewer requests; wait a while and run it again'
    if status >= 500:
        return f'the Hub has a fault (status {status}); run it again later'
    detail = ' '.join((getattr(error, 'server_message', None) or str(error)).split())
    return f'the Hub refuses it (status {status}): {detail}'
