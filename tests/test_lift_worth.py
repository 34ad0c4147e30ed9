"""The pictures of what attention added later is worth, against the rows they are drawn from."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import lift_worth
from experiments.plots import plot_differences
from experiments.statistics import Difference

RUNS = Path(__file__).parents[1] / 'results' / 'runs'


@pytest.mark.parametrize(
    'word, label',
    [
        ('cifar_resnet20@continue', 'continue plain'),
        ('cifar_resnet20@keep', 'plain, not trained further'),
        ('cifar_resnet20@add_attention:reduction=16,train_only=attention,lr=0.1', 'add attention, train only it'),
        ('cifar_resnet20@add_attention:reduction=16,lr=0.002', 'add attention, lr 0.002'),
        ('cifar_senetv2_resnet20@scratch:lr=0.1', 'SaE from scratch'),
        ('cifar_senetv2_resnet20', 'SaE from scratch'),
        ('cifar_seresnet20:sae_reduction=4@lift', 'lift into SE as wide as SaE'),
        ('cifar_senetv2_resnet20@lift:fresh_init=copy,fresh_lr=10', 'lift into SaE, fresh_init copy, fresh_lr 10'),
    ],
)
def test_a_model_is_called_by_what_was_done_to_it(word, label):
    assert lift_worth.label(word) == label


def test_differences_are_those_of_the_rows():
    panels = lift_worth.panels('lift')
    with (RUNS / 'lift_digits' / 'results.csv').open(newline='') as file:
        accuracy = {(row['model'], row['seed']): float(row['accuracy']) for row in csv.DictReader(file)}
    gaps = [
        accuracy['cifar_senetv2_resnet20@lift', str(seed)] - accuracy['cifar_seresnet20@continue', str(seed)]
        for seed in range(5)
    ]
    interval = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    drawn = panels['digits, 20 a class']['lift into SaE']
    assert (drawn.mean, drawn.low, drawn.high) == pytest.approx((np.mean(gaps), interval.low, interval.high))


def test_every_question_has_a_picture(tmp_path):
    (tmp_path / 'runs').symlink_to(RUNS)
    lift_worth.draw(tmp_path)
    pictures = {path.name for path in tmp_path.glob('*.png')}
    assert pictures == {f'lift_worth_{question}.png' for question in lift_worth.BASELINES}


def test_far_differences_and_single_seeds_are_drawn():
    rows = {'far': Difference(-30.0, -31.0, -29.0), 'one seed': Difference(0.5), 'near': Difference(0.1, -0.2, 0.4)}
    assert plot_differences({'a': rows}, 'title').startswith(b'\x89PNG')
