"""Prompts to T5 embeddings: what may be passed, how text is tokenised, what the unconditional half is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from .story import starts_of

__all__ = ["PromptInputs", "encode_text"]

logger = logging.get_logger(__name__)


def encode_text(tokenizer: Any, text_encoder: Any, prompts: list[str], *, length: int, device: torch.device) -> Tensor:
    """T5 embeddings (B, L, D_text) of B prompts, in the text encoder's dtype.

    Every prompt is padded or cut to `length` tokens, the end token included. No attention mask is used: the models were
    trained with the padding visible. What is cut off is reported with a logged warning.

    Raises:
        ValueError: when the pipeline has no tokenizer or no text encoder.
    """
    missing = [name for name, part in (("tokenizer", tokenizer), ("text_encoder", text_encoder)) if part is None]
    if missing:
        raise ValueError(
            f"The pipeline has no {' and no '.join(missing)}, so it cannot encode text: pass prompt_embeds and (for "
            "guidance_scale > 1) negative_prompt_embeds or zero_unconditional=True."
        )
    _warn_about_cut_text(tokenizer, prompts, length)
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(device))[0]


def _warn_about_cut_text(tokenizer: Any, prompts: list[str], length: int) -> None:
    for prompt, ids in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        if len(ids) > length:
            cut = tokenizer.decode(ids[length - 1 :], skip_special_tokens=True)
            logger.warning(f"The prompt {prompt[:40]!r}... has {len(ids)} tokens; max_sequence_length={length} cuts off: {cut!r}")


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """The four ways to say what the video shows; text or embeddings (B, L, D_text), each with a negative counterpart.

    A prompt by frame, {0: text, 48: text}, is that of one video; `one_by_one` gives its parts as prompts of their own.
    """

    prompt: str | list[str] | Mapping[int, str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for combinations, types and sizes that make no sense."""
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ValueError("Pass exactly one of prompt and prompt_embeds.")
        if self.negative_prompt_embeds is not None and (self.prompt is not None or self.negative_prompt is not None):
            raise ValueError("negative_prompt_embeds goes with prompt_embeds only, not with prompt or negative_prompt.")
        if self.prompt is not None and not self.starts:
            _check_text("prompt", self.prompt)
        self._check_embeds()
        self._check_negative_prompt()

    def _check_embeds(self) -> None:
        positive, negative = self.prompt_embeds, self.negative_prompt_embeds
        for name, embeds in (("prompt_embeds", positive), ("negative_prompt_embeds", negative)):
            if embeds is not None and (embeds.ndim != 3 or 0 in embeds.shape):
                raise ValueError(f"{name} must be of shape (prompts, tokens, width), not {tuple(embeds.shape)}.")
        if positive is not None and negative is not None and positive.shape != negative.shape:
            raise ValueError(
                f"prompt_embeds {tuple(positive.shape)} and negative_prompt_embeds {tuple(negative.shape)} must have the same shape."
            )

    def _check_negative_prompt(self) -> None:
        if self.negative_prompt is None:
            return
        _check_text("negative_prompt", self.negative_prompt)
        if isinstance(self.negative_prompt, list) and len(self.negative_prompt) != self.count:
            raise ValueError(
                f"negative_prompt lists {len(self.negative_prompt)} texts for {self.count} prompts: pass one text for all, or one for each."
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """The frames at which the prompts of one video begin; () where every video has one prompt."""
        return starts_of(self.prompt)

    @property
    def count(self) -> int:
        """Number of videos B that are described."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if self.starts else len(_as_list(self.prompt, 1))

    def one_by_one(self) -> PromptInputs:
        """The prompts of one video by frame as a list in their order, each with its negative prompt; other inputs as they are."""
        if not isinstance(self.prompt, Mapping):
            return self
        negative = self.negative_prompt[0] if isinstance(self.negative_prompt, list) else self.negative_prompt
        return replace(self, prompt=[self.prompt[start] for start in self.starts], negative_prompt=negative)

    def encode(self, tokenizer: Any, text_encoder: Any, *, length: int, device: torch.device) -> Tensor:
        """Embeddings (B, L, D_text) of the prompts; those that were passed are returned as they are."""
        if self.prompt_embeds is not None:
            return self.prompt_embeds
        return encode_text(tokenizer, text_encoder, _as_list(self.prompt, 1), length=length, device=device)

    def encode_negative(self, tokenizer: Any, text_encoder: Any, *, length: int, device: torch.device) -> Tensor:
        """Embeddings (B, L, D_text) of the unconditional half: the negative prompts, by default the empty text for all."""
        if self.negative_prompt_embeds is not None:
            return self.negative_prompt_embeds
        texts = _as_list(self.negative_prompt or "", self.count)
        if len(set(texts)) == 1:  # one text for all is encoded once
            return encode_text(tokenizer, text_encoder, texts[:1], length=length, device=device).expand(self.count, -1, -1)
        return encode_text(tokenizer, text_encoder, texts, length=length, device=device)


def _as_list(text: str | Iterable[Any] | None, count: int) -> list[str]:
    return [text] * count if isinstance(text, str) else list(text or [])


def _check_text(name: str, text: Any) -> None:
    if isinstance(text, str):
        return
    if isinstance(text, list) and any(isinstance(entry, Mapping) for entry in text):
        raise TypeError(f"{name} lists prompts by frame, and those of one call are of one video: make a call for each ({text!r:.80}).")
    if not isinstance(text, list) or not all(isinstance(entry, str) for entry in text):
        raise TypeError(f"{name} must be a string or a list of strings, not {type(text).__name__}: {text!r:.80}")
    if not text:
        raise ValueError(f"{name} is an empty list: there is nothing to make.")
