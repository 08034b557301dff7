"""Sentences about scenes and back: a small grammar that writes paraphrases, and a reader for free prompts."""

from __future__ import annotations

import functools
import itertools
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .scenes import BACKGROUNDS, COLORS, MOTIONS, STILL, Scene, ShapeSpec, all_scenes

__all__ = ["STYLES", "canonical", "caption", "captions", "check_style", "parse", "vocabulary_corpus"]

STYLES = ("any", "short", "dense", "still")


class Verb(NamedTuple):
    """The forms of a verb that prompts use."""

    base: str
    finite: str
    participle: str


class Phrase(NamedTuple):
    """A verb and what follows it: ("move", "to the right")."""

    verb: Verb
    complement: str = ""


class Slots(NamedTuple):
    """Alternatives for the parts of a sentence: per shape its subjects and predicates; then where, and the word between two shapes."""

    subjects: tuple[tuple[str, ...], ...]
    predicates: tuple[tuple[str, ...], ...]
    settings: tuple[str, ...]
    joiners: tuple[str, ...]


# --- the words ----------------------------------------------------------------------------------------------------------


def _regular(base: str) -> Verb:
    """Forms of a regular verb: move, moves, moving."""
    return Verb(base, f"{base}s", f"{base.removesuffix('e')}ing")


_MOVERS = tuple(map(_regular, ("move", "slide", "glide", "travel")))
_GET = Verb("get", "gets", "getting")
_SPIN = Verb("spin", "spins", "spinning")
_HOP = Verb("hop", "hops", "hopping")
_NOT_MOVE = Verb("do not move", "does not move", "not moving")


def _towards(*complements: str) -> tuple[Phrase, ...]:
    """Every verb of motion with every way to name one direction."""
    return tuple(Phrase(verb, complement) for complement in complements for verb in _MOVERS)


_PHRASES: dict[str, tuple[Phrase, ...]] = {
    "moves right": _towards("right", "to the right", "rightwards"),
    "moves left": _towards("left", "to the left", "leftwards"),
    "moves up": _towards("up", "upwards", "to the top"),
    "moves down": _towards("down", "downwards", "to the bottom"),
    "grows": (Phrase(_regular("grow")), Phrase(_regular("expand")), Phrase(_GET, "bigger"), Phrase(_GET, "larger")),
    "shrinks": (Phrase(_regular("shrink")), Phrase(_regular("contract")), Phrase(_GET, "smaller")),
    "rotates": (Phrase(_regular("rotate")), Phrase(_SPIN), Phrase(_regular("turn")), Phrase(_SPIN, "around")),
    "bounces": (Phrase(_regular("bounce")), Phrase(_regular("bounce"), "up and down"), Phrase(_HOP), Phrase(_HOP, "up and down")),
    STILL: (
        Phrase(_regular("stay"), "still"),
        Phrase(_regular("remain"), "still"),
        Phrase(_regular("stay"), "in place"),
        Phrase(_regular("rest")),
        Phrase(_NOT_MOVE),
    ),
}
_ADVERBS = ("steadily", "smoothly")
_SHAPE_NAMES = {"circle": ("circle",), "square": ("square",), "triangle": ("triangle",), "cross": ("cross", "plus sign")}

_REPEATS = 100  # of each word by itself in the tokenizer's training text

# Understood in a prompt, but never written.
_READ_SHAPES = {"disk": "circle", "disc": "circle", "ball": "circle", "box": "square"}
_READ_WORDS = {"grey": "gray", "violet": "purple", "rightward": "right", "leftward": "left", "upward": "up", "downward": "down"}
_READ_PHRASES = {
    "bounces": tuple(Phrase(verb, "up and down") for verb in (*_MOVERS, _regular("jump"))),
    STILL: (Phrase(_regular("stand"), "still"), Phrase(Verb("be", "is", "being"), "still")),
}

# --- writing ------------------------------------------------------------------------------------------------------------


def _require_complete(scene: Scene) -> None:
    """Raise ValueError when a scene leaves something open."""
    if not scene.complete:
        raise ValueError(f"{scene} is incomplete: shapes, colours, motions and the background must all be given.")


def _with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def canonical(scene: Scene) -> str:
    """The one standard sentence of a complete scene: "a red circle moves right on a gray background"."""
    _require_complete(scene)
    shapes = " and ".join(_with_article(f"{spec.color} {spec.shape} {spec.motion}") for spec in scene.shapes)
    return f"{shapes} on a {scene.background} background"


@functools.cache
def _predicates(motion: str, dense: bool) -> tuple[str, ...]:
    """Ways to say what a shape does: "moves right", "moving right"; dense: "moves steadily right", "is moving smoothly right"."""
    adverbs = _ADVERBS if dense and motion != STILL else ("",)
    helper = "is " if dense else ""
    forms = (
        f"{verb} {adverb} {phrase.complement}"
        for phrase in _PHRASES[motion]
        for verb in (phrase.verb.finite, helper + phrase.verb.participle)
        for adverb in adverbs
    )
    return tuple(" ".join(form.split()) for form in forms)


def _slots(background: str, specs: Sequence[ShapeSpec], style: str) -> Slots:
    """The alternatives of one style ("short", "dense" or "still") for these shapes, mentioned in this order."""
    dense, still = style == "dense", style == "still"
    size = "large " if dense and len(specs) == 1 else ""
    place = f"a {'plain ' if dense else ''}{background} background"
    prepositions = ("on", "across", "against") if dense else ("on", "against")
    return Slots(
        subjects=tuple(tuple(_with_article(f"{size}{spec.color} {name}") for name in _SHAPE_NAMES[str(spec.shape)]) for spec in specs),
        predicates=tuple(("",) if still else _predicates(str(spec.motion), dense) for spec in specs),
        settings=("", *(f"{preposition} {place}" for preposition in prepositions)),
        joiners=("and", "while") if dense and len(specs) > 1 else ("and",),
    )


