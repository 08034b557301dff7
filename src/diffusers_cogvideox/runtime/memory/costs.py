"""What each stage of a video takes, in bytes and seconds, for every way in which it can be done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import torch

from ...models.transformer_memory import Attention, TransformerPass, modulation_table_bytes, rotary_bytes
from ..quantisation import QUANTISATIONS
from .facts import WIDTHS, ModelFacts, PartFacts
from .text_encoder import text_encoder_peak
from .vae import Coding, codings
from .workload import Machine, Workload

__all__ = ["PARTS", "PLACEMENTS", "Costs", "Option", "Placement", "TransformerMode"]

Placement = Literal["resident", "staged", "streamed", "disk"]
"""Where a part's weights are: on the device all the time; there while they are used, in host memory otherwise; brought from host memory
block by block; or from disk."""

PLACEMENTS: tuple[Placement, ...] = ("resident", "staged", "streamed", "disk")
PARTS = ("text_encoder", "transformer", "vae")

WINDOW = 2
"""Blocks of a streamed part that are on the device: the one that computes, and the next."""

_FF_TOKENS = (None, 4096, 1024)
# What ways that do the same work in smaller parts are taken to cost; rows that are made
# anew took 13 % (bfloat16) and 24 % (float32) of decoding on a processor (benchmarks/results/vae.json).
_SPLIT, _CHUNKED, _LEAN, _UPCAST = 1.01, 1.01, 1.15, 1.05
_PAGED = 3  # how much longer weights take from memory that is not pinned
_FLOAT = 4  # bytes of a float32
_STEP_COPIES = 10  # latents in float32 that guidance and the sampler's step hold at once
_WORKSPACE = 64 * 10**6  # bytes of the matrix library's own memory on an accelerator


@dataclass(frozen=True)
class TransformerMode:
    """How the denoising loop saves memory, beside where the weights are."""

    quantisation: str | None = None
    split_batch: bool = False
    ff_tokens: int | None = None
    release_modulation: bool = False


@dataclass(frozen=True)
class Option:
    """One way to do a stage: bytes on the device (beside what the other parts keep there), bytes in host memory (likewise), seconds.

    `measures` counts what it does to save memory: of two that are equally fast, the plainer one is taken.
    """

    device: int
    host: int
    seconds: float
    measures: int
    mode: TransformerMode | Coding | None = None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one model, workload, precision and kind of device.

    Args:
        facts, work, dtype: what is computed, and in which precision.
        device: kind of device.
        machine: its speeds.
        quantisation: one that may be used, by its name; None keeps the result.
        attention: kind of attention kernel.
    """

    facts: ModelFacts
    work: Workload
    dtype: str
    device: str
    machine: Machine
    quantisation: str | None = None
    attention: Attention = "fused"

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return WIDTHS[self.dtype]

    @property
    def stages(self) -> tuple[tuple[str, str], ...]:
        """(name, part) of the stages of this workload, in their order."""
        stages = (("encode", "vae"), ("text", "text_encoder"), ("denoise", "transformer"), ("decode", "vae"))
        skipped = {"encode": not self.work.encoded_frames, "text": self.facts.text_part is None or not self.work.prompts}
        return tuple(stage for stage in stages if not skipped.get(stage[0], False))

    @property
    def quantisations(self) -> tuple[str | None, ...]:
        """What the blocks of the transformer may be stored in: what they are in already; or plain, and what is allowed and possible.

        With adapters there, ways that take them afterwards are not.
        """
        if self.facts.quantised:
            return (self.facts.quantised,)
        if self.quantisation is None or (self.facts.adapters and QUANTISATIONS[self.quantisation].takes_adapters):
            return (None,)
        return None, self.quantisation

    def weights(self, part: str, quantisation: str | None = None) -> int:
        """Bytes of all weights of a part."""
        if part == "vae":
            return self.facts.vae_parameters * self.width
        adapters = self.facts.adapters * self.width if part == "transformer" else 0
        return self._part(part).bytes(self.dtype, QUANTISATIONS[quantisation] if quantisation else None) + adapters

    def on_device(self, part: str, placement: Placement, quantisation: str | None = None) -> int:
        """Bytes of a part's weights on the device while they are used."""
        whole = self.weights(part, quantisation)
        if placement in ("resident", "staged"):
            return whole
        facts = self._part(part)
        adapters = self.facts.adapters if part == "transformer" else 0
        # A block that is cast while it works is there in its own memory once more, to be thrown away.
        blocks = WINDOW + (quantisation is not None and QUANTISATIONS[quantisation].package is None)
        return min(whole, (facts.outside + facts.alone + adapters) * self.width + blocks * self.block(part, quantisation))

    def in_host_memory(self, part: str, placement: Placement, quantisation: str | None = None) -> int:
        """Bytes that a part takes in host memory all the time; on a processor, whose memory that is, everything counts as on the device."""
        if self.device == "cpu" or placement == "resident":
            return 0
        if placement == "staged":
            return self.weights(part, quantisation)
        facts, block = self._part(part), _pinned(self.block(part, quantisation))
        if placement == "disk":
            return WINDOW * block + facts.alone * self.width
        return facts.blocks * (block + _pinned(facts.lent * self.width)) + _pinned(facts.embeddings * self.width)

    def possible(self, part: str, quantisation: str | None = None) -> Sequence[Placement]:
        """Placements of a part: a VAE has no row of blocks, and a processor's memory is the host's.

        Quantised weights are not on disk, and come to the device block by block or once for all; some are made there, and stay.
        """
        placements: Sequence[Placement] = PLACEMENTS[:2] if part == "vae" else PLACEMENTS
        if quantisation is not None:
            placements = ("resident",) if QUANTISATIONS[quantisation].while_loading else ("resident", "streamed")
        return [p for p in placements if self.device != "cpu" or p in ("resident", "disk")]

    def options(self, stage: str, placement: Placement, quantisation: str | None = None) -> list[Option]:
        """All ways to do a stage with its part's weights in this place."""
        if stage == "denoise":
            return list(self._denoising(placement, quantisation))
        if stage == "text":
            return [self._reading(placement)]
        return [self._coded(coding, placement) for coding in self._codings(stage)]

    # --- parts ------------------------------------------------------------------------------------------------------

    def _part(self, part: str) -> PartFacts:
        facts = self.facts.text_part if part == "text_encoder" else self.facts.transformer_part
        if facts is None:
            raise ValueError("there is no text encoder to plan for.")
        return facts

    def block(self, part: str, quantisation: str | None = None) -> int:
        """Bytes that come with one block of a part."""
        facts = self._part(part)
        return facts.quantised_block_bytes(self.dtype, QUANTISATIONS[quantisation]) if quantisation else facts.block_bytes(self.dtype)

    def workspace(self) -> int:
        """Bytes of the matrix library's own memory: on a processor copies of the weights at work, about a block of the transformer."""
        return self.block("transformer") if self.device == "cpu" else _WORKSPACE

    def _arrival(self, size: int, placement: Placement) -> float:
        """Seconds that bytes take to the device, outside of computing."""
        speeds = {"staged": self.machine.link / _PAGED, "streamed": self.machine.link, "disk": self.machine.disk}
        return 0.0 if placement == "resident" else size / speeds[placement]

    def _in_blocks(self, part: str, placement: Placement, computing: float, quantisation: str | None = None) -> float:
        """Seconds of a pass whose blocks come while the ones before them compute, or whose weights are there."""
        if placement in ("resident", "staged"):
            return computing
        blocks, arrival = self._part(part).blocks, self._arrival(self.block(part, quantisation), placement)
        return arrival + blocks * max(computing / blocks, arrival)

    # --- stages -----------------------------------------------------------------------------------------------------

    def _reading(self, placement: Placement) -> Option:
        work, config = self.work, self.facts.text_encoder or {}
        passes = 2 if work.guided else 1
        operations = 2 * passes * work.prompts * work.text_tokens * self._part("text_encoder").parameters
        peak = text_encoder_peak(config, work.prompts, work.text_tokens, self.width)
        seconds = passes * self._in_blocks("text_encoder", placement, operations / passes / self.machine.compute)
        seconds += self._arrival(self.weights("text_encoder"), placement) if placement == "staged" else 0
        device = self.on_device("text_encoder", placement) + peak + self._embeddings() + self.workspace()
        return Option(device, 0, seconds, PLACEMENTS.index(placement))

    def _embeddings(self) -> int:
        return self.work.passes * self.work.text_tokens * self.facts.transformer["text_embed_dim"] * self.width

    def _codings(self, stage: str) -> tuple[Coding, ...]:
        work, geometry = self.work, self.facts.geometry
        frames, height, width = work.latents(geometry)
        if stage == "encode":
            pixels = geometry.pixel_size(height, width)
            shape = (1, self.facts.vae["in_channels"], geometry.padded_frames(work.encoded_frames), *pixels)
        else:
            shape = (work.videos, self.facts.vae["latent_channels"], frames - geometry.front_padding(frames), height, width)
        return codings(self.facts.vae_on_meta, stage, shape, getattr(torch, self.dtype), self.device)

    def _coded(self, coding: Coding, placement: Placement) -> Option:
        seconds = coding.operations * (_LEAN if coding.saving.lean else 1) / self.machine.compute
        seconds += self._arrival(self.weights("vae"), placement)
        device = self.on_device("vae", placement) + coding.device + self.workspace()
        return Option(device, coding.host, seconds, PLACEMENTS.index(placement) + coding.thrift, coding)

    def _denoising(self, placement: Placement, quantisation: str | None) -> Iterator[Option]:
        splits = (False, True) if self.work.passes > 1 else (False,)
        # Weights that are elsewhere between the layers need not be put aside; on a processor nothing is.
        releases = (False, True) if self.device != "cpu" and placement in ("resident", "staged") else (False,)
        for split, tokens, release in product(splits, _FF_TOKENS, releases):
            mode = TransformerMode(quantisation, split, tokens, release)
            part = self.transformer_pass(mode)
            if tokens is None or tokens < part.sequence:
                yield self._looped(mode, part, placement)

    def transformer_pass(self, mode: TransformerMode) -> TransformerPass:
        """One pass of the loop that saves memory in this way."""
        frames, height, width = self.work.latents(self.facts.geometry, seen=True)
        way = QUANTISATIONS[mode.quantisation] if mode.quantisation else None
        return TransformerPass(
            config=self.facts.transformer,
            batch=self.work.passes,
            frames=frames,
            latent_height=height,
            latent_width=width,
            text=self.work.text_tokens,
            width=self.width,
            split_batch=mode.split_batch,
            ff_tokens=mode.ff_tokens,
            attention=self.attention,
            float32_residual=self.facts.float32_residual,
            adapters=self.facts.adapters > 0,
            unpacked=self.width + way.float32_copies * _FLOAT if way else 0,
        )

    @cached_property
    def operations(self) -> float:
        """Of one pass: two per parameter of a block and token (but those of modulations), and the two products of attention."""
        part, facts = self.transformer_pass(TransformerMode()), self.facts.transformer_part
        linear = 2 * facts.block * part.sequence
        return part.batch * facts.blocks * (linear + 4 * part.sequence**2 * part.dim)

    def _looped(self, mode: TransformerMode, part: TransformerPass, placement: Placement) -> Option:
        config, facts = self.facts.transformer, self.facts.transformer_part
        frames, height, width = self.work.latents(self.facts.geometry)
        numbers = frames * height * width
        inputs = part.batch * numbers * config["in_channels"] * self.width
        steps = self.work.videos * numbers * (config["out_channels"] or config["in_channels"]) * _FLOAT * _STEP_COPIES
        modulation = facts.modulation * self.width
        tables = modulation_table_bytes(config, self.work.steps, self.width) + rotary_bytes(config, part.tokens)
        weights = self.on_device("transformer", placement, mode.quantisation)
        beside = tables + self._embeddings() + inputs + self.workspace()
        # Before the loop all weights are there, and the tables; in it, weights that are put aside are not.
        device = beside + weights + max(part.peak() - (modulation if mode.release_modulation else 0), steps, 0)

        computing = self.operations / self.machine.compute
        for slower, factor in ((mode.split_batch, _SPLIT), (mode.ff_tokens, _CHUNKED), (mode.quantisation, _UPCAST)):
            computing *= factor if slower else 1
        seconds = self.work.steps * self.work.windows * self._in_blocks("transformer", placement, computing, mode.quantisation)
        if placement == "staged":
            seconds += self._arrival(self.weights("transformer", mode.quantisation), placement)
        if mode.release_modulation:
            seconds += 2 * modulation / self.machine.link
        measures = (mode.split_batch, mode.ff_tokens, mode.quantisation, mode.release_modulation)
        host = modulation if mode.release_modulation else 0
        return Option(device, host, seconds, PLACEMENTS.index(placement) + sum(map(bool, measures)), mode)


def _pinned(size: int) -> int:
    """Bytes of pinned memory that PyTorch takes for so many: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0
