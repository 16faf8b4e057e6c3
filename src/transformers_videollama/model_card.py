"""The model card of a Video-LLaMA, made from its configuration: what it is made of, whose licences hold, how to use
it.

`make_model_card` writes it; `VideoLlamaModelCardMixin` has `push_to_hub` upload it with a model whose repository has
none.
"""

import os
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import PushToHubMixin, logging

from .configuration_video_llama import PUBLISHED_DECODERS, VideoLlamaConfig

ARXIV_TAG = "arxiv:2306.02858"

# What is known of the decoders of the published checkpoints: name, licence as the Hub spells it, and in words
_LLAMA_1_LICENSE = ("other", "LLaMA's licence, for non-commercial research only")
_LLAMA_2_LICENSE = ("llama2", "the LLaMA 2 Community License")
DECODERS: dict[str, tuple[str, str, str]] = {
    "llama-2-7b-chat": ("LLaMA-2-7B-Chat", *_LLAMA_2_LICENSE),
    "llama-2-13b-chat": ("LLaMA-2-13B-Chat", *_LLAMA_2_LICENSE),
    "vicuna-7b": ("Vicuna-7B v0", *_LLAMA_1_LICENSE),
    "vicuna-13b": ("Vicuna-13B v0", *_LLAMA_1_LICENSE),
    "billa-7b": ("BiLLA-7B", *_LLAMA_1_LICENSE),
    "ziya-13b": ("Ziya-13B", *_LLAMA_1_LICENSE),
}

_TEXT = """
# {title}

{kind}Video-LLaMA ([arXiv 2306.02858](https://arxiv.org/abs/2306.02858)) {abilities}. This card was made from the \
configuration.

## Use

```bash
pip install {packages}
```

```python
{usage}
```
{remote}
## Parts and licences

Each part keeps the licence of those who trained it, and a model with all of them may be used only as every one allows.

{parts}
{non_commercial}
## Sizes

{sizes}

## Limits

Answers can be wrong, made up or biased, as those of the decoder can, above all about sounds, small details, counts \
and the order of events. {frames} frames of a video are seen by default, however long it is{sound}.

## Citation

```bibtex
@article{{damonlpsg2023videollama,
  author = {{Zhang, Hang and Li, Xin and Bing, Lidong}},
  title = {{Video-LLaMA: An Instruction-tuned Audio-Visual Language Model for Video Understanding}},
  year = {{2023}},
  journal = {{arXiv preprint arXiv:2306.02858}}
}}
```
"""

_MODEL_USAGE = """\
import transformers_videollama
from transformers import pipeline

pipe = pipeline("video-text-to-text", model="{repo_id}")
print(pipe("video.mp4", text="What is happening in this video?", return_full_text=False)[0]["generated_text"])"""

_PART_USAGE = """\
from transformers_videollama import from_trained_part

model = from_trained_part("{repo_id}")"""

_ADAPTER_USAGE = """\
import transformers_videollama
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{repo_id}")  # its model, and the adapter on it"""

_REMOTE = "\nWithout the package, `{call}trust_remote_code=True)` does it too.\n"

# What the library writes into a repository without a card
_LIBRARY_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)

logger = logging.get_logger(__name__)


