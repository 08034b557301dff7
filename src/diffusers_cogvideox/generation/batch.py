"""What `generate` is asked for, item by item: one prompt, a text file of prompts, or a JSONL file whose lines are options."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..options import GenerateOptions, MistakesError
from .json_types import type_mistakes

__all__ = ["Item", "each", "read_items"]

WHOLE_RUN = frozenset(
    [
        *("model", "lora", "lora_alpha", "dtype", "device", "vram", "ram", "quantisation"),
        *("overwrite", "tiling", "checkpoint_every", "preview", "save_latents"),
    ]
)
"""Options that hold for all lines of a file: they say which model is loaded, and how the run goes."""

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """The options of one line, with its prompt in place of the file; `title` is "line 3", or "" for a prompt that is no file."""

    title: str
    options: GenerateOptions


def read_items(options: GenerateOptions) -> list[Item]:
    """One item for a prompt, one for each line of a .txt file of prompts, one for each line of a .jsonl file of options.

    A line of a .jsonl file is a JSON object: `prompt`, and any options but WHOLE_RUN under the names of their fields. What it leaves
    out, `options` say. Empty lines are skipped.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for an empty prompt or file, for a file that is not UTF-8 text, and for a file of another kind.
        MistakesError: for all lines that are wrong.
    """
    kind = Path(options.prompt).suffix
    if kind not in (".txt", ".jsonl"):
        _check_is_text(options.prompt)
        return [Item("", _with_prompt(options, options.prompt))]
    read = _with_prompt if kind == ".txt" else _read_object
    lines = [(number, line.strip()) for number, line in enumerate(_read_lines(options.prompt), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{options.prompt} is empty: write one {'prompt' if kind == '.txt' else 'JSON object'} per line.")
    titled = [(f"line {number}", line) for number, line in lines]
    found = each(options.prompt, titled, lambda line: read(options, line))
    return [Item(title, given) for (title, _), given in zip(titled, found, strict=True)]


def each(name: str, titled: list[tuple[str, Any]], work: Callable[[Any], T]) -> list[T]:
    """`work` on every (title, value). Raises MistakesError that names all titles where it failed with ValueError or OSError.

    The error of a value without a title is raised as it is.
    """
    results, mistakes = [], []
    for title, value in titled:
        try:
            results.append(work(value))
        except (ValueError, OSError) as error:
            if not title:
                raise
            mistakes.append(f"{title}: {error}")
    if mistakes:
        raise MistakesError(f"{name} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}, and nothing was made:", mistakes)
    return results


def _read_lines(name: str) -> list[str]:
    file = Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {name}. (A prompt that ends in {file.suffix} names a file.)")
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _check_is_text(prompt: str) -> None:
    """Raise ValueError for the name of a file: somebody wants more than a video of these letters."""
    with suppress(OSError):  # too long for a name
        if Path(prompt).suffix and Path(prompt).is_file():
            raise ValueError(
                f"{prompt} is a file, but files of prompts end in .txt or .jsonl, and recipes in .json. To start from a picture or a "
                "video, use --image, --video, --control or --extend beside a prompt."
            )


def _with_prompt(options: GenerateOptions, prompt: str) -> GenerateOptions:
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what to show.")
    return replace(options, prompt=prompt)


def _read_object(options: GenerateOptions, line: str) -> GenerateOptions:
    """Options of one line. Raises ValueError for what is not a JSON object of known options of the right types."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f'holds a {type(content).__name__}, not a JSON object: write {{"prompt": ...}}.')
    problems = list(_problems(content))
    if problems:
        raise ValueError(" ".join(problems))
    given = _with_prompt(options, content.pop("prompt"))
    return replace(given, **content)


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """All that is wrong with the keys and types of a line."""
    allowed = {field.name for field in fields(GenerateOptions)} - WHOLE_RUN
    if "prompt" not in content:
        yield 'the key "prompt" is missing.'
    for name, value in content.items():
        if name in WHOLE_RUN:
            yield f"{name!r} holds for all lines: give it as --{name.replace('_', '-')}."
        elif name not in allowed:
            yield f"{name!r} is unknown: known are {', '.join(sorted(allowed))}."
        else:
            yield from type_mistakes(GenerateOptions, {name: value})
