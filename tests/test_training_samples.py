"""One row to one sample, and samples to a batch: frames and crop, prompts of both branches, labels, cuts, padding."""

import pickle

import numpy as np
import pytest
import torch
from media_files import damage_packet, frame_numbers, write_media
from PIL import Image
from test_processing import make_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from transformers_videollama.training import samples as samples_module
from transformers_videollama.training.captions import IMAGE_REQUESTS
from transformers_videollama.training.collator import VideoLlamaDataCollator
from transformers_videollama.training.samples import SampleBuilder, SampleError, crop_frames

TEMPLATES = ("vicuna", "llama_2", "plain")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'][0]['text'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{% for entry in message['content'] %}"
    "{{ entry['text'] if entry['type'] == 'text' else '<' + entry['type'] + '>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_media(folder / "clip.mp4", num_frames=20, fps=10, height=224, width=224)
    write_media(folder / "short.mp4", num_frames=3, fps=10)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A GPT-2 kind of tokenizer, which adds no start token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(["a red ball moves to the left while a dog is barking"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")


def row(*turns, source="data.jsonl:7") -> dict:
    """Turns are tuples of content (a path or text, by whether it has a suffix of media), the user's first."""
    messages = []
    for number, turn in enumerate(turns):
        content = [
            {"type": "text", "text": item, "path": None}
            if isinstance(item, str)
            else {"type": item[0], "text": None, "path": str(item[1])}
            for item in turn
        ]
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return {"messages": messages, "source": source}


def build(builder: SampleBuilder, row: dict, seed: int = 0) -> dict:
    return builder(row, torch.Generator().manual_seed(seed))


def learned(processor, sample: dict) -> str:
    """The text of the tokens with labels."""
    chosen = sample["labels"] != -100
    assert torch.equal(sample["labels"][chosen], sample["input_ids"][chosen])
    return processor.tokenizer.decode(sample["labels"][chosen])


# ---------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("branch", ["video", "audio"])
def test_caption_follows_start_token_and_soft_tokens(folder, kind, branch):
    processor = make_processor("plain")
    path = folder / {"video": "clip.mp4", "image": "image.png"}[kind]
    builder = SampleBuilder(processor, branch, "caption", num_frames=4)
    sample = build(builder, row([(kind, path)], ["a red ball"]))
    shown = "audio" if branch == "audio" else kind
    text = processor.tokenizer("a red ball\n", add_special_tokens=False)["input_ids"]
    placeholders = [getattr(processor, f"{shown}_token_id")] * getattr(processor, f"num_{shown}_tokens")
    assert sample["input_ids"].tolist() == [processor.tokenizer.bos_token_id, *placeholders, *text]
    assert sample["labels"].tolist() == [-100] * (1 + len(placeholders)) + text
    assert processor.tokenizer.decode(text).endswith("\n")
    # as the processor writes it for an answer to go on from
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": kind}]}, {"role": "assistant", "content": "a red ball"}]
    )
    assert prompt == f"<{kind}>a red ball\n"
    name = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "audio_pixel_values_videos"}[shown]
    num_frames = 4 if kind == "video" else 1
    assert set(sample) == {"input_ids", "labels", name}
    assert len(sample[name]) == 1
    assert sample[name][0].shape == ((3, 224, 224) if name == "pixel_values" else (num_frames, 3, 224, 224))


def test_caption_is_cut_at_32_tokens_of_text(folder):
    processor = make_processor("plain")
    sample = build(
        SampleBuilder(processor, text_format="caption"), row([("image", folder / "image.png")], ["word " * 50])
    )
    assert (sample["labels"] != -100).sum() == 32
    assert len(sample["input_ids"]) == 1 + 5 + 32


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([["what?"], ["this"]], "one medium"),
        ([[("image", "image.png"), "what?"], ["this"]], "one medium"),
        ([[("image", "image.png")], ["a <video> of it"]], "placeholder"),
        ([[("image", "image.png")], [""]], "no words"),
    ],
)
def test_what_is_no_caption_is_refused_with_its_row(folder, turns, reason):
    turns = [[(item[0], folder / item[1]) if isinstance(item, tuple) else item for item in turn] for turn in turns]
    with pytest.raises(SampleError, match=f"data.jsonl:7: .*{reason}"):
        build(SampleBuilder(make_processor("plain"), text_format="caption"), row(*turns))


