"""The command `videollama`: what it prints, what it returns, and what a user's mistakes look like."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from media_files import write_damaged_image

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor, save_trained_part
from transformers_videollama.cli import COMMANDS, main
from transformers_videollama.cli.media_arguments import media_entry
from transformers_videollama.conversation import Conversation

SYNTH = Path(__file__).parent / "reference" / "synth"
CLIP, SILENT = str(SYNTH / "clip.mp4"), str(SYNTH / "clip_silent.mp4")
SHORT_ANSWERS = ["--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> tuple[Any, Any]:
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder).eval()
    return model, VideoLlamaProcessor.from_pretrained(tiny_folder)


def alone(loaded: tuple[Any, Any], messages: list[dict[str, Any]]) -> str:
    """The answer to a chat that is generated at once."""
    model, processor = loaded
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.post_process_image_text_to_text(output[0, inputs["input_ids"].shape[1] :])


def question(text: str, path: str | None = None) -> dict[str, Any]:
    media = [] if path is None else [{"type": "video", "path": path}]
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


@pytest.fixture
def encoded(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which encoders have run since."""
    calls: list[str] = []
    core = loaded[0].model
    for name in ("get_frame_features", "get_clip_features"):
        original = getattr(core, name)
        monkeypatch.setattr(core, name, lambda *a, _o=original, _n=name, **k: (calls.append(_n), _o(*a, **k))[1])
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def test_turns_are_answered_as_without_a_cache_and_media_are_encoded_once(
    loaded: tuple[Any, Any], encoded: list[str]
) -> None:
    chat = Conversation(*loaded)
    texts: list[str] = []
    chat.ask("What is shown?", [{"type": "video", "path": CLIP}], max_new_tokens=6, do_sample=False)
    first_calls = list(encoded)
    chat.ask("And what is heard?", on_text=texts.append, max_new_tokens=6, do_sample=False)
    assert sorted(encoded) == sorted(first_calls) == ["get_clip_features", "get_frame_features"]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    for turn in (1, 3):
        assert chat.messages[turn]["content"][0]["text"] == alone(loaded, chat.messages[:turn])
    assert "".join(texts) == chat.messages[3]["content"][0]["text"]


