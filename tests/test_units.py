"""Amounts of memory as text."""

import pytest

from diffusers_cogvideox.units import in_words, parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8gb", 8 * 10**9), (" 7.5 GB ", 75 * 10**8), ("8GiB", 2**33), ("8000MB", 8 * 10**9), ("512MiB", 2**29), (5, 5)],
)
def test_amounts(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("wrong", ["8", "GB", "8TB", "-8GB", "8 G B", "", "nanGB", "1e3GB", "0GB", 0, -1, float("inf"), float("nan")])
def test_what_is_no_amount(wrong):
    with pytest.raises(ValueError, match=r"vram.*such as 8GB|vram.*is not possible"):
        parse_memory(wrong, "vram")


def test_a_number_without_unit_gets_a_hint():
    with pytest.raises(ValueError, match="Did you mean 8GB"):
        parse_memory("8")


@pytest.mark.parametrize("wrong", [None, True, [8]])
def test_what_is_no_text_or_number(wrong):
    with pytest.raises(TypeError, match="not an amount of memory"):
        parse_memory(wrong)


@pytest.mark.parametrize("size", [10**6, 123_456_789, 999_600_000, 10**9, 8 * 10**9, 23_456_000_000, 10**12])
def test_words_can_be_read_back(size):
    assert parse_memory(in_words(size)) == pytest.approx(size, rel=0.005)
