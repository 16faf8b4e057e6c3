"""What runs on a GPU gives what runs on a CPU, and holds in memory what it should. The published values on a GPU are
in `test_reference_parity.py`. By hand, where there is a GPU: `python -m pytest -n 0 -m gpu`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from media_files import write_media
from test_generation import all_prompts, answer
from tiny_model import batch, prompt, tiny_model, videos
from training_runs import losses, make_trainer
from transformers import BitsAndBytesConfig, StaticCache, pipeline

from transformers_videollama import VideoLlamaForConditionalGeneration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def all_bits_of_float32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cuda") for name, tensor in inputs.items()}


@pytest.fixture(scope="module")
def answers_of_the_cpu() -> torch.Tensor:
    inputs = all_prompts()
    return answer(tiny_model().generate(**inputs), inputs)


def test_greedy_answers_of_a_batch_with_all_media(answers_of_the_cpu: torch.Tensor) -> None:
    inputs = on_gpu(all_prompts())
    assert torch.equal(answer(tiny_model().cuda().generate(**inputs), inputs).cpu(), answers_of_the_cpu)


def test_compiled_steps_over_a_static_cache_answer_alike(answers_of_the_cpu: torch.Tensor) -> None:
    model, inputs = tiny_model().cuda(), on_gpu(all_prompts())
    for _ in range(2):  # the second time a graph is replayed
        output = model.generate(**inputs, cache_implementation="static")
        assert torch.equal(answer(output, inputs).cpu(), answers_of_the_cpu)
    length = inputs["input_ids"].shape[1] + answers_of_the_cpu.shape[1]
    cache = StaticCache(model.config.text_config, max_cache_len=length)
    assert torch.equal(answer(model.generate(**inputs, past_key_values=cache), inputs).cpu(), answers_of_the_cpu)


def test_compiled_encoders_give_the_same_soft_tokens() -> None:
    model, pixels = tiny_model().cuda(), videos(2).cuda()
    expected = model.get_video_features(pixels).pooler_output
    for block in (*model.model.vision_tower.encoder.layers, *model.model.qformer.encoder.layer):
        block.compile()
    torch.testing.assert_close(model.get_video_features(pixels).pooler_output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_on_a_cpu(dtype: torch.dtype) -> None:
    inputs = all_prompts()
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = tiny_model()(**inputs).logits[shown]
        errors = {}
        for device in ("cpu", "cuda"):
            model = tiny_model().to(device, dtype)
            logits = model(**{name: value.to(device) for name, value in half.items()}).logits
            assert logits.dtype == dtype
            errors[device] = ((logits.float().cpu()[shown] - exact).norm() / exact.norm()).item()
    assert errors["cuda"] < 1.5 * errors["cpu"]


def train(folder: Path, checkpoint: Path | None = None, **options: Any) -> list[float]:
    """The losses of six steps, or of those after a checkpoint."""
    model = tiny_model()  # without dropout, whose draws differ between devices
    model.set_trainable("video")
    trainer = make_trainer(folder, model=model, max_steps=6, **options)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return losses(trainer)


def test_training_has_the_losses_of_a_cpu(tmp_path: Path) -> None:
    assert train(tmp_path / "gpu", use_cpu=False) == pytest.approx(train(tmp_path / "cpu"), abs=1e-3)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    options = {"use_cpu": False, "bf16": True, "save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path / "whole", **options)
    resumed = train(tmp_path / "again", tmp_path / "whole" / "checkpoint-3", **options)
    assert resumed[-3:] == pytest.approx(whole[-3:], abs=1e-3)


def test_training_keeps_an_optimizer_state_for_the_branch_alone(tmp_path: Path) -> None:
    model = tiny_model()
    model.set_trainable("video")
    trainer = make_trainer(tmp_path, model=model, max_steps=1, use_cpu=False, bf16=True)
    trainer.train()
    state = trainer.optimizer.state_dict()["state"]
    assert len(state) == sum(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.is_cuda and (parameter.dtype == torch.float32 or not parameter.requires_grad), name


def test_a_pipeline_answers_about_a_file_as_on_a_cpu(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_media(path)
    asked = {"text": "What is this?", "max_new_tokens": 8, "do_sample": False}
    texts = [
        pipeline("video-text-to-text", model=str(tiny_folder), device=device, dtype="float32")(str(path), **asked)
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]


def test_a_decoder_in_four_bits_answers(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = VideoLlamaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cuda"}
    )
    kinds = {type(module).__name__ for module in model.model.language_model.modules()}
    assert "Linear4bit" in kinds
    assert "Linear4bit" not in {type(module).__name__ for module in model.model.vision_tower.modules()}
    inputs = on_gpu(batch(prompt(4, "video", 3)))
    tokens = model.generate(**inputs, pixel_values_videos=videos(1).to("cuda", torch.bfloat16), max_new_tokens=4)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4