def _sentence(subjects: Sequence[str], predicates: Sequence[str], setting: str, joiner: str) -> str:
    """Put the chosen parts together: "a red circle moves right and a blue square rests on a black background"."""
    clauses = map(" ".join, zip(subjects, predicates, strict=True))
    return " ".join([f" {joiner} ".join(clauses), setting]).replace("  ", " ").strip()


def _all_sentences(slots: Slots) -> Iterator[str]:
    """Every choice from the slots."""
    subjects, predicates = itertools.product(*slots.subjects), itertools.product(*slots.predicates)
    for parts in itertools.product(subjects, predicates, slots.settings, slots.joiners):
        yield _sentence(*parts)


def captions(scene: Scene) -> list[str]:
    """All paraphrases of a complete scene, short and dense, with and without the background, shapes in either order.

    About a hundred to five hundred for one shape, up to some ten thousand for two.
    """
    _require_complete(scene)
    orders = itertools.permutations(scene.shapes)
    slots = (_slots(str(scene.background), order, style) for order in orders for style in ("short", "dense"))
    return [sentence for choice in slots for sentence in _all_sentences(choice)]


def check_style(style: str) -> None:
    """Raise ValueError unless `style` is one of STYLES."""
    if style not in STYLES:
        raise ValueError(f"style={style!r} is not known: choose one of {', '.join(STYLES)}.")


def caption(scene: Scene, rng: np.random.Generator, style: str = "any") -> str:
    """One random paraphrase of a complete scene.

    `style`: "short" ("a red circle moves right"), "dense" ("a large red circle slides steadily to the right across a plain gray
    background"), "any" of these two, or "still" for a picture: no word about motion. About a quarter to a third leave the background out.
    Raises ValueError for another style and for an incomplete scene.
    """
    _require_complete(scene)
    check_style(style)

    def pick(alternatives: Sequence[str]) -> str:
        return alternatives[int(rng.integers(len(alternatives)))]

    style = pick(("short", "dense")) if style == "any" else style
    order = [scene.shapes[i] for i in rng.permutation(len(scene.shapes))]
    slots = _slots(str(scene.background), order, style)
    return _sentence([*map(pick, slots.subjects)], [*map(pick, slots.predicates)], pick(slots.settings), pick(slots.joiners))


def vocabulary_corpus() -> Iterator[str]:
    """Some twenty thousand lines from which a sub-word tokenizer learns every word of the grammar as one piece (sentencepiece, unigram)."""
    rng = np.random.default_rng(0)
    sentences = [text for scene in all_scenes(1)[::31] for text in captions(scene)]
    sentences += [caption(scene, rng) for scene in all_scenes(2)[::79]]
    yield from sentences
    # Unigram training considers only strings that are followed by different things; so every word also ends a line and does not end one.
    for word in sorted(set(" ".join(sentences).split())):
        yield from itertools.repeat(f"{word} {word}", _REPEATS)
    yield string.ascii_lowercase  # any other word can be spelt, if the tokenizer is trained with character_coverage=1


# --- reading ------------------------------------------------------------------------------------------------------------


def _nouns() -> dict[str, str]:
    """First word of each name of a shape -> the shape."""
    return {name.split()[0]: shape for shape, names in _SHAPE_NAMES.items() for name in names} | _READ_SHAPES


@functools.cache
def _motion_signs() -> list[tuple[frozenset[str], str]]:
    """(words that must all occur, motion): what is denied first, then the most specific."""
    phrases = ((phrase, motion) for motion in MOTIONS for phrase in (*_PHRASES[motion], *_READ_PHRASES.get(motion, ())))
    signs = [(frozenset(f"{form} {phrase.complement}".split()), motion) for phrase, motion in phrases for form in phrase.verb]
    return sorted(signs, key=lambda sign: ("not" not in sign[0], -len(sign[0])))


def _motion(words: Iterable[str]) -> str | None:
    """The motion that these words describe, if any."""
    said = set(words)
    return next((motion for sign, motion in _motion_signs() if sign <= said), None)


def parse(prompt: str) -> Scene:
    """Read what a free prompt asks for; None where it is silent, no shapes where it names none.

    A colour belongs to the next shape named after it, a motion to the last shape named before it. Words from outside the world
    are skipped, so "a red circle on a blue background" leaves the background open.

    >>> parse("A RED disk, spinning")
    Scene(background=None, shapes=(ShapeSpec(shape='circle', color='red', motion='rotates'),))
    """
    nouns = _nouns()
    words = [_READ_WORDS.get(word, word) for word in re.findall(r"[a-z]+", prompt.lower())]
    found = [i for i, word in enumerate(words) if word in nouns]
    spans = zip([0, *found], found, [*found[1:], len(words)], strict=False)
    shapes = []
    for previous, here, following in spans:
        color = next((word for word in reversed(words[previous:here]) if word in COLORS), None)
        shapes.append(ShapeSpec(nouns[words[here]], color, _motion(words[here + 1 : following])))
    # A background word directly before a shape ("a white square") is that shape's colour, one that the world does not have.
    settings = (word for word, after in zip(words, [*words[1:], ""], strict=False) if word in BACKGROUNDS and after not in nouns)
    return Scene(next(settings, None), tuple(shapes))
