"""One annotated row to one training sample: media decoded and cropped, prompt written, labels made.

Comes after `annotations` and before `collator`; `mixture` calls it in data loader workers. All randomness of a sample
(frames, crop, request) comes from the generator that is passed in, so that a sample depends on nothing else.
"""

from typing import Any, Literal, Protocol

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from ..chat_templates import CHAT_TEMPLATES
from ..media import MediaError
from ..processing_video_llama import VideoLlamaProcessor, frame_timestamps, make_assistant_masks, read_image
from ..video_processing_video_llama import is_frame
from .captions import IMAGE_REQUESTS

CROP_SCALE = (0.5, 1.0)
"""Share of a picture's area that the random crop of the published training keeps."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width by height of that crop."""
MAX_LENGTHS = {"caption": 32, "chat": 512}
"""Published lengths in tokens: of a caption's text, and of a whole conversation with its soft tokens."""

_IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
_MEDIA_TYPES = ("image", "video", "audio")


class SampleError(ValueError):
    """
    A row cannot be made into a sample, because of its media or its text. `path` is the medium at fault, if one is.
    """

    def __init__(self, message: str, path: str | None = None):
        super().__init__(message)
        self.path = path


class FeatureCache(Protocol):
    """What [`SampleBuilder`] reads in place of media."""

    def get(self, path: str, kind: str, is_image: bool) -> dict[str, Any]:
        """
        Args:
            path: the medium, as in the row.
            kind: `"frames"` for the image Q-Former's output (frames, num_query_tokens, width), `"clips"` for
                ImageBind's vectors of the frames (frames, projection_dim).
            is_image: whether the medium is shown as an image.

        Returns:
            `"features"`, such a tensor, and `"timestamps"`, the seconds of the frames to one decimal, or None.

        Raises:
            KeyError, MediaError: the medium is not in the cache.
        """


