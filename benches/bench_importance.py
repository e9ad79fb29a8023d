import pytest

from unigen_fast.bench.cases import family


@pytest.mark.parametrize("row", family("importance"), ids=lambda row: row.name)
def test_importance(row, time_row):
    time_row(row)
