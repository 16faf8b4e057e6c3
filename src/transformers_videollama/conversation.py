"""`Conversation`: one question after another about the same media, which are read and encoded once.

Above `generate` and the processor, below the command line. The decoder's cache is kept between questions, so that each
of them costs no more than its own tokens.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from .generation_video_llama import CACHE_NAME
from .modeling_video_llama import VideoLlamaForConditionalGeneration
from .processing_video_llama import REPEATED_ROLE, VideoLlamaProcessor

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Conversation:
    """
    A chat with a model, whose media and earlier turns stay in the decoder's cache.

    Args:
        model ([`VideoLlamaForConditionalGeneration`]): The model.
        processor ([`VideoLlamaProcessor`]): Its processor.
        system_prompt (`str`, *optional*): What comes before the first question. By default what the template says.
        processor_kwargs:
            Further arguments of [`~VideoLlamaProcessor.apply_chat_template`], such as `num_frames` and
            `load_audio_from_video`.

    Attributes:
        messages (`list[dict]`): The chat so far, each answer included.

    Example:

    ```python
    >>> chat = Conversation(model, processor)
    >>> chat.ask("What is shown?", [{"type": "video", "path": "clip.mp4"}])
    'A red bird.'
    >>> chat.ask("Which way does it fly?")
    'Left.'
    ```
    """

    def __init__(
        self,
        model: VideoLlamaForConditionalGeneration,
        processor: VideoLlamaProcessor,
        system_prompt: str | None = None,
        **processor_kwargs: Any,
    ):
        self.model = model
        self.processor = processor
        self.processor_kwargs = processor_kwargs
        self.messages: list[dict[str, Any]] = []
        if system_prompt is not None:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
        self._placeholders = {getattr(processor, f"{kind}_token_id") for kind in ("image", "video", "audio")}
        self._entries: list[tuple] = []  # the media that were read
        self._media: dict[str, torch.Tensor] = {}  # what the model takes of them
        self._cache = DynamicCache()
        self._cached_ids: list[int] = []

    def ask(
        self,
        question: str,
        media: Sequence[dict[str, Any]] = (),
        on_text: Callable[[str], None] | None = None,
        **generate_kwargs: Any,
    ) -> str:
        """
        Asks a question and adds it and its answer to `messages`. If it fails or is interrupted, `messages` is as
        before.

        Args:
            question (`str`): The question.
            media (`Sequence[dict]`, *optional*):
                New media that it is about, as entries of a message's content: `{"type": "video", "path": …}`. To ask
                several questions about a medium, each in a chat of its own, set `messages` back and give it again: it
                is not read again.
            on_text (`Callable[[str], None]`, *optional*):
                Is given the answer piece by piece while it is generated; in one piece by a beam search.
            generate_kwargs: Arguments of `generate`. A beam search (`num_beams`) keeps nothing in the cache.

        Returns:
            `str`: the answer.

        Raises:
            MediaError: if a file cannot be used; the message names it.
        """
        message = {"role": "user", "content": [*media, {"type": "text", "text": question}]}
        messages = [*self.messages, message]
        ids = self._read(messages)
        is_beam_search = generate_kwargs.get("num_beams", 1) > 1
        if is_beam_search:
            self._cached_ids = []  # one row cannot be continued as several
        known = self._keep_of_cache(ids)
        is_media_cached = not self._placeholders.intersection(ids[known:])
        if on_text is not None and not is_beam_search:
            generate_kwargs["streamer"] = AnswerStreamer(self.processor, on_text)
        self._cached_ids = []  # nothing is known of the cache if it is interrupted
        input_ids = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **{CACHE_NAME: self._cache},
            **({} if is_media_cached else self._media),
            **generate_kwargs,
        )
        new_ids = output[0, len(ids) :]
        if not is_beam_search:
            self._cached_ids = (ids + new_ids.tolist())[: self._cache.get_seq_length()]
        answer = str(self.processor.post_process_image_text_to_text(new_ids))
        if on_text is not None and is_beam_search:
            on_text(answer)
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer

    def read(self, media: Sequence[dict[str, Any]]) -> None:
        """
        Reads media before anything is asked about them: a question about the same ones does not read them again.

        Args:
            media (`Sequence[dict]`): What the next question will be about, as [`~Conversation.ask`] takes it.

        Raises:
            MediaError: if a file cannot be used; the message names it.
        """
        self._read([*self.messages, {"role": "user", "content": [*media, {"type": "text", "text": ""}]}])

    def _read(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt's token ids. Media are read and prepared only where they are not those of the last prompt."""
        contents = (message["content"] for message in messages if not isinstance(message["content"], str))
        entries = [_identity(entry) for content in contents for entry in content if entry["type"] != "text"]
        options = {"add_generation_prompt": True, **self.processor_kwargs}
        processor = self.processor
        if entries != self._entries:
            if entries[: len(self._entries)] != self._entries:
                self._cached_ids = []  # of other media, whose placeholders are the same
            inputs = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", **options
            )
            ids = inputs.pop("input_ids")[0].tolist()
            del inputs["attention_mask"]
            self._media = {
                name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            }
            self._entries = entries
            return ids
        return prompt_ids(processor, messages, **options)

    def _keep_of_cache(self, ids: list[int]) -> int:
        """Cuts the cache to what it shares with a prompt, of which at least the last token is left to be read."""
        known = 0
        while known < min(len(self._cached_ids), len(ids) - 1) and ids[known] == self._cached_ids[known]:
            known += 1
        in_cache = int(self._cache.get_seq_length())
        if not self._cached_ids or self._placeholders.intersection(self._cached_ids[known:]):
            # Interrupted, or cut among media, of which the model takes all or none
            self._cache, known = DynamicCache(), 0
        elif known < in_cache:
            self._cache.crop(known - in_cache)
        return known


