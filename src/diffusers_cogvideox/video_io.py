"""Video files in and out of uint8 frames, and still pictures of them: the only module that knows a codec."""

from __future__ import annotations

import mimetypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .files import atomic_path

__all__ = [
    "VideoInfo",
    "check_rate",
    "contact_sheet",
    "is_picture",
    "probe_image",
    "probe_video",
    "read_video",
    "sheet_frames",
    "to_uint8",
    "write_image",
    "write_video",
]

CONTAINERS = (".mp4", ".mov", ".m4v", ".mkv")
# One rate factor below "visually lossless" (18); 4:2:0 with the BT.709 matrix, named in the file so that players agree.
ENCODING = (
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv", "-c:v", "libx264", "-crf", "17", "-pix_fmt", "yuv420p"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
)

_ORIENTATION = 0x0112  # the Exif tag

Frames = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: number of frames, their size in pixels, frames per second, and the codec's name."""

    num_frames: int
    height: int
    width: int
    fps: float
    codec: str

    @property
    def seconds(self) -> float:
        """Playing time."""
        return self.num_frames / self.fps


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1] of any shape as bytes, rounded."""
    return np.rint(frames * 255).astype(np.uint8)


# --- writing ----------------------------------------------------------------------------------------------------------


def check_rate(fps: float) -> None:
    """Raise ValueError for frames per second that a file cannot have."""
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps={fps} is not possible: choose 0.01 to 1000 frames per second.")


def write_video(path: str | os.PathLike[str], frames: Frames | Iterable[Frames | Image.Image], fps: float) -> Path:
    """Encode frames as H.264 (yuv420p); the file appears when it is complete, and not at all when anything fails.

    Args:
        path: .mp4, .mov, .m4v or .mkv; missing folders are created.
        frames: uint8 (F, H, W, 3), or an iterable of such chunks or of single (H, W, 3) frames and PIL images, so that a
            video can be written while it is made.
        fps: frames per second.

    Returns the path. Raises ValueError for another suffix, dtype or shape, an odd height or width, no frames or an
    impossible rate; OSError for a folder that cannot be written and for a failing encoder.
    """
    target = Path(path)
    if target.suffix.lower() not in CONTAINERS:
        raise ValueError(f"cannot write {target}: the suffix must be one of {', '.join(CONTAINERS)}.")
    check_rate(fps)
    with atomic_path(target) as partial:
        chunks = _chunks(frames)
        first = next(chunks, None)
        if first is None:
            raise ValueError(f"cannot write {target}: there are no frames.")
        height, width = first.shape[1:3]
        if height % 2 or width % 2:
            raise ValueError(f"cannot write {target}: yuv420p needs even sizes, frames are {height}x{width} (height x width). Crop them.")
        with _encoder(partial, height, width, fps) as write:
            write(first)
            for chunk in chunks:
                if chunk.shape[1:] != first.shape[1:]:
                    raise ValueError(f"cannot write {target}: frames of {chunk.shape[1:]} follow frames of {first.shape[1:]}.")
                write(chunk)
    return target


def _chunks(frames: Frames | Iterable[Frames | Image.Image]) -> Iterator[np.ndarray]:
    """Non-empty uint8 arrays (F, H, W, 3)."""
    for chunk in [frames] if isinstance(frames, np.ndarray | torch.Tensor) else frames:
        array = _as_array(chunk)
        array = array[None] if array.ndim == 3 else array
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(
                f"frames must be uint8 of shape (frames, height, width, 3), not {array.dtype} of {array.shape}: "
                "scale to 0 ... 255, round, and put the channels last."
            )
        if len(array):
            yield array


def _as_array(frames: Any) -> np.ndarray:
    return frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)


@contextmanager
def _encoder(path: Path, height: int, width: int, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends uint8 frames (F, H, W, 3) to the video; kills the encoder when the block fails."""
    rate = str(Fraction(fps).limit_denominator(10_000))
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *ENCODING, "-movflags", "+faststart", str(path)]
    with tempfile.TemporaryFile() as log:
        # In its own session a Ctrl-C reaches only us, who then decide.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, start_new_session=True)
        stdin: IO[bytes] = process.stdin  # type: ignore[assignment]

        def finish() -> None:
            if process.wait():
                log.seek(0)
                raise OSError(f"the video encoder failed: {log.read().decode(errors='replace').strip()}")

        def write(frames: np.ndarray) -> None:
            try:
                for frame in frames:
                    stdin.write(np.ascontiguousarray(frame).data)
            except BrokenPipeError:
                finish()
                raise

        try:
            yield write
            stdin.close()
            finish()
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):  # frames that the dead encoder never took
                stdin.close()