def test_turns_with_and_without_beams_follow_each_other(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    chat = Conversation(*loaded)
    texts: list[str] = []
    chat.ask("What is shown?", [{"type": "video", "path": CLIP}], max_new_tokens=6, do_sample=False)
    answer = chat.ask("Why?", on_text=texts.append, max_new_tokens=6, do_sample=False, num_beams=3)
    assert texts == [answer] == [chat.messages[3]["content"][0]["text"]]
    inputs = processor.apply_chat_template(
        chat.messages[:3], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3)
    assert answer == processor.post_process_image_text_to_text(output[0, inputs["input_ids"].shape[1] :])
    chat.ask("Where?", max_new_tokens=6, do_sample=False)
    assert chat.messages[5]["content"][0]["text"] == alone(loaded, chat.messages[:5])


def test_another_question_about_the_same_medium_does_not_read_it_again(
    loaded: tuple[Any, Any], encoded: list[str]
) -> None:
    chat = Conversation(*loaded)
    for text in ("What is shown?", "Why?"):
        chat.messages = []
        answer = chat.ask(text, [{"type": "video", "path": SILENT}], max_new_tokens=6, do_sample=False)
        calls, encoded[:] = list(encoded), []
        assert answer == alone(loaded, [question(text, SILENT)])
        assert calls == (["get_frame_features"] if text == "What is shown?" else [])
        encoded.clear()


def test_other_media_are_not_taken_for_those_in_the_cache(loaded: tuple[Any, Any]) -> None:
    chat = Conversation(*loaded)
    for path in (SILENT, str(SYNTH / "clip_short.mp4"), SILENT):
        chat.messages = []
        answer = chat.ask("What is shown?", [{"type": "video", "path": path}], max_new_tokens=6, do_sample=False)
        assert answer == alone(loaded, [question("What is shown?", path)])


def test_an_interrupted_question_was_not_asked(loaded: tuple[Any, Any]) -> None:
    chat = Conversation(*loaded)
    chat.ask("What is shown?", [{"type": "video", "path": SILENT}], max_new_tokens=6, do_sample=False)
    before = list(chat.messages)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("Why?", on_text=interrupt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert chat.messages == before
    answer = chat.ask("And now?", max_new_tokens=6, do_sample=False)
    assert answer == alone(loaded, chat.messages[:-1])


def test_a_placeholder_among_the_words_is_refused_in_any_turn(loaded: tuple[Any, Any]) -> None:
    video = [{"type": "video", "path": SILENT}]
    options = {"max_new_tokens": 6, "do_sample": False}
    with pytest.raises(ValueError, match="<video>"):
        Conversation(*loaded).ask("What is <video>?", video, **options)
    chat = Conversation(*loaded)
    chat.ask("What is shown?", video, **options)
    before = list(chat.messages)
    for word in ("<video>", "<image>"):
        with pytest.raises(ValueError, match=f"has {word} among its words"):
            chat.ask(f"What is {word}?", **options)
    assert chat.messages == before
    assert chat.ask("And now?", **options) == alone(loaded, chat.messages[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_all_commands_are_listed_and_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"    {command} " in listed
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0 and len(capsys.readouterr().out) > 200
    with pytest.raises(SystemExit) as exit_:
        main(["answer"])
    assert exit_.value.code == 2 and "invalid choice: 'answer'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--no-stream"]], ids=["streamed", "at once"])
def test_one_question_prints_its_answer_and_nothing_else(
    flags: list[str], loaded: tuple[Any, Any], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", CLIP, "What is shown?", "--model", str(tiny_folder), *SHORT_ANSWERS, *flags]) == 0
    assert capsys.readouterr().out == alone(loaded, [question("What is shown?", CLIP)]) + "\n"


def test_several_files_and_questions_as_lines_of_json(
    loaded: tuple[Any, Any], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ask", CLIP, SILENT, "What is shown?", "Why?", "--json", "--model", str(tiny_folder), *SHORT_ANSWERS]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"file": path, "question": text, "answer": alone(loaded, [question(text, path)])}
        for path in (CLIP, SILENT)
        for text in ("What is shown?", "Why?")
    ]


def test_a_file_that_cannot_be_used_does_not_end_the_others(
    loaded: tuple[Any, Any], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.mp4").touch()
    media = [str(tmp_path / "empty.mp4"), SILENT]
    assert main(["ask", *media, "What is shown?", "--json", "--model", str(tiny_folder), *SHORT_ANSWERS]) == 1
    out, err = capsys.readouterr()
    answer = alone(loaded, [question("What is shown?", SILENT)])
    assert [json.loads(line) for line in out.splitlines()] == [
        {"file": SILENT, "question": "What is shown?", "answer": answer}
    ]
    assert "empty.mp4 is empty" in err


def test_a_chat_of_several_turns(loaded: tuple[Any, Any], tiny_folder: Path) -> None:
    """In a process of its own, which reads the questions from its standard input."""
    command = [sys.executable, "-m", "transformers_videollama", "chat", SILENT, "--model", str(tiny_folder)]
    lines = [
        "What is shown?",
        "/nonsense",
        "/open absent.mp4",
        "Why?",
        "/clear",
        f"/open {__file__}",
        "What does <video> mean?",
        "What is shown?",
        "/quit",
        "Unasked?",
    ]
    done = subprocess.run(
        [*command, *SHORT_ANSWERS], input="\n".join(lines), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first = alone(loaded, [question("What is shown?", SILENT)])
    turns = [question("What is shown?", SILENT), {"role": "assistant", "content": first}, question("Why?")]
    assert done.stdout == f"{first}\n{alone(loaded, turns)}\n\n{first}\n"
    assert "/nonsense is no command" in done.stderr and "There is no file absent.mp4" in done.stderr
    assert "test_cli.py cannot be read" in done.stderr and "<video>" in done.stderr


def test_a_chat_about_a_damaged_file_does_not_begin(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    assert main(["chat", SILENT, str(tmp_path / "damaged.mp4"), "--model", str(tiny_folder)]) == 1
    assert "damaged.mp4 cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ask", "absent.mp4", "What is shown?"], "There is no file absent.mp4."),
        (["ask", "What is shown?"], "Give at least one file or http(s) address"),
        (["ask", CLIP, "What?", "--model", "/absent/model"], "There is no folder /absent/model."),
        (["info", "./absent"], "There is no folder ./absent."),
        (["caption", CLIP, "What is shown?"], "To ask something, use `videollama ask`"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["ask", CLIP, "What?", "--device", "nonsense"], "--device nonsense: PyTorch sees"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"videollama {arguments[0]}: error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("command", [["info"], ["ask", CLIP, "What?", "--model"]])
def test_other_models_are_refused(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert main([*command, str(tmp_path)]) == 1
    assert "is a model of the type bert; expected video_llama" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--top-p", "1.5"], ["--top-p", "0"], ["--temperature", "nan"]])
@pytest.mark.parametrize("command", [["ask", CLIP], ["serve"]])
def test_impossible_sampling_is_refused(command: list[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command, *arguments])


def test_no_memory_left_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("transformers_videollama.cli.info.main", fail)
    assert main(["info"]) == 1
    assert "CUDA out of memory. A smaller --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, kind",
    [
        ("https://example.org/dog.jpg?width=100", "image"),
        ("https://example.org/a.wav#t=1", "audio"),
        ("https://example.org/clip.mp4?dog.jpg", "video"),
        ("what?.png", "image"),
        ("phone.3gp", "video"),
        ("song.FLAC", "audio"),
        ("data:image/gif;base64,R0lG", "video"),
        ("data:audio/wav;base64,UklG", "audio"),
    ],
)
def test_the_kind_of_a_medium_is_told_by_its_name(name: str, kind: str) -> None:
    assert media_entry(name) == {"type": kind, "path": name}


@pytest.fixture
def questions_file(tmp_path: Path) -> Path:
    """Seven questions of different lengths; the fourth is about a file that is not there."""
    rows: list[dict[str, Any]] = [
        {"video": path, "question": f"What is shown{' there' * number}?", "id": f"q{number}"}
        for number, path in enumerate([CLIP, SILENT, SILENT, "absent.mp4", CLIP, SILENT])
    ]
    rows.append({"messages": [{"role": "user", "content": "Hello!"}]})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def expected_lines(loaded: tuple[Any, Any], questions_file: Path) -> list[dict[str, Any]]:
    lines = []
    for index, text in enumerate(questions_file.read_text().splitlines()):
        row = json.loads(text)
        line = {"index": index, **row}
        if row.get("video") != "absent.mp4":
            messages = row.get("messages") or [question(row["question"], row["video"])]
            line["answer"] = alone(loaded, messages)
        lines.append(line)
    return lines


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The answers in the order of the questions, an error's text left out."""
    lines = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["index"])
    errors = [line.pop("error") for line in lines if "error" in line]
    assert len(errors) == 1 and "absent.mp4" in errors[0]
    return lines


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_answers_as_one_by_one_and_goes_on_where_it_stopped(
    workers: int, loaded: tuple[Any, Any], tiny_folder: Path, questions_file: Path, encoded: list[str]
) -> None:
    output = questions_file.with_name("answers.jsonl")
    arguments = ["batch", str(questions_file), str(output), "--model", str(tiny_folder), *SHORT_ANSWERS]
    arguments += ["--batch-size", "3", "--workers", str(workers)]
    assert main(arguments) == 1
    whole = expected_lines(loaded, questions_file)
    assert read_lines(output) == whole
    written = output.read_text()
    assert main(arguments) == 0 and output.read_text() == written  # nothing was left to do

    lines = written.splitlines()
    output.write_text("\n".join([*lines[:2], lines[2][:10]]))  # killed in the midst of a line
    main(arguments)
    assert output.read_text().splitlines()[:2] == lines[:2] and read_lines(output) == whole


def test_two_processes_share_a_batch(loaded: tuple[Any, Any], tiny_folder: Path, questions_file: Path) -> None:
    output = questions_file.with_name("answers.jsonl")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["-m", "transformers_videollama", "batch", str(questions_file), str(output), "--model", str(tiny_folder)]
    done = subprocess.run(
        [sys.executable, *launch, *command, *SHORT_ANSWERS], capture_output=True, text=True, timeout=300
    )
    assert "7 of 7 answered now, 1 of them with an error" in done.stderr, done.stderr
    assert read_lines(output) == expected_lines(loaded, questions_file)


def test_wrong_lines_and_other_questions_are_refused(
    tiny_folder: Path, questions_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = questions_file.with_name("answers.jsonl")
    output.write_text('{"index": 0, "question": "Another?", "answer": "no"}\n')
    assert main(["batch", str(questions_file), str(output), "--model", str(tiny_folder), *SHORT_ANSWERS]) == 1
    assert "answers to other questions" in capsys.readouterr().err
    wrong = [
        ("{", "this is no JSON"),
        ("[" * 100_000, "this is no JSON"),
        ('{"video": "a.mp4"}', 'a line needs "question"'),
        ('{"question": "What?", "vidoe": "a.mp4"}', 'a line needs "question"'),
        ('{"question": "What?", "video": ["a.mp4"]}', 'a line needs "question"'),
        ('{"messages": []}', 'a line needs "question"'),
    ]
    for line, message in wrong:
        questions_file.write_text('{"question": "Who?", "image": "a.png"}\n' + line + "\n")
        assert main(["batch", str(questions_file), str(output), "--model", str(tiny_folder)]) == 1
        assert f"questions.jsonl:2: {message}" in capsys.readouterr().err


def test_a_batch_without_a_place_for_its_answers_does_not_begin(
    questions_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", str(questions_file), str(questions_file.parent / "absent" / "answers.jsonl")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_chats_name_media_as_questions_do(loaded: tuple[Any, Any], tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copy(SILENT, tmp_path / "clip.mp4")
    content = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What is shown?"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    output = tmp_path / "out.jsonl"
    assert main(["batch", str(tmp_path / "in.jsonl"), str(output), "--model", str(tiny_folder), *SHORT_ANSWERS]) == 0
    assert json.loads(output.read_text())["answer"] == alone(loaded, [question("What is shown?", SILENT)])


@pytest.mark.parametrize("name", ["damaged.mp4", "damaged.wav", "damaged.png", "cut.jpg"])
def test_a_damaged_file_is_named(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name.endswith(("png", "jpg")):
        write_damaged_image(path)
    else:
        path.write_bytes(b"no video")
    assert main(["ask", str(path), "What?", "--model", str(tiny_folder), *SHORT_ANSWERS]) == 1
    error = capsys.readouterr().err
    assert f"{name} cannot be read" in error and error.count("\n") == 1


def test_a_damaged_picture_does_not_end_a_batch(tiny_folder: Path, tmp_path: Path) -> None:
    write_damaged_image(tmp_path / "damaged.png")
    rows = [{"image": "damaged.png", "question": "What?"}, {"video": SILENT, "question": "What?"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    assert main(["batch", str(tmp_path / "in.jsonl"), str(output), "--model", str(tiny_folder), *SHORT_ANSWERS]) == 1
    lines = {line["index"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert "damaged.png cannot be read as an image" in lines[0]["error"] and "answer" in lines[1]


def test_a_batch_keeps_what_its_input_calls_as_the_output_does(tiny_folder: Path, tmp_path: Path) -> None:
    """Reference answers and numbers of its own are what such files have; and what no other text can hold."""
    rows: list[dict[str, Any]] = [
        {"video": SILENT, "question": "What?", "index": 1, "answer": "A cat.", "score": float("nan")},
        {"video": SILENT, "question": "Half a \ud83d?", "index": 0},
        {"messages": [{"role": "tool", "content": "x"}], "answer": "None."},
        {"video": "absent.mp4", "question": "Who?", "answer": "A dog.", "error": None},
    ]
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    template = model / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'tool' %}{{ raise_exception('no such role') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows))
    arguments = ["batch", str(source), str(output), "--model", str(model), *SHORT_ANSWERS]
    assert main(arguments) == 1
    lines = {line["index"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert {i: lines[i]["input_answer"] for i in (0, 2, 3)} == {0: "A cat.", 2: "None.", 3: "A dog."}
    assert (lines[0]["input_index"], lines[1]["input_index"], lines[3]["input_error"]) == (1, 0, None)
    assert ["error" in lines[i] for i in range(4)] == [False, True, True, True]
    written = output.read_text()
    assert main(arguments) == 0 and output.read_text() == written
    assert main([*arguments, "--retry-errors"]) == 1 and output.read_text() == written + "".join(
        line for line in written.splitlines(keepends=True) if '"error"' in line
    )


@pytest.mark.parametrize("content", ['{"question": "What?", "video": "a.mp4"}', "no\nnotes", "[1]\n", "{"])
def test_a_batch_leaves_other_files_alone(
    content: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"video": SILENT, "question": "What?"}))
    output = tmp_path / "other"
    output.write_text(content)
    arguments = ["--model", str(tiny_folder), *SHORT_ANSWERS]
    assert main(["batch", str(tmp_path / "in.jsonl"), str(output), *arguments]) == (0 if content == "{" else 1)
    if content != "{":  # which may be the first character of an answer
        assert output.read_text() == content and str(output) in capsys.readouterr().err


def test_a_batch_without_memory_is_answered_one_by_one(
    loaded: tuple[Any, Any], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = VideoLlamaForConditionalGeneration.generate

    def generate(self: Any, **arguments: Any) -> Any:
        if len(arguments["input_ids"]) > 1 or arguments["input_ids"].shape[1] > 90:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, **arguments)

    monkeypatch.setattr(VideoLlamaForConditionalGeneration, "generate", generate)
    rows = [{"video": SILENT, "question": text} for text in ("Who?", "What?", "What" + " then" * 40 + "?")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    assert main(["batch", str(tmp_path / "in.jsonl"), str(output), "--model", str(tiny_folder), *SHORT_ANSWERS]) == 1
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[2]["error"] == "OutOfMemoryError: CUDA out of memory."
    assert [line["answer"] for line in lines[:2]] == [
        alone(loaded, [question(row["question"], SILENT)]) for row in rows[:2]
    ]


def test_the_list_of_commands_waits_for_no_library() -> None:
    heavy = ("torch", "transformers", "av", "decord", "librosa", "gradio", "uvicorn")
    code = (
        f"import sys\nfrom transformers_videollama.cli import main\nmain([])\nprint({{*{heavy}}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


def test_info_tells_the_parts_and_their_memory(
    loaded: tuple[Any, Any], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded[0]
    assert main(["info", str(tiny_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == model.num_parameters()
    assert found["parameters"]["video_branch"] == model.model.video_branch.query_tokens.numel() + sum(
        parameter.numel() for name, parameter in model.model.video_branch.named_parameters() if name != "query_tokens"
    )
    assert found["bytes"]["bfloat16"] == 2 * model.num_parameters() and found["hears"]
    save_trained_part(model, tmp_path, parts=["video_branch"], base_model="me/base")
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "me/base" in printed and "video_branch" in printed and "audio_branch" not in printed
