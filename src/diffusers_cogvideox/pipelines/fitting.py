"""Pipelines that fit themselves into memory, and tell what they took."""

# Annotations stay real objects here: see base.py.

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import T5EncoderModel

from ..models.transformer import CogVideoXTransformer3DModel
from ..runtime.effects import summary
from ..runtime.memory.available import free_ram, free_vram
from ..runtime.memory.facts import ModelFacts
from ..runtime.memory.fitted import Budget, Fitted
from ..runtime.memory.plan import Plan
from ..runtime.memory.report import Report, active_measures
from ..runtime.memory.usage import Usage
from ..runtime.memory.workload import Workload, encoded_frames
from ..runtime.quantisation import QUANTISATIONS, check_possible, check_quantisation, load_quantised, quantisation_of
from ..runtime.streaming import load_streamed
from ..units import parse_memory
from .folder import INDEX, component_names, read_json
from .native import native_call
from .request import Request
from .windows import context_of, in_windows

__all__ = ["FittingMixin"]

_PARTS = ("text_encoder", "transformer", "vae")
_STREAMED = {"text_encoder": T5EncoderModel, "transformer": CogVideoXTransformer3DModel}


class FittingMixin(DiffusionPipeline):
    """`fit`, which places the models by a memory plan, and `report`, which tells what a call took."""

    _fitted: Fitted | None = None
    _usage: Usage | None = None

    def fit(
        self,
        vram: str | int | None = None,
        ram: str | int | None = None,
        *,
        device: str | torch.device | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        videos: int = 1,
        steps: int = 50,
        window: int | None = None,
        quantisation: str | None = None,
    ) -> Plan:
        """Place the models so that a call fits into memory, in the fastest way; moving the pipeline with `to` is not needed.

        A later call that asks for more than the plan was made for plans anew, or raises before anything runs. Results stay the same to
        rounding, unless the plan quantises the transformer, which cannot be undone. A second `fit` replaces the first. Ranks that work
        together (`share_work`, before) fit with the same amounts, so that they make the same plan, for one half of guidance and a share
        of the weights where these are shared.

        Args:
            vram: most that PyTorch may allocate on the device, as "8GB" (10**9 bytes), "8GiB" (2**30 bytes) or a number of bytes; by
                default what is free there.
            ram: most that the process may take in the memory of the host, likewise.
            device: where to run, by default the GPU if there is one.
            height, width, num_frames, videos, steps: of the largest call, by default one video of the size that the model was trained for.
            window: frames of its context windows (`ContextWindows`), None without.
            quantisation: one of `runtime.quantisation.QUANTISATIONS` that the plan may use, such as "int8", where no plan that keeps the
                result fits or is as fast; by default none. A transformer that is quantised already stays so.

        Returns:
            the plan; `print(plan.table())` shows it.

        Raises:
            ValueError: where nothing fits, naming the smallest budget that would; for an amount without a unit; for a pipeline that is
                offloaded already; for a quantisation that is not possible here.
            ImportError: the quantisation's package is not installed.
        """
        place = _resolved(device)
        sizes = _given({"height": height, "width": width, "num_frames": num_frames})
        work = _workload_of(type(self).__name__, self.call_defaults() | sizes, videos, steps)  # type: ignore[attr-defined]
        work = replace(in_windows(work, context_of(window), self.geometry), sequential=self._has_a_half)
        budget = _budget(place, self._folder(), vram=vram, ram=ram, quantisation=quantisation)
        facts = ModelFacts.of_pipeline(self)
        if quantisation is not None:
            _refuse_shares(facts)
            check_possible(self.transformer, quantisation, place)
        plan = budget.plan(facts, work, str(self.transformer.dtype).removeprefix("torch."))
        if self._fitted is not None and self._fitted.budget == budget:
            self._fitted.follow(plan, facts)
            return plan
        if self._fitted is not None:
            self._fitted.undo()
        else:
            self._refuse_offloaded()
        self._fitted = Fitted({name: getattr(self, name) for name in _PARTS}, budget, facts, plan)
        return plan

    @property
    def memory_plan(self) -> Plan | None:
        """The plan that the pipeline follows, None without."""
        return self._fitted.plan if self._fitted else None

    def report(self) -> Report:
        """What the last call took: the plan, what was active, time and peak memory of each stage, as predicted and as measured.

        Frames that are decoded while they are read count as they come. `print(report)` shows it, `report.to_json()` gives JSON values.
        """
        return Report(
            plan=self.memory_plan,
            active=tuple(active_measures(self)),
            stages=dict(self._usage.stages) if self._usage else {},
            effects=tuple(summary(self)),
        )

    def take_over_fit(self, other: "FittingMixin") -> None:
        """Go on with the memory plan of another pipeline over the same models."""
        self._fitted = other._fitted

    # --- in a call --------------------------------------------------------------------------------------------------

    def _begin(self, request: Request) -> None:
        """Before anything runs: see that the plan covers a request. Raises ValueError where none fits."""
        self._usage = Usage()
        if self._fitted is not None:
            self._fitted.ensure(self._workload(request), ModelFacts.of_pipeline(self))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Run the block as a stage of a call: what it does not need leaves the device; time and memory are measured."""
        if self._fitted is not None:
            self._fitted.enter(name)
        if self._usage is None:
            self._usage = Usage()
        with self._usage.stage(name, self._execution_device):
            yield

    @property
    def _execution_device(self) -> torch.device:
        """Where the models work, which may be elsewhere than they are."""
        return self._fitted.budget.device if self._fitted else super()._execution_device

    def maybe_free_model_hooks(self) -> None:
        """Let offloading take the models back."""
        super().maybe_free_model_hooks()
        if self._fitted is not None:
            self._fitted.rest()

    # --- sizes ------------------------------------------------------------------------------------------------------

    def _workload(self, request: Request) -> Workload:
        """What a request takes."""
        embeds = request.inputs.prompt_embeds
        work = Workload(
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            videos=request.count,
            guided=request.guided,
            sequential=request.sequential_guidance or self._has_a_half,
            steps=request.steps,
            text_tokens=request.max_sequence_length if embeds is None else embeds.shape[1],
            prompts=max(request.inputs.count, len(request.inputs.starts)) if request.reads_text else 0,
            encoded_frames=encoded_frames(type(self).__name__, request.num_frames),
        )
        return in_windows(work, request.context, self.geometry)

    @property
    def _has_a_half(self) -> bool:
        """Whether ranks share the halves of guidance, which leaves no more samples for each than one half after the other."""
        group = getattr(self.transformer, "batch_group", None)
        return group is not None and group.size > 1

    # --- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, memory: str | int | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Load a pipeline from a folder or a hub repository; arguments as in `DiffusionPipeline.from_pretrained`, and one more.

        Args:
            pretrained_model_name_or_path: folder, or repository on the hub.
            memory: fit the pipeline into memory at once: "auto" into what is free; an amount such as "8GB", of the GPU's memory where there
                is one, else of the host's; or a dictionary of the arguments of `fit`. What is read from disk is never in memory as a whole.
            kwargs: as in diffusers.

        Raises:
            FileNotFoundError, OSError: for a folder that is not there or not whole.
            ValueError: where nothing fits, naming the smallest budget that would.
        """
        if memory is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        source = Path(pretrained_model_name_or_path)
        if not source.is_dir():
            told = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "revision", "token", "variant") if name in kwargs}
            source = Path(cls.download(str(pretrained_model_name_or_path), **told))
        fitting: dict[str, Any] = dict(memory) if isinstance(memory, Mapping) else {}
        place = _resolved(fitting.pop("device", None))
        if not isinstance(memory, Mapping) and memory != "auto":
            fitting["ram" if place.type == "cpu" else "vram"] = parse_memory(memory, "memory")
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype", torch.float32))
        facts, native = _facts_of(source, cls.__name__)
        work = _workload_of(cls.__name__, native | _given(fitting), fitting.get("videos", 1), fitting.get("steps", 50))
        work = in_windows(work, context_of(fitting.get("window")), facts.geometry)
        limits = {name: fitting.get(name) for name in ("vram", "ram", "quantisation")}
        plan = _budget(place, source, **limits).plan(facts, work, str(dtype).removeprefix("torch."))
        quantisation = plan.transformer.quantisation
        if quantisation and "transformer" not in kwargs:
            how = {"dtype": dtype, "variant": kwargs.get("variant")}
            kwargs["transformer"] = load_quantised(_STREAMED["transformer"], source / "transformer", quantisation, place, **how)
        elif quantisation and QUANTISATIONS[quantisation].while_loading and quantisation_of(kwargs["transformer"]) is None:
            raise ValueError(
                f"{quantisation} quantises a transformer while it is loaded, and transformer=... was passed: leave it out, or pass what "
                f"load_quantised(..., {quantisation!r}) gives."
            )
        elif fitting.get("quantisation") and QUANTISATIONS[fitting["quantisation"]].while_loading:
            del fitting["quantisation"]
        for name in [name for name, where in plan.placements.items() if where == "disk" and name not in kwargs]:
            kwargs[name] = load_streamed(_STREAMED[name], source / name, place, dtype=dtype)
        pipe = super().from_pretrained(source, **kwargs)
        pipe.fit(**fitting, device=place)
        return pipe

    def _folder(self) -> Path | None:
        """The folder that the pipeline was loaded from, for what is read from disk; None for a share of its weights, which is not there."""
        if getattr(self.transformer, "tensor_ranks", 1) > 1:
            return None
        folder = Path(self.name_or_path) if getattr(self, "name_or_path", None) else None
        if folder is None and self._fitted is not None:  # a pipeline over the models of another one
            return self._fitted.budget.folder
        return folder if folder is not None and (folder / "transformer").is_dir() else None

    def _refuse_offloaded(self) -> None:
        for name in _PARTS:
            model = getattr(self, name)
            if model is not None and any(map(_is_offloaded, model.modules())):
                raise ValueError(
                    f"{name} is offloaded already, and fit() places the models itself: call pipe.remove_all_hooks() (or load the pipeline "
                    "anew), and fit it first."
                )


