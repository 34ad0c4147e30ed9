"""Model cards, and pushing to a Hub on loopback with huggingface_hub's own client."""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time

import huggingface_hub
import pytest
import timm
import torch
from hub_server import HubServer
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from timm.models import get_pretrained_cfg

from timm_senetv2 import hub
from timm_senetv2.commands import main
from timm_senetv2.errors import UserError
from timm_senetv2.files import MARK
from timm_senetv2.hub.retry import attempt

TOKEN, READER = 'hf_sentinelWRITE', 'hf_sentinelREAD'
COMMIT, PUT = r'/api/models/me/x/commit/', r'/lfs/upload/'


@pytest.fixture
def server(hub_server, monkeypatch):
    # the loopback Hub speaks LFS; old clients have no such switch and need none
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True, raising=False)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    hub_server.tokens.update({TOKEN: 'write', READER: 'read'})
    # as HF_ENDPOINT does at import
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', hub_server.url)
    template = hub_server.url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr('huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(
        'huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False
    )  # below 1.0
    return hub_server


@pytest.fixture
def naps(monkeypatch):
    """The seconds that anything wanted to sleep; nothing does."""
    wanted, sleep = [], time.sleep
    monkeypatch.setattr(time, 'sleep', lambda seconds: wanted.append(seconds) or sleep(min(seconds, 0.001)))
    return wanted


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint as timm's train.py writes it, with weights, averaged weights and its arguments."""
    torch.manual_seed(1)
    model, averaged = timm.create_model('small_saecnn'), timm.create_model('small_saecnn')
    path = tmp_path_factory.mktemp('trained') / 'model_best.pth.tar'
    torch.save(
        {
            'epoch': 3,
            'arch': 'small_saecnn',
            'args': argparse.Namespace(lr=0.1),
            'version': 2,
            'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()},
            'state_dict_ema': averaged.state_dict(),
        },
        path,
    )
    return path


@pytest.fixture(scope='module')
def model(trained):
    return hub.build('small_saecnn', checkpoint=trained)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('written') / 'x'
    facts = hub.Facts(license='mit')
    hub.write_files(model, folder, hub.render_card(model, 'me/x', facts), facts)
    return folder


@pytest.fixture
def push(server, folder, model, naps):
    """Push the model to me/x on the loopback Hub."""

    def push(**kwargs):
        return hub.push(folder, **{**dict(repo_id='me/x', model=model, token=TOKEN), **kwargs})

    return push


def logits(model):
    torch.manual_seed(7)
    with torch.inference_mode():
        return model.eval()(torch.randn(2, model.in_chans, 32, 32))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in hub.FILES}


def pushed_files(repo, ref='main'):
    return {path: file.content for path, file in repo.files(ref).items() if path != '.gitattributes'}


# Pushing


def test_push_makes_one_commit_of_three_files_and_says_how_to_load_it(server, push, folder):
    pushed = push()
    repo = server.model('me/x')
    assert pushed_files(repo) == contents(folder)
    assert len(repo.history()) == 2 and repo.history()[0] == pushed.commit and pushed.new
    assert not repo.private
    assert repo.files()['model.safetensors'].lfs
    assert hub.load_line('me/x') == "model = timm.create_model('hf-hub:me/x', pretrained=True)"


def test_second_identical_push_makes_no_commit(server, push):
    first = push()
    second = push()
    assert second == first._replace(new=False)
    assert len(server.model('me/x').history()) == 2
    assert sum(path.startswith('/api/models/me/x/commit') for _, path in server.requests) == 1


def test_push_after_a_change_uploads_only_what_changed(server, push, folder, model, tmp_path):
    push()
    changed = tmp_path / 'x'
    facts = hub.Facts(limits='Only for tests.', license='mit')
    hub.write_files(model, changed, hub.render_card(model, 'me/x', facts), facts)
    hub.push(changed, 'me/x', model, token=TOKEN)
    assert pushed_files(server.model('me/x')) == contents(changed) != contents(folder)
    assert sum(method == 'PUT' for method, _ in server.requests) == 1


def test_push_creates_a_private_repository_and_a_branch(server, push, folder):
    pushed = push(private=True, revision='v2')
    repo = server.model('me/x')
    assert repo.private
    assert pushed_files(repo, 'v2') == contents(folder) and pushed_files(repo) == {}
    assert hub.load_line('me/x', pushed.revision).startswith("model = timm.create_model('hf-hub:me/x@v2'")


