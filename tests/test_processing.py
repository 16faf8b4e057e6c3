"""The processor: the published prompts, their tokens, media in chats, and what `transformers` and servers ask of
it."""

import base64
import dataclasses
import http.server
import io
import json
import re
import threading
from pathlib import Path

import jinja2.ext
import jinja2.nodes
import numpy as np
import pytest
import torch
from datasets import Dataset
from media_files import tone, write_damaged_image, write_media
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, LlamaTokenizer

from transformers_videollama import chat_templates, processing_video_llama
from transformers_videollama.chat_templates import CHAT_TEMPLATES, STOP_STRINGS
from transformers_videollama.feature_extraction_video_llama import VideoLlamaFeatureExtractor
from transformers_videollama.image_processing_video_llama import VideoLlamaImageProcessor
from transformers_videollama.media import MediaError
from transformers_videollama.processing_video_llama import VideoLlamaProcessor
from transformers_videollama.video_processing_video_llama import VideoLlamaVideoProcessor

REFERENCE = Path(__file__).parent / "reference"
CLIP, SILENT, SHORT = (str(REFERENCE / "synth" / f"{name}.mp4") for name in ("clip", "clip_silent", "clip_short"))
CLIP_SENTENCE = "The video contains 8 frames sampled at 0.0, 0.6, 1.2, 1.8, 2.5, 3.1, 3.7, 4.4 seconds. "
SILENT_SENTENCE = "The video contains 8 frames sampled at 0.0, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7 seconds. "
SHORT_SENTENCE = "The video contains 5 frames sampled at 0.0, 0.2, 0.4, 0.6, 0.8 seconds. "
HEAR = "Close your eyes, open your ears and you imagine only based on the sound that: <audio>."
HEAR_AND_SEE = (
    HEAR + "                 Close your ears, open your eyes and you see that <Video><video></Video>."
    "                  Now answer my question based on what you have just seen and heard."
)
SYSTEM = "You are able to understand the visual content that the user provides."
NUM_TOKENS = {"num_image_tokens": 5, "num_video_tokens": 5, "num_audio_tokens": 3}


def make_processor(chat_template: str | None = "vicuna", tokenizer=None, **kwargs) -> VideoLlamaProcessor:
    return VideoLlamaProcessor(
        image_processor=VideoLlamaImageProcessor(),
        tokenizer=tokenizer or AutoTokenizer.from_pretrained(REFERENCE / "tiny" / "llama"),
        video_processor=VideoLlamaVideoProcessor(),
        feature_extractor=VideoLlamaFeatureExtractor(),
        chat_template=chat_template,
        **{**NUM_TOKENS, **kwargs},
    )


@pytest.fixture
def processor() -> VideoLlamaProcessor:
    return make_processor()


@pytest.fixture
def llama_2() -> VideoLlamaProcessor:
    return make_processor("llama_2")


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def frames(num_frames: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (num_frames, 24, 32, 3), dtype=np.uint8)


def sound(seconds: float = 1.0, rate: int = 16000, channels: int | None = None) -> np.ndarray:
    shape = (int(seconds * rate),) if channels is None else (channels, int(seconds * rate))
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 0.1


