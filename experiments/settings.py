"""What determines a run's numbers: a model, a seed and the settings, each as words of a command line."""

import ast
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

import timm
import torch
from timm.models import get_deprecated_models, split_model_name_tag
from timm.optim import list_optimizers

from timm_senetv2.errors import UserError, did_you_mean, printable

PROTOCOLS: dict[str, dict[str, Any]] = {
    'seanet': dict(
        opt='momentum',
        lr=0.1,
        weight_decay=1e-4,
        decay_norms=True,
        batch_size=64,
        epochs=200,
        sched='step',
        label_smoothing=0.0,
    ),
    'senetv2': dict(
        opt='adam',
        lr=1e-3,
        weight_decay=0.0,
        decay_norms=False,
        batch_size=64,
        epochs=100,
        sched='none',
        label_smoothing=0.0,
    ),
    'modern': dict(
        opt='sgd',
        lr=0.1,
        weight_decay=5e-4,
        decay_norms=False,
        batch_size=128,
        epochs=10,
        sched='cosine',
        label_smoothing=0.1,
    ),
}
MOST_PIXELS = 4096  # of an image's side; anything larger is a slip of the hand, and would fill the memory


@dataclass(frozen=True)
class Settings:
    """What, besides model and seed, determines a run's numbers.

    A field that was added later has a default, and says nothing in a run's name while it has it: the runs recorded
    before it keep their names.
    """

    dataset: str
    limit: int | None
    image_size: int | None
    protocol: str
    epochs: int
    batch_size: int
    opt: str
    lr: float
    weight_decay: float
    decay_norms: bool
    sched: str
    label_smoothing: float
    crop_padding: int
    hflip: bool
    ema_decay: float | None
    amp: str | None
    channels_last: bool
    compile: bool
    device: str
    per_class: int | None = None  # training images of each class, drawn anew for each seed
    init: str | None = None  # SHA-256 of the weights that models with @continue, @lift or @add_attention start from
    epoch_repeats: int | None = None  # passes over the training images that make one epoch, where they are several


LATER_SETTINGS = tuple(f.name for f in fields(Settings) if f.default is not MISSING)


