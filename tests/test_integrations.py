"""docs/integrations.md shows what the integration tests found; tests/test_docs.py holds it against the generator."""

from pathlib import Path

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


def test_unknown_kind_is_one_line():
    with pytest.raises(UserError, match="integrations.csv has no rows of kind 'consumers'"):
        integrations('consumers')
