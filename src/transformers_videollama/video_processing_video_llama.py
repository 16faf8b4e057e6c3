"""The video processor: from videos of any form to `pixel_values_videos`.

First step of the flow for pictures. Files are decoded straight to the size of the model by `media.read_video`; frames
that are given as arrays or images are resized by torchvision. What remains (rescaling, normalising, saving, loading)
is the library's own video processor.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoInput, VideoMetadata

from .image_processing_video_llama import check_pixel_values
from .media import (
    MediaSource,
    headtail_frame_indices,
    is_opened,
    medium_kind,
    open_picture,
    read_video,
    read_video_metadata,
    uniform_frame_indices,
)


class VideoLlamaVideoProcessorKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    r"""
    sampling (`str`, *optional*, defaults to `"uniform"`):
        How frames are chosen. `"uniform"`: spread evenly over the video. `"headtail"`, for pre-training: half of them
        drawn at random from each half of the video.
    generator (`torch.Generator`, *optional*):
        Where `"headtail"` takes its randomness from. By default torch's global generator, which `set_seed` and data
        loader workers seed.
    video_backend (`str`, *optional*):
        Decoder for files, `"decord"` or `"pyav"`; by default decord where it is installed and right for the file.
    """

    sampling: str | None
    generator: torch.Generator | None
    video_backend: str | None


class VideoLlamaVideoProcessor(BaseVideoProcessor):
    r"""
    Turns videos into `pixel_values_videos`, float32 `(videos, frames, 3, height, width)`.

    A video is a file (path, http(s) address, `data:` URI, bytes, binary file object), a list of frames (PIL images,
    arrays, tensors, or paths of images) or an array or tensor `(frames, height, width, channels)` or
    `(frames, channels, height, width)`. One call takes one video or a list, also of different forms.

    `num_frames` frames (8) are taken of each video, all of a shorter one. With `do_sample_frames=False` the frames are
    taken as already sampled, and still brought to `num_frames`: more are thinned out evenly, fewer are padded. Where
    videos of one call differ in their number of frames, the shorter ones end in zeros, and `padding_mask_videos`
    `(videos, frames)` is returned too: 1 for a frame, 0 for padding.
    """

    _auto_class = "AutoVideoProcessor"

    resample = PILImageResampling.BILINEAR
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 8
    fps = None
    sampling = "uniform"
    valid_kwargs = VideoLlamaVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "padding_mask_videos"]

    def __init__(self, **kwargs: Unpack[VideoLlamaVideoProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: int | float | None = None,
        sampling: str | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """
        Choose the frames of one video.

        Args:
            metadata ([`VideoMetadata`]):
                Of the whole video: `total_num_frames`, and for `fps` also its `fps`.
            num_frames (`int`, *optional*):
                How many frames; a shorter video gives all of its frames. Defaults to `self.num_frames`, without which
                all frames are taken.
            fps (`int` or `float`, *optional*):
                How many frames a second instead of `num_frames`.
            sampling (`str`, *optional*), generator (`torch.Generator`, *optional*):
                See the class's arguments.

        Returns:
            Increasing frame indices, int64 `(frames,)`.
        """
        if fps is not None and num_frames is not None:
            raise ValueError("`num_frames` and `fps` are mutually exclusive arguments, please use only one!")
        if fps is None and num_frames is None:
            num_frames, fps = self.num_frames, self.fps
        sampling = sampling if sampling is not None else self.sampling
        total = metadata.total_num_frames
        if fps is not None:
            if not fps > 0:
                raise ValueError(f"`fps` is a number of frames a second above 0, not {fps!r}.")
            if metadata.fps is None:
                raise ValueError(
                    f"To sample {fps} frames a second, the frame rate of the video has to be known: pass"
                    " `video_metadata` with `fps`, or ask for `num_frames`."
                )
            num_frames = max(1, int(total / metadata.fps * fps))
        if num_frames is None:
            num_frames = total
        if sampling == "headtail":
            return np.array(headtail_frame_indices(total, num_frames, generator))
        if sampling != "uniform":
            raise ValueError(f'`sampling` is "uniform" or "headtail", not {sampling!r}.')
        return np.array(uniform_frame_indices(total, num_frames))

    def read_metadata(self, video: MediaSource, **kwargs: Unpack[VideoLlamaVideoProcessorKwargs]) -> VideoMetadata:
        """What `return_metadata` would give for a video file (random choices apart), without decoding it."""
        metadata = read_video_metadata(video)
        metadata.frames_indices = self.sample_frames(metadata=metadata, **kwargs).tolist()
        return metadata

    def preprocess(self, videos: VideoInput, **kwargs: Unpack[VideoLlamaVideoProcessorKwargs]) -> BatchFeature:
        """
        Args:
            videos:
                One video or a list of videos, see the class.
            kwargs:
                Override the processor's own settings for this call. `return_metadata=True` adds `video_metadata`, a
                list of [`VideoMetadata`] with the frame rate of each video and the indices of its frames;
                `video_metadata` gives those of videos that are no files.

        Returns:
            [`BatchFeature`] with `pixel_values_videos`, float32 `(videos, frames, 3, height, width)`, and
            `padding_mask_videos`, int64 `(videos, frames)`, if some frames are padding.

        Raises:
            `MediaError`: a file cannot be used. The message names it.
        """
        options: dict[str, Any] = {
            name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__
        } | kwargs
        size = self._standardize_kwargs(size=options["size"], default_to_square=options["default_to_square"])["size"]
        # The decoder scales, unless another kind of size or of interpolation is asked for
        fixed_size = (size.height, size.width) if options["do_resize"] and size.height and size.width else None
        if options["do_sample_frames"]:
            wanted = ("num_frames", "fps", "sampling", "generator")
            choose = partial(self.sample_frames, **{name: kwargs[name] for name in wanted if name in kwargs})
            min_frames = 0
        else:
            choose = partial(self.sample_frames, num_frames=options["num_frames"], sampling="uniform")
            min_frames = options["num_frames"] or 0

        sources = _flatten(videos)
        given = _flatten_metadata(options["video_metadata"], len(sources))
        clips, metadata = [], []
        for source, source_metadata in zip(sources, given, strict=True):
            if _is_file(source):
                decoder_scales = options["resample"] == PILImageResampling.BILINEAR
                clip, clip_metadata = read_video(
                    source, None, fixed_size if decoder_scales else None, choose, options["video_backend"]
                )
            else:
                clip, clip_metadata = _pick_frames(source, source_metadata, choose)
                clip = self._stack_frames(clip, options, size if fixed_size else None)
                check_pixel_values(clip, options["do_rescale"])
            clips.append(clip)
            metadata.append(clip_metadata)

        given_by_caller = {
            "do_sample_frames",
            "video_metadata",
            "return_metadata",
            "return_tensors",
            "input_data_format",
        }
        processed = super().preprocess(
            clips,
            do_sample_frames=False,
            input_data_format=ChannelDimension.FIRST,
            return_metadata=False,
            **{name: value for name, value in kwargs.items() if name not in given_by_caller},
        )
        batch = BatchFeature(_pad(processed["pixel_values_videos"], min_frames), tensor_type=options["return_tensors"])
        if options["return_metadata"]:
            batch["video_metadata"] = metadata
        return batch

    def _stack_frames(self, frames: Any, options: dict[str, Any], size: SizeDict | None) -> torch.Tensor:
        """Frames, which may be of different forms and sizes, as one tensor (T, C, H, W)."""
        if not isinstance(frames, list):
            return _channels_first(frames, options["input_data_format"])
        tensors = []
        for frame in frames:
            if isinstance(frame, (str, os.PathLike)):
                frame = open_picture(frame)
            if isinstance(frame, PIL.Image.Image):
                image_format = ChannelDimension.LAST
                frame = np.array(_to_rgb(frame) if options["do_convert_rgb"] else frame)
                frame = frame if frame.ndim == 3 else frame[..., None]
            else:
                image_format = options["input_data_format"]
            tensors.append(_channels_first(frame, image_format))
        if len({tensor.shape for tensor in tensors}) > 1:
            if size is None:
                raise ValueError(
                    f"The frames of a video have different shapes: {sorted({tuple(t.shape) for t in tensors})}. Give "
                    "them one size, or have them resized to a fixed height and width."
                )
            tensors = [self.resize(tensor, size, options["resample"]) for tensor in tensors]
        return torch.stack(tensors)


def _is_file(video: Any) -> bool:
    return (
        isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview))
        or is_opened(video)
        or hasattr(video, "read")
    )


def is_frame(item: Any) -> bool:
    """Whether something is a picture and not a video: an image file by its name (a GIF is a video), a PIL image, or an
    array or tensor of three axes."""
    if isinstance(item, (str, os.PathLike)):
        return medium_kind(item) == "image"
    return isinstance(item, PIL.Image.Image) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3)


def _flatten(videos: Any) -> list[Any]:
    """One video, or videos in lists of any depth, as a flat list of files, arrays (T, …) and lists of frames."""
    if isinstance(videos, (list, tuple)):
        if not videos:
            raise ValueError("No video was given: the list is empty.")
        if all(is_frame(item) for item in videos):
            return [list(videos)]
        return [video for item in videos for video in _flatten(item)]
    if is_frame(videos):
        return [[videos]]
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim in (4, 5):
        return [videos] if videos.ndim == 4 else list(videos)
    if _is_file(videos):
        return [videos]
    shape = f" of shape {tuple(videos.shape)}" if hasattr(videos, "shape") else ""
    raise ValueError(
        "A video is a path, an address, bytes, a list of frames, or an array (frames, height, width, channels) or"
        f" (frames, channels, height, width), not {type(videos).__name__}{shape}."
    )


def _flatten_metadata(metadata: Any, num_videos: int) -> list[VideoMetadata | None]:
    """A copy of the metadata given for each video; None where there is none."""
    if metadata is None:
        return [None] * num_videos
    if not isinstance(metadata, (list, tuple)):
        metadata = [metadata]
    flat = [entry for item in metadata for entry in (item if isinstance(item, (list, tuple)) else [item])]
    if len(flat) != num_videos:
        raise ValueError(f"{num_videos} videos were given, but {len(flat)} entries of `video_metadata`.")
    return [None if entry is None else VideoMetadata(**entry) for entry in flat]


def _pick_frames(
    frames: Any, metadata: VideoMetadata | None, choose: Callable[..., np.ndarray]
) -> tuple[Any, VideoMetadata]:
    """The chosen ones of the given frames, and metadata that say which of the whole video they are."""
    num_frames = len(frames)
    if num_frames == 0:
        raise ValueError("A video has to have at least one frame.")
    metadata = metadata or VideoMetadata(total_num_frames=num_frames)
    picked = choose(metadata=VideoMetadata(total_num_frames=num_frames, fps=metadata.fps)).tolist()
    if metadata.frames_indices is not None and len(metadata.frames_indices) == num_frames:
        metadata.frames_indices = [int(metadata.frames_indices[i]) for i in picked]  # they had been picked before
    else:
        metadata.frames_indices = picked
    return [frames[i] for i in picked] if isinstance(frames, list) else frames[picked], metadata


def _channels_first(frames: Any, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
    """(…, C, H, W)"""
    if input_data_format is None:
        try:
            input_data_format = infer_channel_dimension_format(frames, num_channels=(1, 3, 4))
        except ValueError as error:
            raise ValueError(
                f"Frames of the shape {tuple(frames.shape)} have no axis of 1, 3 or 4 channels, first or last: grey "
                "ones need one of 1, as `frames[..., None]` gives them."
            ) from error
    if isinstance(frames, np.ndarray):
        frames = torch.from_numpy(np.ascontiguousarray(frames))
    return frames.movedim(-1, -3) if input_data_format == ChannelDimension.LAST else frames


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """As the library does with arrays, transparent parts become white."""
    if image.mode == "RGB":
        return image
    image = image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _pad(clips: list[torch.Tensor], min_frames: int) -> dict[str, Any]:
    """Stack clips (T, C, H, W); shorter ones are filled up with zeros, which the mask tells from frames."""
    if len({clip.shape[1:] for clip in clips}) > 1:
        return {"pixel_values_videos": clips}  # of different sizes
    lengths = torch.tensor([len(clip) for clip in clips], device=clips[0].device)
    num_frames = max(int(lengths.max()), min_frames)
    pixel_values = clips[0].new_zeros(len(clips), num_frames, *clips[0].shape[1:])
    for padded, clip in zip(pixel_values, clips, strict=True):
        padded[: len(clip)] = clip
    if (lengths == num_frames).all():
        return {"pixel_values_videos": pixel_values}
    mask = torch.arange(num_frames, device=lengths.device) < lengths[:, None]
    return {"pixel_values_videos": pixel_values, "padding_mask_videos": mask.long()}


__all__ = ["VideoLlamaVideoProcessor", "is_frame"]
