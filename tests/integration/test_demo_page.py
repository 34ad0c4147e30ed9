"""The page of `timm-senetv2 demo`, in a real browser: headless Chromium, driven by playwright."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.integration

for package in 'gradio', 'pytorch_grad_cam':
    pytest.importorskip(package, reason=f"{package} is missing: pip install 'timm-senetv2[demo]'")
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is missing: pip install playwright')
CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
if not CHROMIUM:
    pytest.skip('Chromium is missing: apt-get install chromium, or set $CHROMIUM', allow_module_level=True)

PATIENCE = 300  # seconds for anything to happen on a machine that has other work
OURS, SE, PLAIN = 'cifar_senetv2_resnet20.fmnist', 'cifar_seresnet20.fmnist', 'cifar_resnet20.fmnist'


def start(*arguments: str, cwd: Path, **environment: str) -> tuple[subprocess.Popen, str]:
    """The command, and the address that it prints."""
    variables = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1', **environment)
    server = subprocess.Popen(
        [sys.executable, '-m', 'timm_senetv2', 'demo', '--port', '0', *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=variables,
        start_new_session=True,  # a terminal's Ctrl-C reaches the server alone
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run in the background ignore it
    )
    line = server.stdout.readline()
    if 'http' not in line:
        server.kill()
        raise AssertionError(line + server.communicate()[1])
    return server, line.split()[-1]


def stop(server: subprocess.Popen) -> tuple[int, str]:
    """End it as Ctrl-C does; its exit code and what it said on stderr."""
    server.send_signal(signal.SIGINT)
    error = server.communicate(timeout=PATIENCE)[1]
    return server.returncode, error


@pytest.fixture(scope='module')
def url(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp('server')
    server, address = start('--models', OURS, SE, PLAIN, '--timeout', str(PATIENCE), cwd=folder, TMPDIR=str(folder))
    yield address
    code, error = stop(server)
    assert code == 130 and error.endswith('interrupted\n')  # after what Gradio logs of hostile programs
    assert not list(folder.iterdir()), 'uploads were left behind'


@pytest.fixture(scope='module')
def browser() -> Iterator['playwright.Browser']:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield found
        found.close()


@pytest.fixture
def page(browser, url) -> Iterator['playwright.Page']:
    """The page in a window of a laptop. It may ask no other server, and log no error."""
    yield from opened(browser, url, 1280, 900)


@pytest.fixture
def phone(browser, url) -> Iterator['playwright.Page']:
    yield from opened(browser, url, 375, 812)


def opened(browser, url: str, width: int, height: int) -> Iterator['playwright.Page']:
    context = browser.new_context(viewport=dict(width=width, height=height))
    page, foreign, errors = context.new_page(), [], []
    page.set_default_timeout(1000 * PATIENCE)
    page.on('request', lambda request: foreign.append(request.url) if is_foreign(request.url, url) else None)
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.goto(url)
    page.get_by_role('button', name='Classify').wait_for()
    yield page
    context.close()
    assert not foreign and not errors


def is_foreign(address: str, url: str) -> bool:
    return not address.startswith((url, 'data:', 'blob:'))


def answer(page, text: str = 'The network took'):
    """The paragraph that an answer begins with, once it is there."""
    found = page.get_by_role('status').filter(has_text=text)
    found.first.wait_for()
    return found


def refusal(page) -> str:
    alert = page.locator('#answer').get_by_role('alert')
    alert.first.wait_for()
    return alert.first.inner_text()


def upload(page, name: str, content: bytes) -> None:
    page.locator('input[type=file]').first.set_input_files(dict(name=name, mimeType='image/png', buffer=content))


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label).click()
    page.get_by_role('option', name=option, exact=True).click()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


def test_example_is_classified_with_gates_and_map(page):
    assert page.title() == 'Channel attention on your image'
    assert page.evaluate('document.documentElement.lang') == 'en'
    page.get_by_role('button', name='Ankle boot').click()
    assert answer(page).inner_text().startswith('Ankle boot, ')
    result = page.locator('#answer')
    assert result.get_by_role('listitem').count() == 5
    assert 'layer3.2' in result.get_by_role('img', name='Mean gate from').inner_html()
    for picture in result.locator('figure img').all():
        assert picture.evaluate('e => e.complete && e.naturalWidth') == 256
    page.get_by_text('The same as a table').click()
    assert result.get_by_role('row').count() == 10


def test_switching_the_model_answers_anew(page):
    page.get_by_role('button', name='Trouser').click()
    answer(page)
    assert page.locator('#answer').get_by_role('heading', level=3).inner_text() == OURS
    choose(page, 'Model', PLAIN)
    page.get_by_role('heading', name=PLAIN).wait_for()
    assert 'has no gates' in page.locator('#answer').inner_text()


def test_two_models_stand_side_by_side_and_under_each_other_on_a_phone(browser, url):
    for width, beside in (1280, True), (375, False):
        for page in opened(browser, url, width, 900):
            choose(page, 'Compare with', SE)
            page.get_by_role('button', name='Coat').click()
            page.get_by_role('heading', name=SE).wait_for()
            assert answer(page).count() == 2
            first, second = (box.bounding_box() for box in page.locator('#answer section').all())
            assert (abs(first['y'] - second['y']) < 5) == beside
            assert page.evaluate('document.documentElement.scrollWidth') <= width


def test_uploaded_image_is_classified(page):
    upload(page, 'mine.png', png(Image.fromarray(np.full((40, 60, 3), 200, np.uint8))))
    answer(page)


def test_pasted_image_is_classified(page, url):
    page.context.grant_permissions(['clipboard-read', 'clipboard-write'], origin=url.rstrip('/'))
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(28, 28);
            canvas.getContext('2d').fillRect(0, 0, 28, 28);
            const blob = await canvas.convertToBlob({type: 'image/png'});
            await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
        }"""
    )
    page.get_by_role('button', name='Paste from clipboard').click()
    clipboard = page.get_by_role('button', name='Paste from Clipboard')
    if not page.locator('#answer').get_by_role('status').count() and clipboard.count() > 1:
        clipboard.last.click()
    answer(page)


