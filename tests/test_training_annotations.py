"""Annotation files to rows: the published formats, chats, streaming, and what is refused with file and line."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from transformers_videollama.training import annotations as annotations_module
from transformers_videollama.training.annotations import AnnotationError, annotation_features, load_annotations
from transformers_videollama.training.captions import clean_caption


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def rows(format: str, files, root=None) -> list[dict]:
    """Read in both ways, which have to agree."""
    dataset, stream = (load_annotations(format, files, root, streaming) for streaming in (False, True))
    assert isinstance(dataset, Dataset) and isinstance(stream, IterableDataset)
    assert dataset.features == stream.features == annotation_features()
    assert list(dataset) == list(stream)
    return list(dataset)


def shown(row: dict) -> list:
    """A row as (role, texts and (kind, path) of media)."""
    return [
        (message["role"], *[e["text"] if e["type"] == "text" else (e["type"], e["path"]) for e in message["content"]])
        for message in row["messages"]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The formats


def test_webvid(tmp_path):
    first = write(
        tmp_path / "part_1.csv",
        'videoid,contentUrl,page_dir,name\n21,http://x,000_050,"A Cat, on a (red) MAT!"\n22,http://y,000_050,"Two\nlines"\n',
    )
    second = write(tmp_path / "part_2.csv", "videoid,name,page_dir\n5,Aerial view: CITY...,051_100\n")
    for files in ([first, second], str(tmp_path / "part_*.csv"), [str(tmp_path / "*.csv")]):
        found = rows("webvid", files, "/videos")
        assert [shown(row) for row in found] == [
            [("user", ("video", "/videos/000_050/21.mp4")), ("assistant", "a cat, on a red mat")],
            [("user", ("video", "/videos/000_050/22.mp4")), ("assistant", "two\nlines")],
            [("user", ("video", "/videos/051_100/5.mp4")), ("assistant", "aerial view city")],
        ]
        assert [row["source"] for row in found] == [f"{first}:2", f"{first}:4", f"{second}:2"]


@pytest.mark.parametrize(
    ("format", "caption"), [("llava_cc3m", "the image shows a dog"), ("minigpt4", "The image shows: a DOG.")]
)
def test_captioned_images(tmp_path, format, caption):
    file = write(
        tmp_path / "filter_cap.json",
        {
            "info": {"annotations": 3},
            "annotations": [
                {"image_id": "GCC_1", "caption": "The image shows: a DOG."},
                {"image_id": 2, "caption": "The image shows: a DOG."},
            ],
        },
    )
    found = rows(format, file)  # media are beside the file
    assert shown(found[0]) == [("user", ("image", f"{tmp_path}/image/GCC_1.jpg")), ("assistant", caption)]
    assert shown(found[1])[0] == ("user", ("image", f"{tmp_path}/image/2.jpg"))
    assert found[1]["source"] == f"{file}[1]"


def test_llava_instruct(tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Black."},
    ]
    file = write(
        tmp_path / "llava.json",
        [
            {"id": "1", "image": "1.jpg", "conversations": turns},
            {"id": "2", "image": "a/2.jpg", "conversations": [{"from": "human", "value": "What?\n<image>"}, turns[1]]},
            {"id": "3", "conversations": turns[2:]},
        ],
    )
    assert [shown(row) for row in rows("llava_instruct", file, "/coco")] == [
        [
            ("user", ("image", "/coco/1.jpg"), "What is it?"),
            ("assistant", "A dog."),
            ("user", "Which colour?"),
            ("assistant", "Black."),
        ],
        [("user", "What?", ("image", "/coco/a/2.jpg")), ("assistant", "A dog.")],
        [("user", "Which colour?"), ("assistant", "Black.")],
    ]


def test_videochat(tmp_path):
    file = write(
        tmp_path / "videochat.json",
        [
            {
                "video": "10/7.mp4",
                "QA": [{"i": "Answer.", "q": "What?", "a": "A dog."}, {"i": "Answer.", "q": "Why?", "a": "So."}],
            },
            {"video": "8.mp4", "QA": [{"i": "Describe it.", "q": "", "a": "A dog."}]},
            {"video": "9.mp4", "QA": [{"i": "", "q": "What?", "a": "A dog."}]},
        ],
    )
    assert [shown(row) for row in rows("videochat", file, "/v")] == [
        [
            ("user", ("video", "/v/10/7.mp4"), "Answer. What?"),
            ("assistant", "A dog."),
            ("user", "Why?"),
            ("assistant", "So."),
        ],
        [("user", ("video", "/v/8.mp4"), "Describe it."), ("assistant", "A dog.")],
        [("user", ("video", "/v/9.mp4"), "What?"), ("assistant", "A dog.")],
    ]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "video", "path": "a.mp4"},
            {"type": "audio", "audio": "/own/a.mp4"},
            {"type": "image", "url": "https://host/i.png"},
            {"type": "image_url", "image_url": {"url": "../i.png"}},
            {"type": "text", "text": "What?"},
        ],
    },
    {"role": "assistant", "content": "A dog."},
]


def read_chat(root: str) -> list:
    return [
        ("system", "Be brief."),
        (
            "user",
            ("video", os.path.join(root, "a.mp4")),
            ("audio", "/own/a.mp4"),
            ("image", "https://host/i.png"),
            ("image", os.path.join(root, "../i.png")),
            "What?",
        ),
        ("assistant", "A dog."),
    ]


def test_chat_lines(tmp_path):
    file = write(
        tmp_path / "chat.jsonl",
        "\ufeff" + json.dumps({"messages": CHAT, "id": 3}) + "\n\n" + json.dumps({"messages": CHAT}),
    )
    found = rows("chat", file)
    assert [shown(row) for row in found] == [read_chat(str(tmp_path))] * 2
    assert [row["source"] for row in found] == [f"{file}:1", f"{file}:3"]
    assert shown(rows("chat", file, "/media")[0]) == read_chat("/media")


@pytest.mark.parametrize("is_dict", [False, True])
def test_chat_datasets(tmp_path, is_dict):
    messages = [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}, {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]  # fmt: skip
    dataset = Dataset.from_list([{"id": number, "messages": messages} for number in range(3)])
    (DatasetDict(train=dataset) if is_dict else dataset).save_to_disk(tmp_path / "chats")
    found = rows("chat", tmp_path / "chats", "/media")
    assert len(found) == 3
    assert shown(found[2]) == [("user", ("video", "/media/a.mp4")), ("assistant", "A dog.")]
    assert found[2]["source"] == f"{tmp_path / 'chats'}[2]"


def test_chat_dataset_of_files(tmp_path, monkeypatch):
    """A folder as on the Hub, which `datasets` reads just like one there."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "name").mkdir()
    write(tmp_path / "name" / "train.jsonl", json.dumps({"id": 1, "messages": messages}) + "\n")
    assert [shown(row) for row in rows("chat", tmp_path / "name")] == [[("user", "hi"), ("assistant", "ho")]]


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def test_files_are_shards(tmp_path):
    for number in range(4):
        lines = "".join(f"{number}{i},cat,x\n" for i in range(3))
        write(tmp_path / f"{number}.csv", "videoid,name,page_dir\n" + lines)
    stream = load_annotations("webvid", str(tmp_path / "*.csv"), streaming=True)
    assert stream.num_shards == 4
    assert len(list(stream.shard(2, 0))) == len(list(stream.shard(2, 1))) == 6


