"""Annotation files to rows of one form: the five published formats, and chats.

The first step of training's data flow; `mixture` mixes the rows and `samples` opens their media. Rows are checked
while they are read, and a file with a wrong one is refused with the place of it.
"""

import csv
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..media import is_address
from ..processing_video_llama import read_content_entry
from .captions import clean_caption

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

_CHUNK_ROWS = 10_000
_CHUNK_CHARACTERS = 2**20
_JSON_END_CHARACTERS = 16  # how far from its end a text may show that it is cut: a literal, an escape, a number
# Of any system, because annotations are made on any
_SEPARATORS = re.compile(r"[/\\]")
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
_LLAVA_IMAGE = "<image>"

Row = dict[str, Any]
Files = str | os.PathLike | Sequence[str | os.PathLike]


class AnnotationError(ValueError):
    """An annotation file is not what it should be. The message says where, what was expected, and what is there."""


def annotation_features() -> "Features":
    """
    The columns of all rows: `messages`, a chat with `role` and `content`, of which each entry has a `type` (text,
    image, video or audio) and `text` or `path`; and `source`, the row's place (`file:line` or `file[entry]`).
    """
    from datasets import Features, Value

    entry = {"type": Value("string"), "text": Value("string"), "path": Value("string")}
    return Features(
        {"messages": [{"role": Value("string"), "content": [entry]}], "source": Value("string")},
    )


def load_annotations(
    format: str,
    annotations: Files,
    media_root: str | os.PathLike | None = None,
    streaming: bool = False,
) -> "Dataset | IterableDataset":
    """
    Read annotations.

    | `format` | file | media |
    |---|---|---|
    | `webvid` | CSV with the columns `videoid`, `name`, `page_dir` | `<page_dir>/<videoid>.mp4` |
    | `llava_cc3m`, `minigpt4` | JSON `{"annotations": [{"image_id", "caption"}]}` | `image/<image_id>.jpg` |
    | `llava_instruct` | JSON `[{"image", "conversations": [{"from": "human" or "gpt", "value"}]}]` | `<image>` |
    | `videochat` | JSON `[{"video", "QA": [{"i", "q", "a"}]}]` | `<video>` |
    | `chat` | JSONL `{"messages": […]}`, a folder of `save_to_disk`, or a dataset on the Hub | in the messages |

    A caption is the answer to a medium without words. WebVid's and CC3M's are cleaned ([`clean_caption`]). In LLaVA's
    conversations `<image>` marks the place of the image; without `image` there is text alone. VideoChat's instruction
    `i` stands before the first question. Chats are as `apply_chat_template` takes them, with media by path or address.

    Args:
        format: one of the above.
        annotations: a file, a pattern (`results_*.csv`), or a list of them.
        media_root: the folder that paths of media are relative to, by default that of the annotation file (for a
            folder or a dataset on the Hub, the current folder). Published annotations may not point out of it; chats
            are one's own, and may.
        streaming: read rows while they are used and not all now. Each file is a shard then.

    Returns:
        A `Dataset` in memory, or an `IterableDataset`, with the columns of [`annotation_features`].

    Raises:
        AnnotationError: a file is not of its format; when streaming, as soon as the wrong row is read.
        FileNotFoundError: no such file, or none that fits a pattern.
    """
    from datasets import IterableDataset

    if format not in _READERS:
        raise ValueError(f"`format` is one of {', '.join(_READERS)}, not {format!r}.")
    root = None if media_root is None else os.fspath(media_root)
    if format == "chat" and isinstance(annotations, (str, os.PathLike)) and not _is_jsonl(os.fspath(annotations)):
        return _load_chat_dataset(os.fspath(annotations), root, streaming)
    files = _find_files(annotations)
    if streaming:
        if next(_read_files(format, files, root), None) is None:
            raise _no_rows(", ".join(files))
        return IterableDataset.from_generator(
            _read_files, features=annotation_features(), gen_kwargs={"format": format, "files": files, "root": root}
        )
    return _to_dataset(_read_files(format, files, root), ", ".join(files))


def _find_files(annotations: Files) -> list[str]:
    patterns = [annotations] if isinstance(annotations, (str, os.PathLike)) else annotations
    files = []
    for pattern in map(os.fspath, patterns):
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not found:
            raise FileNotFoundError(f"There is no annotation file {pattern} (looked for it from {os.getcwd()}).")
        files += found
    return files


def _to_dataset(rows: Iterable[Row], name: str) -> "Dataset":
    import pyarrow as pa
    from datasets import Dataset

    schema = annotation_features().arrow_schema
    rows = iter(rows)
    # Chunk by chunk, because Arrow's tables take a fraction of the memory of Python's objects
    tables = [pa.Table.from_pylist(chunk, schema) for chunk in iter(lambda: list(islice(rows, _CHUNK_ROWS)), [])]
    if not tables:
        raise _no_rows(name)
    return Dataset(pa.concat_tables(tables))


