"""Training a small text encoder: a sentencepiece tokenizer for the captions' words, and a T5 encoder that binds attributes.

A transformer that reads text tokens without positions (CogVideoX rotates video tokens only) cannot tell whose colour is whose
unless the text encoder already says so. The encoder is therefore trained to spell out the whole scene at every token.
"""

from __future__ import annotations

import io
import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from ..data.captions import vocabulary_corpus
from ..data.moving_shapes import MovingShapes, Scene
from ..data.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES
from ..files import atomic_path
from .config import TrainConfig, check_keys
from .objectives import Objective
from .processes import ALONE, Share, process_state

__all__ = ["TextEncoderTask", "tokenize", "train_tokenizer"]

# What a scene says, as classification targets: the background, then shape, colour and motion of up to two shapes. Class 0: not said.
_VOCABULARIES: tuple[Sequence[str], ...] = (tuple(BACKGROUNDS), *(SHAPES, tuple(COLORS), MOTIONS) * 2)


def train_tokenizer(sentences: Iterable[str], folder: str | Path, model_max_length: int) -> T5Tokenizer:
    """Train a sentencepiece model in which every word of `sentences` is one piece, write it in T5's layout, and load it.

    Letters and digits are pieces too, so that unknown words are spelled instead of lost; upper case is folded.
    """
    folder = Path(folder)
    counts = Counter(word for sentence in sentences for word in sentence.split())
    with atomic_path(folder / "spiece.model") as path:
        path.write_bytes(_with_whole_words(_train_pieces(counts), counts))
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": model_max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf8")
    tokenizer = T5Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _train_pieces(counts: Mapping[str, int]) -> bytes:
    """A serialised unigram model of the words' parts."""
    alphabet = string.ascii_lowercase + string.digits
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(counts),
        model_writer=model,
        vocab_size=len(counts) + len(alphabet),
        hard_vocab_limit=False,
        required_chars=alphabet,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def _with_whole_words(model: bytes, counts: Mapping[str, int]) -> bytes:
    """Make every word a piece scored by its frequency: the trainer takes its candidates only from parts that several words share."""
    proto = ModelProto.FromString(model)
    known, total = {piece.piece: piece for piece in proto.pieces}, sum(counts.values())
    for word in sorted(counts):
        piece = known.get(f"\u2581{word}") or proto.pieces.add(piece=f"\u2581{word}")
        piece.score = math.log(counts[word] / total)
    return proto.SerializeToString()


def tokenize(tokenizer: T5Tokenizer, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids (B, L) padded and cut to L = `length`, as the pipeline makes them."""
    return tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def scene_targets(scenes: Sequence[Scene], prompts: Sequence[str]) -> Tensor:
    """Class indices (B, 7): background (0 where the prompt does not name it), then shape, colour, motion of each shape (0: absent)."""
    rows = []
    for scene, prompt in zip(scenes, prompts, strict=True):
        said = [scene.background if str(scene.background) in prompt.split() else None]
        for i in range(2):
            spec = scene.shapes[i] if i < len(scene.shapes) else None
            said += [spec.shape, spec.color, spec.motion] if spec else [None] * 3
        rows.append([0 if word is None else 1 + list(names).index(word) for word, names in zip(said, _VOCABULARIES, strict=True)])
    return torch.tensor(rows)


class _AttributeObjective(Objective):
    """Mean cross-entropy of every attribute of the scene, read linearly from every token."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__(encoder)
        self.readout = nn.Linear(encoder.config.d_model, sum(len(names) + 1 for names in _VOCABULARIES))

    def forward(self, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """ids (B, L), targets (B, 7) -> loss and the share of (token, attribute) pairs read correctly."""
        logits = self.readout(self.model(ids).last_hidden_state)
        heads = logits.split([len(names) + 1 for names in _VOCABULARIES], dim=-1)
        wanted = targets[:, None].expand(-1, ids.shape[1], -1)
        losses = [F.cross_entropy(head.flatten(0, 1), wanted[..., i].flatten()) for i, head in enumerate(heads)]
        correct = [(head.argmax(-1) == wanted[..., i]).float().mean() for i, head in enumerate(heads)]
        return {"loss": torch.stack(losses).mean(), "accuracy": torch.stack(correct).mean()}


class TextEncoderTask:
    """Captions of the training scenes in, their attributes out."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        model = dict(config.model)
        self.length = model.pop("max_length")
        # Wide relative-position biases: with T5's default the untrained encoder hardly sees word order.
        bias_std = model.pop("relative_bias_std", 2.0)
        check_keys("model", model, {*T5Config().to_dict(), "max_length", "relative_bias_std"})
        config.objective_options()
        with process_state().main_process_first():  # the others find the same file, and write it once more
            self.tokenizer = train_tokenizer(vocabulary_corpus(), Path(config.output) / "tokenizer", self.length)
        torch.manual_seed(config.seed)
        self.encoder = encoder = T5EncoderModel(T5Config(vocab_size=len(self.tokenizer), **model))
        bias = encoder.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        nn.init.normal_(bias, std=bias_std)
        self.objective = _AttributeObjective(encoder.train())

    def batch(self, step: int, share: Share = ALONE) -> dict[str, Any]:
        """{"ids": (B, L), "targets": (B, 7)}: this share of optimiser step `step`."""
        data, stage = self.config.data, self.config.stage_at(step)
        rng = np.random.default_rng((data.seed, step))
        world = MovingShapes(data.seed, objects=data.objects)
        scenes, prompts = zip(*(world.describe(int(rng.integers(2**31))) for _ in range(stage.batch_size)), strict=True)
        part = share.of(stage.batch_size)
        scenes, prompts = scenes[part], prompts[part]
        return {"ids": tokenize(self.tokenizer, prompts, self.length), "targets": scene_targets(scenes, prompts)}

    def metrics(self, batch: Mapping[str, Any], result: Mapping[str, Tensor]) -> dict[str, float]:  # noqa: ARG002
        """Accuracy over all tokens and attributes."""
        return {"accuracy": float(result["accuracy"])}

    def save(self, folder: Path) -> None:
        """Encoder and tokenizer in one folder."""
        self.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
