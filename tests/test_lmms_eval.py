"""lmms-eval runs the model: its own command on tasks of real files, compared with what the model says by itself."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from media_files import frame_picture, tone
from PIL import Image
from serve_parts import make_readable

from transformers_videollama import MediaError, VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.conversation import Conversation

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason='lmms-eval is not installed, as .ci/run does it: pip install --no-deps "lmms-eval==0.7.*"',
)

SYNTH = Path(__file__).parent / "reference" / "synth"
CLIP, SILENT, SHORT = (str(SYNTH / name) for name in ("clip.mp4", "clip_silent.mp4", "clip_short.mp4"))
DOCUMENTATION = Path(__file__).parents[1] / "docs" / "evaluation.md"
PLUGIN = "transformers_videollama.lmms_eval_plugin"
OPTIONS = ["a red square", "a dog", "nothing at all"]

MIXED = """
task: mixed
dataset_path: json
dataset_kwargs: {data_files: {test: mixed.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 12, temperature: 0, top_p: 0.9, image_aspect_ratio: pad, until: UNTIL}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_visual: clip
doc_to_text: question
doc_to_choice: options
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
import soundfile
from PIL import Image


def doc_to_visual(doc):
    if doc["file"].endswith(".png"):
        return [Image.open(doc["file"])]
    if doc["file"].endswith(".wav"):
        array, sampling_rate = soundfile.read(doc["file"])
        return [{"array": array, "sampling_rate": sampling_rate}]
    return [doc["file"]]
"""


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_readable(tiny_folder, tmp_path_factory.mktemp("readable") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder).eval()
    return model, VideoLlamaProcessor.from_pretrained(folder)


def entry(path: str) -> dict[str, str]:
    kinds = {".png": "image", ".wav": "audio"}
    return {"type": kinds.get(Path(path).suffix, "video"), "path": path}


def answer(loaded: tuple[Any, Any], path: str, question: str, max_new_tokens: int, **chat_options: Any) -> str:
    chat = Conversation(*loaded, **chat_options)
    return chat.ask(question, [entry(path)], max_new_tokens=max_new_tokens, do_sample=False)


def loss(loaded: tuple[Any, Any], path: str, question: str, option: str) -> tuple[float, bool]:
    """The loss of an option as the model itself computes it, and whether the option is what it would say."""
    model, processor = loaded
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = [{"role": "user", "content": [entry(path), {"type": "text", "text": question}]}]
    start = processor.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"].shape[1]
    messages.append({"role": "assistant", "content": option})
    inputs = processor.apply_chat_template(messages, continue_final_message=True, **options)
    labels = inputs["input_ids"].clone()
    labels[:, :start] = -100
    with torch.inference_mode():
        output = model(**inputs, labels=labels)
    said = output.logits[0, start - 1 : -1].argmax(-1)
    return output.loss.item(), bool((said == inputs["input_ids"][0, start:]).all())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_command_gives_what_the_model_says(
    num_processes: int, loaded: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    """One process that is told of the plugin by the variable, two that find it by the entry point."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    # The task that the documentation shows
    (tasks / "my_clips.yaml").write_text(
        re.search(r"^```yaml\n(task: my_clips\n.*?)^```", DOCUMENTATION.read_text(), re.MULTILINE | re.DOTALL)[1]
    )
    open_rows = [{"clip": path, "question": "What is shown?"} for path in (CLIP, SILENT, SHORT)]
    open_answers = [answer(loaded, row["clip"], row["question"], 32).split("\n\n")[0].strip() for row in open_rows]
    targets = [open_answers[0], "something else", open_answers[2]]
    write_lines(tasks / "questions.jsonl", [row | {"answer": t} for row, t in zip(open_rows, targets, strict=True)])

    # Media of all kinds in one batch, and answers that are cut
    Image.fromarray(frame_picture(3, 48, 64)).save(tmp_path / "picture.png")
    soundfile.write(tmp_path / "tone.wav", tone(1.0, channels=1)[0], 44100)
    files = [CLIP, str(tmp_path / "picture.png"), str(tmp_path / "tone.wav"), SILENT]
    whole = [answer(loaded, path, "What is it?", 12) for path in files]
    until = whole[0][5:7]
    mixed_answers = [text.split(until)[0].strip() for text in whole]
    assert mixed_answers != whole
    (tasks / "mixed.yaml").write_text(MIXED.replace("UNTIL", json.dumps([until])))
    (tasks / "utils.py").write_text(UTILS)
    mixed_rows = [{"file": path, "question": "<image>\nWhat is it?", "answer": "?"} for path in files]
    write_lines(tasks / "mixed.jsonl", mixed_rows)

    losses = [[loss(loaded, path, "What is it?", option) for option in OPTIONS] for path in (CLIP, SILENT)]
    best = [pairs.index(min(pairs)) for pairs in losses]
    (tasks / "choices.yaml").write_text(CHOICES)
    rights = [best[0], (best[1] + 1) % len(OPTIONS)]
    choice_rows = [
        {"clip": path, "question": "What is it?", "options": OPTIONS, "right": right}
        for path, right in zip((CLIP, SILENT), rights, strict=True)
    ]
    write_lines(tasks / "choices.jsonl", choice_rows)

    run_lmms_eval(num_processes, folder, tasks, tmp_path)

    (file,) = tmp_path.glob("output/**/*_results.json")
    scores = json.loads(file.read_text())["results"]
    assert scores["my_clips"]["exact_match,none"] == pytest.approx(2 / 3)
    assert scores["choices"]["acc,none"] == 0.5
    assert responses(tmp_path, "my_clips") == open_answers
    assert responses(tmp_path, "mixed") == mixed_answers
    for found, expected in zip(responses(tmp_path, "choices"), losses, strict=True):
        assert [float(number) for number, _ in found] == pytest.approx([pair[0] for pair in expected], rel=1e-4)
        assert [is_greedy for _, is_greedy in found] == [str(pair[1]) for pair in expected]


def run_lmms_eval(num_processes: int, model: Path, tasks: Path, work: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "huggingface"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m"]
    if num_processes == 1:
        environment["LMMS_EVAL_PLUGINS"] = PLUGIN
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
        command += ["--main_process_port", port, "-m"]
    command += ["lmms_eval", "--model", "video_llama", "--model_args", f"pretrained={model}", "--batch_size", "3"]
    command += ["--tasks", "my_clips,mixed,choices", "--include_path", str(tasks), "--device", "cpu"]
    command += ["--output_path", str(work / "output"), "--log_samples"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    output = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0 and (work / "output").is_dir(), output
    assert "image_aspect_ratio" in done.stdout, output  # is not passed over in silence


def responses(work: Path, task: str) -> list[Any]:
    """What the model said to each document of a task, in the order of the documents."""
    (file,) = work.glob(f"output/**/*_samples_{task}.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


# ---------------------------------------------------------------------------------------------------------------------
# The model


def requests_of(kind: str, documents: list[dict[str, Any]], *arguments: Any) -> list[Any]:
    """A request for each document, whose medium is its `"visual"`."""
    from lmms_eval.api.instance import Instance

    return [
        Instance(
            request_type=kind,
            arguments=("What is it?", *arguments, lambda document: [document["visual"]], number, "clips", "test"),
            idx=0,
            metadata={"task": "clips", "doc_id": number, "repeats": 1},
        )
        for number in range(len(documents))
    ]


def make_plugin(folder: Path, documents: list[dict[str, Any]], **options: Any) -> Any:
    from transformers_videollama.lmms_eval_plugin.models.video_llama import VideoLlama

    plugin = VideoLlama.create_from_arg_string(f"pretrained={folder}", {"device": "cpu", **options})
    plugin.task_dict = {"clips": {"test": documents}}
    return plugin


def test_its_arguments_are_those_of_the_other_commands(loaded: tuple[Any, Any], folder: Path) -> None:
    documents = [{"visual": CLIP}, {"visual": SILENT}]
    options = {"num_frames": 2, "no_audio": True, "system_prompt": "You see clips.", "batch_size": "2"}
    plugin = make_plugin(folder, documents, **options)
    found = plugin.generate_until(requests_of("generate_until", documents, {"max_new_tokens": 12}))
    chat = {
        "system_prompt": "You see clips.",
        "processor_kwargs": {"num_frames": 2},
        "load_audio_from_video": False,
    }
    assert found == [answer(loaded, row["visual"], "What is it?", 12, **chat) for row in documents]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_do_not_depend_on_what_is_asked_beside(batch_size: int, loaded: tuple[Any, Any], folder: Path) -> None:
    documents = [{"visual": CLIP, "target": OPTIONS[0]}, {"visual": SHORT, "target": OPTIONS[1]}]
    plugin = make_plugin(folder, documents, batch_size=batch_size)
    requests = [
        *requests_of("loglikelihood", documents, lambda document: document["target"]),
        *requests_of("loglikelihood", documents, f" {OPTIONS[2]}"),
    ]
    found = [result.text for result in plugin.loglikelihood(requests)]
    asked = [(CLIP, OPTIONS[0]), (SHORT, OPTIONS[1]), (CLIP, OPTIONS[2]), (SHORT, OPTIONS[2])]
    expected = [loss(loaded, path, "What is it?", option) for path, option in asked]
    assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in expected], rel=1e-4)
    assert [pair[1] for pair in found] == [pair[1] for pair in expected]


def test_what_it_cannot_do_it_says(folder: Path, tmp_path: Path) -> None:
    documents = [{"visual": str(tmp_path / "lost.mp4")}, {"visual": {"text": "a cat"}}]
    plugin = make_plugin(folder, documents)
    missing, unknown = requests_of("generate_until", documents, {})
    with pytest.raises((MediaError, OSError), match="lost.mp4"):
        plugin.generate_until([missing])
    with pytest.raises(ValueError, match="doc_to_visual may return .* but one of these returned a dict"):
        plugin.generate_until([unknown])
    with pytest.raises(NotImplementedError, match="several rounds .* such as clips"):
        plugin.generate_until_multi_round([missing])
    with pytest.raises(ValueError, match="a number of 1 or more for this model, but is 'auto'"):
        make_plugin(folder, documents, batch_size="auto")


@pytest.mark.parametrize(
    ("task", "options", "until"),
    [
        ({}, {"max_new_tokens": 256, "do_sample": False}, []),
        ({"max_new_tokens": 5, "until": ["\n", ""]}, {"max_new_tokens": 5, "do_sample": False}, ["\n"]),
        ({"temperature": 0, "top_p": 0, "do_sample": True}, {"max_new_tokens": 256, "do_sample": False}, []),
        ({"temperature": 0.7, "top_p": None, "until": "."},
         {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}, ["."]),
        ({"do_sample": False, "temperature": 1.0, "num_beams": 3, "image_aspect_ratio": "pad"},
         {"max_new_tokens": 256, "do_sample": False, "num_beams": 3}, []),
    ],
)  # fmt: skip
def test_generation_arguments_of_tasks(task: dict[str, Any], options: dict[str, Any], until: list[str]) -> None:
    from transformers_videollama.lmms_eval_plugin.models.video_llama import generate_options

    assert generate_options(task) == (options, until)