def _no_rows(name: str) -> AnnotationError:
    return AnnotationError(f"{name}: there are no rows. Was the file written completely?")


def _read_files(format: str, files: list[str], root: str | None) -> Iterator[Row]:
    """The rows of some files; a list of files, for `datasets` to give each worker some of them."""
    read_file, to_messages = _READERS[format]
    for file in files:
        media_root = os.path.dirname(file) if root is None else root
        for place, entry in read_file(file):
            yield _to_row(to_messages, entry, media_root, place)


def _to_row(to_messages: Callable[[Any, str], list[Row]], entry: Any, root: str, place: str) -> Row:
    try:
        messages = to_messages(entry, root)
        _check_turns(messages)
        _check_characters(messages)
    except ValueError as error:
        raise AnnotationError(f"{place}: {error}") from error
    return {"messages": messages, "source": place}


def _chat_row(entry: Row, index: int, name: str, root: str) -> Row:
    return _to_row(_chat, entry, root, f"{name}[{index}]")


# ---------------------------------------------------------------------------------------------------------------------
# Files to entries, with their place


def _read_csv(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        # Strict, because a quote that is left open would otherwise take all rows up to the next one for its text
        rows = csv.reader(lines, strict=True)
        start = 1
        try:
            header = next(rows, [])
            start = rows.line_num + 1
            for cells in rows:
                place = f"{file}:{rows.line_num}"
                if cells and len(cells) != len(header):
                    raise AnnotationError(
                        f"{place}: this row has {len(cells)} cells, but the header {len(header)}. Texts with a comma "
                        'stand in quotes: "a dog, running".'
                    )
                if cells:
                    yield place, dict(zip(header, cells, strict=True))
                start = rows.line_num + 1
        except csv.Error as error:
            raise AnnotationError(f"{file}:{start}: the row that begins here is not CSV: {error}.") from error
        except UnicodeDecodeError as error:
            line = _first_line_that_is_not_utf8(file)
            raise AnnotationError(f"{file}:{line}: this is not CSV in UTF-8: {error}.") from error


def _first_line_that_is_not_utf8(file: str) -> int:
    """By its number: files are decoded in blocks, whose errors name no line."""
    with open(file, "rb") as lines:
        return next(number for number, line in enumerate(lines, start=1) if not _is_utf8(line))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_jsonl(file: str) -> Iterator[tuple[str, Any]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{file}:{number}", json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise AnnotationError(f"{file}:{number}: this line is not JSON in UTF-8: {error}.") from error


def _read_json_list(file: str) -> Iterator[tuple[str, Any]]:
    with _JsonFile(file) as reader:
        yield from reader.entries()
        reader.end()


def _read_json_annotations(file: str) -> Iterator[tuple[str, Any]]:
    found = False
    with _JsonFile(file) as reader:
        reader.take("{")
        while reader.peek() != "}":
            name = reader.value()
            reader.take(":")
            if name == "annotations":
                found = True
                yield from reader.entries()
            else:
                reader.value()
            if reader.peek() != "}":
                reader.take(",")
        reader.take("}")
        reader.end()
    if not found:
        raise AnnotationError(f'{file}: there is no "annotations" in it; expected {{"annotations": [...]}}.')


class _JsonFile:
    """Reads the values of a large JSON file one after the other, in memory for the largest of them."""

    def __init__(self, file: str):
        self.name = file
        self._text, self._position, self._line = "", 0, 1
        self._decoder = json.JSONDecoder()

    def __enter__(self) -> "_JsonFile":
        self._file = open(self.name, encoding="utf-8-sig")  # noqa: SIM115 (closed on exit)
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def entries(self) -> Iterator[tuple[str, Any]]:
        """The entries of a list, and their places."""
        self.take("[")
        number = 0
        while self.peek() != "]":
            if number:
                self.take(",")
                self.peek()
            place = f"{self.name}[{number}]"
            yield place, self.value()
            number += 1
        self.take("]")

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self._position < len(self._text):
                if not self._text[self._position].isspace():
                    return self._text[self._position]
                self._position += 1
            if not self._read():
                return ""

    def take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self._error(f"expected {character!r}, found {found!r}" if found else f"it ends before {character!r}")
        self._position += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _JSON_END_CHARACTERS
                if not (is_cut and self._read()):
                    raise self._error(error.msg, error.pos) from error
            else:
                if end < len(self._text) or not self._read():  # a number might go on
                    self._position = end
                    return value

    def end(self) -> None:
        if found := self.peek():
            raise self._error(f"expected the end of the file, found {found!r}")

    def _read(self) -> bool:
        self._line += self._text.count("\n", 0, self._position)
        rest = self._text[self._position :]
        try:
            chunk = self._file.read(max(_CHUNK_CHARACTERS, len(rest)))
        except UnicodeDecodeError as error:
            raise self._error(f"it is not in UTF-8 ({error})", len(self._text)) from error
        self._text, self._position = rest + chunk, 0
        return bool(chunk)

    def _error(self, reason: str, position: int | None = None) -> AnnotationError:
        line = self._line + self._text.count("\n", 0, self._position if position is None else position)
        return AnnotationError(f"{self.name}:{line}: this is not JSON of the expected form: {reason}.")


# ---------------------------------------------------------------------------------------------------------------------
# Entries to messages


def _webvid(entry: Any, root: str) -> list[Row]:
    path = f"{_text(entry, 'page_dir')}/{_text(entry, 'videoid')}.mp4"
    return _captioned("video", _inside(root, path), clean_caption(_text(entry, "name")))


def _llava_cc3m(entry: Any, root: str) -> list[Row]:
    return _captioned("image", _image_path(entry, root), clean_caption(_text(entry, "caption")))


def _minigpt4(entry: Any, root: str) -> list[Row]:
    return _captioned("image", _image_path(entry, root), _text(entry, "caption").strip())


def _image_path(entry: Any, root: str) -> str:
    image_id = _field(entry, "image_id", (str, int))
    return _inside(root, f"image/{image_id}.jpg")


def _captioned(kind: str, path: str, caption: str) -> list[Row]:
    return [_message("user", [_medium(kind, path)]), _message("assistant", [_words(caption)])]


def _llava_instruct(entry: Any, root: str) -> list[Row]:
    turns = _field(entry, "conversations", list)
    image = None if entry.get("image") is None else _medium("image", _inside(root, _text(entry, "image")))
    messages, num_marks = [], 0
    for turn in turns:
        role = _field(turn, "from", str)
        if role not in _LLAVA_ROLES:
            raise ValueError(f"a turn is from 'human' or 'gpt', not from {role!r}.")
        content: list[Row] = []
        pieces = _text(turn, "value").split(_LLAVA_IMAGE)
        num_marks += len(pieces) - 1
        for number, piece in enumerate(pieces):
            if number and image is not None:
                content.append(image)
            if piece.strip():
                content.append(_words(piece.strip()))
        messages.append(_message(_LLAVA_ROLES[role], content))
    if (num_marks > 0) != (image is not None):
        raise ValueError(
            f"'image' is {entry.get('image')!r}, but {_LLAVA_IMAGE} stands {num_marks} times in the conversation."
        )
    return messages


def _videochat(entry: Any, root: str) -> list[Row]:
    video = _medium("video", _inside(root, _text(entry, "video")))
    messages: list[Row] = []
    for turn in _field(entry, "QA", list):
        parts = [_field(turn, "q", str)]
        if not messages:
            parts.insert(0, _field(turn, "i", str))
        question = " ".join(part.strip() for part in parts if part.strip())
        if not question:
            raise ValueError("a question is empty.")
        messages.append(_message("user", [_words(question)]))
        messages.append(_message("assistant", [_words(_text(turn, "a").strip())]))
    if messages:
        messages[0]["content"].insert(0, video)
    return messages


def _chat(entry: Any, root: str) -> list[Row]:
    messages = []
    for message in _field(entry, "messages", list):
        content = _field(message, "content", (str, list))
        if isinstance(content, str):
            content = [content]
        role, content = _field(message, "role", str), [_chat_entry(part, root) for part in content]
        if role == "assistant" and not any((part["text"] or "").strip() for part in content):
            raise ValueError("a message of the assistant has no words.")
        messages.append(_message(role, content))
    return messages


def _chat_entry(part: Any, root: str) -> Row:
    if not isinstance(part, (str, dict)):
        raise ValueError(f"a content entry is a string or an object, not {part!r:.80}.")
    if isinstance(part, dict) and part.get("type") == "input_audio":
        raise ValueError("sounds of the form 'input_audio' are not read; give a file by its 'path'.")
    if isinstance(part, dict) and part.get("base64") is not None:
        raise ValueError("media in 'base64' are not read; give a file by its 'path', or a data: address as 'url'.")
    part = read_content_entry(part)
    if part["type"] == "text":
        return _words(_field(part, "text", str))
    source = part["source"]
    if not isinstance(source, str) or not source:
        raise ValueError(
            f"an entry of type {part['type']!r} names its file under 'path' (or 'url'), not {source!r:.80}."
        )
    return _medium(part["type"], source if is_address(source) else os.path.join(root, source))


_READERS: dict[str, tuple[Callable[[str], Iterator[tuple[str, Any]]], Callable[[Any, str], list[Row]]]] = {
    "webvid": (_read_csv, _webvid),
    "llava_cc3m": (_read_json_annotations, _llava_cc3m),
    "minigpt4": (_read_json_annotations, _minigpt4),
    "llava_instruct": (_read_json_list, _llava_instruct),
    "videochat": (_read_json_list, _videochat),
    "chat": (_read_jsonl, _chat),
}


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _message(role: str, content: list[Row]) -> Row:
    return {"role": role, "content": content}


def _words(text: str) -> Row:
    return {"type": "text", "text": text, "path": None}


def _medium(kind: str, path: str) -> Row:
    return {"type": kind, "text": None, "path": path}


def _field(entry: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with {name!r}, found {entry!r:.80}.")
    value = entry.get(name)
    if name not in entry:
        raise ValueError(f"{name!r} is missing; there is {', '.join(map(repr, entry)) or 'nothing'}.")
    if value is None:
        raise ValueError(f"{name!r} is null.")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(one.__name__ for one in kinds)
        raise ValueError(f"{name!r} has to be of type {expected}, not {type(value).__name__}: {value!r:.80}.")
    return value


def _text(entry: Any, name: str) -> str:
    text = _field(entry, name, str)
    if not text.strip():
        raise ValueError(f"{name!r} is empty.")
    return text


def _inside(root: str, path: str) -> str:
    """A path of published annotations, which are not one's own."""
    if _ABSOLUTE.match(path) or ".." in _SEPARATORS.split(path) or "\0" in path:
        raise ValueError(
            f"the path {path!r} leads out of the media folder; expected one relative to it, without '..'."
        )
    return os.path.join(root, path)


def _check_characters(messages: list[Row]) -> None:
    for text in (entry[name] for message in messages for entry in message["content"] for name in ("text", "path")):
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"there is half of a character, \\u{ord(text[error.start]):04x} alone, in {text!a:.80}: characters "
                "past \\uffff are two such halves in JSON."
            ) from error


def _check_turns(messages: list[Row]) -> None:
    roles = [message["role"] for message in messages]
    for role in roles:
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"the role {role!r} is not known; expected 'user', 'assistant' or, first, 'system'.")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            "turns of user and assistant have to alternate, from the user's first to the assistant's last; found"
            f" {', '.join(turns) or 'none'}."
        )
    for message in messages:
        if message["role"] != "user" and any(entry["type"] != "text" for entry in message["content"]):
            raise ValueError(f"media belong into messages of the user, not of the {message['role']}.")
        if not message["content"]:
            raise ValueError(f"a message of the {message['role']} is empty.")


