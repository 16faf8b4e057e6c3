"""From prompts and media to the inputs of the model: tokenizer, image and video processor and feature extractor in
one.

The last step before the model. `VideoLlamaProcessor.apply_chat_template` opens the media of a chat, so that the prompt
can say what is in them (a sound of its own, the seconds of the frames), renders the prompt and has the inherited
`__call__` put each medium's placeholder tokens in its place. The templates are in `chat_templates`.
"""

import base64
import bisect
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, pre_tokenizers
from transformers import BatchFeature, LlamaTokenizer, PreTrainedTokenizerBase, SequenceFeatureExtractor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import TensorType
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .chat_templates import CHAT_TEMPLATES, STOP_STRINGS
from .media import has_audio, is_opened, open_media, open_picture
from .video_processing_video_llama import is_frame

REPEATED_ROLE = "Assistant:"
"""What a model may begin its answer with, and what is no part of it."""
_MEDIA_TYPES = ("image", "video", "audio")
_SAMPLING_ARGUMENTS = ("num_frames", "fps", "video_metadata")  # of calls, not of single content entries
# What the library puts before special tokens that `sanitize_control_tokens` turns into plain text
_USER_TEXT_MARK = "\U000f0000"


class VideoLlamaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    # Newer versions of transformers take a `text_kwargs` of the processor instead, and still this
    _defaults = {"text_kwargs": {"padding": True}}