def user(*entries, text: str | None = "What do you hear?") -> dict:
    return {"role": "user", "content": [*entries, *([{"type": "text", "text": text}] if text is not None else [])]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def video(path: str) -> dict:
    return {"type": "video", "path": path}


def prompt_of(processor, *messages, **kwargs) -> str:
    return processor.apply_chat_template(list(messages), **{"add_generation_prompt": True, **kwargs})


def inputs_of(processor, *messages, **kwargs):
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(list(messages), **{**settings, **kwargs})


def tokens_of_pieces(processor, prompt: str) -> list[int]:
    """How the published system tokenizes: a start token, then every piece between media for itself."""
    counts = {"<image>": 5, "<video>": 5, "<audio>": 3}
    ids = [processor.tokenizer.bos_token_id]
    for piece in re.split("(<image>|<video>|<audio>)", prompt):
        if piece in counts:
            ids += [processor.tokenizer.convert_tokens_to_ids(piece)] * counts[piece]
        elif piece:
            ids += processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# The published prompts


MEDIA = {
    "audio+video": ([video(CLIP)], HEAR_AND_SEE),
    "video": ([video(SILENT)], "<Video><video></Video> " + SILENT_SENTENCE),
    "image": ([{"type": "image", "image": image()}], "<Image><image></Image> "),
    "text": ([], None),
}


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("medium", MEDIA)
def test_published_prompts(processor, llama_2, medium, system, tokenize):
    entries, sentence = MEDIA[medium]
    first = "What do you hear?" if sentence is None else sentence + " What do you hear?"
    chat = [user(*entries), assistant("A dog is barking."), user(text="Where is it?")]
    if system:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    until_answer = len(chat) - 2
    human = f"{system}###Human: {first}###Assistant:"
    instruction = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{first} [/INST]"
    expected = {
        processor: (human, human + " A dog is barking.###Human: Where is it?###Assistant:"),
        llama_2: (instruction, instruction + " A dog is barking. </s><s>[INST] Where is it? [/INST]"),
    }
    for family, prompts in expected.items():
        for messages, prompt in zip((chat[:until_answer], chat), prompts, strict=True):
            if tokenize:
                input_ids = inputs_of(family, *messages)["input_ids"]
                assert input_ids.tolist() == [tokens_of_pieces(family, prompt)]
            else:
                assert prompt_of(family, *messages) == prompt


def test_an_empty_system_message_is_none(processor, llama_2):
    system = {"role": "system", "content": ""}
    for family in (processor, llama_2):
        assert prompt_of(family, system, user()) == prompt_of(family, user())


@pytest.mark.parametrize(
    ("path", "sentence"), [(CLIP, CLIP_SENTENCE), (SILENT, SILENT_SENTENCE), (SHORT, SHORT_SENTENCE)]
)
def test_timestamps_are_those_of_the_frames(processor, path, sentence):
    expected = f"###Human: <Video><video></Video> {sentence} What do you hear?###Assistant:"
    assert prompt_of(processor, user(video(path)), load_audio_from_video=False) == expected
    inputs = inputs_of(processor, user(video(path)), load_audio_from_video=False)
    assert inputs["input_ids"].tolist() == [tokens_of_pieces(processor, expected)]
    assert "input_features" not in inputs


def test_fewer_frames(processor):
    for tokenize in (False, True):
        kwargs = {"load_audio_from_video": False, "processor_kwargs": {"num_frames": 2}}
        expected = "###Human: <Video><video></Video> The video contains 2 frames sampled at 0.0, 2.5 seconds. "
        if tokenize:
            inputs = inputs_of(processor, user(video(CLIP)), **kwargs)
            assert inputs["pixel_values_videos"].shape[1] == 2
            assert inputs["input_ids"].tolist() == [
                tokens_of_pieces(processor, expected + " What do you hear?###Assistant:")
            ]
        else:
            assert prompt_of(processor, user(video(CLIP)), **kwargs).startswith(expected)


def test_a_processor_for_a_model_without_audio_branch():
    deaf = make_processor(load_audio_from_video=False)
    assert "<audio>" not in prompt_of(deaf, user(video(CLIP)))
    assert "<audio>" in prompt_of(deaf, user(video(CLIP)), load_audio_from_video=True)


# ---------------------------------------------------------------------------------------------------------------------
# What the published chat has no words for


def words(processor, *entries, **kwargs) -> str:
    return prompt_of(processor, user(*entries, text=None), **kwargs)[len("###Human: ") : -len("###Assistant:")]


TEXT, MARK = {"type": "text", "text": "Why?"}, {"type": "video"}
UNIT = HEAR_AND_SEE.split("                  Now")[0]
NOW = "                  Now answer my question based on what you have just seen and heard."
BARE = "<Video><video></Video> "


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"type": "video"}, TEXT], BARE + " Why?"),
        ([{"type": "image"}, {"type": "image"}, TEXT], "<Image><image></Image>  <Image><image></Image>  Why?"),
        ([{"type": "audio"}, TEXT], HEAR + NOW.replace("seen and ", "") + " Why?"),
        ([{"type": "audio"}, {"type": "video"}, TEXT], HEAR_AND_SEE + " Why?"),
        ([{"type": "video"}, {"type": "audio"}, TEXT], HEAR_AND_SEE + " Why?"),
        ([{"type": "video"}, {"type": "audio"}] * 2 + [TEXT], UNIT + " " + UNIT + NOW + " Why?"),
        ([{"type": "audio"}, {"type": "video"}] * 2 + [TEXT], UNIT + " " + UNIT + NOW + " Why?"),
        ([{"type": "audio"}] * 2 + [TEXT], HEAR + " " + HEAR + NOW.replace("seen and ", "") + " Why?"),
        ([video(SILENT), {"type": "audio", "audio": sound()}, TEXT], HEAR_AND_SEE + " Why?"),
        ([video(CLIP), video(CLIP), TEXT], UNIT + " " + UNIT + NOW + " Why?"),
        ([video(SILENT), video(CLIP), TEXT], BARE + SILENT_SENTENCE + " " + UNIT + NOW + " Why?"),
        ([{"type": "audio", "audio": sound()}, video(CLIP), TEXT], HEAR + " " + UNIT + NOW + " Why?"),
        ([TEXT, video(SILENT)], "Why? " + BARE + SILENT_SENTENCE),
        (
            [TEXT, {"type": "image"}, TEXT, {"type": "audio"}, TEXT],
            f"Why? <Image><image></Image>  Why? {HEAR}{NOW} Why?",
        ),
        ([TEXT, TEXT], "Why? Why?"),
        ([], ""),
    ],
)
def test_wording_beyond_the_published(processor, entries, expected):
    assert words(processor, *entries) == expected
    assert words(make_processor("plain"), *entries, chat_template="vicuna") == expected


