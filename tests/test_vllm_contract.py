"""What vLLM's Transformers backend asks of a model that it serves, asked here of the real objects without vLLM."""

import importlib.util
import inspect
import os
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from test_remote_code import SOURCE, run
from tiny_model import VOCAB_SIZE, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration, VideoLlamaModel
from transformers_videollama.modeling_video_llama_towers import VideoLlamaAudioAttention
from transformers_videollama.vllm_plugin import ARCHITECTURE, MODEL_CLASS

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


# The plugin

VLLM = """
class ModelRegistry:
    models = []

    @classmethod
    def get_supported_archs(cls):
        return [name for name, _ in cls.models]

    @classmethod
    def register_model(cls, name, model_class):
        cls.models.append((name, model_class))
"""


def test_vllm_finds_the_plugin_which_registers_the_model_once_and_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(VLLM)
    code = """
    import json, sys
    from importlib.metadata import entry_points
    import transformers_videollama
    (point,) = entry_points(group="vllm.general_plugins", name="video_llama")
    register = point.load()
    early = sorted({"vllm", "torch"} & set(sys.modules))
    register()
    register()
    import vllm
    print(json.dumps({"early": early, "torch": "torch" in sys.modules, "models": vllm.ModelRegistry.models}))
    """
    path = os.pathsep.join([str(SOURCE.parent), str(tmp_path)])
    found = run(code, tmp_path=tmp_path, package=True, PYTHONPATH=path)
    assert found == {"early": [], "torch": False, "models": [[ARCHITECTURE, MODEL_CLASS]]}


def test_the_plugin_names_what_saved_folders_and_the_package_have(tiny_folder: Path) -> None:
    assert AutoConfig.from_pretrained(tiny_folder).architectures == [ARCHITECTURE]
    module, _, class_name = MODEL_CLASS.partition(":")
    assert f"class {class_name}(" in Path(importlib.util.find_spec(module).origin).read_text()


# What the backend does with processor and model


def call_as_the_backend(
    processor: Any,
    images: list[Any],
    videos: list[np.ndarray],
    sounds: list[np.ndarray],
    do_sample_frames: bool = False,
) -> BatchFeature:
    """Of a request's media, in a text of placeholders that the backend makes up."""
    placeholders = [processor.audio_token] * len(sounds)
    text = " ".join(placeholders) + processor.image_token * len(images) + processor.video_token * len(videos)
    metadata = [
        {"fps": 4.0, "duration": len(video) / 4, "total_num_frames": len(video), "video_backend": "opencv",
         "frames_indices": list(range(len(video)))}
        for video in videos
    ]  # fmt: skip
    media = {"images": images, "videos": videos, "video_metadata": metadata, "audio": sounds}
    return processor(
        text=text,
        **{name: items for name, items in media.items() if items},
        return_text_replacement_offsets=True,
        do_sample_frames=do_sample_frames,
        truncation=False,
        return_tensors="pt",
    )


