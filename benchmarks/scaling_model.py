"""What several GPUs should give, computed: work and bytes of a rank in one denoise step, and the time both take on assumed hardware.

    python benchmarks/scaling_model.py            # prints the tables of docs/parallel.md
    python benchmarks/scaling_model.py --write    # puts them there

No GPUs have measured this. The work is counted from the configs of the released models, the bytes are those that the package's collectives
send (a test counts them), and the speeds are assumptions, named below.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusers_cogvideox import PRESETS, Geometry
from diffusers_cogvideox.models.collectives import shares
from diffusers_cogvideox.runtime.parallel import Roles, divide_roles

__all__ = ["MACHINES", "Machine", "Video", "Work", "step_seconds", "tables", "work"]

PAGE = Path(__file__).parents[1] / "docs" / "parallel.md"
START, END = "<!-- made by benchmarks/scaling_model.py -->", "<!-- end -->"

BYTES = 2  # bfloat16
PASSES = 14  # times that a block reads or writes all channels of all tokens besides its matrix products, when it is compiled


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind and what joins them: FLOP/s of matrix products and of attention, bytes/s of memory, link and network, one way."""

    name: str
    matmul: float
    attention: float
    memory: float
    link: float
    network: float
    per_host: int = 8


MACHINES = (
    Machine("H200, NVLink", 700e12, 600e12, 4.3e12, 360e9, 40e9),
    Machine("RTX 4090, PCIe 4.0", 140e12, 120e12, 0.9e12, 20e9, 3e9),
)


@dataclass(frozen=True)
class Video:
    """The transformer's sizes for one guided video: layers, width D, heads, text tokens, video tokens, samples, features of a token."""

    layers: int
    width: int
    heads: int
    text: int
    video: int
    samples: int = 2
    features: int = 64

    @classmethod
    def of(cls, preset: str) -> Video:
        """The native video of a released model."""
        row = PRESETS[preset]
        config = row.transformer
        geometry = Geometry.from_configs(row.vae, config)
        frames, height, width = geometry.latent_shape(row.num_frames, row.height, row.width)
        t, h, w = geometry.token_grid(frames + geometry.front_padding(frames), height, width)
        heads, channels = config["num_attention_heads"], config["attention_head_dim"]
        features = config["out_channels"] * geometry.patch_size**2 * geometry.patch_size_t
        return cls(config["num_layers"], heads * channels, heads, row.max_sequence_length, t * h * w, features=features)


@dataclass(frozen=True)
class Work:
    """What the busiest rank does in one step: FLOPs, bytes of elementwise memory traffic, bytes received from other ranks."""

    matmul: float
    attention: float
    traffic: float
    inside: float  # within a host, where the roles fit into one
    across: float  # for the halves of guidance


def work(video: Video, roles: Roles, element: int = BYTES) -> Work:
    """The step of the busiest rank, with numbers of `element` bytes."""
    samples = video.samples / roles.halves
    spread, tokens = roles.ring * roles.ulysses, video.text + video.video
    own = (shares(video.text, spread)[0] + shares(video.video, spread)[0]) if spread > 1 else tokens
    heads = shares(video.heads, roles.ulysses * roles.tensor)[0] / video.heads
    channels = shares(4 * video.width, roles.tensor)[0] / (4 * video.width)
    dense = video.layers * samples * own * video.width**2
    matmul = 2 * dense * (4 * (heads if roles.tensor > 1 else 1) + 8 * channels)
    queries = tokens / roles.ring
    attention = 4 * video.layers * samples * queries * tokens * heads * video.width
    traffic = video.layers * PASSES * samples * own * video.width * element
    return Work(matmul, attention, traffic, _received(video, roles, samples, element), _halves(video, roles))


def _received(video: Video, roles: Roles, samples: float, element: int) -> float:
    """Bytes that a rank receives in the blocks, and of the other ranks' results at the end."""
    tokens, spread = video.text + video.video, roles.ring * roles.ulysses
    whole = samples * tokens * video.width * element
    part = whole / roles.ring / roles.ulysses
    ulysses = 4 * part * (roles.ulysses - 1) / roles.ulysses
    ring = 2 * whole / roles.ulysses * (roles.ring - 1) / roles.ring
    tensor = 4 * whole * (roles.tensor - 1) / roles.tensor  # two sums, each scattered and gathered
    last = samples * video.video * video.features * element * (spread - 1) / spread
    return video.layers * (ulysses + ring + tensor) + last


def _halves(video: Video, roles: Roles) -> float:
    """Bytes of the other half's prediction."""
    return video.samples / 2 * video.video * video.features * BYTES if roles.halves > 1 else 0.0


def step_seconds(video: Video, roles: Roles, machine: Machine) -> float:
    """Seconds of one step, nothing done at the same time: computing, memory traffic, receiving, by the slowest link of the group."""
    todo = work(video, roles)
    ranks = roles.halves * roles.ring * roles.ulysses * roles.tensor
    inner = ranks // roles.halves
    inside = machine.link if inner <= machine.per_host else machine.network
    across = machine.link if ranks <= machine.per_host else machine.network
    computing = todo.matmul / machine.matmul + todo.attention / machine.attention + todo.traffic / machine.memory
    return computing + todo.inside / inside + todo.across / across


MODELS = {"5b": "CogVideoX-5B, 49 frames of 480x720", "1.5-5b": "CogVideoX-1.5-5B, 81 frames of 768x1360"}


def tables() -> str:
    """The tables of docs/parallel.md, one for each model."""
    return "\n\n".join("\n".join(_table(preset, title)) for preset, title in MODELS.items())


def _table(preset: str, title: str) -> Iterator[str]:
    video = Video.of(preset)
    yield f"**{title}**: {video.text + video.video} tokens, {video.heads} heads, two halves.\n"
    columns = [f"{machine.name}: s a step (times as fast)" for machine in MACHINES]
    yield "| GPUs | `--parallel` | PFLOP a step and rank | GB received a step and rank | " + " | ".join(columns) + " |"
    yield "|---" * (4 + len(MACHINES)) + "|"
    for count in (1, 2, 4, 8, 16):
        for mode in ("auto",) if count == 1 else ("auto", "ulysses", "ring", "tensor"):
            roles = divide_roles(mode, count, heads=video.heads, guided=True)
            todo = work(video, roles)
            times = []
            for machine in MACHINES:
                seconds, alone = step_seconds(video, roles, machine), step_seconds(video, Roles(), machine)
                times.append(f"{seconds:.3g} ({alone / seconds:.2f})")
            hosts = " (two hosts)" if count > MACHINES[0].per_host else ""
            flops = f"{(todo.matmul + todo.attention) / 1e15:.3f}"
            yield f"| {count}{hosts} | {mode} | {flops} | {(todo.inside + todo.across) / 1e9:.2f} | {' | '.join(times)} |"


def main() -> None:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/parallel.md")
    if not parser.parse_args().write:
        print(tables())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
