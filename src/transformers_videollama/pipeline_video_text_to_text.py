"""The pipeline `"video-text-to-text"`: a video and a question, or a chat, in; an answer out.

The outermost layer: it turns what the caller has into a chat, has the processor write the prompt and the inputs, lets
the model generate, and returns what the library's `"image-text-to-text"` pipeline returns. What is not about videos is
inherited from that pipeline.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline, ReturnType
from transformers.pipelines.pt_utils import KeyDataset, PipelineDataset, PipelineIterator
from transformers.utils.chat_template_utils import Chat

from .video_processing_video_llama import is_frame

# What `generate` knows by name: these arguments of a call are for it, all others are for the processor.
GENERATE_ARGUMENTS = frozenset(vars(GenerationConfig())) | (
    frozenset(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
)


class VideoTextToTextPipeline(ImageTextToTextPipeline):
    r"""
    Answers questions about videos, with any model and processor that take videos in chats.

    Args:
        model, processor, device, batch_size, … : As every pipeline. All arguments of a call may be given here already.

    Example:

    ```python
    >>> import transformers_videollama
    >>> from transformers import pipeline

    >>> pipe = pipeline("video-text-to-text", model="path/to/model")
    >>> pipe("clip.mp4", text="What is shown?", return_full_text=False)
    [{'input_text': 'What is shown?', 'generated_text': 'A dog runs over a lawn.'}]

    >>> chat = [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "And?"}]}]
    >>> pipe(chat)[0]["generated_text"][-1]
    {'role': 'assistant', 'content': 'It barks.'}
    ```
    """

    def check_model_type(self, supported_models: list[str] | dict[str, Any]) -> None:
        """Any model will do: what it needs is a processor that takes videos in chats, which no list of names tells."""

    def _sanitize_parameters(
        self, generate_kwargs: dict[str, Any] | None = None, max_new_tokens: int | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        generate_kwargs = dict(generate_kwargs or {})
        for name in GENERATE_ARGUMENTS.intersection(kwargs):
            if name in generate_kwargs:
                raise ValueError(f"`{name}` is given twice, in `generate_kwargs` and by itself: give it once.")
            generate_kwargs[name] = kwargs.pop(name)
        return super()._sanitize_parameters(
            generate_kwargs=generate_kwargs or None, max_new_tokens=max_new_tokens, **kwargs
        )

    def __call__(
        self, videos: Any = None, text: Any = None, **kwargs: Any
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]] | Iterator[list[dict[str, Any]]]:
        r"""
        Answers one question or many.

        Args:
            videos (*optional*): A video (path, http(s) address, `data:` URI, bytes, array or tensor of shape
                `(frames, height, width, channels)` or `(frames, channels, height, width)`, or list of frames), a list
                of videos, or a generator of them. Also a chat, a list of chats, a dictionary
                `{"videos": …, "text": …}`, and a list, generator or dataset of those.
            text (`str`, `list[str]`, or chats, *optional*): The question about the video or each of the videos, or as
                many questions as videos; several questions about one video also go. Without `videos`: questions about
                nothing seen, a chat (a list of messages with `"role"` and `"content"`), or a list of chats.
            max_new_tokens (`int`, *optional*): The most tokens to generate. By default what the model's generation
                configuration says, else 256.
            generate_kwargs (`dict`, *optional*): Arguments of `generate`. They can also be given by themselves:
                `do_sample`, `num_beams`, `streamer`, …
            num_frames (`int`, *optional*): Frames to take of each video. By default what the video processor says.
            load_audio_from_video (`bool`, *optional*): Whether to hear a video's own sound. By default what the
                processor says.
            processor_kwargs (`dict`, *optional*): Further arguments of the processor. They can also be given by
                themselves.
            return_full_text (`bool`, *optional*, defaults to `True`):
                `True`: for a question, the question and the answer; for a chat, the chat with the answer as its last
                message. `False`: the answer alone.
            return_tensors (`bool`, *optional*, defaults to `False`): Return the token ids of prompt and answer.
            stop_sequence (`str` or `list[str]`, *optional*): Strings that end the answer.
            continue_final_message (`bool`, *optional*):
                Whether the last message of a chat is continued and not answered. By default so if it is the
                assistant's.
            batch_size (`int`, *optional*, defaults to 1): Prompts that are generated for at a time. They may differ in
                length, in frames, and in whether there is sound.

        Returns:
            For one question or chat, a list with a dictionary for each of the answers, of which there is one unless
            `num_return_sequences` says otherwise: `input_text`, the question or chat, and `generated_text` (a string,
            or a chat), or `generated_token_ids`. For a list, a list of such lists; for a generator or a dataset, an
            iterator over them.

        Raises:
            ValueError: if there is no question, or if the numbers of videos and questions differ.
            MediaError: if a file cannot be used; the message names it.
        """
        for name in ("video", "image", "images", "audio"):
            if name in kwargs:
                raise ValueError(f"`{name}` is no argument of this pipeline: give videos as `videos`, or a chat.")
        if videos is None and text is None:
            raise ValueError("Give a video and a question, or a chat.")
        if text is None:
            inputs = (item for item in videos) if _comes_one_by_one(videos) else videos
        elif _is_chat(text) or _is_chat(videos):
            if videos is not None:
                raise ValueError(
                    "Give either a chat or a video and a question. A chat's videos stand in it, as the content entry "
                    "{'type': 'video', 'path': …}."
                )
            inputs = text
        elif _comes_one_by_one(videos) or _comes_one_by_one(text):
            inputs = _pair_one_by_one(videos, text)
        else:
            inputs = _pair(videos, text)
        # Past the library's own pipeline, which would load `inputs` as images
        return super(ImageTextToTextPipeline, self).__call__(inputs, **kwargs)

    def preprocess(
        self,
        inputs: Any = None,
        timeout: float | None = None,
        continue_final_message: bool | None = None,
        **processing_kwargs: Any,
    ) -> dict[str, Any]:
        if isinstance(inputs, Chat):
            chat, prompt = inputs, inputs
        elif isinstance(inputs, dict) and inputs.get("text") is not None:
            prompt = inputs["text"]
            video = inputs.get("videos", inputs.get("video"))
            if len(inputs) > 1 and not {"videos", "video"} & set(inputs):
                raise ValueError(
                    f"An input is a chat or a dictionary {{'videos': …, 'text': …}}; this one has {sorted(inputs)}."
                )
            if video is None and _is_chat(prompt):
                chat = prompt = prompt if isinstance(prompt, Chat) else Chat(prompt)
            elif isinstance(prompt, str):
                content = [] if video is None else [{"type": "video", "video": video}]
                chat = Chat([{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}])
            else:
                raise ValueError(f"The question about a video is a string; this one is {prompt!r:.80}.")
        else:
            what = f"a dictionary with {sorted(inputs)}" if isinstance(inputs, dict) else f"a {type(inputs).__name__}"
            raise ValueError(
                "Got no question: give it as `text=…`. Instead, an input can be a chat or a dictionary "
                f"{{'videos': …, 'text': …}}, but this one is {what}."
            )
        model_inputs = super().preprocess(
            chat, timeout=timeout, continue_final_message=continue_final_message, **processing_kwargs
        )
        model_inputs["text"] = prompt
        return model_inputs

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterable[Any]:
        if batch_size == 1:
            return super().get_iterator(
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
        # As in the library, but its batches cannot hold prompts with different media.
        if isinstance(inputs, Sized):
            dataset = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            num_workers = min(num_workers, 1)  # each worker would go through all of the inputs
            dataset = PipelineIterator(inputs, self.preprocess, preprocess_params)
        loader = DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=self._collate)
        outputs = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(outputs, self.postprocess, postprocess_params)

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        text = [item.pop("text") for item in items]
        return {"text": text, **join_prompts(self.tokenizer, items)}

    def _forward(self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        outputs = super()._forward(model_inputs, generate_kwargs=dict(generate_kwargs or {}))
        # (prompts, answers to each, length), so that a batch can be taken apart
        sequences = outputs["generated_sequence"]
        outputs["generated_sequence"] = sequences.view(len(outputs["input_ids"]), -1, sequences.shape[-1])
        return outputs

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_type: ReturnType = ReturnType.FULL_TEXT,
        continue_final_message: bool | None = None,
        skip_special_tokens: bool | None = None,
        **postprocess_kwargs: Any,
    ) -> list[dict[str, Any]]:
        prompt = model_outputs["prompt_text"]
        input_text = prompt.messages if isinstance(prompt, Chat) else prompt
        sequences = model_outputs["generated_sequence"].flatten(0, 1)
        if return_type == ReturnType.TENSORS:
            return [{"input_text": input_text, "generated_token_ids": sequence} for sequence in sequences]
        answers = self.processor.post_process_image_text_to_text(
            sequences[:, model_outputs["input_ids"].shape[-1] :],
            skip_special_tokens=True if skip_special_tokens is None else skip_special_tokens,
            **postprocess_kwargs,
        )
        if return_type == ReturnType.FULL_TEXT:
            answers = [_append(input_text, answer, continue_final_message) for answer in answers]
        return [{"input_text": input_text, "generated_text": answer} for answer in answers]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        Saves the model and the whole processor, so that `pipeline(task, model=save_directory)` gives this pipeline.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, made if need be.
            kwargs: Arguments of the model's and the processor's `save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _is_chat(inputs: Any) -> bool:
    """Whether `inputs` is a chat or a list of chats."""
    if isinstance(inputs, Chat):
        return True
    if not isinstance(inputs, (list, tuple)) or not inputs:
        return False
    first = inputs[0][0] if isinstance(inputs[0], (list, tuple)) and inputs[0] else inputs[0]
    return isinstance(first, Chat) or (isinstance(first, dict) and "role" in first)


def _comes_one_by_one(inputs: Any) -> bool:
    """Whether these are read while they are answered: a generator, or a data set or its column."""
    from_datasets = type(inputs).__module__.partition(".")[0] == "datasets"
    return isinstance(inputs, (GeneratorType, KeyDataset)) or from_datasets


def _pair_one_by_one(videos: Any, text: Any) -> Iterator[dict[str, Any]]:
    """As [`_pair`], of what is read while it is answered."""
    if isinstance(text, str):
        yield from ({"videos": video, "text": text} for video in videos)
    elif not (_comes_one_by_one(videos) or isinstance(videos, (list, tuple))):
        yield from ({"videos": videos, "text": question} for question in text)
    else:
        nothing = object()
        for video, question in itertools.zip_longest(videos, text, fillvalue=nothing):
            if video is nothing or question is nothing:
                fewer, more = ("videos", "questions") if video is nothing else ("questions", "videos")
                raise ValueError(f"There are fewer {fewer} than {more}: give one question, or one for each video.")
            yield {"videos": video, "text": question}


def _pair(videos: Any, text: str | list[str]) -> dict[str, Any] | list[dict[str, Any]]:
    """One input for each pair of a video and a question; what there is one of goes with each of the others."""
    if not isinstance(text, (str, list, tuple)) or not text:
        raise ValueError(f"`text` is a question, or a list of at least one; got {text!r:.80}.")
    is_list = isinstance(videos, (list, tuple)) and not all(is_frame(video) for video in videos)
    if not is_list and isinstance(text, str):
        return {"videos": videos, "text": text}
    videos = videos if is_list else [videos] * len(text)
    questions = [text] * len(videos) if isinstance(text, str) else text
    if len(questions) != len(videos):
        raise ValueError(
            f"Got {len(videos)} videos and {len(questions)} questions: give one question, or one for each video."
        )
    return [{"videos": video, "text": question} for video, question in zip(videos, questions, strict=True)]


def join_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Joins the model inputs of single prompts to those of a batch. Texts are padded where generation needs it; media
    follow each other in reading order, as the model takes them, and shorter videos are padded and masked.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Pads the texts, on its own side.
        prompts (`Sequence[dict]`): What the processor returns for each prompt, with `return_tensors="pt"`.

    Returns:
        `dict`: `input_ids` and `attention_mask`, (prompts, longest), and the media of all prompts.
    """
    items = [dict(prompt) for prompt in prompts]
    texts = [{name: item.pop(name)[0] for name in ("input_ids", "attention_mask")} for item in items]
    batch: dict[str, Any] = dict(tokenizer.pad(texts, return_tensors="pt"))
    videos = [item for item in items if "pixel_values_videos" in item]
    num_frames = {item["pixel_values_videos"].shape[1] for item in videos}
    if len(num_frames) > 1 or any("padding_mask_videos" in item for item in videos):
        for item in videos:
            _pad_frames(item, max(num_frames))
    for name in dict.fromkeys(name for item in items for name in item):
        batch[name] = torch.cat([item[name] for item in items if name in item])
    return batch