def split_as_the_backend(features: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Soft tokens to those of each medium, by the rows of inputs, or the tokens of the prompt, that it has."""
    flat = features.reshape(-1, features.shape[-1])
    assert len(flat) % sum(sizes) == 0
    return list(flat.split([size * (len(flat) // sum(sizes)) for size in sizes]))


@pytest.fixture
def vllm_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gives the decoder, and nothing else, an attention of this name."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", sdpa_attention_forward)


@pytest.fixture
def media() -> dict[str, list[Any]]:
    random = np.random.default_rng(0)
    return {
        "images": [Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8))],
        "videos": [random.integers(0, 256, (length, 32, 48, 3), dtype=np.uint8) for length in (16, 3)],
        "sounds": [random.standard_normal(length).astype(np.float32) for length in (32000, 48000)],
    }


def test_every_medium_gets_the_tokens_that_were_announced(model, processor, media: dict[str, list[Any]]) -> None:
    inputs = call_as_the_backend(processor, **media)
    (offsets,) = inputs["text_replacement_offsets"]
    replacements: dict[str, list[list[int]]] = {modality: [] for modality in MODALITIES}
    for entry in offsets:
        ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
        replacements[entry["type"]].append(ids)
    announced = processor._get_num_multimodal_tokens(
        image_sizes=([224, 224],), video_sizes=([16, 224, 224], [3, 224, 224]), audio_lengths=[32000, 48000]
    )
    fields = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
    for modality, items in replacements.items():
        token_id = getattr(processor, f"{modality}_token_id")
        assert all(set(ids) == {token_id} for ids in items)
        counts = [len(ids) for ids in items]
        assert counts == announced[f"num_{modality}_tokens"]
        assert processor.tokenizer.encode(getattr(processor, f"{modality}_token"), add_special_tokens=False) == [
            token_id
        ]
        # One row each, so that media may be stored and batched one by one
        assert len(inputs[fields[modality]]) == len(items)
        mask = {"padding_mask_videos": inputs["padding_mask_videos"]} if modality == "video" else {}
        with torch.no_grad():
            features = getattr(model, f"get_{modality}_features")(inputs[fields[modality]], return_dict=True, **mask)
        rows = counts if modality == "audio" else [1] * len(items)
        parts = split_as_the_backend(features.pooler_output, rows)
        assert [len(part) for part in parts] == counts
    config = model.config
    assert max(announced["num_audio_tokens"]) <= config.audio_config.max_source_positions


def test_a_medium_is_the_same_alone_and_beside_others(processor, media: dict[str, list[Any]]) -> None:
    """vLLM keeps what the processor made of a medium, and uses it again beside others."""
    together = call_as_the_backend(processor, **media)
    for index, video in enumerate(media["videos"]):
        alone = call_as_the_backend(processor, [], [video], [])
        torch.testing.assert_close(alone["pixel_values_videos"][0], together["pixel_values_videos"][index])
        if "padding_mask_videos" in alone:
            assert torch.equal(alone["padding_mask_videos"][0], together["padding_mask_videos"][index])
    for index, sound in enumerate(media["sounds"]):
        alone = call_as_the_backend(processor, [], [], [sound])
        torch.testing.assert_close(alone["input_features"][0], together["input_features"][index])


@pytest.mark.parametrize("num_given", [3, 30])
def test_frames_may_be_left_to_the_processor(processor, num_given: int) -> None:
    """vLLM samples the frames of long videos itself, and passes all those of short ones."""
    video = np.random.default_rng(0).integers(0, 256, (num_given, 32, 48, 3), dtype=np.uint8)
    inputs = call_as_the_backend(processor, [], [video], [], do_sample_frames=True)
    assert inputs["pixel_values_videos"].shape[:2] == (1, min(num_given, processor.video_processor.num_frames))
    assert "padding_mask_videos" not in inputs


def test_the_backends_way_through_the_model_is_the_models_own(
    tiny_folder: Path, processor, media: dict[str, list[Any]], vllm_attention: None
) -> None:
    whole = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder).eval()
    config = AutoConfig.from_pretrained(tiny_folder)
    config.text_config._attn_implementation = "vllm"
    base = AutoModel.from_config(config).eval()
    base.load_state_dict(whole.model.state_dict())
    text = f"{processor.audio_token} {processor.video_token} {processor.audio_token}{processor.image_token} And?"
    inputs = processor(
        text=text, images=media["images"], videos=media["videos"][:1], audio=media["sounds"], return_tensors="pt"
    )
    given = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
    with torch.no_grad():
        expected = whole.model(**inputs).last_hidden_state
        # The prompt is embedded by the decoder alone, and soft tokens are put into it from outside
        embeds = base.language_model.get_input_embeddings()(inputs["input_ids"])
        for modality, name in given.items():
            features = getattr(base, f"get_{modality}_features")(inputs[name], return_dict=True).pooler_output
            mask = inputs["input_ids"] == getattr(config, f"{modality}_token_id")
            embeds[mask] = features.flatten(0, 1)
        positions = torch.arange(embeds.shape[1])[None]
        output = base(input_ids=None, inputs_embeds=embeds, position_ids=positions, use_cache=False, return_dict=False)
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-4)


def test_placeholders_past_the_vocabulary_can_be_embedded_as_vllm_does(vllm_attention: None) -> None:
    config = tiny_config()
    config.text_config._attn_implementation = "vllm"
    model = AutoModel.from_config(config)
    ids = torch.tensor([[5, config.image_token_id, config.video_token_id, config.audio_token_id]])
    assert ids.max() >= VOCAB_SIZE
    embeddings = model.language_model.get_input_embeddings()
    assert embeddings(ids).shape == (1, 4, config.text_config.hidden_size)
    assert torch.equal(embeddings(ids)[0, 0], embeddings.weight[5])


def test_decoder_and_encoders_are_found_by_their_modality(model: VideoLlamaModel) -> None:
    assert model.get_decoder() is model.language_model
    assert model.get_encoder(modality="image") is model.get_encoder(modality="video") is model.vision_tower
    assert model.get_encoder(modality="audio") is model.audio_tower


def test_the_decoder_alone_is_shared_out_over_gpus(model: VideoLlamaModel) -> None:
    assert model.tp_plan
    assert all(name.startswith("language_model.") for name in model.tp_plan)
    assert model.supports_pp_plan
    modules = [attrgetter(name)(model) for name in model._pp_plan]
    (layers,) = [module for module in modules if isinstance(module, nn.ModuleList)]
    assert layers is model.language_model.layers
    # Projections that the backend finds in `forward` are shared out as well, which these would not survive
    source = inspect.getsource(VideoLlamaAudioAttention.forward)
    assert "self.k_proj(" not in source and "self.v_proj(" not in source


def test_the_arguments_of_the_processors_parts_are_declared(processor) -> None:
    scopes = get_type_hints(processor.valid_processor_kwargs)
    assert {"text_kwargs", "audio_kwargs"} <= set(scopes)
    assert "num_frames" in {
        name
        for part in processor.video_processor.valid_kwargs.__mro__
        for name in getattr(part, "__annotations__", {})
    }
    assert processor.image_processor.valid_kwargs.__annotations__ is not None
    for part in (processor.image_processor, processor.video_processor):
        assert part.size.get("height") and part.size.get("width")
    assert processor.feature_extractor.sampling_rate > 0


def test_a_tokenizer_renders_chats_as_the_processor_does(tiny_folder: Path, processor) -> None:
    """Servers do, with entries that only mark where the media are."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    entries = [{"type": "audio"}, {"type": "video"}, {"type": "text", "text": "What do you see?"}]
    chat = [{"role": "user", "content": entries}]
    rendered = tokenizer.apply_chat_template(
        chat, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert rendered == processor.apply_chat_template(chat, add_generation_prompt=True)
    assert rendered.count(processor.video_token) == rendered.count(processor.audio_token) == 1