class VideoLlamaProcessor(ProcessorMixin):
    r"""
    Prepares text, images, videos and sounds for Video-LLaMA.

    Called with `text`, `images`, `videos` and `audio`, it replaces the n-th `<image>`, `<video>` or `<audio>` of the
    texts (in reading order, across the batch) by as many placeholder tokens as the n-th medium takes in the prompt.
    [`~VideoLlamaProcessor.apply_chat_template`] also writes the prompt.

    The tokenizer is changed where the model needs it: placeholder tokens it does not know are added as special tokens
    (in the order image, video, audio), prompts of a batch are padded on the left, as generation needs, with its
    unknown token (else its end-of-sequence token) if it has no padding token. A LLaMA tokenizer starts a prompt with
    its beginning-of-sequence token and puts its leading space behind special tokens too, because the published system
    tokenizes the pieces around the media one by one.

    Args:
        image_processor (`VideoLlamaImageProcessor`): images to `pixel_values` (N, 3, H, W).
        tokenizer (`PreTrainedTokenizerBase`): the decoder's tokenizer.
        video_processor (`VideoLlamaVideoProcessor`): videos to `pixel_values_videos` (N, T, 3, H, W).
        feature_extractor (`VideoLlamaFeatureExtractor`): sounds to `input_features` (N, 8, 128, 204).
        chat_template (`str`, *optional*): a Jinja template, or `"vicuna"`, `"llama_2"` or `"plain"` for the published
            prompt of such a decoder.
        image_token, video_token, audio_token (`str`): the placeholder tokens.
        num_image_tokens, num_video_tokens, num_audio_tokens (`int`): how many soft tokens a medium of each kind takes
            in the prompt, whatever its size; 32, 32 and 8 as published.
        load_audio_from_video (`bool`, defaults to `True`): whether `apply_chat_template` hears a video's own sound.
            Set it to `False` for a model without audio branch.
        stop_string (`str`, *optional*): what ends an answer beside the end-of-sequence token; by default that of the
            family, if `chat_template` names one (`"###"` for Vicuna).
    """

    _auto_class = "AutoProcessor"

    valid_processor_kwargs = VideoLlamaProcessorKwargs

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        video_processor: BaseVideoProcessor | None = None,
        feature_extractor: SequenceFeatureExtractor | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        audio_token: str = "<audio>",
        num_image_tokens: int = 32,
        num_video_tokens: int = 32,
        num_audio_tokens: int = 8,
        load_audio_from_video: bool = True,
        stop_string: str | None = None,
    ):
        # As the library sets it when the processor is saved, so that saving and loading give the same processor
        self.auto_map = {self._auto_class: "processing_video_llama.VideoLlamaProcessor"}
        self.image_token = image_token
        self.video_token = video_token
        self.audio_token = audio_token
        self.num_image_tokens = num_image_tokens
        self.num_video_tokens = num_video_tokens
        self.num_audio_tokens = num_audio_tokens
        self.load_audio_from_video = load_audio_from_video
        if isinstance(chat_template, str) and chat_template in CHAT_TEMPLATES:
            stop_string = STOP_STRINGS[chat_template] if stop_string is None else stop_string
            chat_template = CHAT_TEMPLATES[chat_template]
        self.stop_string = stop_string
        super().__init__(image_processor, tokenizer, video_processor, feature_extractor, chat_template=chat_template)
        _prepare_tokenizer(self.tokenizer, [image_token, video_token, audio_token])
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = self.tokenizer.convert_tokens_to_ids(video_token)
        self.audio_token_id = self.tokenizer.convert_tokens_to_ids(audio_token)

    # -----------------------------------------------------------------------------------------------------------------
    # Hooks of the inherited `__call__`

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """As in the library, but sounds stay what they are, in a flat list: arrays of one or more channels, (samples,
        rate) pairs, or files, which the feature extractor opens itself."""
        if text is not None and not isinstance(text, str):
            text = _as_texts(text)
        images, text, videos, _ = super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)
        if isinstance(videos, (list, tuple)):  # with a list for each prompt, which is empty for those without video
            videos = [video for video in videos if not isinstance(video, (list, tuple)) or len(video)] or None
        return images, text, videos, None if audio is None else list(_flat_sounds(audio)) or None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """See [`ProcessorMixin.save_pretrained`]."""
        # `pipeline(dtype=…)` tells the tokenizer of the model's number format, which no file can hold
        self.tokenizer.init_kwargs.pop("dtype", None)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Only what can be known before the media are opened; `get_text_with_replacements` compares the counts."""
        if images is None and text is None and videos is None and audio is None:
            raise ValueError(f"{type(self).__name__} needs at least one of `images`, `text`, `videos` and `audio`.")

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        # `apply_chat_template` has them processed already: it needs their timestamps to write the prompt
        processed = videos if isinstance(videos, BatchFeature) else self.video_processor(videos, **kwargs)
        num_videos = len(processed["pixel_values_videos"])
        return processed, [self.replace_video_token(processed, index) for index in range(num_videos)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_image_tokens

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        return self.video_token * self.num_video_tokens

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs: Any) -> str:
        return self.audio_token * self.num_audio_tokens

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: list[str] | None = None,
        videos_replacements: list[str] | None = None,
        audio_replacements: list[str] | None = None,
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """As in the library, after a check that there is one placeholder for each medium.

        Raises:
            ValueError: the numbers differ; the message names both.
        """
        all_replacements = (images_replacements or [], videos_replacements or [], audio_replacements or [])
        names = ((self.image_token, "images"), (self.video_token, "videos"), (self.audio_token, "audio inputs"))
        for (token, name), replacements in zip(names, all_replacements, strict=True):
            num_tokens = sum(prompt.count(token) - prompt.count(_USER_TEXT_MARK + token) for prompt in text)
            if num_tokens != len(replacements):
                raise ValueError(
                    f"The total number of {token} tokens in the prompts should be the same as the number of {name}"
                    f" passed. Found total {num_tokens} {token} tokens and {len(replacements)} {name}."
                )
        return super().get_text_with_replacements(text, *all_replacements)

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[list[int]] | None = None,
        video_sizes: list[list[int]] | None = None,
        audio_lengths: list[int] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """How many placeholder tokens media of these sizes take; servers ask before they have the media.

        Args:
            image_sizes: (height, width) of each image.
            video_sizes: (frames, height, width) of each video.
            audio_lengths: samples of each sound.
        """
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [self.num_image_tokens] * len(image_sizes)
            counts["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            counts["num_video_tokens"] = [self.num_video_tokens] * len(video_sizes)
        if audio_lengths is not None:
            counts["num_audio_tokens"] = [self.num_audio_tokens] * len(audio_lengths)
        return MultiModalData(**counts)

    # -----------------------------------------------------------------------------------------------------------------
    # Chats

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | TensorType | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> str | list[str] | list[list[int]] | BatchFeature:
        r"""
        Write the prompt of a chat and, with `tokenize=True`, prepare it and its media for the model.

        Each file is opened once. With `tokenize=False` only as much of it is read as the prompt needs.

        What a prompt says about its media:

        - A video with a sound of its own, or beside an `audio` entry, is the published "Close your eyes, open your
          ears …" sentence, the sound's placeholder before the video's.
        - A video without sound is `<Video>…</Video> ` and the published sentence on the seconds of its frames. The
          sentence is left out where the seconds are not known: arrays and lists of frames without `video_metadata`,
          and entries that only mark the place of a video (`{"type": "video"}`) and do not say them under
          `"timestamps"`.
        - An image is `<Image>…</Image> `.
        - A sound alone is the first sentence about the eyes and ears, and the question is about what was "heard".
        - Entries stand in reading order, joined by single spaces; several media in a message have their sentences one
          after the other, and "Now answer my question …" follows the last of them. Media of later messages are
          described in these messages.

        Args:
            conversation: a chat, or a list of chats. A message's content is a string or a list of entries
                `{"type": "text", "text": …}`, `{"type": "image", …}`, `{"type": "video", …}` and
                `{"type": "audio", …}`, with the medium under `"path"`, `"url"` or the name of its type: a path, an
                http(s) address, a `data:` URI, bytes, or what the processors of the medium take (a PIL image; frames;
                an array of samples, whose rate is in the entry's or the `processor_kwargs`' `"sampling_rate"`).
                `image_url`, `video_url`, `audio_url` and `input_audio` entries of the OpenAI format are taken as well.
                An empty `audio` entry beside a video file stands for the video's own sound.
            chat_template: another template than the processor's.
            tools, documents: passed to the template; the published ones have no use for them.
            add_generation_prompt: end with what makes the assistant answer.
            continue_final_message: leave the last message open, so that generation continues it.
            return_assistant_tokens_mask: also return `assistant_masks`, 1 for the tokens of the assistant's words and
                of the mark that ends them. Needs `tokenize` and `return_dict`.
            tokenize: return model inputs and not the prompt.
            return_tensors: `"pt"` or `"np"`.
            return_dict: return all inputs, not only `input_ids`: `attention_mask`, `pixel_values`,
                `pixel_values_videos`, `padding_mask_videos`, `input_features`, each only where there is something for
                it. Media of all chats follow each other in reading order.
            load_audio_from_video: hear the sound track of video files that have one. By default the processor's own
                `load_audio_from_video`.
            processor_kwargs: arguments for `__call__`, such as `num_frames`.
            sanitize_control_tokens: write special tokens that are found in the chat as plain text, where the installed
                `transformers` can.

        Returns:
            The prompt (a list of them for a list of chats), or the model inputs, always as a batch.

        Raises:
            MediaError: a file cannot be used; the message names it.
            ValueError: a message or an entry is not as described above.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("`continue_final_message` and `add_generation_prompt` exclude each other.")
        if continue_final_message and return_assistant_tokens_mask:
            raise ValueError("`continue_final_message` and `return_assistant_tokens_mask` exclude each other.")
        template = self.get_chat_template(chat_template)
        template_variables = _get_template_variables(template)
        template_kwargs = {name: value for name, value in kwargs.items() if name in template_variables}
        call_kwargs = {name: value for name, value in kwargs.items() if name not in template_variables}
        for name, value in (processor_kwargs or {}).items():
            call_kwargs[name] = dict(value) if isinstance(value, dict) else value
        if return_tensors not in (None, "auto"):
            call_kwargs["return_tensors"] = return_tensors
        if load_audio_from_video is None:
            load_audio_from_video = self.load_audio_from_video

        chats, is_batched = _split_chats(conversation)
        chats = [[_read_message(message) for message in chat] for chat in chats]
        with contextlib.ExitStack() as opened_files:
            video_entries = self._open_videos(chats, opened_files, load_audio_from_video)
            if tokenize:
                _check_media_are_given(chats)
            videos = self._process_for_prompt(video_entries, tokenize, call_kwargs)
            shown_chats = [[_show(message) for message in chat] for chat in chats]
            if sanitize_control_tokens:
                if not hasattr(self.tokenizer, "_mark_chat_inputs"):
                    raise ValueError("`sanitize_control_tokens` needs a newer version of transformers.")
                shown_chats, tools, documents, template_kwargs = self.tokenizer._mark_chat_inputs(
                    template, shown_chats, tools, documents, template_kwargs, tokenize, return_assistant_tokens_mask
                )
                call_kwargs["sanitize_control_tokens"] = True
            placeholders = {f"{kind}_token": getattr(self, f"{kind}_token") for kind in _MEDIA_TYPES}
            rendered: Any = render_jinja_template(
                conversations=shown_chats,
                tools=tools,
                documents=documents,
                chat_template=template,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens_map, **placeholders, **template_kwargs},
            )
            prompts, spans = rendered
            if not tokenize:
                return prompts if is_batched else prompts[0]
            if return_assistant_tokens_mask:
                call_kwargs.update(return_offsets_mapping=True, return_text_replacement_offsets=True)
            inputs = self._call_with_media(prompts, chats, videos, call_kwargs)
        if not return_dict:
            return inputs["input_ids"]
        if return_assistant_tokens_mask:
            inputs["assistant_masks"] = make_assistant_masks(
                inputs.pop("offset_mapping"), inputs.pop("text_replacement_offsets"), spans
            )
            inputs.convert_to_tensors(call_kwargs.get("return_tensors"))
        return inputs

    def _call_with_media(
        self,
        prompts: list[str],
        chats: list[list[dict[str, Any]]],
        videos: BatchFeature | None,
        call_kwargs: dict[str, Any],
    ) -> BatchFeature:
        images = [
            [read_image(entry["source"]) for entry in _entries([chat]) if _has(entry, "image")] for chat in chats
        ]
        # A video's own sound comes from its file, which the feature extractor decodes
        audio = [entry["source"] for entry in _entries(chats) if _has(entry, "audio") or entry.get("has_audio")]
        if audio:
            nested = "sampling_rate" in call_kwargs.get("audio_kwargs", {})
            place = call_kwargs["audio_kwargs"] if nested else call_kwargs
            if place.get("sampling_rate") is None:
                place["sampling_rate"] = self.feature_extractor.sampling_rate
        bos_token = self.tokenizer.bos_token
        if call_kwargs.get("sanitize_control_tokens") and self.tokenizer("")["input_ids"]:
            prompts = [bos_token + prompt for prompt in prompts]  # the library leaves it out then
        if bos_token is not None and prompts[0].startswith(bos_token):
            call_kwargs["add_special_tokens"] = False
        return self(
            text=prompts, images=images if any(images) else None, videos=videos, audio=audio or None, **call_kwargs
        )

    def _open_videos(
        self, chats: list[list[dict[str, Any]]], opened_files: contextlib.ExitStack, load_audio: bool
    ) -> list[dict[str, Any]]:
        """Put an opened file in the place of each video file, and note whether its own sound is to be heard.

        Returns:
            The entries of all videos, in reading order.
        """
        for message in (message for chat in chats for message in chat if isinstance(message.get("content"), list)):
            content = message["content"]
            for position, entry in enumerate(content):
                if entry["type"] != "video" or not _is_file(entry["source"]) or is_frame(entry["source"]):
                    continue
                entry["source"] = opened_files.enter_context(open_media(entry["source"]))
                if not load_audio:
                    continue
                entry["has_audio"] = has_audio(entry["source"])
                # An empty audio entry beside a video file stands for the file's own sound, which is known by now
                for beside in content[position + 1 : position + 2] + content[max(position - 1, 0) : position]:
                    if beside["type"] == "audio" and beside["source"] is None:
                        beside["type"] = "known sound"
                        break
            message["content"] = [entry for entry in content if entry["type"] != "known sound"]
        return [entry for entry in _entries(chats) if entry["type"] == "video" and entry["source"] is not None]

    def _process_for_prompt(
        self, entries: list[dict[str, Any]], decode: bool, call_kwargs: dict[str, Any]
    ) -> BatchFeature | None:
        """Note the timestamps of videos in their entries, and with `decode` process them."""
        if not entries:
            return None
        copied = {name: dict(value) if isinstance(value, dict) else value for name, value in call_kwargs.items()}
        videos_kwargs = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **copied
        )["videos_kwargs"]
        if not decode:
            for entry in entries:
                if is_opened(entry["source"]):
                    metadata = self.video_processor.read_metadata(entry["source"], **videos_kwargs)
                    entry["timestamps"] = frame_timestamps(metadata)
            return None
        videos = [entry["source"] for entry in entries]
        processed = self.video_processor(videos, **{**videos_kwargs, "return_metadata": True})
        if len(processed["video_metadata"]) != len(entries):
            raise ValueError(
                f"The {len(entries)} content entries of type 'video' hold {len(processed['video_metadata'])} videos: "
                "give each video its own entry."
            )
        for entry, metadata in zip(entries, processed["video_metadata"], strict=True):
            entry["timestamps"] = frame_timestamps(metadata)
        return processed

    def get_chat_template(self, chat_template: str | None = None) -> str:
        """
        The Jinja template that [`~VideoLlamaProcessor.apply_chat_template`] renders.

        Args:
            chat_template (`str`, *optional*):
                a template, or the name of one of the processor's own or of the published ones; by default the
                processor's own (`"default"`, if it has several).

        Raises:
            ValueError: none was given, and the processor has none of its own, or several and no default.
        """
        own = self.chat_template
        if isinstance(own, dict) and (chat_template or "default") in own:
            return own[chat_template or "default"]
        if chat_template is not None:
            return CHAT_TEMPLATES.get(chat_template, chat_template)
        if isinstance(own, str):
            return own
        if isinstance(own, dict):
            raise ValueError(f"Which chat template? Pass `chat_template`, one of {', '.join(own)}; none is 'default'.")
        raise ValueError(
            "This processor has no chat template. Pass `chat_template`, which may be one of"
            f" {', '.join(CHAT_TEMPLATES)}, or create the processor with one."
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Answers

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> str | list[str]:
        """
        Decode what `generate` returned.

        Answers alone end where the published system ends them: before the family's stop string, without a repeated
        "Assistant:" in front and blanks around. Token ids that begin with the prompt, which one tells from the
        beginning-of-sequence token, keep its text as it is, and lose nothing but a stop string at the very end.

        Args:
            generated_outputs (`torch.Tensor` or `np.ndarray`): token ids (batch, length) or (length,).
            skip_special_tokens (`bool`, defaults to `True`): leave special tokens out of the text.
            kwargs: further arguments of the tokenizer's `decode`.

        Returns:
            `list[str]`, or `str` for (length,).
        """
        texts = super().post_process_image_text_to_text(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )
        if isinstance(texts, str):
            return self._end_answer(texts, generated_outputs)
        return [self._end_answer(text, ids) for text, ids in zip(texts, generated_outputs, strict=True)]

    def _end_answer(self, text: str, ids: Iterable[int]) -> str:
        first_id = next((int(i) for i in ids if int(i) != self.tokenizer.pad_token_id), None)
        if first_id == self.tokenizer.bos_token_id:
            return text.removesuffix(self.stop_string or "")
        if self.stop_string:
            text = text.lstrip().split(self.stop_string)[0]
        return text.strip().removeprefix(REPEATED_ROLE).strip()


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, placeholders: list[str]) -> None:
    known = tokenizer.get_vocab()
    missing = [AddedToken(token, special=True, normalized=False) for token in placeholders if token not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    # Converted from a SentencePiece model alone, a LLaMA tokenizer forgets the start token that LLaMA needs
    if isinstance(tokenizer, LlamaTokenizer) and tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True
    # Newer LLaMA tokenizers put a space before the first piece only. The published system's put one before each.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pre_tokenizer = getattr(backend, "pre_tokenizer", None)
    if isinstance(pre_tokenizer, pre_tokenizers.Metaspace) and pre_tokenizer.prepend_scheme == "first":
        pre_tokenizer.prepend_scheme = "always"
        backend.pre_tokenizer = pre_tokenizer
        if getattr(tokenizer, "legacy", None) is False:  # what `LlamaTokenizer` builds itself from when it is loaded
            tokenizer.legacy = tokenizer.init_kwargs["legacy"] = True


def _as_texts(text: Any) -> list[str]:
    """A list of prompts, which may also come as a tuple, an array or the column of a data set."""
    prompts = list(text) if isinstance(text, Iterable) else []
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"`text` must be a string or a list of at least one string, not {text!r:.80}.")
    return prompts


