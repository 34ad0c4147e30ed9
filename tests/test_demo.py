"""timm_senetv2.demo without Gradio: what strangers may send, what they may choose, and what they get."""

import io
import json
import socket
import struct
import sys
import threading
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import timm_senetv2.demo.choices as choices_module
import timm_senetv2.demo.classify as classify_module
from timm_senetv2 import commands
from timm_senetv2.demo import Settings, html, page, space
from timm_senetv2.demo.answer import Demo
from timm_senetv2.demo.choices import Choice, Choices, Loaded
from timm_senetv2.demo.classify import Answer, Gates, load, recorded_gates
from timm_senetv2.demo.images import MOST_BYTES, MOST_PIXELS, examples, read_image
from timm_senetv2.errors import UserError

OURS = 'cifar_senetv2_resnet20.fmnist'


def png(width: int, height: int, compressed: bytes = b'') -> bytes:
    """A PNG of any announced size, and hardly any pixels in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', compressed) + chunk(b'IEND', b'')


def saved(image: Image.Image, kind: str, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


GREY = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))


@pytest.fixture
def no_heat(monkeypatch):
    """Without the class-activation map, which takes the extra `demo`."""
    monkeypatch.setattr(classify_module, '_heat', lambda *args: None)


# --- Images ---


@pytest.mark.parametrize(
    'content, says',
    [
        (b'', 'not an image'),
        (b'hello', 'not an image'),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not an image'),
        (saved(GREY, 'TIFF'), 'not an image'),
        (saved(NOISE, 'PNG')[:-200], 'damaged'),
        (saved(NOISE, 'JPEG')[:-200], 'damaged'),
        (png(4, 4, b'rubbish'), 'damaged'),
        (png(20_000, 20_000), 'many pixels|million pixels'),
        (png(7000, 6000), f'7,000 × 6,000 pixels; give one of at most {MOST_PIXELS // 10**6} million'),
        (png(2**31 - 1, 2**31 - 1), 'pixels'),
        (png(1, 30_000), 'too long and narrow'),
        (b'\0' * (MOST_BYTES + 1), 'The file has 10 MB'),
    ],
    ids=['empty', 'text', 'svg', 'tiff', 'cut png', 'cut jpeg', 'rubbish', '400M', '42M', 'most', 'narrow', 'bytes'],
)
def test_what_is_no_fit_image_is_refused_at_once_in_plain_words(content, says, tmp_path):
    (tmp_path / 'x.png').write_bytes(content)
    began = time.monotonic()
    with pytest.raises(UserError, match=says) as caught:
        read_image(tmp_path / 'x.png')
    assert '\n' not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert time.monotonic() - began < 5


def test_compressed_pixels_of_a_bomb_are_never_decoded(tmp_path):
    import tracemalloc

    (tmp_path / 'x.png').write_bytes(png(12_000, 12_000, zlib.compress(bytes(3 * 12_000 * 400), 9)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match='million pixels'):
            read_image(tmp_path / 'x.png')
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_missing_and_unreadable_files_are_refused(tmp_path):
    for path in (tmp_path / 'none.png', tmp_path, 'a\0b'):
        with pytest.raises(UserError):
            read_image(path)


def test_images_are_read_as_a_person_sees_them(tmp_path):
    def read(content: bytes) -> np.ndarray:
        (tmp_path / 'x').write_bytes(content)
        image = read_image(tmp_path / 'x')
        assert image.mode == 'RGB'
        return np.asarray(image)

    grey = np.repeat(np.asarray(GREY)[..., None], 3, 2)
    for kind in ('PNG', 'BMP', 'GIF'):
        assert np.array_equal(read(saved(GREY, kind)), grey)
    assert np.array_equal(read(saved(GREY, 'WEBP', lossless=True)), grey)
    deep = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    assert np.array_equal(read(saved(deep, 'PNG')), grey)
    clear = Image.new('RGBA', (2, 1), (255, 0, 0, 255))
    clear.putpixel((1, 0), (9, 9, 9, 0))
    assert read(saved(clear, 'PNG')).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: the stored rows are columns
    assert read(saved(Image.new('RGB', (20, 10)), 'JPEG', exif=exif)).shape == (20, 10, 3)
    frames = [Image.new('P', (3, 3), value) for value in (0, 1)]
    first = read(saved(frames[0], 'GIF', save_all=True, append_images=frames[1:]))
    assert first.shape == (3, 3, 3) and len(np.unique(first.reshape(-1, 3), axis=0)) == 1


def test_large_photograph_is_decoded_at_a_fraction_of_its_size(tmp_path):
    Image.new('L', (6000, 4000), 128).save(tmp_path / 'x.jpg')
    image = read_image(tmp_path / 'x.jpg')
    assert max(image.size) < 6000 and image.width * 2 == image.height * 3


def test_examples_are_of_the_classes_and_small():
    names = [example.label for example in examples()]
    assert names == list(timm.models.get_pretrained_cfg(OURS).label_names)
    assert all(np.asarray(Image.open(example.path)).shape == (28, 28) for example in examples())
    folder = examples()[0].path.parent
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8000
    assert 'Zalando' in (folder / 'LICENSE').read_text()


# --- Choices ---


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model that timm saved, in a folder of its own."""
    path = tmp_path / 'secret place' / 'mine'
    timm.models.save_for_hf(
        timm.create_model('cifar_senetv2_resnet20', num_classes=3), str(path), safe_serialization=True
    )
    return path


