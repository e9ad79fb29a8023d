import pytest

from unigen_fast.bench.cases import family


@pytest.mark.parametrize("row", family("objectives"), ids=lambda row: row.name)
def test_objectives(row, time_row):
    time_row(row)
