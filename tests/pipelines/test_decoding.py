"""Decoding chunk by chunk: every output type is one walk, memory that runs out costs a second attempt, latents are never lost."""

import gc
import weakref

import numpy as np
import pytest
import torch

from diffusers_cogvideox import AutoencoderKLCogVideoX, CogVideoXContinuationPipeline, CogVideoXPipeline
from diffusers_cogvideox.video_io import read_video, write_video
from parity import StockVAE
from tiny_pipeline import call

SHORT = {"num_inference_steps": 1, "guidance_scale": 1.0}
CHUNKS = (9, 8, 8)  # frames of a piece: what the VAE's chunks of latents give


@pytest.fixture
def own(folders) -> CogVideoXPipeline:
    """A pipeline whose models no other test sees."""
    return CogVideoXPipeline.from_pretrained(folders())


def nothing(vae, number):
    """What happens before a piece where nothing is to happen."""


@pytest.fixture
def pieces(monkeypatch):
    """Makes `decode_stream` yield in chunks of CHUNKS, and calls `pieces.before(vae, number)` before each."""

    class Control:
        def __init__(self):
            self.before, self.runs, self.yielded = nothing, 0, []

    control = Control()

    def decode_stream(vae, z):
        control.runs += 1
        with torch.no_grad():
            whole, start = vae.decode(z).sample, 0
        for number, length in enumerate(CHUNKS):
            if start >= whole.shape[2]:
                break
            control.before(vae, number)
            control.yielded.append(number)
            yield whole[:, :, start : start + length]
            start += length

    monkeypatch.setattr(AutoencoderKLCogVideoX, "decode_stream", decode_stream)
    return control


def out_of_memory_at(number: int, times: int = 1):
    """What fails before the piece `number`, so many times."""
    left = [times]

    def before(vae, current):
        if current == number and left[0]:
            left[0] -= 1
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    return before


