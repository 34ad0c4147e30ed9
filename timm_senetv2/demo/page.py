"""The page itself, with Gradio."""

import contextlib
import errno
import io
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line, printable, why
from . import html
from .answer import Demo
from .choices import Choices
from .images import MOST_BYTES, examples
from .settings import Settings

_TITLE = 'Channel attention on your image'
_NONE = 'no second model'
_MANY = 20  # visitors that wait for an answer
_CSS = """
.gradio-container { max-width: 72rem !important; margin: 0 auto !important; }
.sae-examples { display: flex; flex-wrap: wrap; gap: .4rem; }
.sae-examples button { min-width: 0; flex: 0 1 auto; min-height: 2.75rem; }
.sae-examples button img { image-rendering: pixelated; }
.sae-image img { width: 100%; height: 100%; object-fit: contain; }
:is(button, input, summary, a):focus-visible { outline: 3px solid #4263eb !important; outline-offset: 2px; }
"""


def serve(settings: Settings) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Uploads lie in a folder of their own, which goes when the server ends. Nothing is sent anywhere, except that models
    are downloaded from the Hub, and that `share` is a tunnel through Gradio's servers.

    Raises:
        UserError: A model that is not there, a host or port that cannot be used, or no link to share.
    """
    choices = Choices(settings.models, settings.allow_hub, settings.public)
    port = _free_port(settings.host, settings.port)
    with tempfile.TemporaryDirectory(prefix='timm-senetv2-demo-', ignore_cleanup_errors=True) as folder:
        with _environment(folder):
            _end_by_sigterm()
            _serve(settings, choices, port)


def _end_by_sigterm() -> None:
    """Have SIGTERM, what service managers send, end the process as an exit does: with the uploads deleted."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _serve(settings: Settings, choices: Choices, port: int) -> None:
    blocks, look = build(choices, settings)
    said = io.StringIO()  # Gradio prints why there is no link, in many lines
    try:
        with contextlib.redirect_stdout(said):
            _, local, shared = blocks.queue(max_size=_MANY).launch(
                server_name=settings.host,
                server_port=port,
                share=settings.share,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=MOST_BYTES,
                allowed_paths=[str(example.path) for example in examples()],
                ssr_mode=False,
                enable_monitoring=False,
                pwa=False,
                mcp_server=False,
                footer_links=[],
                **look,
            )
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f'cannot serve on {settings.host}, port {port}: {one_line(e)}') from None
    try:
        if settings.share and not shared:
            reason = next(
                (line.strip(' .') for line in said.getvalue().splitlines() if line.strip()), 'no reason given'
            )
            raise UserError(
                f'no link could be opened to share the page (Gradio: {reason}); see whether this machine reaches the '
                'internet, or leave --share out'
            )
        print(f'the page is at {local}', flush=True)
        if shared:
            print(f'and for everybody who has the link at {shared}', flush=True)
        if settings.public:
            print(
                f'warning: others than you can reach this page ({"by the link" if shared else settings.host}); '
                f'they can use {_counted(choices)}',
                file=sys.stderr,
                flush=True,
            )
        print('Ctrl-C ends it', flush=True)
        threading.Event().wait()
    finally:
        with contextlib.redirect_stdout(None):  # Gradio says that it closes
            blocks.close(verbose=False)


def _counted(choices: Choices) -> str:
    listed = len(choices.labels)
    text = f'{listed} model{"s" if listed > 1 else ""}'
    return f'{text}, and any model of this package on the Hub' if choices.allow_hub else text


