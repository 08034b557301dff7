"""Tiny pipeline folders as diffusers writes them: the input of every test that loads a pipeline."""

import functools
import random
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from diffusers_cogvideox.presets import PRESETS
from parity import TINY_TRANSFORMERS, TINY_VAE, StockDDIMScheduler, StockDPMScheduler, StockPipeline, StockTransformer, StockVAE, randomize

__all__ = ["WORDS", "call", "save_stock_folder"]

_SENTENCE = "a red blue green circle square triangle moves right left up down grows shrinks on black white background the slowly"
WORDS = _SENTENCE.split()
SAMPLERS = {"ddim": StockDDIMScheduler, "dpm": StockDPMScheduler}


@functools.cache
def sentence_model() -> bytes:
    """A real sentencepiece model with T5's special tokens, trained on sentences of WORDS."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=8)) for _ in range(300)]

    class Sink:
        data = b""

        def write(self, data: bytes) -> None:
            self.data += data

    sink = Sink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=sink,
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return sink.data


def save_stock_folder(folder: Path, variant: str = "5b", sampler: str = "ddim") -> Path:
    """Write a whole tiny pipeline of `variant` with diffusers' own classes to `folder`, weights the same every time."""
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "spiece.model").write_bytes(sentence_model())
    tokenizer = T5Tokenizer.from_pretrained(folder / "words")
    with torch.random.fork_rng():  # the state of the test that asks for a folder stays as it is
        torch.manual_seed(0)
        text_encoder = T5EncoderModel(
            T5Config(vocab_size=160, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
        )
    pipe = StockPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=randomize(StockVAE(**TINY_VAE)),
        transformer=randomize(StockTransformer(**TINY_TRANSFORMERS[variant])),
        scheduler=SAMPLERS[sampler](**PRESETS["2b" if variant == "2b" else "5b"].scheduler),
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def call(pipe: Any, **options: Any) -> torch.Tensor:
    """Frames of a short call with fixed noise: 9 frames of 32x48, 3 steps, and whatever `options` say."""
    defaults = {
        "prompt": "a red circle moves right",
        "num_frames": 9,
        "height": 32,
        "width": 48,
        "num_inference_steps": 3,
        "max_sequence_length": 7,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(3),
    }
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{**defaults, **options}).frames
