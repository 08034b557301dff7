"""Several prompts of one video in one text: "a dog sits [80:] the dog gets up"."""

from __future__ import annotations

import re

__all__ = ["read_story"]

_MARK = re.compile(r"(?<!\\)\[\s*(\d+)\s*:\s*\]")
_ESCAPED = re.compile(r"\\(\[\s*\d+\s*:\s*\])")


def read_story(text: str) -> str | dict[int, str]:
    r"""The prompts by the frame from which on they hold, where `[FRAME:]` stands between them; a text without such marks as it is.

    A backslash before it makes a mark part of the text.

    >>> read_story("a dog sits [80:] the dog gets up")
    {0: 'a dog sits', 80: 'the dog gets up'}
    >>> read_story(r"a sign that says \[80:]")
    'a sign that says [80:]'

    Raises:
        ValueError: for marks that do not rise, and for nothing to show from a mark on.
    """
    first, *rest = _MARK.split(text)
    if not rest:
        return _ESCAPED.sub(r"\1", text)
    parts = list(zip([0, *map(int, rest[::2])], [first, *rest[1::2]], strict=True))
    if not first.strip() and parts[1][0] == 0:
        parts = parts[1:]  # "[0:] a dog sits [80:] ..."
    story: dict[int, str] = {}
    for start, prompt in parts:
        if story and start <= max(story):
            raise ValueError(
                f"the prompt names frame {start} after frame {max(story)}: write the parts in the order in which they are shown."
            )
        if not prompt.strip():
            raise ValueError(f"the prompt says nothing to show from frame {start} on: write a text there, or leave the mark out.")
        story[start] = _ESCAPED.sub(r"\1", prompt.strip())
    return story
