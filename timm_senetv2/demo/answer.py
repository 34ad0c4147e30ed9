"""What the page's button does, without the page: words and a file in, HTML out, and never an exception."""

import sys
import time
import traceback

from PIL import Image

from ..errors import UserError
from . import html
from .choices import Choices, Loaded
from .images import read_image

_SERVER = 'Something went wrong on this server. Whoever runs it finds the reason in its terminal.'


class Demo:
    """The models on offer, and answers about images.

    Args:
        choices: What may be chosen.
        timeout: Seconds that a visitor waits at most, for a download say.
        public: Strangers can reach the page: it then tells no more of a failure than that there was one.
    """

    def __init__(self, choices: Choices, timeout: float = 60.0, public: bool = False) -> None:
        self.choices = choices
        self._loaded = Loaded()
        self._timeout = timeout
        self._public = public

    def answer(self, path: str | None, first: object, second: object = None) -> tuple[str, bool]:
        """What one model, or two, say of an image.

        Args:
            path: Of the image; None where there is none yet.
            first: A model, in the visitor's word.
            second: Another to compare with, or nothing.

        Returns:
            HTML; and whether the image could be read.
        """
        if path is None:
            return html.page([html.refusal('Give an image: drop one, paste one, or take an example.')]), False
        try:
            image = read_image(path)
        except UserError as e:
            return html.page([html.refusal(str(e), 'This image cannot be used')]), False
        deadline = time.monotonic() + self._timeout
        wanted = [first] if second in (None, '') else [first, second]
        return html.page([self._section(image, word, deadline) for word in wanted]), True

    def _section(self, image: Image.Image, wanted: object, deadline: float) -> str:
        heading = 'This model cannot be used'
        try:
            choice = self.choices.find(wanted)
        except UserError as e:
            return html.refusal(str(e), heading)
        heading = f'{choice.label} cannot be used'
        try:
            classifier = self._loaded.get(choice, deadline - time.monotonic())
            found = classifier(image, deadline - time.monotonic())
        except UserError as e:
            if self._public and e.__cause__ is not None:  # words of a library: they may name paths
                print(f'{choice.name}: {e}', file=sys.stderr, flush=True)
                return html.refusal(_SERVER, heading)
            return html.refusal(str(e), heading)
        except Exception:
            traceback.print_exc()
            return html.refusal(_SERVER, heading)
        return html.answer(choice.label, found, classifier.note)