def build(choices: Choices, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The page, and what its `launch` takes for the looks."""
    import gradio as gr

    demo = Demo(choices, settings.timeout, settings.public)
    labels = choices.labels

    def answer(image: Any, first: Any, second: Any) -> Any:
        path, is_upload = _path_of(image)
        text, is_read = demo.answer(path, first, None if second == _NONE else second)
        # what cannot be read is taken away: a browser may not be able to show it either
        return text, gr.skip() if is_read or not is_upload else None

    def answer_if_given(image: Any, first: Any, second: Any) -> Any:
        return answer(image, first, second) if image else (gr.skip(), gr.skip())

    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(300, 600)) as blocks:
        gr.Markdown(f'# {_TITLE}\n\nChoose a model, give an image, and see what the network makes of it.')
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                hub = ', or type hf-hub:OWNER/NAME' if choices.allow_hub else ''
                first = gr.Dropdown(
                    labels, value=labels[0], label=f'Model{hub}', allow_custom_value=choices.allow_hub, filterable=True
                )
                second = gr.Dropdown(
                    [_NONE, *labels],
                    value=_NONE,
                    label='Compare with',
                    allow_custom_value=choices.allow_hub,
                    filterable=True,
                )
                image = gr.Image(
                    label=f'Image (at most {MOST_BYTES // 2**20} MB)',
                    sources=['upload', 'clipboard'],
                    type='filepath',
                    image_mode=None,
                    height=280,
                    buttons=[],
                    alt_text='The image that you gave',
                    elem_classes='sae-image',
                )
                button = gr.Button('Classify', variant='primary')
                gr.Markdown('## Examples\n\nThe first test image of each class of Fashion-MNIST.')
                with gr.Row(elem_classes='sae-examples'):
                    taken = [
                        (gr.Button(example.label, icon=str(example.path), size='sm', min_width=0), example)
                        for example in examples()
                    ]
            with gr.Column(scale=2, min_width=280):
                gr.Markdown('## Answer')
                result = gr.HTML('<p>Nothing yet: give an image, or take an example.</p>', elem_id='answer')

        # Without Gradio's own reading of files and choices, which answers strangers' mistakes with "Error"
        words: dict[str, Any] = dict(preprocess=False, api_visibility='private', concurrency_limit=4)
        inputs, outputs = [image, first, second], [result, image]
        button.click(answer, inputs, outputs, concurrency_id='answer', scroll_to_output=True, **words)
        gr.on(
            [image.upload, first.input, second.input],
            answer_if_given,
            inputs,
            outputs,
            concurrency_id='answer',
            trigger_mode='always_last',
            **words,
        )
        for taken_button, example in taken:

            def answer_example(first: Any, second: Any, path: str = str(example.path)) -> Any:
                return demo.answer(path, first, None if second == _NONE else second)[0], path

            taken_button.click(
                answer_example, [first, second], outputs, concurrency_id='answer', scroll_to_output=True, **words
            )

    theme = gr.themes.Base(
        primary_hue='indigo',
        font=['system-ui', 'sans-serif'],
        font_mono=['ui-monospace', 'monospace'],
    ).set(
        button_primary_background_fill='*primary_600',  # white text on the default shade has a contrast below 4.5
        button_primary_background_fill_hover='*primary_700',
    )
    return blocks, dict(theme=theme, css=_CSS + html.CSS)


def _path_of(image: Any) -> tuple[str | None, bool]:
    """The path of an image that a visitor uploaded, and whether there is one.

    A visitor's program can send any path in the place of an upload's, so only files among the uploads count.
    """
    path = image.get('path') if isinstance(image, dict) else None
    if not isinstance(path, str):
        return None, False
    folder = Path(os.environ['GRADIO_TEMP_DIR']).resolve()
    try:
        inside = Path(path).resolve().is_relative_to(folder)
    except (OSError, ValueError, RuntimeError):
        inside = False
    return (path, True) if inside else (None, False)


def _free_port(host: str, port: int) -> int:
    """The port, or any free one for 0.

    Raises:
        UserError: It is taken, or nothing can listen on this host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == 'posix':  # as servers do: a port whose last connections are still closing is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise UserError(f'--host {printable(host)}: there is no such address') from None
    except (OSError, OverflowError, UnicodeError) as e:
        if isinstance(e, OSError) and e.errno == errno.EADDRINUSE:
            raise UserError(f'port {port} is in use; choose another with --port, or 0 for any that is free') from None
        raise UserError(f'cannot listen on {printable(host)}, port {port}: {why(e)}') from None


@contextlib.contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Gradio's settings for this server that it takes from the environment."""
    here = [
        host for host in (os.environ.get('NO_PROXY') or os.environ.get('no_proxy'), '127.0.0.1', 'localhost') if host
    ]
    wanted = dict(
        GRADIO_ANALYTICS_ENABLED='False',
        GRADIO_TEMP_DIR=str(Path(folder).resolve()),
        NO_PROXY=','.join(here),  # Gradio asks its own server whether it is up
        no_proxy=','.join(here),
    )
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
