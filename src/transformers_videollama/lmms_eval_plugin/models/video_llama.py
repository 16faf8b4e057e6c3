"""`VideoLlama`: answers what lmms-eval asks, and says how likely given answers are."""

import argparse
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from loguru import logger
from PIL.Image import Image
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...cli.media_arguments import media_entry
from ...cli.models import load_model, processor_arguments
from ...conversation import prompt_ids
from ...evaluation.answering import score_endings
from ...generation_video_llama import MEDIA_INPUTS
from ...pipeline_video_text_to_text import GENERATE_ARGUMENTS

DEFAULT_MAX_NEW_TOKENS = 256
"""Where a task does not say it; the same as in the other commands."""
SAMPLING_ARGUMENTS = ("temperature", "top_p", "top_k")


class VideoLlama(lmms):
    """
    Video-LLaMA for lmms-eval: `--model video_llama --model_args pretrained=FOLDER,…`.

    Started by `accelerate launch`, each process has a model of its own, on a GPU of its own.

    Args:
        pretrained (`str`, *optional*): Folder or Hub id. By default the small trained model of the repository.
        device (`str`, *optional*): By default a GPU if there is one; with several processes that of the process.
        batch_size (`int`, defaults to 1): Questions, or options of a question, at a time.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        trained_part (`str`, *optional*): Trained branches to load onto the model; folder or Hub id.
        adapter (`str`, *optional*): LoRA adapter of the decoder; folder or Hub id.
        dtype (`str`, defaults to `"auto"`): `"bfloat16"`, `"float16"`, `"float32"` or that of the checkpoint.
        attn_implementation (`str`, *optional*): Such as `"sdpa"`.
        load_in_4bit, load_in_8bit (`bool`, defaults to `False`): The decoder in so many bits.
        num_frames (`int`, *optional*): Frames of a video. By default what the model was made for.
        no_audio (`bool`, defaults to `False`): Do not listen to the sound of videos.
        system_prompt (`str`, *optional*): What comes before a question, or a file of it. By default the template's.

    Raises:
        UsageError: if no model was named and the small one is not there.
        OSError: if there is no such folder or Hub id.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        revision: str | None = None,
        trained_part: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        num_frames: int | None = None,
        no_audio: bool = False,
        system_prompt: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`--batch_size` is a number of 1 or more for this model, but is {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        if device is None or self.accelerator.num_processes > 1:
            device = str(self.accelerator.device)
        self.device = torch.device(device)
        self.system_prompt = None if system_prompt is None else self._resolve_system_prompt(system_prompt)
        args = argparse.Namespace(
            model=pretrained,
            revision=revision,
            trained_part=trained_part,
            adapter=adapter,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            num_frames=num_frames,
            no_audio=no_audio,
        )
        self.model, self.processor = load_model(args)
        self.processor_options = processor_arguments(args)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answers questions.

        Args:
            requests (`list[Instance]`):
                Of each the arguments `(context, generation_kwargs, doc_to_visual, doc_id, task, split)`.

        Returns:
            `list[str]`: the answers, in the order of the requests, each cut before the first of the strings `until`.

        Raises:
            MediaError: if a file cannot be used; the message names it.
        """
        ignored = {name for request in requests for name in request.args[1]} - GENERATE_ARGUMENTS - {"until"}
        if ignored:
            logger.warning(f"These generation_kwargs mean nothing to video_llama: {', '.join(sorted(ignored))}.")
        ordered = Collator([request.args for request in requests], _longest_context_first, grouping=True)
        answers: list[str] = []
        with self._progress(requests) as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                chats = [self._chat(context, self._visuals(*rest)) for context, _, *rest in batch]
                options, until = generate_options(batch[0][1])  # the same in all of a batch
                if until:
                    own = [self.processor.stop_string] if self.processor.stop_string else []
                    options |= {"stop_strings": [*until, *own], "tokenizer": self.processor.tokenizer}
                inputs = self._inputs(chats)
                with torch.inference_mode():
                    output = self.model.generate(**inputs, **options)
                texts = self.processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
                answers += [_cut(text, until) for text in texts]
                bar.update(len(batch))
        return ordered.get_original(answers)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        How unlikely given answers are: lmms-eval takes the option of the smallest number.

        Args:
            requests (`list[Instance]`):
                Of each the arguments `(context, continuation, doc_to_visual, doc_id, task, split)`, in which the
                continuation is an answer, or makes it of the document.

        Returns:
            `list[GenerationResult]`: in each the pair of the loss, as lmms-eval's own models compute it (the mean over
            the answer's tokens of the negative natural logarithm of their probability), and of whether the answer is
            the likeliest one, token by token.

        Raises:
            MediaError: if a file cannot be used; the message names it.
        """
        # Options of a question come as requests of their own; its media are read and encoded once
        questions: dict[tuple, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, _, _, doc_id, task, split = request.args
            questions[context, doc_id, task, split].append(number)
        results: dict[int, GenerationResult] = {}
        with self._progress(requests) as bar:
            for numbers in questions.values():
                context, _, *rest = requests[numbers[0]].args
                chat = self._chat(context, self._visuals(*rest))
                inputs = self._inputs([chat])
                question = inputs["input_ids"][0].tolist()
                encoded = self._encode(inputs)
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    prompts = [self._answered(chat, *requests[number].args[1:]) for number in batch]
                    num_shared = min(_num_shared(question, prompt) for prompt in prompts)
                    outputs = {
                        modality: BaseModelOutputWithPooling(pooler_output=features.repeat(len(batch), 1, 1))
                        for modality, features in encoded.items()
                    }
                    endings = score_endings(self.model, prompts, num_shared, {"mm_encoder_outputs": outputs})
                    for number, ending in zip(batch, endings, strict=True):
                        pair = (-ending.log_likelihood / ending.num_tokens, ending.is_greedy)
                        # A pair by itself is turned into its text by lmms-eval 0.7
                        results[number] = GenerationResult(pair)
                    bar.update(len(batch))
        return [results[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises NotImplementedError, which names the task: a question and its answer is all there is."""
        raise NotImplementedError(
            "video_llama answers single questions: tasks of several rounds (output_type: generate_until_multi_round), "
            f"such as {requests[0].task_name}, are not supported."
        )

    def _progress(self, requests: Sequence[Instance]) -> tqdm:
        return tqdm(total=len(requests), desc="video_llama", unit="request", disable=self.rank != 0)

    def _visuals(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Any:
        return doc_to_visual(self.task_dict[task][split][doc_id])

    def _chat(self, context: str, visuals: Any) -> list[dict[str, Any]]:
        # Some tasks mark in the text where media stand; here they come before it, as in the published prompts
        for token in (self.processor.image_token, self.processor.video_token, self.processor.audio_token):
            context = context.replace(token, "")
        user = {"role": "user", "content": [*media_entries(visuals), {"type": "text", "text": context.strip()}]}
        if self.system_prompt is None:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}, user]

    def _inputs(self, chats: list[list[dict[str, Any]]]) -> Any:
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self.processor_options,
        )
        return inputs.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def _encode(self, inputs: Any) -> dict[str, torch.Tensor]:
        """The soft tokens of each modality of the inputs, (media, soft tokens, hidden size)."""
        encoded = {}
        for modality, names in MEDIA_INPUTS.items():
            media = {argument: inputs[name] for name, argument in names.items() if name in inputs}
            if media:
                features = getattr(self.model, f"get_{modality}_features")(**media, return_dict=True)
                encoded[modality] = features.pooler_output
        return encoded

    def _answered(
        self, chat: list[dict[str, Any]], continuation: Any, doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> list[int]:
        """The tokens of a chat with an answer, which the templates themselves put a blank before."""
        answer = continuation if isinstance(continuation, str) else continuation(self.task_dict[task][split][doc_id])
        messages = [*chat, {"role": "assistant", "content": str(answer).strip()}]
        return prompt_ids(self.processor, messages, continue_final_message=True, **self.processor_options)


def generate_options(generation_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    What a task says about generation, as `generate` takes it.

    Args:
        generation_kwargs (`dict`):
            Of the task, or of `--gen_kwargs`. A temperature of 0 is no sampling, one above is, unless `do_sample` says
            otherwise. What `generate` does not know is left out.

    Returns:
        The arguments of `generate`, and the strings `until` that end an answer.
    """
    until = generation_kwargs.get("until") or []
    options = {name: value for name, value in generation_kwargs.items() if name in GENERATE_ARGUMENTS}
    options = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS} | {k: v for k, v in options.items() if v is not None}
    temperature = options.get("temperature")
    options["do_sample"] = temperature != 0 and bool(options.get("do_sample", temperature is not None))
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in SAMPLING_ARGUMENTS}
    return options, [until] if isinstance(until, str) else [stop for stop in until if stop]


def media_entries(visuals: Any) -> list[dict[str, Any]]:
    """
    What a task's `doc_to_visual` returns, as entries of a message.

    Args:
        visuals:
            None, or in lists of any depth: paths or addresses of videos, pictures and sounds, told apart by their
            endings; PIL pictures; sounds as the `datasets` library gives them, with `"array"` and `"sampling_rate"`.

    Returns:
        `list[dict]`

    Raises:
        ValueError: it is something else; the message says what.
    """
    return [_media_entry(visual) for visual in _flat(visuals)]


def _flat(visuals: Any) -> Iterator[Any]:
    if isinstance(visuals, (list, tuple)):
        for visual in visuals:
            yield from _flat(visual)
    elif visuals is not None:
        yield visuals


def _media_entry(visual: Any) -> dict[str, Any]:
    if isinstance(visual, (str, os.PathLike)):
        return media_entry(os.fspath(visual))
    if isinstance(visual, Image):
        return {"type": "image", "image": visual.convert("RGB")}
    # Newer versions of `datasets` give a decoder, which takes these two keys as well
    if (isinstance(visual, dict) and "array" in visual) or hasattr(visual, "get_all_samples"):
        return {"type": "audio", "audio": visual["array"], "sampling_rate": int(visual["sampling_rate"])}
    raise ValueError(
        "A task's doc_to_visual may return paths, PIL pictures, and sounds with 'array' and 'sampling_rate', but one "
        f"of these returned a {type(visual).__name__}: {visual!r:.80}."
    )


def _longest_context_first(arguments: tuple) -> tuple[int, str]:
    return -len(arguments[0]), arguments[0]


def _num_shared(question: list[int], prompt: list[int]) -> int:
    """How many first tokens of a prompt are the question's; at least the last one is not."""
    number = 0
    while number < min(len(question), len(prompt) - 1) and question[number] == prompt[number]:
        number += 1
    return number


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text.strip()


__all__ = ["VideoLlama"]
