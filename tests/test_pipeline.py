"""The pipeline `"video-text-to-text"`: what goes in, what comes out, and that it is what `generate` gives."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from transformers import TextIteratorStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import transformers_videollama  # noqa: F401
from transformers_videollama import MediaError, VideoTextToTextPipeline

SYNTH = Path(__file__).parent / "reference" / "synth"
CLIP, SILENT, SHORT = (str(SYNTH / name) for name in ("clip.mp4", "clip_silent.mp4", "clip_short.mp4"))
QUESTION = "What is shown?"
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
# What the tiny model says is not text that a tokenizer gives back, so its token ids are compared too
TOKENS = {**GREEDY, "return_tensors": True}


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> VideoTextToTextPipeline:
    return pipeline("video-text-to-text", model=str(tiny_folder), device="cpu")


def chat(*content: dict[str, Any], question: str = QUESTION) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def frames_of(path: str) -> list[PIL.Image.Image]:
    with av.open(path) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def generate_by_hand(pipe: VideoTextToTextPipeline, messages: list[dict[str, Any]], **kwargs: Any) -> torch.Tensor:
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )
    return pipe.model.generate(**inputs, **GREEDY)[0]


def tokens_of(answers: list[dict[str, Any]]) -> list[int]:
    assert len(answers) == 1
    return answers[0]["generated_token_ids"].tolist()


def test_it_is_registered_and_loads_the_whole_processor(pipe: VideoTextToTextPipeline) -> None:
    assert isinstance(pipe, VideoTextToTextPipeline)
    assert pipe.processor.video_processor is not None and pipe.processor.feature_extractor is not None


@pytest.mark.parametrize("path", [CLIP, SILENT], ids=["sound", "silent"])
def test_a_question_is_answered_as_generate_answers_it(pipe: VideoTextToTextPipeline, path: str) -> None:
    by_hand = generate_by_hand(pipe, chat({"type": "video", "path": path}))
    assert tokens_of(pipe(path, text=QUESTION, **TOKENS)) == by_hand.tolist()
    num_new = GREEDY["max_new_tokens"]
    answer = pipe.processor.post_process_image_text_to_text(by_hand[None, -num_new:])[0]
    assert pipe(path, text=QUESTION, return_full_text=False, **GREEDY) == [
        {"input_text": QUESTION, "generated_text": answer}
    ]
    assert pipe(path, text=QUESTION, **GREEDY) == [{"input_text": QUESTION, "generated_text": f"{QUESTION} {answer}"}]


def test_positions_and_keywords_are_one(pipe: VideoTextToTextPipeline) -> None:
    expected = tokens_of(pipe(CLIP, text=QUESTION, **TOKENS))
    assert tokens_of(pipe(CLIP, QUESTION, **TOKENS)) == expected
    assert tokens_of(pipe(videos=CLIP, text=QUESTION, **TOKENS)) == expected
    assert tokens_of(pipe({"videos": CLIP, "text": QUESTION}, **TOKENS)) == expected
    assert tokens_of(pipe({"video": CLIP, "text": QUESTION}, **TOKENS)) == expected


def as_path(path: str) -> Any:
    return Path(path)


def as_bytes(path: str) -> Any:
    return Path(path).read_bytes()


def as_images(path: str) -> Any:
    return frames_of(path)


def as_array(path: str) -> Any:
    return np.stack([np.asarray(frame) for frame in frames_of(path)])


def as_tensor(path: str) -> Any:
    return torch.from_numpy(as_array(path)).permute(0, 3, 1, 2)


def as_arrays(path: str) -> Any:
    return list(as_array(path))


@pytest.mark.parametrize("form", [as_path, as_bytes, as_images, as_array, as_tensor, as_arrays])
def test_a_video_has_many_forms(pipe: VideoTextToTextPipeline, form: Callable[[str], Any]) -> None:
    video = form(SHORT)
    by_hand = generate_by_hand(pipe, chat({"type": "video", "video": video}))
    assert tokens_of(pipe(video, text=QUESTION, **TOKENS)) == by_hand.tolist()
    # A list of them is a list of videos
    answers = pipe([video, video], text=QUESTION, **TOKENS)
    assert [tokens_of(answer) for answer in answers] == [by_hand.tolist()] * 2


def test_images_on_disk_are_frames(pipe: VideoTextToTextPipeline, tmp_path: Path) -> None:
    paths = []
    for i, frame in enumerate(frames_of(SHORT)):
        paths.append(str(tmp_path / f"{i}.png"))
        frame.save(paths[-1])
    assert tokens_of(pipe(paths, text=QUESTION, **TOKENS)) == tokens_of(
        pipe(frames_of(SHORT), text=QUESTION, **TOKENS)
    )


def test_a_chat_comes_back_with_the_answer(pipe: VideoTextToTextPipeline) -> None:
    messages = chat({"type": "video", "path": CLIP})
    answer = pipe(messages, return_full_text=False, **GREEDY)[0]["generated_text"]
    expected = [{"input_text": messages, "generated_text": [*messages, {"role": "assistant", "content": answer}]}]
    assert pipe(messages, **GREEDY) == expected
    assert pipe(text=messages, **GREEDY) == expected
    assert pipe([messages, messages], **GREEDY) == [expected, expected]
    assert pipe(text=[messages, messages], **GREEDY) == [expected, expected]
    assert tokens_of(pipe(messages, **TOKENS)) == tokens_of(pipe(CLIP, text=QUESTION, **TOKENS))


def test_a_chat_goes_on(pipe: VideoTextToTextPipeline) -> None:
    first = pipe(chat({"type": "video", "path": CLIP}), **GREEDY)[0]["generated_text"]
    second = pipe([*first, *chat(question="And then?")], **GREEDY)[0]["generated_text"]
    assert [message["role"] for message in second] == ["user", "assistant", "user", "assistant"]
    assert second[:2] == first


@pytest.mark.parametrize("content", ["It shows", [{"type": "text", "text": "It shows"}]], ids=["string", "entries"])
def test_the_assistants_last_message_is_continued(pipe: VideoTextToTextPipeline, content: Any) -> None:
    messages = [*chat({"type": "video", "path": SHORT}), {"role": "assistant", "content": content}]
    answer = pipe(messages, return_full_text=False, **GREEDY)[0]["generated_text"]
    full = pipe(messages, **GREEDY)[0]["generated_text"]
    assert full[:-1] == messages[:-1]
    text = full[-1]["content"] if isinstance(content, str) else full[-1]["content"][0]["text"]
    assert text == "It shows" + answer
    assert messages[-1]["content"] == content


def test_results_have_the_shape_of_the_librarys_own_pipeline(pipe: VideoTextToTextPipeline, tiny_folder: Path) -> None:
    messages = chat({"type": "video", "path": CLIP})
    generate_kwargs = {"generate_kwargs": GREEDY}
    for task in ("image-text-to-text", "any-to-any"):
        other = pipeline(task, model=str(tiny_folder), device="cpu")
        for inputs in (messages, [messages, messages]):
            ours = pipe(inputs, return_full_text=False, **generate_kwargs)
            theirs = other(text=inputs, return_full_text=False, **generate_kwargs)
            assert _shape(ours) == _shape(theirs)
            assert _shape(pipe(inputs, **generate_kwargs)) == _shape(other(text=inputs, **generate_kwargs))


def _shape(result: Any) -> Any:
    if isinstance(result, list):
        return [_shape(item) for item in result]
    return {key: _shape(value) for key, value in result.items()} if isinstance(result, dict) else type(result)


def test_batches_of_unlike_prompts_give_what_each_gives_alone(pipe: VideoTextToTextPipeline) -> None:
    inputs = [
        {"videos": CLIP, "text": QUESTION},
        {"videos": SILENT, "text": "Who is it, and what do they do there all day long?"},
        {"videos": SHORT, "text": "Where?"},
        {"text": "No video at all."},
        chat({"type": "video", "path": SHORT}, {"type": "image", "image": frames_of(CLIP)[0]}),
    ]
    # A list is of one kind, so the chat stands alone
    for batch in (inputs[:4], [inputs[4], chat({"type": "video", "path": CLIP})]):
        alone = [pipe(item, **GREEDY, return_full_text=False) for item in batch]
        together = pipe(batch, batch_size=len(batch), **GREEDY, return_full_text=False)
        assert together == alone
        in_pairs = pipe(batch, batch_size=2, **GREEDY, return_full_text=False)
        assert in_pairs == alone


def test_a_batch_holds_each_prompts_own_media(pipe: VideoTextToTextPipeline) -> None:
    """The logits tell more than the words do of a model that says much the same about everything."""
    prompts = [
        {"videos": as_array(SHORT)[:2], "text": QUESTION},
        {"videos": CLIP, "text": "And what is heard, in the middle of it and at its end?"},
        {"text": "No video at all."},
        {"videos": as_array(SHORT)[:3], "text": QUESTION},
    ]
    alone = []
    for prompt in prompts:
        inputs = pipe.preprocess(prompt)
        del inputs["text"]
        alone.append(pipe.model(**inputs).logits[0, -1])
    batch = pipe._collate([pipe.preprocess(prompt) for prompt in prompts])
    assert batch.pop("text") == [prompt["text"] for prompt in prompts]
    assert batch["pixel_values_videos"].shape[:2] == batch["padding_mask_videos"].shape == (3, 8)
    assert batch["padding_mask_videos"].sum(1).tolist() == [2, 8, 3]
    together = pipe.model(**batch).logits[:, -1]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[3]).abs().max() > 1e-4


def test_lists_and_generators(pipe: VideoTextToTextPipeline) -> None:
    videos, questions = [CLIP, SHORT], [QUESTION, "Why?"]
    expected = [pipe(video, text=question, **GREEDY) for video, question in zip(videos, questions, strict=True)]
    assert pipe(videos, text=questions, **GREEDY) == expected
    pairs = [{"videos": video, "text": question} for video, question in zip(videos, questions, strict=True)]
    assert pipe(pairs, **GREEDY) == expected
    assert list(pipe((pair for pair in pairs), batch_size=2, **GREEDY)) == expected
    assert list(pipe((video for video in videos), text=questions, **GREEDY)) == expected
    assert pipe(CLIP, text=questions, **GREEDY)[0] == expected[0]
    same = [pipe(video, text=QUESTION, **GREEDY) for video in videos]
    assert pipe(videos, text=QUESTION, **GREEDY) == same
    assert list(pipe((video for video in videos), text=QUESTION, **GREEDY)) == same
    assert list(pipe(videos, text=(question for question in questions), **GREEDY)) == expected
    assert list(pipe(CLIP, text=(question for question in questions), **GREEDY))[0] == expected[0]


def test_data_sets(pipe: VideoTextToTextPipeline) -> None:
    videos, questions = [CLIP, SHORT], [QUESTION, "Why?"]
    expected = [pipe(video, text=question, **GREEDY) for video, question in zip(videos, questions, strict=True)]
    pairs = Dataset.from_dict({"video": videos, "text": questions, "id": [1, 2]})
    for dataset in (pairs, pairs.to_iterable_dataset()):
        assert list(pipe(dataset, **GREEDY)) == expected
    assert list(pipe(pairs["video"], text=pairs["text"], **GREEDY)) == expected
    assert list(pipe(KeyDataset(pairs, "video"), text=KeyDataset(pairs, "text"), **GREEDY)) == expected
    messages = [chat({"type": "video", "path": video}) for video in videos]
    chats = Dataset.from_list([{"messages": one} for one in messages])
    answers = [tokens_of(pipe(one, **TOKENS)) for one in messages]
    for dataset in (chats["messages"], KeyDataset(chats, "messages")):
        assert [tokens_of(answer) for answer in pipe(text=dataset, **TOKENS)] == answers
    assert [tokens_of(answer) for answer in pipe(chats["messages"], **TOKENS)] == answers


def test_questions_about_nothing_seen(pipe: VideoTextToTextPipeline) -> None:
    expected = tokens_of(pipe(chat(), **TOKENS))
    assert tokens_of(pipe(text=QUESTION, **TOKENS)) == expected
    assert [tokens_of(answer) for answer in pipe(text=[QUESTION, QUESTION], batch_size=2, **TOKENS)] == [expected] * 2


def test_answers_stream(pipe: VideoTextToTextPipeline) -> None:
    expected = pipe(CLIP, text=QUESTION, return_full_text=False, **GREEDY)
    for kwargs in ({}, {"generate_kwargs": True}):
        streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        given = {"generate_kwargs": {"streamer": streamer}} if kwargs else {"streamer": streamer}
        result = []
        thread = threading.Thread(
            target=lambda given=given, result=result: result.extend(
                pipe(CLIP, text=QUESTION, return_full_text=False, **GREEDY, **given)
            )
        )
        thread.start()
        streamed = "".join(streamer)
        thread.join()
        assert result == expected
        assert streamed.strip() == expected[0]["generated_text"]


def test_generation_arguments(pipe: VideoTextToTextPipeline, tiny_folder: Path) -> None:
    by_hand = generate_by_hand(pipe, chat({"type": "video", "path": CLIP})).tolist()
    given = {"do_sample": False, "min_new_tokens": 8}
    kept = dict(given)
    for _ in range(2):  # what the caller gave is not changed
        assert tokens_of(pipe(CLIP, QUESTION, max_new_tokens=8, generate_kwargs=given, return_tensors=True)) == by_hand
        assert given == kept
    with pytest.raises(ValueError, match="`do_sample` is given twice"):
        pipe(CLIP, QUESTION, do_sample=True, generate_kwargs=given)
    with pytest.raises(ValueError, match="max_new_tokens"):
        pipe(CLIP, QUESTION, max_new_tokens=8, generate_kwargs={"max_new_tokens": 8})
    # Given once, for all calls
    greedy = pipeline("video-text-to-text", model=pipe.model, processor=pipe.processor, device="cpu", **TOKENS)
    assert tokens_of(greedy(CLIP, QUESTION)) == by_hand


def test_several_answers_to_each_of_a_batch(pipe: VideoTextToTextPipeline) -> None:
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "return_full_text": False}
    alone = [pipe(video, text=QUESTION, **beams) for video in (CLIP, SHORT)]
    assert [len(answers) for answers in alone] == [2, 2]
    assert pipe([CLIP, SHORT], text=QUESTION, batch_size=2, **beams) == alone


def test_processor_arguments(pipe: VideoTextToTextPipeline) -> None:
    for kwargs in ({"load_audio_from_video": False}, {"num_frames": 3}):
        by_hand = generate_by_hand(pipe, chat({"type": "video", "path": CLIP}), **kwargs).tolist()
        assert tokens_of(pipe(CLIP, text=QUESTION, **kwargs, **TOKENS)) == by_hand
    inputs = {"videos": CLIP, "text": QUESTION}
    assert "input_features" in pipe.preprocess(inputs)
    assert "input_features" not in pipe.preprocess(inputs, load_audio_from_video=False)
    assert pipe.preprocess(inputs, num_frames=3)["pixel_values_videos"].shape[1] == 3
    assert pipe.preprocess(inputs, processor_kwargs={"num_frames": 3})["pixel_values_videos"].shape[1] == 3


def test_answers_end_at_the_familys_stop_string(
    pipe: VideoTextToTextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = pipe.processor.stop_string
    answer = pipe.tokenizer(f" Yes.{stop}No.", add_special_tokens=False, return_tensors="pt").input_ids
    monkeypatch.setattr(
        pipe.model, "generate", lambda input_ids, **kwargs: torch.cat([input_ids, answer.expand(1, -1)], 1)
    )
    assert pipe(CLIP, text=QUESTION, return_full_text=False)[0]["generated_text"] == "Yes."


def test_a_saved_pipeline_loads(pipe: VideoTextToTextPipeline, tmp_path: Path) -> None:
    for folder, loaded in (("one", pipe), ("two", None)):
        loaded = loaded or pipeline("video-text-to-text", model=str(tmp_path / "one"), device="cpu", dtype="float32")
        loaded.save_pretrained(tmp_path / folder)
        again = pipeline("video-text-to-text", model=str(tmp_path / folder), device="cpu")
        assert pipe(CLIP, text=QUESTION, **GREEDY) == again(CLIP, text=QUESTION, **GREEDY)


def test_mistakes_are_named(pipe: VideoTextToTextPipeline) -> None:
    with pytest.raises(ValueError, match="Give a video and a question"):
        pipe()
    for forgotten in (CLIP, [CLIP, CLIP], as_array(SHORT), {"videos": CLIP}):
        with pytest.raises(ValueError, match="give it as `text=…`"):
            pipe(forgotten)
    with pytest.raises(ValueError, match="Got 2 videos and 3 questions"):
        pipe([CLIP, SHORT], text=["1", "2", "3"])
    for videos, questions, fewer in (([CLIP] * 3, ["1", "2"], "questions"), ([CLIP], ["1", "2"], "videos")):
        with pytest.raises(ValueError, match=f"fewer {fewer} than"):
            list(pipe((video for video in videos), text=questions, **GREEDY))
    for text in ([], 5):
        with pytest.raises(ValueError, match="`text` is a question, or a list of at least one"):
            pipe(CLIP, text=text)
    with pytest.raises(ValueError, match=r"question about a video is a string; this one is \['a', 'b'\]"):
        pipe({"videos": CLIP, "text": ["a", "b"]})
    with pytest.raises(ValueError, match=r"this one has \['text', 'vid'\]"):
        pipe({"vid": CLIP, "text": QUESTION})
    with pytest.raises(ValueError, match="`video` is no argument"):
        pipe(video=CLIP, text=QUESTION)
    with pytest.raises(ValueError, match="either a chat or a video"):
        pipe(CLIP, text=chat())
    with pytest.raises(MediaError, match="no_such_file.mp4"):
        pipe("no_such_file.mp4", text=QUESTION)
