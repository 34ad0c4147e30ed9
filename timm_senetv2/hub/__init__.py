"""Models to the Hugging Face Hub: a checkpoint that fits, its files, its model card, one commit, and the proof.

    model = build('cifar_senetv2_resnet20', checkpoint='model_best.pth.tar')
    facts = load_facts('facts.yaml')
    write_files(model, 'out', render_card(model, 'me/x', facts, count), facts)
    push('out', 'me/x', model)

What a user or a machine did wrong is a HubError whose text is one plain line. No text of this package holds the token.
"""

from .card import CARDS, Facts, facts_of, load_facts, render_card
from .errors import HubError
from .files import FILES, write_files
from .upload import Pushed, load_line, push
from .weights import build

__all__ = [
    'CARDS',
    'FILES',
    'Facts',
    'HubError',
    'Pushed',
    'build',
    'facts_of',
    'load_facts',
    'load_line',
    'push',
    'render_card',
    'write_files',
]