def prompt_ids(processor: VideoLlamaProcessor, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """
    The token ids of a chat's prompt, with a placeholder for every soft token, without its media being decoded.

    Args:
        processor ([`VideoLlamaProcessor`]): Renders the chat and tokenises it.
        messages (`list[dict]`): The chat, whose entries may merely mark the place of a medium.
        options: Further arguments of [`~VideoLlamaProcessor.apply_chat_template`].

    Returns:
        `list[int]`

    Raises:
        ValueError: if the words of a message hold a placeholder.
    """
    text = processor.apply_chat_template(messages, tokenize=False, **options)
    words = "\n".join(_words(message) for message in messages)
    for kind in ("image", "video", "audio"):
        token = getattr(processor, f"{kind}_token")
        if token in words:
            raise ValueError(f"A message has {token} among its words, which stands for a medium: leave it out.")
        text = text.replace(token, token * getattr(processor, f"num_{kind}_tokens"))
    starts_itself = processor.tokenizer.bos_token is not None and text.startswith(processor.tokenizer.bos_token)
    return processor.tokenizer(text, add_special_tokens=not starts_itself)["input_ids"]


def _words(message: dict[str, Any]) -> str:
    content = message["content"]
    entries = [{"text": content}] if isinstance(content, str) else content
    return "\n".join(entry.get("text") or "" for entry in entries)


def _identity(entry: dict[str, Any]) -> tuple:
    """Tells an entry of a message from others, whose media may be arrays, without looking into them."""
    return tuple((name, value if isinstance(value, str) else id(value)) for name, value in sorted(entry.items()))


class AnswerStreamer(BaseStreamer):
    """
    Hands over an answer while it is generated, as [`~VideoLlamaProcessor.post_process_image_text_to_text`] will return
    it: without stop string, with no half of a character.

    Args:
        processor ([`VideoLlamaProcessor`]): Decodes the tokens.
        on_text (`Callable[[str], None]`): Is given each new piece of text.
        stop_strings (`Sequence[str]`, *optional*): What ends the answer beside the processor's own stop string.

    Attributes:
        text (`str`): The answer so far, without what follows a stop string.
        is_stopped (`bool`): Whether a stop string has come.
    """

    def __init__(
        self, processor: VideoLlamaProcessor, on_text: Callable[[str], None], stop_strings: Sequence[str] = ()
    ):
        self.processor = processor
        self.on_text = on_text
        self.stop_strings = [*stop_strings, *([processor.stop_string] if processor.stop_string else [])]
        self.is_stopped = False
        self._special_ids = set(processor.tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._shown = ""
        self._is_prompt = True

    @property
    def text(self) -> str:
        return self._decode(self._ids)

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt once, then the tokens of one answer as they come."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        raw = self.processor.tokenizer.decode(self._ids, skip_special_tokens=True)
        self.is_stopped = any(stop in raw for stop in self.stop_strings)
        text = self._settled_text()
        # What may be the beginning of a stop string waits for what follows; so do blanks, which may end the answer,
        # and the role that a model may repeat, which is no part of it
        held = max(
            (n for stop in self.stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        if not REPEATED_ROLE.startswith(text):
            self._show(text[: len(text) - held].rstrip())

    def end(self) -> None:
        """Shows what was held back."""
        self._show(self.text)

    def _settled_text(self) -> str:
        """
        The text that stays as it is whatever follows. LLaMA's tokens of single bytes are decoded together: one that
        fits nowhere makes all those beside it unreadable.
        """
        data, num_open = b"", 0
        for number, index in enumerate(reversed(self._ids), 1):
            token = self.processor.tokenizer.convert_ids_to_tokens(index)
            if index in self._special_ids or token is None:  # neither is shown
                continue
            byte = _BYTE_TOKEN.fullmatch(token)
            if byte is None:
                break
            data, num_open = bytes([int(byte[1], 16)]) + data, number
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":  # unreadable for good
                return self.text
        return self._decode(self._ids[: len(self._ids) - num_open]).rstrip("�")

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text = str(self.processor.post_process_image_text_to_text(torch.tensor(ids)))
        for stop in self.stop_strings:
            text = text.split(stop)[0]
        return text

    def _show(self, text: str) -> None:
        if text.startswith(self._shown) and len(text) > len(self._shown):
            self.on_text(text[len(self._shown) :])
            self._shown = text