def test_push_as_a_pull_request_leaves_the_branch_alone_and_is_not_proposed_twice(
    server, push, folder, model, tmp_path
):
    first, second = push(create_pr=True), push(create_pr=True)
    repo = server.model('me/x')
    assert pushed_files(repo) == {} and pushed_files(repo, 'refs/pr/1') == contents(folder)
    assert len(repo.pull_requests) == 1
    loaded = timm.create_model(f'hf-hub:me/x@{first.revision}', pretrained=True, cache_dir=tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert (first.new, second.new) == (True, False)
    assert first.revision == second.revision == 'refs/pr/1'


@pytest.mark.parametrize(
    'method, path, fault',
    [
        ('POST', COMMIT, dict(drop='before')),
        ('POST', COMMIT, dict(drop='during')),
        ('POST', COMMIT, dict(drop='after')),
        ('POST', COMMIT, dict(status=503)),
        ('POST', COMMIT, dict(status=412)),
        ('PUT', PUT, dict(drop='before')),
        ('PUT', PUT, dict(drop='during')),
        ('PUT', PUT, dict(drop='after')),
        ('PUT', PUT, dict(status=500)),
        ('POST', '/preupload/', dict(status=502)),
        ('POST', '/objects/batch', dict(status=429, headers={'Retry-After': '7'})),
        ('POST', '/repos/create', dict(drop='after')),
        ('POST', '/repos/create', dict(status=429, headers={'Retry-After': '7'})),
        ('GET', '/whoami-v2', dict(status=500, times=3)),
        ('GET', '/cdn/', dict(cut=True)),
        ('GET', '/cdn/', dict(status=500)),
        ('HEAD', '/resolve/', dict(drop='before')),
    ],
    ids=lambda v: '-'.join(map(str, v.values())) if isinstance(v, dict) else v.strip('/').rpartition('/')[2],
)
def test_push_gets_over_a_passing_fault_and_commits_once(server, push, folder, naps, method, path, fault):
    injected = server.fault(method, path, **fault)
    push()
    repo = server.model('me/x')
    assert injected.hits == injected.times
    assert pushed_files(repo) == contents(folder) and len(repo.commits) == 2
    if 'headers' in fault:
        assert max(naps) >= 7  # the Hub's wish is obeyed


def test_pull_request_whose_answer_was_lost_is_not_opened_twice(server, push, folder):
    server.fault('POST', COMMIT, drop='after')
    assert push(create_pr=True).revision == 'refs/pr/1'
    repo = server.model('me/x')
    assert pushed_files(repo, 'refs/pr/1') == contents(folder) and len(repo.pull_requests) == 1


@pytest.mark.parametrize(
    'method, path, fault, says',
    [
        ('POST', COMMIT, dict(drop='during'), 'connection to the Hub failed'),
        ('PUT', PUT, dict(drop='during'), 'connection to the Hub failed'),
        ('POST', COMMIT, dict(status=429), 'fewer requests'),
        ('POST', COMMIT, dict(status=500), 'status 500'),
        ('POST', COMMIT, dict(status=403), 'no permission'),
        ('PUT', PUT, dict(status=400), 'status 400'),
        ('POST', '/validate-yaml', dict(drop='before'), 'connection to the Hub failed'),
    ],
    ids=lambda v: '-'.join(map(str, v.values())) if isinstance(v, dict) else None,
)
def test_push_that_fails_leaves_nothing_and_the_next_finishes(server, push, folder, method, path, fault, says):
    injected = server.fault(method, path, times=10**6, **fault)
    with pytest.raises(UserError, match=says):
        push()
    assert injected.hits
    assert pushed_files(server.model('me/x')) == {}

    server.faults.clear()
    assert push().new
    assert pushed_files(server.model('me/x')) == contents(folder)
    assert len(server.model('me/x').history()) == 2


def test_push_whose_answers_are_lost_for_good_is_found_complete_by_the_next(server, push, folder):
    server.fault('POST', COMMIT, times=10**6, drop='after')
    push()  # the commit is found although its answer never came
    assert pushed_files(server.model('me/x')) == contents(folder)
    assert len(server.model('me/x').history()) == 2


def test_push_gives_up_after_a_few_growing_waits(server, push, naps):
    server.fault('GET', '/whoami-v2', times=10**6, status=503)
    with pytest.raises(UserError, match='status 503'):
        push(attempts=4, wait=2.0)
    assert naps == [2.0, 4.0, 8.0]


def test_push_without_a_hub_says_so(push, server, monkeypatch):
    with HubServer() as gone:
        monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', gone.url)
    with pytest.raises(UserError, match='connection to the Hub failed'):
        push()


@pytest.mark.parametrize(
    'kwargs, says',
    [
        (dict(token='hf_other'), 'does not accept the token'),
        (dict(token=READER), 'no permission'),
        (dict(repo_id='you/x'), 'may write to the repositories of you'),
        (dict(token='hf_\n'), 'holds characters that no token has'),
        (dict(repo_id='x'), 'must name its owner'),
        (dict(repo_id='me/x/y'), 'owner/name'),
        (dict(repo_id='me/--x'), 'owner/name'),
        (dict(create_pr=True, revision='none'), 'no such revision'),
    ],
)
def test_push_that_may_not_be_says_why_at_once(server, push, naps, kwargs, says):
    with pytest.raises(UserError, match=says):
        push(**kwargs)
    assert not naps
    assert all(not pushed_files(repo) for repo in server.repos.values())


def test_push_without_a_token_asks_for_one(server, push, monkeypatch):
    monkeypatch.setattr('timm_senetv2.hub.upload.get_token', lambda: None)
    with pytest.raises(UserError, match='hf auth login'):
        push(token=None)
    assert not server.requests


def test_push_to_a_name_that_is_no_model_repository_says_so(server, push):
    taken = server.add_repo('me/x', repo_type='dataset')
    with pytest.raises(UserError, match='me/x is not there as a model repository.*choose another'):
        push()
    assert pushed_files(taken) == {}


@pytest.mark.parametrize('name', hub.FILES)
def test_push_detects_a_changed_byte_in_what_the_hub_serves(server, push, name):
    def flip(body):
        middle = len(body) // 2
        return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]

    server.fault('GET', '/cdn/' if name == 'model.safetensors' else f'/resolve/.*/{name}', edit=flip)
    with pytest.raises(UserError, match=f'serves another {re.escape(name)} than was pushed'):
        push()
    assert not push().new  # served right this time, the same push confirms it


