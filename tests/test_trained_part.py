"""The trained part of a model, saved alone: it loads onto the frozen parts, or says what does not fit."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config
from transformers import AutoModelForImageTextToText, LlamaConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from transformers_videollama import (
    VideoLlamaForConditionalGeneration,
    VideoLlamaModel,
    from_trained_part,
    load_trained_part,
    save_trained_part,
)

WEIGHTS, DESCRIPTION = "trained_part.safetensors", "trained_part.json"


def make_model(seed: int, **kwargs) -> VideoLlamaForConditionalGeneration:
    torch.manual_seed(seed)
    return VideoLlamaForConditionalGeneration(tiny_config(**kwargs)).eval()


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.mark.parametrize("parts", [["video_branch"], ["audio_branch"], ["video_branch", "audio_branch"]], ids=str)
def test_it_holds_the_trained_tensors_and_nothing_else(parts: list[str], tmp_path: Path) -> None:
    model = make_model(0)
    save_trained_part(model, tmp_path / "part", parts=parts)
    tensors = load_file(tmp_path / "part" / WEIGHTS)
    expected = {
        name.removeprefix("model."): parameter
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(f"model.{part}." for part in parts))
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == [DESCRIPTION, WEIGHTS]

    other = make_model(1)
    frozen = {name: p.clone() for name, p in other.named_parameters() if name.removeprefix("model.") not in expected}
    assert load_trained_part(other, tmp_path / "part") == parts
    for part in ("video_branch", "audio_branch"):
        assert same(getattr(other.model, part), getattr(model.model, part)) == (part in parts)
    assert all(torch.equal(other.get_parameter(name), value) for name, value in frozen.items())


def test_parts_come_with_what_belongs_to_them(tmp_path: Path) -> None:
    model, other = make_model(0), make_model(1)
    save_trained_part(model, tmp_path, parts=["qformer", "language_model"])
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    assert set(description["frozen_parts"]) == {"vision_tower"}
    assert load_trained_part(other, tmp_path) == ["qformer", "language_model"]
    prefixes = ("model.qformer.", "model.query_tokens", "model.language_model.", "lm_head.")
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter) or not name.startswith(prefixes), name
    assert not same(other.model.video_branch, model.model.video_branch)


def test_branches_load_one_after_the_other(tmp_path: Path) -> None:
    seeing, hearing, model = make_model(0), make_model(1), make_model(2)
    save_trained_part(seeing, tmp_path / "seeing", parts=["video_branch"])
    save_trained_part(hearing, tmp_path / "hearing", parts=["audio_branch"])
    load_trained_part(model, tmp_path / "seeing")
    load_trained_part(model, tmp_path / "hearing")
    assert same(model.model.video_branch, seeing.model.video_branch)
    assert same(model.model.audio_branch, hearing.model.audio_branch)


def test_what_requires_a_gradient_is_what_is_saved(tmp_path: Path) -> None:
    model = make_model(0)
    model.requires_grad_(False)
    save_trained_part(model, tmp_path / "all")
    assert json.loads((tmp_path / "all" / DESCRIPTION).read_text())["parts"] == ["video_branch", "audio_branch"]
    model.model.audio_branch.requires_grad_(True)
    save_trained_part(model, tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / DESCRIPTION).read_text())["parts"] == ["audio_branch"]


def test_parts_beside_the_branches_are_saved_if_they_are_trained(tmp_path: Path) -> None:
    model = make_model(0)
    for chosen in (["qformer"], ["video_branch", "qformer"]):
        model.set_trainable(chosen)
        save_trained_part(model, tmp_path)
        assert sorted(json.loads((tmp_path / DESCRIPTION).read_text())["parts"]) == sorted(chosen)


def test_the_base_model_fits_it_too(tmp_path: Path) -> None:
    model, base = make_model(0), VideoLlamaModel(tiny_config())
    save_trained_part(model, tmp_path)
    load_trained_part(base, tmp_path)
    assert same(base.video_branch, model.model.video_branch)
    save_trained_part(base, tmp_path / "again")
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(tmp_path / "again" / WEIGHTS).keys()


def test_it_names_the_frozen_parts_and_loads_with_them_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(0).save_pretrained(tmp_path / "base")
    model = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.model.video_branch.parameters():
            parameter.add_(1.0)
    save_trained_part(model, tmp_path / "part", parts=["video_branch"])
    description = json.loads((tmp_path / "part" / DESCRIPTION).read_text())
    assert description["base_model"] == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    save_trained_part(model, "part", parts=["video_branch"], base_model="base")
    monkeypatch.chdir("/")  # where "base" is nothing
    assert json.loads((tmp_path / "part" / DESCRIPTION).read_text()) == description
    assert set(description["frozen_parts"]) == {"vision_tower", "qformer", "language_model"}
    assert same(from_trained_part(tmp_path / "part"), model)

    save_trained_part(model, tmp_path / "audio", parts=["audio_branch"], base_model="me/base", base_revision="abc")
    description = json.loads((tmp_path / "audio" / DESCRIPTION).read_text())
    assert (description["base_model"], description["base_revision"]) == ("me/base", "abc")
    assert "CC-BY-NC" in description["frozen_parts"]["audio_tower"]
    other = from_trained_part(tmp_path / "audio", base_model=tmp_path / "base", revision=None, dtype=torch.bfloat16)
    assert other.dtype == torch.bfloat16


def test_a_model_that_was_never_saved_has_no_base(tmp_path: Path) -> None:
    save_trained_part(make_model(0), tmp_path)
    with pytest.raises(ValueError, match="does not name the model with its frozen parts"):
        from_trained_part(tmp_path)


def test_an_adapter_loads_with_its_model_but_not_without_the_part_beside_it(tmp_path: Path) -> None:
    make_model(0).save_pretrained(tmp_path / "base")
    model = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "run")
    assert "lora" in str(VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "run").state_dict().keys())
    config = tmp_path / "run" / "adapter_config.json"
    named = config.read_text()
    config.write_text(json.dumps({**json.loads(named), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="run does not name the model that its adapter is for"):
        VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "run")
    config.write_text(named)
    save_trained_part(make_model(1), tmp_path / "run", parts=["video_branch"])
    for loader in (VideoLlamaForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match=r"run holds trained branches beside its adapter: .* `from_trained_part`"):
            loader.from_pretrained(tmp_path / "run")


def test_an_adapter_that_is_left_out_is_named(tmp_path: Path) -> None:
    make_model(0).save_pretrained(tmp_path / "base")
    save_trained_part(make_model(1), tmp_path / "run", base_model=tmp_path / "base")
    logger = logging.get_logger("transformers_videollama.trained_part")
    for expected in (False, True):
        with CaptureLogger(logger) as captured:
            from_trained_part(tmp_path / "run")
        assert ("run holds a LoRA adapter beside the trained part" in captured.out) == expected
        LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "run")


def test_it_takes_the_models_dtype(tmp_path: Path) -> None:
    model = make_model(0)
    save_trained_part(model, tmp_path)
    half = make_model(1).to(torch.bfloat16)
    load_trained_part(half, tmp_path)
    assert half.model.video_branch.projector.weight.dtype == torch.bfloat16
    expected = model.model.video_branch.projector.weight.bfloat16()
    assert torch.equal(half.model.video_branch.projector.weight, expected)


def test_a_part_for_another_decoder_is_refused_by_name(tmp_path: Path) -> None:
    save_trained_part(make_model(0), tmp_path)
    wide = LlamaConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    model = make_model(1, text_config=wide)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`text_config.hidden_size` 32, not 64") as error:
        load_trained_part(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    description = json.loads((tmp_path / DESCRIPTION).read_text())
    for made_for, words in ((5120, "made for a 13B decoder"), (4096, "made for a 7B decoder")):
        description["sizes"]["text_config.hidden_size"] = made_for
        (tmp_path / DESCRIPTION).write_text(json.dumps(description))
        with pytest.raises(ValueError, match=words):
            load_trained_part(model, tmp_path)


def test_more_frames_or_tokens_are_refused_by_name(tmp_path: Path) -> None:
    save_trained_part(make_model(0), tmp_path)
    with pytest.raises(ValueError, match=r"`max_frames` 6, not 12"):
        load_trained_part(make_model(1, max_frames=12), tmp_path)
    with pytest.raises(ValueError, match=r"`num_video_query_tokens` 4, not 5"):
        load_trained_part(make_model(1, num_video_query_tokens=5), tmp_path)


def test_a_model_that_cannot_hear_takes_no_audio_branch(tmp_path: Path) -> None:
    save_trained_part(make_model(0), tmp_path)
    deaf = make_model(1, audio_config=None, audio_qformer_config=None, audio_vision_config=None)
    with pytest.raises(ValueError, match="audio branch, which this model lacks"):
        load_trained_part(deaf, tmp_path)
    with pytest.raises(ValueError, match="audio branch, which this model lacks"):
        save_trained_part(deaf, tmp_path / "other", parts=["audio_branch"])
    with pytest.raises(ValueError, match="no part 'audio_tower': choose from video_branch, audio_branch"):
        save_trained_part(deaf, tmp_path / "other", parts=["audio_tower"])
    save_trained_part(deaf, tmp_path / "other")
    assert json.loads((tmp_path / "other" / DESCRIPTION).read_text())["parts"] == ["video_branch"]


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_damaged_files_are_refused_and_change_nothing(damage: str, tmp_path: Path) -> None:
    save_trained_part(make_model(0), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "video_branch.projector.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["video_branch.projector.extra"] = torch.zeros(1)
        name = "video_branch.projector.extra"
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    model = make_model(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"does not fit this model: .*{name}"):
        load_trained_part(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_folders_without_a_trained_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=DESCRIPTION):
        load_trained_part(make_model(0), tmp_path)
    (tmp_path / DESCRIPTION).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_trained_part(make_model(0), tmp_path)
    (tmp_path / DESCRIPTION).write_text('{"parts": ["video_branch"]}')
    with pytest.raises(ValueError, match="lacks base_model"):
        load_trained_part(make_model(0), tmp_path)


def test_an_interrupted_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(0)
    save_trained_part(model, tmp_path)

    def fail(tensors: dict, path: Path, **kwargs) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers_videollama.trained_part.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_trained_part(make_model(1), tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [DESCRIPTION, WEIGHTS]
    other = make_model(2)
    load_trained_part(other, tmp_path)
    assert same(other.model.video_branch, model.model.video_branch)


def test_others_may_read_the_files(tmp_path: Path) -> None:
    save_trained_part(make_model(0), tmp_path)
    (tmp_path / "plain").touch()
    for name in (WEIGHTS, DESCRIPTION):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_model_that_is_not_in_memory_is_refused(tmp_path: Path) -> None:
    save_trained_part(make_model(0), tmp_path)
    with torch.device("meta"):
        model = VideoLlamaForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match="offloaded or not loaded"):
        load_trained_part(model, tmp_path)
