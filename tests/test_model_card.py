"""The model card, and what uploads put into a repository, by the Hub's own client talking to a Hub on this machine."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from local_hub import LocalHub
from test_remote_code import run
from tiny_model import tiny_config

from transformers_videollama import VideoLlamaConfig, make_model_card

VARIANTS = {
    "llama-2-7b-chat": ("llama2", "LLaMA-2-7B-Chat"),
    "llama-2-13b-chat": ("llama2", "LLaMA-2-13B-Chat"),
    "vicuna-7b": ("other", "Vicuna-7B"),
    "vicuna-13b": ("other", "Vicuna-13B"),
    "billa-7b": ("other", "BiLLA-7B"),
    "ziya-13b": ("other", "Ziya-13B"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_decoders_licence_is_the_cards(variant: str) -> None:
    license, name = VARIANTS[variant]
    card = make_model_card(VideoLlamaConfig.from_variant(variant, audio_config=None))
    assert card.data.license == license
    assert name in card.text
    if license == "other":
        assert "non-commercial research" in card.text


def test_a_model_that_hears_names_imagebinds_licence() -> None:
    card = make_model_card(VideoLlamaConfig())
    assert card.data.license == ["llama2", "cc-by-nc-4.0"]
    for words in ("ImageBind-Huge | CC-BY-NC 4.0", "EVA-CLIP ViT-g/14 | MIT", "BLIP-2 | BSD-3-Clause"):
        assert words in card.text
    assert "non-commercial use" in card.text
    deaf = make_model_card(VideoLlamaConfig(audio_config=None))
    for words in ("ImageBind", "CC-BY-NC", "sound", "hear"):
        assert words not in deaf.text.replace("above all about sounds", "")


def test_metadata_and_sizes() -> None:
    card = make_model_card(VideoLlamaConfig(), "me/my-model", base_model="me/base", tags=["mine"])
    data = ModelCard(str(card)).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "video-text-to-text"
    assert data.base_model == "me/base"
    assert data.tags == ["video_llama", "arxiv:2306.02858", "mine"]
    assert "# my-model" in card.text and 'model="me/my-model"' in card.text
    for row in (
        "| Frame encoder | 1408 | 39 | 16 |",
        "| Decoder | 4096 | 32 | 32 |",
        "| Sound encoder | 768 | 12 | 12 |",
    ):
        assert row in card.text
    assert "{" not in card.text.replace("@article{", "").replace("= {", "")


def test_an_unknown_decoder_keeps_its_own_licence() -> None:
    card = make_model_card(tiny_config(audio_config=None, audio_qformer_config=None, audio_vision_config=None))
    assert card.data.license == "other"
    assert "a llama model" in card.text


def test_the_card_of_an_adapter_says_how_to_load_it() -> None:
    card = make_model_card(VideoLlamaConfig(), "me/adapter", base_model="me/base", adapter=True)
    assert (card.data.base_model, card.data.base_model_relation) == ("me/base", "adapter")
    assert "A LoRA adapter of the decoder" in card.text and "pip install transformers_videollama peft" in card.text
    assert card.text.count('AutoModelForImageTextToText.from_pretrained("me/adapter"') == 2
    both = make_model_card(VideoLlamaConfig(), "me/run", trained_parts=["video_branch"], adapter=True)
    assert "The video branch and a LoRA adapter of the decoder alone" in both.text
    assert 'model = from_trained_part("me/run")\nmodel.load_adapter("me/run")\n' in both.text


UPLOAD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from tiny_model import tiny_config
from transformers_videollama import (VideoLlamaForConditionalGeneration, from_trained_part, push_trained_part_to_hub,
    save_trained_part)

torch.manual_seed(0)
model = VideoLlamaForConditionalGeneration(tiny_config())
model.push_to_hub("me/model", tags=["mine"])
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/saved")
model.push_to_hub("me/with-card")
base = VideoLlamaForConditionalGeneration.from_pretrained("me/model")
with torch.no_grad():
    base.model.video_branch.projector.bias.add_(1.0)
push_trained_part_to_hub(base, "me/part", parts=["video_branch"])
push_trained_part_to_hub(base, "me/part", parts=["video_branch"], commit_message="Again")
again = from_trained_part("me/part")
states = again.state_dict(), base.state_dict()
same = states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
print(json.dumps({"same": same}))
"""


def test_uploads_bring_a_card_where_there_is_none(tmp_path: Path) -> None:
    with LocalHub() as hub:
        own_card = b"---\nlicense: mit\n---\n# My own card\n"
        hub.create("me/with-card", {"README.md": own_card})
        environment = {**hub.environment, "HF_TOKEN": "hf_me"}
        result = run(UPLOAD, Path(__file__).parent, tmp_path / "saved", tmp_path=tmp_path, package=True, **environment)
    assert result["same"]
    for repo_id in ("me/model", "me/saved"):
        files = hub.files(repo_id)
        assert {"config.json", "model.safetensors", "modeling_video_llama.py", "README.md"} <= set(files)
        card = ModelCard(files["README.md"].decode())
        assert card.data.pipeline_tag == "video-text-to-text"
        assert "CC-BY-NC 4.0" in card.text and f'model="{repo_id}"' in card.text
    assert "mine" in ModelCard(hub.files("me/model")["README.md"].decode()).data.tags
    assert b"# My own card" in hub.files("me/with-card")["README.md"]

    part = hub.files("me/part")
    assert set(part) == {"README.md", "trained_part.json", "trained_part.safetensors"}
    assert json.loads(part["trained_part.json"])["base_model"] == "me/model"
    card = ModelCard(part["README.md"].decode())
    assert card.data.base_model == "me/model"
    assert "The video branch alone" in card.text and 'from_trained_part("me/part")' in card.text
    assert hub.titles("me/part") == ["Again", "Upload trained part", "initial commit"]
