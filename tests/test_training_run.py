"""The training script: published settings in YAML, every one of them on the command line too, and what a run leaves
behind."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from local_hub import LocalHub
from media_files import write_media
from safetensors.torch import load_file
from test_remote_code import SOURCE
from transformers.testing_utils import CaptureLogger
from transformers.trainer_utils import SaveStrategy

from transformers_videollama import (
    VideoLlamaForConditionalGeneration,
    VideoLlamaProcessor,
    from_trained_part,
    save_trained_part,
)
from transformers_videollama.training.arguments import parse_arguments
from transformers_videollama.training.run import load_eval_data, load_model, main

EXAMPLES = Path(__file__).parents[1] / "examples" / "training"
# branch, trained on captions, steps, batch, peak, minimum, warm-up
PUBLISHED = {
    "video_stage1": ("video", True, 5 * 2500, 32, 1e-4, 8e-5, 2500),
    "video_stage2": ("video", False, 3 * 1000, 4, 3e-5, 1e-5, 1000),
    "audio_stage1": ("audio", True, 5 * 5000, 32, 1e-4, 8e-5, 5000),
    "audio_stage2": ("audio", False, 3 * 1000, 4, 3e-5, 1e-5, 400),
}


@pytest.mark.parametrize("stage", PUBLISHED)
def test_the_files_hold_the_published_settings(stage: str, tmp_path: Path) -> None:
    branch, captions, steps, batch, peak, minimum, warmup = PUBLISHED[stage]
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    file = tmp_path / "filled_in.yaml"
    file.write_text(re.sub("<[^<>]+>", "mine", (EXAMPLES / f"{stage}.yaml").read_text()))
    model, data, training = parse_arguments([str(file), *flags])
    assert model.branch == branch and model.lora_r == 0
    assert (model.trained_part is None) == captions
    assert (data.text_format, data.sampling) == (("caption", "headtail") if captions else ("chat", "uniform"))
    assert (data.num_frames, data.max_length, data.random_resized_crop) == (8, 32 if captions else 512, True)
    weights = {entry["format"]: entry["weight"] for entry in data.datasets}
    if captions:
        assert weights == {"webvid": 100, "llava_cc3m": 24}
    else:
        assert set(weights) == {"minigpt4", "llava_instruct", "videochat"}
    assert (training.max_steps, training.per_device_train_batch_size) == (steps, batch)
    assert (training.learning_rate, training.min_learning_rate) == (peak, minimum)
    assert (training.warmup_start_learning_rate, training.get_warmup_steps(steps)) == (1e-6, warmup)
    assert (training.weight_decay, training.adam_beta1, training.adam_beta2) == (0.05, 0.9, 0.999)
    assert training.max_grad_norm == 0 and training.lr_scheduler_type == "cosine"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    values = {
        "model": "a/model",
        "datasets": [{"format": "chat", "annotations": "chat.jsonl"}],
        "learning_rate": "1e-3",
        "max_steps": 5,
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
    }
    path.write_text(yaml.safe_dump(values).replace("'1e-3'", "1e-3"))
    return path


def test_the_command_line_wins_over_the_file(config: Path) -> None:
    model, data, training = parse_arguments([str(config)])
    assert (model.model, training.max_steps, training.learning_rate) == ("a/model", 5, 1e-3)
    assert (data.max_length, data.random_resized_crop) == (32, True)
    datasets = [{"format": "webvid", "annotations": "a.csv", "media_root": "clips", "weight": 2}]
    flags = ["--max_steps", "7", "--datasets", json.dumps(datasets), "--random_resized_crop", "false"]
    flags += ["--lora_target_modules", "q_proj", "k_proj", "--text_format", "chat", "--min_learning_rate=1e-6"]
    model, data, training = parse_arguments([str(config), *flags])
    assert (training.max_steps, training.min_learning_rate) == (7, 1e-6)
    assert model.lora_target_modules == ["q_proj", "k_proj"]
    assert data.datasets == datasets
    assert (data.random_resized_crop, data.max_length) == (False, 512)


@pytest.mark.parametrize(
    "line, value",
    [
        ("output_dir: 2024-05-01", "2024-05-01"),
        ("run_name: 2024", "2024"),
        ("lora_target_modules: q_proj", ["q_proj"]),
        ("save_strategy: no", "no"),
        ("save_steps: 5", 5),
    ],
)
def test_a_file_is_read_as_the_command_line(line: str, value: Any, config: Path) -> None:
    values = config.read_text().splitlines()
    name = line.split(":")[0]
    config.write_text("\n".join([*(other for other in values if not other.startswith(name)), line]))
    found = {name: value for part in parse_arguments([str(config)]) for name, value in vars(part).items()}
    assert found[name] == value and type(found[name]) in (type(value), SaveStrategy)


def test_no_file_is_needed(tmp_path: Path) -> None:
    datasets = json.dumps([{"format": "chat", "annotations": "chat.jsonl"}])
    model, _, training = parse_arguments(["--model", "m", "--datasets", datasets, "--output_dir", str(tmp_path)])
    assert model.model == "m" and training.learning_rate == 1e-4


def test_the_cosine_ends_at_a_share_of_any_peak(config: Path) -> None:
    training = parse_arguments([str(config), "--learning_rate", "1e-5"])[2]
    assert training.min_learning_rate == pytest.approx(8e-6)
    with pytest.raises(ValueError, match="`min_learning_rate` is 1e-05, above the peak, `learning_rate`, of 5e-06"):
        parse_arguments([str(config), "--learning_rate", "5e-6", "--min_learning_rate", "1e-5"])


def test_a_warm_up_that_does_not_end_is_warned_of(config: Path) -> None:
    logger = logging.getLogger("transformers_videollama.training.arguments")
    with CaptureLogger(logger) as captured:
        parse_arguments([str(config), "--warmup_steps", "5"])
    assert "never reaches its peak" in captured.out
    with CaptureLogger(logger) as captured:
        parse_arguments([str(config), "--warmup_steps", "4"])
    assert not captured.out


def test_what_is_left_to_be_filled_in_is_asked_for() -> None:
    file = str(EXAMPLES / "video_stage2.yaml")
    data = '[{"format": "chat", "annotations": "train.jsonl"}]'
    with pytest.raises(ValueError, match="`model` is still to be filled in, there or by `--model`: it is '<folder"):
        parse_arguments([file, "--trained_part", "none", "--datasets", data])
    with pytest.raises(ValueError, match="`trained_part` is still to be filled in"):
        parse_arguments([file, "--model", "m", "--datasets", data])
    with pytest.raises(ValueError, match="`datasets` is still to be filled in"):
        parse_arguments([file, "--model", "m", "--trained_part", "none"])
    model = parse_arguments([file, "--model", "m", "--trained_part", "none", "--datasets", data, "--bf16", "false"])[0]
    assert model.trained_part is None


@pytest.mark.parametrize(
    "line, message",
    [
        ("learnig_rate: 1", r"config\.yaml sets learnig_rate, which is unknown"),
        ("max_steps: many", r"config\.yaml: `max_steps` cannot be 'many'"),
        ("max_steps: 2.5", "`max_steps` cannot be 2.5: it must be a whole number"),
        ("max_steps: [3]", "`max_steps` cannot be .3.: it must be a whole number"),
        ("num_frames: true", "`num_frames` cannot be True: it must be a whole number"),
        ("learning_rate: [1]", "`learning_rate` cannot be .1.: it must be a number"),
        ("dtype: half_precision", "`dtype` must be a number format .*but is 'half_precision'"),
        ("datasets: [{format: chat, annotations: 5}]", r"datasets\[0\]` has annotations 5: it must be a path"),
        ("datasets: [{format: chat, annotations: []}]", r"datasets\[0\]` has annotations \[\]: it must be a path"),
        ("datasets: [{format: chat, annotations: a, media_root: 2024-05-01}]", r"datasets\[0\]` has media_root"),
        ("branch: touch", "`branch`"),
        ("text_format: prose", "`text_format`"),
        ("max_bad_fraction: 3", "between 0 and 1"),
        ("datasets: []", "at least one data set"),
        ("datasets: nothing", "must be a JSON list"),
        ("datasets: [{format: chat}]", r"datasets\[0\]` needs `format` and `annotations`"),
        ("datasets: [{format: chat, annotations: a, wait: 1}]", r"datasets\[0\]` has wait, which is unknown"),
        ("datasets: [{format: chat, annotations: a, weight: 0}]", "weight 0: it must be a number above 0"),
        ("model: ''", "Give the model to train"),
        ("trainable: [video_branch, ears]", "`trainable` must be one of video_branch, .*but is 'ears'"),
        ("trainable: []", "`trainable` is empty"),
        ("eval_datasets: [{format: chat}]", r"eval_datasets\[0\]` needs `format` and `annotations`"),
        ("eval_datasets: nothing", "`--eval_datasets` must be a JSON list"),
        ("eval_strategy: steps", "`eval_strategy` needs data to evaluate on: give them as `eval_datasets`"),
        ("do_eval: true", "`do_eval` needs data to evaluate on"),
    ],
)
def test_wrong_settings_are_refused_by_name(line: str, message: str, config: Path) -> None:
    name = line.split(":")[0]
    values = {**yaml.safe_load(config.read_text()), **yaml.safe_load(line)}
    assert name in values
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(config)])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"trainable": ["language_model"], "lora_r": 2}, "`trainable` has `language_model`, and `lora_r`"),
        ({"trainable": ["qformer"], "feature_cache": "features"}, "`qformer`, whose work `feature_cache` holds"),
        ({"do_eval": True, "load_best_model_at_end": True, "save_strategy": "no"}, "needs evaluations to choose by"),
        ({"do_eval": True, "save_strategy": "best"}, "`save_strategy: best` needs evaluations to choose by"),
        ({"do_eval": True, "metric_for_best_model": "accuracy"}, "'accuracy', but the loss alone is measured"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str, config: Path) -> None:
    evaluation = {"eval_datasets": [{"format": "chat", "annotations": "chat.jsonl"}]}
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **evaluation, **settings}))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(config)])


def test_unknown_flags_and_files_that_are_no_settings_are_refused(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([str(config), "--learnig_rate", "1"])
    assert "--learnig_rate" in capsys.readouterr().err
    config.write_text("- a list")
    with pytest.raises(ValueError, match="`name: value` lines"):
        parse_arguments([str(config)])
    config.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_arguments([str(config)])


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs, on real clips


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, their captions and conversations about them."""
    folder = tmp_path_factory.mktemp("data")
    lines, rows = [], ["videoid,name,page_dir"]
    for number in range(4):
        write_media(folder / f"{number}.mp4", num_frames=9 + number)
        video = {"type": "video", "path": f"{number}.mp4"}
        messages = [
            {"role": "user", "content": [video, {"type": "text", "text": "What is seen?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"Number {number}."}]},
        ]
        lines.append(json.dumps({"messages": messages}))
        rows.append(f"{number},Clip number {number},.")
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "webvid.csv").write_text("\n".join(rows) + "\n")
    return folder


def arguments(stage: int, model: Path, data: Path, output_dir: Path, **settings: Any) -> list[str]:
    file, format = ("webvid.csv", "webvid") if stage == 1 else ("chat.jsonl", "chat")
    settings = {
        "model": model,
        "datasets": json.dumps([{"format": format, "annotations": str(data / file), "media_root": str(data)}]),
        "text_format": "caption" if stage == 1 else "chat",
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "num_frames": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def test_both_stages_train_and_load_again(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    first = main(arguments(1, tiny_folder, data, tmp_path / "1", streaming=True))
    assert {name for name, p in first.model.named_parameters() if p.requires_grad} == {
        name for name, _ in first.model.named_parameters() if name.startswith("model.video_branch.")
    }
    second = main(arguments(2, tiny_folder, data, tmp_path / "2", trained_part=tmp_path / "1", bf16=True, merge=True))
    assert first.model.model.audio_vision_tower is None
    assert second.model.model.language_model.dtype == second.model.model.qformer.dtype == torch.bfloat16
    tensors = load_file(tmp_path / "2" / "trained_part.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    model = from_trained_part(tmp_path / "2")
    VideoLlamaProcessor.from_pretrained(tmp_path / "2")
    merged = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "2" / "merged")
    VideoLlamaProcessor.from_pretrained(tmp_path / "2" / "merged")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name))
    for name, tensor in tensors.items():
        assert torch.equal(model.get_parameter(f"model.{name}"), tensor)
    card = (tmp_path / "2" / "README.md").read_text()
    assert "video" in card and "2306.02858" in card
    assert json.loads((tmp_path / "2" / "trainer_state.json").read_text())["global_step"] == 2


def test_the_audio_branch_trains_on_frames(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    trainer = main(arguments(2, tiny_folder, data, tmp_path / "run", branch="audio", max_steps=1))
    assert trainer.model.model.audio_vision_tower is not None
    assert json.loads((tmp_path / "run" / "trained_part.json").read_text())["parts"] == ["audio_branch"]
    assert len(load_file(tmp_path / "run" / "trained_part.safetensors")) == sum(
        name.startswith("model.audio_branch.") for name, _ in trainer.model.named_parameters()
    )


def test_imagebinds_vision_tower_is_loaded_only_for_frames_of_the_audio_branch(
    tiny_folder: Path, tmp_path: Path
) -> None:
    flags = ["--datasets", '[{"format": "chat", "annotations": "a"}]', "--output_dir", str(tmp_path), "--use_cpu"]
    for branch, on_frames in (("video", True), ("audio", False), ("audio", True)):
        model_args, _, training = parse_arguments(["--model", str(tiny_folder), "--branch", branch, *flags])
        model = load_model(model_args, training, on_frames=on_frames)
        assert (model.model.audio_vision_tower is not None) == (branch == "audio" and on_frames)


def test_what_is_trained_is_not_rounded_on_its_way(tiny_folder: Path, tmp_path: Path) -> None:
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    flags = ["--datasets", '[{"format": "chat", "annotations": "a"}]', "--output_dir", str(tmp_path / "run")]
    flags += ["--model", str(tmp_path / "model"), "--use_cpu", "--bf16", "--trainable", "video_branch", "qformer"]
    model_args, _, training = parse_arguments(flags)
    plain = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    loaded = load_model(model_args, training)
    for name, parameter in loaded.named_parameters():
        trained = name.startswith(("model.video_branch.", "model.qformer.", "model.query_tokens"))
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.float32 if trained else plain.get_parameter(name).dtype), name
        assert torch.equal(parameter, stored[name].to(parameter.dtype)), name
    branch = loaded.model.video_branch.projector.weight
    assert not torch.equal(branch, branch.bfloat16().float())
    # Whoever loads a model afterwards gets what they ask for
    again = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert again.model.video_branch.projector.weight.dtype == torch.bfloat16
    for name, parameter in again.named_parameters():
        assert parameter.dtype == plain.get_parameter(name).dtype, name


def test_a_list_of_parts_trains_and_loads_again(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    flags = arguments(1, tiny_folder, data, tmp_path / "run", merge=True, max_steps=1)
    trained = main([*flags, "--trainable", "qformer", "video_branch"]).model
    assert json.loads((tmp_path / "run" / "trained_part.json").read_text())["parts"] == ["video_branch", "qformer"]
    base = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder)
    loaded = from_trained_part(tmp_path / "run")
    merged = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "run" / "merged")
    assert not torch.equal(trained.model.query_tokens, base.model.query_tokens)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name)), name
        assert torch.equal(parameter, merged.get_parameter(name)), name


