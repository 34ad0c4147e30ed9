"""A share of what tests/check_reliability.py tries, and the counts that it committed."""

import sys

import check_reliability
import pytest
from reliability import tally
from reliability.kills import COMMANDS

from timm_senetv2.errors import UserError

LEAST = dict(kills=100, hub_faults=80, images=10_000, hostile_files=2_000, shared_cache=8)


@pytest.mark.parametrize('kind', check_reliability.KINDS)
def test_a_share_of_every_misfortune_ends_well(kind, tmp_path, capsys):
    code = check_reliability.main(['--quick', '--kinds', kind, '--out', str(tmp_path / 'x.csv')])
    assert code == 0, capsys.readouterr().out
    rows = tally.read(tmp_path / 'x.csv')
    assert rows and {row['kind'] for row in rows} == {kind} and not any(int(row['failed']) for row in rows)


def test_committed_report_has_enough_of_every_kind():
    rows = tally.read(check_reliability.ROOT / 'results' / 'reliability.csv')
    for kind, least in LEAST.items():
        own = [row for row in rows if row['kind'] == kind]
        assert sum(int(row['tried']) for row in own) >= least
        assert all(int(row['tried']) == sum(int(row[c]) for c in ('right', 'one_line', 'failed')) for row in own)
        assert not any(int(row['failed']) for row in own)
    assert {row['case'].rpartition(', ')[0] for row in rows if row['kind'] == 'kills'} >= {c.name for c in COMMANDS}


def refuse(says):
    raise UserError(says)


@pytest.mark.parametrize(
    'action, outcome',
    [
        (lambda: None, 'right'),
        (lambda: 'wrong weights', 'failed'),
        (lambda: refuse('no such file'), 'one_line'),
        (lambda: open('/nowhere/x'), 'one_line'),
        (lambda: 1 // 0, 'failed'),
        (lambda: print('more', file=sys.stderr) or refuse('two lines'), 'failed'),
    ],
)
def test_only_right_results_and_single_lines_count_as_good(action, outcome):
    assert tally.outcome_of(action)[0] == outcome


def test_rows_of_other_kinds_stay(tmp_path):
    for kind, case in (('a', 'x'), ('b', 'y'), ('a', 'z')):
        found = tally.Tally(kind)
        found.add(case, 'right', 0.0)
        tally.write(tmp_path / 'x.csv', [found], 'command')
    assert [(row['kind'], row['case']) for row in tally.read(tmp_path / 'x.csv')] == [('a', 'z'), ('b', 'y')]
