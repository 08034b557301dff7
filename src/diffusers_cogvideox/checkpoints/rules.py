"""Key rules: the names of one checkpoint layout and of another, and how tensors are cut or joined between them, both ways, as data."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .lazy import AnyTensor, combine

__all__ = ["KeyRules", "Rule", "listed", "rename"]

# What stands in the place of `{layer}` and `{kind}` in a name.
_PLACEHOLDERS = {"layer": r"\d+", "kind": "weight|bias"}
_KINDS = ("weight", "bias")  # the order in which modules keep them
_LISTED = 4


@dataclass(frozen=True)
class Rule:
    """One tensor on the source side, one or several on the target side.

    The source is cut along its first axis into as many equal pieces as `parts` names; each part is some of them, in that order.
    A fused projection is `{"to_q": (0,), "to_k": (1,), "to_v": (2,)}`; renaming is the case of one part of one piece.

    Args:
        source: name, with the placeholders `{layer}` (a number) and `{kind}` (weight or bias).
        parts: names on the target side, with the same placeholders, and the pieces that each is made of.
    """

    source: str
    parts: Mapping[str, tuple[int, ...]]

    @property
    def pieces(self) -> int:
        """Number of pieces that the source consists of."""
        return sum(map(len, self.parts.values()))

    def part(self, tensor: Tensor, name: str) -> Tensor:
        """One part of a source tensor (pieces * n, ...): a view where it is one piece.

        Raises:
            ValueError: it cannot be cut evenly.
        """
        if self.pieces == 1:
            return tensor
        if tensor.ndim == 0 or len(tensor) % self.pieces:
            raise ValueError(f"shape {tuple(tensor.shape)} cannot be cut into {self.pieces} equal pieces along the first axis")
        cut, chosen = tensor.chunk(self.pieces), self.parts[name]
        return cut[chosen[0]] if len(chosen) == 1 else torch.cat([cut[index] for index in chosen])

    def join(self, *parts: Tensor) -> Tensor:
        """The source tensor (pieces * n, ...) of all its parts, given in the order of `self.parts`: undoes `part`."""
        if self.pieces == 1:
            return parts[0]
        cut: dict[int, Tensor] = {}
        for chosen, part in zip(self.parts.values(), parts, strict=True):
            cut.update(zip(chosen, part.chunk(len(chosen)), strict=True))
        return torch.cat([cut[index] for index in range(self.pieces)])


def rename(source: str, target: str) -> Rule:
    """A tensor that only changes its name."""
    return Rule(source, {target: (0,)})


class _Found(NamedTuple):
    rule: Rule
    values: dict[str, str]  # what stands in the place of the placeholders


@dataclass(frozen=True)
class KeyRules:
    """A table of rules, read in order: the first rule that matches a name applies.

    Several rules may lead to one target: all of them are read, the first is written. What matches neither a rule nor `dropped`
    is an error in both directions.

    Args:
        rules: the table.
        dropped: regular expressions of source names that have no counterpart, and why.
    """

    rules: Sequence[Rule]
    dropped: Mapping[str, str] = field(default_factory=dict)

    def forward(self, tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
        """Tensors, or lazy tensors, under their target names.

        Raises:
            ValueError: lists names that no rule claims, names that are given twice, and tensors that cannot be cut.
        """
        found = {name: self._find(name, self._sources()) for name in tensors}
        _refuse([name for name, match in found.items() if match is None and not self.reason_to_drop(name)], "no rule knows")
        result: dict[str, AnyTensor] = {}
        for name, match in found.items():
            if match is None:
                continue
            for part in match.rule.parts:
                target = part.format(**match.values)
                _refuse([target] if target in result else [], "given twice, under several spellings:")
                try:
                    result[target] = combine(functools.partial(match.rule.part, name=part), [tensors[name]])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return result

    def backward(self, tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
        """Tensors, or lazy tensors, under their source names, in the order of the table: undoes `forward`, bit for bit.

        Raises:
            ValueError: lists names that no rule claims, and the missing parts of tensors that must be joined.
        """
        found = {name: self._find(name, self._targets()) for name in tensors}
        _refuse([name for name, match in found.items() if match is None], "no rule knows")
        sources = {match.rule.source.format(**match.values): match for match in found.values() if match}
        result = {}
        for source, match in sorted(sources.items(), key=lambda item: self._place(item[1])):
            parts = [part.format(**match.values) for part in match.rule.parts]
            _refuse([part for part in parts if part not in tensors], f"{source} lacks its parts")
            result[source] = combine(match.rule.join, [tensors[part] for part in parts])
        return result

    def reason_to_drop(self, name: str) -> str | None:
        """Why a source name has no counterpart; None for one that has, or that is unknown."""
        return next((reason for pattern, reason in self.dropped.items() if re.search(pattern, name)), None)

    def _place(self, found: _Found) -> tuple[int, int, int, int]:
        """Where a source name stands among the others: layer by layer where several rules begin with the same numbered layer."""
        stem = found.rule.source.partition("{layer}")[0]
        first = next(index for index, rule in enumerate(self.rules) if rule.source.startswith(stem))
        kind = _KINDS.index(found.values.get("kind", "weight"))
        return first, int(found.values.get("layer", 0)), self.rules.index(found.rule), kind

    def _sources(self) -> Iterator[tuple[Rule, str]]:
        return ((rule, rule.source) for rule in self.rules)

    def _targets(self) -> Iterator[tuple[Rule, str]]:
        return ((rule, part) for rule in self.rules for part in rule.parts)

    @staticmethod
    def _find(name: str, templates: Iterable[tuple[Rule, str]]) -> _Found | None:
        """The first rule whose template matches, and the values of its placeholders."""
        for rule, template in templates:
            if match := _pattern(template).fullmatch(name):
                return _Found(rule, match.groupdict())
        return None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression with one named group for each placeholder."""
    pattern = re.escape(template)
    for name, allowed in _PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{allowed})")
    return re.compile(pattern)


def listed(names: Iterable[str]) -> str:
    """The names in one line, the first of them where there are many."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _refuse(names: Sequence[str], reason: str) -> None:
    if names:
        raise ValueError(f"{reason} {listed(names)}")
