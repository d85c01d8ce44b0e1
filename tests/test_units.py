"""Sizes, durations and tables as text."""

import pytest

from minimind.errors import UserError
from minimind.units import format_bytes, format_hours, format_table, parse_size


def test_sizes_of_files_and_of_memory():
    files = {"500MB": 500 * 10**6, "2 gb": 2 * 10**9, "5G": 5 * 10**9, "1000": 1000, "1.5KB": 1500, "2GiB": 2**31}
    assert {text: parse_size(text, "x") for text in files} == files
    memory = {"80GiB": 80 * 2**30, "80 gb": 80 * 2**30, "1.5G": 3 * 2**29, "512MiB": 2**29}
    assert {text: parse_size(text, "x", memory=True) for text in memory} == memory


@pytest.mark.parametrize(("text", "memory"), [("many", False), ("0", False), ("-1GB", False), ("80", True)])
def test_what_is_not_a_size_is_named(text, memory):
    with pytest.raises(UserError, match=f"^flag: '{text}' is not a size; write one such as "):
        parse_size(text, "flag", memory=memory)


def test_figures_for_people():
    assert [format_bytes(count) for count in (0, 1023, 1536, 2**50)] == ["0 B", "1023 B", "1.5 KiB", "1024.0 TiB"]
    hours = {0.001: "less than a minute", 0.5: "30 minutes", 7.25: "7.2 hours", 100: "4.2 days"}
    assert {count: format_hours(count) for count in hours} == hours


def test_a_table_has_columns_and_a_short_row_runs_over_them():
    rows = [["name", "count", "note"], ["a", "1,000", ""], ["longer", "7", "x"], ["b", "damaged: a file is missing"]]
    assert format_table(rows, "<>").splitlines() == [
        "name    count  note",
        "a       1,000",
        "longer      7     x",
        "b       damaged: a file is missing",
    ]
    assert format_table(rows[:1] + rows[2:3]).splitlines() == ["name    count  note", "longer  7      x"]