def make_model_card(
    config: VideoLlamaConfig,
    repo_id: str = "path/to/model",
    trained_parts: list[str] | None = None,
    base_model: str | None = None,
    tags: list[str] | None = None,
    adapter: bool = False,
) -> ModelCard:
    """
    The card of a model, of its trained part, or of an adapter.

    Args:
        config (`VideoLlamaConfig`): The model's configuration.
        repo_id (`str`, *optional*): Where it can be loaded from, for the example.
        trained_parts (`list[str]`, *optional*): For the card of a trained part: `"video_branch"`, `"audio_branch"`.
        base_model (`str`, *optional*):
            The model that it was trained from, or that the trained part or the adapter belongs to.
        tags (`list[str]`, *optional*): Further tags.
        adapter (`bool`, *optional*, defaults to `False`):
            For the card of a LoRA adapter of the decoder, alone or beside the trained part.

    Returns:
        `huggingface_hub.ModelCard`: with its metadata; `card.save(path)` writes it.
    """
    has_audio = config.audio_config is not None
    decoder_name, decoder_license, decoder_terms = describe_decoder(config)
    licenses = [decoder_license] + (["cc-by-nc-4.0"] if has_audio else [])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        license=licenses[0] if len(licenses) == 1 else licenses,
        base_model=base_model,
        base_model_relation="adapter" if adapter and base_model is not None else None,
        tags=list(dict.fromkeys([config.model_type, ARXIV_TAG, *(tags or [])])),
    )
    parts = [
        ("Frame encoder", "EVA-CLIP ViT-g/14", "MIT"),
        ("Image Q-Former and its layer norm", "BLIP-2", "BSD-3-Clause"),
        ("Video branch", "Video-LLaMA", "BSD-3-Clause as published"),
        ("Decoder", decoder_name, decoder_terms),
    ]
    if has_audio:
        parts += [
            ("Sound encoder", "ImageBind-Huge", "CC-BY-NC 4.0"),
            ("Audio branch", "Video-LLaMA", "BSD-3-Clause as published"),
        ]
    if config.audio_vision_config is not None:
        parts.append(("Vision tower, to train the audio branch", "ImageBind-Huge", "CC-BY-NC 4.0"))
    names = [part.replace("_", " ") for part in trained_parts or []]
    if names:
        names += ["a LoRA adapter of the decoder"] if adapter else []
        kind, remote = f"The {' and '.join(names)} alone, without the frozen parts, of a ", None
        usage = _PART_USAGE + ('\nmodel.load_adapter("{repo_id}")' if adapter else "")
    elif adapter:
        kind = "A LoRA adapter of the decoder, without the model that it is for, of a "
        usage, remote = _ADAPTER_USAGE, 'AutoModelForImageTextToText.from_pretrained("{repo_id}", '
    else:
        kind, usage, remote = "", _MODEL_USAGE, 'pipeline("video-text-to-text", model="{repo_id}", '
    text = _TEXT.format(
        title=repo_id.rpartition("/")[2],
        kind=kind,
        abilities=f"answers questions about videos and images{' and what is heard in them' if has_audio else ''}",
        packages="transformers_videollama" + (" peft" if adapter else ""),
        usage=usage.format(repo_id=repo_id),
        remote=_REMOTE.format(call=remote.format(repo_id=repo_id)) if remote else "",
        parts=_table(("part", "from", "licence"), parts),
        non_commercial="\nImageBind's weights are CC-BY-NC 4.0: a model that hears is for non-commercial use.\n"
        if has_audio
        else "",
        sizes=_table(("part", "width", "layers", "heads"), _sizes(config)),
        frames=8,
        sound=", and eight clips of two seconds of its sound are heard" if has_audio else "",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def describe_decoder(config: VideoLlamaConfig) -> tuple[str, str, str]:
    """
    What is known of a model's decoder: its name, its licence as the Hub spells it, and its licence in words. Published
    decoders are known by their name or by their sizes; of any other one the licence is `"other"`.
    """
    decoder = config.text_config
    name = str(getattr(decoder, "_name_or_path", "") or "")
    for variant, description in DECODERS.items():
        published = LlamaConfig(**PUBLISHED_DECODERS[variant])
        fields = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "rms_norm_eps")
        if decoder.model_type == "llama" and all(
            getattr(decoder, field) == getattr(published, field) for field in fields
        ):
            return description
    if "llama-2" in name.lower():
        return os.path.basename(name), *_LLAMA_2_LICENSE
    if "vicuna" in name.lower():
        return os.path.basename(name), *_LLAMA_1_LICENSE
    return os.path.basename(name) or f"a {decoder.model_type} model", "other", "its own licence"


def _sizes(config: VideoLlamaConfig) -> list[tuple[Any, ...]]:
    parts = {
        "Frame encoder": config.vision_config,
        "Image Q-Former": config.qformer_config,
        "Video Q-Former": config.video_qformer_config,
        "Sound encoder": config.audio_config,
        "Audio Q-Former": config.audio_qformer_config,
        "Decoder": config.text_config,
    }
    return [
        (name, part.hidden_size, part.num_hidden_layers, part.num_attention_heads)
        for name, part in parts.items()
        if part is not None
    ]


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


class VideoLlamaModelCardMixin(PushToHubMixin):
    """
    Gives a model, or its adapter, that is pushed to a repository without a card of its own the card made from its
    configuration.
    """

    config: VideoLlamaConfig

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # The library's last step of every upload. The folder holds the repository's card by then, or the one that the
        # library writes where there is none, which an earlier push of the processor may have left as well.
        path = os.path.join(working_dir, "README.md")
        if not os.path.exists(path) or _is_librarys(ModelCard.load(path)):
            tags = ModelCard.load(path).data.tags if os.path.exists(path) else None
            adapter = getattr(self, "_hf_peft_config_loaded", False)
            base_model = _name_base_model(self, repo_id) if adapter else None
            make_model_card(self.config, repo_id, base_model=base_model, tags=tags, adapter=adapter).save(path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _is_librarys(card: ModelCard) -> bool:
    """Whether a card is as the library wrote it, and nobody has added to it."""
    untouched = ModelCard.from_template(ModelCardData(), model_description=_LIBRARY_DESCRIPTION)
    return card.text.split() == untouched.text.split()


def _name_base_model(model: Any, repo_id: str) -> str | None:
    """The model that the active adapter says it is for, if others can have it."""
    name = model.active_adapters()[0]
    base_model = model.peft_config[name].base_model_name_or_path
    if base_model and not os.path.isdir(base_model):
        return base_model
    logger.warning(
        f"{repo_id} names {base_model or 'nothing'} as the model that its adapter is for, which others do not have: "
        f"name one on the Hub as `model.peft_config[{name!r}].base_model_name_or_path` and push again."
    )
    return None


__all__ = ["VideoLlamaModelCardMixin", "describe_decoder", "make_model_card"]