@pytest.mark.parametrize(
    'content, says',
    [
        (b'%PDF-1.7 nothing of an image', 'not an image that can be read here'),
        (png(Image.new('L', (64, 64)))[:60], 'damaged'),
        (png(Image.new('1', (30_000, 8))), 'too long and narrow'),
        (png(Image.new('1', (9000, 9000))), '9,000 × 9,000 pixels; give one of at most 40 million pixels'),
    ],
    ids=['pdf', 'cut', 'narrow', 'huge'],
)
def test_wrong_files_are_refused_in_plain_words_and_the_page_goes_on(page, content, says):
    upload(page, 'x.png', content)
    assert says in refusal(page)
    assert page.get_by_text('Error', exact=True).count() == 0
    page.get_by_role('button', name='Bag').click()
    assert answer(page).inner_text().startswith('Bag, ')


def test_decompression_bomb_is_refused(page):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(2**24), 9)
    upload(
        page,
        'bomb.png',
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b''),
    )
    assert 'million pixels' in refusal(page)


def test_file_above_the_limit_is_refused(page):
    upload(page, 'large.png', os.urandom(11 * 2**20))
    page.get_by_text(re.compile('exceed|too large|maximum', re.IGNORECASE)).first.wait_for()
    page.get_by_role('button', name='Bag').click()
    answer(page)


def test_without_an_image_the_page_asks_for_one(page):
    page.get_by_role('button', name='Classify').click()
    assert 'Give an image' in refusal(page)


def test_everything_works_by_keyboard(page):
    """Tab to each control, and Enter; nothing is reached by the mouse alone."""
    reached = []
    for _ in range(40):
        page.keyboard.press('Tab')
        name = page.evaluate('(document.activeElement.ariaLabel || document.activeElement.innerText || "").trim()')
        outline = page.evaluate('getComputedStyle(document.activeElement).outlineStyle')
        reached.append(name)
        if name == 'Sneaker':
            assert outline != 'none'
            page.keyboard.press('Enter')
            break
    assert answer(page).inner_text().startswith('Sneaker, ')
    assert {'Model', 'Compare with', 'Classify', 'Sandal'} <= set(reached)
    page.get_by_label('Model', exact=True).focus()
    page.keyboard.press('ArrowDown')
    page.keyboard.press('ArrowDown')
    page.keyboard.press('Enter')
    page.locator('#answer').get_by_role('heading', level=3, name=re.compile('^(?!.*senetv2)')).wait_for()


