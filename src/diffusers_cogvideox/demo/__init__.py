"""The small models of moving shapes that ship with the package: text to video, and its image-to-video sibling."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME

__all__ = ["demo_image_model", "demo_model"]

_ROOT = Path(__file__).parent
_IMAGE = _ROOT / "image_to_video"  # only what differs from the text-to-video model: the transformer
_SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")
_SAMPLING = "cogvideox.json"  # how to sample, the same for both


def demo_model() -> Path:
    """The folder of the shipped text-to-video model, in the layout that `CogVideoXPipeline.from_pretrained` reads.

    Raises:
        FileNotFoundError: when the package was installed without the weights.
    """
    return _whole(_ROOT)


def demo_image_model() -> Path:
    """The folder of the shipped image-to-video model, in the layout that `CogVideoXImageToVideoPipeline.from_pretrained` reads.

    The package holds the parts that the two models share once. So this folder is put together in the cache of the Hugging Face
    libraries when it is first asked for, under a name that changes with its contents.

    Raises:
        FileNotFoundError: when the package was installed without the weights.
        OSError: when the cache cannot be written.
    """
    sources = [_whole(_IMAGE), *(_whole(_ROOT) / name for name in _SHARED)]
    folder = Path(HF_HOME) / "diffusers_cogvideox" / f"shapes-image-to-video-{_digest(sources)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        target = Path(partial) / "model"
        shutil.copytree(sources[0], target)
        for source in sources[1:]:
            shutil.copytree(source, target / source.name)
        shutil.copy(_ROOT / _SAMPLING, target)
        try:
            target.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _whole(folder: Path) -> Path:
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"this installation lacks the weights of the small model ({folder} holds no model_index.json). Install the package "
            "again from a complete archive, or name another model."
        )
    return folder


def _digest(folders: list[Path]) -> str:
    """Of how to sample, and the names and contents of all files in the folders."""
    digest = hashlib.sha256((_ROOT / _SAMPLING).read_bytes())
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