def test_push_detects_other_logits_than_those_of_the_model(server, push):
    torch.manual_seed(5)
    with pytest.raises(UserError, match='other logits'):
        push(model=timm.create_model('small_saecnn').eval())


def test_token_goes_to_no_other_host(server, push):
    push()
    assert any(path.startswith('/cdn/') for _, path in server.requests)
    assert server.token_leaks == []


def test_no_error_holds_the_token_even_where_the_hub_repeats_it(server, push):
    server.fault('POST', COMMIT, status=418, headers={'X-Error-Message': f'no coffee for {TOKEN}'})
    with pytest.raises(UserError, match='no coffee for <token>') as caught:
        push()
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


# Safe hands


def test_private_push_to_a_public_repository_is_refused_before_anything_is_sent(server, push):
    public = server.add_repo('me/x', {'README.md': b'mine'})
    before = dict(public.commits)
    with pytest.raises(UserError, match='there already, and public: nothing was sent'):
        push(private=True)
    assert public.commits == before and not public.private
    assert {method for method, _ in server.requests} == {'GET'}


def test_private_push_to_a_private_repository_of_ours_goes_on(server, push, folder):
    push(private=True)
    server.model('me/x').commit({}, 'main', server.model('me/x').refs['main'])
    assert push(private=True).new
    assert pushed_files(server.model('me/x')) == contents(folder)


@pytest.mark.parametrize('body', [b'{}', b'[]', b'null', b'7', b'"x"', b'no json', b'\xff\xfe', b'', b'{"id": []}'])
@pytest.mark.parametrize(
    'method, path',
    [
        ('GET', '/whoami-v2'),
        ('POST', '/repos/create'),
        ('GET', r'/api/models/me/x/revision'),
        ('POST', '/preupload/'),
        ('POST', '/objects/batch'),
        ('POST', COMMIT),
    ],
)
def test_answer_that_makes_no_sense_is_one_line_or_harmless(server, push, folder, method, path, body):
    server.fault(method, path, times=10**6, edit=lambda _: body)
    try:
        push(attempts=2)
    except UserError as e:
        assert '\n' not in str(e) and 'could not' in str(e)
    server.faults.clear()
    push()
    assert pushed_files(server.model('me/x')) == contents(folder)


def test_wish_for_a_wait_of_400_digits_is_one_line_or_obeyed_within_reason(server, push, folder):
    server.fault('POST', '/preupload/', status=429, headers={'Retry-After': '9' * 400})
    try:
        push()
    except UserError as e:  # the client itself cannot read it
        assert 'cannot read' in str(e)
        push()
    assert pushed_files(server.model('me/x')) == contents(folder)


@pytest.mark.parametrize(
    'asked, waited',
    [
        ('7', 7),
        ('\u00b2', 2),  # a digit, and no number
        ('-5', 2),
        ('9' * 400, 60),
        ('soon', 2),
        ('Fri, 31 Dec 2100 23:59:59 GMT', 60),
        ('Fri, 31 Dec 1999 23:59:59 GMT', 2),
        ('Fri, 99 Dec 1999', 2),
    ],
)
def test_wish_for_a_later_try_is_obeyed_within_reason(monkeypatch, naps, asked, waited):
    answer = huggingface_hub.errors.HfHubHTTPError('busy', response=Answer(429, {'Retry-After': asked}))
    tries = [answer, None]

    def action():
        if error := tries.pop(0):
            raise error

    attempt('try', action)
    assert naps == [waited]


