"""Faults of the Hub while a model is pushed and loaded by the real client: a whole commit or nothing, and one line."""

import itertools
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import timm
import torch
from hub_server import HubServer
from safetensors.torch import save
from tqdm import tqdm

from timm_senetv2 import hub
from timm_senetv2.commands import main
from timm_senetv2.errors import UserError

from . import processes
from .tally import Tally, outcome_of, why_no_line

TOKEN, REPO = 'hf_sentinelSENTINEL', 'me/x'
TAG = ('senextv2_26t_32x4d', 'se_bt_in1k', 'seresnext26t_32x4d')  # model, tag, its source in timm

PUSHING = {
    'check the token': ('GET', '/whoami-v2'),
    'create the repository': ('POST', '/repos/create'),
    'read the repository': ('GET', r'/api/models/me/x/revision'),
    'check the card': ('POST', '/validate-yaml'),
    'announce the files': ('POST', '/preupload/'),
    'announce the large files': ('POST', '/objects/batch'),
    'upload the weights': ('PUT', '/lfs/upload/'),
    'verify the upload': ('POST', '/lfs/verify'),
    'commit': ('POST', '/commit/'),
    'ask for a file': ('HEAD', '/resolve/'),
    'download the card': ('GET', '/resolve/.*/README'),
    'download the weights': ('GET', '/cdn/'),
}
LOADING = ('ask for a file', 'download the weights')
BUSY = ('7', '-1', '²', 'soon', '9' * 400, 'Fri, 31 Dec 2100 23:59:59 GMT', 'Fri, 99 Dec 1999')


