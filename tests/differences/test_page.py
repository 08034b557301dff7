"""docs/differences.md and the tests know the same rows."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "differences.md"


def test_every_row_has_a_test_and_the_reverse():
    rows = re.findall(r"^\| ([DVX]\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    code = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    names = re.findall(r"^def test_([dvx]\d+)_", code, re.MULTILINE)
    assert {row.lower() for row in rows} == set(names)
    assert len(rows) > 30


def test_the_rows_of_behaviour_are_there():
    """The V rows 1 to 12, and the D rows from 9 on but the one on documentation; rows before are facilities of their own."""
    rows = set(re.findall(r"^\| ([DV]\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {f"V{number}" for number in range(1, 13)} <= rows
    assert {f"D{number}" for number in range(9, 38)} - rows == {"D36"}


def test_tables_are_whole():
    """Every line of a table has its five cells, a bar inside code apart."""
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in table} == {6}
