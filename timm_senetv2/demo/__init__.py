"""A page in the browser: choose a model, give an image, see classes, gates and where in the image the class is seen.

    serve(Settings(models=['cifar_senetv2_resnet20']))     until Ctrl-C
    write_space('space', Settings(models=['hf-hub:me/mine']))     a Hugging Face Space

Strangers may use such a page, so a visitor's words and files are checked before anything is done with them: models are
those that the operator listed, images are refused by their header where they are too large. Needs the extra `demo`:
pip install 'timm-senetv2[demo]'.
"""

from .settings import Settings

__all__ = ['Settings', 'serve', 'write_space']


def serve(settings: Settings) -> None:
    """Serve the page until Ctrl-C; see `timm_senetv2.demo.page.serve`."""
    from .page import serve  # gradio takes seconds to import

    serve(settings)


def write_space(out: str, settings: Settings, package: str | None = None) -> None:
    """Write a Hugging Face Space; see `timm_senetv2.demo.space.write_space`."""
    from .space import write_space

    write_space(out, settings, package)
