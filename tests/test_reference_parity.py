"""The converted reference model computes what the published system computes: every intermediate, losses, gradients,
tokens."""

import json
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE
from published_names import translate  # from conversion/, put on the path by conftest.py
from torch.nn import functional as F

from transformers_videollama import VideoLlamaForConditionalGeneration

# What is asked of the port; it is met with two orders of magnitude to spare.
TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model(tiny_folder: Path, device: torch.device) -> VideoLlamaForConditionalGeneration:
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32)
    model.load_audio_vision_tower()
    return model.to(device).eval()


@pytest.fixture(scope="module")
def frames(expected: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """(2, 8, 3, 224, 224)"""
    return upsample(expected["in.frames_lowres"]).unflatten(0, (2, 8)).to(device)


@pytest.fixture(scope="module")
def sounds(expected: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """(2, 8, 128, 204)"""
    return expected["in.mel"].float().squeeze(2).to(device)


def upsample(frames: torch.Tensor) -> torch.Tensor:
    return F.interpolate(frames, size=(224, 224), mode="nearest")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_frame_encoder(model, frames, expected):
    outputs = model.model.vision_tower(frames.flatten(0, 1), output_hidden_states=True)
    assert_close(outputs.hidden_states[-1], expected["vit.hidden"])
    assert_close(outputs.last_hidden_state, expected["vit.ln"])
    assert_close(model.model.get_frame_features(frames.flatten(0, 1)).last_hidden_state, expected["qformer.out"])


@torch.no_grad()
def test_soft_tokens_of_videos_and_images(model, frames, expected):
    assert_close(model.get_video_features(frames).pooler_output, expected["video.embeds"])
    assert_close(model.get_image_features(frames[:, 0]).pooler_output, expected["image.embeds"])
    frames20 = upsample(expected["in.frames20_lowres"])[None].to(frames.device)
    assert_close(model.get_video_features(frames20).pooler_output, expected["video20.embeds"])


@torch.no_grad()
def test_soft_tokens_of_sounds(model, sounds, expected):
    vectors = model.model.audio_tower(sounds.flatten(0, 1)).pooler_output.unflatten(0, (2, 8))
    assert_close(vectors, expected["imagebind.audio"])
    assert_close(model.get_audio_features(sounds).pooler_output, expected["audio.embeds"])


@torch.no_grad()
def test_audio_branch_shown_frames(model, frames, expected):
    vectors = model.model.audio_vision_tower(frames.flatten(0, 1)).pooler_output.unflatten(0, (2, 8))
    assert_close(vectors, expected["imagebind.vision"])
    embeds = model.get_audio_features(pixel_values_videos=frames).pooler_output
    assert_close(embeds, expected["audio_branch_on_vision.embeds"])


@torch.no_grad()
def test_logits_and_greedy_tokens(model, frames, sounds, expected):
    config = model.config
    audio = torch.full((1, config.num_audio_query_tokens), config.audio_token_id)
    video = torch.full((1, config.num_video_query_tokens), config.video_token_id)
    input_ids = torch.cat([expected["gen.pre"], audio, expected["gen.mid"], video, expected["gen.post"]], dim=1)
    inputs = {"input_ids": input_ids.to(model.device), "input_features": sounds[:1], "pixel_values_videos": frames[:1]}
    assert_close(model(**inputs).logits, expected["gen.prefill_logits"])
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    # The reference's first id is a start token that its generation loop put there.
    assert tokens[0, input_ids.shape[1] :].tolist() == expected["gen.tokens"][0, 1:].tolist()


@pytest.mark.parametrize("branch", ["video", "audio"])
def test_losses_and_gradients(model, frames, expected, branch):
    meta = json.loads((REFERENCE / "tiny" / "meta.json").read_text())
    # The reference has one placeholder for all media.
    placeholder = model.config.video_token_id if branch == "video" else model.config.audio_token_id
    input_ids = expected[f"train.{branch}.input_ids"]
    input_ids = torch.where(input_ids == meta["image_token_id"], placeholder, input_ids)
    model.zero_grad()
    loss = model(
        input_ids=input_ids.to(model.device),
        attention_mask=expected[f"train.{branch}.attention_mask"].to(model.device),
        labels=expected[f"train.{branch}.labels"].to(model.device),
        **{"pixel_values_videos" if branch == "video" else "audio_pixel_values_videos": frames},
    ).loss
    assert_close(loss.detach(), expected[f"train.{branch}.loss"], LOSS_TOLERANCE)
    loss.backward()
    parameters = dict(model.named_parameters())
    prefix = f"train.{branch}.grad."
    names = [name.removeprefix(prefix) for name in expected if name.startswith(prefix)]
    assert len(names) == sum(name.startswith(f"model.{branch}_branch.") for name in parameters)
    largest = max(expected[prefix + name].norm() for name in names)
    for name in names:
        (translated,) = translate(name)
        gradient, reference = parameters[translated].grad.cpu(), expected[prefix + name]
        # A key's bias adds the same to all scores of a query: its true gradient is zero, and both sides hold rounding.
        scale = largest if name.endswith("key.bias") else reference.norm()
        assert (gradient - reference).norm() <= GRADIENT_TOLERANCE * scale, name