def test_large_json_is_read_piece_by_piece(tmp_path):
    """Entries of all lengths around the border of what is read at once, in a small part of the file's memory."""
    entry = {
        "image": "é/1.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": ""}],
    }
    file = tmp_path / "large.json"
    with open(file, "w", encoding="utf-8") as out:
        out.write("[\n")
        for number in range(6000):
            entry["conversations"][1]["value"] = f'{number} "é\n\\ ' + "x" * (1000 + number)
            out.write((",\n" if number else "") + json.dumps(entry, ensure_ascii=False))
        out.write("\n]\n")
    size = file.stat().st_size
    assert size > 20 * 2**20
    tracemalloc.start()
    try:
        count = 0
        for number, (place, read) in enumerate(annotations_module._read_json_list(str(file))):
            assert read["conversations"][1]["value"] == f'{number} "é\n\\ ' + "x" * (1000 + number)
            assert place == f"{file}[{number}]"
            count += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 6000 and peak < size / 2


def test_json_split_at_every_place(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations_module, "_CHUNK_CHARACTERS", 1)
    content = {"a": [1, -2.5e3, True, None], "annotations": [{"image_id": 12345678901234567890123, "caption": 'ä\u2028"\\'}] * 2, "z": 1.5}  # fmt: skip
    for text in (json.dumps(content), json.dumps(content, indent=3, ensure_ascii=False)):
        file = write(tmp_path / "file.json", text)
        assert [entry for _, entry in annotations_module._read_json_annotations(str(file))] == content["annotations"]