def _flip(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


FAULTS: dict[str, dict[str, Any]] = {
    **{f'the connection is closed {when}': dict(drop=when) for when in ('before', 'during', 'after')},
    **{f'status {code}': dict(status=code) for code in (400, 401, 403, 404, 408, 409, 412, 418, 500, 502, 503, 504)},
    **{f'status 429, Retry-After {i}': dict(status=429, headers={'Retry-After': t}) for i, t in enumerate(BUSY)},
    **{
        f'answer {shown}': dict(edit=lambda _, body=body: body)
        for shown, body in (
            ('{}', b'{}'),
            ('[]', b'[]'),
            ('null', b'null'),
            ('a number', b'7'),
            ('HTML', b'<html>Busy</html>'),
            ('no UTF-8', b'\xff\xfe{'),
            ('empty', b''),
        )
    },
    'answer truncated': dict(edit=lambda body: body[: len(body) // 2]),
    'answer cut off': dict(cut=True),
    'one bit of the answer flipped': dict(edit=_flip),
    'the token repeated in the message': dict(status=418, headers={'X-Error-Message': f'no coffee for {TOKEN}'}),
}


def check(seed: int, share: float, jobs: int) -> Tally:
    """Every fault at every request of a push, in turn once and for good, and when loading; a trickle by the command."""
    tally = Tally('hub_faults')
    cases: list[tuple[str, str, str, bool]] = [
        ('push', where, fault, bool(i % 2)) for i, (where, fault) in enumerate(itertools.product(PUSHING, FAULTS))
    ]
    cases += [('load', LOADING[i % 2], fault, bool(i // 2 % 2)) for i, fault in enumerate(FAULTS)]
    random.Random(seed).shuffle(cases)
    cases = cases[: round(len(cases) * share)]
    trickles = ('check the token', 'download the weights') if share == 1 else ()
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=len(cases) + len(trickles), desc='hub_faults', unit='fault', disable=None) as bar,
    ):
        files = _Files(Path(scratch))
        with _quiet():
            for case in cases:
                what, where, fault, lasts = case
                try_one = files.push if what == 'push' else files.load
                outcome, seconds, says = outcome_of(partial(try_one, where, fault, lasts))
                name = f'{what}, {fault}, {"always" if lasts else "once"}'
                tally.add(name.replace('Retry-After 0', 'Retry-After').rstrip('0123456789') if '429' in fault else name,
                          outcome, seconds, f'{where}: {says}')  # fmt: skip
                bar.update()
        for where in trickles:
            wrong = _trickle(where, Path(scratch))
            tally.add('push by the command, a byte a second, --timeout', 'failed' if wrong else 'one_line', 0.0, wrong)
            bar.update()
    return tally


class _Files:
    """What is pushed and what is loaded."""

    def __init__(self, scratch: Path) -> None:
        torch.manual_seed(0)
        self.scratch = scratch
        self.model = timm.create_model('small_saecnn').eval()
        facts = hub.Facts(license='mit')
        hub.write_files(self.model, scratch / 'files', hub.render_card(self.model, REPO, facts), facts)
        self.contents = {name: (scratch / 'files' / name).read_bytes() for name in hub.FILES}
        self.source = timm.create_model(TAG[2])
        self.weights = save(self.source.state_dict())

    def push(self, where: str, fault: str, lasts: bool) -> str | None:
        """Push into a fault, and again without; what is wrong with that, or None. Raises what the first push raised."""
        method, path = PUSHING[where]
        refused: UserError | None = None
        with HubServer({TOKEN: 'write'}) as server, as_hub(server.url):
            server.fault(method, path, times=10**6 if lasts else 1, **FAULTS[fault])
            try:
                hub.push(self.scratch / 'files', REPO, self.model, token=TOKEN, attempts=3)
            except UserError as e:
                refused = e
            repo = server.repos.get(('model', REPO))
            held = _held(repo)
            if held not in ({}, self.contents):
                return f'the repository holds half a commit: {sorted(held)}'
            if refused is None and held != self.contents:
                return 'the push said that all is well, and the repository is empty'
            if TOKEN in str(refused):
                return 'the token is in the message'
            server.faults.clear()
            hub.push(self.scratch / 'files', REPO, self.model, token=TOKEN)
            if _held(server.model(REPO)) != self.contents or len(server.model(REPO).history()) != 2:
                return 'the next push did not finish it'
            if server.token_leaks:
                return 'the token went to another host'
        if refused is not None:
            raise refused
        return None

    def load(self, where: str, fault: str, lasts: bool) -> str | None:
        """Load pretrained weights into a fault, and again without; as `push`."""
        method, path = PUSHING[where]
        name, tag, source = TAG
        refused: UserError | None = None
        with HubServer() as server, as_hub(server.url), tempfile.TemporaryDirectory() as cache:
            server.add_repo(f'timm/{source}.{tag.removeprefix("se_")}', {'model.safetensors': self.weights})
            server.fault(method, path, times=10**6 if lasts else 1, **FAULTS[fault])
            with mock.patch('huggingface_hub.constants.HF_HUB_CACHE', cache):
                for attempt in range(2):
                    try:
                        loaded = hub.build(name, tag)
                    except UserError as e:
                        if attempt:
                            return f'the next try failed too: {e}'
                        refused = e
                    else:
                        for key in ('conv1.0.weight', 'layer1.0.se.fc1.bias', 'layer4.1.bn3.running_var'):
                            ours, theirs = loaded.state_dict()[key], self.source.state_dict()[key]
                            if not torch.equal(ours[: len(theirs)], theirs):
                                return f'wrong weights were loaded, try {attempt + 1}: {key}'
                    server.faults.clear()
        if refused is not None:
            raise refused
        return None


def _held(repo: Any) -> dict[str, bytes]:
    if repo is None:
        return {}
    return {path: file.content for path, file in repo.files().items() if path != '.gitattributes'}


@contextmanager
def as_hub(url: str) -> Iterator[None]:
    """Let huggingface_hub, imported already, take the server at this address for the Hub."""
    constants, template = 'huggingface_hub.constants', url + '/{repo_id}/resolve/{revision}/{filename}'
    with ExitStack() as stack:
        stack.enter_context(mock.patch(f'{constants}.ENDPOINT', url))
        stack.enter_context(mock.patch(f'{constants}.HUGGINGFACE_CO_URL_TEMPLATE', template))
        stack.enter_context(
            mock.patch('huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE', template, create=True)
        )
        stack.enter_context(mock.patch(f'{constants}.HF_HUB_OFFLINE', False))
        stack.enter_context(mock.patch(f'{constants}.HF_HUB_DISABLE_XET', True, create=True))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without waits between tries, and without the client's own remarks and bars."""
    sleep = time.sleep
    levels = {name: logging.getLogger(name).level for name in ('huggingface_hub', 'timm_senetv2', 'timm', 'root')}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    huggingface_hub.utils.disable_progress_bars()
    try:
        with mock.patch('time.sleep', lambda seconds: sleep(min(seconds, 0.001))):
            yield
    finally:
        huggingface_hub.utils.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _push_command(url: str) -> None:
    os.environ['HF_TOKEN'] = TOKEN
    with as_hub(url):
        main(['push', '--model', 'cifar_resnet20', '--pretrained', 'fmnist', '--repo-id', REPO, '--timeout', '0.06'])


def _trickle(where: str, scratch: Path) -> str:
    """What is wrong with the end of a push to a Hub that sends a byte a second; '' if nothing."""
    method, path = PUSHING[where]
    with HubServer({TOKEN: 'write'}) as server:
        server.fault(method, path, times=10**6, trickle=1.0)
        process = processes.start(_push_command, server.url, folder=scratch, log=scratch / 'push')
        process.join(120)
        code = process.exitcode
        process.kill()
        if server.repos and _held(server.repos.get(('model', REPO))) and where == 'check the token':
            return 'something was pushed'
    lines = [line for line in (scratch / 'push.err').read_text().splitlines() if '%|' not in line]  # bars
    return why_no_line(code, '\n'.join(line for line in lines if line)) or ''