class Answer:
    """As much of a response as an error of huggingface_hub needs."""

    request = None
    text = ''

    def __init__(self, status_code: int, headers: dict[str, str]) -> None:
        self.status_code, self.headers = status_code, headers


@pytest.mark.parametrize(
    'repo_id, revision',
    [
        ('x', 'main'),
        ('me/x/y', 'main'),
        ('me/--x', 'main'),
        ('me/x\n', 'main'),
        ('../x', 'main'),
        ('me/x', ''),
        ('me/x', 'a b'),
        ('me/x', '../../main'),
        ('me/x', 'a..b'),
        ('me/x', '-v'),
        ('me/x', 'x.lock'),
        ('me/x', 'a\x1b[2J'),
    ],
)
def test_names_are_checked_in_dry_runs_too(tmp_path, capsys, repo_id, revision):
    command = ['push', '--model', 'cifar_resnet20', '--pretrained', 'fmnist', f'--repo-id={repo_id}']
    with pytest.raises(SystemExit) as done:
        main([*command, f'--revision={revision}', '--dry-run', str(tmp_path / 'out')])
    err = capsys.readouterr().err
    assert done.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1 and err[:-1].isprintable()
    assert not list(tmp_path.iterdir())


def test_dry_run_replaces_its_own_folder_and_no_other(tmp_path, capsys):
    def dry_run(folder):
        command = ['push', '--model', 'cifar_resnet20', '--pretrained', 'fmnist', '--repo-id', 'me/x']
        with pytest.raises(SystemExit) as done:
            main([*command, '--dry-run', str(folder)])
        return done.value.code, capsys.readouterr().err

    clone = tmp_path / 'clone'
    clone.mkdir()
    (clone / 'README.md').write_text('mine')
    code, err = dry_run(clone)
    assert code == 2 and 'was not written by push' in err and err.count('\n') == 1
    assert (clone / 'README.md').read_text() == 'mine' and len(list(clone.iterdir())) == 1
    assert [dry_run(tmp_path / 'out')[0] for _ in range(2)] == [None, None]
    (tmp_path / 'out' / 'README.md').write_text('edited')
    code, err = dry_run(tmp_path / 'out')
    assert code == 2 and 'its README.md was changed' in err
    code, err = dry_run('')  # as "$unset" gives it: still no push
    assert code == 2 and 'the name is empty' in err


# Loading what was pushed