def test_only_what_is_listed_can_be_chosen(folder):
    offered = Choices([OURS, f'local-dir:{folder}', 'hf-hub:me/listed'])
    assert offered.labels == [OURS, 'local-dir:mine', 'hf-hub:me/listed']
    assert offered.find('local-dir:mine').name == f'local-dir:{folder.resolve()}'
    for wanted in (
        *('senetv2_resnet50.se_ra2_in1k', 'resnet50', 'local-dir:/etc', f'local-dir:{folder}', 'hf-hub:me/other'),
        *('', None, 7, ['x'], {'path': '/etc/passwd'}, '../..', '/etc/passwd', OURS + '\n<b>', 'x' * 10**6),
    ):
        with pytest.raises(UserError) as caught:
            offered.find(wanted)
        assert str(folder) not in str(caught.value) and len(str(caught.value)) < 400


def test_visitors_type_names_of_the_hub_only_where_that_is_allowed():
    offered = Choices([OURS], allow_hub=True)
    assert offered.find('hf-hub:me/a.b@main') == Choice('hf-hub:me/a.b@main', 'hf-hub:me/a.b@main', by_visitor=True)
    for wanted in ('hf-hub:/etc', 'hf-hub:../../x', 'hf-hub:me', 'hf-hub:me/x/y', 'hf-hub:me/..', 'local-dir:/etc'):
        with pytest.raises(UserError):
            offered.find(wanted)


def test_page_for_strangers_offers_by_default_what_needs_no_download():
    carried = ['cifar_senetv2_resnet20.fmnist', 'cifar_resnet20.fmnist', 'cifar_seresnet20.fmnist']
    assert Choices(public=True).labels == carried
    everything = Choices().labels
    assert everything[:3] == carried and 'senetv2_resnet50.se_ra2_in1k' in everything


@pytest.mark.parametrize(
    'names, says',
    [
        (['cifar_senetv2_resnet2O'], 'did you mean .*cifar_senetv2_resnet20'),
        (['senetv2_resnet50.se_ra3_in1k'], 'did you mean .*se_ra2_in1k'),
        (['seanet20'], 'has no pretrained weights'),
        (['local-dir:/nowhere'], 'holds no config.json'),
        (['hf-hub:x'], 'OWNER/NAME'),
        ([''], 'no model matches'),
        ([], 'names no model'),
    ],
)
def test_wrong_list_of_models_costs_the_operator_one_line(names, says):
    with pytest.raises(UserError, match=says):
        Choices(names)


def test_folder_with_another_config_is_refused(tmp_path):
    for content in ('[]', '{}', '{"architecture": 3}', '{', '[' * 100_000):
        (tmp_path / 'config.json').write_text(content)
        with pytest.raises(UserError, match='--models'):
            Choices([f'local-dir:{tmp_path}'])


def test_folders_of_one_name_stay_apart(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / 'mine')
    offered = Choices([f'local-dir:{folder}', f'local-dir:{tmp_path}/mine', f'local-dir:{folder}'])
    assert offered.labels == ['local-dir:mine', 'local-dir:mine (2)']
    assert offered.find('local-dir:mine (2)').name == f'local-dir:{tmp_path}/mine'


