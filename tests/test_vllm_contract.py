"""What vLLM's Transformers backend asks of a model that it serves, asked here of the real objects without vLLM."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration, VideoLlamaModel

SYNTH = Path(__file__).parent / "reference" / "synth"
MODALITIES = ("image", "video", "audio")


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> VideoLlamaConfig:
    return AutoConfig.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def model(config: VideoLlamaConfig) -> VideoLlamaModel:
    """As the backend builds it: by `AutoModel`, from the configuration, and without weights at first."""
    return AutoModel.from_config(config).eval()


@pytest.fixture(scope="module")
def processor(tiny_folder: Path):
    return AutoProcessor.from_pretrained(tiny_folder)


def test_auto_model_builds_the_headless_base_model(model: VideoLlamaModel) -> None:
    assert type(model) is VideoLlamaModel
    assert model.get_output_embeddings() is None
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    assert VideoLlamaForConditionalGeneration.base_model_prefix == "model"


def test_the_decoder_is_the_language_model_of_a_nested_text_config(model: VideoLlamaModel) -> None:
    assert model.config.get_text_config() is model.config.text_config is model.language_model.config
    assert model.get_input_embeddings() is model.language_model.get_input_embeddings()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(model.config.text_config, name) > 0


def test_the_placeholders_of_each_modality_are_in_the_configuration(config: VideoLlamaConfig, processor) -> None:
    for modality in MODALITIES:
        token = getattr(processor, f"{modality}_token")
        token_id = getattr(processor, f"{modality}_token_id")
        assert token_id == getattr(config, f"{modality}_token_id")
        assert processor.tokenizer.convert_tokens_to_ids(token) == token_id


def test_feature_getters_return_outputs_and_take_further_arguments(model: VideoLlamaModel) -> None:
    size, clips = model.config.vision_config.image_size, model.config.audio_config.max_source_positions
    bins, length = model.config.audio_config.num_mel_bins, model.config.audio_config.max_length
    inputs = {
        "image": {"pixel_values": torch.randn(2, 3, size, size)},
        "video": {"pixel_values_videos": torch.randn(2, 4, 3, size, size)},
        "audio": {"input_features": torch.randn(2, clips, bins, length)},
    }
    for modality in MODALITIES:
        getter = getattr(model, f"get_{modality}_features")
        assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(getter).parameters.values())
        # The backend also passes what the processor gave beside the medium
        output = getter(**inputs[modality], return_dict=True, num_items_in_batch=2)
        assert isinstance(output, BaseModelOutputWithPooling)
        num_tokens = (
            model.config.num_audio_query_tokens if modality == "audio" else model.config.num_video_query_tokens
        )
        assert output.pooler_output.shape == (2, num_tokens, model.config.text_config.hidden_size)


def test_the_base_model_runs_on_embeddings_alone(model: VideoLlamaModel) -> None:
    """The backend puts soft tokens into the embedded prompt by itself."""
    embeds = torch.randn(1, 5, model.config.text_config.hidden_size)
    output = model(inputs_embeds=embeds, position_ids=torch.arange(5)[None], use_cache=False, return_dict=False)
    assert output[0].shape == embeds.shape


def test_the_processor_is_called_as_the_library_calls_processors(processor) -> None:
    assert type(processor).__call__ is ProcessorMixin.__call__


def test_replacements_of_placeholders_come_with_their_offsets(processor) -> None:
    image = np.zeros((32, 48, 3), dtype=np.uint8)
    video = np.zeros((4, 32, 48, 3), dtype=np.uint8)
    sound = np.zeros(32000, dtype=np.float32)
    text = "".join(getattr(processor, f"{modality}_token") + f" {modality} " for modality in MODALITIES)
    inputs = processor(
        text=[text],
        images=[image],
        videos=[video],
        audio=[sound],
        audio_kwargs={"sampling_rate": 16000},
        return_tensors="pt",
        return_text_replacement_offsets=True,
    )
    (offsets,) = inputs["text_replacement_offsets"]
    assert len(offsets) == 3
    for modality, offset in zip(MODALITIES, offsets, strict=True):
        token = getattr(processor, f"{modality}_token")
        replace = getattr(processor, f"replace_{modality}_token")
        num_tokens = getattr(processor, f"num_{modality}_tokens")
        assert replace({}, 0) == token * num_tokens
        assert int((inputs["input_ids"] == getattr(processor, f"{modality}_token_id")).sum()) == num_tokens
        assert (offset["type"], offset["text"], offset["replacement"]) == (modality, token, token * num_tokens)


def test_the_tokens_of_media_are_known_by_their_sizes(processor) -> None:
    counts = processor._get_num_multimodal_tokens(
        image_sizes=[(224, 224), (1080, 1920)], video_sizes=[(8, 224, 224)], audio_lengths=[16000, 320000, 1]
    )
    assert counts["num_image_tokens"] == [processor.num_image_tokens] * 2
    assert len(counts["num_image_patches"]) == 2
    assert counts["num_video_tokens"] == [processor.num_video_tokens]
    assert counts["num_audio_tokens"] == [processor.num_audio_tokens] * 3


def test_sub_processors_name_all_that_they_give(processor) -> None:
    video = np.zeros((4, 32, 48, 3), dtype=np.uint8)
    sound = np.zeros(32000, dtype=np.float32)
    given = {
        "image_processor": processor.image_processor(np.zeros((32, 48, 3), dtype=np.uint8), return_tensors="pt"),
        "video_processor": processor.video_processor([video, video[:2]], return_tensors="pt"),
        "feature_extractor": processor.feature_extractor(sound, sampling_rate=16000, return_tensors="pt"),
        "tokenizer": processor.tokenizer("text", return_tensors="pt"),
    }
    for name, outputs in given.items():
        assert set(outputs) <= set(getattr(processor, name).model_input_names), name
        assert set(outputs) <= set(processor.model_input_names), name
    assert "padding_mask_videos" in given["video_processor"]


def test_the_audio_configuration_has_its_number_of_positions(config: VideoLlamaConfig) -> None:
    assert config.audio_config.max_source_positions == 8


def test_attention_is_four_linear_layers(model: VideoLlamaModel) -> None:
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    projections = ({"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"})
    found = 0
    for name, module in model.named_modules():
        children = dict(module.named_children())
        own = [names for names in projections if names & children.keys()]
        if not own:
            continue
        found += 1
        assert own[0] <= children.keys(), name
        assert all(isinstance(children[child], nn.Linear) for child in own[0]), name
        output = next((children[child] for child in ("out_proj", "o_proj") if child in children), None)
        if output is None:  # BERT's attention has its output layer beside it
            output = model.get_submodule(name.rpartition(".")[0]).output.dense
        assert isinstance(output, nn.Linear), name
    layers = [model.vision_tower, model.qformer, model.video_branch, model.audio_tower, model.audio_branch]
    assert found > len(layers) and all(isinstance(layer, nn.Module) for layer in layers)
    fused = [name for name, _ in model.named_parameters() if "qkv" in name or "in_proj" in name]
    assert not fused


@pytest.mark.parametrize("num_given", [1, 3, 8, 9, 33])
def test_any_number_of_given_frames_becomes_the_models_own(processor, num_given: int) -> None:
    video = np.random.default_rng(0).integers(0, 256, (num_given, 32, 48, 3), dtype=np.uint8)
    outputs = processor.video_processor([video], do_sample_frames=False, return_tensors="pt")
    num_frames = processor.video_processor.num_frames
    assert outputs["pixel_values_videos"].shape[:2] == (1, num_frames)
    if num_given < num_frames:
        assert outputs["padding_mask_videos"].sum() == num_given


def test_given_frames_of_any_number_are_understood(model: VideoLlamaModel, processor) -> None:
    video = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    padded = processor.video_processor([video], do_sample_frames=False, return_tensors="pt")
    plain = processor.video_processor([video], return_tensors="pt")
    with torch.no_grad():
        features = [model.get_video_features(**inputs, return_dict=True).pooler_output for inputs in (padded, plain)]
    torch.testing.assert_close(features[0], features[1], atol=1e-5, rtol=1e-5)
