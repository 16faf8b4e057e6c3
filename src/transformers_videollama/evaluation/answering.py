"""Asks a model the questions of a benchmark: prompts, generated answers, likelihoods of options."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from ..conversation import prompt_ids
from ..media import MediaError
from ..processing_video_llama import VideoLlamaProcessor
from . import mvbench
from .encoded_media import EncodedMedium, MediumEncoder
from .items import Item
from .media_files import MediaFiles
from .output_folder import Answers


class Answerer:
    """
    Asks about media, several questions about one at a time.

    Args:
        model ([`VideoLlamaForConditionalGeneration`]): The model; for text alone also any causal language model.
        processor ([`VideoLlamaProcessor`]): Writes the prompts, and reads the answers.
        generate_kwargs (`dict`): Arguments of `generate`.
        system_prompt (`str`, *optional*): What comes before a question; by default as benchmark or template have it.
        seed (`int`, defaults to 0): Of answers that are drawn at random.
    """

    def __init__(
        self,
        model: Any,
        processor: VideoLlamaProcessor,
        generate_kwargs: dict[str, Any],
        system_prompt: str | None = None,
        seed: int = 0,
    ):
        self.model = model
        self.processor = processor
        self.generate_kwargs = generate_kwargs
        self.system_prompt = system_prompt
        self.seed = seed

    def answer(self, items: Sequence[Item], encoded: EncodedMedium | None) -> list[dict[str, Any]]:
        """The `"answer"` to each of some questions about a medium, or about none."""
        return [{"answer": record["answer"]} for record in self.answer_with_tokens(items, encoded)]

    def answer_with_tokens(self, items: Sequence[Item], encoded: EncodedMedium | None) -> list[dict[str, Any]]:
        """The same, with the `"tokens"` of each answer."""
        prompts = [self._prompt(item.question, encoded) for item in items]
        return self._generate(items, prompts, encoded)

    def choose(self, items: Sequence[Item], encoded: EncodedMedium | None) -> list[dict[str, Any]]:
        """To multiple choices the `"answer"` that is generated, and the `"likelihoods"` of the options' letters."""
        texts = [mvbench.question_text(item) for item in items]
        starts = [self._prompt(text, encoded, mvbench.SYSTEM_PROMPT, mvbench.ANSWER_START) for text in texts]
        records = []
        for item, text, generated in zip(items, texts, self._generate(items, starts, encoded), strict=True):
            options = [
                self._prompt(text, encoded, mvbench.SYSTEM_PROMPT, mvbench.ANSWER_START + letter)
                for letter in mvbench.letters(item)
            ]
            records.append({"answer": generated["answer"], "likelihoods": self._likelihoods(options, encoded)})
        return records

    def _prompt(
        self, question: str, encoded: EncodedMedium | None, system: str | None = None, answer_start: str = ""
    ) -> list[int]:
        system = system if self.system_prompt is None else self.system_prompt
        chat: list[dict[str, Any]] = []
        if system is not None:
            chat.append({"role": "system", "content": [{"type": "text", "text": system}]})
        media = [] if encoded is None else encoded.entries
        chat.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        if answer_start:
            chat.append({"role": "assistant", "content": answer_start})
            return prompt_ids(self.processor, chat, continue_final_message=True)
        return prompt_ids(self.processor, chat, add_generation_prompt=True)

    @torch.inference_mode()
    def _generate(
        self, items: Sequence[Item], prompts: list[list[int]], encoded: EncodedMedium | None
    ) -> list[dict[str, Any]]:
        longest = max(map(len, prompts))
        padding = self.processor.tokenizer.pad_token_id
        rows = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        # The same for the same questions, whatever was asked before
        names = "\n".join(item.id for item in items)
        set_seed(int(hashlib.sha256(f"{self.seed} {names}".encode()).hexdigest()[:8], 16))
        output = self.model.generate(
            input_ids=torch.tensor(rows, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            **self._features(encoded, len(prompts)),
            **self.generate_kwargs,
        )[:, longest:]
        answers = self.processor.post_process_image_text_to_text(output)
        return [
            {"answer": answer, "tokens": _without_padding(tokens.tolist(), padding)}
            for answer, tokens in zip(answers, output, strict=True)
        ]

    def _likelihoods(self, prompts: list[list[int]], encoded: EncodedMedium | None) -> list[float]:
        """The natural logarithm of the probability of what prompts do not have in common."""
        shared = 0
        while len({tuple(prompt[: shared + 1]) for prompt in prompts}) == 1 and shared < len(prompts[0]) - 1:
            shared += 1
        media = self._features(encoded, len(prompts))
        return [ending.log_likelihood for ending in score_endings(self.model, prompts, shared, media)]

    def _features(self, encoded: EncodedMedium | None, number: int) -> dict[str, torch.Tensor]:
        features = {} if encoded is None else encoded.features
        return {name: value.expand(number, *value.shape[1:]) for name, value in features.items()}


@dataclass(frozen=True)
class Ending:
    """
    How likely a model takes the last tokens of a prompt to be.

    Attributes:
        log_likelihood (`float`): Natural logarithm of the probability of them all.
        num_tokens (`int`): How many they are.
        is_greedy (`bool`): Whether each of them is the likeliest one.
    """

    log_likelihood: float
    num_tokens: int
    is_greedy: bool


@torch.inference_mode()
def score_endings(model: Any, prompts: Sequence[list[int]], num_shared: int, media: dict[str, Any]) -> list[Ending]:
    """
    How likely prompts end as they do, in one forward.

    Args:
        model ([`VideoLlamaForConditionalGeneration`]): The model; for text alone also any causal language model.
        prompts (`Sequence[list[int]]`): Token ids of each.
        num_shared (`int`): Their ending is what follows so many tokens, 1 or more.
        media (`dict`): What the model takes of the media of all prompts, in reading order.

    Returns:
        `list[Ending]`: of each prompt.
    """
    longest = max(map(len, prompts))
    rows = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    output = model(input_ids=rows, attention_mask=mask, logits_to_keep=longest - num_shared + 1, **media)
    logits = output.logits[:, :-1]
    targets, counts = rows[:, num_shared:], mask[:, num_shared:]
    predicted = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    is_likeliest = (logits.argmax(-1) == targets) | (counts == 0)
    columns = ((predicted * counts).sum(-1), counts.sum(-1), is_likeliest.all(-1))
    return [Ending(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _without_padding(tokens: list[int], padding: int) -> list[int]:
    while tokens and tokens[-1] == padding:
        tokens.pop()
    return tokens


def batches_by_medium(items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    """All questions about a medium after each other, in batches of at most `batch_size` about the same one."""
    by_medium: dict[Any, list[Item]] = {}
    for item in items:
        by_medium.setdefault(item.medium, []).append(item)
    for members in by_medium.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _ask_all(
    ask: Callable[[Sequence[Item], EncodedMedium | None], list[dict[str, Any]]],
    batch: Sequence[Item],
    encoded: EncodedMedium | None,
) -> list[dict[str, Any]]:
    """The records of a batch; a question that cannot be asked, because of its words, does not stop the others."""
    try:
        return ask(batch, encoded)
    except ValueError as error:
        if len(batch) == 1:
            return [{"error": str(error)}]
    return [record for item in batch for record in _ask_all(ask, [item], encoded)]


def answer_missing(
    answers: Answers,
    items: Sequence[Item],
    batch_size: int,
    ask: Callable[[Sequence[Item], EncodedMedium | None], list[dict[str, Any]]],
    files: MediaFiles | None,
    encoder: MediumEncoder | None,
    state: PartialState,
) -> None:
    """
    Answers the questions that have no answer yet, and writes down why where a medium cannot be used. Each process
    answers its share of them, and knows all answers at the end.

    A batch of which some answers are there is asked again as a whole, so that an interrupted run gives the same
    answers to the last bit as one that was not; those that were there are kept.

    Args:
        answers (`Answers`): What is known, and where it is kept.
        items (`Sequence[Item]`): All questions.
        batch_size (`int`): Questions at a time.
        ask (`Callable`): Gives a record for each of a batch of questions and their encoded medium.
        files (`MediaFiles`, *optional*), encoder (`MediumEncoder`, *optional*): Of the media, if there are any.
        state (`PartialState`): Which of the processes this one is.
    """
    from tqdm import tqdm

    missing = {item.id for item in items if item.id not in answers.records}
    batches = [batch for batch in batches_by_medium(items, batch_size) if any(item.id in missing for item in batch)]
    state.wait_for_everyone()  # nobody writes before all know what is missing
    # Shares of batches after each other, which cut the questions about few media
    with (
        state.split_between_processes(batches) as share,
        tqdm(
            total=sum(item.id in missing for batch in share for item in batch),
            desc=answers.path.stem,
            unit="question",
            disable=not state.is_main_process,
        ) as bar,
    ):
        for batch in share:
            medium = batch[0].medium
            try:
                encoded = None
                if medium is not None and files is not None and encoder is not None:
                    encoded = encoder.encode(files.find(medium.names, medium.kind), medium)
            except (MediaError, OSError, ValueError) as error:
                records = [{"error": str(error)}] * len(batch)
            else:
                records = _ask_all(ask, batch, encoded)
            lines = [{"id": item.id, **record} for item, record in zip(batch, records, strict=True)]
            lines = [line for line in lines if line["id"] in missing]
            answers.append(lines)
            bar.update(len(lines))
    state.wait_for_everyone()
    answers.read()
