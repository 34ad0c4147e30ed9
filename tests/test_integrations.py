"""docs/integrations.md shows what the integration tests found."""

import csv
from pathlib import Path

import pytest

from experiments.integrations import RESULTS, integrations
from timm_senetv2.errors import UserError

PAGE = Path(__file__).parents[1] / 'docs' / 'integrations.md'


@pytest.mark.parametrize('kind', ['converter', 'consumer'])
def test_page_holds_the_tables_of_the_results(kind):
    assert integrations(kind) in PAGE.read_text(encoding='utf-8')


def test_every_row_of_the_results_is_in_the_page():
    page = PAGE.read_text(encoding='utf-8')
    with RESULTS.open(newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            lines = [line for line in page.splitlines() if f'| `{row["call"]}` |' in line]
            assert any(row['result'].removeprefix('logits differ by ') in line for line in lines), row


def test_unknown_kind_is_one_line():
    with pytest.raises(UserError, match="integrations.csv has no rows of kind 'consumers'"):
        integrations('consumers')