def test_media_in_a_later_turn(processor):
    chat = [user(video(SILENT)), assistant("Nothing."), user({"type": "image", "image": image()}, video(CLIP))]
    inputs = inputs_of(processor, *chat)
    ids = inputs["input_ids"][0]
    assert [
        (ids == processor.tokenizer.convert_tokens_to_ids(t)).sum() for t in ("<image>", "<video>", "<audio>")
    ] == [
        5,
        10,
        3,
    ]
    assert inputs["pixel_values_videos"].shape[0] == 2
    assert prompt_of(processor, *chat).endswith(
        f"###Human: <Image><image></Image>  {HEAR_AND_SEE} What do you hear?###Assistant:"
    )


def test_an_empty_audio_entry_beside_a_file_is_the_files_sound(processor):
    mark = {"type": "audio"}
    for tokenize in (False, True):
        kwargs = {"tokenize": tokenize, "add_generation_prompt": True}
        for path in (CLIP, SILENT):
            expected = processor.apply_chat_template([user(video(path))], **kwargs)
            for entries in ([video(path), mark], [mark, video(path)]):
                chat = [user(*entries)]
                assert processor.apply_chat_template(chat, **kwargs) == expected
                assert chat == [user(*entries)], "the caller's chat stays as it was"


@pytest.mark.parametrize(
    "entry, error",
    [
        ({"type": "video", "file": str(CLIP)}, "'video' has no medium.*'path', 'url' or 'video'"),
        ({"type": "image"}, "'image' has no medium"),
        ({"type": "audio", "audio": None}, "'audio' has no medium.*stands for the sound of the video file beside it"),
        (video(CLIP) | {"num_frames": 4}, "'num_frames' of a content entry is not read.*processor_kwargs"),
        (video(CLIP) | {"fps": 1.0}, "'fps' of a content entry is not read"),
    ],
)
def test_an_entry_without_a_medium_or_with_arguments_of_its_own_is_refused(processor, entry, error):
    with pytest.raises(ValueError, match=error):
        processor.apply_chat_template([user(entry)], tokenize=True, return_dict=True, return_tensors="pt")


def test_messages_and_entries_may_be_objects(processor):
    """Dataclasses and, as those of the OpenAI client are, Pydantic's."""

    @dataclasses.dataclass
    class Entry:
        type: str
        text: str | None = None

    class Message:
        def __init__(self, content: list):
            self.content = content

        def model_dump(self) -> dict:
            return {"role": "user", "content": [dataclasses.asdict(entry) for entry in self.content], "name": None}

    entries = [Entry("text", "Hello."), Entry("video")]
    as_dicts = [{"type": "text", "text": "Hello."}, {"type": "video"}]
    expected = processor.apply_chat_template([{"role": "user", "content": as_dicts}])
    assert processor.apply_chat_template([Message(entries)]) == expected
    assert processor.apply_chat_template([{"role": "user", "content": entries}]) == expected