def test_a_run_evaluates(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    held_out = json.dumps([{"format": "chat", "annotations": str(data / "chat.jsonl"), "media_root": str(data)}])
    evaluation = {"eval_datasets": held_out, "eval_strategy": "steps", "eval_steps": 1}
    trainer = main(arguments(2, tiny_folder, data, tmp_path / "run", **evaluation))
    found = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(found) == 3 and found[0] != found[1] == found[2]  # after each of two steps, and at the end
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_loss"] == found[2]


def test_evaluation_sees_the_same_whatever_the_training_draws(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    source = {"format": "webvid", "annotations": str(data / "webvid.csv"), "media_root": str(data)}
    held_out = json.dumps([{**source, "weight": 1}, {**source, "weight": 3}])
    processor = VideoLlamaProcessor.from_pretrained(tiny_folder)
    seen = []
    for draws in ({"seed": 1}, {"seed": 2, "sampling": "headtail"}, {"seed": 3, "random_resized_crop": False}):
        flags = arguments(1, tiny_folder, data, tmp_path, eval_datasets=held_out, do_eval=True, **draws)
        model_args, data_args, training = parse_arguments(flags)
        dataset = load_eval_data(data_args, model_args.branch, training, processor)
        seen.append([dataset[index] for index in range(len(dataset))])
    assert len(seen[0]) > 8
    for first, *others in zip(*seen, strict=True):
        for other in others:
            assert torch.equal(other["input_ids"], first["input_ids"])
            assert torch.equal(other["pixel_values_videos"][0], first["pixel_values_videos"][0])


def test_an_adapter_is_merged(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    settings = {"lora_r": 2, "merge": True, "learning_rate": 1e-2, "max_steps": 3, "min_learning_rate": 1e-2}
    trainer = main(arguments(1, tiny_folder, data, tmp_path / "run", **settings))
    merged = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "run" / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    samples = [trainer.train_dataset[0], trainer.train_dataset[1]]
    batch = trainer.data_collator(samples)
    with torch.no_grad():
        expected, found = (model.eval()(**batch).logits for model in (trainer.model, merged))
        adapted = from_trained_part(tmp_path / "run")(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, expected, rtol=1e-4, atol=1e-4)


def test_what_a_run_begins_with_is_merged_too(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Or else the audio branch, trained beside one video branch, would come with another one."""
    main(arguments(2, tiny_folder, data, tmp_path / "video", learning_rate=1e-2))
    settings = {"branch": "audio", "trained_part": tmp_path / "video", "merge": True, "learning_rate": 1e-2}
    main(arguments(2, tiny_folder, data, tmp_path / "audio", **settings))
    merged = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "audio" / "merged")
    merged.load_audio_vision_tower()  # so that the audio branch can be trained on
    for branch in ("video", "audio"):
        for name, tensor in load_file(tmp_path / branch / "trained_part.safetensors").items():
            assert name.startswith(branch) and torch.equal(merged.get_parameter(f"model.{name}"), tensor)


def test_an_adapter_is_not_left_behind(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    main(arguments(2, tiny_folder, data, tmp_path / "1", lora_r=2, learning_rate=1e-2))
    with pytest.raises(ValueError, match="1 holds an adapter beside its branches: give `--lora_r`"):
        main(arguments(2, tiny_folder, data, tmp_path / "2", trained_part=tmp_path / "1"))
    settings = {"trained_part": tmp_path / "1", "lora_r": 2, "max_steps": 1, "learning_rate": 0}
    main(arguments(2, tiny_folder, data, tmp_path / "2", **settings))
    first, second = (load_file(tmp_path / run / "adapter_model.safetensors") for run in "12")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_with_files_is_not_overwritten(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"run is not empty\. Continue its run with `--resume_from_checkpoint last`"):
        main(arguments(1, tiny_folder, data, folder))
    flags = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "last"}
    with pytest.raises(ValueError, match=r"`output_dir` is .*notes\.txt, which is a file"):
        main(arguments(1, tiny_folder, data, folder / "notes.txt", **flags))
    first = main(arguments(1, tiny_folder, data, folder, **flags))
    assert first.state.global_step == 2
    again = main(arguments(1, tiny_folder, data, folder, **{**flags, "max_steps": 3}))
    assert [line["step"] for line in again.state.log_history if "loss" in line] == [1, 2, 3]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_stream_needs_a_number_of_steps(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max_steps"):
        main(arguments(1, tiny_folder, data, tmp_path / "run", streaming=True, max_steps=-1))


PUSH = """
import sys
from transformers_videollama.training.run import main
main(sys.argv[1:])
"""


def test_what_was_trained_is_pushed(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    with LocalHub() as hub:
        settings = {"lora_r": 2, "merge": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        settings |= {"hub_strategy": "every_save", "push_to_hub": True, "hub_model_id": "me/trained"}
        flags = arguments(2, tiny_folder, data, tmp_path / "run", **settings)
        (tmp_path / "run" / "merged").mkdir(parents=True)
        (tmp_path / "run" / "merged" / "model.safetensors").touch()
        (tmp_path / "run" / "bad_samples.jsonl").touch()
        flags.append("--resume_from_checkpoint=last")
        environment = {**hub.environment, "HF_TOKEN": "hf_me", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(SOURCE.parent)}
        subprocess.run([sys.executable, "-c", PUSH, *flags], check=True, env=environment, timeout=300)
        files = hub.files("me/trained")
    assert {"trained_part.safetensors", "trained_part.json", "README.md", "processor_config.json"} <= set(files)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files)
    assert not any(name.startswith(("checkpoint", "model", "merged")) for name in files)
    assert "bad_samples.jsonl" not in files
    # Others have not the folder of the frozen parts
    assert json.loads(files["trained_part.json"])["base_model"] is None
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert json.loads((tmp_path / "run" / "trained_part.json").read_text())["base_model"] == str(tiny_folder)
    assert b'from_trained_part("me/trained")\nmodel.load_adapter("me/trained")' in files["README.md"]
    assert files["trained_part.safetensors"] == (tmp_path / "run" / "trained_part.safetensors").read_bytes()


def test_a_trained_part_of_another_size_is_refused_before_training(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder)
    save_trained_part(model, tmp_path / "part", parts=["video_branch"])
    description = json.loads((tmp_path / "part" / "trained_part.json").read_text())
    description["sizes"]["text_config.hidden_size"] = 7
    (tmp_path / "part" / "trained_part.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="does not fit this model"):
        main(arguments(1, tiny_folder, data, tmp_path / "run", trained_part=tmp_path / "part"))
