"""Models to the Hugging Face Hub: a checkpoint that fits, its files, its model card, one commit, and the proof.

    model = build('cifar_senetv2_resnet20', checkpoint='model_best.pth.tar')
    facts = load_facts('facts.yaml')
    write_files(model, 'out', render_card(model, 'me/x', facts), facts)
    push('out', 'me/x', model)

What a user or a machine did wrong is a `timm_senetv2.errors.UserError`. No text of this package holds the token. Needs
the extra `hub`: pip install 'timm-senetv2[hub]'.
"""

from .card import facts_of, render_card
from .facts import Facts, load_facts, with_license
from .files import FILES, write_files
from .upload import Pushed, check_target, load_line, push
from .weights import build

__all__ = [
    'FILES',
    'Facts',
    'Pushed',
    'build',
    'check_target',
    'facts_of',
    'load_facts',
    'load_line',
    'push',
    'render_card',
    'with_license',
    'write_files',
]
