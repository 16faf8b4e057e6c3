"""`videollama eval` on real clips with a small model: answers, judge, resuming, results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from media_files import frame_picture, write_media
from PIL import Image

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.chat_templates import CHAT_TEMPLATES
from transformers_videollama.cli import main
from transformers_videollama.conversation import prompt_ids
from transformers_videollama.evaluation.answering import Answerer
from transformers_videollama.evaluation.encoded_media import MediumEncoder
from transformers_videollama.evaluation.items import Item, Medium
from transformers_videollama.evaluation.mvbench import ANSWER_START, SYSTEM_PROMPT, question_text
from transformers_videollama.evaluation.output_folder import Answers
from transformers_videollama.modeling_video_llama import VideoLlamaModel

TESTS = Path(__file__).parent
SYNTH = TESTS / "reference" / "synth"
CLIPS = {"clip": SYNTH / "clip.mp4", "silent": SYNTH / "clip_silent.mp4", "short": SYNTH / "clip_short.mp4"}

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> tuple[Any, Any]:
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder).eval()
    return model, VideoLlamaProcessor.from_pretrained(tiny_folder)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder of videos called as those of the benchmarks are."""
    names = {"vid1.mp4": "clip", "deeper/vid2.mp4": "silent", "star/Charades_v1_480/A.mp4": "clip", "B.mp4": "silent"}
    for name, clip in names.items():
        (tmp_path / "media" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLIPS[clip], tmp_path / "media" / name)
    (tmp_path / "media" / "vid3.mp4").write_bytes(b"no video")
    return tmp_path / "media"


