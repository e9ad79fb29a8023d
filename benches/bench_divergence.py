import pytest

from unigen_fast.bench.cases import family


@pytest.mark.parametrize("row", family("divergence"), ids=lambda row: row.name)
def test_divergence(row, time_row):
    time_row(row)
