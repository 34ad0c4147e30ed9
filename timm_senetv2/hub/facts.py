"""What a model card says that neither the model nor timm's registry knows: a YAML file, checked by a schema."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError, one_line, printable, why

_MOST_BYTES = 1 << 20
_DEEPEST = 12


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError('must be one line of text')
    return text


def _plain_text(text: str) -> str:
    if not all(c.isprintable() or c in '\n\t' for c in text):
        raise ValueError('holds control characters')
    return text


def _matches(pattern: str, what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f'{text!r} is not {what}')
        return text

    return AfterValidator(check)


def _unique(names: list[str]) -> list[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f'{name!r} stands there twice')
        seen.add(name)
    return names


Line = Annotated[str, AfterValidator(_one_line)]
Text = Annotated[str, AfterValidator(_plain_text)]
DatasetId = Annotated[str, _matches(r'[\w.-]+(/[\w.-]+)?', 'the id of a data set on the Hub, such as owner/name')]
License = Annotated[str, _matches(r'[A-Za-z0-9][A-Za-z0-9.+-]{0,63}', 'the id of a licence, such as apache-2.0')]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scalar = str | bool | int | Finite
Size = Annotated[list[Annotated[int, Field(ge=1, le=1 << 14)]], Field(min_length=3, max_length=3)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True, frozen=True)


class DataConfig(_Model):
    """Preprocessing, in timm's words."""

    input_size: Size | None = None
    mean: Finite | Annotated[list[Finite], Field(min_length=1)] | None = None
    std: Positive | Annotated[list[Positive], Field(min_length=1)] | None = None
    crop_pct: Fraction | None = None
    crop_mode: Literal['center', 'squash', 'border'] | None = None
    interpolation: Literal['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random'] | None = None
    test_input_size: Size | None = None
    test_crop_pct: Fraction | None = None


class Training(_Model):
    """The command and the hyperparameters; or a csv `file`, the `row` of it, and the names of the columns for both."""

    command: Text
    hyperparameters: dict[Line, Scalar] | list[Line]
    file: Line | None = None
    row: dict[Line, Scalar] | None = None

    @model_validator(mode='after')
    def _file_and_columns(self) -> 'Training':
        if self.file is None and self.row is not None:
            raise ValueError('row chooses from a file, and there is none')
        kind, words = (dict, 'a mapping from name to value') if self.file is None else (list, 'a list of columns')
        if not isinstance(self.hyperparameters, kind):
            raise ValueError(f'hyperparameters must be {words}')
        return self


class Result(_Model):
    """Figures: `metrics` in percent by name, or the columns of a csv `file` that hold them.

    dataset, dataset_name, split: What they were measured on, the first as its id on the Hub.
    file, row: As in `Training`; a path relative to the YAML file.
    origin: Where the figures come from, in place of the file's name.
    """

    metrics: Annotated[dict[Line, str | int | Finite], Field(min_length=1)]
    dataset: DatasetId
    dataset_name: Line
    split: Line
    file: Line | None = None
    row: dict[Line, Scalar] | None = None
    origin: Line | None = None

    @model_validator(mode='after')
    def _numbers_or_columns(self) -> 'Result':
        if self.file is None and self.row is not None:
            raise ValueError('row chooses from a file, and there is none')
        for name, value in self.metrics.items():
            if isinstance(value, str) != (self.file is not None):
                raise ValueError(f'{name}: with a file, a metric names its column; without, it is a number')
        return self


class Facts(_Model):
    """What a model card says that neither the model nor timm's registry knows: the keys of a YAML file.

    summary: What the model is, in place of the first line of its entry function's docstring.
    datasets: Ids of data sets on the Hub. `imagenet-1k` also names the classes of a model with 1,000.
    license: In place of that of the pretrained cfg.
    labels: Class names, one for each class, in place of those of the pretrained cfg.
    data_config: Preprocessing, in place of the pretrained cfg's.
    training: See `Training`.
    results: See `Result`. Of a csv file those rows are quoted whose columns `model`, `tag` and `source_on_the_hub`, as
        far as the table has them, are the model's; `row` (column to value) narrows them further.
    limits: What a user has to know.
    """

    summary: Text = ''
    datasets: list[DatasetId] = []
    license: License | None = None
    labels: Annotated[list[Line], Field(min_length=1), AfterValidator(_unique)] | None = None
    data_config: DataConfig | None = None
    training: Training | None = None
    results: list[Result] = []
    limits: Text = ''
    folder: Annotated[Path, Field(exclude=True, repr=False)] = Path()


def load_facts(path: str | Path) -> Facts:
    """Read a YAML file of facts.

    Raises:
        UserError: No such file, no YAML of a sensible size, or a key that has no meaning or the wrong type.
    """
    path, shown = Path(path), printable(path)
    try:
        if not path.is_file():
            raise UserError(f'cannot read {shown}: {"it is not a file" if path.exists() else "there is no such file"}')
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f'{shown} is larger than a card can need ({_MOST_BYTES >> 20} MB)')
        given = yaml.load(path.read_text(encoding='utf-8'), Loader=_Loader)
    except OSError as e:
        raise UserError(f'cannot read {shown}: {why(e)}') from None
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        raise UserError(f'{shown} is not YAML: {one_line(e)}') from None
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise UserError(f'{shown} must hold a mapping of facts')
    if 'folder' in given:
        raise UserError(f"{shown}: 'folder' is not a fact of a card")
    try:
        return Facts(**{str(key): value for key, value in given.items()}, folder=path.parent)
    except ValidationError as e:
        raise UserError(f'{shown}: {_explain(e)}') from None


def with_license(facts: Facts, license: str) -> Facts:
    """The facts with another licence.

    Raises:
        UserError: It is not the id of one.
    """
    try:
        return facts.model_copy(update=dict(license=Facts(license=license).license))
    except ValidationError as e:
        raise UserError(f'--license: {_explain(e)}') from None


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong; of what was tried for one value, the most precise."""
    found = error.errors()
    first = max((e for e in found if e['loc'][:1] == found[0]['loc'][:1]), key=lambda e: len(e['loc']))
    # of a union the type that was tried stands in the path too, such as `dict[...]` or `str`
    where = [
        printable(part, limit=60) for part in first['loc'] if not re.search(r'\W|^(str|int|float|bool)$', str(part))
    ]
    says = printable(first['msg'].removeprefix('Value error, '))
    if first['type'] == 'extra_forbidden':
        says = 'there is no such fact; these are: ' + ', '.join(_keys_at(first['loc']))
    return f'{".".join(where) or "the facts"}: {says}'


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = dict(data_config=DataConfig, training=Training, results=Result).get(str(loc[0]), Facts)
    return [key for key in (model if len(loc) > 1 else Facts).model_fields if key != 'folder']


class _Loader(yaml.SafeLoader):
    """YAML as people write it by hand: no aliases, no key twice, no deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, 'aliases are not allowed', mark)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, 'it is nested too deeply', mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or key.tag == 'tag:yaml.org,2002:merge':
                raise yaml.constructor.ConstructorError(None, None, 'keys must be plain names', key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f'{name!r} stands there twice', key.start_mark)
            seen.add(name)
        return dict(super().construct_mapping(node, deep))


def finite(value: object) -> float:
    """A number out of a table; raises a ValueError for what is none, and for NaN and infinity."""
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ValueError(f'{value} is not finite')
    return number
