"""How the model is stored, loaded, placed, quantised and trained, shown by what it computes afterwards."""

from pathlib import Path

import pytest
import torch
from tiny_model import VOCAB_SIZE, batch, prompt, sounds, tiny_model, videos
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from transformers_videollama.modeling_video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel


def inputs() -> dict[str, torch.Tensor]:
    return {
        **batch(prompt(3, "video", 2, "audio", 1), prompt(6, "video", "audio", seed=1)),
        "pixel_values_videos": videos(2),
        "input_features": sounds(2),
    }


@pytest.fixture(scope="module")
def model() -> VideoLlamaForConditionalGeneration:
    # Of widths that blocks of 64 weights divide, as 4-bit quantisation needs
    decoder = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny_model(text_config=LlamaConfig(vocab_size=VOCAB_SIZE, **decoder))


@pytest.fixture(scope="module")
def expected(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@torch.no_grad()
def test_shards(model, expected, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded, info = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(**inputs()).logits, expected)


@torch.no_grad()
def test_the_model_without_its_head_loads_from_the_same_folder(model, folder):
    loaded = VideoLlamaModel.from_pretrained(folder)
    assert torch.equal(loaded(**inputs()).last_hidden_state, model.model(**inputs()).last_hidden_state)


@torch.no_grad()
def test_the_vision_tower_of_imagebind_is_optional(model, folder):
    """It is neither built nor loaded unless the configuration asks for it."""
    assert model.model.audio_vision_tower is not None
    loaded, info = VideoLlamaForConditionalGeneration.from_pretrained(
        folder, audio_vision_config=None, output_loading_info=True
    )
    assert loaded.model.audio_vision_tower is None
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(ValueError, match="load_audio_vision_tower"):
        loaded.get_audio_features(pixel_values_videos=videos(1))


@torch.no_grad()
@pytest.mark.parametrize("model_class", [VideoLlamaForConditionalGeneration, VideoLlamaModel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_islands(folder, expected, model_class, dtype):
    """The published model normalises frames and scales sounds in float32."""
    loaded = model_class.from_pretrained(folder, dtype=dtype)
    islands = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    names = {name for name, _ in loaded.named_parameters() if name.endswith("audio_tower.logit_scale")}
    names |= {name for name, _ in loaded.named_parameters() if "vision_tower.post_layernorm" in name}
    names |= {name for name, _ in loaded.named_parameters() if "audio_tower.post_layernorm" in name}
    assert islands == names
    made = model_class._from_config(loaded.config, dtype=dtype)
    assert {name for name, parameter in made.named_parameters() if parameter.dtype == torch.float32} == names
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32, dtype}
    outputs = loaded(**inputs())
    if model_class is VideoLlamaForConditionalGeneration:
        assert outputs.logits.dtype == dtype
        assert (outputs.logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_by_saving(folder, tmp_path, dtype):
    half = VideoLlamaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    half.save_pretrained(tmp_path)
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(loaded(**inputs()).logits, half(**inputs()).logits)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_offloading_to_disk_changes_nothing(model, folder, expected, tmp_path, share):
    """With memory for a share of the weights only."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=tmp_path
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(loaded(**inputs()).logits, expected)
    assert torch.equal(loaded.generate(**inputs(), num_beams=2), model.generate(**inputs(), num_beams=2))


@torch.no_grad()
@pytest.mark.parametrize("as_dictionary", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_is_of_the_decoder_alone(folder, expected, tmp_path, bits, as_dictionary):
    quantization_config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    if as_dictionary:
        quantization_config = quantization_config.to_dict()
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(folder, quantization_config=quantization_config)
    quantised = {
        name
        for name, parameter in loaded.named_parameters()
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    }
    linear = {
        f"model.language_model.{name}.weight"
        for name, module in loaded.model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert quantised == linear
    # Saved first: bitsandbytes' own state changes at the first forward on a CPU
    loaded.save_pretrained(tmp_path)
    again = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path)
    logits = loaded(**inputs()).logits
    similarity = torch.cosine_similarity(logits.flatten().float(), expected.flatten(), dim=0)
    assert similarity > (0.95 if bits == 8 else 0.7)
    assert torch.equal(again(**inputs()).logits, logits)


def test_modules_to_skip_may_be_chosen(folder):
    quantization_config = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["model.language_model", "lm_head"]
    )
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(folder, quantization_config=quantization_config)
    assert loaded.model.vision_tower.encoder.layers[0].mlp.fc1.weight.dtype == torch.int8
    assert loaded.model.language_model.layers[0].mlp.up_proj.weight.is_floating_point()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model()
        trained = [model.model.video_branch, model.model.audio_branch, model.model.language_model]
        model.requires_grad_(False)
        for part in trained:
            part.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.train()
        labels = inputs()["input_ids"].masked_fill(inputs()["attention_mask"] == 0, -100)
        model(**inputs(), labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients(checkpointing=False)
    assert all(
        gradient is not None and gradient.any() for name, gradient in expected.items() if "position" not in name
    )
    checkpointed = gradients(checkpointing=True)
    torch.testing.assert_close(checkpointed, expected)


def test_encoders_stay_in_eval_mode():
    model = tiny_model().train()
    training = {name for name, part in model.model.named_children() if part.training}
    assert training == {"video_branch", "audio_branch", "language_model"}


def test_placeholders_bear_no_loss():
    model = tiny_model()
    labels = inputs()["input_ids"].masked_fill(inputs()["attention_mask"] == 0, -100)
    loss = model(**inputs(), labels=labels).loss
    text_only = labels.masked_fill(labels >= VOCAB_SIZE, -100)
    assert torch.equal(loss, model(**inputs(), labels=text_only).loss)


def test_the_tensor_parallel_plan_is_the_decoders(model):
    decoder = AutoModel.from_config(model.config.text_config)
    plan = model.tp_plan
    assert decoder.tp_plan
    for name, style in decoder.tp_plan.items():
        assert plan[f"model.language_model.{name}"] == style
    assert plan["lm_head"] == "colwise_gather_output"


@torch.no_grad()
def test_a_head_tied_to_the_embeddings_stays_tied(tmp_path):
    text_config = LlamaConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB_SIZE,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = tiny_model(text_config=text_config)
    model.save_pretrained(tmp_path)
    loaded = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)


def test_a_checkpoint_without_its_decoder(tmp_path):
    model = tiny_model()
    model.generation_config.max_new_tokens = 5
    decoder = LlamaForCausalLM(model.config.text_config)
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(model.lm_head.state_dict())
    decoder.save_pretrained(tmp_path / "decoder", max_shard_size="20KB")  # several files
    own = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("model.language", "lm_"))
    }
    model.config.text_model = str(tmp_path / "decoder")
    model.save_pretrained(tmp_path / "model", state_dict=own)

    for loaded in (
        VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "model"),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model", text_model=str(tmp_path / "decoder")),
    ):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
        assert loaded.generation_config.max_new_tokens == 5
        assert loaded.name_or_path == str(tmp_path / "model")
    torch.nn.init.normal_(loaded.lm_head.weight)
    loaded.save_pretrained(tmp_path / "whole")  # with its decoder as it is now
    whole = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole.lm_head.weight, loaded.lm_head.weight)
    assert torch.equal(
        VideoLlamaModel.from_pretrained(tmp_path / "model").language_model.norm.weight, decoder.model.norm.weight
    )
    long = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "model", interpolate_frame_positions=True)
    assert long.config.interpolate_frame_positions and torch.equal(long.lm_head.weight, model.lm_head.weight)
    for dtype, expected in ((torch.bfloat16, torch.bfloat16), ("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        cast = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=dtype)
        assert {parameter.dtype for parameter in cast.model.language_model.parameters()} == {expected}
