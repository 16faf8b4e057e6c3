"""From the JSON of `POST /v1/chat/completions` to a `ChatRequest`, or to the error that says what is wrong with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import RequestError

MAX_STOP_STRINGS = 4
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MEDIA = {"video_url": "video", "image_url": "image", "audio_url": "audio"}
_AUDIO_FORMATS = ("wav", "mp3")
# What says nothing about the answer
_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# What the model cannot do, and the values that do not ask for it
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
}
_READ = {
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "stream",
    "stream_options",
}


@dataclass(frozen=True)
class ChatRequest:
    """
    A request that was read. What it does not say is None.

    Attributes:
        model (`str`): The model that is asked for.
        messages (`list[dict]`):
            `{"role": "system" | "user" | "assistant", "content": [entry, …]}`, an entry being `{"type": "text",
            "text": …}` or `{"type": "video" | "image" | "audio", "url": …}`.
        max_tokens (`int`): The most tokens of the answer.
        temperature (`float`): 0 to 2; 0 is the likeliest answer.
        top_p (`float`): 0 to 1.
        stop (`tuple[str, ...]`): Strings that end the answer.
        seed (`int`): Of what is drawn at random.
        stream (`bool`): Whether the answer comes in pieces.
        include_usage (`bool`): Whether a stream tells the numbers of tokens at its end.
    """

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    include_usage: bool

    @property
    def media(self) -> list[dict[str, Any]]:
        """The entries that are media, in reading order."""
        return [entry for message in self.messages for entry in message["content"] if entry["type"] != "text"]


def read_chat_request(body: Any) -> ChatRequest:
    """
    Reads a request.

    Args:
        body: Its JSON.

    Raises:
        RequestError: 400, naming the field that is wrong.
    """
    if not isinstance(body, dict):
        raise _wrong(None, "the request", "a JSON object", body)
    for name, neutral in _UNSUPPORTED.items():
        if body.get(name) not in neutral:
            allowed = " or ".join(repr(value) for value in neutral if value is not None)
            hint = f"give {allowed} or leave it out" if allowed else "leave it out"
            raise RequestError(
                400, f"`{name}` is {body[name]!r:.80}, which this server cannot do: {hint}.", param=name
            )
    unknown = sorted(set(body) - _READ - _IGNORED - set(_UNSUPPORTED))
    if unknown:
        raise RequestError(
            400, f"Unknown field `{unknown[0]}`. Known are {', '.join(sorted(_READ))}.", param=unknown[0]
        )
    model = body.get("model")
    if not isinstance(model, str):
        raise _wrong("model", "`model`", "the name of a model, which GET /v1/models tells", model)
    max_tokens = _number(body, "max_tokens", int, 1, None)
    max_completion_tokens = _number(body, "max_completion_tokens", int, 1, None)
    stream = _flag(body, "stream", "`stream`")
    options = body.get("stream_options")
    if options is not None and not (stream and isinstance(options, dict)):
        raise RequestError(400, "`stream_options` is an object that goes with `stream: true`.", param="stream_options")
    return ChatRequest(
        model=model,
        messages=_read_messages(body.get("messages")),
        max_tokens=max_tokens if max_completion_tokens is None else max_completion_tokens,
        temperature=_number(body, "temperature", float, 0, 2),
        top_p=_number(body, "top_p", float, 0, 1),
        stop=_read_stop(body.get("stop")),
        seed=_number(body, "seed", int, -(2**63), 2**63 - 1),
        stream=stream,
        include_usage=_flag(options or {}, "include_usage", "`stream_options.include_usage`"),
    )


def _read_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "`messages`", "a list with at least one message", messages)
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in tuple(_ROLES):
        expected = f"an object with a `role`, which is one of {', '.join(_ROLES)}"
        raise _wrong(where, f"`{where}`", expected, message)
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _wrong(f"{where}.content", f"`{where}.content`", "a string or a list of parts", content)
    role = _ROLES[message["role"]]
    entries = [_read_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    if role != "user" and any(entry["type"] != "text" for entry in entries):
        raise RequestError(400, f"`{where}` has media, which only the user's messages can have.", param=where)
    return {"role": role, "content": entries}


def _read_part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _wrong(where, f"`{where}.text`", "a string", part.get("text"))
        if any("\ud800" <= character <= "\udfff" for character in part["text"]):  # which tokenizers cannot read
            raise RequestError(
                400, f"`{where}.text` has half of a character, a surrogate without another.", param=where
            )
        return {"type": "text", "text": part["text"]}
    if kind in tuple(_MEDIA):
        source = part.get(kind)
        url = source.get("url") if isinstance(source, dict) else source
        if not isinstance(url, str) or not url:
            raise _wrong(where, f"`{where}.{kind}`", 'an object {"url": …}', source)
        return {"type": _MEDIA[kind], "url": url}
    if kind == "input_audio":
        source = part.get("input_audio")
        if (
            not isinstance(source, dict)
            or not isinstance(source.get("data"), str)
            or source.get("format") not in _AUDIO_FORMATS
        ):
            expected = f'an object {{"data": BASE64, "format": {" or ".join(_AUDIO_FORMATS)}}}'
            raise _wrong(where, f"`{where}.input_audio`", expected, source)
        return {"type": "audio", "url": f"data:audio/{source['format']};base64,{source['data']}"}
    raise _wrong(where, f"`{where}.type`", f"one of text, {', '.join(_MEDIA)}, input_audio", kind)


def _read_stop(stop: Any) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else [] if stop is None else stop
    is_right = isinstance(strings, list) and all(isinstance(string, str) and string for string in strings)
    if not is_right or len(strings) > MAX_STOP_STRINGS:
        raise _wrong("stop", "`stop`", f"a string or a list of at most {MAX_STOP_STRINGS}, none of them empty", stop)
    return tuple(strings)


def _number(body: dict[str, Any], name: str, kind: type, low: int, high: int | None) -> Any:
    value = body.get(name)
    if value is None:
        return None
    kinds: Sequence[type] = (int,) if kind is int else (int, float)
    is_number = isinstance(value, tuple(kinds)) and not isinstance(value, bool)
    if not is_number or not low <= value or (high is not None and value > high):
        what = "a whole number" if kind is int else "a number"
        limits = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise _wrong(name, f"`{name}`", f"{what} {limits}", value)
    return kind(value)


def _flag(body: dict[str, Any], name: str, title: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, title, "true or false", value)
    return bool(value)


def _wrong(param: str | None, what: str, expected: str, found: Any) -> RequestError:
    came = "is missing" if found is None else f"is {found!r:.80}"
    return RequestError(400, f"{what} must be {expected}, but {came}.", param=param)
