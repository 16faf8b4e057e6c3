"""From a request to the model's inputs: fetches and decodes media and writes the prompt, in a few threads."""

import copy
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from ..media import MediaError, time_limit
from ..processing_video_llama import VideoLlamaProcessor
from .chat_request import ChatRequest
from .errors import RequestError
from .fetching import Cancelled, Fetcher, FetchRules
from .media_limits import check_media


class Preparation:
    """
    The threads that prepare requests.

    Args:
        processor ([`VideoLlamaProcessor`]): The model's.
        rules ([`FetchRules`]): What may be fetched.
        num_threads (`int`): How many requests are prepared at a time.
        max_files (`int`): The most files of a request.
        max_seconds (`float`): The longest video or sound.
        max_decoding_seconds (`float`): The longest that the media of a request may take to be decoded.
        context_length (`int`): The tokens of prompt and answer together that the decoder was made for.
        system_prompt (`str`, *optional*): What comes before the first question of requests without a system message.
        processor_kwargs: Further arguments of [`~VideoLlamaProcessor.apply_chat_template`].
    """

    def __init__(
        self,
        processor: VideoLlamaProcessor,
        rules: FetchRules,
        num_threads: int,
        max_files: int,
        max_seconds: float,
        max_decoding_seconds: float,
        context_length: int,
        system_prompt: str | None = None,
        **processor_kwargs: Any,
    ):
        self.rules = rules
        self.max_files = max_files
        self.max_seconds = max_seconds
        self.max_decoding_seconds = max_decoding_seconds
        self.context_length = context_length
        self.system_prompt = system_prompt
        self.processor_kwargs = processor_kwargs
        # Versions of transformers that cannot do it refuse a prompt with a placeholder too many
        processor_kwargs["sanitize_control_tokens"] = hasattr(processor.tokenizer, "_mark_chat_inputs")
        self._local = threading.local()
        # A tokenizer may not be used by two threads at once
        copies = [copy.deepcopy(processor) for _ in range(num_threads)]
        self._threads = ThreadPoolExecutor(
            num_threads, "videollama-media", initializer=lambda: setattr(self._local, "processor", copies.pop())
        )

    def submit(self, request: ChatRequest, is_cancelled: Callable[[], bool]) -> "Future[dict[str, torch.Tensor]]":
        """[`~Preparation.prepare`] in one of the threads."""
        return self._threads.submit(self.prepare, request, is_cancelled)

    def close(self) -> None:
        """Ends the threads, which begin nothing new."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def prepare(self, request: ChatRequest, is_cancelled: Callable[[], bool]) -> dict[str, torch.Tensor]:
        """
        Fetches and decodes the media of a request and writes its prompt. Whatever happens, no file is left.

        Args:
            request ([`ChatRequest`]): The request.
            is_cancelled (`Callable[[], bool]`): Is asked again and again meanwhile.

        Returns:
            `dict[str, torch.Tensor]`: the model's inputs, on the CPU, as a batch of one prompt.

        Raises:
            RequestError: 400 for media that are not allowed or cannot be decoded and for prompts that are too long,
                413 for media that are too large.
            Cancelled: if it was.
        """
        if len(request.media) > self.max_files:
            raise RequestError(
                400, f"The request has {len(request.media)} files, but {self.max_files} are taken at most."
            )
        messages = request.messages
        if self.system_prompt is not None and messages[0]["role"] != "system":
            system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            messages = [system, *messages]
        names: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="videollama-serve-") as folder:
            fetcher = Fetcher(self.rules, Path(folder), is_cancelled)

            def read_entry(entry: dict[str, Any]) -> dict[str, Any]:
                if entry["type"] == "text":
                    return entry
                path = fetcher.fetch(entry["url"])
                names[str(path)] = f"The {entry['type']} of {entry['url']:.100}"
                return {"type": entry["type"], "path": str(path)}

            try:
                chat = [{**message, "content": [read_entry(e) for e in message["content"]]} for message in messages]
                with time_limit(self.max_decoding_seconds):
                    for entry in (entry for message in chat for entry in message["content"] if "path" in entry):
                        if is_cancelled():
                            raise Cancelled
                        check_media(entry["type"], Path(entry["path"]), self.max_seconds)
                    inputs = self._local.processor.apply_chat_template(
                        chat,
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=True,
                        return_tensors="pt",
                        **self.processor_kwargs,
                    )
            except (MediaError, TemplateError, ValueError) as error:
                message = str(error)
                for path, name in names.items():
                    message = message.replace(path, name)
                code = "invalid_media" if isinstance(error, MediaError) else None
                raise RequestError(400, message, code=code, param="messages") from error
        num_tokens = inputs["input_ids"].shape[1]
        num_answer = request.max_tokens or 1
        if num_tokens + num_answer > self.context_length:
            raise RequestError(
                400,
                f"The prompt has {num_tokens} tokens and the answer may have {num_answer}, but the model was made for "
                f"{self.context_length} in all. Shorten the chat, or lower `max_tokens`.",
                code="context_length_exceeded",
                param="messages",
            )
        return dict(inputs)
