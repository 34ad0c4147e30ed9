"""The model card: by a template, from the model, timm's registry, and a YAML file of facts that neither knows."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.data import resolve_input_data_config
from timm.models import model_entrypoint
from torch import nn

from .errors import HubError

_PACKAGE = Path(__file__).resolve().parents[1]
# in a wheel, and in a checkout
CARDS = next(path for path in (_PACKAGE / 'hub_cards', _PACKAGE.parent / 'hub_cards') if path.is_dir())


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
    training: `command`, and `hyperparameters`, a mapping. Or a csv `file` with a row for the model, chosen as below,
        and the names of its columns: `command`, and `hyperparameters`, a list.
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
    summary=str, datasets=list, license=str, labels=list, data_config=dict, training=dict, results=list, limits=str
)


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
    if 'training' in given:
        training = given['training']
        quoted = 'file' in training
        if set(training) - ({'file', 'row'} if quoted else set()) != {'command', 'hyperparameters'}:
            raise HubError(f'{path}: training needs command and hyperparameters, and with them may have file and row')
        kind = list if quoted else dict
        if not isinstance(training['hyperparameters'], kind):
            raise HubError(f'{path}: these hyperparameters must be a {kind.__name__}')
    return Facts(**given, folder=path.parent)


def facts_of(name: str, tag: str) -> Facts:
    """The facts of a released model.tag, from `hub_cards/`."""
    path = CARDS / f'{name}.{tag}.yaml'
    if not path.is_file():
        raise HubError(f'{name}.{tag} has no card in hub_cards; write its facts to a YAML file and give that')
    return load_facts(path)


def _quoted_rows(table: dict[str, Any], columns: Iterable[str], facts: Facts, model: nn.Module) -> list[dict[str, str]]:
    """The rows of a table that are about the model; they have these columns."""
    cfg = model.pretrained_cfg
    identity = dict(model=cfg['architecture'], tag=cfg.get('tag'), source_on_the_hub=cfg.get('hf_hub_id'))
    path = facts.folder / table['file']
    try:
        with path.open(newline='', encoding='utf-8') as f:
            rows = list(csv.DictReader(f))
    except OSError as e:
        raise HubError(f'cannot read the results {path}: {e.strerror}') from None
    wanted = {key: str(value) for key, value in {**identity, **table.get('row', {})}.items() if value is not None}
    known = set(rows[0]) if rows else set()
    lost = [c for c in [*columns, *table.get('row', {})] if c not in known]
    if lost:
        raise HubError(f'{path} has no column {lost[0]!r}')
    found = [row for row in rows if all(row[c] == value for c, value in wanted.items() if c in known)]
    if not found:
        raise HubError(f'{path} has no row for {cfg["architecture"]}, which the card quotes from it')
    return found


def _results(model: nn.Module, facts: Facts) -> list[dict[str, Any]]:
    """What the card quotes: tables, each with the `values` found in its csv, name and number in percent."""
    tables = [*([_LIFTED_RESULTS] if model.pretrained_cfg.get('hf_hub_id') else []), *facts.results]
    found = []
    for table in tables:
        values = []
        for row in _quoted_rows(table, table['metrics'].values(), facts, model):
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


def _training(model: nn.Module, facts: Facts) -> dict[str, Any] | None:
    """The command and the hyperparameters, a mapping."""
    training = facts.training
    if training is None or 'file' not in training:
        return training
    columns = training['hyperparameters']
    rows = _quoted_rows(training, [training['command'], *columns], facts, model)
    if len(rows) != 1:
        raise HubError(f'{training["file"]} has {len(rows)} rows of training for the model; let row choose one')
    return dict(command=rows[0][training['command']], hyperparameters={c: rows[0][c] for c in columns if rows[0][c]})


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
    name, source, repo_name = cfg['architecture'], cfg.get('hf_hub_id'), repo_id.rpartition('/')[2]
    results = _results(model, facts)
    origin = dict(
        source_name=f"{source}, quoted from timm's results table", source_url=f'https://huggingface.co/{source}'
    )
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
        model_name=repo_name if results else None,  # the name of the model-index
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
            for table in results
            for metric, value in table['values']
        ]
        or None,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(CARDS / 'template.md'),
        name=name,
        repo_id=repo_id,
        repo_name=repo_name,
        summary=facts.summary or (model_entrypoint(name).__doc__ or name).splitlines()[0],
        source=source,
        cost=count(model, data['input_size']),
        data=data,
        test=test,
        num_classes=model.num_classes,
        results=results,
        training=_training(model, facts),
        limits=facts.limits,
    )