def test_timm_loads_what_was_pushed_with_equal_logits(server, push, model, tmp_path):
    push(revision='v2')
    loaded = timm.create_model('hf-hub:me/x@v2', pretrained=True, cache_dir=tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_options_of_the_model_come_back_from_the_hub(server, tmp_path, naps):
    torch.manual_seed(2)
    given = timm.create_model('cifar_senetv2_resnet20', num_classes=7, in_chans=1, sae_cardinality=2, sae_reduction=4)
    save_file(given.state_dict(), tmp_path / 'w.safetensors')
    model = hub.build(
        'cifar_senetv2_resnet20',
        checkpoint=tmp_path / 'w.safetensors',
        num_classes=7,
        in_chans=1,
        sae_cardinality=2,
        sae_reduction=4,
    )
    facts = hub.Facts(labels=list('abcdefg'), license='mit')
    hub.write_files(model, tmp_path / 'x', hub.render_card(model, 'me/x', facts), facts)
    hub.push(tmp_path / 'x', 'me/x', model, token=TOKEN)
    loaded = timm.create_model('hf-hub:me/x', pretrained=True, cache_dir=tmp_path / 'cache')
    assert torch.equal(logits(loaded), logits(given))
    assert list(loaded.pretrained_cfg['label_names']) == list('abcdefg')


DAMAGE = {
    'truncated': lambda content: content[: len(content) // 2],
    'header': lambda content: b'\xff' * 16 + content[16:],
}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights_in_a_repository_are_an_error_until_they_are_mended(
    server, push, folder, model, damage, tmp_path
):
    files = contents(folder)
    server.add_repo('me/x', {**files, 'model.safetensors': damage(files['model.safetensors'])})
    load = lambda: timm.create_model('hf-hub:me/x', pretrained=True, cache_dir=tmp_path)  # noqa: E731
    with pytest.raises(Exception, match='(?i)header|deserializ'):
        load()
    push()
    assert torch.equal(logits(load()), logits(model))


def test_weights_cut_short_on_the_way_are_an_error_and_are_not_cached(server, push, model, tmp_path):
    push()
    fault = server.fault('GET', '/cdn/', times=10**6, edit=DAMAGE['truncated'])
    load = lambda: timm.create_model('hf-hub:me/x', pretrained=True, cache_dir=tmp_path)  # noqa: E731
    with pytest.raises(OSError, match='(?i)consistency'):
        load()
    assert fault.hits and not list(tmp_path.rglob('model.safetensors'))
    server.faults.clear()
    assert torch.equal(logits(load()), logits(model))


# Checkpoints


def test_build_takes_weights_averaged_weights_and_safetensors(trained, tmp_path):
    raw = torch.load(trained, weights_only=False)
    plain, averaged = raw['state_dict']['module.fc.weight'], raw['state_dict_ema']['fc.weight']
    assert torch.equal(hub.build('small_saecnn', checkpoint=trained).fc.weight, plain)
    assert torch.equal(hub.build('small_saecnn', checkpoint=trained, ema=True).fc.weight, averaged)
    save_file(raw['state_dict_ema'], tmp_path / 'w.safetensors')
    torch.save(raw['state_dict'], tmp_path / 'w.pth')
    assert torch.equal(hub.build('small_saecnn', checkpoint=tmp_path / 'w.safetensors').fc.weight, averaged)
    assert torch.equal(hub.build('small_saecnn', checkpoint=tmp_path / 'w.pth').fc.weight, plain)


def test_lifted_weights_come_out_the_same_every_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    source = timm.create_model('seresnext26t_32x4d')
    server.add_repo('timm/seresnext26t_32x4d.bt_in1k', {'model.safetensors': save(source.state_dict())})
    first, second = (hub.build('senextv2_26t_32x4d', tag='se_bt_in1k').state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    hidden = len(source.layer1[0].se.fc1.bias)
    assert torch.equal(first['layer1.0.se.fc1.bias'][:hidden], source.layer1[0].se.fc1.bias)
    assert first['layer1.0.se.fc1.weight'][hidden:].abs().min() > 0  # the added units are initialised, by the seed


def test_source_that_the_hub_does_not_have_is_a_clear_error(server, tmp_path, monkeypatch, naps):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(UserError, match='could not load .*: timm/seresnext26t_32x4d.bt_in1k is not there'):
        hub.build('senextv2_26t_32x4d', tag='se_bt_in1k')
    assert not naps


class Opaque:
    """Something that only an unsafe pickle could load."""


def _without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    'change, kwargs, says',
    [
        (
            lambda s: _without(s, 'layer2.conv.weight'),
            {},
            r'nothing is in the file only, layer2.conv.weight \(64, 32, 3, 3\) in the model only',
        ),
        (
            lambda s: {**s, 'extra.weight': torch.ones(1)},
            {},
            r'extra.weight \(1,\) is in the file only, nothing in the model only',
        ),
        (
            lambda s: {**s, 'fc.weight': torch.ones(7, 128)},
            dict(num_classes=10),
            r'fc.weight has the shape \(7, 128\) in the file and \(10, 128\) in the model',
        ),
        (lambda s: {**s, 'fc.bias': torch.full((10,), torch.nan)}, {}, 'fc.bias holds NaN'),
        (lambda s: {'state_dict': s}, dict(ema=True), r'no averaged \(EMA\) weights'),
        (lambda s: {'state_dict': s, 'more': Opaque()}, {}, 'refused: reading it would run .*Opaque'),
        (lambda s: [s], {}, 'holds no state dict but a list'),
        (lambda s: {'epoch': 3}, {}, 'no state dict; its keys are epoch'),
        (lambda s: {}, {}, 'no state dict'),
        (lambda s: {**s, 'a\nerror: b': torch.ones(1)}, {}, r'a\\nerror: b \(1,\) is in the file only'),
        (lambda s: {**s, 3: torch.ones(1)}, {}, 'its key 3 is not a name'),
        (lambda s: {**s, 'fc.bias': torch.ones(10).to_sparse()}, {}, 'is a sparse tensor'),
        (lambda s: {**s, 'fc.bias': torch.ones(10, device='meta')}, {}, 'has no values'),
        (lambda s: {**s, 'fc.bias': torch.ones(1).expand(10**6, 10**6)}, {}, 'fewer values than that'),
        (lambda s: {**s, 'fc.bias': torch.ones(2**40, 0)}, {}, 'fc.bias has the shape'),
        (lambda s: {**s, 'fc.bias': torch.ones(10, dtype=torch.int64)}, {}, 'holds int64 where float32 belongs'),
        (lambda s: {**s, 'fc.bias': torch.full((10,), 1e300, dtype=torch.float64)}, {}, 'fc.bias holds NaN or inf'),
    ],
)
def test_build_refuses_a_checkpoint_that_does_not_fit(trained, tmp_path, change, kwargs, says):
    state = torch.load(trained, weights_only=False)['state_dict_ema']
    torch.save(change(state), tmp_path / 'w.pth')
    with pytest.raises(UserError, match=says):
        hub.build('small_saecnn', checkpoint=tmp_path / 'w.pth', **kwargs)


@pytest.mark.parametrize('name', ['w.safetensors', 'w.pth'])
def test_build_refuses_a_damaged_file(trained, tmp_path, name):
    (tmp_path / name).write_bytes(trained.read_bytes()[:1000])
    with pytest.raises(UserError, match=f'{name} is not a checkpoint, or it is damaged'):
        hub.build('small_saecnn', checkpoint=tmp_path / name)


@pytest.mark.parametrize(
    'args, says',
    [
        (dict(name='resnet50', checkpoint='w.pth'), 'not one of our models'),
        (dict(name='senetv2_resnet05', checkpoint='w.pth'), 'did you mean senetv2_resnet'),
        (dict(name='small_saecnn', checkpoint='w.pth'), 'cannot read w.pth: there is no such file'),
        (dict(name='small_saecnn', tag='none'), "no pretrained weights with the tag 'none'"),
        (dict(name='small_saecnn'), 'either a pretrained tag or a checkpoint'),
        (dict(name='small_saecnn', tag='none', ema=True), 'come from a checkpoint'),
    ],
)
def test_build_refuses_what_is_not_there(args, says):
    with pytest.raises(UserError, match=says):
        hub.build(**args)


# Files and cards


def written_config(model, folder, facts):
    hub.write_files(model, folder, hub.render_card(model, 'me/x', facts), facts)
    return json.loads((folder / 'config.json').read_text())


def test_config_and_weights_are_timms_and_no_pickle(folder, trained):
    assert sorted(p.name for p in folder.iterdir()) == sorted((MARK, *hub.FILES))
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'small_saecnn'
    assert 'tag' not in config['pretrained_cfg']
    written, own = load_file(folder / 'model.safetensors'), torch.load(trained, weights_only=False)['state_dict']
    assert {f'module.{k}' for k in written} == set(own)
    assert all(torch.equal(written[k.removeprefix('module.')], v) for k, v in own.items())


def test_all_files_have_the_permissions_of_any_new_file(folder, tmp_path):
    (tmp_path / 'new').touch()
    assert {(folder / name).stat().st_mode for name in hub.FILES} == {(tmp_path / 'new').stat().st_mode}


def test_writing_twice_gives_the_same_bytes(trained, folder, tmp_path):
    model, facts = hub.build('small_saecnn', checkpoint=trained), hub.Facts(license='mit')
    hub.write_files(model, tmp_path / 'x', hub.render_card(model, 'me/x', facts), facts)
    assert contents(tmp_path / 'x') == contents(folder)


def test_shipped_weights_are_written_with_their_labels_and_card(tmp_path):
    model, facts = hub.build('cifar_senetv2_resnet20', tag='fmnist'), hub.facts_of('cifar_senetv2_resnet20', 'fmnist')
    config = written_config(model, tmp_path, facts)
    assert config['label_names'][9] == 'Ankle boot' and config['pretrained_cfg']['tag'] == 'fmnist'
    written = load_file(tmp_path / 'model.safetensors')
    shipped = load_file(get_pretrained_cfg('cifar_senetv2_resnet20.fmnist').file)
    assert written.keys() == shipped.keys() and all(torch.equal(written[k], shipped[k]) for k in shipped)
    assert 'Fashion-MNIST' in (tmp_path / 'README.md').read_text()


@pytest.mark.parametrize(
    'error',
    [
        OSError(28, 'No space left on device'),
        SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'),
    ],
)
def test_full_disk_leaves_the_folder_as_it_was(model, folder, tmp_path, monkeypatch, error):
    out = tmp_path / 'x'
    facts = hub.Facts(license='mit')
    hub.write_files(model, out, hub.render_card(model, 'me/x', facts), facts)

    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr('safetensors.torch.save_file', full)
    with pytest.raises(UserError, match='the disk is full'):
        hub.write_files(model, out, hub.render_card(model, 'me/y', facts), facts)
    assert contents(out) == contents(folder)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow  # the test above has the system's answers from a stand-in
def test_dry_run_on_a_disk_that_is_really_full(trained, tmp_path):
    probe = subprocess.run(['unshare', '-Urm', 'mount', '-t', 'tmpfs', 'none', str(tmp_path)], capture_output=True)
    if probe.returncode:
        pytest.skip('this system lets no user mount a small file system')
    command = [
        sys.executable,
        '-m',
        'timm_senetv2',
        'push',
        '--model',
        'small_saecnn',
        '--checkpoint',
        str(trained),
        '--license=mit',
        '--repo-id',
        'me/x',
        '--dry-run',
        f'{tmp_path}/x',
    ]
    done = subprocess.run(
        [
            'unshare',
            '-Urm',
            'sh',
            '-c',
            f'mount -t tmpfs -o size=300k none {tmp_path}; {shlex.join(command)}; echo "code $?"; ls -A {tmp_path}',
        ],
        capture_output=True,
        text=True,
    )
    assert done.stdout == 'code 2\n'  # and nothing is left in the folder
    assert done.stderr == f'error: cannot write {tmp_path}/x: the disk is full; free some space and run it again\n'


def test_files_are_not_written_over_a_file(model, tmp_path):
    (tmp_path / 'x').write_text('mine')
    with pytest.raises(UserError, match='is a file; name a new folder'):
        hub.write_files(
            model, tmp_path / 'x', hub.render_card(model, 'me/x', hub.Facts(license='mit')), hub.Facts(license='mit')
        )
    assert (tmp_path / 'x').read_text() == 'mine'


FACTS = """
summary: A model of the tests.
datasets: [fashion_mnist]
license: mit
training:
  command: python train.py --epochs 2
  hyperparameters: {epochs: 2, optimizer: SGD}
results:
  - file: table.csv
    row: {seed: 3}
    metrics: {Top-1 accuracy: top1}
    dataset: fashion_mnist
    dataset_name: Fashion-MNIST
    split: test
limits: Only for clothes.
"""


def test_card_states_the_facts_and_its_metadata_holds_them(model, tmp_path):
    (tmp_path / 'facts.yaml').write_text(FACTS)
    (tmp_path / 'table.csv').write_text('model,seed,top1\nsmall_cnn,3,1.5\nsmall_saecnn,2,2.5\nsmall_saecnn,3,91.25\n')
    card = hub.render_card(model, 'me/x', hub.load_facts(tmp_path / 'facts.yaml'))
    read = huggingface_hub.ModelCard(str(card)).data.to_dict()
    assert read['library_name'] == 'timm' and read['pipeline_tag'] == 'image-classification'
    assert read['license'] == 'mit' and read['datasets'] == ['fashion_mnist'] and 'base_model' not in read
    (entry,) = read['model-index']
    (result,) = entry['results']
    assert entry['name'] == 'x' and result['dataset'] == {
        'name': 'Fashion-MNIST',
        'type': 'fashion_mnist',
        'split': 'test',
    }
    assert [m['value'] for m in result['metrics']] == [91.25]
    text = card.text
    for part in (
        'A model of the tests.',
        "timm.create_model('hf-hub:me/x', pretrained=True)",
        'python train.py --epochs 2',
        '| optimizer | SGD |',
        '| Top-1 accuracy | 91.25 |',
        'table.csv',
        'Only for clothes.',
        'pip install timm-senetv2',
        f'{sum(p.numel() for p in model.parameters()):,}',
    ):
        assert part in text


def test_card_takes_command_and_hyperparameters_from_a_table(model, tmp_path):
    (tmp_path / 'facts.yaml').write_text(
        'license: mit\ntraining: {file: table.csv, row: {seed: 3}, command: how, hyperparameters: [epochs, amp]}'
    )
    (tmp_path / 'table.csv').write_text(
        'model,seed,epochs,amp,how\nsmall_saecnn,2,5,,python two.py\nsmall_saecnn,3,7,,python three.py\n'
    )
    text = hub.render_card(model, 'me/x', hub.load_facts(tmp_path / 'facts.yaml')).text
    assert 'python three.py' in text and '| epochs | 7 |' in text and 'amp' not in text and 'two.py' not in text

    (tmp_path / 'facts.yaml').write_text(
        'license: mit\ntraining: {file: table.csv, command: how, hyperparameters: [epochs]}'
    )
    with pytest.raises(UserError, match='2 rows of training'):
        hub.render_card(model, 'me/x', hub.load_facts(tmp_path / 'facts.yaml'))


@pytest.mark.parametrize(
    'old, new, says',
    [
        ('license: mit', 'license: "mit\\nlibrary_name: x"', 'is not the id of a licence'),
        ('license: mit', 'labels: [1, 2]', 'labels.0: Input should be a valid string'),
        ('license: mit', 'labels: [a, {b: c}]', 'labels.1: Input should be a valid string'),
        ('license: mit', 'labels: [a, a]', "labels: 'a' stands there twice"),
        ('license: mit', 'data_config: {std: [0, 0, 0]}', 'data_config.std.*greater than 0'),
        ('license: mit', 'data_config: {crop_pct: abc}', 'data_config.crop_pct: Input should be a valid number'),
        ('license: mit', 'data_config: {crop: 1}', 'data_config.crop: there is no such fact; these are: input_size'),
        ('license: mit', 'data_config: {mean: [.nan]}', 'data_config.mean.*finite'),
        ('license: mit', 'license: mit\nlicense: gpl', "'license' stands there twice"),
        ('license: mit', 'license: 3', 'license: Input should be a valid string'),
        ('license: mit', 'folder: x', 'folder'),
        ('limits: Only for clothes.', 'limits: &a [*a]', 'aliases are not allowed'),
        ('limits: Only for clothes.', f'limits: {"[" * 5000}', 'nested too deeply'),
        ('table.csv', 'nan.csv', "holds 'nan' as top1, not a finite number"),
        ('table.csv', 'latin.csv', 'not a csv file in UTF-8'),
        ('table.csv', 'short.csv', 'rows with more or fewer values than columns'),
        ('summary: A', 'sumary: A', 'sumary: there is no such fact; these are: summary,'),
        ('[fashion_mnist]', 'fashion_mnist', 'datasets: Input should be a valid list'),
        ('    split: test\n', '', r'results.0.split: Field required'),
        ('{seed: 3}', '{sed: 3}', "no column 'sed'"),
        ('{seed: 3}', '{seed: 4}', 'no row for small_saecnn'),
        ('table.csv', 'other.csv', 'cannot read the results'),
        ('top1}', 'seeds}', "no column 'seeds'"),
        ('summary: A', 'summary: [A', 'is not YAML'),
        (
            'license: mit',
            'license: mit\ndata_config: {mean: [0.5, 0.5]}',
            'data_config does not suit small_saecnn: mean',
        ),
        ('{epochs: 2, optimizer: SGD}', '[epochs]', 'training: hyperparameters must be a mapping'),
        ('  hyperparameters: {epochs: 2, optimizer: SGD}\n', '', 'training.hyperparameters: Field required'),
    ],
)
def test_wrong_facts_are_one_clear_line(model, tmp_path, old, new, says):
    assert old in FACTS
    (tmp_path / 'facts.yaml').write_text(FACTS.replace(old, new))
    (tmp_path / 'table.csv').write_text('model,seed,top1\nsmall_saecnn,3,91.25\n')
    (tmp_path / 'nan.csv').write_text('model,seed,top1\nsmall_saecnn,3,nan\n')
    (tmp_path / 'latin.csv').write_bytes(b'model,seed,top1\nsmall_saecnn,3,\xe9\n')
    (tmp_path / 'short.csv').write_text('model,seed,top1\nsmall_saecnn,3\n')
    with pytest.raises(UserError, match=says) as caught:
        hub.render_card(model, 'me/x', hub.load_facts(tmp_path / 'facts.yaml'))
    assert '\n' not in str(caught.value)


def test_figures_may_stand_in_the_card_file_itself(model, tmp_path):
    (tmp_path / 'facts.yaml').write_text(
        'license: mit\nresults: [{metrics: {Top-1 accuracy: 91.5}, dataset: me/set, dataset_name: A set, split: test}]'
    )
    card = hub.render_card(model, 'me/x', hub.load_facts(tmp_path / 'facts.yaml'))
    assert '| Top-1 accuracy | 91.5 |' in card.text and 'From' not in card.text
    for wrong in ('top1', '.nan', '.inf', 'true'):
        text = (tmp_path / 'facts.yaml').read_text().replace('91.5', wrong)
        (tmp_path / 'wrong.yaml').write_text(text)
        with pytest.raises(UserError, match='results.0'):
            hub.load_facts(tmp_path / 'wrong.yaml')


def test_config_has_the_number_of_classes_once_and_timm_takes_it_and_another(tmp_path):
    torch.manual_seed(3)
    given = timm.create_model('cifar_senetv2_resnet20', num_classes=7, sae_cardinality=2)
    save_file(given.state_dict(), tmp_path / 'w.safetensors')
    model = hub.build('cifar_senetv2_resnet20', checkpoint=tmp_path / 'w.safetensors', sae_cardinality=2)
    config = written_config(model, tmp_path / 'x', hub.Facts(license='mit'))
    assert config['num_classes'] == 7 and 'num_classes' not in config['model_args']
    # transformers' TimmWrapper passes both
    timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args'])
    loaded = timm.create_model(f'local-dir:{tmp_path / "x"}', pretrained=True)
    assert torch.equal(logits(loaded), logits(given))
    assert loaded.layer1[0].se.cardinality == 2
    assert timm.create_model(f'local-dir:{tmp_path / "x"}', pretrained=True, num_classes=3).fc.out_features == 3


def test_classes_get_imagenets_names_only_where_the_facts_say_imagenet(tmp_path):
    model = timm.create_model('small_cnn', num_classes=1000)
    assert 'label_names' not in written_config(model, tmp_path, hub.Facts(license='mit'))
    config = written_config(model, tmp_path, hub.Facts(datasets=['imagenet-1k'], license='mit'))
    assert len(config['label_names']) == 1000
    assert 'tench' in config['label_descriptions'][config['label_names'][0]]
    with pytest.raises(UserError, match='2 labels were given for a model with 1000 classes'):
        written_config(model, tmp_path, hub.Facts(labels=['a', 'b'], license='mit'))
