"""The model card: by a template, from the model, timm's registry, and facts that neither knows."""

import csv
from collections.abc import Iterable, Mapping
from importlib.resources import as_file, files
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.data import resolve_input_data_config
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

from ..catalog import classes_of, config_of
from ..errors import UserError, did_you_mean, one_line, printable, why
from ..profile import Profile, count
from ..sources import sources
from .facts import Facts, finite, load_facts

_CARDS = files(__package__) / 'cards'
_MOST_BYTES = 1 << 26


class _Table(NamedTuple):
    """Figures that the card quotes: name and number in percent, what they were measured on, and where they stand."""

    values: list[tuple[str, float]]
    dataset: str
    dataset_name: str
    split: str
    origin: str
    published: bool = False  # by timm, for the source of the weights


def facts_of(name: str, tag: str) -> Facts:
    """The facts of a released model.tag: a file for each of our own, a rule for those that come from timm's weights.

    Raises:
        UserError: The weights are not released ones.
    """
    card = _CARDS / f'{name}.{tag}.yaml'
    if card.is_file():
        with as_file(card) as path:
            return load_facts(path)
    cfg = get_pretrained_cfg(f'{name}.{tag}')
    source = sources().get(cfg.hf_hub_id or '') if cfg is not None else None
    if source is None:
        raise UserError(f'{name}.{tag} has no card; write its facts to a YAML file and give it with --card')
    return Facts(datasets=source.datasets, license=source.license)


def _quoted_rows(
    file: str, row: Mapping[str, Any] | None, columns: Iterable[str], facts: Facts, model: nn.Module
) -> list[dict[str, str]]:
    """The rows of a table that are about the model; they have these columns."""
    cfg = config_of(model)
    identity = dict(model=cfg['architecture'], tag=cfg.get('tag'), source_on_the_hub=cfg.get('hf_hub_id'))
    path = facts.folder / file
    shown = printable(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f'cannot read the results {shown}: it is not a file')
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f'the results {shown} are larger than {_MOST_BYTES >> 20} MB; give a smaller table')
        with path.open(newline='', encoding='utf-8') as f:
            rows = list(csv.DictReader(f))
    except OSError as e:
        raise UserError(f'cannot read the results {shown}: {why(e)}') from None
    except (ValueError, csv.Error) as e:
        raise UserError(f'the results {shown} are not a csv file in UTF-8: {one_line(e)}') from None
    chosen = dict(row or {})
    wanted = {key: str(value) for key, value in {**identity, **chosen}.items() if value is not None}
    known = set(rows[0]) - {None} if rows else set()
    lost = [c for c in [*columns, *chosen] if c not in known]
    if lost:
        raise UserError(f'{shown} has no column {printable(lost[0])!r}{did_you_mean(lost[0], known)}')
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f'{shown} has rows with more or fewer values than columns')
    found = [row for row in rows if all(row[c] == value for c, value in wanted.items() if c in known)]
    if not found:
        raise UserError(f'{shown} has no row for {cfg["architecture"]}, which the card quotes from it')
    return found


def _published(model: nn.Module) -> list[_Table]:
    """The figures of the source of weights that come from timm's."""
    cfg = config_of(model)
    source = sources().get(cfg.get('hf_hub_id') or '')
    if source is None:
        return []
    values = [
        (f'{metric} accuracy, {accuracy.img_size} px', figure)
        for accuracy in source.accuracies
        for metric, figure in (('Top-1', accuracy.top1), ('Top-5', accuracy.top5))
    ]
    return [_Table(values, 'imagenet-1k', 'ImageNet-1k', 'validation', f'`{source.table}` of timm-senetv2', True)]