# ---------------------------------------------------------------------------------------------------------------------
# Chats of the `datasets` library


def _is_jsonl(name: str) -> bool:
    """Whether this is to be a file, or else a folder of a dataset or the name of one on the Hub."""
    if os.path.isdir(name):
        return False
    return os.path.isfile(name) or name.endswith((".json", ".jsonl")) or glob.has_magic(name)


def _load_chat_dataset(name: str, root: str | None, streaming: bool) -> "Dataset | IterableDataset":
    from datasets import Dataset, load_from_disk

    dataset: Any
    if os.path.isfile(os.path.join(name, "dataset_dict.json")):
        splits: Any = load_from_disk(name)
        if "train" not in splits:
            raise AnnotationError(f"{name}: there is no split 'train', only {', '.join(splits)}.")
        dataset = splits["train"]
    elif os.path.isfile(os.path.join(name, "state.json")):
        dataset = load_from_disk(name)
    else:
        dataset = _load_dataset(name, streaming)
    columns = dataset.column_names
    if columns is not None and "messages" not in columns:
        raise AnnotationError(f"{name}: there is no column 'messages', only {', '.join(columns)}.")
    dataset = dataset.select_columns("messages")
    convert = partial(_chat_row, name=name, root=root or "")
    if not streaming:
        return _to_dataset(map(convert, dataset, range(len(dataset))), name)
    if isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset()
    return dataset.map(convert, with_indices=True, features=annotation_features())


def _load_dataset(name: str, streaming: bool) -> "Dataset | IterableDataset":
    """The split "train" of a folder of files, or of a data set on the Hub."""
    from datasets import load_dataset
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.isdir(name):
        return load_dataset(name, split="train", streaming=streaming)
    try:
        validate_repo_id(name)  # a path to what is not there is seldom a name that the Hub could know
        return load_dataset(name, split="train", streaming=streaming)
    except (HFValidationError, ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no annotation file or folder {name} (looked for it from {os.getcwd()}), nor is it a data set "
            f"of the Hub: {error}"
        ) from error