def test_plain_template():
    plain = make_processor("plain")
    caption = assistant("a dog barks")
    assert prompt_of(plain, user(video(SILENT), text=None), caption, add_generation_prompt=False) == (
        "<video>a dog barks\n"
    )
    assert prompt_of(plain, user(video(CLIP), text=None)) == "<audio><video>"
    assert prompt_of(plain, user({"type": "image"}, text="A photo of")) == "<image>A photo of"
    inputs = inputs_of(
        plain, user(video(SILENT), text=None), caption, add_generation_prompt=False, return_assistant_tokens_mask=True
    )
    caption_ids = plain.tokenizer("a dog barks\n", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"].tolist() == [[1] + [plain.video_token_id] * 5 + caption_ids]
    assert inputs["assistant_masks"].tolist() == [[0] * 6 + [1] * len(caption_ids)]


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_templates_need_nothing_but_a_tokenizer(family):
    """Servers render `chat_template.jinja` with the tokenizer, from entries that only mark where media go."""
    processor = make_processor(family)
    chat = [
        user({"type": "video"}, {"type": "audio"}, {"type": "image"}),
        assistant("No."),
        {"role": "user", "content": "So?"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tiny" / "llama")
    rendered = tokenizer.apply_chat_template(
        chat, chat_template=processor.chat_template, add_generation_prompt=True, tokenize=False
    )
    assert rendered == prompt_of(processor, *chat)
    assert re.findall("<(?:video|audio|image)>", rendered) == (
        ["<video>", "<audio>", "<image>"] if family == "plain" else ["<audio>", "<video>", "<image>"]
    )


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([user({"type": "pdf", "pdf": "a.pdf"})], "'text', 'image', 'video' or 'audio'.*pdf"),
        ([user({"video": CLIP})], "'text', 'image', 'video' or 'audio'"),
        ([user({"type": "text", "content": "What?"})], "has its words as 'text'"),
        ([{"role": "user"}], "'content' is a string or a list of entries"),
        ([{"role": "user", "content": {"type": "text", "text": "What?"}}], "'content' is a string or a list"),
        ([{"role": "user", "content": 5}], "'content' is a string or a list"),
        ([user({"type": "image", "base64": "?"})], "base64 cannot be decoded"),
        ([user({"type": "input_audio"})], "in base64 is a string; got None"),
        ([user({"type": "video", "video": [CLIP, CLIP]})], "entries of type 'video' hold 2 videos"),
        ([{"role": "tool", "content": "4"}], 'role "tool"'),
        ([user(), {"role": "system", "content": "Be brief."}], 'role "system"'),
        ([{"content": "Hi"}], "'role' and 'content'"),
        ([], "list of messages"),
        ("What?", "list of messages"),
    ],
)
def test_wrong_chats_are_refused(processor, chat, message):
    with pytest.raises(Exception, match=message):
        processor.apply_chat_template(chat, tokenize=True)


def test_media_may_be_given_in_base64(processor):
    def frames(source: dict[str, str]) -> torch.Tensor:
        chat = [user({"type": "video", **source})]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        return inputs["pixel_values_videos"]

    data = base64.b64encode(Path(CLIP).read_bytes()).decode()
    assert torch.equal(frames({"base64": data}), frames({"path": str(CLIP)}))


def test_no_template():
    with pytest.raises(ValueError, match="has no chat template.*vicuna"):
        make_processor(None).apply_chat_template([user()])
    assert make_processor(None).apply_chat_template([user()], chat_template="vicuna") == (
        "###Human: What do you hear?###"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def llama_tokenizer() -> LlamaTokenizer:
    """The reference's tokenizer in the library's own class, which puts a space before the first piece only."""
    model = json.loads((REFERENCE / "tiny" / "llama" / "tokenizer.json").read_text())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def test_placeholders_are_added_once_in_order(tmp_path):
    processor = make_processor()
    size = 259
    assert (processor.image_token_id, processor.video_token_id, processor.audio_token_id) == (size, size + 1, size + 2)
    assert make_processor(tokenizer=processor.tokenizer).audio_token_id == size + 2
    assert len(processor.tokenizer) == size + 3
    assert processor.tokenizer.decode([size, 75, size + 1], skip_special_tokens=True) == "H"


def test_a_padding_token_is_found(processor):
    assert processor.tokenizer.pad_token == "<unk>"
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tiny" / "llama", pad_token="</s>")
    assert make_processor(tokenizer=tokenizer).tokenizer.pad_token == "</s>"


def test_pieces_are_tokenized_apart_by_newer_llama_tokenizers(tmp_path):
    processor = make_processor(tokenizer=llama_tokenizer())
    assert isinstance(processor.tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Metaspace)
    processor.tokenizer.save_pretrained(tmp_path)
    alone = AutoTokenizer.from_pretrained(tmp_path)
    chat = [user(video(SILENT)), assistant("No."), user({"type": "image", "image": image()})]
    for template in ("vicuna", "llama_2", "plain"):
        input_ids = inputs_of(processor, *chat, chat_template=template)["input_ids"]
        reference = inputs_of(make_processor(), *chat, chat_template=template)["input_ids"]
        assert input_ids.tolist() == reference.tolist()
        text = processor.tokenizer.decode(input_ids[0][1:])
        assert alone(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


def test_batches_are_padded_on_the_left(processor):
    prompts = ["A long question about it", "Why?"]
    inputs = processor(text=prompts, return_tensors="pt")
    assert inputs["attention_mask"][1].tolist()[:2] == [0, 0]
    assert inputs["input_ids"][:, -1].tolist() == [processor.tokenizer(p)["input_ids"][-1] for p in prompts]
    right = processor(text=prompts, return_tensors="pt", padding_side="right")
    assert right["attention_mask"][1].tolist()[-2:] == [0, 0]
    assert [len(ids) for ids in processor(text=prompts, padding=False)["input_ids"]] == [
        len(processor.tokenizer(prompt)["input_ids"]) for prompt in prompts
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Media


def test_one_call_for_a_mixed_batch(processor):
    chats = [
        [user(video(CLIP))],
        [user(text="Who are you?")],
        [user(video(SHORT)), assistant("Beep."), user({"type": "image", "image": image()}, text="And this?")],
        [user(video(SILENT), {"type": "image", "image": image()})],
        [user({"type": "audio", "audio": sound(3.0, 44100, channels=2), "sampling_rate": 44100})],
    ]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chats, **settings)
    singles = [processor.apply_chat_template(chat, **settings) for chat in chats]
    assert batch["pixel_values"].shape == (2, 3, 224, 224)
    assert batch["pixel_values_videos"].shape == (3, 8, 3, 224, 224)
    assert batch["padding_mask_videos"].tolist() == [[1] * 8, [1] * 5 + [0] * 3, [1] * 8]
    assert batch["input_features"].shape == (3, 8, 128, 204)
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        assert batch["input_ids"][row, -length:].equal(single["input_ids"][0])
        assert batch["attention_mask"][row].sum() == length
    videos = [single["pixel_values_videos"] for single in singles if "pixel_values_videos" in single]
    for together, alone in zip(batch["pixel_values_videos"], videos, strict=True):
        torch.testing.assert_close(together[: alone.shape[1]], alone[0])
    features = torch.cat([single["input_features"] for single in singles if "input_features" in single])
    torch.testing.assert_close(batch["input_features"], features)
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    assert prompts == [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]


@pytest.mark.parametrize("path", [CLIP, SHORT, SILENT])
def test_a_chat_gives_the_same_inputs_as_the_processor_called_by_hand(processor, path):
    inputs = inputs_of(processor, user(video(path)))
    audio = None if path == SILENT else path
    by_hand = processor(text=prompt_of(processor, user(video(path))), videos=path, audio=audio, return_tensors="pt")
    assert set(inputs) == set(by_hand)
    for name in inputs:
        torch.testing.assert_close(inputs[name], by_hand[name])


def test_forms_of_one_video(processor, tmp_path):
    data = Path(SHORT).read_bytes()
    expected = inputs_of(processor, user(video(SHORT)))
    with open(SHORT, "rb") as file:
        for entry in (
            {"type": "video", "video": Path(SHORT)},
            {"type": "video", "video": data},
            {"type": "video", "url": SHORT},
            {"type": "video", "video": file},
            {"type": "video_url", "video_url": {"url": SHORT}},
        ):
            inputs = inputs_of(processor, user(entry))
            assert set(inputs) == set(expected)
            for name in inputs:
                torch.testing.assert_close(inputs[name], expected[name])
    assert prompt_of(processor, user({"type": "video", "video": data})) == prompt_of(processor, user(video(SHORT)))


def test_frames_have_no_timestamps_unless_told(processor):
    entry = {"type": "video", "video": frames(16)}
    assert inputs_of(processor, user(entry))["input_ids"].tolist() == [
        tokens_of_pieces(processor, "###Human: <Video><video></Video>  What do you hear?###Assistant:")
    ]
    metadata = {"fps": 8.0, "total_num_frames": 16, "frames_indices": list(range(16)), "duration": 2.0}
    told = inputs_of(processor, user(entry), processor_kwargs={"video_metadata": [metadata]})
    sentence = "The video contains 8 frames sampled at 0.0, 0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 1.8 seconds. "
    assert told["input_ids"].tolist() == [
        tokens_of_pieces(processor, f"###Human: <Video><video></Video> {sentence} What do you hear?###Assistant:")
    ]


def test_forms_of_one_image(processor, tmp_path):
    image().save(tmp_path / "picture.png")
    expected = inputs_of(processor, user({"type": "image", "image": image()}))["pixel_values"]
    for source in (
        str(tmp_path / "picture.png"),
        tmp_path / "picture.png",
        (tmp_path / "picture.png").read_bytes(),
        io.BytesIO((tmp_path / "picture.png").read_bytes()),
        np.array(image()),
    ):
        assert inputs_of(processor, user({"type": "image", "image": source}))["pixel_values"].equal(expected)
    entry = {"type": "image_url", "image_url": {"url": str(tmp_path / "picture.png")}}
    assert inputs_of(processor, user(entry))["pixel_values"].equal(expected)


def test_a_picture_may_be_a_video_of_one_frame(processor, tmp_path):
    image().save(tmp_path / "picture.png")
    expected = processor.video_processor([str(tmp_path / "picture.png")], return_tensors="pt")["pixel_values_videos"]
    entry = {"type": "video", "path": str(tmp_path / "picture.png")}
    assert inputs_of(processor, user(entry))["pixel_values_videos"].equal(expected)


def test_forms_of_one_sound(processor):
    array = sound(3.0, 44100, channels=2)
    expected = processor.feature_extractor(array, sampling_rate=44100, return_tensors="pt")["input_features"]
    for entry, kwargs in (
        ({"type": "audio", "audio": array, "sampling_rate": 44100}, {}),
        ({"type": "audio", "audio": {"array": array, "sampling_rate": 44100}}, {}),
        ({"type": "audio", "audio": array}, {"processor_kwargs": {"sampling_rate": 44100}}),
        ({"type": "audio", "audio": array}, {"processor_kwargs": {"audio_kwargs": {"sampling_rate": 44100}}}),
    ):
        torch.testing.assert_close(inputs_of(processor, user(entry), **kwargs)["input_features"], expected)
    for audio in (array, [array], [[array], []], [(array, 44100)]):
        inputs = processor(text="<audio>", audio=audio, sampling_rate=44100, return_tensors="pt")
        torch.testing.assert_close(inputs["input_features"], expected)
    files = processor(text=["<audio>", "<audio>"], audio=[[CLIP], [Path(SHORT).read_bytes()]], return_tensors="pt")
    torch.testing.assert_close(
        files["input_features"], processor.feature_extractor([CLIP, SHORT], return_tensors="pt")["input_features"]
    )


def test_rates_of_files_and_arrays_do_not_mix_up(processor):
    entries = [{"type": "audio", "path": CLIP}, {"type": "audio", "audio": sound(3.0, 8000)}]
    inputs = inputs_of(processor, user(*entries), processor_kwargs={"sampling_rate": 8000})
    expected = processor.feature_extractor([CLIP, (sound(3.0, 8000), 8000)], return_tensors="pt")
    torch.testing.assert_close(inputs["input_features"], expected["input_features"])


def test_each_file_is_opened_and_decoded_once(processor, monkeypatch):
    from transformers_videollama import feature_extraction_video_llama, media, video_processing_video_llama

    calls = []

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))

    count(media, "_from_path")
    count(video_processing_video_llama, "read_video")
    count(feature_extraction_video_llama, "read_audio")
    inputs_of(processor, user(video(CLIP)))
    assert sorted(calls) == ["_from_path", "read_audio", "read_video"]
    calls.clear()
    prompt_of(processor, user(video(CLIP)))
    assert calls == ["_from_path"], "nothing is decoded for the prompt alone"


def test_an_address_is_fetched_once(processor):
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(Path(CLIP).read_bytes())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        inputs = inputs_of(processor, user({"type": "video", "url": f"http://127.0.0.1:{server.server_port}/a.mp4"}))
        server.shutdown()
    assert requests == ["/a.mp4"]
    expected = inputs_of(processor, user(video(CLIP)))
    assert set(inputs) == set(expected)
    for name in inputs:
        torch.testing.assert_close(inputs[name], expected[name])


@pytest.mark.parametrize("tokenize", [False, True])
def test_a_sound_given_as_video(processor, tmp_path, tokenize):
    path = write_media(tmp_path / "sound.m4a", num_frames=0, audio=tone(1.0))
    with pytest.raises(MediaError, match="sound.m4a has sound but no video"):
        processor.apply_chat_template([user(video(str(path)))], tokenize=tokenize)


def test_bad_media_errors_come_through(processor, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    for path, tokenize in [(str(tmp_path / "missing.mp4"), True), (str(broken), True), (str(broken), False)]:
        with pytest.raises(MediaError, match=Path(path).name):
            processor.apply_chat_template([user(video(path))], tokenize=tokenize)
    damaged, cut = (write_damaged_image(tmp_path / name) for name in ("damaged.png", "cut.jpg"))
    for source, message in [
        (tmp_path / "missing.png", "missing.png does not exist"),
        (broken, "broken.mp4 cannot be read as an image"),
        (damaged, "damaged.png cannot be read as an image: broken PNG file"),
        (cut, "cut.jpg cannot be read as an image: image file is truncated"),
        (damaged.read_bytes(), "bytes> cannot be read as an image: broken PNG file"),
        ("data:image/png;base64,a?b", "does not hold valid base64"),
        ("ftp://example.org/a.png", "only http:// and https://"),
    ]:
        with pytest.raises(MediaError, match=message):
            inputs_of(processor, user({"type": "image", "path": source}))
    with pytest.raises(MediaError, match="clip_silent.mp4"):
        inputs_of(processor, user({"type": "audio", "path": SILENT}))


def test_a_list_of_videos_for_each_prompt(processor):
    inputs = processor(text=["Hm?", "<video><video>"], videos=[[], [frames(), frames()]], return_tensors="pt")
    assert inputs["pixel_values_videos"].shape[0] == 2
    nothing = processor(text=["Hm?", "Eh?"], videos=[[], []], audio=[], return_tensors="pt")
    assert set(nothing) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("text", "media", "counts"),
    [
        ("<image><image>", {"images": [image()]}, "2 <image> tokens and 1 images"),
        ("<image>", {}, "1 <image> tokens and 0 images"),
        ("Hm", {"videos": [frames()]}, "0 <video> tokens and 1 videos"),
        (["<video>", "<video>"], {"videos": [frames()] * 3}, "2 <video> tokens and 3 videos"),
        ("<audio>", {"audio": [sound()] * 2}, "1 <audio> tokens and 2 audio inputs"),
        ("<video>", {"audio": [sound()]}, "1 <video> tokens and 0 videos"),
    ],
)
def test_wrong_number_of_placeholders(processor, text, media, counts):
    with pytest.raises(ValueError, match=f"tokens in the prompts should be the same as the number of .*{counts}"):
        processor(text=text, **media)


def test_special_tokens_of_the_user_as_text(processor):
    chat = [user(video(SILENT), text="What does <video> mean?")]
    if not hasattr(processor.tokenizer, "_mark_chat_inputs"):  # older versions of transformers
        with pytest.raises(ValueError, match="newer version of transformers"):
            inputs_of(processor, *chat, sanitize_control_tokens=True)
        return
    with pytest.raises(ValueError, match="2 <video> tokens and 1 videos"):
        inputs_of(processor, *chat)
    inputs = inputs_of(processor, *chat, sanitize_control_tokens=True)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 5
    harmless = inputs_of(processor, user(video(SILENT), text="Hm?"))
    sanitized = inputs_of(processor, user(video(SILENT), text="Hm?"), sanitize_control_tokens=True)
    assert sanitized["input_ids"].equal(harmless["input_ids"])


def test_frames_metadata_on_request(processor):
    inputs = inputs_of(processor, user(video(SHORT)), processor_kwargs={"return_metadata": True})
    assert list(inputs["video_metadata"][0].frames_indices) == list(range(5))


def test_nothing_to_do(processor):
    with pytest.raises(ValueError, match="at least one"):
        processor()
    with pytest.raises(ValueError, match="a string or a list of at least one string"):
        processor(text=[["a"]])


# ---------------------------------------------------------------------------------------------------------------------
# The mask of the assistant's tokens, continuing


@pytest.mark.parametrize("family", ["vicuna", "llama_2"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_assistant_mask(family, padding_side, return_tensors):
    processor = make_processor(family)
    chats = [
        [
            user(video(CLIP)),
            assistant("A dog is barking."),
            user({"type": "image", "image": image()}),
            assistant("Yes."),
        ],
        [user(text="Hm?"), assistant("¿Qué?")],
    ]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors=return_tensors,
        processor_kwargs={"padding_side": padding_side},
    )
    end = {"vicuna": "###", "llama_2": " </s>"}[family]
    for ids, mask, answers in zip(
        inputs["input_ids"], inputs["assistant_masks"], (["A dog is barking.", "Yes."], ["¿Qué?"]), strict=True
    ):
        marked = [int(i) for i, m in zip(ids, mask, strict=True) if m]
        # The tokenizer of bytes has one token for every byte; the blank that it puts in front is cut off
        expected = [
            i
            for answer in answers
            for i in processor.tokenizer(answer + end, add_special_tokens=False)["input_ids"][3:]
        ]
        assert marked == expected
    assert "offset_mapping" not in inputs and "text_replacement_offsets" not in inputs


def test_continuing_the_last_message(processor, llama_2):
    chat = [user(video(SILENT)), assistant("It is the sound of")]
    for family in (processor, llama_2):
        prompt = family.apply_chat_template(chat, continue_final_message=True)
        assert prompt.endswith("It is the sound of")
        assert prompt.startswith(family.apply_chat_template(chat[:1]).removesuffix("###"))
    with pytest.raises(ValueError, match="exclude each other"):
        processor.apply_chat_template(chat, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="exclude each other"):
        processor.apply_chat_template(chat, continue_final_message=True, return_assistant_tokens_mask=True)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_answers_end_at_the_stop_string(processor):
    def decode(text, prompt=""):
        ids = processor.tokenizer(text, add_special_tokens=bool(prompt))["input_ids"]
        return processor.post_process_image_text_to_text(torch.tensor([[0, 0, *ids, 2, 0]]))[0]

    assert decode("A dog.###Human: And?###Assistant: B") == "A dog."
    assert decode("A dog.###") == "A dog."
    assert decode("Assistant: A dog.") == "A dog."
    assert decode("An Assistant: no") == "An Assistant: no"


def test_answers_with_their_prompt_keep_it(processor):
    """The library's pipelines decode prompt and answer together, and the prompt again to cut it off."""
    prompt = inputs_of(processor, user(video(SILENT)))["input_ids"]
    answer = processor.tokenizer("A dog.###", add_special_tokens=False, return_tensors="pt")["input_ids"]
    both, alone = (
        processor.post_process_multimodal_output(ids)[0] for ids in (torch.cat([prompt, answer], dim=1), prompt)
    )
    assert both.startswith(alone)
    assert both[len(alone) :].strip() == "A dog."
    assert processor.batch_decode(prompt) == processor.tokenizer.batch_decode(prompt)


def test_families_without_stop_string(llama_2):
    ids = llama_2.tokenizer("## A ### B", add_special_tokens=False)["input_ids"]
    assert llama_2.stop_string is None
    assert llama_2.post_process_image_text_to_text([ids, ids]) == ["## A ### B"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Saving; what servers ask


def test_save_and_load(tmp_path):
    import transformers_videollama  # noqa: F401  (registers the classes)

    processor = make_processor("vicuna", load_audio_from_video=False)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATES["vicuna"]
    loaded = VideoLlamaProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), VideoLlamaProcessor)
    assert (loaded.stop_string, loaded.load_audio_from_video, loaded.num_audio_tokens) == ("###", False, 3)
    assert loaded.video_token_id == processor.video_token_id
    chat = [user(video(CLIP))]
    assert inputs_of(loaded, *chat)["input_ids"].equal(inputs_of(processor, *chat)["input_ids"])
    assert loaded.tokenizer.apply_chat_template([user()], tokenize=False) == "###Human: What do you hear?###"


def test_servers_see_that_the_template_takes_entries():
    """vLLM looks for a loop over `message['content']` in the template, and gives it plain strings otherwise."""
    environment = jinja2.Environment(extensions=[_GenerationTag])
    for template in CHAT_TEMPLATES.values():
        loops = list(environment.parse(template).find_all(jinja2.nodes.For))
        assert any(loop.target.name == "message" and loop.iter.name == "messages" for loop in loops[-1:] + loops[:1])
        contents = [loop.iter for loop in loops if isinstance(loop.iter, jinja2.nodes.Getitem)]
        assert {(content.node.name, content.arg.value) for content in contents} == {("message", "content")}


class _GenerationTag(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def test_stop_strings():
    assert set(STOP_STRINGS) == set(CHAT_TEMPLATES)
    assert [make_processor(family).stop_string for family in ("vicuna", "llama_2", "plain")] == ["###", None, "\n"]
    assert make_processor("vicuna", stop_string="</END>").stop_string == "</END>"
    assert make_processor(None).stop_string is None


def test_model_input_names(processor):
    assert processor.model_input_names == [
        "pixel_values",
        "input_ids",
        "attention_mask",
        "pixel_values_videos",
        "padding_mask_videos",
        "input_features",
    ]


def test_number_of_tokens_without_media(processor):
    counts = processor._get_num_multimodal_tokens(
        image_sizes=[(100, 300), (5, 5)], video_sizes=[(7, 30, 40)], audio_lengths=[16000] * 3
    )
    assert counts["num_image_tokens"] == [5, 5]
    assert counts["num_image_patches"] == [1, 1]
    assert counts["num_video_tokens"] == [5]
    assert counts["num_audio_tokens"] == [3, 3, 3]
    assert "num_video_tokens" not in processor._get_num_multimodal_tokens(image_sizes=[(1, 1)])


def test_the_way_servers_call_it(processor):
    """Prompt rendered elsewhere, decoded media, sampling switched off; where each placeholder went comes back."""
    prompt = processor.tokenizer.apply_chat_template(
        [user({"type": "video"}, {"type": "audio"}, {"type": "image"})],
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    metadata = {"fps": 4.0, "total_num_frames": 12, "frames_indices": list(range(12)), "duration": 3.0}
    inputs = processor(
        text=prompt,
        images=[image()],
        videos=[frames(12)],
        audio=[sound(2.5)],
        sampling_rate=processor.feature_extractor.sampling_rate,
        do_sample_frames=False,
        video_metadata=[metadata],
        return_tensors="pt",
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
    )
    assert inputs["pixel_values_videos"].shape == (1, 8, 3, 224, 224)
    assert inputs["input_features"].shape == (1, 8, 128, 204)
    ids, kinds = inputs["input_ids"][0], torch.as_tensor(inputs["mm_token_type_ids"])[0]
    for kind, token_id, count in (
        (1, processor.image_token_id, 5),
        (2, processor.video_token_id, 5),
        (3, processor.audio_token_id, 3),
    ):
        assert (kinds == kind).sum() == count
        assert (ids[kinds == kind] == token_id).all()
    (offsets,) = inputs["text_replacement_offsets"]
    assert [o["type"] for o in offsets] == ["audio", "video", "image"]
    for offset in offsets:
        start, end = offset["span"]
        assert prompt[start:end] == f"<{offset['type']}>" == offset["text"]
        start, end = offset["new_span"]
        assert offset["replacement"] == offset["text"] * ((end - start) // len(offset["text"]))


def test_the_call_is_the_librarys():
    assert "__call__" not in vars(VideoLlamaProcessor)


@pytest.mark.parametrize("module", [processing_video_llama, chat_templates])
def test_files_that_travel_with_a_checkpoint_name_each_other_relatively(module):
    imported = re.findall(r"^\s*(?:from|import) (\S+)", Path(module.__file__).read_text(), re.MULTILINE)
    assert not [name for name in imported if name.startswith(("transformers_videollama", ".."))]


@pytest.mark.parametrize("text", [5, [], [5], b"words"], ids=str)
def test_what_is_no_text_is_refused(processor, text):
    with pytest.raises(ValueError, match="`text` must be a string or a list of at least one string"):
        processor(text=text)


@pytest.mark.parametrize("kind", [tuple, np.array, iter, lambda texts: Dataset.from_dict({"text": texts})["text"]])
def test_texts_come_in_any_row(processor, kind):
    texts = ["What is this?", "And that?"]
    assert processor(text=kind(texts))["input_ids"] == processor(text=texts)["input_ids"]


@pytest.mark.parametrize("rate", [16000.0, "16000", 0], ids=repr)
def test_what_is_no_sampling_rate_is_refused(processor, rate):
    sound = {"type": "audio", "audio": np.zeros(16000, np.float32), "sampling_rate": rate}
    chat = [{"role": "user", "content": [sound, {"type": "text", "text": "What is heard?"}]}]
    with pytest.raises(ValueError, match=f"whole number of Hz.*not {rate!r}"):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    with pytest.raises(ValueError, match="whole number of Hz"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{**sound, "sampling_rate": None}]}],
            tokenize=True,
            return_dict=True,
            processor_kwargs={"sampling_rate": rate},
        )