def _pad_frames(item: dict[str, Any], num_frames: int) -> None:
    """Pads the videos of an input to `num_frames` frames of zeros, and masks these."""
    frames = item["pixel_values_videos"]
    mask = item.get("padding_mask_videos")
    if mask is None:
        mask = torch.ones(frames.shape[:2], dtype=torch.long)
    num_missing = num_frames - frames.shape[1]
    item["pixel_values_videos"] = torch.cat([frames, frames.new_zeros(len(frames), num_missing, *frames.shape[2:])], 1)
    item["padding_mask_videos"] = torch.cat([mask, mask.new_zeros(len(mask), num_missing)], 1)


def _append(prompt: str | list[dict[str, Any]], answer: str, continue_final_message: bool | None) -> Any:
    """The prompt with its answer: a string, or a chat with one more message or with a longer last one."""
    if isinstance(prompt, str):
        return f"{prompt} {answer}"
    *earlier, last = prompt
    if continue_final_message is None:
        continue_final_message = last["role"] == "assistant"
    if not continue_final_message:
        return [*prompt, {"role": "assistant", "content": answer}]
    content = last["content"]
    if isinstance(content, str):
        content = content + answer
    else:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + answer}]
    return [*earlier, {**last, "content": content}]


__all__ = ["VideoTextToTextPipeline"]
