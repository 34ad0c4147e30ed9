"""The models that a page offers, and no others: a visitor's word is looked up here before anything is loaded."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import NamedTuple

from timm.models import get_pretrained_cfg

from .. import catalog
from ..errors import UserError, did_you_mean, printable, why
from .classify import Classifier, load

_HUB_ID = re.compile(r'hf-hub:[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?', re.ASCII)
_FOLDER, _HUB = 'local-dir:', 'hf-hub:'


class Choice(NamedTuple):
    """A model that visitors may choose.

    name: As `timm.create_model` takes it.
    label: As the page shows it: without the path of a folder.
    by_visitor: It was typed by a visitor, so that it may be anything that somebody put on the Hub.
    """

    name: str
    label: str
    by_visitor: bool = False


class Choices:
    """What may be chosen.

    Args:
        names: What the operator listed: models (their best weights), `model.tag`, wildcard patterns of them,
            `local-dir:FOLDER`, `hf-hub:OWNER/NAME`. None for the default: the weights that this package carries and,
            unless strangers can reach the page, all tags of the Hub.
        allow_hub: Visitors may also type `hf-hub:OWNER/NAME`.
        public: Strangers can reach the page.

    Raises:
        UserError: A name that is none of these, or a folder that holds no model.
    """

    def __init__(self, names: Sequence[str] | None = None, allow_hub: bool = False, public: bool = False) -> None:
        self.allow_hub = allow_hub
        found: dict[str, Choice] = {}
        for name in _default(public) if names is None else names:
            for choice in _listed(name):
                found.setdefault(choice.name, choice)
        if not found:
            raise UserError('--models names no model')
        taken: dict[str, Choice] = {}
        for choice in found.values():
            label, number = choice.label, 2
            while label in taken:  # folders of one name
                label, number = f'{choice.label} ({number})', number + 1
            taken[label] = choice._replace(label=label)
        self._by_label = taken

    @property
    def labels(self) -> list[str]:
        """In the order of the list."""
        return list(self._by_label)

    @property
    def all(self) -> list[Choice]:
        return list(self._by_label.values())

    def find(self, wanted: object) -> Choice:
        """The choice that a visitor's word means.

        Raises:
            UserError: It is not offered.
        """
        if not isinstance(wanted, str) or not wanted.strip():
            raise UserError('Choose a model.')
        wanted = wanted.strip()
        if wanted in self._by_label:
            return self._by_label[wanted]
        if wanted.startswith(_HUB) and self.allow_hub:
            if not _HUB_ID.fullmatch(wanted) or '..' in wanted:
                raise UserError(f'{printable(wanted, 120)!r} is not of the form hf-hub:OWNER/NAME.')
            return Choice(wanted, wanted, by_visitor=True)
        if wanted.startswith((_HUB, _FOLDER)):
            raise UserError('This page offers the models of its list only; choose one of those.')
        raise UserError(f'{printable(wanted, 80)!r} is not offered here{did_you_mean(wanted, self.labels)}')


def _default(public: bool) -> list[str]:
    tags = [f'{name}.{tag}' for name in catalog.names() for tag in catalog.tags(name)]
    carried = [name for name in tags if is_carried(name)]
    best = 'cifar_senetv2_resnet20.fmnist'
    carried.sort(key=lambda name: name != best)
    return carried if public else [*carried, *(name for name in tags if name not in carried)]


def is_carried(name: str) -> bool:
    """Whether the weights of this `model.tag` lie in this package, so that nothing is downloaded."""
    cfg = None if name.startswith((_FOLDER, _HUB)) else get_pretrained_cfg(name)
    return cfg is not None and bool(cfg.file)


def _listed(name: str) -> list[Choice]:
    if name.startswith(_FOLDER):
        return [_folder(name)]
    if name.startswith(_HUB):
        if not _HUB_ID.fullmatch(name) or '..' in name:
            raise UserError(f'--models: {printable(name)!r} is not of the form hf-hub:OWNER/NAME')
        return [Choice(name, name)]
    pattern, dot, tag = name.partition('.')
    models = catalog.names(pattern) if pattern else []
    if not models:
        raise UserError(f'--models: no model matches {printable(name)!r}{did_you_mean(pattern, catalog.names())}')
    tags = {model: catalog.tags(model)[: None if dot else 1] for model in models}
    chosen = [f'{m}.{t}' for m in models for t in tags[m] if not dot or re.fullmatch(_as_regex(tag), t)]
    if not chosen:
        known = [t for m in models for t in catalog.tags(m)]
        raise UserError(
            f'--models: {printable(name)!r} has no pretrained weights'
            + (did_you_mean(tag, known) or (f'; there are {", ".join(known[:5])}' if known else ''))
        )
    return [Choice(full, full) for full in chosen]


def _as_regex(pattern: str) -> str:
    return ''.join({'*': '.*', '?': '.'}.get(c, re.escape(c)) for c in pattern)


def _folder(name: str) -> Choice:
    path = Path(name.removeprefix(_FOLDER))
    try:
        config = json.loads((path / 'config.json').read_text(encoding='utf-8'))
        path = path.resolve()
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'--models: {printable(path)} holds no config.json of timm: {why(e)}') from None
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise UserError(f'--models: the config.json of {printable(path)} names no architecture of timm')
    return Choice(f'{_FOLDER}{path}', f'{_FOLDER}{printable(path.name, 80)}')


class Loaded:
    """The models in memory, the ones used last: each is loaded once, by a thread of its own, however many ask for it.

    Args:
        keep: How many stay in memory.
        at_once: How many are loaded at the same time.
    """

    def __init__(self, keep: int = 3, at_once: int = 2) -> None:
        self._keep = keep
        self._models: OrderedDict[str, Future[Classifier]] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Semaphore(at_once)

    def get(self, choice: Choice, wait: float) -> Classifier:
        """The model, loaded if it is not.

        Args:
            choice: From `Choices`.
            wait: Seconds. Loading goes on after them, for whoever asks next.

        Raises:
            UserError: It cannot be loaded, or is not yet.
        """
        with self._lock:
            future = self._models.get(choice.name)
            if future is None or (future.done() and future.exception() is not None):
                future = self._models[choice.name] = Future()
                # a daemon, for Ctrl-C not to wait for a download
                threading.Thread(target=self._load, args=(choice, future), daemon=True).start()
            self._models.move_to_end(choice.name)
            finished = [name for name, other in self._models.items() if other.done()]
            for name in finished[: max(0, len(self._models) - self._keep)]:
                if name != choice.name:
                    del self._models[name]
        try:
            return future.result(max(0.0, wait))
        except FutureTimeout:
            raise UserError(f'{choice.label} is still being loaded; try again in a minute.') from None

    def _load(self, choice: Choice, future: 'Future[Classifier]') -> None:
        with self._loading:
            try:
                future.set_result(load(choice.name, trusted=not choice.by_visitor))
            except BaseException as e:  # whoever waits gets it
                future.set_exception(e)
