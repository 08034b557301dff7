"""What the grammar writes, the reader reads back; and free prompts."""

import io

import numpy as np
import pytest
import sentencepiece

from diffusers_cogvideox.data.captions import STYLES, canonical, caption, captions, parse, vocabulary_corpus
from diffusers_cogvideox.data.scenes import Scene, ShapeSpec, all_scenes

ONE = Scene("gray", (ShapeSpec("circle", "red", "moves right"),))
TWO = Scene("black", (ShapeSpec("circle", "red", "moves right"), ShapeSpec("square", "blue", "stays still")))


def said_by(scene, text):
    """The part of a scene that a caption says: the background may be left out."""
    return scene if "background" in text else Scene(None, scene.shapes)


def test_canonical_sentences():
    assert canonical(ONE) == "a red circle moves right on a gray background"
    assert canonical(TWO) == "a red circle moves right and a blue square stays still on a black background"
    assert canonical(Scene("teal", (ShapeSpec("cross", "orange", "grows"),))) == "an orange cross grows on a teal background"


def test_the_promised_paraphrases_exist():
    some = captions(ONE)
    assert {"a red circle moves right", "a red circle sliding to the right", canonical(ONE)} <= set(some)
    assert "a large red circle slides steadily to the right across a plain gray background" in some
    assert len(set(some)) == len(some) > 60
    both = captions(TWO)
    assert canonical(TWO) in both
    assert "a blue square rests and a red circle glides rightwards" in both


def test_every_one_shape_caption_says_its_scene():
    for scene in all_scenes(1)[::17]:
        for text in captions(scene):
            assert parse(text) == said_by(scene, text), text
            assert len(text.split()) <= 20
            assert text == text.lower().strip()


def test_every_two_shape_caption_says_its_scene():
    rng = np.random.default_rng(0)
    for scene in all_scenes(2)[::499]:
        for style in ("short", "dense"):
            text = caption(scene, rng, style)
            assert parse(text) == said_by(scene, text), text
            assert len(text.split()) <= 26
    assert all(parse(text) == said_by(TWO, text) and len(text.split()) <= 26 for text in captions(TWO))


@pytest.mark.parametrize("scene", [ONE, TWO])
@pytest.mark.parametrize("style", ["any", "short", "dense"])
def test_random_captions_come_from_the_list_and_vary(scene, style):
    rng, every = np.random.default_rng(1), set(captions(scene))
    drawn = {caption(scene, rng, style) for _ in range(50)}
    assert drawn <= every
    assert len(drawn) > 20


def test_still_captions_mention_no_motion():
    text = caption(ONE, np.random.default_rng(0), "still")
    assert text in {"a red circle", "a red circle on a gray background", "a red circle against a gray background"}
    assert parse(text).shapes == (ShapeSpec("circle", "red"),)
    both = caption(TWO, np.random.default_rng(0), "still")
    assert [spec.motion for spec in parse(both).shapes] == [None, None]


def test_settings_are_mentioned_and_left_out():
    rng = np.random.default_rng(2)
    share = np.mean(["background" in caption(ONE, rng) for _ in range(400)])
    assert 0.55 < share < 0.85


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("A RED disk, spinning!", Scene(None, (ShapeSpec("circle", "red", "rotates"),))),
        ("On a grey background a violet plus sign gets bigger", Scene("gray", (ShapeSpec("cross", "purple", "grows"),))),
        ("a red circle moves right on a blue background", Scene(None, (ShapeSpec("circle", "red", "moves right"),))),
        ("a white square moving up and down", Scene(None, (ShapeSpec("square", None, "bounces"),))),
        ("the triangle is still", Scene(None, (ShapeSpec("triangle", None, "stays still"),))),
        ("a circle does not move to the left", Scene(None, (ShapeSpec("circle", None, "stays still"),))),
        (
            "a square, a green ball travels upward in front of a navy wall",
            Scene("navy", (ShapeSpec("circle", "green", "moves up"), ShapeSpec("square"))),
        ),
        ("a panda plays the guitar", Scene()),
        ("", Scene()),
    ],
)
def test_free_prompts(prompt, scene):
    assert parse(prompt) == scene


def test_a_tokenizer_learns_every_word_as_one_piece():
    lines = list(vocabulary_corpus())
    model = io.BytesIO()
    options = {"vocab_size": 128, "hard_vocab_limit": False, "model_type": "unigram", "character_coverage": 1.0, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    rng = np.random.default_rng(0)
    words = {
        word for scene in all_scenes(1)[::3] for text in (*captions(scene)[::7], caption(scene, rng, "still")) for word in text.split()
    }
    words |= {word for text in captions(TWO) for word in text.split()}
    assert words <= set(" ".join(lines).split())
    assert [word for word in sorted(words) if len(tokenizer.encode(word)) != 1] == []
    assert tokenizer.unk_id() not in tokenizer.encode("jazz quiz vexes my fox")


def test_invalid_arguments():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=f"style='loud'.*{', '.join(STYLES)}"):
        caption(ONE, rng, "loud")
    for broken in (Scene("gray"), Scene(None, ONE.shapes), Scene("gray", (ShapeSpec("circle", "red"),))):
        with pytest.raises(ValueError, match="incomplete"):
            caption(broken, rng)
        with pytest.raises(ValueError, match="incomplete"):
            canonical(broken)
        with pytest.raises(ValueError, match="incomplete"):
            captions(broken)
