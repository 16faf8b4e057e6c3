"""The conversion script: what it makes of the published files, and what it says when something is wrong with them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import convert_video_llama_checkpoint as script  # from conversion/, put on the path by conftest.py
import pytest
import torch
from conftest import REFERENCE, REFERENCE_FLAGS
from model_config import choose_family, choose_heads
from published_names import translate
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration

TINY = REFERENCE / "tiny"
SCRIPT = Path(script.__file__)
# For processes that import the script
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def files() -> dict[str, Path]:
    """The reference set of published files, by flag."""
    return {flag: TINY / name for flag, name in REFERENCE_FLAGS.items()}


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, Path, str]]:
    """Runs the command line on files by flag. Gives the exit status, the output folder and what was said."""

    def run(files: dict[str, Path], *options: str, output: str = "converted") -> tuple[int, Path, str]:
        capsys.readouterr()
        folder = tmp_path / output
        status = script.main([*arguments(files), "--output-dir", str(folder), *options])
        return status, folder, capsys.readouterr().err

    return run


def arguments(files: dict[str, Path]) -> list[str]:
    return [part for flag, path in files.items() for part in (flag, str(path))]


def published(name: str) -> dict:
    """The content of a file of the reference set."""
    return torch.load(TINY / name, weights_only=True)


def save_changed(folder: Path, name: str, change: Callable[[dict], None]) -> Path:
    """A copy of a published file in which `change` has changed the tensors."""
    content = published(name)
    change(content.get("model", content))
    torch.save(content, folder / name)
    return folder / name


def copy_decoder(folder: Path, change: Callable[[dict], None] = lambda weights: None, **config: object) -> Path:
    """A copy of the reference set's decoder with other weights and fields of the configuration."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "llama" / name, folder / name)
    fields = json.loads((TINY / "llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))
    weights = load_file(TINY / "llama" / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = load_weights(folder), load_weights(other)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# What comes out


def test_command_line(tmp_path, files, tiny_folder):
    """The published flags alone are enough, and the script runs from anywhere."""
    folder = tmp_path / "converted"
    command = [sys.executable, str(SCRIPT), *arguments(files), "--output-dir", str(folder)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Writing weights" in result.stderr  # the progress bar
    assert_same_weights(folder, tiny_folder)


def test_sizes_are_read_off_the_files(tiny_folder):
    config = VideoLlamaConfig.from_pretrained(tiny_folder)
    vision, qformer, audio = config.vision_config, config.qformer_config, config.audio_config
    assert (vision.hidden_size, vision.intermediate_size, vision.patch_size) == (32, 139, 32)
    assert vision.num_hidden_layers == 3  # the file has a fourth block, which the published model does not run
    assert (qformer.num_hidden_layers, qformer.cross_attention_frequency, qformer.encoder_hidden_size) == (4, 2, 32)
    assert config.video_qformer_config.cross_attention_frequency == 1
    assert (config.num_query_tokens, config.num_video_query_tokens, config.num_audio_query_tokens) == (4, 5, 3)
    assert (config.max_frames, audio.max_source_positions, audio.projection_dim) == (32, 8, 48)
    heads = [
        part.num_attention_heads for part in (vision, qformer, config.video_qformer_config, audio, config.text_config)
    ]
    assert heads == [4] * 5
    assert config.text_config.max_position_embeddings == 512
    assert config.dtype == torch.float32


def test_every_published_tensor_is_used_once_or_known_to_be_unused(tiny_folder):
    prefixes = {"eva_vit_g.pth": "visual_encoder.", "imagebind_huge.pth": "audio_encoder."}
    names = []
    for file in TINY.glob("*.pth"):
        content = published(file.name)
        for key in content.get("model", content):
            names += translate(prefixes.get(file.name, "") + key)
    names = [name for name in names if ".layers.3." not in name or "vision_tower" not in name]  # the ViT's last block
    repeated = {name for name in names if names.count(name) > 1}
    assert repeated == {
        "model.video_branch.projector.weight",
        "model.video_branch.projector.bias",
    }  # MiniGPT-4's as well
    written = set(load_weights(tiny_folder))
    written |= {f"model.audio_vision_tower.{name}" for name in load_weights(tiny_folder / "audio_vision_tower")}
    assert set(names) == {name for name in written if "language_model" not in name and name != "lm_head.weight"}


def test_values(tiny_folder):
    weights = load_weights(tiny_folder)
    vit, imagebind = published("eva_vit_g.pth"), published("imagebind_huge.pth")
    query, key, value = vit["blocks.1.attn.qkv.weight"].split(32)
    attention = "model.vision_tower.encoder.layers.1.self_attn."
    assert torch.equal(weights[f"{attention}q_proj.weight"], query)
    assert torch.equal(weights[f"{attention}k_proj.weight"], key)
    assert torch.equal(weights[f"{attention}v_proj.weight"], value)
    assert torch.equal(weights[f"{attention}v_proj.bias"], vit["blocks.1.attn.v_bias"])
    assert f"{attention}k_proj.bias" not in weights
    biases = imagebind["modality_trunks.audio.blocks.0.attn.in_proj_bias"].split(24)
    for name, bias in zip("qkv", biases, strict=True):
        assert torch.equal(weights[f"model.audio_tower.encoder.layers.0.self_attn.{name}_proj.bias"], bias)
    # The video-branch file overwrites MiniGPT-4's projection.
    assert torch.equal(
        weights["model.video_branch.projector.weight"], published("finetune_vl.pth")["model"]["llama_proj.weight"]
    )


def test_folder_is_complete(tiny_folder):
    model, info = AutoModelForImageTextToText.from_pretrained(tiny_folder, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(model, VideoLlamaForConditionalGeneration)
    processor = AutoProcessor.from_pretrained(tiny_folder)
    token_ids = [model.config.image_token_id, model.config.video_token_id, model.config.audio_token_id]
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>", "<audio>"]) == token_ids == [259, 260, 261]
    assert (processor.num_image_tokens, processor.num_video_tokens, processor.num_audio_tokens) == (5, 5, 3)
    assert not (tiny_folder / ".incomplete").exists()
    assert str(TINY) not in (tiny_folder / "config.json").read_text()


@pytest.mark.parametrize("family, stop", [("vicuna", "###"), ("llama_2", None), ("plain", "\n")])
def test_generation_config(convert, files, family, stop):
    status, folder, _ = convert(files, "--family", family)
    assert status == 0
    config = GenerationConfig.from_pretrained(folder)
    sampling = (config.max_new_tokens, config.do_sample, config.top_p, config.temperature, config.repetition_penalty)
    assert sampling == (300, True, 0.9, 1.0, 1.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config.stop_strings == ([stop] if stop else None)
    if stop:
        tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
        spellings = config.stop_string_token_ids[stop]
        assert len(spellings) == 2  # at the start of a word and inside one
        assert {tokenizer.decode(ids).strip(" ") for ids in spellings} == {stop}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(convert, files, dtype):
    status, folder, _ = convert(files, "--dtype", dtype)
    assert status == 0
    weights = load_weights(folder)
    assert weights["model.vision_tower.post_layernorm.weight"].dtype == torch.float32
    assert weights["model.audio_tower.logit_scale"].dtype == torch.float32
    assert weights["model.language_model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert model.dtype == model.config.text_config.dtype == getattr(torch, dtype)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_dtype_is_the_decoders_by_default(convert, files, tmp_path):
    files["--llama"] = copy_decoder(tmp_path / "llama", torch_dtype="bfloat16")
    _, folder, _ = convert(files)
    assert load_weights(folder)["model.query_tokens"].dtype == torch.bfloat16


# Which files may be given


def test_without_audio_branch(convert, files, tiny_folder):
    for flag in ("--imagebind", "--al-checkpoint", "--minigpt4"):
        del files[flag]
    status, folder, _ = convert(files)
    assert status == 0
    model, info = VideoLlamaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.audio_config is None
    assert not AutoProcessor.from_pretrained(folder).load_audio_from_video
    with_sound, weights = load_weights(tiny_folder), load_weights(folder)
    assert all(torch.equal(weights[name], with_sound[name]) for name in weights)
    assert {name.split(".")[1] for name in set(with_sound) - set(weights)} == {"audio_tower", "audio_branch"}


def test_imagebind_without_audio_branch_is_left_out(convert, files, caplog):
    del files["--al-checkpoint"]
    status, folder, _ = convert(files)
    assert status == 0
    assert "does not hear" in caplog.text
    assert VideoLlamaConfig.from_pretrained(folder).audio_config is None


def test_projection_of_minigpt4(convert, files, tmp_path):
    """Of a video-branch file without projection, MiniGPT-4's counts."""

    def drop_projection(weights):
        del weights["llama_proj.weight"], weights["llama_proj.bias"]

    files["--vl-checkpoint"] = save_changed(tmp_path, "finetune_vl.pth", drop_projection)
    status, folder, _ = convert(files)
    assert status == 0
    projection = published("pretrained_minigpt4.pth")["model"]["llama_proj.weight"]
    assert torch.equal(load_weights(folder)["model.video_branch.projector.weight"], projection)


def whole_model() -> dict[str, torch.Tensor]:
    """All weights under the names of a published archive of the whole model."""
    vit = published("eva_vit_g.pth")
    unused = ("blocks.3.", "norm.", "head.")
    weights = {f"visual_encoder.{key}": value for key, value in vit.items() if not key.startswith(unused)}
    weights |= {f"audio_encoder.{key}": value for key, value in published("imagebind_huge.pth").items()}
    for name in ("blip2_pretrained_flant5xxl.pth", "finetune_vl.pth", "finetune_al.pth"):
        weights |= published(name)["model"]
    weights |= {f"llama_model.{key}": value for key, value in load_file(TINY / "llama" / "model.safetensors").items()}
    return weights | {"llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}


@pytest.mark.parametrize("form", ["pth", "wrapped pth", "bin shards", "safetensors shards"])
def test_all_in_one(convert, tmp_path, tiny_folder, form):
    weights = whole_model()
    archive = tmp_path / "archive"
    if form == "pth":
        torch.save(weights, archive)
    elif form == "wrapped pth":
        torch.save({"model": weights, "epoch": 3, "optimizer": {"state": {}}}, archive)
    else:
        archive.mkdir()
        weights = {key: value.contiguous().clone() for key, value in weights.items()}
        halves = [dict(list(weights.items())[start::2]) for start in range(2)]
        for number, half in enumerate(halves):
            if form == "bin shards":
                torch.save(half, archive / f"part-{number}.bin")
            else:
                save_file(half, archive / f"model-{number}.safetensors")
        if form == "safetensors shards":
            weight_map = {key: f"model-{number}.safetensors" for number, half in enumerate(halves) for key in half}
            (archive / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    decoder = copy_decoder(
        tmp_path / "llama", change=lambda weights: [w.zero_() for k, w in weights.items() if "proj" in k]
    )
    status, folder, said = convert({"--all-in-one": archive, "--llama": decoder})
    assert status == 0, said
    assert_same_weights(folder, tiny_folder)  # the decoder's weights are the archive's, not the folder's


def test_archive_over_a_decoder_folder_without_weights(convert, tmp_path, tiny_folder):
    torch.save(whole_model(), tmp_path / "archive.pth")
    decoder = copy_decoder(tmp_path / "llama")
    (decoder / "model.safetensors").unlink()
    status, folder, said = convert({"--all-in-one": tmp_path / "archive.pth", "--llama": decoder})
    assert status == 0, said
    assert_same_weights(folder, tiny_folder)


def test_decoder_in_pytorch_shards(convert, files, tmp_path, tiny_folder):
    decoder = copy_decoder(tmp_path / "llama")
    weights = load_file(decoder / "model.safetensors")
    (decoder / "model.safetensors").unlink()
    shards = {key: f"pytorch_model-{i % 3}.bin" for i, key in enumerate(weights)}
    for shard in set(shards.values()):
        torch.save({key: weights[key] for key in weights if shards[key] == shard}, decoder / shard)
    (decoder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    status, folder, _ = convert(files | {"--llama": decoder})
    assert status == 0
    assert_same_weights(folder, tiny_folder)


def test_old_pytorch_format(convert, files, tmp_path, tiny_folder, caplog):
    torch.save(published("eva_vit_g.pth"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    status, folder, _ = convert(files | {"--eva-vit": tmp_path / "old.pth"})
    assert status == 0
    assert "old format" in caplog.text
    assert_same_weights(folder, tiny_folder)


def test_tied_embeddings(convert, files, tmp_path):
    decoder = copy_decoder(
        tmp_path / "llama", change=lambda weights: weights.pop("lm_head.weight"), tie_word_embeddings=True
    )
    status, folder, said = convert(files | {"--llama": decoder})
    assert status == 0, said
    model, info = VideoLlamaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.get_input_embeddings().weight


# A decoder that is published as a difference


def save_delta(folder: Path, new_rows: int = 0, config: bool = True) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random difference to the reference set's decoder, with more rows in its vocabulary."""
    generator = torch.Generator().manual_seed(0)
    delta = {}
    for key, value in load_file(TINY / "llama" / "model.safetensors").items():
        rows = value.shape[0] + (new_rows if value.shape[0] == 270 else 0)
        delta[key] = 0.02 * torch.randn(rows, *value.shape[1:], generator=generator)
    copy_decoder(folder, vocab_size=270 + new_rows)
    (folder / "model.safetensors").unlink()
    if not config:
        for file in folder.iterdir():
            file.unlink()
    torch.save(delta, folder / "pytorch_model.bin")
    return folder, delta


@pytest.mark.parametrize("new_rows, config", [(0, True), (0, False), (1, True), (1, False)])
def test_delta(convert, files, tmp_path, new_rows, config):
    folder, delta = save_delta(tmp_path / "delta", new_rows, config)
    status, converted, said = convert(files, "--llama-delta", str(folder))
    assert status == 0, said
    weights = load_weights(converted)
    for key, base in load_file(TINY / "llama" / "model.safetensors").items():
        merged = weights[translate(f"llama_model.{key}")[0]]
        assert torch.equal(merged[: base.shape[0]], base + delta[key][: base.shape[0]])
        assert torch.equal(merged[base.shape[0] :], delta[key][base.shape[0] :])
    assert VideoLlamaConfig.from_pretrained(converted).text_config.vocab_size == 270 + new_rows


def test_delta_row_for_padding(convert, files, tmp_path):
    """
    Vicuna v0 has one token more than LLaMA, for padding: it is added to LLaMA's tokenizer, before the
    placeholders.
    """

    def cut_vocabulary(weights):
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[key] = weights[key][:259].clone()  # as many as the tokenizer has

    files["--llama"] = copy_decoder(tmp_path / "llama", cut_vocabulary, vocab_size=259)
    delta = {
        key: torch.full_like(value, 0.01) for key, value in load_file(files["--llama"] / "model.safetensors").items()
    }
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        delta[key] = torch.full((260, 48), 0.01)
    (tmp_path / "delta").mkdir()
    save_file(delta, tmp_path / "delta" / "model.safetensors")
    status, folder, said = convert(files, "--llama-delta", str(tmp_path / "delta"))
    assert status == 0, said
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 259)
    assert VideoLlamaConfig.from_pretrained(folder).image_token_id == 260


def test_delta_as_decoder(convert, files, tmp_path):
    folder, _ = save_delta(tmp_path / "delta")
    status, _, said = convert(files | {"--llama": folder})
    assert status == 1
    assert "difference" in said and "--llama-delta" in said


def test_decoder_as_delta(convert, files, tmp_path):
    status, _, said = convert(files, "--llama-delta", str(copy_decoder(tmp_path / "delta")))
    assert status == 1
    assert "complete weights" in said


def test_delta_of_another_model(convert, files, tmp_path):
    folder, delta = save_delta(tmp_path / "delta")
    torch.save({key: torch.cat([value, value]) for key, value in delta.items()}, folder / "pytorch_model.bin")
    status, _, said = convert(files, "--llama-delta", str(folder))
    assert status == 1
    assert "does not fit" in said
    torch.save({"model.norm.weight": delta["model.norm.weight"]}, folder / "pytorch_model.bin")
    status, _, said = convert(files, "--llama-delta", str(folder))
    assert status == 1
    assert "do not hold the same tensors" in said and "lm_head.weight" in said


# What is refused, and what is said then


def test_parts_that_no_file_holds(convert, files):
    del files["--blip2"]
    status, folder, said = convert(files)
    assert status == 1
    assert not folder.exists()
    for name in ("model.query_tokens", "model.qformer.", "model.vision_tower.post_layernorm.", "--blip2"):
        assert name in said
    assert "Traceback" not in said


def test_missing_and_unexpected_tensors_are_listed(convert, files, tmp_path):
    def rename(weights):
        weights["video_Qformer.bert.nonsense"] = weights.pop(
            "video_Qformer.bert.encoder.layer.1.output_query.dense.weight"
        )

    files["--vl-checkpoint"] = save_changed(tmp_path, "finetune_vl.pth", rename)
    status, _, said = convert(files, "--ignore-unexpected")
    assert status == 1
    assert "model.video_branch.qformer.encoder.layer.1.output_query.dense.weight" in said
    assert "video_Qformer.bert.encoder.layer.1.output_query.dense.weight" in said  # what the file should call it
    assert "video_Qformer.bert.nonsense" in said and "finetune_vl.pth" in said


def test_missing_layers_are_listed_as_one_line(convert, files, tmp_path):
    def drop_layers(weights):
        for key in list(weights):
            if ".norm1.weight" in key:
                del weights[key]

    files["--eva-vit"] = save_changed(tmp_path, "eva_vit_g.pth", drop_layers)
    _, _, said = convert(files)
    assert "3 missing" in said
    assert "visual_encoder.blocks.2.norm1.weight" in said


def test_unexpected_tensors(convert, files, tmp_path, tiny_folder):
    def add(weights):
        weights["lora_a"] = torch.ones(2)

    files["--al-checkpoint"] = save_changed(tmp_path, "finetune_al.pth", add)
    status, _, said = convert(files)
    assert status == 1
    assert "lora_a" in said and "--ignore-unexpected" in said
    status, folder, _ = convert(files, "--ignore-unexpected")
    assert status == 0
    assert_same_weights(folder, tiny_folder)


@pytest.mark.parametrize(
    "flag, name, words",
    [
        ("--vl-checkpoint", "finetune_al.pth", ("an audio-branch file", "--al-checkpoint")),
        ("--al-checkpoint", "finetune_vl.pth", ("a video-branch file", "--vl-checkpoint")),
        ("--vl-checkpoint", "pretrained_minigpt4.pth", ("MiniGPT-4's projection", "--minigpt4")),
        ("--eva-vit", "imagebind_huge.pth", ("ImageBind", "--imagebind")),
        ("--imagebind", "eva_vit_g.pth", ("EVA-CLIP's ViT", "--eva-vit")),
        ("--blip2", "llama/model.safetensors", ("a decoder", "--llama")),
        ("--minigpt4", "blip2_pretrained_flant5xxl.pth", ("BLIP-2's file", "--blip2")),
    ],
)
def test_swapped_files(convert, files, flag, name, words):
    status, folder, said = convert(files | {flag: TINY / name})
    assert status == 1
    assert not folder.exists()
    assert all(word in said for word in (flag, *words))


def test_file_of_something_else(convert, files, tmp_path):
    torch.save({"conv1.weight": torch.ones(3), "fc.bias": torch.ones(2)}, tmp_path / "resnet.pth")
    status, _, said = convert(files | {"--vl-checkpoint": tmp_path / "resnet.pth"})
    assert status == 1
    assert "resnet.pth" in said and "conv1.weight" in said


@pytest.mark.parametrize("decoder, branch, words", [(4096, 5120, "a 13B file with a 7B decoder"),
                                                    (5120, 4096, "a 7B file with a 13B decoder")])  # fmt: skip
def test_branch_of_another_decoder(convert, files, tmp_path, decoder, branch, words):
    def resize(weights):
        weights["llama_proj.weight"] = torch.zeros(branch, 32)

    def widen(weights):
        weights["model.embed_tokens.weight"] = torch.zeros(270, decoder)

    files["--vl-checkpoint"] = save_changed(tmp_path, "finetune_vl.pth", resize)
    files["--llama"] = copy_decoder(tmp_path / "llama", widen, hidden_size=decoder)
    status, _, said = convert(files)
    assert status == 1
    assert words in said and str(decoder) in said and str(branch) in said and "finetune_vl.pth" in said


def test_decoder_weights_of_another_configuration(convert, files, tmp_path):
    decoder = copy_decoder(tmp_path / "llama", num_hidden_layers=3)
    status, _, said = convert(files | {"--llama": decoder})
    assert status == 1
    assert "model.language_model.layers.2.mlp.up_proj.weight" in said
    decoder = copy_decoder(tmp_path / "llama1", num_hidden_layers=1)
    status, _, said = convert(files | {"--llama": decoder})
    assert status == 1
    assert "model.language_model.layers.1.mlp.up_proj.weight" in said and "different sizes" in said
    decoder = copy_decoder(tmp_path / "llama2", intermediate_size=100)
    status, _, said = convert(files | {"--llama": decoder})
    assert status == 1
    assert "[96, 48]" in said and "[100, 48]" in said


def test_vocabulary_of_another_version(convert, files, tmp_path):
    decoder = copy_decoder(tmp_path / "llama", vocab_size=271)
    status, _, said = convert(files | {"--llama": decoder})
    assert status == 1
    assert "271" in said and "270" in said and "v1.1" in said


@pytest.mark.parametrize("evidence", ["folder", "vocabulary"])
def test_vicuna_of_another_version(convert, files, tmp_path, evidence):
    def grow(weights):
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[key] = torch.zeros(32000, 48)

    content = published("finetune_vl.pth")
    content["config"] = {"model": {"model_type": "pretrain_vicuna", "llama_model": "ckpt/vicuna-7b/"}}
    torch.save(content, tmp_path / "vl.pth")
    files["--vl-checkpoint"] = tmp_path / "vl.pth"
    if evidence == "folder":
        files["--llama"] = copy_decoder(tmp_path / "vicuna-7b-v1.5")
    else:
        files["--llama"] = copy_decoder(tmp_path / "llama", grow, vocab_size=32000)
    status, _, said = convert(files)
    assert status == 1
    assert "v1.1" in said and "v0" in said and "--llama-delta" in said
    status, _, _ = convert(files, "--family", "vicuna")
    assert status == 0


@pytest.mark.parametrize(
    "folder, training, family",
    [
        ("Llama-2-7b-chat-hf", [], "llama_2"),
        ("vicuna-7b-v0", [], "vicuna"),
        ("BiLLa-7B-SFT", [], "vicuna"),
        ("Ziya-LLaMA-13B-v1", [], "vicuna"),
        ("llama", [{"run": {"seed": 42}}], "plain"),
        ("decoder", [{"model": {"model_type": "llama_v2", "llama_model": "/data/decoder"}}], "llama_2"),
        ("decoder", [{"model": {"llama_model": "ckpt/vicuna-13b/"}}], "vicuna"),
    ],
)
def test_family(tmp_path, folder, training, family):
    (tmp_path / folder).mkdir()
    config = VideoLlamaConfig.from_variant("vicuna-7b").text_config
    config.vocab_size = 32001
    assert choose_family([tmp_path / folder], config, training) == family


def test_encoder_of_another_resolution(convert, files, tmp_path):
    def enlarge(weights):
        weights["pos_embed"] = torch.zeros(1, 1 + 11 * 11, 32)

    files["--eva-vit"] = save_changed(tmp_path, "eva_vit_g.pth", enlarge)
    status, _, said = convert(files)
    assert status == 1
    assert "122 positions" in said and "352 px" in said and "need 50" in said


def test_parts_of_other_widths(convert, files, tmp_path):
    def widen(weights):
        for key in list(weights):
            if ".crossattention.self.key.weight" in key or ".crossattention.self.value.weight" in key:
                weights[key] = torch.zeros(32, 40)

    files["--blip2"] = save_changed(tmp_path, "blip2_pretrained_flant5xxl.pth", widen)
    status, _, said = convert(files)
    assert status == 1
    assert "do not fit together" in said and "40" in said and "32" in said and "eva_vit_g.pth" in said


def test_values_that_are_not_numbers(convert, files, tmp_path):
    files["--eva-vit"] = save_changed(tmp_path, "eva_vit_g.pth", lambda weights: weights["cls_token"].fill_(1e6))
    status, folder, said = convert(files, "--dtype", "float16")
    assert status == 1
    assert "cls_token" in said and "--dtype" in said
    assert not folder.exists()
    assert convert(files)[0] == 0


class Malicious:
    def __reduce__(self):
        return os.makedirs, ("executed",)


def test_files_that_cannot_be_read(convert, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (TINY / "eva_vit_g.pth").read_bytes()
    broken = {
        "cut.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "page.pth": b"<html>Not found</html>",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "code.pth": pickle.dumps({"cls_token": Malicious()}),
        "cut.safetensors": (TINY / "llama" / "model.safetensors").read_bytes()[:1000],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        status, folder, said = convert(files | {"--eva-vit": tmp_path / name})
        assert status == 1
        assert said.startswith("error: ") and name in said and len(said.strip().splitlines()) == 1
        assert not folder.exists()
    torch.save({"cls_token": Malicious()}, tmp_path / "code.zip")
    assert convert(files | {"--eva-vit": tmp_path / "code.zip"})[0] == 1
    assert not (tmp_path / "executed").exists()


def test_paths_that_are_not_there(convert, files, tmp_path):
    status, _, said = convert(files | {"--eva-vit": tmp_path / "nothing.pth"})
    assert status == 1 and "nothing.pth" in said and "--eva-vit" in said
    status, _, said = convert(files | {"--llama": TINY / "llama" / "model.safetensors"})
    assert status == 1 and "folder" in said
    status, _, said = convert({flag: path for flag, path in files.items() if flag != "--llama"})
    assert status == 1 and "--llama" in said
    (tmp_path / "bare").mkdir()
    status, _, said = convert(files | {"--llama": tmp_path / "bare"})
    assert status == 1 and "--llama" in said
    decoder = copy_decoder(tmp_path / "llama")
    weight_map = {"lm_head.weight": "model-1.safetensors", "model.norm.weight": "model-2.safetensors"}
    (decoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    status, _, said = convert(files | {"--llama": decoder})
    assert status == 1 and "model-2.safetensors" in said


def test_output_folder_of_another_model(convert, files, tmp_path):
    decoder = copy_decoder(tmp_path / "llama")
    before = {file.name: file.read_bytes() for file in decoder.iterdir()}
    for inputs in (files | {"--llama": decoder}, files):
        status, _, said = convert(inputs, output="llama")
        assert status == 1
        assert "would be lost" in said
    assert {file.name: file.read_bytes() for file in decoder.iterdir()} == before


# Heads, which the weights do not tell


def test_heads_of_published_widths():
    widths = {"vision_config": 1408, "qformer_config": 768, "audio_config": 768, "audio_vision_config": 1280}
    assert [choose_heads(part, part, width, {}, {}) for part, width in widths.items()] == [16, 12, 12, 16]


def test_heads_of_other_widths(convert, files, tmp_path, caplog):
    """Without a `meta.json` beside the files, reduced parts have four heads, and the assumption is announced."""
    copies = {flag: shutil.copy(path, tmp_path) for flag, path in files.items() if flag != "--llama"}
    status, folder, _ = convert(
        copies | {"--llama": files["--llama"]} | {"--llama": copy_decoder(tmp_path / "x" / "llama")}
    )
    assert status == 0
    assert VideoLlamaConfig.from_pretrained(folder).audio_config.num_attention_heads == 4
    assert "audio_config" in caplog.text and "num_attention_heads" in caplog.text
    caplog.clear()
    overrides = tmp_path / "overrides.json"
    overrides.write_text(json.dumps({"audio_config": {"num_attention_heads": 2}, "frame_chunk_size": 8}))
    status, folder, _ = convert(copies | {"--llama": tmp_path / "x" / "llama"}, "--config", str(overrides))
    assert status == 0
    config = VideoLlamaConfig.from_pretrained(folder)
    assert (config.audio_config.num_attention_heads, config.frame_chunk_size) == (2, 8)
    assert "audio_config" not in caplog.text


def test_overrides_that_are_wrong(convert, files):
    wrong = {
        "{": "--config",
        "nowhere.json": "nowhere.json",
        '{"vision_config": {"num_attention_heads": 5}}': "num_attention_heads",
        '{"vision_config": {"num_heads": 4}}': "num_heads",
        '{"hidden_size": 4}': "hidden_size",
    }
    for overrides, word in wrong.items():
        status, _, said = convert(files, "--config", overrides)
        assert status == 1
        assert word in said and "Traceback" not in said


# Shards, interruptions, memory


def test_shards(convert, files, tiny_folder):
    status, folder, _ = convert(files, "--max-shard-size", "200KB")
    assert status == 0
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_same_weights(folder, tiny_folder)
    assert_same_weights(folder / "audio_vision_tower", tiny_folder / "audio_vision_tower")
    assert (
        VideoLlamaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]
        == set()
    )
    # A conversion to the same folder leaves none of the old shards.
    (folder / "notes.txt").write_text("mine")
    for flag in ("--imagebind", "--al-checkpoint"):
        del files[flag]
    status, folder, _ = convert(files)
    assert status == 0
    assert [file.name for file in folder.rglob("*.safetensors*")] == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_check_without_loading(convert, files, monkeypatch):
    """Large models are checked without room for their values."""
    monkeypatch.setattr(script, "LOAD_BYTES", 0)
    assert convert(files, "--max-shard-size", "500KB")[0] == 0


@pytest.mark.parametrize("load_bytes", [0, script.LOAD_BYTES])
def test_configuration_that_does_not_fit_is_noticed(convert, files, monkeypatch, load_bytes):
    save_pretrained = VideoLlamaConfig.save_pretrained

    def save_another(self, folder):
        self.vision_config.num_hidden_layers += 1
        save_pretrained(self, folder)

    monkeypatch.setattr(VideoLlamaConfig, "save_pretrained", save_another)
    monkeypatch.setattr(script, "LOAD_BYTES", load_bytes)
    status, folder, said = convert(files)
    assert status == 1
    assert "does not load as a whole" in said and "model.vision_tower.encoder.layers.3" in said
    assert not folder.exists()


def test_damage_on_the_disk_is_noticed(convert, files, tmp_path, monkeypatch):
    make_generation_config = script._make_generation_config

    def damage(processor):
        with open(tmp_path / "converted" / ".incomplete" / "model.safetensors", "r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"damaged!")
        return make_generation_config(processor)

    monkeypatch.setattr(script, "_make_generation_config", damage)
    status, folder, said = convert(files)
    assert status == 1
    assert "is not what was written" in said
    assert not folder.exists()


def test_interrupted(convert, files, monkeypatch):
    write_shard = script.write_shard

    def interrupted_write_shard(path, specs, read):
        for count, written in enumerate(write_shard(path, specs, read)):
            if count == 100:
                raise KeyboardInterrupt
            yield written

    monkeypatch.setattr(script, "write_shard", interrupted_write_shard)
    status, folder, said = convert(files)
    assert status == 130
    assert "Traceback" not in said
    assert not folder.exists()


# The process ends when the first shard is about to get its name.
CRASH = """
import os, sys
import convert_video_llama_checkpoint as script
os.replace = lambda *paths: os._exit(9)
script.main(sys.argv[1:])
"""


def test_killed(tmp_path, files, convert, tiny_folder):
    """What a crash leaves does not load, does not stand in the way, and does not harm an earlier conversion."""
    folder = tmp_path / "converted"
    command = [sys.executable, "-c", CRASH, *arguments(files), "--output-dir", str(folder)]

    def crash() -> None:
        assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == 9
        assert list((folder / ".incomplete").iterdir())

    crash()
    with pytest.raises(OSError):
        VideoLlamaForConditionalGeneration.from_pretrained(folder)
    assert convert(files)[0] == 0
    assert not (folder / ".incomplete").exists()
    crash()
    assert_same_weights(folder, tiny_folder)
    assert (
        VideoLlamaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]
        == set()
    )


# Converts a small model, for the memory that every conversion needs, then a large one. Prints what that needed in MiB.
MEASURE = """
import json, resource, sys
import convert_video_llama_checkpoint as script
import weight_files
weight_files.MAPPED_BYTES = 32 * 2**20
peaks = []
for arguments in map(json.loads, sys.argv[1:]):
    assert script.main(arguments) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="the unit of ru_maxrss and what counts as resident differ elsewhere"
)
def test_memory(tmp_path, files):
    """Converting 350 MB in shards of 30 MB takes the memory of a few tensors, mapped pages of the files included."""
    width, layers = 768, 12

    def enlarge(weights):
        shapes = {"up_proj": (3072, width), "gate_proj": (3072, width), "down_proj": (width, 3072), "embed": (270,
        width),
                  "lm_head": (270, width), "norm": (width,), "proj": (width, width)}  # fmt: skip
        for key in list(weights):
            layer = [key.replace(".0.", f".{i}.") for i in range(layers)] if ".0." in key else [key]
            shape = next(shape for part, shape in shapes.items() if part in key)
            for name in layer:
                weights[name] = torch.full(shape, 0.5)

    decoder = copy_decoder(
        tmp_path / "llama", enlarge, hidden_size=width, intermediate_size=3072, num_hidden_layers=layers
    )
    assert (decoder / "model.safetensors").stat().st_size > 350e6

    def widen(key):
        return lambda weights: weights.update(
            {f"{key}.weight": torch.zeros(width, 32), f"{key}.bias": torch.zeros(width)}
        )

    large = files | {
        "--llama": decoder,
        "--vl-checkpoint": save_changed(tmp_path, "finetune_vl.pth", widen("llama_proj")),
        "--al-checkpoint": save_changed(tmp_path, "finetune_al.pth", widen("audio_llama_proj")),
    }
    commands = [
        json.dumps([*arguments(small_or_large), "--output-dir", str(tmp_path / name), "--max-shard-size", "30MB"])
        for name, small_or_large in (("small", files), ("large", large))
    ]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *commands], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[-1]) < 100


# To the Hub


def test_push_to_hub(convert, files, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options["exist_ok"]))

        def file_exists(self, repo_id, filename):
            return False

        def upload_folder(self, *, repo_id, folder_path, **options):
            assert (Path(folder_path) / "config.json").is_file()
            assert "CC-BY-NC" in (Path(folder_path) / "README.md").read_text()
            calls.append(("upload", repo_id, Path(folder_path)))
            return "https://huggingface.co/me/video-llama/commit/0"

    monkeypatch.setattr(script, "HfApi", Hub)
    status, folder, _ = convert(files, "--push-to-hub", "me/video-llama")
    assert status == 0
    assert calls == [("create", "me/video-llama", True), ("upload", "me/video-llama", folder)]

    def refuse(self, repo_id, **options):
        raise ConnectionError("out of reach")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    status, folder, said = convert(files, "--push-to-hub", "me/video-llama", output="kept")
    assert status == 1
    assert "is complete" in said and "out of reach" in said
    assert (folder / "config.json").is_file()

    status, other, said = convert(files, "--push-to-hub", "not/a/repository", output="other")
    assert status == 1
    assert "not/a/repository" in said
    assert not other.exists()
