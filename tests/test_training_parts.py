"""What the model itself does for training: which parts train, losses without logits, features in place of media."""

import pytest
import torch
from tiny_model import batch, images, prompt, sounds, tiny_model, videos

FROZEN_PARTS = ("vision_tower", "qformer", "audio_tower", "audio_vision_tower", "language_model")


@pytest.mark.parametrize("branch", ["video", "audio"])
def test_a_branch_trains_and_nothing_else(branch):
    model = tiny_model()
    names = model.set_trainable(branch)
    wanted = [name for name, _ in model.named_parameters() if name.startswith(f"model.{branch}_branch.")]
    assert names == wanted
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == wanted
    # the published set of that branch: its queries, Q-Former, positions and projection
    assert {name.split(".")[2] for name in names} == {"query_tokens", "position_embedding", "qformer", "projector"}


def test_frozen_parts_stay_in_eval_mode_and_get_no_gradients():
    model = tiny_model()
    model.set_trainable("video")
    model.train()
    assert model.training and model.model.video_branch.qformer.training
    for name in (*FROZEN_PARTS, "audio_branch"):
        assert not any(module.training for module in getattr(model.model, name).modules()), name
    inputs = batch(prompt(2, "audio", "video", 5))
    model(
        **inputs, pixel_values_videos=videos(1), input_features=sounds(1), labels=inputs["input_ids"]
    ).loss.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("model.video_branch."):
            assert parameter.grad is None, name
    assert model.model.video_branch.projector.weight.grad.any()
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_list_of_parts_and_a_change_of_mind():
    model = tiny_model()
    model.train()
    names = model.set_trainable(["video_branch", "qformer", "language_model"])
    assert "model.query_tokens" in names and "lm_head.weight" in names
    assert model.model.qformer.training and model.model.language_model.training
    assert not model.model.vision_tower.training
    names = model.set_trainable("audio")
    assert not any(name.startswith(("model.video", "model.query_tokens", "lm_head")) for name in names)
    assert not model.model.qformer.training and not model.model.language_model.training


def test_parts_that_the_model_lacks_are_refused():
    with pytest.raises(ValueError, match="no part 'audio_branch' to train: choose from video_branch"):
        tiny_model(audio_config=None, audio_vision_config=None).set_trainable("audio")
    with pytest.raises(ValueError, match="no part 'decoder'"):
        tiny_model().set_trainable("decoder")


@pytest.mark.parametrize("num_items", [None, 7])
def test_loss_without_logits_is_the_same(num_items):
    model = tiny_model()
    inputs = batch(prompt(2, "video", 5), prompt(4, "video", 9, seed=1))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, ::3] = -100
    inputs |= {"pixel_values_videos": videos(2), "labels": labels}
    kwargs = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    whole = model(**inputs, **kwargs)
    short = model(**inputs, **kwargs, skip_logits=True)
    assert short.logits is None and whole.logits is not None
    torch.testing.assert_close(short.loss, whole.loss, rtol=1e-6, atol=0)


def test_labels_of_another_shape_than_the_prompt_are_refused():
    inputs = batch(prompt(3, "video", 5))
    labels = inputs["input_ids"][:, 1:]
    with pytest.raises(ValueError, match=r"`labels` are of shape \(1, 11\), but the prompt is of shape \(1, 12\)"):
        tiny_model()(**inputs, pixel_values_videos=videos(1), labels=labels, skip_logits=True)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_emptying_gradients_reaches_those_of_every_part(set_to_none):
    model = tiny_model()
    model.set_trainable("video")
    model.eval()
    model.model.qformer.requires_grad_(True)  # by hand, after the choice
    inputs = batch(prompt(2, "video", 5))
    model(**inputs, pixel_values_videos=videos(1), labels=inputs["input_ids"]).loss.backward()
    had = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert {name.split(".")[1] for name in had} == {"video_branch", "qformer"}
    model.zero_grad(set_to_none=set_to_none)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == (0 if set_to_none else len(had)) and not any(gradient.any() for gradient in gradients)


def test_features_in_place_of_media_give_the_same():
    model = tiny_model()
    inputs = batch(prompt(1, "image", "video", 2, "audio", 3))
    mask = torch.tensor([[1, 1, 0]])
    with torch.no_grad():
        online = model(
            **inputs,
            pixel_values=images(1),
            pixel_values_videos=videos(1),
            padding_mask_videos=mask,
            audio_pixel_values_videos=videos(1),
            audio_padding_mask_videos=mask,
        ).logits
        features = {
            "image_frame_features": model.model.get_frame_features(images(1)).last_hidden_state,
            "video_frame_features": model.model.get_frame_features(videos(1)[0]).last_hidden_state[None],
            "padding_mask_videos": mask,
            "audio_clip_features": model.model.get_clip_features(pixel_values_videos=videos(1)).last_hidden_state,
            "audio_padding_mask_videos": mask,
        }
        cached = model(**inputs, **features).logits
        heard = model.model.get_clip_features(input_features=sounds(1)).last_hidden_state
        sound = {"audio_clip_features": heard}
        from_sound = model(**batch(prompt("audio", 3)), **sound).logits
        assert torch.equal(from_sound, model(**batch(prompt("audio", 3)), input_features=sounds(1)).logits)
    assert torch.equal(online, cached)
    assert torch.equal(model.generate(**inputs, **features), model.generate(
        **inputs, pixel_values=images(1), pixel_values_videos=videos(1), padding_mask_videos=mask,
        audio_pixel_values_videos=videos(1), audio_padding_mask_videos=mask,
    ))  # fmt: skip


def test_features_of_another_size_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"`frame_features` must be of shape .* made by another model"):
        model.get_video_features(frame_features=torch.zeros(1, 3, 3, 31))
    with pytest.raises(ValueError, match="`clip_features` must be of shape"):
        model.get_audio_features(clip_features=torch.zeros(1, 3, 17))
    with pytest.raises(ValueError, match="either `pixel_values_videos` or `frame_features`"):
        model.get_video_features()
