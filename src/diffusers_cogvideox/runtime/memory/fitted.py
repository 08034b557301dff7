"""A plan that is carried out: models in their places, stage by stage, and planned anew for a larger call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..out_of_memory import free_unused_memory
from ..quantisation import quantisation_of, quantise
from ..streaming import is_streamed, stop_streaming, stream
from .costs import Placement
from .facts import ModelFacts
from .plan import Plan
from .planner import make_plan
from .staged import Staged
from .workload import Workload

__all__ = ["Budget", "Fitted"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a plan may take: see `make_plan`. `folder` holds the weights of the parts, for those that are read from disk."""

    device: torch.device
    vram: int | None = None
    ram: int | None = None
    quantisation: str | None = None
    folder: Path | None = None

    def plan(self, facts: ModelFacts, work: Workload, dtype: str) -> Plan:
        """The plan for a workload. Raises ValueError where none fits."""
        return make_plan(
            facts,
            work,
            device=self.device.type,
            vram=self.vram,
            ram=self.ram,
            dtype=dtype,
            quantisation=self.quantisation,
            from_disk=self.folder is not None,
        )


class Fitted:
    """The models of a pipeline under a plan.

    Args:
        parts: the models by their names in the plan; a text encoder may be None.
        budget: what they may take.
        facts: of the model.
        plan: the first plan.
    """

    def __init__(self, parts: Mapping[str, Any], budget: Budget, facts: ModelFacts, plan: Plan) -> None:
        self.parts = {name: model for name, model in parts.items() if model is not None}
        self.budget, self.facts, self.plan = budget, facts, plan
        self.places: dict[str, Placement] = {name: "disk" for name, model in self.parts.items() if is_streamed(model)}
        self.staged: dict[str, Staged] = {}
        self.stage: str | None = None  # that runs
        self._carry_out()

    def ensure(self, work: Workload, facts: ModelFacts) -> None:
        """Plan anew where a call is larger than the plan, or a LoRA has come.

        Raises ValueError, with nothing changed, where no plan fits.
        """
        if self.plan.work.covers(work) and facts.adapters <= self.facts.adapters:
            return
        plan = self.budget.plan(facts, self.plan.work.joined(work), self.plan.dtype)
        logger.info(f"The memory plan is made anew for {plan.work}.")
        self.follow(plan, facts)

    def follow(self, plan: Plan, facts: ModelFacts) -> None:
        """Go over to another plan within the same budget; what is in its place stays there."""
        self.plan, self.facts = plan, facts
        self._carry_out()

    def enter(self, stage: str) -> None:
        """Make room for a stage, unless it goes on, and let the VAE work as planned."""
        if stage == self.stage:
            return
        self.stage = stage
        part = next((found.part for found in self.plan.stages if found.name == stage), None)
        for name, staged in self.staged.items():
            if name != part:
                staged.offload()
        free_unused_memory()  # of the stage before; on a processor it would count for this one
        if stage in self.plan.coding:
            self.parts["vae"].saving = self.plan.coding[stage]

    def rest(self) -> None:
        """Between calls: what is only staged leaves the device."""
        self.stage = None
        self._make_room()

    def undo(self) -> None:
        """All models in host memory, as they were before but for quantised blocks, and without measures."""
        for name in list(self.places):
            self._leave(name)
        transformer, vae = self.parts["transformer"], self.parts["vae"]
        transformer.split_batch(False)
        transformer.chunk_feed_forward(None)
        transformer.release_modulation(False)
        vae.saving = None

    def _make_room(self) -> None:
        for staged in self.staged.values():
            staged.offload()

    # --- places -----------------------------------------------------------------------------------------------------

    def _carry_out(self) -> None:
        """Bring every part to its place; those that leave the device first."""
        moved = {name: place for name, place in self.plan.placements.items() if name in self.parts and self.places.get(name) != place}
        quantisation = self.plan.transformer.quantisation
        quantises = quantisation is not None and quantisation_of(self.parts["transformer"]) is None
        for name in [name for name in self.places if name in moved or (quantises and name == "transformer")]:
            self._leave(name)
        if quantisation is not None and quantises:
            quantise(self.parts["transformer"], quantisation, self.budget.device)
            moved["transformer"] = self.plan.placements["transformer"]
        for name, place in sorted(moved.items(), key=lambda item: item[1] == "resident"):
            self._enter(name, place)
        transformer, mode = self.parts["transformer"], self.plan.transformer
        transformer.split_batch(mode.split_batch)
        transformer.chunk_feed_forward(mode.ff_tokens)
        transformer.release_modulation(mode.release_modulation)
        free_unused_memory()

    def _leave(self, name: str) -> None:
        """Undo a part's placement: its weights are in host memory."""
        place = self.places.pop(name)
        if place == "staged":
            self.staged.pop(name).remove()
        elif place in ("streamed", "disk"):
            stop_streaming(self.parts[name])
        elif self.budget.device.type != "cpu":
            self.parts[name].to("cpu")

    def _enter(self, name: str, place: Placement) -> None:
        model, device = self.parts[name], self.budget.device
        if place == "resident":
            model.to(device)
        elif place == "staged":
            self.staged[name] = Staged(model.to("cpu"), device, before=self._make_room)
        elif place == "streamed":
            stream(model.to("cpu"), device)
        else:
            folder = self.budget.folder
            assert folder is not None, "plans read from disk only where there is a folder"
            stream(model.to("cpu"), device, source="disk", directory=folder / name)
        self.places[name] = place