def _is_offloaded(module: torch.nn.Module) -> bool:
    """Whether accelerate's or diffusers' offloading acts on a module itself."""
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or (registry is not None and registry.get_hook("group_offloading") is not None)


def _refuse_shares(facts: ModelFacts) -> None:
    """Raise ValueError for a transformer of which each rank has a share of the weights."""
    if facts.tensor_ranks > 1:
        raise ValueError(f"{facts.tensor_ranks} ranks share the transformer's weights (tensor parallelism): leave quantisation out.")


def _resolved(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(0, device=device).device


def _budget(
    device: torch.device,
    folder: Path | None,
    vram: str | int | None = None,
    ram: str | int | None = None,
    quantisation: str | None = None,
) -> Budget:
    """Limits that are not given are what is free.

    Raises ValueError for an amount without a unit; ValueError or ImportError for a quantisation that cannot be used here.
    """
    if quantisation is not None:
        check_quantisation(quantisation, device)
    return Budget(
        device=device,
        vram=free_vram(device) if vram is None else parse_memory(vram, "vram"),
        ram=free_ram() if ram is None else parse_memory(ram, "ram"),
        quantisation=quantisation,
        folder=folder,
    )


def _given(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Height, width and number of frames, as far as they are given."""
    return {name: value for name in ("height", "width", "num_frames") if (value := sizes.get(name)) is not None}


def _workload_of(pipeline: str, sizes: Mapping[str, int], videos: int, steps: int) -> Workload:
    """A guided call of a pipeline, by its class name, for what `call_defaults` names."""
    return Workload(
        height=sizes["height"],
        width=sizes["width"],
        num_frames=sizes["num_frames"],
        videos=videos,
        prompts=videos,
        steps=steps,
        text_tokens=sizes["max_sequence_length"],
        encoded_frames=encoded_frames(pipeline, sizes["num_frames"]),
    )


def _facts_of(folder: Path, pipeline: str) -> tuple[ModelFacts, dict[str, int]]:
    """Facts of a pipeline folder, from its configs, and what a call of `pipeline` makes when it is told nothing."""
    files = {name: folder / name / "config.json" for name in component_names(folder)}
    configs = {name: read_json(file) for name, file in files.items() if file.is_file()}
    lacking = sorted({"transformer", "vae"} - set(configs))
    if lacking:
        raise ValueError(f"{folder / INDEX} names no {' and no '.join(lacking)}: a memory plan needs a whole pipeline.")
    facts = ModelFacts(folder.name, pipeline, configs["transformer"], configs["vae"], configs.get("text_encoder"))
    return facts, native_call(facts.transformer, facts.geometry)