@dataclass(frozen=True)
class ModelSpec:
    """A timm model with options, how it starts, and in what its training differs from the grid's, as one word."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    start: str = 'scratch'
    start_options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        if self.start == 'scratch' and not self.start_options:
            return self.name + _words(self.options)
        return f'{self.name}{_words(self.options)}@{self.start}{_words(self.start_options)}'

    def __hash__(self) -> int:
        return hash(str(self))  # an option may be a list

    def settings(self, settings: Settings) -> Settings:
        """The grid's settings, with what the model's own word changes."""
        return replace(settings, **{k: v for k, v in self.start_options if k in ('epochs', 'lr')})


def _words(options: tuple[tuple[str, Any], ...]) -> str:
    return f':{",".join(f"{key}={value}".replace(" ", "") for key, value in options)}' if options else ''


# What may follow each way to start; each value with the least that it may be, or the values that there are
_TRAINING: dict[str, Any] = {'epochs': 1, 'lr': 0.0, 'attention_lr': 0.0, 'train_only': ('attention',)}
STARTS: dict[str, dict[str, Any]] = {
    'scratch': _TRAINING,
    'keep': {},
    'continue': _TRAINING,
    'lift': {**_TRAINING, 'fresh_lr': 0.0, 'fresh_init': ('kaiming', 'small', 'copy')},
    'add_attention': {**_TRAINING, 'reduction': 1, 'cardinality': 1},
}


def parse_specs(word: str) -> list[ModelSpec]:
    """The models of one command-line word: NAME[:KEY=VALUE[|VALUE...],...][@START[:KEY=VALUE[|VALUE...],...]].

    Raises:
        UserError: A name that timm does not have, a way to start that there is not, a word of another form.
    """
    model, at, start = word.partition('@')
    name, _, text = model.partition(':')
    if not name or not timm.is_model(name):
        raise UserError(f'unknown model {name!r}{did_you_mean(name, timm.list_models())}')
    now = get_deprecated_models().get(split_model_name_tag(name)[0])
    if now is not None:  # an older name, of a recorded command
        name = split_model_name_tag(now)[0]
    start, _, start_text = start.partition(':')
    if at and start not in STARTS:
        raise UserError(f'{word!r}: a model starts by one of {", ".join(STARTS)}, got {start!r}')
    start = start or 'scratch'
    specs = []
    for options in _grid(word, text):
        for start_options in _grid(word, start_text):
            for key, value in start_options:
                _check_start_option(word, start, key, value)
            specs.append(ModelSpec(name, options, start, start_options))
    return specs


def _grid(word: str, text: str) -> list[tuple[tuple[str, Any], ...]]:
    keys, values = [], []
    for part in re.split(r',(?![^\[(]*[\])])', text) if text else ():  # commas, but not those inside a list
        key, equals, given = part.partition('=')
        if not equals or not key.isidentifier() or not given:
            raise UserError(f'{word!r}: expected key=value after the colon, got {part!r}')
        if key in keys:
            raise UserError(f'{word!r} gives {key} twice; parted by | values make a grid: {key}=1|2')
        keys.append(key)
        values.append([_literal(value) for value in given.split('|')])
    return [tuple(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _check_start_option(word: str, start: str, key: str, value: Any) -> None:
    known = STARTS[start]
    if not known:
        raise UserError(f'{word!r}: @{start} takes no options, got {key!r}')
    if key not in known:
        raise UserError(f'{word!r}: @{start} takes {", ".join(known)}, got {key!r}{did_you_mean(key, known)}')
    bound = known[key]
    if isinstance(bound, tuple):
        if value not in bound:
            raise UserError(f'{word!r}: {key} must be one of {", ".join(bound)}, got {value!r}')
    elif isinstance(bound, int):
        if type(value) is not int or value < bound:
            raise UserError(f'{word!r}: {key} must be a whole number of at least {bound}, got {value!r}')
    elif type(value) not in (int, float) or not bound < value < math.inf:
        raise UserError(f'{word!r}: {key} must be a number above {bound:g} and finite, got {value!r}')


def run_id(model: str, seed: int, settings: Settings) -> str:
    """The name of a run, which is also that of its folder: the same for the same model, seed and settings."""
    values = {k: v for k, v in asdict(settings).items() if v is not None or k not in LATER_SETTINGS}
    digest = hashlib.sha256(json.dumps([model, values]).encode()).hexdigest()[:8]
    return f'{re.sub(r"[^A-Za-z0-9_.=-]+", "_", model)[:150]}-seed{seed}-{digest}'


def settings_as_text(settings: Settings) -> dict[str, str]:
    """Settings as results.csv has them."""
    return {key: '' if value is None else str(value) for key, value in asdict(settings).items()}


def settings_from_text(row: dict[str, str]) -> Settings:
    """Settings out of a row of results.csv.

    Raises:
        ValueError: A value that no setting has.
    """
    values: dict[str, Any] = {}
    for field in fields(Settings):
        text, kind = row.get(field.name, ''), str(field.type)
        if text == '' and ('None' in kind):
            values[field.name] = None
        elif 'bool' in kind:
            values[field.name] = {'True': True, 'False': False}.get(text)
        elif 'int' in kind:
            values[field.name] = int(text)
        elif 'float' in kind:
            values[field.name] = float(text)
        else:
            values[field.name] = text
        if text != ('' if values[field.name] is None else str(values[field.name])):
            raise ValueError(f'{field.name} is {text!r}')
    return Settings(**values)


def make_settings(given: Mapping[str, Any], trained_here: bool = True) -> Settings:
    """Settings of these values, the protocol's numbers where there are none.

    Args:
        given: Fields of Settings by name, and `seeds` and `workers`, which are checked as well; None is as good as not
            given, and other names do no harm, so the parsed options of a command line will do.
        trained_here: Whether the device must be one of this machine.

    Raises:
        UserError: A value out of its range; names the option.
    """
    given = {key: value for key, value in given.items() if value is not None}
    dataset, name = given['dataset'], given.get('protocol', 'modern')
    if name not in PROTOCOLS:
        raise UserError(f'unknown protocol {name!r}: choose {", ".join(PROTOCOLS)}')
    device = given.get('device', 'cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda' and trained_here and not torch.cuda.is_available():
        raise UserError('--device cuda: torch sees no GPU; leave the option out to run on the CPU')
    protocol: dict[str, Any] = {key: given.get(key, value) for key, value in PROTOCOLS[name].items()}
    seeds = given.get('seeds', [0])
    for option, value, least, most in (
        ('--epochs', protocol['epochs'], 1, 10**6),
        ('--batch-size', protocol['batch_size'], 2, 10**6),
        ('--image-size', given.get('image_size'), 1, MOST_PIXELS),
        ('--crop-padding', given.get('crop_padding'), 0, MOST_PIXELS),
        ('--workers', given.get('workers'), 0, 256),
        ('--weight-decay', protocol['weight_decay'], 0, None),
        ('--seeds', min(seeds), 0, None),
        ('--limit', given.get('limit'), 1, None),
        ('--per-class', given.get('per_class'), 1, None),
        ('--epoch-repeats', given.get('epoch_repeats'), 1, 10**6),
    ):
        if value is not None and not value >= least:
            raise UserError(f'{option} must be at least {least}, got {value}')
        if value is not None and most is not None and value > most:
            raise UserError(f'{option} must be at most {most}, got {value}')
    if max(seeds) >= 2**63:
        raise UserError(f'--seeds must be below 2**63, got {max(seeds)}')
    known = [str(optimizer) for optimizer in list_optimizers()]
    if protocol['opt'] not in known:
        raise UserError(f'unknown optimizer {protocol["opt"]!r}{did_you_mean(protocol["opt"], known)}')
    if not 0 < protocol['lr'] < math.inf:
        raise UserError(f'--lr must be above 0 and finite, got {protocol["lr"]}')
    if math.isinf(protocol['weight_decay']):
        raise UserError('--weight-decay must be finite')
    ema_decay = given.get('ema_decay')
    for option, value in (('--label-smoothing', protocol['label_smoothing']), ('--ema-decay', ema_decay or 0.0)):
        if not 0 <= value < 1:
            raise UserError(f'{option} must be in 0 to 1, below 1, got {value}')
    if not _is_text(dataset):
        raise UserError(f'--dataset {printable(dataset)}: its name is not UTF-8; give the folder another name')
    epoch_repeats = given.get('epoch_repeats')
    return Settings(
        dataset=dataset,
        limit=given.get('limit'),
        image_size=given.get('image_size'),
        protocol=name,
        **protocol,
        crop_padding=given.get('crop_padding', 4),
        hflip=given.get('hflip', dataset != 'digits'),
        ema_decay=ema_decay,
        amp=given.get('amp'),
        channels_last=given.get('channels_last', False),
        compile=given.get('compile', False),
        device=device,
        per_class=given.get('per_class'),
        epoch_repeats=epoch_repeats if epoch_repeats != 1 else None,
    )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # the bytes of a file name that is not UTF-8
        return False
    return '\0' not in text
