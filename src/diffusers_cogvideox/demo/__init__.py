"""The small model of moving shapes that ships with the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["demo_model"]


def demo_model() -> Path:
    """The folder of the shipped model, in the layout that `CogVideoXPipeline.from_pretrained` reads.

    Raises:
        FileNotFoundError: when the package was installed without the weights.
    """
    folder = Path(__file__).parent
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"this installation lacks the weights of the small model ({folder} holds no model_index.json). Install the package "
            "again from a complete archive, or name another model."
        )
    return folder