# ---------------------------------------------------------------------------------------------------------------------
# Chats


def test_a_chat_without_an_answer_is_refused(folder):
    builder = SampleBuilder(make_processor("plain"))
    with pytest.raises(SampleError, match=r"data.jsonl:7: its answers have no words"):
        build(builder, row([("image", folder / "image.png"), "what?"], [" "]))
    build(builder, row([("image", folder / "image.png"), "what?"], [""], ["and?"], ["this"]))


@pytest.mark.parametrize("template", [*TEMPLATES, "chatml"])
@pytest.mark.parametrize("tokenizer", ["llama", "byte level"])
def test_learned_are_the_answers_and_their_end_marks(folder, template, tokenizer):
    processor = make_processor(
        CHATML if template == "chatml" else template, byte_level_tokenizer() if tokenizer == "byte level" else None
    )
    eos = processor.tokenizer.eos_token
    end = {"vicuna": "###", "llama_2": f" {eos}", "plain": "\n", "chatml": "<|im_end|>"}[template]
    chat = row([("video", folder / "clip.mp4"), "what is it?"], ["a red ball"], ["which way?"], ["to the left"])
    sample = build(SampleBuilder(processor, num_frames=4), chat)
    words = learned(processor, sample).replace(" ", "")
    assert words == f"a red ball{end}to the left{end}".replace(" ", "")
    placeholders = sample["input_ids"] == processor.video_token_id
    assert placeholders.sum() == 5 and (sample["labels"][placeholders] == -100).all()