class SampleBuilder:
    r"""
    Makes training samples from rows of `annotations.FEATURES`.

    Args:
        processor ([`VideoLlamaProcessor`]): of the model that is trained. Its chat template must mark the assistant's
            words with `{% generation %}` for `text_format="chat"`.
        branch (`str`, defaults to `"video"`):
            `"video"`: images and videos are seen, without their sound. `"audio"`: as published, what is to be heard is
            made of pictures: the frames of images and videos go through ImageBind's vision tower, in a prompt that
            differs from the video branch's in its placeholders only. In a row with `audio` entries these alone are
            heard (an image or video file, of which the frames are used, with the words of a sound), and its other
            media are seen. Sound itself is never read.
        text_format (`str`, defaults to `"chat"`): `"caption"`: `[BOS] soft tokens, caption, "\n"`, all of the text is
            learned. `"chat"`: the processor's chat template; learned are the assistant's words and their end mark. An
            image without words is asked for with one of `captions.IMAGE_REQUESTS`.
        sampling (`str`, *optional*): of the frames of a video, `"headtail"` or `"uniform"`; as published `"headtail"`
            for captions and `"uniform"` for chats.
        num_frames (`int`, defaults to 8): frames of a video; a shorter one gives all it has.
        random_resized_crop (`bool`, defaults to `True`): crop each clip (one crop for all of its frames) and each
            image at random, with [`CROP_SCALE`] and [`CROP_RATIO`], and resize bicubically.
        max_length (`int`, *optional*): what is longer is cut at its end; by default [`MAX_LENGTHS`]: 32 tokens of text
            for captions, 512 tokens altogether for chats.
        feature_cache ([`FeatureCache`], *optional*): where the features of the media are, so that none is opened. The
            choice of frames, the crop and the seconds in the prompt are then those of the cache.
    """

    def __init__(
        self,
        processor: VideoLlamaProcessor,
        branch: Literal["video", "audio"] = "video",
        text_format: Literal["caption", "chat"] = "chat",
        sampling: Literal["headtail", "uniform"] | None = None,
        num_frames: int = 8,
        random_resized_crop: bool = True,
        max_length: int | None = None,
        feature_cache: FeatureCache | None = None,
    ):
        if sampling is None:
            sampling = "headtail" if text_format == "caption" else "uniform"
        for name, value, known in (
            ("branch", branch, ("video", "audio")),
            ("text_format", text_format, ("caption", "chat")),
            ("sampling", sampling, ("headtail", "uniform")),
        ):
            if value not in known:
                raise ValueError(f"`{name}` is {known[0]!r} or {known[1]!r}, not {value!r}.")
        if num_frames < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"`num_frames` and `max_length` are 1 or more, not {num_frames} and {max_length}.")
        if text_format == "chat" and "generation" not in processor.get_chat_template():
            raise ValueError(
                "The processor's chat template does not mark what the assistant says, which is what is learned. Put"
                f" {{% generation %}} and {{% endgeneration %}} around it, or use one of {', '.join(CHAT_TEMPLATES)}."
            )
        self.processor = processor
        self.branch = branch
        self.text_format = text_format
        self.sampling = sampling
        self.num_frames = num_frames
        self.random_resized_crop = random_resized_crop
        self.max_length = MAX_LENGTHS[text_format] if max_length is None else max_length
        self.feature_cache = feature_cache
        self._num_tokens = {kind: int(getattr(processor, f"num_{kind}_tokens")) for kind in _MEDIA_TYPES}
        self._token_ids = {kind: int(getattr(processor, f"{kind}_token_id")) for kind in _MEDIA_TYPES}

    def __call__(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """
        Args:
            row: `messages` and `source`, see `annotations.FEATURES`.
            generator: of all random choices.

        Returns:
            `input_ids` and `labels` (length,) int64, and for each kind of media that is in the row the media in
            reading order: `pixel_values` (images, 3, height, width), `pixel_values_videos` and
            `audio_pixel_values_videos`, lists of (frames, 3, height, width). With a feature cache instead: lists
            `image_frame_features` (num_query_tokens, width), `video_frame_features` (frames, num_query_tokens, width)
            and `audio_clip_features` (frames, projection_dim). Pixels and features are float32.

        Raises:
            SampleError: a file cannot be used, or the text does not fit; the message names the row.
        """
        try:
            return self._build(row, generator)
        except SampleError as error:
            raise SampleError(f"{row['source']}: {error}", error.path) from error

    def _build(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        messages = [
            {"role": message["role"], "content": [dict(entry) for entry in message["content"]]}
            for message in row["messages"]
        ]
        if self.text_format == "chat":
            answers = [entry.get("text", "") for m in messages if m["role"] == "assistant" for entry in m["content"]]
            if not "".join(answers).strip():
                raise SampleError("its answers have no words.")
            _ask_about_images(messages, generator)
        entries = [entry for message in messages for entry in message["content"] if entry["type"] != "text"]
        kinds = self._kinds(entries)
        media: dict[str, list[torch.Tensor]] = {kind: [] for kind in _MEDIA_TYPES}
        opened: dict[tuple[str, bool, bool], Any] = {}  # a clip that is heard and seen is decoded and cropped once
        for entry, kind in zip(entries, kinds, strict=True):
            path, is_image = entry["path"], _is_image(entry)
            key = (path, is_image, kind == "audio" and self.feature_cache is not None)
            if key not in opened:
                opened[key] = self._open(path, is_image, kind, generator)
            medium, entry["timestamps"] = opened[key]
            media[kind].append(medium[0] if kind == "image" else medium)

        if self.text_format == "caption":
            input_ids, labels = self._caption(messages, kinds)
        else:
            input_ids, labels = self._chat(messages, entries, kinds)
        if (labels == _IGNORED).all():
            raise SampleError(f"within {self.max_length} tokens there is no word of an answer to learn.")
        sample: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        for kind, name in self._input_names().items():
            # What the end of a long conversation was about may be cut off with it
            num_media = int((input_ids == self._token_ids[kind]).sum()) // self._num_tokens[kind]
            if num_media:
                sample[name] = media[kind][:num_media]
        if "pixel_values" in sample:
            sample["pixel_values"] = torch.stack(sample["pixel_values"])
        return sample

    def _input_names(self) -> dict[str, str]:
        if self.feature_cache is not None:
            return {
                "image": "image_frame_features",
                "video": "video_frame_features",
                "audio": "audio_clip_features",
            }
        return {"image": "pixel_values", "video": "pixel_values_videos", "audio": "audio_pixel_values_videos"}

    def _kinds(self, entries: list[dict[str, Any]]) -> list[str]:
        """As what each medium enters the model."""
        kinds = [entry["type"] for entry in entries]
        if self.branch == "audio":
            return kinds if "audio" in kinds else ["audio"] * len(kinds)
        if "audio" in kinds:
            path = entries[kinds.index("audio")]["path"]
            raise SampleError(f'it has a sound ({path}), which needs `branch="audio"`, not "video".', path)
        return kinds

    # -----------------------------------------------------------------------------------------------------------------
    # Media

    def _open(
        self, path: str, is_image: bool, kind: str, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[float] | None]:
        """Frames (T, 3, H, W) or their features (T, …), and the seconds of a video's frames."""
        if self.feature_cache is not None:
            try:
                cached = self.feature_cache.get(path, "clips" if kind == "audio" else "frames", is_image)
            except (MediaError, OSError) as error:
                raise SampleError(str(error), path) from error
            except KeyError as error:
                raise SampleError(
                    f"{path} is not in the feature cache. Add it, or train without cache.", path
                ) from error
            return cached["features"].float(), None if is_image else cached["timestamps"]
        try:
            return (self.read_image(path, generator), None) if is_image else self.read_video(path, generator)
        except (OSError, ValueError) as error:
            raise SampleError(str(error), path) from error

    def read_video(self, path: str, generator: torch.Generator) -> tuple[torch.Tensor, list[float] | None]:
        """The frames of a video as they enter the model, float32 (frames, 3, height, width), and their seconds."""
        video_processor = self.processor.video_processor
        decoded = video_processor(
            path,
            num_frames=self.num_frames,
            sampling=self.sampling,
            generator=generator,
            do_rescale=False,
            do_normalize=False,
            return_metadata=True,
            return_tensors="pt",
        )
        frames = decoded["pixel_values_videos"][0]
        if self.random_resized_crop:
            frames = crop_frames(frames, generator)
        normalized = video_processor(
            frames,
            do_sample_frames=False,
            num_frames=len(frames),
            do_resize=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )
        return normalized["pixel_values_videos"][0], frame_timestamps(decoded["video_metadata"][0])

    def read_image(self, path: str, generator: torch.Generator) -> torch.Tensor:
        """An image as it enters the model, float32 (1, 3, height, width)."""
        image = read_image(path)
        if self.random_resized_crop:
            top, left, height, width = _draw_crop(image, generator)
            image = image.crop((left, top, left + width, top + height))
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"]

    # -----------------------------------------------------------------------------------------------------------------
    # Text

    def _caption(self, messages: list[dict[str, Any]], kinds: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        words = [entry["text"] for message in messages for entry in message["content"] if entry["type"] == "text"]
        if [message["role"] for message in messages] != ["user", "assistant"] or len(kinds) != 1 or len(words) != 1:
            raise SampleError('`text_format="caption"` takes rows of one medium and its caption; use "chat".')
        if not words[0].strip():
            raise SampleError("its caption has no words.")
        tokenizer = self.processor.tokenizer
        text = tokenizer(words[0] + "\n", add_special_tokens=False)["input_ids"][: self.max_length]
        if set(text) & set(self._token_ids.values()):
            raise SampleError(f"its caption has the text of a placeholder: {words[0]!r:.80}.")
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        prompt = start + [self._token_ids[kinds[0]]] * self._num_tokens[kinds[0]]
        return torch.tensor(prompt + text), torch.tensor([_IGNORED] * len(prompt) + text)

    def _chat(
        self, messages: list[dict[str, Any]], entries: list[dict[str, Any]], kinds: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        processor = self.processor
        tokens = {kind: getattr(processor, f"{kind}_token") for kind in _MEDIA_TYPES}
        as_shown = {kind: tokens[kind] for kind in _MEDIA_TYPES}
        for entry, kind in zip(entries, kinds, strict=True):
            as_shown[entry["type"]] = tokens[kind]  # the audio branch hears what the words say is seen
        try:
            prompts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=processor.get_chat_template(),
                return_assistant_tokens_mask=True,
                **{
                    **processor.tokenizer.special_tokens_map,
                    **{f"{kind}_token": token for kind, token in as_shown.items()},
                },
            )
            replacements = [
                [tokens[kind] * self._num_tokens[kind]] * kinds.count(kind) for kind in ("image", "video", "audio")
            ]
            texts, offsets = processor.get_text_with_replacements(prompts, *replacements)
        except (TemplateError, ValueError) as error:
            raise SampleError(f"its conversation does not fit the chat template: {error}") from error
        bos_token = processor.tokenizer.bos_token
        encoded = processor.tokenizer(
            texts,
            add_special_tokens=bos_token is None or not texts[0].startswith(bos_token),
            return_offsets_mapping=True,
            verbose=False,  # of too long ones, which are cut here
        )
        mask = make_assistant_masks(encoded["offset_mapping"], offsets, spans)[0]
        input_ids = torch.tensor(encoded["input_ids"][0])
        labels = torch.where(torch.tensor(mask).bool(), input_ids, _IGNORED)
        length = self._whole_length(input_ids)
        return input_ids[:length], labels[:length]

    def _whole_length(self, input_ids: torch.Tensor) -> int:
        """`max_length`, or less where that would cut through the placeholders of a medium."""
        for kind, token_id in self._token_ids.items():
            positions = (input_ids == token_id).nonzero()[:, 0]
            for placeholders in positions.split(self._num_tokens[kind]):
                if len(placeholders) and placeholders[0] < self.max_length <= placeholders[-1]:
                    return int(placeholders[0])
        return self.max_length


def crop_frames(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    The published random resized crop: one part of the picture for all frames, back at their size by bicubic
    interpolation.

    Args:
        frames: uint8 (frames, 3, height, width).
        generator: draws the part.

    Returns:
        uint8 (frames, 3, height, width): interpolated values are limited to 0–255 and lose their fraction.
    """
    top, left, height, width = _draw_crop(frames, generator)
    part = frames[..., top : top + height, left : left + width].float()
    resized = torch.nn.functional.interpolate(part, size=frames.shape[-2:], mode="bicubic", align_corners=False)
    return resized.clamp(0, 255).to(torch.uint8)


def _draw_crop(picture: torch.Tensor | Image.Image, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width."""
    from torchvision.transforms import RandomResizedCrop

    # torchvision draws from the global generator, which has to be as before afterwards
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return RandomResizedCrop.get_params(picture, list(CROP_SCALE), list(CROP_RATIO))


def _is_image(entry: dict[str, Any]) -> bool:
    return entry["type"] == "image" or (entry["type"] == "audio" and is_frame(entry["path"]))


def _ask_about_images(messages: list[dict[str, Any]], generator: torch.Generator) -> None:
    """Put one of the published requests beside an image that is shown without words."""
    for message in messages:
        types = {entry["type"] for entry in message["content"]}
        if message["role"] == "user" and types == {"image"}:
            request = IMAGE_REQUESTS[int(torch.randint(len(IMAGE_REQUESTS), (), generator=generator))]
            message["content"].append({"type": "text", "text": request})