def _results(model: nn.Module, facts: Facts) -> list[_Table]:
    """What the card quotes."""
    found = _published(model)
    for result in facts.results:
        values = []
        if result.file is None:
            values = [(name, float(value)) for name, value in result.metrics.items()]
        else:
            metrics = {name: str(column) for name, column in result.metrics.items()}
            for row in _quoted_rows(result.file, result.row, metrics.values(), facts, model):
                at = f', {row["img_size"]} px' if 'img_size' in row else ''
                for name, column in metrics.items():
                    try:
                        values.append((f'{name}{at}', finite(row[column])))
                    except ValueError:
                        raise UserError(
                            f'{printable(result.file)} holds {printable(row[column])!r} as {printable(column)}, '
                            'not a finite number'
                        ) from None
        origin = result.origin or (f'`{result.file}`' if result.file else '')
        found.append(_Table(values, result.dataset, result.dataset_name, result.split, origin))
    return found


def _training(model: nn.Module, facts: Facts) -> dict[str, Any] | None:
    """The command and the hyperparameters, a mapping."""
    training = facts.training
    if training is None:
        return None
    if training.file is None:
        return dict(command=training.command, hyperparameters=training.hyperparameters)
    columns = list(training.hyperparameters)
    rows = _quoted_rows(training.file, training.row, [training.command, *columns], facts, model)
    if len(rows) != 1:
        raise UserError(
            f'{printable(training.file)} has {len(rows)} rows of training for the model; let row choose one'
        )
    return dict(command=rows[0][training.command], hyperparameters={c: rows[0][c] for c in columns if rows[0][c]})


def _cell(value: object) -> str:
    """A value as the cell of a Markdown table."""
    return printable(' '.join(str(value).split()), limit=500).replace('|', r'\|')


def render_card(model: nn.Module, repo_id: str, facts: Facts, cost: Profile | None = None) -> ModelCard:
    """The model card, by the template in `cards/`. The same arguments give the same text.

    Args:
        model: From `build`; its pretrained cfg says where the weights come from. The meta device will do.
        repo_id: Where the model is going to be, `owner/name`.
        facts: From `load_facts`.
        cost: What `profile.count` says of the model at its input size; counted here if None.

    Raises:
        UserError: No licence, or results that are not where the facts say.
    """
    cfg = config_of(model)
    name, source, repo_name = cfg['architecture'], cfg.get('hf_hub_id'), repo_id.rpartition('/')[2]
    results = _results(model, facts)
    origin: dict[str, Any] = dict(
        source_name=f"{source}, quoted from timm's results table", source_url=f'https://huggingface.co/{source}'
    )
    license = facts.license or cfg.get('license')
    if not license:
        raise UserError(f'the card of {name} needs a license: give it by --license, or among the facts of --card')
    data, test = data_configs(model, facts)
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
                dataset_type=table.dataset,
                dataset_name=table.dataset_name,
                dataset_split=table.split,
                metric_type='accuracy',
                metric_name=metric,
                metric_value=value,
                **(origin if table.published else {}),
            )
            for table in results
            for metric, value in table.values
        ]
        or None,
    )
    with as_file(_CARDS / 'template.md') as template:
        card: ModelCard = ModelCard.from_template(
            metadata,
            template_path=str(template),
            name=name,
            repo_id=repo_id,
            repo_name=repo_name,
            summary=facts.summary or (model_entrypoint(name).__doc__ or name).splitlines()[0],
            source=source,
            plain=(cfg.get('tag') or '').startswith('plain_'),
            cost=cost or count(model, data['input_size']),
            data=data,
            test=test,
            num_classes=classes_of(model),
            results=results,
            training=_training(model, facts),
            limits=facts.limits,
            cell=_cell,
        )
    return card


def data_config(facts: Facts) -> dict[str, Any] | None:
    """The preprocessing among the facts, as timm takes it."""
    return facts.data_config.model_dump(exclude_none=True) if facts.data_config else None


def data_configs(model: nn.Module, facts: Facts) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's preprocessing for the model with these facts, for training and for the best accuracy.

    Raises:
        UserError: The facts do not suit the model.
    """
    given = data_config(facts)
    try:
        return resolve_input_data_config(model, given), resolve_input_data_config(model, given, use_test_size=True)
    except (ValueError, AssertionError) as e:
        name = config_of(model)['architecture']
        raise UserError(f'data_config does not suit {name}: {one_line(e)}') from None