def test_model_is_loaded_once_for_all_who_ask_and_a_failure_is_tried_again(monkeypatch):
    calls, go = [], threading.Event()

    def slow(name: str, trusted: bool):
        calls.append((name, trusted))
        assert go.wait(20)
        if len(calls) == 1:
            raise UserError('the network is down')
        return name

    monkeypatch.setattr(choices_module, 'load', slow)
    loaded, choice = Loaded(), Choice('a', 'A')
    with pytest.raises(UserError, match='A is still being loaded; try again'):
        loaded.get(choice, wait=0.05)
    go.set()
    with pytest.raises(UserError, match='the network is down'):
        loaded.get(choice, wait=20)
    go.clear()
    got: list = []
    threads = [threading.Thread(target=lambda: got.append(loaded.get(choice, wait=20))) for _ in range(5)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(20)
    assert got == ['a'] * 5 and calls == [('a', True)] * 2
    loaded.get(Choice('b', 'b', by_visitor=True), wait=20)
    assert calls[-1] == ('b', False)


def test_models_used_last_stay_in_memory(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(choices_module, 'load', lambda name, trusted: calls.append(name) or name)
    loaded = Loaded(keep=2)
    for name in 'abaca':
        assert loaded.get(Choice(name, name), wait=20) == name
    assert calls == ['a', 'b', 'c']
    loaded.get(Choice('b', 'b'), wait=20)
    assert calls == ['a', 'b', 'c', 'b']


# --- Answers ---


def test_answer_is_that_of_the_model_by_itself(no_heat):
    model = timm.create_model(OURS, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    classifier, right = load(OURS), 0
    for example in examples():
        image = read_image(example.path)
        with torch.no_grad():
            expected = model(transform(image)[None]).softmax(1)[0]
        found = classifier(image)
        order = expected.argsort(descending=True)[:5]
        assert [name for name, _ in found.top] == [model.pretrained_cfg['label_names'][i] for i in order]
        assert [share for _, share in found.top] == pytest.approx(expected[order].tolist(), rel=1e-4)
        right += found.top[0][0] == example.label
        assert 0 < found.seconds < 60
    assert right >= 8


def test_gates_are_those_of_the_formula():
    model = timm.create_model(OURS, pretrained=True).eval()
    x, inputs, gates = torch.randn(2, 3, 32, 32), {}, {}
    for name, module in model.named_modules():
        if name.endswith('.se'):
            module.register_forward_hook(
                lambda m, args, out, name=name: inputs.update({name: (m, args[0])}), always_call=True
            )
    with torch.no_grad(), recorded_gates(model, gates):
        model(x)
    assert list(gates) == [f'layer{stage}.{i}' for stage in (1, 2, 3) for i in range(3)]
    for block, gate in gates.items():
        layer, entered = inputs[f'{block}.se']
        z = entered.double().mean((2, 3))
        hidden = (z @ layer.fc1.weight.double().T + layer.fc1.bias).clamp(min=0)
        expected = torch.sigmoid(hidden @ layer.fc2.weight.double().T + layer.fc2.bias)
        assert torch.allclose(gate.double(), expected, atol=1e-4)
        assert gate.std() > 1e-3
    gates.clear()
    with torch.no_grad():
        model(x)
    assert not gates


def test_gates_are_found_in_every_kind_of_channel_attention_and_none_in_a_model_without():
    counts = dict(seresnet18=8, mobilenetv3_small_050=9, senetv2_resnet18=8, seanet20=9, resnet18=0)
    counts |= dict(ecaresnet26t=8, ese_vovnet19b_slim_dw=4)
    for name, count in counts.items():
        gates: dict = {}
        model = timm.create_model(name).eval()
        with torch.no_grad(), recorded_gates(model, gates):
            model(torch.randn(1, 3, 64, 64))
        assert len(gates) == count and all((0 <= g).all() and (g <= 1).all() and g.ndim == 2 for g in gates.values())


@pytest.mark.integration
def test_map_is_grad_cam_of_the_last_stage():
    pytest.importorskip('pytorch_grad_cam')
    model = timm.create_model(OURS, pretrained=True).eval().requires_grad_(False)
    image = read_image(examples()[9].path)
    x = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)[None]
    target = int(model(x).argmax())
    features = model.forward_features(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_head(features)[0, target], features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1)[0].clamp(min=0).detach()
    expected = expected / expected.max()
    heat = classify_module._heat(model, x, target)
    assert heat.shape == (32, 32) and 0 <= heat.min() and heat.max() <= 1
    at = np.unravel_index(heat.argmax(), heat.shape)
    row, column = divmod(int(expected.argmax()), expected.shape[1])
    assert abs(at[0] / 4 - row) <= 1 and abs(at[1] / 4 - column) <= 1
    smaller = torch.nn.functional.interpolate(expected[None, None], (32, 32), mode='bilinear')[0, 0].numpy()
    assert np.corrcoef(smaller.ravel(), heat.ravel())[0, 1] > 0.98
    assert not any(m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_names_of_classes_are_the_models_or_none(monkeypatch):
    def labels(**config):
        return classify_module._labels(config, 1000)

    assert labels(tag='a1_in1k')[0].startswith('tench') and labels(tag='mine')[:2] == ['class 0', 'class 1']
    assert labels(tag='a1_in1k', label_names=['x'] * 3)[0].startswith('tench')
    assert classify_module._labels(dict(label_names=['a\nb', 'c']), 2) == ['a\\nb', 'c']


def test_folder_is_loaded_and_answers(folder, no_heat):
    found = load(f'local-dir:{folder}')(Image.new('RGB', (50, 40), 'red'))
    assert len(found.top) == 3 and sum(share for _, share in found.top) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    'edit, says',
    [
        (dict(input_size=[3, 40_000, 40_000]), 'takes inputs of 3 × 40000 × 40000'),
        (dict(architecture='no_such_net'), 'could not be loaded'),
    ],
)
def test_model_that_does_not_fit_the_page_is_refused_in_one_line(edit, says, folder):
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg'].update({k: v for k, v in edit.items() if k == 'input_size'})
    config.update({k: v for k, v in edit.items() if k != 'input_size'})
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=says) as caught:
        load(f'local-dir:{folder}')
    assert 'secret' not in str(caught.value).partition(':')[0] and '\n' not in str(caught.value)


def test_model_with_one_class_is_refused(tmp_path):
    timm.models.save_for_hf(timm.create_model('cifar_resnet20', num_classes=1), str(tmp_path), safe_serialization=True)
    with pytest.raises(UserError, match='does not tell classes apart'):
        load(f'local-dir:{tmp_path}')


def test_weights_that_are_not_finite_are_said_to_be(folder, no_heat):
    model = load(f'local-dir:{folder}')
    model.model.fc.bias.fill_(float('nan'))
    with pytest.raises(UserError, match='not finite'):
        model(Image.new('RGB', (32, 32)))


def test_model_that_a_stranger_names_must_be_ours_and_of_bearable_size(monkeypatch):
    made = []
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: made.append(args))
    for config, says in (
        (('resnet50', {}), 'no model of timm-senetv2'),
        (('cifar_senetv2_resnet20', dict(depth=6002)), 'blocks'),
    ):
        monkeypatch.setattr(
            classify_module, 'load_model_config_from_hf', lambda name, config=config: ({}, *config), raising=True
        )
        with pytest.raises(UserError, match=says):
            load('hf-hub:me/x', trusted=False)
    assert all('hf-hub' not in str(args) for args in made)