# --- reading ----------------------------------------------------------------------------------------------------------


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """All frames of a video file as uint8 (F, H, W, 3), upright, and its frames per second.

    Every stored frame comes out once, also from a variable frame rate. Raises FileNotFoundError, and ValueError for a
    file that is not a video or is damaged.
    """
    raw, log = _ffmpeg(path, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo")
    info = _parse(path, log)
    frames = np.frombuffer(raw, np.uint8).reshape(-1, info.height, info.width, 3)
    return frames.copy(), info.fps  # bytes are read-only, and PyTorch wants to own what it wraps


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """What is in a video file, with its exact number of frames, without decoding it.

    Raises as `read_video` does, except for damage that only decoding brings to light.
    """
    return _parse(path, _ffmpeg(path, "-c", "copy", "-f", "null")[1])


def _ffmpeg(path: str | os.PathLike[str], *output: str) -> tuple[bytes, str]:
    """Output and log of ffmpeg for the first video stream of a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no video file {path}.")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-xerror", "-i", str(path), "-map", "0:v:0", *output, "-"]
    result = subprocess.run(command, capture_output=True, check=False)
    log = result.stderr.decode(errors="replace")
    if result.returncode:
        raise ValueError(f"{path} is not a video, or is damaged: {log.strip().splitlines()[-1]}")
    return result.stdout, log


_STREAM = re.compile(r"Stream #\S+ Video: (?P<codec>\w+).*?, (?P<width>\d+)x(?P<height>\d+)")
_RATE = re.compile(r"([\d.]+) (?:fps|tbr)")
_ROTATION = re.compile(r"rotation of (-?\d+)")
_COUNT = re.compile(r"frame=\s*(\d+)")


def _parse(path: str | os.PathLike[str], log: str) -> VideoInfo:
    """Read ffmpeg's log: the first stream it names is the file's, the last count is the total."""
    stream, rate, rotation = _STREAM.search(log), _RATE.search(log), _ROTATION.search(log)
    if stream is None or rate is None:
        raise ValueError(f"{path} has a video stream without a size or a frame rate.")
    size = int(stream["height"]), int(stream["width"])
    height, width = size[::-1] if rotation and int(rotation[1]) % 180 else size
    count = int(_COUNT.findall(log)[-1])
    return VideoInfo(num_frames=count, height=height, width=width, fps=float(rate[1]), codec=stream["codec"])


# --- pictures ---------------------------------------------------------------------------------------------------------


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a picture, not of a video."""
    return (mimetypes.guess_type(os.fspath(path))[0] or "").startswith("image/")


def probe_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Size (height, width) in pixels of a picture file, upright. Raises FileNotFoundError, and ValueError for a file that is no picture."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image file {path}.")
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION, 1) > 4  # 5 to 8 lie on their side
            return image.size if turned else image.size[::-1]
    except OSError as error:
        raise ValueError(f"{path} is not an image, or is damaged: {error}.") from error


def write_image(path: str | os.PathLike[str], image: Frames | Image.Image) -> Path:
    """Save a PIL image or a uint8 (H, W, 3) array; like `write_video`, whole or not at all. Returns the path.

    Raises ValueError for a suffix that names no picture format, OSError for a folder that cannot be written.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(_as_array(image))
    with atomic_path(path) as partial:
        picture.save(partial)
    return Path(path)


def contact_sheet(videos: Frames | Sequence[Frames], *, columns: int = 8, labels: Sequence[str] | None = None, gap: int = 4) -> Image.Image:
    """One row per video, of `columns` frames spread evenly from the first to the last, under its label.

    Args:
        videos: one video or several, each uint8 (F, H, W, 3); sizes and lengths may differ. A shorter video than
            `columns` shows each frame once.
        columns: frames per row.
        labels: one text per video; long ones are wrapped.
        gap: white pixels around every frame.

    Raises ValueError for no videos, for frames of another dtype or shape, and for another number of labels.
    """
    single = isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 4
    arrays = [np.concatenate(list(_chunks(_as_array(video)))) for video in ([videos] if single else videos)]
    if not arrays or columns < 1:
        raise ValueError(f"a contact sheet needs at least one video and one column, not {len(arrays)} and {columns}.")
    if labels is not None and len(labels) != len(arrays):
        raise ValueError(f"{len(labels)} labels for {len(arrays)} videos: pass one per video.")
    width = max(min(columns, len(video)) * (video.shape[2] + gap) + gap for video in arrays)
    rows = [_row(video, columns, gap) for video in arrays]
    if labels is not None:
        rows = [part for label, row in zip(labels, rows, strict=True) for part in (_text(label, width, gap), row)]
    sheet = Image.new("RGB", (width, gap + sum(row.height for row in rows)), "white")
    top = gap
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def sheet_frames(count: int, columns: int = 8) -> list[int]:
    """Numbers of the frames, of `count`, that a contact sheet shows: at most `columns`, spread evenly from the first to the last.

    >>> sheet_frames(9, 3)
    [0, 4, 8]
    """
    return np.linspace(0, count - 1, min(columns, count)).round().astype(int).tolist()


def _row(video: np.ndarray, columns: int, gap: int) -> Image.Image:
    """Evenly spread frames of one video (F, H, W, 3) side by side."""
    count, height, width, _ = video.shape
    chosen = sheet_frames(count, columns)
    row = Image.new("RGB", (len(chosen) * (width + gap) + gap, height + gap), "white")
    for i, frame in enumerate(video[chosen]):
        row.paste(Image.fromarray(frame), (gap + i * (width + gap), 0))
    return row


def _text(text: str, width: int, gap: int) -> Image.Image:
    """`text` in black on white, wrapped at words to `width` pixels."""
    font = ImageFont.load_default()
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        fits = lines and font.getlength(longer) <= width - 2 * gap
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    drawing = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    block = "\n".join(lines)
    bottom = int(drawing.multiline_textbbox((gap, 0), block, font=font)[3])
    picture = Image.new("RGB", (width, bottom + gap), "white")
    ImageDraw.Draw(picture).multiline_text((gap, 0), block, fill="black", font=font)
    return picture
