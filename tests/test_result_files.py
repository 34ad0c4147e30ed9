"""Properties of the results files and of command lines, whatever is in them: a right result or one plain line."""

import csv
import io
import shutil
from pathlib import Path

import pytest
import reproduce
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from experiments.files import CURVES, RESULTS, check_table, read_results, read_rows, write_csv, write_rows
from experiments.settings import (
    Settings,
    make_settings,
    parse_specs,
    run_id,
    settings_as_text,
    settings_from_text,
)
from experiments.statistics import difference
from experiments.tables import caption, table
from experiments.warm_start import build
from timm_senetv2.errors import UserError

COMMITTED = Path(__file__).parents[1] / 'results' / 'runs' / 'digits_small_cnn'
few = bounds(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
any_text = st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\0'), max_size=20)
words = st.text('abc_=:@|,[]()0123456789.-+ \'"\\{}', max_size=30)


def one_line(error: UserError) -> bool:
    return '\n' not in str(error) and str(error) != ''


@few
@given(st.lists(st.fixed_dictionaries({column: any_text for column in RESULTS}), max_size=4))
def test_rows_come_back_as_they_were_written_or_are_refused(tmp_path, rows):
    path = tmp_path / 'results.csv'
    write_rows(path, RESULTS, rows)
    try:
        assert read_rows(path, RESULTS) == rows
    except UserError as e:
        assert one_line(e)


@few
@given(st.data())
def test_a_committed_file_with_any_cell_changed_is_read_the_same_or_refused(tmp_path, data):
    name, columns = data.draw(st.sampled_from([('results.csv', RESULTS), ('curves.csv', CURVES)]))
    for file in ('results.csv', 'curves.csv'):
        shutil.copy(COMMITTED / file, tmp_path)
    rows = read_rows(COMMITTED / name, columns)
    row = data.draw(st.integers(0, len(rows) - 1))
    column = data.draw(st.sampled_from([c for c in columns if rows[row][c]]))
    value = data.draw(st.one_of(any_text, st.integers().map(str), st.floats().map(str), st.just(rows[row][column])))
    changed = [{**r, column: value} if i == row else r for i, r in enumerate(rows)]
    write_rows(tmp_path / name, columns, changed)
    try:
        results, _ = read_results(tmp_path)
    except UserError as e:
        assert one_line(e)
        return
    # what was read can be used: no cell that the tables and plots need is off
    committed = read_rows(COMMITTED / 'results.csv', RESULTS)
    assert [(r['run'], r['model'], r['seed'], float(r['accuracy'])) for r in results] == [
        (r['run'], r['model'], r['seed'], float(r['accuracy'])) for r in committed
    ]
    assert table(results, 'small_cnn') and caption(results, 'small_cnn')


@few
@given(st.binary(max_size=300), st.integers(0, 4000))
def test_bytes_in_a_committed_file_are_one_line_or_do_no_harm(tmp_path, noise, place):
    content = (COMMITTED / 'results.csv').read_bytes()
    shutil.copy(COMMITTED / 'curves.csv', tmp_path)
    (tmp_path / 'results.csv').write_bytes(content[:place] + noise + content[place + len(noise) :])
    try:
        results, curves = read_results(tmp_path)
    except UserError as e:
        assert one_line(e)
    else:
        assert {r['run'] for r in results} <= {r['run'] for r in curves}


@few
@given(words)
def test_a_word_for_models_is_models_or_one_line(word):
    try:
        specs = parse_specs(f'small_cnn{word}')
    except UserError as e:
        assert one_line(e)
    else:
        for spec in specs:
            if '|' not in str(spec):
                assert [str(s) for s in parse_specs(str(spec))] == [str(spec)]


numbers = st.one_of(st.integers(), st.floats(), st.just('x')).map(str)
options = st.lists(
    st.one_of(
        *(
            st.tuples(st.just(option), numbers)
            for option in ('--limit', '--image-size', '--epochs', '--batch-size', '--lr', '--weight-decay', '--workers')
        ),
        *(
            st.tuples(st.just(option), numbers)
            for option in ('--label-smoothing', '--crop-padding', '--ema-decay', '--per-class', '--seeds')
        ),
        st.tuples(st.just('--opt'), st.sampled_from(['sgd', 'adam', 'lamb', 'x', ''])),
        st.tuples(st.just('--protocol'), st.sampled_from(['modern', 'seanet', 'senetv2', 'x'])),
        st.tuples(st.just('--dataset'), any_text.filter(lambda text: not text.startswith('-'))),
    ),
    max_size=4,
)


@few
@given(options)
def test_a_command_line_gives_settings_that_a_file_brings_back_or_one_line(given_options):
    arguments = ['--models', 'small_cnn', '--dataset', 'digits', '--out', 'x', '--device', 'cpu']
    try:
        args = reproduce.parse_args([*arguments, *(part for option in given_options for part in option)])
        settings = make_settings(vars(args))
    except SystemExit as e:  # argparse's own line
        assert e.code == 2
    except UserError as e:
        assert one_line(e)
    else:
        row = settings_as_text(settings)
        stream = io.StringIO()
        csv.DictWriter(stream, list(row)).writerow(row)
        (back,) = csv.DictReader(io.StringIO(stream.getvalue(), newline=''), list(row))
        assert settings_from_text(back) == settings
        assert run_id('small_cnn', 0, settings_from_text(back)) == run_id('small_cnn', 0, settings)


@few
@given(
    st.dictionaries(st.sampled_from('0123456'), st.floats(0, 100), min_size=1),
    st.dictionaries(st.sampled_from('0123456'), st.floats(0, 100), min_size=1),
)
def test_a_difference_is_antisymmetric_and_inside_its_interval(a, b):
    one, other = difference(a, b), difference(b, a)
    assert one.mean == pytest.approx(-other.mean, abs=1e-9) and one.paired == other.paired
    if one.low == one.low:
        assert one.low - 1e-9 <= one.mean <= one.high + 1e-9
        assert one.low == pytest.approx(-other.high, abs=1e-6)


def test_every_committed_run_has_the_name_and_the_parameters_of_its_model_seed_and_settings():
    count, built = 0, {}
    for path in COMMITTED.parent.glob('*/results.csv'):
        if path.parent.name == 'quickstart':
            continue
        for row in read_rows(path, RESULTS):
            (spec,) = parse_specs(row['model'])
            chosen = settings_from_text(row)
            assert isinstance(chosen, Settings)
            assert run_id(str(spec), int(row['seed']), chosen) == row['run']
            if spec not in built:
                model = build(spec, 10, shapes_only=True)
                built[spec] = sum(p.numel() for p in model.parameters())
            assert built[spec] == int(row['parameters'])
            count += 1
    assert count >= 200


@pytest.mark.parametrize('mine', ['name,score\nme,1\n', '', 'a thesis\n', '\0\xff'])
def test_table_of_others_is_not_replaced(tmp_path, mine):
    (tmp_path / 'mine.csv').write_text(mine, encoding='latin-1')
    with pytest.raises(UserError, match='mine.csv is not a table of this command; name a new file'):
        check_table(tmp_path / 'mine.csv', ('family', 'models'))
    check_table(tmp_path / 'new.csv', ('family', 'models'))
    write_csv(tmp_path / 'new.csv', ('family', 'models'), [dict(family='a', models=1)])
    check_table(tmp_path / 'new.csv', ('family', 'models'))


def test_option_of_a_start_without_options_is_one_line():
    with pytest.raises(UserError, match="@keep takes no options, got 'lr'"):
        parse_specs('cifar_resnet20@keep:lr=1')