class Seen(HTMLParser):
    """Tags and text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ''
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    handle_startendtag = handle_starttag

    def handle_data(self, data) -> None:
        self.text += data


HOSTILE = '<script>alert(1)</script>"\'><img src=x onerror=alert(2)>'


def test_answer_shows_everything_and_escapes_all_names():
    picture = Image.new('RGB', (4, 4))
    gates = [Gates(f'layer{i}', np.linspace(0, 1, 8 * i, dtype=np.float32)) for i in (1, 2, 3)]
    top = [(HOSTILE, 0.5), ('crane', 0.3), ('crane', 0.1)]
    seen = Seen(html.page([html.answer(HOSTILE, Answer(top, gates, picture, picture, 0.0123), HOSTILE)]))
    assert 'script' not in seen.tags and not any(name.startswith('on') for name, _ in seen.attributes)
    assert seen.tags.count('li') == 3 and '50.0%' in seen.text and '12.3 ms' in seen.text and HOSTILE in seen.text
    assert seen.tags.count('img') == 2 and sum(name == 'alt' and bool(value) for name, value in seen.attributes) == 2
    assert seen.tags.count('svg') == 1 and seen.tags.count('tr') == 4 and 'Mean gate from 0.50' in seen.text
    refused = Seen(html.refusal(HOSTILE, HOSTILE))
    assert 'script' not in refused.tags and 'img' not in refused.tags and ('role', 'alert') in refused.attributes


def test_gates_below_zero_and_above_one_stay_in_the_picture():
    gates = [Gates('b', np.array([-0.9, 1.7], np.float32))]
    seen = Seen(html.answer('m', Answer([('c', 1.0)], gates, Image.new('RGB', (1, 1)), None, 1.0)))
    width = float(dict(seen.attributes)['viewbox'].split()[2])
    assert all(0 <= float(value) <= width for name, value in seen.attributes if name == 'x')
    assert 'No class-activation map' in seen.text


def test_two_models_are_answered_and_a_wrong_one_does_not_take_the_other_with_it(no_heat):
    demo = Demo(Choices(['cifar_*.fmnist']))
    text, is_read = demo.answer(str(examples()[0].path), OURS, 'nonsense')
    assert is_read and 'T-shirt/top, ' in text and 'nonsense' in text and 'role="alert"' in text
    text, _ = demo.answer(str(examples()[0].path), OURS, 'cifar_resnet20.fmnist')
    assert text.count('role="status"') == 2 and 'role="alert"' not in text and 'has no gates' in text
    assert 'means nothing' in text


def test_no_mistake_of_a_program_reaches_the_visitor(monkeypatch, capsys, tmp_path):
    def fails(choice, wait):
        raise RuntimeError('/home/me/secret')

    demo = Demo(Choices([OURS]), public=True)
    monkeypatch.setattr(demo._loaded, 'get', fails)
    text, _ = demo.answer(str(examples()[0].path), OURS)
    assert 'secret' not in text and 'Traceback' not in text and 'Something went wrong on this server' in text
    assert 'secret' in capsys.readouterr().err
    assert 'Choose a model' in demo.answer(str(examples()[0].path), None, [])[0]
    for path in (None, str(tmp_path / 'nothing'), '/etc/passwd'):
        text, is_read = demo.answer(path, OURS)
        assert not is_read and 'role="alert"' in text and 'root:' not in text


def test_failed_download_is_told_in_full_to_the_operator_only(monkeypatch, capsys, folder):
    (folder / 'model.safetensors').write_bytes(b'damaged')
    path = str(examples()[0].path)
    private = Demo(Choices([f'local-dir:{folder}'])).answer(path, 'local-dir:mine')[0]
    assert 'could not be loaded: ' in private
    public = Demo(Choices([f'local-dir:{folder}']), public=True).answer(path, 'local-dir:mine')[0]
    assert 'could not be loaded' not in public and 'terminal' in public
    assert 'could not be loaded' in capsys.readouterr().err


# --- The server's words ---


def test_only_files_among_the_uploads_count_as_images(tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
    (tmp_path / 'uploads').mkdir()
    (tmp_path / 'uploads' / 'link').symlink_to('/etc/passwd')
    inside = str(tmp_path / 'uploads' / 'a.png')
    assert page._path_of(dict(path=inside)) == (inside, True)
    for given in (
        *(None, 'x', 3, [], {}, dict(path=None), dict(path='/etc/passwd'), dict(path=f'{tmp_path}/uploads/../a.png')),
        *(dict(path=f'{tmp_path}/uploads/link'), dict(path='a\0b'), dict(url='data:image/png;base64,AA==')),
    ):
        assert page._path_of(given) == (None, False)


def test_host_that_others_reach_is_public():
    for host in ('127.0.0.1', '127.0.0.2', 'localhost', '::1'):
        assert not Settings(host=host).public and Settings(host=host, share=True).public
    for host in ('0.0.0.0', '::', '192.168.1.7', 'localhost.example.org'):
        assert Settings(host=host).public
    assert not Settings().public and not Settings().share


def run(argv, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        commands.main([str(word) for word in argv])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


@pytest.fixture
def with_packages(monkeypatch):
    """As if the extra `demo` were installed."""
    monkeypatch.setitem(commands.EXTRAS, 'demo', {})


def test_port_in_use_and_unknown_host_cost_one_line(capsys, with_packages):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        number = taken.getsockname()[1]
        code, _, err = run(['demo', '--port', number], capsys)
    assert (
        code == 2 and err == f'error: port {number} is in use; choose another with --port, or 0 for any that is free\n'
    )
    code, _, err = run(['demo', '--host', 'no such host', '--port', 0], capsys)
    assert code == 2 and err.count('\n') == 1 and '--host' in err


@pytest.mark.parametrize(
    'argv',
    [
        ['--port', '70000'],
        ['--port', 'x'],
        ['--timeout', 'nan'],
        ['--timeout', '0'],
        ['--package', 'x'],
        ['--models'],
        ['--models', 'no_such_model'],
        ['--models', 'local-dir:/nowhere'],
    ],
)
def test_wrong_arguments_cost_one_line(argv, capsys, with_packages):
    code, _, err = run(['demo', *argv], capsys)
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1


def test_missing_packages_cost_one_line_that_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(commands, 'find_spec', lambda name: None)
    code, _, err = run(['demo'], capsys)
    assert code == 2 and err.count('\n') == 1 and "pip install 'timm-senetv2[demo]'" in err and 'gradio' in err
    code, out, _ = run(['demo', '--help'], capsys)
    assert code == 0 and '--allow-hub' in out


# --- Spaces ---


@pytest.fixture
def gradio_9(monkeypatch):
    monkeypatch.setattr(space, 'version', lambda name: '9.8.7')


def test_space_is_ready_to_push(tmp_path, capsys, with_packages, gradio_9):
    models = ['cifar_senetv2_resnet20', 'senetv2_resnet50.se_ra2_in1k', 'hf-hub:me/mine@main']
    code, out, err = run(['demo', '--models', *models, '--timeout', 20, '--space', tmp_path / 's'], capsys)
    assert code == 0, err
    text = (tmp_path / 's' / 'README.md').read_text().split('---\n')[1]
    assert '&' not in text and '*' not in text  # the anchors and aliases of YAML
    front = yaml.safe_load(text)
    assert front['sdk'] == 'gradio' and front['sdk_version'] == '9.8.7' and front['app_file'] == 'app.py'
    source = timm.models.get_pretrained_cfg('senetv2_resnet50.se_ra2_in1k').hf_hub_id
    assert front['models'] == front['preload_from_hub'] == [source, 'me/mine'] and len(front['short_description']) <= 60
    assert 'timm-senetv2[demo]==' in (tmp_path / 's' / 'requirements.txt').read_text()
    served: list[Settings] = []
    scope = dict(__name__='app')
    exec((tmp_path / 's' / 'app.py').read_text(), scope)
    assert scope['MODELS'] == [OURS, *models[1:]] and not served
    sys.modules['timm_senetv2.demo'].serve, before = served.append, sys.modules['timm_senetv2.demo'].serve
    try:
        exec((tmp_path / 's' / 'app.py').read_text(), dict(__name__='__main__'))
    finally:
        sys.modules['timm_senetv2.demo'].serve = before
    assert served == [Settings(scope['MODELS'], False, '0.0.0.0', 7860, False, 20.0)] and served[0].public


def test_space_replaces_its_own_folder_and_no_other(tmp_path, gradio_9):
    out = tmp_path / 's'
    space.write_space(out, Settings())
    space.write_space(out, Settings(models=['cifar_resnet20']), 'timm-senetv2[demo] @ git+https://example.org/x')
    assert 'git+https' in (out / 'requirements.txt').read_text()
    (out / 'app.py').write_text('# mine\n')
    with pytest.raises(UserError, match='app.py was changed'):
        space.write_space(out, Settings())
    assert (out / 'app.py').read_text() == '# mine\n'


def test_space_takes_no_folder_of_this_machine_and_no_second_line(tmp_path, folder, gradio_9):
    with pytest.raises(UserError, match='timm-senetv2 push'):
        space.write_space(tmp_path / 's', Settings(models=[f'local-dir:{folder}']))
    for package in ('a\nb', '', '--index-url x'):
        with pytest.raises(UserError, match='--package'):
            space.write_space(tmp_path / 's', Settings(), package)
    assert not (tmp_path / 's').exists()
