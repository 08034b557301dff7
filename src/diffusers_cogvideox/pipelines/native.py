"""What a model was trained for, as its config and the presets tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..geometry import Geometry
from ..presets import match_preset

__all__ = ["native_call"]


def native_call(config: Mapping[str, Any], geometry: Geometry) -> dict[str, int]:
    """What a call uses for frames, size and text length when it is told nothing, for a transformer of this config.

    CogVideoX 1.5 states the size of its position table in its config, not that of its videos, and a text length that it was not
    trained with; those come from the presets.
    """
    preset = match_preset(config)
    height, width = geometry.pixel_size(config["sample_height"], config["sample_width"])
    if preset and all(config[key] == preset.transformer[key] for key in ("sample_height", "sample_width")):
        height, width = preset.height, preset.width
    length = config["max_text_seq_length"]
    if preset and length == preset.transformer["max_text_seq_length"]:
        length = preset.max_sequence_length
    return {"num_frames": config["sample_frames"], "height": height, "width": width, "max_sequence_length": length}
