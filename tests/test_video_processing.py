"""The video processor: the published system's pixel values from files, and one rule for every other form of video."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from media_files import NUM_LEVELS, frame_picture, write_media
from safetensors.torch import load_file
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from transformers_videollama.image_processing_video_llama import VideoLlamaImageProcessor
from transformers_videollama.media import MediaError, read_video
from transformers_videollama.video_processing_video_llama import VideoLlamaVideoProcessor

SYNTH = Path(__file__).parent / "reference" / "synth"


@pytest.fixture(scope="module")
def processor() -> VideoLlamaVideoProcessor:
    return VideoLlamaVideoProcessor()


def numbered_frames(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.stack([frame_picture(index, height, width) for index in range(num_frames)])


def shown_frames(pixel_values: torch.Tensor) -> list[int]:
    """Which of `numbered_frames` are shown in (T, 3, 224, 224); their lower right quarter tells."""
    mean, std = (torch.tensor(getattr(VideoLlamaVideoProcessor, name)) for name in ("image_mean", "image_std"))
    corner = pixel_values[:, :, 150:, 150:].mean((2, 3)) * std + mean
    return [round(level) % NUM_LEVELS for level in (corner.mean(1) * 255 / 8).tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", ["clip", "clip_short", "clip_silent"])
def test_pixel_values_are_those_of_the_published_system(name: str, processor: VideoLlamaVideoProcessor):
    expected = load_file(SYNTH / f"{name}.safetensors")
    batch = processor(SYNTH / f"{name}.mp4", return_tensors="pt", return_metadata=True)
    exact = batch.pop("video_metadata")[0].video_backend == "decord"
    pixel_values = batch["pixel_values_videos"]
    num_frames = expected["pixel_values_patch"].shape[1]
    assert pixel_values.shape == (1, num_frames, 3, 224, 224) and pixel_values.dtype == torch.float32
    assert set(batch) == {"pixel_values_videos"}  # nothing is padded
    by_channel = pixel_values[0].transpose(0, 1)
    difference = (by_channel[:, :, 100:124, 100:124] - expected["pixel_values_patch"]).abs()
    assert difference.max() < 1e-6 if exact else difference.mean() < 0.5 / 255 / 0.26
    torch.testing.assert_close(by_channel.mean((2, 3)), expected["pixel_values_mean"], atol=5e-3, rtol=0)
    torch.testing.assert_close(by_channel.std((2, 3)), expected["pixel_values_std"], atol=5e-3, rtol=0)


def test_metadata_give_the_published_timestamps(processor: VideoLlamaVideoProcessor):
    for name in ("clip", "clip_short", "clip_silent"):
        batch = processor(SYNTH / f"{name}.mp4", return_metadata=True)
        (metadata,) = batch["video_metadata"]
        seconds = ", ".join(str(round(index / metadata.fps, 1)) for index in metadata.frames_indices)
        assert f"sampled at {seconds} seconds" in json.loads((SYNTH / f"{name}.json").read_text())["msg"]
        undecoded = processor.read_metadata(SYNTH / f"{name}.mp4")
        assert (undecoded.fps, undecoded.frames_indices) == (metadata.fps, metadata.frames_indices)


def test_files_are_decoded_straight_to_the_size(processor: VideoLlamaVideoProcessor):
    clip = SYNTH / "clip.mp4"
    for size in ({"height": 32, "width": 48}, 16):
        height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
        frames, _ = read_video(clip, 8, (height, width))
        pixel_values = processor(clip, size=size, do_normalize=False, return_tensors="pt")["pixel_values_videos"]
        torch.testing.assert_close(pixel_values[0], frames.float() / 255)


def test_other_resizing_is_left_to_the_library(processor: VideoLlamaVideoProcessor):
    clip = SYNTH / "clip.mp4"
    frames, _ = read_video(clip, 8, size=None)
    for kwargs in ({"resample": 3}, {"size": {"shortest_edge": 64}}, {"do_resize": False}):
        from_file = processor(clip, return_tensors="pt", **kwargs)["pixel_values_videos"]
        from_frames = processor(frames, return_tensors="pt", **kwargs)["pixel_values_videos"]
        torch.testing.assert_close(from_file, from_frames)


def test_frames_resized_here_are_close_to_the_decoders(processor: VideoLlamaVideoProcessor):
    # The decoder scales before it converts to RGB, which explains 1.0 to 1.5 / 255; without antialiasing it is 2.7
    clip = SYNTH / "clip.mp4"
    frames, _ = read_video(clip, 8, size=None)
    difference = (processor(clip)["pixel_values_videos"] - processor(frames)["pixel_values_videos"]).abs()
    assert difference.mean() < 1.5 / 255 / 0.26


def test_bad_files_are_named(processor: VideoLlamaVideoProcessor, tmp_path: Path):
    for name, data in (("text.mp4", b"no video"), ("empty.mp4", b""), ("picture.png", b"no picture")):
        (tmp_path / name).write_bytes(data)
        source = tmp_path / name if name.endswith("mp4") else [tmp_path / name]
        with pytest.raises(MediaError, match=name):
            processor(source)
        with pytest.raises(MediaError, match=name):
            processor([SYNTH / "clip.mp4", source])


# ---------------------------------------------------------------------------------------------------------------------
# Other forms of video


def test_every_form_of_frames_gives_the_same(processor: VideoLlamaVideoProcessor, tmp_path: Path):
    array = numbered_frames(10)
    tensor = torch.from_numpy(array)
    images = [PIL.Image.fromarray(frame) for frame in array]
    paths = [tmp_path / f"{index}.png" for index in range(10)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    expected = processor(array, return_tensors="pt")["pixel_values_videos"]
    assert expected.shape == (1, 8, 3, 224, 224)
    assert shown_frames(expected[0]) == [0, 1, 2, 3, 5, 6, 7, 8]
    forms = {
        "THWC tensor": tensor,
        "TCHW tensor": tensor.permute(0, 3, 1, 2),
        "TCHW array": np.ascontiguousarray(array.transpose(0, 3, 1, 2)),
        "list of arrays": list(array),
        "list of tensors": list(tensor),
        "images": images,
        "tuple of images": tuple(images),
        "paths of images": paths,
        "path strings of images": [str(path) for path in paths],
        "reversed twice": array[::-1][::-1],
        "batch of one": [array],
        "batch of one, nested": [[array]],
        "5-D array": array[None],
        "batch of images": [images],
        "batch of paths, nested": [[[str(path) for path in paths]]],
    }
    for name, form in forms.items():
        torch.testing.assert_close(processor(form, return_tensors="pt")["pixel_values_videos"], expected, msg=name)


def test_grey_transparent_and_palette_frames_become_rgb(processor: VideoLlamaVideoProcessor):
    grey = np.full((2, 20, 30, 1), 100, dtype=np.uint8)
    rgb = grey.repeat(3, axis=-1)
    opaque = np.concatenate([rgb, np.full_like(grey, 255)], axis=-1)
    expected = processor(rgb)["pixel_values_videos"]
    forms = {
        "grey array": grey,
        "opaque array": opaque,
        "grey images": [PIL.Image.fromarray(frame[..., 0]) for frame in grey],
        "palette images": [
            PIL.Image.fromarray(frame).convert("P", palette=PIL.Image.Palette.ADAPTIVE) for frame in rgb
        ],
        "opaque images": [PIL.Image.fromarray(frame) for frame in opaque],
    }
    for name, form in forms.items():
        torch.testing.assert_close(processor(form)["pixel_values_videos"], expected, msg=name, atol=1e-5, rtol=0)
    transparent = np.concatenate([rgb, np.zeros_like(grey)], axis=-1)
    white = processor(np.full_like(rgb, 255))["pixel_values_videos"]
    for form in (transparent, [PIL.Image.fromarray(frame) for frame in transparent]):
        torch.testing.assert_close(processor(form)["pixel_values_videos"], white, atol=1e-5, rtol=0)


def test_frames_of_different_sizes_are_brought_to_one(processor: VideoLlamaVideoProcessor):
    images = [PIL.Image.new("RGB", size, (10, 20, 30)) for size in ((30, 20), (50, 60), (224, 224))]
    pixel_values = processor(images)["pixel_values_videos"]
    assert pixel_values.shape == (1, 3, 3, 224, 224)
    assert pixel_values.std((0, 1, 3, 4)).max() < 1e-5
    with pytest.raises(ValueError, match="different shapes"):
        processor(images, do_resize=False)


def test_an_image_is_a_video_of_one_frame(processor: VideoLlamaVideoProcessor):
    picture = frame_picture(3, 20, 30)
    for form in (picture, PIL.Image.fromarray(picture), torch.from_numpy(picture)):
        assert processor(form)["pixel_values_videos"].shape == (1, 1, 3, 224, 224)


def test_photographs_are_turned_upright(processor: VideoLlamaVideoProcessor, tmp_path: Path):
    image = PIL.Image.fromarray(frame_picture(3, 20, 30))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held to the right
    image.rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    turned = processor([tmp_path / "photo.png"])["pixel_values_videos"]
    torch.testing.assert_close(turned, processor([image])["pixel_values_videos"])


@pytest.mark.parametrize("video", [[], [[]], np.zeros((2, 2)), 3, None, {"path": "x.mp4"}, np.zeros((0, 4, 4, 3))])
def test_what_is_no_video_is_refused(video, processor: VideoLlamaVideoProcessor):
    with pytest.raises(ValueError):
        processor(video)


def test_different_forms_in_one_call(processor: VideoLlamaVideoProcessor, tmp_path: Path):
    path = write_media(tmp_path / "video.mp4", num_frames=12)
    videos = [
        path,
        str(SYNTH / "clip_short.mp4"),
        (SYNTH / "clip.mp4").read_bytes(),
        torch.from_numpy(numbered_frames(3)),
        list(numbered_frames(20, 30, 20)),
    ]
    batch = processor(videos, return_tensors="pt", return_metadata=True)
    assert batch["pixel_values_videos"].shape == (5, 8, 3, 224, 224)
    lengths = [8, 5, 8, 3, 8]
    assert batch["padding_mask_videos"].sum(1).tolist() == lengths
    for index, video in enumerate(videos):
        alone = processor(video, return_tensors="pt")
        assert "padding_mask_videos" not in alone
        torch.testing.assert_close(
            batch["pixel_values_videos"][index, : lengths[index]], alone["pixel_values_videos"][0]
        )
        assert batch["pixel_values_videos"][index, lengths[index] :].count_nonzero() == 0
        assert batch["padding_mask_videos"][index].tolist() == [1] * lengths[index] + [0] * (8 - lengths[index])
    assert [len(metadata.frames_indices) for metadata in batch["video_metadata"]] == lengths


# ---------------------------------------------------------------------------------------------------------------------
# Which frames


def test_given_frames_are_always_brought_to_the_models_number(processor: VideoLlamaVideoProcessor):
    for length in (1, 5, 8, 9, 30):
        batch = processor(numbered_frames(length), do_sample_frames=False, return_tensors="pt", return_metadata=True)
        assert batch["pixel_values_videos"].shape == (1, 8, 3, 224, 224)
        real = batch["padding_mask_videos"].bool()[0] if length < 8 else torch.ones(8, dtype=torch.bool)
        assert real.sum() == min(length, 8)
        expected = np.arange(0, length, length / real.sum().item()).astype(int).tolist()
        assert shown_frames(batch["pixel_values_videos"][0][real]) == expected
        assert batch["video_metadata"][0].frames_indices == expected


def test_number_of_frames_can_be_chosen(processor: VideoLlamaVideoProcessor):
    clip = SYNTH / "clip.mp4"  # 125 frames, 25 a second
    assert processor(clip, num_frames=3)["pixel_values_videos"].shape[1] == 3
    assert processor(clip, fps=2)["pixel_values_videos"].shape[1] == 10
    assert VideoLlamaVideoProcessor(num_frames=4)(clip)["pixel_values_videos"].shape[1] == 4
    assert VideoLlamaVideoProcessor(num_frames=4)(clip, num_frames=6)["pixel_values_videos"].shape[1] == 6
    frames = numbered_frames(10)
    metadata = {"total_num_frames": 10, "fps": 5}
    assert processor(frames, fps=2, video_metadata=[metadata])["pixel_values_videos"].shape[1] == 4
    with pytest.raises(ValueError, match="frame rate"):
        processor(frames, fps=2)
    for fps in (0, -1):
        with pytest.raises(ValueError, match="`fps` is a number of frames a second above 0"):
            processor(clip, fps=fps)
    with pytest.raises(ValueError, match="mutually exclusive"):
        processor(frames, fps=2, num_frames=4, video_metadata=[metadata])


def test_headtail_sampling_follows_its_generator(processor: VideoLlamaVideoProcessor):
    def draw(seed: int, **kwargs) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        videos = [SYNTH / "clip.mp4", numbered_frames(30)]
        batch = processor(videos, sampling="headtail", generator=generator, return_metadata=True, **kwargs)
        return [metadata.frames_indices for metadata in batch["video_metadata"]]

    assert draw(0) == draw(0) != draw(1)
    for indices, length in zip(draw(2), (125, 30), strict=True):
        assert indices == sorted(set(indices)) and sum(index < length // 2 for index in indices) == 4
    # Frames that are not to be sampled stay as they are
    assert draw(0, do_sample_frames=False)[1] == [0, 3, 7, 11, 15, 18, 22, 26]
    with pytest.raises(ValueError, match="sampling"):
        processor(numbered_frames(10), sampling="random")


def test_given_metadata_are_kept(processor: VideoLlamaVideoProcessor):
    given = VideoMetadata(total_num_frames=20, fps=4.0)
    batch = processor(numbered_frames(20), video_metadata=[given], return_metadata=True)
    (metadata,) = batch["video_metadata"]
    assert metadata.fps == 4.0
    assert metadata.frames_indices == [0, 2, 5, 7, 10, 12, 15, 17]
    assert given.frames_indices is None  # the caller's object is left alone
    # Frames that had been sampled before keep their place in the whole video
    given = VideoMetadata(total_num_frames=200, fps=10.0, frames_indices=list(range(0, 200, 10)))
    (metadata,) = processor(numbered_frames(20), video_metadata=given, return_metadata=True)["video_metadata"]
    assert metadata.frames_indices == [0, 20, 50, 70, 100, 120, 150, 170]
    with pytest.raises(ValueError, match="2 entries"):
        processor(numbered_frames(20), video_metadata=[given, given])


# ---------------------------------------------------------------------------------------------------------------------
# As every video processor of the library


def test_save_and_load(tmp_path: Path):
    processor = VideoLlamaVideoProcessor(num_frames=4, sampling="headtail", size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    loaded = VideoLlamaVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.num_frames, loaded.sampling, dict(loaded.size)) == (4, "headtail", {"height": 32, "width": 32})
    assert VideoLlamaVideoProcessor.from_pretrained(tmp_path, num_frames=2).num_frames == 2


def test_output_forms(processor: VideoLlamaVideoProcessor):
    videos = [numbered_frames(3), numbered_frames(2)]
    as_torch = processor(videos, return_tensors="pt")
    as_numpy = processor(videos, return_tensors="np")
    assert set(as_torch) == set(processor.model_input_names)
    for name in processor.model_input_names:
        assert isinstance(as_numpy[name], np.ndarray)
        assert np.array_equal(as_numpy[name], as_torch[name].numpy())
    assert as_torch["pixel_values_videos"].is_contiguous()
    half = as_torch.to(torch.float16)
    assert half["pixel_values_videos"].dtype == torch.float16 and half["padding_mask_videos"].dtype == torch.int64


def test_pixels_that_were_divided_already_are_named(processor: VideoLlamaVideoProcessor):
    frames = numbered_frames(3)
    expected = processor(frames)["pixel_values_videos"]
    logger = logging.get_logger("transformers_videollama.image_processing_video_llama")
    for wrong, image in ((frames / 255, frames[0] / 255), (frames > 128, None)):
        logger.warning_once.cache_clear()
        with CaptureLogger(logger) as captured:
            processor(wrong)
        assert "pass `do_rescale=False`" in captured.out
        if image is not None:
            logger.warning_once.cache_clear()
            with CaptureLogger(logger) as captured:
                VideoLlamaImageProcessor()(image)
            assert "pass `do_rescale=False`" in captured.out
    logger.warning_once.cache_clear()
    with CaptureLogger(logger) as captured:
        unscaled = processor(frames / 255, do_rescale=False)["pixel_values_videos"]
        processor(frames)
        processor(np.zeros_like(frames, dtype=np.float32))  # black is black
    assert not captured.out
    # Resized whole numbers are rounded, so that they differ by a level, which normalising makes wider
    torch.testing.assert_close(unscaled.float(), expected, rtol=0, atol=1 / 255 / min(processor.image_std))
    for turned in (frames[..., ::-1], frames[..., ::-1].astype(np.float32)[:, ::-1]):  # from BGR, upside down
        assert processor(turned)["pixel_values_videos"].shape == expected.shape
        assert VideoLlamaImageProcessor()(turned[0])["pixel_values"][0].shape == expected.shape[2:]


def test_pixels_that_are_no_numbers_and_frames_without_channels_are_refused(processor: VideoLlamaVideoProcessor):
    with pytest.raises(ValueError, match=r"\(3, 3, 48, 64\) hold values that are not finite"):
        processor(np.full((3, 48, 64, 3), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match=r"shape \(30, 48, 64\) have no axis of 1, 3 or 4 channels"):
        processor(np.zeros((30, 48, 64), dtype=np.uint8))