def arguments(tiny_folder: Path, *further: Any) -> list[str]:
    return ["eval", *map(str, further), "--model", str(tiny_folder), "--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture
def evaluate(tiny_folder: Path, media: Path, tmp_path: Path) -> Evaluate:
    """Runs the command on annotations and returns the results, with the table and the lines of answers."""

    def run(benchmark: str, annotations: Any, *further: Any, suffix: str = ".json") -> dict[str, Any]:
        file = tmp_path / f"annotations{suffix}"
        if isinstance(annotations, list) and suffix == ".jsonl":
            annotations = "".join(json.dumps(row) + "\n" for row in annotations)
        file.write_text(annotations if isinstance(annotations, str) else json.dumps(annotations))
        output = tmp_path / "run"
        options = ["--annotations", file, "--media-root", media, "--output-dir", output, *further]
        assert main(arguments(tiny_folder, benchmark, *options)) == 0
        results = json.loads((output / "results.json").read_text())
        lines = [json.loads(line) for path in output.glob("answers*.jsonl") for line in path.read_text().splitlines()]
        return {**results, "table": (output / "table.md").read_text(), "answers": {line["id"]: line for line in lines}}

    return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which encoders have run since."""
    calls: list[str] = []
    for name in ("get_frame_features", "get_clip_features"):
        original = getattr(VideoLlamaModel, name)
        monkeypatch.setattr(
            VideoLlamaModel, name, lambda *a, _o=original, _n=name, **k: (calls.append(_n), _o(*a, **k))[1]
        )
    return calls


def question(number: int, video: int, text: str = "what is shown", answer: str = "cat") -> dict[str, Any]:
    return {"id": number, "video_id": video, "question": f"{text}, {number}?", "answer": answer}


def alone(loaded: tuple[Any, Any], messages: list[dict[str, Any]], **options: Any) -> tuple[Any, list[int], str]:
    """The inputs of a chat whose media are read with it, and the answer's tokens and text."""
    model, processor = loaded
    options = options or {"add_generation_prompt": True}
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return inputs, tokens.tolist(), processor.post_process_image_text_to_text(tokens)


def about(clip: str, text: str) -> dict[str, Any]:
    content = [{"type": "video", "path": str(CLIPS[clip])}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def values(results: dict[str, Any]) -> dict[str, float]:
    scores = results["scores"]
    return {f"{s['group']}: {s['name']}" if s["group"] else s["name"]: s["value"] for s in scores}


# ---------------------------------------------------------------------------------------------------------------------


def test_answers_are_those_without_a_cache_and_each_video_is_encoded_once(
    evaluate: Evaluate, loaded: tuple[Any, Any], encoded: list[str]
) -> None:
    rows = [question(n, 1 + n % 2) for n in range(5)] + [question(5, 3), question(6, 4)]
    results = evaluate("msvd-qa", rows, "--batch-size", 1)
    assert sorted(encoded) == ["get_clip_features", "get_frame_features", "get_frame_features"]
    for row in rows[:5]:
        expected = alone(loaded, [about("silent" if row["video_id"] == 2 else "clip", row["question"])])[2]
        assert results["answers"][str(row["id"])]["answer"] == expected
    assert results["answered"] == 5 and results["not_answered"]["questions"] == 2
    reasons = " ".join(results["not_answered"]["reasons"])
    assert "vid3.mp4 cannot be read" in reasons and "There is no vid4" in reasons
    assert "2 were not answered" in results["table"] and "vid3.mp4 cannot be read" in results["table"]
    assert all(score["count"] == 5 for score in results["scores"] if not score["group"])
    assert "| accuracy by judge | not measured |  | 51.6 |" in results["table"] and "ROUGE-L" in results["table"]
    assert torch.__version__.startswith(results["versions"]["torch"]) and results["settings"]["seed"] == 0
    assert "Seed 0" in results["table"] and "arXiv 2311.10122" in results["table"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_questions_about_the_same_video_are_answered_together_as_alone(
    batch_size: int, loaded: tuple[Any, Any]
) -> None:
    """Tokens are compared: what so small a model says is hardly text."""
    answerer = Answerer(*loaded, {"max_new_tokens": 6, "do_sample": False})
    encoder = MediumEncoder(*loaded)
    for clip, path in CLIPS.items():
        items = [Item(str(n), f"What is shown{' there' * n}?", Medium((clip,))) for n in range(3)]
        records = [
            record
            for start in range(0, 3, batch_size)
            for record in answerer.answer_with_tokens(
                items[start : start + batch_size], encoder.encode(path, items[0].medium)
            )
        ]
        expected = [alone(loaded, [about(clip, item.question)])[1] for item in items]
        assert [record["tokens"] for record in records] == expected


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_prompts_are_those_of_chats_whose_media_are_read(
    family: str, loaded: tuple[Any, Any], tiny_folder: Path
) -> None:
    processor = VideoLlamaProcessor.from_pretrained(tiny_folder, chat_template=CHAT_TEMPLATES[family])
    encoder = MediumEncoder(loaded[0], processor)
    for clip, path in CLIPS.items():
        chat = [about(clip, "What is shown?"), {"role": "assistant", "content": ANSWER_START}]
        content = [*encoder.encode(path, Medium((clip,))).entries, {"type": "text", "text": "What is shown?"}]
        marked = [{"role": "user", "content": content}, chat[1]]
        expected = processor.apply_chat_template(chat, tokenize=True, continue_final_message=True)
        assert prompt_ids(processor, marked, continue_final_message=True) == expected[0]


def choose_between(number: int, folder: Path, media: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The arguments of an evaluation with so many questions of several lengths, for an output folder's name."""
    row = {"candidates": ["cat", "dog"], "answer": "dog"}
    asked = [f"What is it{' there' * (n % 5)}?" for n in range(number)]
    rows = [{**row, "video": f"vid{1 + n % 3}.mp4", "question": question} for n, question in enumerate(asked)]
    file = tmp_path / "object_shuffle.json"
    file.write_text(json.dumps(rows))

    def options(output: str) -> list[str]:
        folders = ["--media-root", media, "--output-dir", tmp_path / output, "--batch-size", 2]
        return arguments(folder, "mvbench", "--annotations", file, *folders)

    return options


def test_a_killed_run_goes_on_and_ends_the_same(tiny_folder: Path, media: Path, tmp_path: Path) -> None:
    """To the last bit, which likelihoods show."""
    options = choose_between(90, tiny_folder, media, tmp_path)
    assert main(options("whole")) == 0
    answers = tmp_path / "killed" / "answers.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers_videollama", *options("killed")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in the tests: sums depend on the number of threads
    )
    while process.poll() is None and not (answers.exists() and answers.read_text().count("\n") >= 4):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    written = answers.read_text()
    assert 4 <= written.count("\n") < 90
    with answers.open("a") as half:
        half.write('{"id": "object_sh')
    assert main(options("killed")) == 0
    assert answers.read_text().startswith(written[: written.rfind("\n") + 1])
    known, expected = (Answers(tmp_path / run / "answers.jsonl").records for run in ("killed", "whole"))
    assert known == expected
    for name in ("results.json", "table.md"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_two_processes_share_an_evaluation_and_go_on_with_it(tiny_folder: Path, media: Path, tmp_path: Path) -> None:
    """The report is that of one process, to the last bit."""
    options = choose_between(12, tiny_folder, media, tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    answers = tmp_path / "shared" / "answers.jsonl"

    def evaluate_in_two_processes() -> list[str]:
        """The lines of the answers."""
        done = subprocess.run(
            [*launch, "-m", "transformers_videollama", *options("shared")],
            capture_output=True,
            text=True,
            timeout=500,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in the tests: sums depend on the number of threads
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == (tmp_path / "whole" / "table.md").read_text()
        assert (tmp_path / "shared" / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()
        assert Answers(answers).records == Answers(tmp_path / "whole" / "answers.jsonl").records
        lines = answers.read_text().splitlines()
        assert len(lines) == 12  # nobody answered what another did
        return lines

    assert main(options("whole")) == 0
    lines = evaluate_in_two_processes()
    answers.write_text("\n".join([*lines[:3], lines[3][:10]]))  # killed in the midst of a line
    assert evaluate_in_two_processes()[:3] == lines[:3]


def test_other_settings_questions_and_weights_are_refused(
    evaluate: Evaluate, tiny_folder: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [question(1, 1), question(2, 2)]
    evaluate("msvd-qa", rows)
    options = ["--annotations", tmp_path / "annotations.json", "--media-root", media, "--output-dir", tmp_path / "run"]
    assert main(arguments(tiny_folder, "msvd-qa", *options, "--seed", 1)) == 1
    assert "other settings: seed was 0 and is 1" in capsys.readouterr().err
    (tmp_path / "annotations.json").write_text(json.dumps(rows[:1]))
    assert main(arguments(tiny_folder, "msvd-qa", *options)) == 1
    assert "other settings: annotations was" in capsys.readouterr().err
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    (tmp_path / "run" / "settings.json").write_text(json.dumps({**settings, "weights": "of others"}))
    (tmp_path / "run" / "answers.jsonl").unlink()
    assert main(arguments(tiny_folder, "msvd-qa", *options)) == 1
    assert 'weights was "of others"' in capsys.readouterr().err


def test_errors_are_tried_again_when_asked(evaluate: Evaluate, media: Path) -> None:
    rows = [question(1, 1), question(2, 3)]
    assert evaluate("msvd-qa", rows)["answered"] == 1
    shutil.copy(CLIPS["silent"], media / "vid3.mp4")
    assert evaluate("msvd-qa", rows)["answered"] == 1
    assert evaluate("msvd-qa", rows, "--retry-errors")["answered"] == 2


def test_a_question_that_cannot_be_asked_stops_no_other(evaluate: Evaluate) -> None:
    results = evaluate("msvd-qa", [question(1, 1), question(2, 1, "what is <video>")], "--batch-size", "2")
    assert results["answered"] == 1
    assert "<video> among its words" in results["answers"]["2"]["error"]


@pytest.fixture
def judge_log(tmp_path: Path) -> Path:
    return tmp_path / "judge.jsonl"


@pytest.fixture
def judge_url(judge_log: Path) -> Iterator[str]:
    """A judge in a process of its own."""
    command = [sys.executable, str(TESTS / "judge_server.py"), str(judge_log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        process.kill()


def test_a_judge_is_asked_once_and_its_verdicts_are_kept(
    evaluate: Evaluate, judge_url: str, judge_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    rows = [question(1, 1), question(2, 1), question(3, 2), question(4, 2, "why"), question(5, 2, "unreadable")]
    options = ["--judge", "judge", "--judge-base-url", judge_url]
    results = evaluate("msvd-qa", rows, *options)
    requests = [json.loads(line) for line in judge_log.read_text().splitlines()]
    assert len(requests) == 1 + 4 + 3  # one was refused by the server, one reply could not be read
    assert requests[0]["path"] == "/v1/chat/completions" and requests[0]["key"] == "Bearer secret-key"
    asked = " ".join(message["content"] for message in requests[1]["messages"])
    assert all(words in asked for words in ("'pred'", "'score'", "between 0 and 5", "Python dictionary"))
    measured = values(results)
    assert measured["accuracy by judge"] == 75 and measured["score by judge (0–5)"] == (3 * 4 + 1) / 4
    assert results["judge"]["unreadable"] == 1 and results["judge"]["replied"] == ["judge-1"]
    assert "| accuracy by judge | 75.00 (" in results["table"]
    for path in (tmp_path / "run").iterdir():
        assert "secret-key" not in path.read_text()

    kept = (tmp_path / "run" / "judged.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "judged.jsonl").write_text("".join(kept[:3]) + kept[3][:20])  # killed in the midst of a line
    assert evaluate("msvd-qa", rows, *options) == results
    missing = sum(3 if json.loads(line)["id"] == "5" else 1 for line in kept[3:])
    assert len(judge_log.read_text().splitlines()) == len(requests) + missing


def test_a_judge_that_refuses_some_answers_judges_the_others(
    evaluate: Evaluate, judge_url: str, judge_log: Path
) -> None:
    """As servers do that filter contents; and it takes no temperature, as those that think do."""
    rows = [question(1, 1, "forbidden"), question(2, 1), question(3, 2), question(4, 2)]
    options = ["--judge", "thinker", "--judge-base-url", judge_url]
    results = evaluate("msvd-qa", rows, *options)
    assert results["judge"]["unreadable"] == 1 and "accuracy by judge" in values(results)
    requests = len(judge_log.read_text().splitlines())
    assert evaluate("msvd-qa", rows, *options) == results
    assert len(judge_log.read_text().splitlines()) == requests
    assert evaluate("msvd-qa", rows, *options, "--retry-errors") == results
    assert len(judge_log.read_text().splitlines()) > requests


def test_a_judge_that_fails_is_one_line(
    tiny_folder: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    file = tmp_path / "test_qa.json"
    file.write_text(json.dumps([question(1, 1)]))
    options = ["--annotations", file, "--media-root", media, "--output-dir", tmp_path / "run", "--judge", "judge"]
    assert main(arguments(tiny_folder, "msvd-qa", *options)) == 1
    assert "set OPENAI_API_KEY" in capsys.readouterr().err
    assert main(arguments(tiny_folder, "msvd-qa", *options, "--judge-base-url", "file:///etc")) == 1
    assert "--judge-base-url is an http(s) address" in capsys.readouterr().err


def test_mvbench_by_generation_and_by_likelihood(evaluate: Evaluate, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    rows = [
        {"video": "B.mp4", "question": f"What {n}?", "candidates": ["cat", "dog", "a bird"], "answer": "dog"}
        for n in range(3)
    ]
    results = evaluate("mvbench", rows)
    item = Item("0", rows[0]["question"], candidates=tuple(rows[0]["candidates"]))
    start = [{"role": "system", "content": SYSTEM_PROMPT}, about("silent", question_text(item))]
    answers = {letter: {"role": "assistant", "content": ANSWER_START + letter} for letter in ("", "A", "B", "C")}
    inputs, _, expected = alone(loaded, [*start, answers[""]], continue_final_message=True)
    found = results["answers"]["annotations/0"]
    assert found["answer"] == expected
    length = inputs["input_ids"].shape[1]
    for letter, likelihood in zip("ABC", found["likelihoods"], strict=True):
        inputs, _, _ = alone(loaded, [*start, answers[letter]], continue_final_message=True)
        assert inputs["input_ids"].shape[1] == length + 1
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -2].log_softmax(-1)
        assert likelihood == pytest.approx(float(logits[inputs["input_ids"][0, -1]]), abs=1e-4)
    assert {"average of tasks: by generation", "annotations: by likelihood"} <= set(values(results))
    assert "| average of tasks: by generation |" in results["table"] and "34.1" in results["table"]


def test_parts_of_videos_and_folders_of_frames(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    encoder = MediumEncoder(*loaded)
    path = write_media(tmp_path / "a.mp4", num_frames=40, fps=10)
    whole, part = (encoder.encode(path, Medium(("a",), "video", *bounds)) for bounds in ((), (1.0, 2.0)))
    assert whole.entries[0]["timestamps"][0] == 0.0 and max(whole.entries[0]["timestamps"]) > 3
    assert part.entries[0]["timestamps"][0] == 1.0 and max(part.entries[0]["timestamps"]) <= 2.0
    late = encoder.encode(path, Medium(("a",), "video", 100.0, 120.0))
    assert late.entries[0]["timestamps"] == [3.9]  # as much as there is

    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(30):
        Image.fromarray(frame_picture(index, 48, 64)).save(folder / f"{index + 1:05d}.png")
    shown = encoder.encode(folder, Medium(("frames",), "video", 2.0, 4.0))
    assert shown.entries[0]["timestamps"][0] == 2.0 and max(shown.entries[0]["timestamps"]) <= 4.0
    assert shown.features["video_frame_features"].shape[1] == 7  # 3 a second

    model, processor = loaded
    clip = encoder.encode(CLIPS["clip"], Medium(("clip",)))
    inputs = processor.apply_chat_template(
        [about("clip", "?")], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.inference_mode():
        frames = model.model.get_frame_features(inputs["pixel_values_videos"][0]).last_hidden_state
        sounds = model.model.get_clip_features(inputs["input_features"]).last_hidden_state
    assert torch.equal(clip.features["video_frame_features"][0], frames)
    assert torch.equal(clip.features["audio_clip_features"], sounds)


def test_captions_are_scored(evaluate: Evaluate, loaded: tuple[Any, Any]) -> None:
    videos = [{"video_id": f"vid{n}", "split": "test"} for n in (1, 2, 3)]
    sentences = [{"video_id": f"vid{n}", "caption": text} for n in (1, 2, 3) for text in ("a cat runs", "a dog")]
    results = evaluate("msrvtt-caption", {"videos": videos, "sentences": sentences})
    names = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    assert list(values(results)) == names and results["answered"] == 2
    assert (
        results["answers"]["vid2"]["answer"]
        == alone(loaded, [about("silent", "Describe the video in one sentence.")])[2]
    )
    assert "| CIDEr |" in results["table"] and "73.9" in results["table"]


def test_pope_about_pictures_and_videos(evaluate: Evaluate, loaded: tuple[Any, Any], media: Path) -> None:
    Image.fromarray(frame_picture(3, 48, 64)).save(media / "COCO_1.jpg")
    rows = [
        {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a dog in the image?", "label": "no"},
        {"question_id": 2, "image": "COCO_1.jpg", "text": "Is there a cat in the image?", "label": "yes"},
        {"question_id": 3, "video": "vid2", "text": "Is there a cat in the video?", "label": "yes"},
    ]
    results = evaluate("pope", rows, suffix="_random.jsonl")
    content = [{"type": "image", "path": str(media / "COCO_1.jpg")}, {"type": "text", "text": rows[0]["text"]}]
    assert (
        results["answers"]["annotations_random/1"]["answer"]
        == alone(loaded, [{"role": "user", "content": content}])[2]
    )
    assert {f"random: {name}" for name in ("accuracy", "precision", "recall", "F1", "yes ratio")} <= set(
        values(results)
    )
    assert "88.57" in results["table"]


def test_an_object_probe_is_made_of_captions_and_can_be_used_elsewhere(evaluate: Evaluate, tmp_path: Path) -> None:
    lines = "vid1_0_1 a man and a dog\nvid2_0_1 a cat on a couch\n"
    media = tmp_path / "media"
    for number, clip in ((1, "clip"), (2, "silent")):
        shutil.copy(CLIPS[clip], media / f"vid{number}_0_1.mp4")
    results = evaluate("object-probe", lines, suffix=".txt")
    assert results["questions"] == 2 * 3 * 4 == results["answered"] and results["media"] == 2
    probe = [json.loads(line) for line in (tmp_path / "run" / "video_pope_popular.jsonl").read_text().splitlines()]
    assert len(probe) == 8 and set(probe[0]) == {"question_id", "video", "text", "label"}


def test_text_alone_has_the_tokens_of_the_bare_decoder(evaluate: Evaluate, tiny_folder: Path, tmp_path: Path) -> None:
    prompts = [
        {"key": 1, "prompt": "Say it", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "key": 2,
            "prompt": "Sag es",
            "instruction_id_list": ["language:response_language"],
            "kwargs": [{"language": "de"}],
        },
        {"key": 3, "prompt": "What is the capital of France?"},
    ]
    results = evaluate("instructions", prompts, "--before", TESTS / "reference" / "tiny" / "llama", suffix=".jsonl")
    measured = values(results)
    assert measured["identical tokens before and after"] == 100
    counts = {(score["group"], score["name"]): score["count"] for score in results["scores"]}
    assert counts["after training", "prompts, strict"] == counts["before training", "instructions, loose"] == 1
    assert results["unchecked"] == ["language:response_language"] and "language:response_language" in results["table"]

    # Another decoder in the place of the one that the model was built on
    other = tmp_path / "other"
    shutil.copytree(TESTS / "reference" / "tiny" / "llama", other)
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.flip(0) for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "run")
    assert (
        values(evaluate("instructions", prompts, "--before", other, suffix=".jsonl"))[
            "identical tokens before and after"
        ]
        < 100
    )


@pytest.mark.parametrize(
    "further, message",
    [
        (["msvd-qa", "--annotations", "absent.json"], "There is no file absent.json"),
        (["msvd-qa", "--annotations", __file__], "Name the folder of the videos"),
        (["msvd-qa", "--annotations", __file__, "--media-root", "absent"], "is no JSON"),
        (["pope", "--annotations", __file__, "--media-root", ".", "--judge", "a"], "leave --judge out"),
    ],
)
def test_a_mistake_is_one_line(
    further: list[str], message: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny_folder, *further, "--output-dir", tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert error.startswith("videollama eval: error: ") and message in error and len(error.splitlines()) == 1