# --- one walk, several forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [{"num_frames": 25}, {"num_frames": 19, "height": 36, "width": 50}, {"num_frames": 1}])
def test_every_form_shows_what_decode_gives(pipe, pieces, size):
    """Against the VAE called by hand and cropped by hand."""
    height, width = size.get("height", 32), size.get("width", 48)
    frames, *cells = pipe.geometry.latent_shape(size["num_frames"], height, width)
    latents = torch.randn(1, frames, 4, *cells)
    with torch.no_grad():
        whole = pipe.vae.decode(latents.transpose(1, 2) / pipe.vae.config.scaling_factor).sample
    top, left = (whole.shape[-2] - height) // 2, (whole.shape[-1] - width) // 2
    expected = (whole[:, :, : size["num_frames"], top : top + height, left : left + width] / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    form = {"num_frames": size["num_frames"], "height": height, "width": width}
    assert torch.equal(pipe.decode_frames(latents, **form, output_type="pt"), expected)
    array = pipe.decode_frames(latents, **form, output_type="np")
    assert np.array_equal(array, expected.movedim(2, -1).numpy())
    chunks = list(pipe.decode_frames(latents, **form, output_type="stream")[0])
    assert np.array_equal(np.concatenate(chunks), np.rint(array[0] * 255).astype(np.uint8))
    pictures = pipe.decode_frames(latents, **form)
    assert all(np.array_equal(picture, frame) for picture, frame in zip(pictures[0], np.concatenate(chunks), strict=True))


def test_a_stream_is_what_the_call_gives(pipe, pieces):
    (stream,) = call(pipe, output_type="stream", num_frames=25)
    array = call(pipe, output_type="np", num_frames=25)
    assert [len(chunk) for chunk in stream] == [9, 8, 8]
    assert vars(stream.extent) == {"num_frames": 25, "height": 32, "width": 48}
    assert np.array_equal(np.concatenate(list(stream)), np.rint(array[0] * 255))  # a second iteration decodes again


def test_streams_of_several_videos(pipe, pieces):
    both = call(pipe, output_type="stream", num_videos_per_prompt=2, num_frames=17)
    latents = torch.cat([stream.latents for stream in both])
    for number in (1, 0):  # in any order
        alone = pipe.decode_frames(latents[number : number + 1], output_type="np")[0]
        assert np.array_equal(np.concatenate(list(both[number])), np.rint(alone * 255))
    assert not torch.equal(latents[0], latents[1])


def test_a_stream_is_written_while_it_is_decoded(pipe, pieces, tmp_path):
    """No more than a chunk is decoded ahead, and none stays behind."""
    alive, order = [], []
    pieces.before = lambda _, number: order.append((number, sum(ref() is not None for ref in alive)))
    (stream,) = call(pipe, output_type="stream", num_frames=25, **SHORT)
    assert order == []  # nothing is decoded before it is wanted

    def watched():
        for chunk in stream:
            alive.append(weakref.ref(chunk))
            yield chunk

    path = write_video(tmp_path / "a.mp4", watched(), 8)
    assert len(read_video(path)[0]) == 25
    gc.collect()
    assert [number for number, _ in order] == [0, 1, 2]
    assert max(held for _, held in order) <= 2  # the writer's first chunk, for its size, and its last


def test_diffusers_vae_decodes_in_one_piece(loaded, pipe):
    """Pipelines accept diffusers' own models."""
    stock = StockVAE.from_config(pipe.vae.config).eval()
    stock.load_state_dict(pipe.vae.state_dict())
    expected = call(pipe, num_frames=17)
    pipe.vae = stock
    torch.testing.assert_close(call(pipe, num_frames=17), expected, atol=1e-4, rtol=0)


def test_gradients_are_as_the_reader_wants_them(pipe, pieces):
    (stream,) = call(pipe, output_type="stream", num_frames=17, **SHORT)
    for _ in stream:
        assert torch.is_grad_enabled()


def test_continuations_are_handed_out_too(pipe):
    longer = CogVideoXContinuationPipeline(**pipe.components)
    given = torch.rand(9, 3, 32, 48)
    options = {"video": given, "num_frames": 8, "window_frames": 17, **SHORT}
    (stream,), array = (call(longer, output_type=kind, **options) for kind in ("stream", "np"))
    assert np.array_equal(np.concatenate(list(stream)), np.rint(array[0] * 255))
    assert (stream.extent.num_frames, stream.latents) == (17, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 10}, r"10 frames of 32x48 are not in latents of shape \(1, 3, 4, 4, 6\): they hold 9 frames of 32x48"),
        ({"height": 33}, "9 frames of 33x48 are not in latents"),
        ({"num_frames": 0}, "0 frames of 32x48 are not in latents"),
        ({"output_type": "latent"}, "output_type='latent' is not possible: use one of"),
        ({"output_type": "gif"}, "output_type='gif' is not possible"),
    ],
)
def test_more_than_there_is_cannot_be_shown(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.decode_frames(torch.randn(1, 3, 4, 4, 6), **options)


# --- memory that runs out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_second_attempt_in_low_memory_mode(own, pieces, reported, number):
    """What was delivered is not delivered again, and the VAE is as before."""
    latents = torch.randn(1, 7, 4, 4, 6)
    expected = own.decode_frames(latents, output_type="np")
    modes = []
    fails = out_of_memory_at(number)
    pieces.before = lambda vae, current: (modes.append(vae.use_tiling), fails(vae, current))
    assert np.array_equal(own.decode_frames(latents, output_type="np"), expected)
    assert modes == [False] * (number + 1) + [True] * 3
    assert not own.vae.use_tiling
    assert "Decoding ran out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory" in reported.text


def test_the_failed_attempt_leaves_nothing_in_memory(own, pieces):
    """Its tensors hang on the error's traceback; they must be gone before the second attempt starts."""
    held = []

    def before(vae, number):
        if not held:
            big = torch.zeros(1000)
            held.append(weakref.ref(big))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None

    pieces.before = before
    own.decode_frames(torch.randn(1, 3, 4, 4, 6), output_type="pt")
    assert pieces.runs == 2


@pytest.mark.parametrize("kind", ["pil", "stream"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt(), TypeError("a defect")])
def test_an_error_carries_the_latents(own, pieces, kind, error):
    def before(vae, number):
        raise error

    pieces.before = before
    with pytest.raises(type(error)) as caught:
        list(call(own, output_type=kind, num_frames=17)[0])
    assert pieces.runs == (2 if isinstance(error, torch.OutOfMemoryError) else 1)
    pieces.before = nothing
    finished = own.decode_frames(caught.value.latents, output_type="np")
    np.testing.assert_array_equal(finished, call(own, output_type="np", num_frames=17))


def test_an_error_of_a_batch_carries_all_latents(own, pieces):
    pieces.before = out_of_memory_at(0, times=2)
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        call(own, num_videos_per_prompt=2)
    assert caught.value.latents.shape == (2, 3, 4, 4, 6)


def test_a_bad_chunk_names_its_layer(own, pieces, monkeypatch):
    """The good chunks before it are handed out."""
    (stream,) = call(own, output_type="stream", num_frames=25, **SHORT)
    weight, decode = own.vae.decoder.conv_out.conv.weight, AutoencoderKLCogVideoX.decode_stream

    def spoiled(vae, z):
        """The third piece is made with a bad weight."""
        sound = weight.detach().clone()
        for number, piece in enumerate(decode(vae, z)):
            with torch.no_grad():
                weight.fill_(float("nan")) if number == 2 else None
            yield next(decode(vae, z)) if number == 2 else piece
            with torch.no_grad():
                weight.copy_(sound)

    monkeypatch.setattr(AutoencoderKLCogVideoX, "decode_stream", spoiled)
    chunks = iter(stream)
    assert [len(next(chunks)) for _ in range(2)] == [9, 8]
    with pytest.raises(FloatingPointError, match=r"made NaN or infinity while decoding: the first layer to go bad is decoder\.conv_out"):
        next(chunks)


# --- offloading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken_off", [False, True])
def test_models_are_released_when_a_stream_ends(own, pieces, monkeypatch, broken_off):
    released = []
    monkeypatch.setattr(own, "maybe_free_model_hooks", lambda: released.append(len(pieces.yielded)))
    (stream,) = call(own, output_type="stream", num_frames=25, **SHORT)
    released.clear()
    chunks = iter(stream)
    next(chunks)
    assert released == []
    if broken_off:
        chunks.close()
    else:
        list(chunks)
    assert released == [1 if broken_off else 3]


def test_offloaded_pipelines_stream(own, pipe):
    own.enable_model_cpu_offload(device="cpu")
    (stream,) = call(own, output_type="stream", num_frames=17)
    expected = call(pipe, output_type="np", num_frames=17)
    for _ in range(2):
        assert np.array_equal(np.concatenate(list(stream)), np.rint(expected[0] * 255))
    own.remove_all_hooks()
