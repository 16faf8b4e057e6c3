"""The judge of Video-ChatGPT's protocol (arXiv 2306.05424): a language model compares an answer with the right one.

It is asked for yes or no and for an integer from 0 to 5, as the text of a Python dictionary. The accuracy is the share
of yes, the score the mean of the integers. Any server that speaks OpenAI's protocol will do; scores of different
judges cannot be compared. Its replies are kept in a file, so that nothing is asked twice.
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..json_lines import append_lines, cut_unfinished_line, read_lines
from .items import Item
from .scores import Score, mean, share

SYSTEM_PROMPT = (
    "You evaluate answers to questions about videos. You are given a question, its correct answer and a predicted "
    "answer, and decide whether the prediction matches the correct answer in meaning. Synonyms and paraphrases are "
    "matches; what counts is the meaning, not the wording."
)
QUESTION = (
    "Evaluate this question about a video and its answers:\n\n"
    "Question: {question}\nCorrect answer: {reference}\nPredicted answer: {answer}\n\n"
    "Reply with yes or no, and with a score that is an integer between 0 and 5, where 5 is the best match. The reply "
    "has to be the text of a Python dictionary with the keys 'pred' and 'score': the value of 'pred' is the string "
    "'yes' or 'no', the value of 'score' is an integer and no string. Give the dictionary alone, without any other "
    "text or explanation. For example: {{'pred': 'yes', 'score': 4}}"
)
NUM_TRIES = 3
"""So often the same is asked if the reply cannot be read."""
_MAX_REPLY_LENGTH = 10_000


def read_verdict(reply: str) -> tuple[bool, float] | None:
    """
    What a judge replied: whether the answer matches, and the score; None if the reply is not as it was asked for.

    The dictionary may stand in other text; it is read as a literal, and nothing in it is executed.
    """
    # The last one, because some think aloud first, and repeat what they were told
    for text in reversed(re.findall(r"\{[^{}]*\}", reply[-_MAX_REPLY_LENGTH:])):
        for read in (ast.literal_eval, json.loads):
            try:
                verdict = read(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if not isinstance(verdict, dict):
                continue
            match, score = str(verdict.get("pred")).strip().lower(), str(verdict.get("score")).strip()
            if match in ("yes", "no") and re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?", score):
                return match == "yes", float(score)
    return None


class Judge:
    """
    A judge behind OpenAI's protocol.

    Args:
        model (`str`): What the server calls it.
        cache (`Path`): The JSON Lines file of its replies.
        base_url (`str`, *optional*): The server; by default the client's, which reads `OPENAI_BASE_URL`.
        api_key (`str`, *optional*): The key; by default `OPENAI_API_KEY`. A server named here may need none.
        workers (`int`, defaults to 8): How many are asked at a time.
        retry_errors (`bool`, defaults to `False`): Whether to ask again where the reply could not be read.

    Raises:
        ImportError: the client is not installed.
        ValueError: the client needs a key and there is none.
    """

    def __init__(
        self,
        model: str,
        cache: Path,
        base_url: str | None = None,
        api_key: str | None = None,
        workers: int = 8,
        retry_errors: bool = False,
    ):
        import openai

        if api_key is None and "OPENAI_API_KEY" not in os.environ:
            if base_url is None and "OPENAI_BASE_URL" not in os.environ:
                raise ValueError("The judge needs a key: set OPENAI_API_KEY, or name a server that needs none.")
            api_key = "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=5, timeout=120.0)
        self.model = model
        self.cache = cache
        self.workers = workers
        self._settings: dict[str, Any] = {"temperature": 0}
        cut_unfinished_line(cache)
        replies: dict[str, dict[str, Any]] = {row["key"]: row for row in read_lines(cache)}
        if retry_errors:
            replies = {key: row for key, row in replies.items() if read_verdict(row["reply"]) is not None}
        self._replies = replies

    @property
    def base_url(self) -> str:
        """The server that is asked, without name and password that its address may hold."""
        return re.sub(r"//[^/@]*@", "//", str(self._client.base_url))

    def judge(self, items: Sequence[Item], answers: Sequence[str]) -> list[tuple[bool, float] | None]:
        """
        The verdicts about answers; None where the judge's reply could not be read, or where its server refused to have
        this one judged, as those that filter contents do.

        Raises:
            OSError: the server cannot be reached or refuses all, after several tries. What was judged is kept.
        """
        import openai
        from tqdm import tqdm

        chats = [self._chat(item, answer) for item, answer in zip(items, answers, strict=True)]
        keys = [self._key(chat) for chat in chats]
        missing = {key: (chat, item) for key, chat, item in zip(keys, chats, items, strict=True)}
        missing = {key: value for key, value in missing.items() if key not in self._replies}
        failure: BaseException | None = None
        refused: list[dict[str, Any]] = []
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self._ask, chat): (key, item) for key, (chat, item) in missing.items()}
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc="judging", unit="answer"):
                    key, item = futures[future]
                    error = None if future.cancelled() else future.exception()
                    if isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)):
                        row = {"reply": "", "model": "", "error": str(error)}
                        refused.append({"key": key, "id": item.id, "judge": self.model, **row})
                    elif error is not None:
                        failure = failure or error
                        for other in futures:  # those that are being asked are still waited for
                            other.cancel()
                    elif not future.cancelled():
                        row = {"key": key, "id": item.id, "judge": self.model, **future.result()}
                        append_lines(self.cache, [row])
                        self._replies[key] = row
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        if refused and not any(row["judge"] == self.model and row["reply"] for row in self._replies.values()):
            failure = failure or OSError(refused[0]["error"])  # it is not the answers that it does not like
        elif refused:
            append_lines(self.cache, refused)
            self._replies |= {row["key"]: row for row in refused}
        if failure is not None and not isinstance(failure, (openai.OpenAIError, OSError)):
            raise failure
        if failure is not None:
            raise OSError(
                f"The judge at {self.base_url} failed: {failure}. What it has judged is kept in {self.cache}; run "
                "the command again to go on."
            ) from failure
        return [read_verdict(self._replies[key]["reply"]) for key in keys]

    def _chat(self, item: Item, answer: str) -> list[dict[str, str]]:
        text = QUESTION.format(question=item.question, reference=item.references[0], answer=answer)
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]

    def _key(self, chat: list[dict[str, str]]) -> str:
        return hashlib.sha256(json.dumps([self.base_url, self.model, chat]).encode()).hexdigest()[:32]

    def _ask(self, chat: list[dict[str, str]]) -> dict[str, str]:
        """The reply and which model gave it; asked again if it cannot be read."""
        import openai

        for _ in range(NUM_TRIES):
            settings = self._settings
            try:
                done = self._client.chat.completions.create(model=self.model, messages=chat, **settings)
            except openai.BadRequestError as error:
                if not settings or "temperature" not in str(error):
                    raise
                done = self._client.chat.completions.create(model=self.model, messages=chat)
                self._settings = {}  # some judges have a temperature of their own and take no other
            reply = (done.choices[0].message.content or "") if done.choices else ""
            if read_verdict(reply) is not None:
                break
        return {"reply": reply, "model": done.model}

    def models(self) -> list[str]:
        """Which models the server says have replied."""
        return sorted({row["model"] for row in self._replies.values() if row["judge"] == self.model and row["model"]})


def score_verdicts(items: Sequence[Item], verdicts: Sequence[tuple[bool, float] | None], seed: int) -> list[Score]:
    """Accuracy in percent and mean score of the answers with a verdict, the accuracy for each group as well."""
    known = [(item, verdict) for item, verdict in zip(items, verdicts, strict=True) if verdict is not None]
    return [
        share("accuracy by judge", [verdict[0] for _, verdict in known]),
        mean("score by judge (0–5)", [verdict[1] for _, verdict in known], seed),
        *(
            share("accuracy by judge", [verdict[0] for item, verdict in known if item.group == group], group)
            for group in dict.fromkeys(item.group for item in items)
        ),
    ]