def test_controls_have_names_and_pictures_texts(page):
    page.get_by_role('button', name='Dress').click()
    answer(page)
    for element in page.locator('button:visible, input:not([type=file]):visible').all():
        assert element.evaluate('e => (e.ariaLabel || e.labels?.[0]?.innerText || e.innerText || "").trim()')
    assert page.locator('img:visible').count() >= 12
    for picture in page.locator('img:visible').all():
        assert picture.get_attribute('alt')
    levels = [int(tag[1]) for tag in page.locator('h1, h2, h3, h4').evaluate_all('all => all.map(e => e.tagName)')]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_stands_out_from_what_is_behind_it(browser, url, scheme):
    """WCAG AA: a contrast of at least 4.5."""
    context = browser.new_context(viewport=dict(width=1280, height=900), color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(url)
    page.get_by_role('button', name='Pullover').click()
    answer(page)
    found = page.evaluate(
        """() => {
        const parse = text => text.match(/[\\d.]+/g).map(Number);
        const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = e => { for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
        const low = [];
        for (const e of document.querySelectorAll('h1, h2, h3, h4, p, li span, button, label, figcaption, summary')) {
            if (!e.checkVisibility() || !e.innerText?.trim()) continue;
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
            const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (contrast < 4.5) low.push([e.tagName, e.innerText.slice(0, 30), contrast.toFixed(2)]);
        }
        return low;
    }"""
    )
    context.close()
    assert not found


def test_page_fits_a_phone(phone):
    assert phone.evaluate('document.documentElement.scrollWidth') <= 375
    phone.get_by_role('button', name='Ankle boot').click()
    answer(phone)
    assert phone.evaluate('document.documentElement.scrollWidth') <= 375
    for button in phone.get_by_role('button', name=re.compile('Sandal|Classify')).all():
        assert button.bounding_box()['height'] >= 24  # WCAG 2.2, target size
    name = phone.locator('#answer').get_by_role('heading', level=3)
    assert name.bounding_box()['x'] + name.bounding_box()['width'] <= 375


def ask(url: str, data: list) -> str:
    """What the page's button answers to a program that sends these values, whatever the page allows."""
    import httpx

    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        question = dict(data=data, fn_index=0, session_hash='stranger', event_data=None, trigger_id=None)
        client.post('gradio_api/queue/join', json=question).raise_for_status()
        with client.stream('GET', 'gradio_api/queue/data', params=dict(session_hash='stranger')) as events:
            for line in events.iter_lines():
                if line.startswith('data: ') and json.loads(line[6:])['msg'] == 'process_completed':
                    return json.dumps(json.loads(line[6:])['output'])
    raise AssertionError('no answer')


def test_strangers_program_reads_no_file_of_the_server(url, tmp_path):
    import httpx

    content = png(Image.new('RGB', (9, 9)))
    (tmp_path / 'secret.png').write_bytes(content)
    sent = httpx.post(f'{url}gradio_api/upload', files=dict(files=('mine.png', content, 'image/png')), timeout=PATIENCE)
    uploaded = dict(path=sent.json()[0], meta=dict(_type='gradio.FileData'))
    assert 'The network took' in ask(url, [uploaded, OURS, None])
    secret = str(tmp_path / 'secret.png')
    for path in (secret, '/etc/passwd', f'{Path(uploaded["path"]).parent}/../../../{secret}'):
        assert httpx.get(f'{url}gradio_api/file={path}', timeout=PATIENCE).status_code in (403, 404)
        for given in (dict(uploaded, path=path), dict(path=path), path):
            answered = ask(url, [given, OURS, None])
            assert 'The network took' not in answered and 'root:' not in answered


def test_strangers_program_loads_no_other_model(url, tmp_path):
    import httpx

    sent = httpx.post(
        f'{url}gradio_api/upload', files=dict(files=('a.png', png(Image.new('L', (9, 9))))), timeout=PATIENCE
    )
    uploaded = dict(path=sent.json()[0], meta=dict(_type='gradio.FileData'))
    for wanted in (f'local-dir:{tmp_path}', 'hf-hub:me/x', 'senetv2_resnet50.se_ra2_in1k', ['x'], {'a': 1}, 7):
        answered = ask(url, [uploaded, wanted, OURS])
        assert 'This model cannot be used' in answered and answered.count('The network took') == 1


def test_page_for_the_network_says_so_and_offers_only_what_the_package_carries(tmp_path):
    server, address = start('--host', '0.0.0.0', cwd=tmp_path)
    try:
        port = address.rstrip('/').rpartition(':')[2]
        text = urlopen(f'http://127.0.0.1:{port}/config').read().decode()
        assert OURS in text and 'senetv2_resnet50' not in text
    finally:
        code, error = stop(server)
    assert code == 130 and re.match(r'warning: others than you can reach this page \(0\.0\.0\.0\)', error)


def test_link_to_share_that_cannot_be_opened_costs_one_line(tmp_path):
    """Without the internet: Gradio's tunnel is behind a proxy that is not there."""
    nowhere = dict(HTTPS_PROXY='http://127.0.0.1:9', HF_HOME=str(tmp_path), HF_HUB_OFFLINE='1')
    done = subprocess.run(
        [sys.executable, '-m', 'timm_senetv2', 'demo', '--port', '0', '--share', '--models', OURS],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | nowhere,
    )
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1), done.stderr
    assert 'no link could be opened to share the page (Gradio: Could not create share link. ' in done.stderr


def test_sigterm_leaves_nothing_behind(tmp_path):
    server, _ = start('--models', OURS, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert list(tmp_path.glob('timm-senetv2-demo-*'))
    server.terminate()
    error = server.communicate(timeout=PATIENCE)[1]
    assert server.returncode == 128 + signal.SIGTERM and 'Traceback' not in error
    assert not list(tmp_path.iterdir())