@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_are_those_of_the_processor(folder, template):
    processor = make_processor(template, load_audio_from_video=False)
    chat = row(
        [("image", folder / "image.png"), "and", ("video", folder / "clip.mp4"), "what is it?"],
        ["a ball"],
        ["why?"],
        ["so"],
    )
    inputs = processor.apply_chat_template(
        [
            {"role": message["role"], "content": [{k: v for k, v in part.items() if v} for part in message["content"]]}
            for message in chat["messages"]
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    sample = build(SampleBuilder(processor, random_resized_crop=False), chat)
    assert torch.equal(sample["input_ids"], inputs["input_ids"][0])
    assert torch.equal(sample["labels"] != -100, inputs["assistant_masks"][0].bool())
    torch.testing.assert_close(sample["pixel_values"], inputs["pixel_values"], rtol=0, atol=0)
    torch.testing.assert_close(sample["pixel_values_videos"][0], inputs["pixel_values_videos"][0], rtol=0, atol=0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_audio_branch_hears_what_the_video_branch_sees(folder, template):
    """Same words, other placeholders, same pictures."""
    processor = make_processor(template)
    chat = row([("video", folder / "clip.mp4"), ("image", folder / "image.png"), "what is it?"], ["a ball"])
    seen, heard = (build(SampleBuilder(processor, branch), chat) for branch in ("video", "audio"))
    texts = [processor.tokenizer.decode(sample["input_ids"]) for sample in (seen, heard)]
    for kind, count in (("video", 5), ("image", 5)):
        texts[0] = texts[0].replace(f"<{kind}>" * count, "<audio>" * 3)
    assert texts[0] == texts[1] and "<audio>" * 3 in texts[0]
    if template != "plain":
        assert "The video contains 8 frames sampled at 0.0, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7 seconds." in texts[0]
    assert set(heard) == {"input_ids", "labels", "audio_pixel_values_videos"}
    video, image = heard["audio_pixel_values_videos"]
    torch.testing.assert_close(video, seen["pixel_values_videos"][0], rtol=0, atol=0)
    torch.testing.assert_close(image, seen["pixel_values"], rtol=0, atol=0)


def test_audio_entries_are_heard_from_their_frames(folder, monkeypatch):
    processor = make_processor("vicuna")
    monkeypatch.setattr("transformers_videollama.media.read_audio", None)  # no sound is ever read
    clip = folder / "clip.mp4"
    chat = row(
        [("audio", clip), ("video", clip), "what?"], ["a ball"], [("audio", folder / "image.png"), "and?"], ["so"]
    )
    sample = build(SampleBuilder(processor, "audio", max_length=2000), chat)
    text = processor.tokenizer.decode(sample["input_ids"])
    assert "Close your eyes, open your ears" in text and "Close your ears, open your eyes" in text
    assert text.index("<audio>") < text.index("<video>")
    assert [len(frames) for frames in sample["audio_pixel_values_videos"]] == [8, 1]
    torch.testing.assert_close(sample["audio_pixel_values_videos"][0], sample["pixel_values_videos"][0])
    with pytest.raises(SampleError, match='data.jsonl:7: .*clip.mp4.*branch="audio"'):
        build(SampleBuilder(processor, "video"), chat)


def test_image_without_words_is_asked_about(folder):
    processor = make_processor("vicuna")
    builder = SampleBuilder(processor)
    chat = row([("image", folder / "image.png")], ["A dog."])
    requests = set()
    for seed in range(30):
        text = processor.tokenizer.decode(build(builder, chat, seed)["input_ids"])
        found = [request for request in IMAGE_REQUESTS if f"</Image> {request}###" in text.replace("  ", " ")]
        assert len(found) == 1
        requests.update(found)
    assert requests == set(IMAGE_REQUESTS)
    assert len(chat["messages"][0]["content"]) == 1  # the row is as before


def test_text_alone_has_no_media(folder):
    assert set(build(SampleBuilder(make_processor("vicuna")), row(["hi"], ["ho"]))) == {"input_ids", "labels"}


def test_long_chats_are_cut_before_media_not_in_them(folder):
    processor = make_processor("plain")
    chat = row(["hi"], ["ho"], [("video", folder / "short.mp4"), "what?"], ["a ball"])
    full = build(SampleBuilder(processor), chat)
    places = (full["input_ids"] == processor.video_token_id).nonzero()[:, 0]
    start, end = int(places[0]), int(places[-1]) + 1
    for length in range(1, len(full["input_ids"]) + 2):
        builder = SampleBuilder(processor, max_length=length)
        kept = start if start < length < end else min(length, len(full["input_ids"]))
        if not (full["labels"][:kept] != -100).any():
            with pytest.raises(SampleError, match=f"within {length} tokens"):
                build(builder, chat)
            continue
        sample = build(builder, chat)
        assert torch.equal(sample["input_ids"], full["input_ids"][:kept])
        assert torch.equal(sample["labels"], full["labels"][:kept])
        assert ("pixel_values_videos" in sample) == (kept >= end)


def test_chats_are_cut_at_512_tokens(folder):
    sample = build(SampleBuilder(make_processor("vicuna")), row(["hi"], ["word " * 600]))
    assert len(sample["input_ids"]) == 512


def test_text_of_placeholders_is_refused(folder):
    with pytest.raises(SampleError, match="data.jsonl:7.*<video>"):
        build(SampleBuilder(make_processor("vicuna")), row(["what is <video>?"], ["a word"]))


def test_templates_that_mark_no_answers_are_refused():
    with pytest.raises(ValueError, match="generation"):
        SampleBuilder(make_processor("{{ messages[0]['content'] }}"))


@pytest.mark.parametrize("setting", [{"branch": "both"}, {"text_format": "x"}, {"sampling": "x"}, {"num_frames": 0}])
def test_unknown_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SampleBuilder(make_processor("vicuna"), **setting)


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def shown_frames(processor, frames: torch.Tensor) -> list[int]:
    mean, std = (torch.tensor(getattr(processor.video_processor, f"image_{name}")) for name in ("mean", "std"))
    return frame_numbers((frames * std[:, None, None] + mean[:, None, None]) * 255)


def test_frames_are_sampled_as_asked(folder):
    processor = make_processor("plain")
    chat = row([("video", folder / "clip.mp4")], ["a ball"])
    uniform = build(SampleBuilder(processor, num_frames=4, random_resized_crop=False), chat)
    assert shown_frames(processor, uniform["pixel_values_videos"][0]) == [0, 5, 10, 15]
    builder = SampleBuilder(processor, text_format="caption", num_frames=4, random_resized_crop=False)
    draws = {tuple(shown_frames(processor, build(builder, chat, seed)["pixel_values_videos"][0])) for seed in range(6)}
    assert len(draws) > 1
    for draw in draws:
        assert list(draw) == sorted(set(draw)) and [frame < 10 for frame in draw] == [True, True, False, False]


def test_sample_depends_on_its_generator_alone(folder):
    builder = SampleBuilder(make_processor("plain"), text_format="caption", num_frames=4)
    chat = row([("video", folder / "clip.mp4")], ["a ball"])
    torch.manual_seed(1)
    first = build(builder, chat, seed=3)["pixel_values_videos"][0]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = build(builder, chat, seed=3)["pixel_values_videos"][0]
    other = build(builder, chat, seed=4)["pixel_values_videos"][0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # and leaves the global one alone


def test_crop_is_one_window_for_all_frames_within_the_published_bounds():
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    picture = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    frames = torch.stack([picture, picture])
    areas, ratios = [], []
    for seed in range(200):
        cropped = crop_frames(frames, torch.Generator().manual_seed(seed))
        assert cropped.dtype == torch.uint8 and cropped.shape == frames.shape
        assert torch.equal(cropped[0], cropped[1])
        # the values are the coordinates, so their slope is the size of the window by that of the picture
        height = (cropped[0, 0, 200, 0] - cropped[0, 0, 24, 0]).item() / 176 * 224
        width = (cropped[0, 1, 0, 200] - cropped[0, 1, 0, 24]).item() / 176 * 224
        areas.append(height * width / 224**2)
        ratios.append(width / height)
    assert 0.48 < min(areas) < 0.56 and 0.9 < max(areas) < 1.02
    assert 0.73 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.36


def test_crop_is_bicubic_and_truncated(monkeypatch):
    monkeypatch.setattr(samples_module, "_draw_crop", lambda *args: (2, 4, 12, 14))
    frames = torch.randint(0, 256, (2, 3, 16, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    part = frames[:, :, 2:14, 4:18].double()
    exact = torch.nn.functional.interpolate(part, (16, 20), mode="bicubic", align_corners=False).clamp(0, 255)
    cropped = crop_frames(frames, torch.Generator())
    is_whole = (exact - exact.round()).abs() < 1e-3
    assert torch.equal(cropped[~is_whole].double(), exact[~is_whole].floor())
    assert (exact > 254.9).any() and (exact < 0.1).any()  # overshoot does not wrap around


def test_image_is_cropped_before_it_is_resized(folder):
    builder = SampleBuilder(make_processor("vicuna"))
    chat = row([("image", folder / "image.png"), "what?"], ["so"])
    first, second = build(builder, chat, 0)["pixel_values"], build(builder, chat, 1)["pixel_values"]
    assert first.shape == second.shape == (1, 3, 224, 224) and not torch.equal(first, second)


def test_bad_media_are_named_with_their_row(folder, tmp_path):
    broken = damage_packet(write_media(tmp_path / "broken.mp4"), 3)
    (tmp_path / "cut.png").write_bytes((folder / "image.png").read_bytes()[:2000])
    builder = SampleBuilder(make_processor("vicuna"))
    for kind, path in (("video", broken), ("image", tmp_path / "cut.png"), ("video", "no.mp4"), ("image", "no.png")):
        with pytest.raises(SampleError, match=f"data.jsonl:7: .*{getattr(path, 'name', path)}") as error:
            build(builder, row([(kind, path), "what?"], ["so"]))
        assert error.value.path == str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Feature cache


class Cache:
    def __init__(self, entries: dict):
        self.entries = entries

    def get(self, path: str, kind: str, is_image: bool) -> dict:
        assert is_image == path.endswith(".png")
        return self.entries[path, kind]


def test_features_take_the_place_of_media():
    processor = make_processor("vicuna")
    frames, clips, image = torch.randn(8, 4, 6), torch.randn(8, 5), torch.randn(1, 4, 6)
    seconds = [0.0, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7]
    cache = Cache(
        {
            ("gone.mp4", "frames"): {"features": frames, "timestamps": seconds},
            ("gone.mp4", "clips"): {"features": clips, "timestamps": seconds},
            ("gone.png", "frames"): {"features": image, "timestamps": None},
        }
    )
    chat = row([("video", "gone.mp4"), ("image", "gone.png"), "what?"], ["so"])
    sample = build(SampleBuilder(processor, feature_cache=cache), chat)
    assert set(sample) == {"input_ids", "labels", "video_frame_features", "image_frame_features"}
    assert torch.equal(sample["video_frame_features"][0], frames)
    assert torch.equal(sample["image_frame_features"][0], image[0])
    assert "frames sampled at 0.0, 0.2, 0.5" in processor.tokenizer.decode(sample["input_ids"])
    both = row([("audio", "gone.mp4"), ("video", "gone.mp4"), "what?"], ["so"])
    sample = build(SampleBuilder(processor, "audio", feature_cache=cache), both)
    assert torch.equal(sample["audio_clip_features"][0], clips)
    assert torch.equal(sample["video_frame_features"][0], frames)
    with pytest.raises(SampleError, match="data.jsonl:7: gone.png is not in the feature cache"):
        build(SampleBuilder(processor, "audio", feature_cache=cache), chat)


def test_cached_prompt_is_the_online_one(folder):
    processor = make_processor("vicuna")
    clip = str(folder / "clip.mp4")
    chat = row([("video", clip), ("image", folder / "image.png")], ["so"])
    online = SampleBuilder(processor, random_resized_crop=False)
    seconds = online.read_video(clip, torch.Generator())[1]
    cache = Cache(
        {
            (clip, "frames"): {"features": torch.zeros(8, 2, 2), "timestamps": seconds},
            (str(folder / "image.png"), "frames"): {"features": torch.zeros(1, 2, 2), "timestamps": None},
        }
    )
    cached = SampleBuilder(processor, feature_cache=cache)
    for seed in range(3):
        assert torch.equal(build(online, chat, seed)["input_ids"], build(cached, chat, seed)["input_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_batch_is_padded_and_media_follow_each_other():
    clips = [torch.full((length, 3, 2, 2), float(length)) for length in (3, 1, 2)]
    samples = [
        {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7]), "pixel_values_videos": clips[:2]},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])},
        {
            "input_ids": torch.tensor([9, 0]),
            "labels": torch.tensor([-100, 0]),
            "pixel_values_videos": clips[2:],
            "pixel_values": torch.ones(2, 3, 2, 2),
            "audio_clip_features": [torch.ones(2, 4), torch.ones(2, 4)],
        },
    ]
    collator = pickle.loads(pickle.dumps(VideoLlamaDataCollator(pad_token_id=0)))
    batch = collator(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100], [-100, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["padding_mask_videos"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["pixel_values_videos"].shape == (3, 3, 3, 2, 2)
    for clip, padded in zip(clips, batch["pixel_values_videos"], strict=True):
        assert torch.equal(padded[: len(clip)], clip) and not padded[len(clip) :].any()
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["audio_clip_features"].shape == (2, 2, 4) and "audio_padding_mask_videos" not in batch


def test_batch_without_media_has_text_alone():
    sample = {"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}
    assert set(VideoLlamaDataCollator(0)([sample, sample])) == {"input_ids", "labels", "attention_mask"}


def test_padding_left_and_to_a_multiple():
    samples = [{"input_ids": torch.arange(length), "labels": torch.arange(length)} for length in (2, 5)]
    batch = VideoLlamaDataCollator(9, padding_side="left", pad_to_multiple_of=4)(samples)
    assert batch["input_ids"].tolist() == [[9] * 6 + [0, 1], [9] * 3 + [0, 1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[0] * 6 + [1] * 2, [0] * 3 + [1] * 5]
    assert batch["labels"][0].tolist() == [-100] * 6 + [0, 1]
    with pytest.raises(ValueError, match="padding_side"):
        VideoLlamaDataCollator(0, padding_side="top")
