"""Pictures of what adding attention to a trained network, and lifting one, is worth: from the rows in results/runs.

`python scripts/lift_worth.py` is its command.
"""

from collections.abc import Mapping
from pathlib import Path

from .files import by_model, read_results, write_text
from .plots import plot_differences
from .settings import parse_specs
from .statistics import Difference, difference

RESULTS = Path(__file__).parents[1] / 'results'
SETTINGS = {
    'same': 'same 5,000 images',
    'same_shipped': '5,000 of the same 60,000 images, shipped weights',
    '100': 'Fashion-MNIST, 100 a class',
    '100_shipped': 'Fashion-MNIST, 100 a class, shipped weights',
    'digits': 'digits, 20 a class',
    'digits_shipped': 'digits, 20 a class, shipped weights',
}
BASELINES = {
    'attention': 'cifar_resnet20@continue',
    'lift': 'cifar_seresnet20@continue',
    'fresh': 'cifar_senetv2_resnet20@lift',
}


def label(word: str) -> str:
    """A model of the grid in words, without what all of its grid have in common."""
    (spec,) = parse_specs(word)
    own = dict(spec.start_options)
    kind = {'cifar_resnet20': 'plain', 'cifar_seresnet20': 'SE', 'cifar_senetv2_resnet20': 'SaE'}[spec.name]
    if spec.options:
        kind = 'SE as wide as SaE'
    words = {
        'scratch': f'{kind} from scratch',
        'keep': f'{kind}, not trained further',
        'continue': f'continue {kind}',
        'lift': f'lift into {kind}',
        'add_attention': 'add attention' + (', train only it' if 'train_only' in own else ''),
    }[spec.start]
    more = [f'{key} {own[key]}' for key in ('fresh_init', 'fresh_lr', 'attention_lr') if key in own]
    if 'lr' in own and spec.start != 'scratch' and 'train_only' not in own:
        more.append(f'lr {own["lr"]}')
    return ', '.join([words, *more])


def differences(folder: Path, baseline: str) -> dict[str, Difference]:
    """Each other model's difference to the baseline, by its label."""
    models = {
        model: {row['seed']: float(row['accuracy']) for row in rows}
        for model, rows in by_model(read_results(folder)[0]).items()
    }
    if baseline not in models:
        return {}
    return {label(m): difference(values, models[baseline]) for m, values in models.items() if m != baseline}


def panels(question: str, results: Path = RESULTS) -> dict[str, Mapping[str, Difference]]:
    """The differences of a question, by the setting's title, of the settings that have runs."""
    found = {
        title: differences(results / 'runs' / f'{question}_{name}', BASELINES[question])
        for name, title in SETTINGS.items()
    }
    return {title: rows for title, rows in found.items() if rows}


def draw(results: Path = RESULTS) -> list[Path]:
    """Draw lift_worth_QUESTION.png in this folder for each question that has runs in it. The files written."""
    written = []
    for question, baseline in BASELINES.items():
        if found := panels(question, results):
            picture = plot_differences(found, f'points of accuracy, less those of "{label(baseline)}"')
            path = results / f'lift_worth_{question}.png'
            write_text(path, picture)
            written.append(path)
    return written
