"""The card of every released model.tag says what its facts, timm's registry and the results tables say."""

import csv
import functools
import re
from pathlib import Path

import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from timm.models import get_pretrained_cfg, model_entrypoint

from timm_senetv2.commands import main

ROOT = Path(__file__).parents[1]
FACTS = ROOT / 'timm_senetv2' / 'hub' / 'cards'
SOURCES = ROOT / 'timm_senetv2' / 'weights'
RELEASED = sorted(
    name for name in timm.list_pretrained() if model_entrypoint(name).__module__.startswith('timm_senetv2.')
)


@pytest.fixture(scope='module')
def cards(tmp_path_factory):
    """Every card, rendered by the command."""
    folder = tmp_path_factory.mktemp('cards') / 'new'
    with pytest.raises(SystemExit) as done:
        main(['cards', str(folder), '--owner', 'somebody'])
    assert not done.value.code
    return {path.stem: ModelCard.load(path) for path in folder.glob('*.md')}


@functools.cache
def parameters(model: str) -> int:
    return sum(p.numel() for p in timm.create_model(model, device='meta').parameters())


def test_every_released_tag_has_a_card_and_no_other_has(cards):
    assert sorted(cards) == RELEASED
    own = {path.stem for path in FACTS.glob('*.yaml')}
    assert own == {name for name in RELEASED if '.se_' not in name and '.plain_' not in name}


@pytest.mark.parametrize('name', RELEASED)
def test_card_agrees_with_registry_and_facts(cards, name):
    data, text = cards[name].data, cards[name].text
    cfg = get_pretrained_cfg(name)
    trained_on = ['imagenet-1k', *(['timm/imagenet-12k-wds'] if 'in12k' in name else [])]
    file = FACTS / f'{name}.yaml'
    facts = yaml.safe_load(file.read_text()) if file.exists() else dict(datasets=trained_on)

    assert data.library_name == 'timm' and data.pipeline_tag == 'image-classification'
    assert data.license == facts.get('license', cfg.license)
    assert data.datasets == facts['datasets']
    assert data.base_model == cfg.hf_hub_id
    assert f"timm.create_model('hf-hub:somebody/{name}', pretrained=True)" in text
    assert f'| Parameters | {parameters(name.partition(".")[0]):,} |' in text
    assert f'| Classes | {cfg.num_classes} |' in text
    assert f'| Input | {" × ".join(map(str, cfg.input_size))}, crop {cfg.crop_pct}, {cfg.interpolation} |' in text
    assert ('| Input for the best accuracy |' in text) == (cfg.test_input_size not in (None, cfg.input_size))
    assert float(re.search(r'\| Multiply-adds, \d+ px \| ([\d.]+) G', text)[1]) > 0
    assert facts.get('limits', '') in text and facts.get('summary', '') in text
    assert not re.search(r'{{|}}|{%|\bNone\b|\bnan\b|/work|/home', str(cards[name]))


@pytest.mark.parametrize('name', [name for name in RELEASED if '.se_' in name or '.plain_' in name])
def test_card_of_lifted_weights_quotes_the_sources_figures_and_says_whose_they_are(cards, name):
    table = 'plain_sources.csv' if '.plain_' in name else 'lift_sources.csv'
    with (SOURCES / table).open(newline='') as f:
        rows = [row for row in csv.DictReader(f) if row['source_on_the_hub'] == get_pretrained_cfg(name).hf_hub_id]
    quoted = {(result.metric_name, result.metric_value) for result in cards[name].data.eval_results}
    assert quoted == {
        (f'{metric} accuracy, {row["img_size"]} px', float(row[column]))
        for row in rows
        for metric, column in (('Top-1', 'top1'), ('Top-5', 'top5'))
    }
    source = cards[name].data.base_model
    assert all(
        source in result.source_name and result.source_url.endswith(source) for result in cards[name].data.eval_results
    )
    text = ' '.join(cards[name].text.split())
    assert f"figures of {source}, quoted from timm's results table" in text and 'not measured again' in text
    assert f'From `timm_senetv2/weights/{table}` of timm-senetv2.' in text
    idle = 'The attention of this model has not been trained yet.', 'untrained and do nothing until'
    assert [part in text for part in idle] == ['.plain_' in name, '.se_' in name]
    assert all(row.get('license', cards[name].data.license) == cards[name].data.license for row in rows)


@pytest.mark.parametrize('name', [name for name in RELEASED if name.endswith('.fmnist')])
def test_card_of_shipped_weights_quotes_the_run_they_come_from(cards, name):
    def rows(path):
        with (ROOT / 'results' / path).open(newline='') as f:
            return list(csv.DictReader(f))

    (origin,) = [row['run'] for row in rows('fmnist_weights.csv') if row['tag'] == name]
    (run,) = [row for row in rows('runs/fmnist/results.csv') if row['run'] == origin]
    (result,) = cards[name].data.eval_results
    assert result.metric_value == float(run['accuracy']) and result.source_url is None
    assert f'| Top-1 accuracy after the last epoch | {float(run["accuracy"])} |' in cards[name].text
    assert 'From `results/runs/fmnist/results.csv` of timm-senetv2.' in cards[name].text
    assert run['command'] in cards[name].text
    told = yaml.safe_load((FACTS / f'{name}.yaml').read_text())['training']['hyperparameters']
    assert len(told) == 12 and {column: run[column] for column in told} == {c: str(v) for c, v in told.items()}
    assert all(f'| {column} | {run[column]} |' in cards[name].text for column in told)


# GMACs and activations (M) of timm's published benchmark tables for the sources, which SaE changes by next to nothing
@pytest.mark.parametrize(
    'name, gmacs, activations',
    [
        ('senetv2_resnet50.se_ra2_in1k', 4.11, 11.13),
        ('senextv2_50.se_racm_in1k', 4.26, 14.42),
        ('senextv2_26d_32x4d.se_bt_in1k', 2.73, 10.19),
        ('senetv2_resnet152d.se_ra2_in1k', 15.42, 30.56),
    ],
)
def test_cost_on_the_card_is_that_of_timms_tables(cards, name, gmacs, activations):
    text = cards[name].text
    assert float(re.search(r'Multiply-adds, \d+ px \| ([\d.]+) G', text)[1]) == pytest.approx(gmacs, rel=0.015)
    assert float(re.search(r'Activations, \d+ px \| ([\d.]+) M', text)[1]) == pytest.approx(activations, rel=0.015)