def test_many_rows_of_all_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations_module, "_CHUNK_ROWS", 7)
    file = write(tmp_path / "a.csv", "videoid,name,page_dir\n" + "".join(f"{i},c{i},x\n" for i in range(30)))
    assert [shown(row)[1][1] for row in rows("webvid", file)] == [f"c{i}" for i in range(30)]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

HEADER = "videoid,name,page_dir\n"
HUMAN, GPT = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}


def chat(*messages) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})


@pytest.mark.parametrize(
    ("format", "content", "place", "reason"),
    [
        ("webvid", "videoid,caption,page_dir\n1,cat,x\n", ":2", "'name' is missing; there is 'videoid', 'caption'"),
        ("webvid", HEADER + "1,cat,x\n2,cat\n", ":3", "this row has 2 cells, but the header 3"),
        ("webvid", HEADER + "1,x\n\n2,a dog, running,x\n", ":2", "this row has 2 cells, but the header 3"),
        ("webvid", HEADER + "1,cat,x\n\n2,a dog, running,x\n", ":4", "4 cells, but the header 3. Texts with a comma"),
        ("webvid", HEADER + '1,cat,x\n2,"open,x\n3,cat,x\n', ":3", "the row that begins here is not CSV"),
        ("webvid", HEADER + '1,cat,x\n2,"open,x\n3,"cat",x\n', ":3", "the row that begins here is not CSV"),
        ("webvid", HEADER + "1,cat,x\n2, ,x\n", ":3", "'name' is empty"),
        ("webvid", HEADER + "1,cat,../../etc\n", ":2", "leads out of the media folder"),
        ("webvid", HEADER + "1,cat,/etc\n", ":2", "leads out of the media folder"),
        ("webvid", HEADER + "1,cat,C:x\n", ":2", "leads out of the media folder"),
        ("webvid", HEADER + "..\\..\\x,cat,a\n", ":2", "leads out of the media folder"),
        ("webvid", HEADER + "x,cat,C:\\a\n", ":2", "leads out of the media folder"),
        ("webvid", HEADER, "", "no rows"),
        ("webvid", "", "", "no rows"),
        ("minigpt4", "[1, 2]", ":1", "expected '{', found '['"),
        ("minigpt4", '{\n"annotation": []}', "", 'no "annotations"'),
        ("minigpt4", '{"annotations":\n {"image_id": 1}}', ":2", "expected '[', found '{'"),
        ("minigpt4", '{"annotations": [{"image_id": "1"}]}', "[0]", "'caption' is missing; there is 'image_id'"),
        ("minigpt4", '{"annotations": [{"image_id": 1.5, "caption": "a"}]}', "[0]", "'image_id' has to be of type str or int, not float"),
        ("minigpt4", '{"annotations": [{"image_id": "../x", "caption": "a"}]}', "[0]", "leads out of the media folder"),
        ("llava_cc3m", '{"annotations": [{"image_id": "1", "caption": ""}]}', "[0]", "'caption' is empty"),
        ("llava_cc3m", '{"annotations": [{"image_id": "1", "caption": 3}]}', "[0]", "'caption' has to be of type str, not int: 3"),
        ("llava_cc3m", '{"annotations": [\n{"image_id": "1", "caption": "a"},\n{"image_id": "1",', ":3", "not JSON"),
        ("llava_cc3m", '{"annotations": [\n{"image_id": "1", "caption": "a"}\n{}]}', ":3", "expected ',', found '{'"),
        ("llava_cc3m", '{"annotations": []} x', ":1", "expected the end of the file, found 'x'"),
        ("llava_instruct", "", ":1", "ends before '['"),
        ("llava_instruct", "[[1]]", "[0]", "expected an object with 'conversations', found [1]"),
        ("llava_instruct", [{"conversations": "x"}], "[0]", "'conversations' has to be of type list, not str"),
        ("llava_instruct", [{"conversations": []}], "[0]", "have to alternate"),
        ("llava_instruct", [{"conversations": [HUMAN, GPT]}, {"conversations": [HUMAN, HUMAN]}], "[1]", "found user, user"),
        ("llava_instruct", [{"conversations": [GPT, HUMAN]}], "[0]", "found assistant, user"),
        ("llava_instruct", [{"conversations": [HUMAN, GPT, HUMAN]}], "[0]", "have to alternate"),
        ("llava_instruct", [{"conversations": [{**HUMAN, "from": "user"}, GPT]}], "[0]", "'human' or 'gpt', not from 'user'"),
        ("llava_instruct", [{"conversations": [HUMAN, {**GPT, "value": " "}]}], "[0]", "'value' is empty"),
        ("llava_instruct", [{"image": "1.jpg", "conversations": [HUMAN, GPT]}], "[0]", "<image> stands 0 times"),
        ("llava_instruct", [{"conversations": [{**HUMAN, "value": "<image> a"}, GPT]}], "[0]", "<image> stands 1 times"),
        ("llava_instruct", [{"image": "/etc/1.jpg", "conversations": [HUMAN, GPT]}], "[0]", "leads out of the media folder"),
        ("videochat", [{"video": "1.mp4", "QA": [{"i": "", "q": "a"}]}], "[0]", "'a' is missing"),
        ("videochat", [{"video": "1.mp4", "QA": [{"i": "", "q": " ", "a": "x"}]}], "[0]", "a question is empty"),
        ("videochat", [{"video": "1.mp4", "QA": []}], "[0]", "have to alternate"),
        ("videochat", [{"video": 1, "QA": []}], "[0]", "'video' has to be of type str"),
        ("videochat", [{"video": "a/../../1.mp4", "QA": []}], "[0]", "leads out of the media folder"),
        ("chat", chat(("user", "a"), ("assistant", "b")) + "\n{'messages': 3}\n", ":2", "not JSON"),
        ("chat", "[]", ":1", "expected an object with 'messages', found []"),
        ("chat", '{"messages": null}', ":1", "'messages' is null"),
        ("chat", '{"conversation": []}', ":1", "'messages' is missing; there is 'conversation'"),
        ("chat", chat(("user", "a"), ("bot", "b")), ":1", "the role 'bot' is not known"),
        ("chat", chat(("user", "a"), ("system", "b"), ("assistant", "c")), ":1", "have to alternate"),
        ("chat", chat(("user", "a"), ("assistant", " ")), ":1", "has no words"),
        ("chat", chat(("user", []), ("assistant", "b")), ":1", "a message of the user is empty"),
        ("chat", chat(("user", "a"), ("assistant", ["b", {"type": "image", "path": "a.png"}])), ":1", "belong into messages of the user"),
        ("chat", chat(("user", [{"type": "smell", "path": "a"}]), ("assistant", "b")), ":1", "'smell'"),
        ("chat", chat(("user", [{"type": "video"}]), ("assistant", "b")), ":1", "names its file under 'path'"),
        ("chat", chat(("user", [{"type": "input_audio", "input_audio": {"data": ""}}]), ("assistant", "b")), ":1", "'input_audio'"),
        ("chat", chat(("user", [{"type": "video", "base64": "AA"}]), ("assistant", "b")), ":1", "'base64'"),
        ("chat", chat(("user", "a"), ("assistant", "b \ud83c")), ":1", "half of a character, \\ud83c alone"),
        ("chat", chat(("user", [3]), ("assistant", "b")), ":1", "a string or an object, not 3"),
        ("chat", chat(("user", 3), ("assistant", "b")), ":1", "'content' has to be of type str or list, not int"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_the_place(tmp_path, format, content, place, reason):
    file = write(tmp_path / "file.txt", content)
    for streaming in (False, True):
        with pytest.raises(AnnotationError) as error:
            list(load_annotations(format, file, "/media", streaming))
        assert str(error.value).startswith(f"{file}{place}: ") and reason in str(error.value), error.value


def test_a_table_in_another_encoding_is_refused_with_the_line(tmp_path):
    rows = [HEADER.encode(), *[f"{i},a cat,x\n".encode() for i in range(999)], "1000,café,x\n".encode("latin-1")]
    (tmp_path / "file.csv").write_bytes(b"".join(rows))
    with pytest.raises(AnnotationError, match=r"file.csv:1001: .*UTF-8"):
        load_annotations("webvid", tmp_path / "file.csv")


@pytest.mark.parametrize("format", ["webvid", "minigpt4", "llava_instruct", "chat"])
def test_files_that_are_no_text_are_refused(tmp_path, format):
    (tmp_path / "file.txt").write_bytes(b"\xff\xfe\x00PNG\n\x80")
    with pytest.raises(AnnotationError, match=r"file.txt:1: .*UTF-8"):
        load_annotations(format, tmp_path / "file.txt")


def test_missing_files_and_unknown_formats_are_refused(tmp_path):
    for files in (tmp_path / "no.csv", str(tmp_path / "*.csv"), [tmp_path / "no.csv"]):
        with pytest.raises(FileNotFoundError, match=r"\.csv"):
            load_annotations("webvid", files)
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        load_annotations("chat", tmp_path / "no.jsonl")
    for name in (tmp_path / "absent", "a/b/absent"):  # no name that a data set on the Hub could have
        with pytest.raises(FileNotFoundError, match="no annotation file or folder .*absent"):
            load_annotations("chat", name)
    with pytest.raises(ValueError, match="webvid, llava_cc3m"):
        load_annotations("coco", "x")


def test_dataset_without_messages_is_refused(tmp_path):
    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(AnnotationError, match="no column 'messages', only text"):
        load_annotations("chat", tmp_path / "other")
    DatasetDict(test=Dataset.from_list([{"text": "a"}])).save_to_disk(tmp_path / "test")
    with pytest.raises(AnnotationError, match="no split 'train', only test"):
        load_annotations("chat", tmp_path / "test")


# ---------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("Hello, World!", "hello, world"),
        ('The "BIG" (red) dog; it: runs~away #1 * fast.', "the big red dog it runs away 1 fast"),
        ("don't   stop - it's 50% off?", "don't stop - it's 50% off?"),
        ("tabs\t\tand\n\nlines", "tabs and lines"),
        ("  ...  ", ""),
        (" ".join(f"w{i}" for i in range(60)), " ".join(f"w{i}" for i in range(50))),
        ("ÉTÉ à Paris", "été à paris"),
    ],
)
def test_caption_cleaning(caption, cleaned):
    assert clean_caption(caption) == cleaned
