import pytest

from unigen_fast.bench.cases import family


@pytest.mark.parametrize("row", family("adversarial"), ids=lambda row: row.name)
def test_adversarial(row, time_row):
    time_row(row)
