import pytest

from unigen_fast.bench.cases import family


@pytest.mark.parametrize("row", family("likelihood"), ids=lambda row: row.name)
def test_likelihood(row, time_row):
    time_row(row)
