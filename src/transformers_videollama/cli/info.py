"""Says what a checkpoint holds: its parts, their sizes, whose licences hold, and the memory that they need.

    videollama info video-llama-2-7b
    videollama info runs/stage2 --json

A folder with a trained part alone is told by its tensors. No weights are loaded.
"""

import json
from pathlib import Path
from typing import Any

from . import make_parser
from .models import check_model, find_model

HELP = "what a checkpoint holds, and how much memory it needs"
PARTS = (
    "vision_tower",
    "qformer",
    "video_branch",
    "audio_tower",
    "audio_branch",
    "audio_vision_tower",
    "language_model",
)
GIB = 2**30


def main(argv: list[str]) -> None:
    parser = make_parser("info", __doc__)
    parser.add_argument("model", nargs="?", help="folder or Hub id (default: the small trained model)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    name, _ = find_model(args.model)
    options = {} if args.revision is None else {"revision": args.revision}
    if (Path(name) / "trained_part.json").is_file():
        found = describe_trained_part(Path(name))
    else:
        check_model(name, **options)
        found = describe_model(name, **options)
    print(json.dumps(found, indent=2) if args.json else as_text(found))


def describe_model(name: str, **options: Any) -> dict[str, Any]:
    """The parts of a model with their numbers of weights, and the bytes of all weights by number format."""
    import torch

    from ..configuration_video_llama import VideoLlamaConfig
    from ..model_card import describe_decoder
    from ..modeling_video_llama import VideoLlamaForConditionalGeneration

    config = VideoLlamaConfig.from_pretrained(name, **options)
    with torch.device("meta"):
        model = VideoLlamaForConditionalGeneration(config)
    parts = {part: getattr(model.model, part) for part in PARTS}
    numbers = {
        part: sum(p.numel() for p in module.parameters()) for part, module in parts.items() if module is not None
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = (m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear))
    linear = sum(layer.weight.numel() for layer in layers)
    decoder, _, terms = describe_decoder(config)
    return {
        "model": name,
        "decoder": decoder,
        "decoder_terms": terms,
        "decoder_from": config.text_model if hasattr(config, "text_model") else None,
        "hears": config.audio_config is not None,
        "video_tokens": config.num_video_query_tokens,
        "audio_tokens": config.num_audio_query_tokens if config.audio_config is not None else 0,
        "max_frames": config.max_frames,
        "parameters": {**numbers, "total": total},
        "bytes": {
            "float32": 4 * total,
            "bfloat16": 2 * total,
            "8-bit decoder": 2 * (total - linear) + linear,
            # half a byte and a float32 scale for every 64 weights
            "4-bit decoder": 2 * (total - linear) + linear // 2 + linear // 16,
        },
    }


def describe_trained_part(folder: Path) -> dict[str, Any]:
    """The branches in a folder of their own, and what they belong to."""
    from safetensors import safe_open

    description = json.loads((folder / "trained_part.json").read_text(encoding="utf-8"))
    numbers: dict[str, int] = {}
    with safe_open(folder / "trained_part.safetensors", framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (no dictionary)
            number = 1
            for size in weights.get_slice(key).get_shape():
                number *= size
            part = key.partition(".")[0]
            numbers[part] = numbers.get(part, 0) + number
    return {
        "trained_part": str(folder),
        "base_model": description.get("base_model"),
        "frozen_parts": description.get("frozen_parts"),
        "parameters": {**numbers, "total": sum(numbers.values())},
    }


def as_text(found: dict[str, Any]) -> str:
    """The description for people."""
    lines = []
    for name, value in found.items():
        if name == "parameters":
            lines.append("parameters")
            lines += [f"  {part:<20}{_count(number):>9}" for part, number in value.items()]
        elif name == "bytes":
            lines.append("memory of the weights; frames, cache and workspace come on top")
            lines += [f"  {dtype:<20}{number / GIB:>9.2f} GiB" for dtype, number in value.items()]
        elif isinstance(value, dict):
            lines += [name.replace("_", " "), *(f"  {part:<20} {text}" for part, text in value.items())]
        elif value is not None:
            lines.append(f"{name.replace('_', ' '):<22}{_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
