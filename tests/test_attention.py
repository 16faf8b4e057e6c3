"""The library's attention implementations give the same results, and each part of the model can have its own."""

from collections import Counter

import pytest
import torch
from tiny_model import batch, prompt, sounds, tiny_model, videos
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_videollama.modeling_video_llama import VideoLlamaForConditionalGeneration


def inputs() -> dict[str, torch.Tensor]:
    """Prompts of different lengths, and videos of different lengths: every mask is needed."""
    return {
        **batch(prompt(3, "video", 2), prompt(6, "video", 1, "audio", 3, "video", 1)),
        "pixel_values_videos": videos(3, 4),
        "padding_mask_videos": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]),
        "input_features": sounds(1),
    }


@torch.no_grad()
def logits_of_tokens(model: VideoLlamaForConditionalGeneration) -> torch.Tensor:
    """The logits of all tokens that are not padding."""
    return model(**inputs()).logits[inputs()["attention_mask"].bool()]


def implementations(model: VideoLlamaForConditionalGeneration) -> dict[str, str]:
    """The attention implementation of every part."""
    return {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_implementations_give_what_eager_gives(implementation, monkeypatch):
    model = tiny_model()
    model.set_attn_implementation("eager")
    expected = logits_of_tokens(model)

    model.set_attn_implementation(implementation)
    assert set(implementations(model).values()) == {implementation}
    calls = Counter()
    attention = ALL_ATTENTION_FUNCTIONS[implementation]

    def count(module: torch.nn.Module, *args, **kwargs):
        calls[type(module).__name__] += 1
        return attention(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, implementation, count)
    # Flex attention is made to be compiled; what it computes is the same without, in a fiftieth of the time
    with torch.compiler.set_stance("force_eager"):
        logits = logits_of_tokens(model)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    # Two layers of: frame encoder; image Q-Former (with cross-attention in the first) and its two followers; decoder
    assert calls == {
        "VideoLlamaVisionAttention": 2,
        "VideoLlamaAudioAttention": 2,
        "Blip2QFormerMultiHeadAttention": 3 + 4 + 4,
        "LlamaAttention": 2,
    }


def test_parts_have_implementations_of_their_own():
    model = tiny_model()
    expected = logits_of_tokens(model)
    model.set_attn_implementation({"vision_config": "eager", "audio_qformer_config": "eager"})
    eager = {name for name, implementation in implementations(model).items() if implementation == "eager"}
    assert eager == {"model.vision_tower", "model.audio_branch.qformer"}
    torch.testing.assert_close(logits_of_tokens(model), expected, atol=1e-4, rtol=1e-4)


def test_flash_attention_leaves_out_the_q_formers():
    """Its library call cannot hide padded frames from queries of another number."""
    qformer = tiny_model().model.video_branch.qformer
    for implementation in ("flash_attention_2", "flash_attention_3"):
        assert qformer._check_and_adjust_attn_implementation(implementation) == "sdpa"


@torch.no_grad()
def test_attention_weights_come_with_eager_attention():
    model = tiny_model(attn_implementation="eager")
    outputs = model.get_video_features(videos(2, 3), output_attentions=True)
    assert [weights.shape for weights in outputs.attentions] == [(6, 4, 5, 5)] * 2
    outputs = model.get_audio_features(sounds(2), output_attentions=True)
    num_patches = model.config.audio_config.num_patches
    # A learned key is added to those of the class token and the patches
    assert [weights.shape for weights in outputs.attentions] == [(4, 4, 1 + num_patches, 2 + num_patches)] * 2
