"""The tokenizer and the attribute objective of the small text encoder."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from diffusers_cogvideox.data.captions import vocabulary_corpus
from diffusers_cogvideox.data.scenes import COLORS, MOTIONS, SHAPES, Scene, ShapeSpec
from diffusers_cogvideox.training.config import DataOptions, Stage, TrainConfig
from diffusers_cogvideox.training.text_encoder import TextEncoderTask, scene_targets, tokenize, train_tokenizer

SCENE = Scene("navy", (ShapeSpec("circle", "red", "moves right"),))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return train_tokenizer(vocabulary_corpus(), tmp_path_factory.mktemp("tokenizer"), 28)


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    words = {word for sentence in vocabulary_corpus() for word in sentence.split()}
    assert {word: len(tokenizer(word).input_ids) for word in words} == dict.fromkeys(words, 2)  # the word and </s>


def test_case_is_folded_and_unknown_words_are_spelled(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("A RED Circle").input_ids == tokenizer("a red circle").input_ids
    assert tokenizer.unk_token_id not in tokenizer("zebra 42").input_ids


def test_special_tokens_are_t5s(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("").input_ids == [1]
    assert tokenize(tokenizer, ["a red circle", ""], 28).shape == (2, 28)


def test_targets_name_the_scene_and_leave_out_what_is_not_said() -> None:
    said, silent = scene_targets([SCENE, SCENE], ["a red circle moves right on a navy background", "a red circle moves right"]).tolist()
    spec = [1 + SHAPES.index("circle"), 1 + list(COLORS).index("red"), 1 + MOTIONS.index("moves right")]
    assert said[1:] == silent[1:] == [*spec, 0, 0, 0]
    assert said[0] > 0 and silent[0] == 0


def test_batches_depend_on_the_step_alone(tmp_path: Path) -> None:
    model = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "max_length": 28, "is_encoder_decoder": False}
    config = TrainConfig(
        task="text_encoder", output=str(tmp_path), model=model, stages=[Stage(steps=9, batch_size=4)], data=DataOptions(objects=(1,))
    )
    task = TextEncoderTask(config)
    first, again, other = task.batch(3), task.batch(3), task.batch(4)
    assert torch.equal(first["ids"], again["ids"]) and not torch.equal(first["ids"], other["ids"])
    result = task.objective(**first)
    result["loss"].backward()
    assert all(p.grad is not None for p in task.objective.parameters())
