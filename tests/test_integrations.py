"""docs/integrations.md and its results: every integration test has left its row, and no other row is there."""

from pathlib import Path

import consumers
import converters
import pytest

from experiments.files import read_csv
from experiments.integrations import RESULTS, integrations
from timm_senetv2.errors import UserError

PAGE = Path(__file__).parents[1] / 'docs' / 'integrations.md'


def test_every_row_of_the_results_is_in_the_page():
    page = PAGE.read_text(encoding='utf-8')
    for row in read_csv(RESULTS):
        lines = [line for line in page.splitlines() if f'| `{row["call"]}` |' in line]
        assert any(row['result'].removeprefix('logits differ by ') in line for line in lines), row


def test_rows_are_those_of_the_integration_tests():
    found = {(row['library'], row['call'], row['model'].split(',')[0]) for row in read_csv(RESULTS)}
    expected = {(one.library, one.call, one.model) for one in consumers.Consumer.every.values()}
    for one in converters.Converter.every.values():
        expected |= {(one.library, one.call, model) for model, _ in converters.MODELS.values()}
    assert expected <= found
    # of test_readers.py and test_upstream.py
    others = {call for _, call, _ in found - expected}
    assert all(call.startswith(('timm-senetv2 train', 'timm.models.save_for_hf')) for call in others), others
    assert len(others) == 4


def test_unknown_kind_is_one_line():
    with pytest.raises(UserError, match="integrations.csv has no rows of kind 'consumers'"):
        integrations('consumers')