def _split_chats(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """A chat or a list of chats as a list of chats, and whether it was one."""
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(
            "A conversation is a list of messages `{'role': …, 'content': …}`, or a list of such lists; got"
            f" {conversation!r:.80}."
        )
    is_batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    chats = [getattr(chat, "messages", chat) for chat in conversation] if is_batched else [conversation]
    return [list(chat) for chat in chats], is_batched


def _as_dict(value: Any) -> Any:
    """A message or an entry as a dict, if it is a dataclass or, as the OpenAI client's are, one of Pydantic's."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    return value


def _read_message(message: Any) -> dict[str, Any]:
    """A copy of a message, whose entries, if its content is not a string, are as `read_content_entry` returns them."""
    message = _as_dict(message)
    if not isinstance(message, dict) or "role" not in message:
        raise ValueError(f"A message is a dict with 'role' and 'content'; got {message!r:.80}.")
    message = {name: value for name, value in message.items() if value is not None}
    content = message.get("content", None if message["role"] == "user" else "")
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(f"A message's 'content' is a string or a list of entries; got {message!r:.80}.")
    if not isinstance(content, str):
        message["content"] = [read_content_entry(_as_dict(entry)) for entry in message["content"]]
    return message


def read_content_entry(entry: str | dict[str, Any]) -> dict[str, Any]:
    """
    One form for all that a message's content may consist of.

    Args:
        entry: as [`~VideoLlamaProcessor.apply_chat_template`] takes it.

    Returns:
        `{"type": "text", "text": …}` or `{"type": "image" | "video" | "audio", "source": …}`, in which the source is
        the medium, a pair with its sampling rate where the entry gives one, or None, then with the entry's
        `"timestamps"` if it has any.

    Raises:
        ValueError: it is none of the known types.
    """
    if isinstance(entry, str):
        return {"type": "text", "text": entry}
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind == "text":
        if not isinstance(entry.get("text"), str):
            raise ValueError(f"A content entry of type 'text' has its words as 'text'; got {entry!r:.120}.")
        return dict(entry)
    if kind in _MEDIA_TYPES:
        source = next((entry[name] for name in (kind, "url", "path") if entry.get(name) is not None), None)
        if source is None and entry.get("base64") is not None:
            source = _decode_base64(entry["base64"])
        for name in _SAMPLING_ARGUMENTS:
            if entry.get(name) is not None:
                raise ValueError(
                    f"'{name}' of a content entry is not read: give it for all videos, as"
                    f" `processor_kwargs={{'{name}': …}}`; got {entry!r:.120}."
                )
    elif kind in ("image_url", "video_url", "audio_url"):
        source = entry.get(kind)
        source = source.get("url") if isinstance(source, dict) else source
        kind = kind.removesuffix("_url")
    elif kind == "input_audio":
        sound = entry.get("input_audio")
        kind, source = "audio", _decode_base64(sound.get("data") if isinstance(sound, dict) else None)
    else:
        raise ValueError(f"A content entry has type 'text', 'image', 'video' or 'audio'; got {entry!r:.120}.")
    rate = entry.get("sampling_rate")
    if isinstance(source, dict) and "array" in source:  # as the `datasets` library gives sounds
        source, rate = source["array"], source.get("sampling_rate")
    if rate is not None and not isinstance(rate, (int, np.integer)):
        raise ValueError(f"The 'sampling_rate' of a content entry is a whole number of Hz, not {rate!r}.")
    if source is None and "timestamps" in entry:
        return {"type": kind, "source": None, "timestamps": entry["timestamps"]}
    return {"type": kind, "source": source if rate is None else (source, rate)}


def _decode_base64(data: Any) -> bytes:
    if not isinstance(data, (str, bytes)):
        raise ValueError(f"A medium in base64 is a string; got {data!r:.80}.")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ValueError(f"A medium in base64 cannot be decoded ({error}): {data!r:.40}…") from error


def _entries(chats: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for message in (message for chat in chats for message in chat):
        if isinstance(message.get("content"), list):
            yield from message["content"]


def _check_media_are_given(chats: list[list[dict[str, Any]]]) -> None:
    for entry in _entries(chats):
        if entry["type"] in _MEDIA_TYPES and entry["source"] is None:
            raise ValueError(
                f"A content entry of type '{entry['type']}' has no medium: it is given as 'path', 'url' or"
                f" '{entry['type']}'. (An empty 'audio' entry stands for the sound of the video file beside it, where"
                " that is to be heard.)"
            )


def _show(message: dict[str, Any]) -> dict[str, Any]:
    """What the template gets to see of a message: words and notes, no media but, as `"url"`, the names of files."""
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_show_entry(entry) for entry in message["content"]]}


def _show_entry(entry: dict[str, Any]) -> dict[str, Any]:
    source = entry.get("source")
    shown = {name: value for name, value in entry.items() if name != "source"}
    return {**shown, "url": source} if isinstance(source, str) else shown


def _is_pair(sound: Any) -> bool:
    """Whether a sound is given as its samples and their rate, as `read_audio` does."""
    return isinstance(sound, tuple) and len(sound) == 2 and isinstance(sound[1], (int, np.integer))


def _flat_sounds(audio: Any) -> Iterator[Any]:
    """One sound, or sounds in lists of any depth: arrays, lists of samples, (samples, rate) pairs and files."""
    is_list = isinstance(audio, (list, tuple)) and not (audio and isinstance(audio[0], (int, float)))
    if (is_list and not _is_pair(audio)) or getattr(audio, "ndim", None) == 3:
        for item in audio:
            yield from _flat_sounds(item)
    else:
        yield audio


def _is_file(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read")


def _has(entry: dict[str, Any], kind: str) -> bool:
    return entry["type"] == kind and entry["source"] is not None


def read_image(source: Any) -> Any:
    """
    An image file as a picture, with the library's reader.

    Args:
        source: a path, an http(s) address, a `data:` URI, a file's bytes or a binary file object; anything else is
            returned as it is.

    Returns:
        `PIL.Image.Image` in RGB, upright.

    Raises:
        MediaError: the file is not there, or cannot be read; the message names it.
    """
    if not _is_file(source):
        return source
    return open_picture(source).convert("RGB")


def frame_timestamps(metadata: VideoMetadata) -> list[float] | None:
    """
    When a video's frames are shown, as prompts say it.

    Args:
        metadata ([`VideoMetadata`]): with the frame rate and the indices of the frames.

    Returns:
        `list[float]`: seconds to one decimal, rounded as Python does; None where rate or indices are not known.
    """
    if not metadata.fps or metadata.frames_indices is None:
        return None
    return [round(int(index) / float(metadata.fps), 1) for index in metadata.frames_indices]


def make_assistant_masks(
    offset_mapping: Sequence[Sequence[tuple[int, int]]],
    replacements: list[list[dict[str, Any]]],
    spans: list[list[tuple[int, int]]],
) -> list[list[int]]:
    """
    Which tokens of prompts are the assistant's words.

    Args:
        offset_mapping: for each prompt the (start, end) characters of its tokens, in the text in which each
            placeholder was replaced by as many as its medium takes.
        replacements: for each prompt these replacements, as [`~VideoLlamaProcessor.get_text_with_replacements`]
            returns them.
        spans: for each prompt the (start, end) characters of the assistant's words, in the text before.

    Returns:
        For each prompt a list with 1 for every token with a character in one of its spans, and 0 for the others.
    """
    masks: list[list[int]] = []
    for offsets, prompt_replacements, prompt_spans in zip(offset_mapping, replacements, spans, strict=True):
        starts, ends = np.asarray(offsets).T
        placeholder_ends = [replacement["span"][1] for replacement in prompt_replacements]
        gained = [0] + [replacement["new_span"][1] - replacement["span"][1] for replacement in prompt_replacements]
        mask: np.ndarray = np.zeros(len(starts), dtype=bool)
        for span in prompt_spans:
            start, end = (char + gained[bisect.bisect_right(placeholder_ends, char)] for char in span)
            mask |= (starts < end) & (ends > start)
        masks.append(mask.astype(int).tolist())
    return masks
