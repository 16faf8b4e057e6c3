"""The plan of a conversion: which tensor of which published file every parameter of the model comes from.

Used by `convert_video_llama_checkpoint.py`, in this order: `check_kind` on every file, `make_plan`, `add_delta`,
`select_towers`, `check_plan`, and, when the model is known, `compare_with_model`. All refuse with a `ConversionError`
that says what is missing, what was unexpected and what the likely mistake is.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from published_names import KINDS, TABLE, identify, translate
from transformers import PreTrainedConfig
from weight_files import ConversionError, WeightFile, open_weight_files

# The flags that take weights, in the order in which they overwrite each other, and the kind of file each asks for.
KIND_OF_FLAG = {
    "--eva-vit": "EVA-CLIP's ViT",
    "--blip2": "BLIP-2's file",
    "--minigpt4": "MiniGPT-4's projection",
    "--imagebind": "ImageBind",
    "--llama": "a decoder",
    "--all-in-one": "an archive of the whole model",
    "--vl-checkpoint": "a video-branch file",
    "--al-checkpoint": "an audio-branch file",
}
FLAG_OF_KIND = {kind: flag for flag, kind in KIND_OF_FLAG.items()}

# Which flag supplies a part of the model: the first row that a parameter's name starts with.
SUPPLIERS = {
    "model.vision_tower.post_layernorm.": "--blip2",
    "model.vision_tower.": "--eva-vit",
    "model.query_tokens": "--blip2",
    "model.qformer.": "--blip2",
    "model.video_branch.projector.": "--vl-checkpoint or --minigpt4",
    "model.video_branch.": "--vl-checkpoint",
    "model.audio_branch.": "--al-checkpoint",
    "model.audio_tower.": "--imagebind",
    "model.audio_vision_tower.": "--imagebind",
    "model.language_model.": "--llama",
    "lm_head.": "--llama",
}
# The published name of each of our parameters and modules, with `{i}` for a layer's number.
PUBLISHED_NAMES = {
    name: row for row, names in TABLE.items() for name in ((names,) if isinstance(names, str) else names)
}


@dataclass
class Piece:
    """Where a parameter comes from: the `part`-th of `parts` equal row blocks of a tensor in a file."""

    flag: str
    file: WeightFile
    key: str
    part: int = 0
    parts: int = 1
    # The file and key of a difference to be added, for a decoder that is published as one.
    delta: tuple[WeightFile, str] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        file, key = self.delta or (self.file, self.key)
        shape = file.shapes[key]
        return shape if self.parts == 1 else (shape[0] // self.parts, *shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtypes[self.key]

    def read(self) -> torch.Tensor:
        tensor = self.file.read(self.key)
        if self.delta is not None:
            difference = self.delta[0].read(self.delta[1])
            new_rows = (difference.shape[0] - tensor.shape[0]) if tensor.dim() else 0
            if new_rows:  # tokens that the base does not know: the difference holds the whole of their embeddings
                tensor = torch.cat([tensor, tensor.new_zeros(new_rows, *tensor.shape[1:])])
            tensor = tensor + difference
        return tensor.chunk(self.parts)[self.part] if self.parts > 1 else tensor

    def __str__(self) -> str:
        return f"{self.key} of {self.flag} {self.file.path}"


Plan = dict[str, Piece]


def prefix_of(flag: str) -> str:
    """What the keys of that flag's file start with in an archive of the whole model."""
    return KINDS[KIND_OF_FLAG[flag]][2]


def check_kind(flag: str, path: Path, files: list[WeightFile]) -> None:
    """Refuses a file that is known to be another than its flag asks for, or that has nothing to do with the model."""
    keys = {key for file in files for key in file.shapes}
    kind = identify(keys)
    allowed = {KIND_OF_FLAG[flag]}
    if flag == "--all-in-one":
        allowed = {name for name, (_, _, prefix) in KINDS.items() if not prefix}
    elif flag == "--vl-checkpoint":  # some published video-branch files hold everything else as well
        allowed.add("an archive of the whole model")
    if kind is not None and kind not in allowed:
        raise ConversionError(
            f"{flag} {path}: this is {kind}, where {KIND_OF_FLAG[flag]} was expected. "
            f"Give it as {FLAG_OF_KIND[kind]}. Were two files swapped?"
        )
    if keys and kind is None and not any(names_of(flag, key) for key in keys):
        raise ConversionError(
            f"{flag} {path}: nothing in it belongs to Video-LLaMA. It holds {', '.join(sorted(keys)[:3])}, …, where "
            f"{KIND_OF_FLAG[flag]} was expected."
        )


def names_of(flag: str, key: str) -> tuple[str, ...] | None:
    """`translate` for a key of that flag's file."""
    prefix = prefix_of(flag)
    return translate(key if key.startswith(prefix) else prefix + key)


def make_plan(files: dict[str, list[WeightFile]]) -> tuple[Plan, list[str]]:
    """
    Where every parameter comes from, and what the files hold that means nothing to the model.

    Args:
        files (`dict[str, list[WeightFile]]`): The opened files of each flag, later ones overwriting earlier ones.
    """
    plan: Plan = {}
    unexpected = []
    for flag, opened in files.items():
        found: Plan = {}
        for file in opened:
            for key in file.shapes:
                names = names_of(flag, key)
                if names is None:
                    unexpected.append(f"{key} ({flag} {file.path})")
                for part, name in enumerate(names or ()):
                    if name in found:
                        raise ConversionError(f"{name} is there twice: as {found[name]}, and as {key} of {file.path}.")
                    found[name] = Piece(flag, file, key, part, len(names))
        _drop_last_vit_block(flag, found, opened)
        plan |= found
    return plan, unexpected


def _drop_last_vit_block(flag: str, found: Plan, files: list[WeightFile]) -> None:
    """
    The published encoder file is the whole ViT: after its last block, which Video-LLaMA does not run, come the final
    norm and the classification head. A file without those is taken to have been cut already.
    """
    tail = {"visual_encoder.norm.weight", "visual_encoder.fc_norm.weight", "visual_encoder.head.weight"}
    if any(prefix_of(flag) + key in tail for file in files for key in file.shapes):
        layers = "model.vision_tower.encoder.layers."
        last = f"{layers}{count_layers(found, layers) - 1}."
        for name in [name for name in found if name.startswith(last)]:
            del found[name]


def add_delta(plan: Plan, folder: Path) -> None:
    """Lets a decoder's published difference be added to the decoder that it is a difference from, tensor by tensor."""
    deltas: dict[str, tuple[WeightFile, str]] = {}
    for file in open_weight_files(folder):
        for key in file.shapes:
            deltas |= dict.fromkeys(names_of("--llama", key) or (), (file, key))
    pieces = {name: piece for name, piece in plan.items() if piece.flag == "--llama"}
    if not pieces or set(pieces) != set(deltas):
        unshared = summarize(set(pieces) ^ set(deltas))
        raise ConversionError(
            f"--llama-delta {folder} and --llama do not hold the same tensors, so they do not belong together. "
            + (f"Only in one of them: {', '.join(unshared[:5])}." if unshared else "Neither holds any weights.")
        )
    for name, piece in pieces.items():
        file, key = deltas[name]
        base, delta = piece.file.shapes[piece.key], file.shapes[key]
        has_row_per_token = name in ("lm_head.weight", "model.language_model.embed_tokens.weight")
        if base[1:] != delta[1:] or (base[0] != delta[0] and not (has_row_per_token and delta[0] > base[0])):
            raise ConversionError(
                f"--llama-delta {folder} does not fit --llama: {key} is {list(delta)} and not {list(base)}"
                f"{_guess_sizes(delta[-1], base[-1])}. Which LLaMA was it made from?"
            )
        piece.delta = (file, key)
    _check_is_difference(pieces, folder)


def _check_is_difference(pieces: Plan, folder: Path) -> None:
    piece = pieces.get("model.language_model.norm.weight")
    if piece is None or piece.delta is None:
        return
    base, delta = piece.file.read(piece.key).float(), piece.delta[0].read(piece.delta[1]).float()
    is_alike = torch.nn.functional.cosine_similarity(base, delta, dim=0) > 0.9
    if is_alike and delta.abs().mean() > 0.5 * base.abs().mean():
        raise ConversionError(
            f"--llama-delta {folder} holds complete weights, not a difference: give that folder as --llama, without "
            "--llama-delta."
        )


def check_decoder_is_no_difference(plan: Plan) -> None:
    """A decoder's final norm scales by about one; the difference of two decoders' norms is about zero."""
    piece = plan.get("model.language_model.norm.weight")
    if piece is None or piece.flag != "--llama":
        return
    size = piece.file.read(piece.key).float().abs().mean().item()
    if size < 0.05:
        raise ConversionError(
            f"--llama {piece.file.path.parent} is not a decoder but a difference between two: its last norm scales by "
            f"{size:.3f}. Give it as --llama-delta, and the LLaMA that it is to be added to as --llama."
        )


def select_towers(plan: Plan, vision_depth: int | None) -> None:
    """
    Takes out of the plan what the model is built without: ImageBind, if it has no audio branch, and ViT blocks past a
    stated depth.
    """
    hears = any(name.startswith("model.audio_branch.") for name in plan)
    layers = "model.vision_tower.encoder.layers."
    for name in list(plan):
        if (not hears and name.startswith(("model.audio_tower.", "model.audio_vision_tower."))) or (
            vision_depth is not None and name.startswith(layers) and layer_number(name, layers) >= vision_depth
        ):
            del plan[name]


def check_plan(plan: Plan, read_for_config: Iterable[str], unexpected: list[str]) -> None:
    """
    Refuses files that lack whole parts of the model, or the parameters that its configuration is read off.

    Args:
        read_for_config (`Iterable[str]`): Names of those parameters.
    """
    absent = [name for name in read_for_config if name not in plan]
    if not absent:
        return
    missing = []
    for name in absent:
        part = next(part for part in SUPPLIERS if name.startswith(part))
        whole = not any(other.startswith(part) for other in plan if supplier_of(other) == SUPPLIERS[part])
        missing.append(f"{part}* (all of it)" if whole and part.endswith(".") else name)
    raise ConversionError(_report(list(dict.fromkeys(missing)), unexpected, []))


def check_widths(plan: Plan, text_config: PreTrainedConfig) -> None:
    """Refuses files of different sizes where they meet, and names both."""
    width = text_config.hidden_size
    embeddings = plan["model.language_model.embed_tokens.weight"]
    if embeddings.shape[1] != width:
        raise ConversionError(
            f"The decoder's config.json says hidden_size {width}, but its weights are {embeddings.shape[1]} wide "
            f"({embeddings}){_guess_sizes(embeddings.shape[1], width)}. Are they of different models?"
        )
    for branch in ("video", "audio"):
        piece = plan.get(f"model.{branch}_branch.projector.weight")
        if piece is not None and piece.shape[0] != width:
            raise ConversionError(
                f"The {branch} branch gives vectors of {piece.shape[0]} ({piece}), but the decoder's are {width} wide"
                f"{_guess_sizes(piece.shape[0], width)}. Give the {branch}-branch file of this decoder."
            )
    if embeddings.shape[0] != text_config.vocab_size:
        hint = ""
        if abs(embeddings.shape[0] - text_config.vocab_size) == 1:
            hint = (
                " Vicuna v0 has one row more than LLaMA and than Vicuna v1.1, for [PAD]: is one of the two v1.1 or "
                "LLaMA, where v0 is needed?"
            )
        raise ConversionError(
            f"The decoder's config.json says vocab_size {text_config.vocab_size}, but its weights have "
            f"{embeddings.shape[0]} rows ({embeddings}).{hint}"
        )
    meetings = (
        ("model.qformer.encoder.layer.0.crossattention.attention.key.weight", 1,
         "model.vision_tower.embeddings.class_embedding", 2),
        ("model.video_branch.qformer.encoder.layer.0.crossattention.attention.key.weight", 1,
         "model.qformer.layernorm.weight", 0),
        ("model.video_branch.position_embedding.weight", 1, "model.qformer.layernorm.weight", 0),
        ("model.audio_branch.qformer.encoder.layer.0.crossattention.attention.key.weight", 1,
         "model.audio_tower.projection.weight", 0),
        ("model.audio_branch.position_embedding.weight", 1, "model.audio_tower.projection.weight", 0),
        ("model.audio_vision_tower.projection.weight", 0, "model.audio_tower.projection.weight", 0),
    )  # fmt: skip
    for name, axis, other_name, other_axis in meetings:
        if name in plan and plan[name].shape[axis] != plan[other_name].shape[other_axis]:
            raise ConversionError(
                f"Two files do not fit together: dimension {axis} of {plan[name]} is {plan[name].shape[axis]}, but "
                f"dimension {other_axis} of {plan[other_name]} is {plan[other_name].shape[other_axis]}."
            )


def _guess_sizes(width: int, decoder_width: int) -> str:
    guess = {(5120, 4096): "a 13B file with a 7B decoder", (4096, 5120): "a 7B file with a 13B decoder"}
    return f": {guess[width, decoder_width]}" if (width, decoder_width) in guess else ""


def check_resolution(plan: Plan, tower: str, expected_rows: int, image_size: int, patch_size: int) -> None:
    """Refuses an encoder whose position table belongs to another input size than Video-LLaMA's."""
    piece = plan[f"{tower}.embeddings.position_embedding"]
    if piece.shape[1] != expected_rows:
        side = math.isqrt(piece.shape[1] - 1)
        other = f", as for {side * patch_size} px" if side * side == piece.shape[1] - 1 else ""
        raise ConversionError(
            f"{piece} has {piece.shape[1]} positions{other}, but with patches of {patch_size} px Video-LLaMA's "
            f"{image_size} px need {expected_rows}. Give the {image_size} px version of this encoder."
        )


def compare_with_model(
    plan: Plan, shapes: dict[str, tuple[int, ...]], unexpected: list[str], ignore_unexpected: bool
) -> None:
    """
    Refuses a plan that does not hold every parameter of the model once and nothing else.

    Args:
        shapes (`dict[str, tuple[int, ...]]`): Name and shape of every parameter that is to be written.
        unexpected (`list[str]`): Keys of the files that mean nothing to the model.
        ignore_unexpected (`bool`): Whether to go on without those.
    """
    missing = [name for name in shapes if name not in plan]
    misfits = [
        f"{name}, which a model of this size does not have ({plan[name]})" for name in plan if name not in shapes
    ]
    misfits += [
        f"{name}: {list(plan[name].shape)} in {plan[name]}, but the model's is {list(shape)}"
        for name, shape in shapes.items()
        if name in plan and plan[name].shape != shape
    ]
    if missing or misfits or (unexpected and not ignore_unexpected):
        raise ConversionError(_report(missing, unexpected, misfits))


def supplier_of(name: str) -> str:
    """The flag that a parameter's file is given with."""
    return next(flag for part, flag in SUPPLIERS.items() if name.startswith(part))


def published_name_of(name: str) -> str:
    """What the published files call a parameter of ours, as far as they have it under one name."""
    for prefix in ("encoder.layers.", "encoder.layer."):
        head, found, tail = name.partition(prefix)
        if found:
            number, _, rest = tail.partition(".")
            generic = f"{head}{prefix}{{i}}.{rest}"
            break
    else:
        generic, number = name, ""
    module, _, parameter = generic.rpartition(".")
    published = PUBLISHED_NAMES.get(generic) or (
        f"{PUBLISHED_NAMES[module]}.{parameter}" if module in PUBLISHED_NAMES else name
    )
    return published.replace("{i}", number)


def layer_number(name: str, prefix: str) -> int:
    """The number that follows `prefix` in a parameter's name."""
    return int(name.removeprefix(prefix).split(".")[0])


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Layers among the parameters whose names start with `prefix` and go on with the layer's number."""
    return 1 + max((layer_number(name, prefix) for name in names if name.startswith(prefix)), default=-1)


def summarize(names: Iterable[str]) -> list[str]:
    """Sorted names, those of the same parameter in many layers as one line."""
    layers: dict[str, list[int]] = {}
    for name in names:
        words = name.split(".")
        position = next(
            (i for i, word in enumerate(words) if word.isdigit() and words[i - 1] in ("layers", "layer")), None
        )
        number = -1 if position is None else int(words[position])
        if position is not None:
            words[position] = "{i}"
        layers.setdefault(".".join(words), []).append(number)
    lines = []
    for generic, numbers in sorted(layers.items()):
        if len(numbers) <= 3:
            lines += [generic.replace("{i}", str(number)) for number in sorted(numbers)]
        else:
            span = (
                f"{min(numbers)} to {max(numbers)}"
                if len(numbers) == max(numbers) - min(numbers) + 1
                else sorted(numbers)
            )
            lines.append(f"{generic} (layers {span})")
    return lines


def _report(missing: list[str], unexpected: list[str], misfits: list[str]) -> str:
    """The lists of what does not fit, and what to do about it."""
    counts = ((missing, "missing"), (unexpected, "unexpected"), (misfits, "of another size"))
    found = ", ".join(f"{len(names)} {what}" for names, what in counts if names)
    lines = [f"The files do not make up the model: {found}."]
    if missing:
        lines.append("Missing (in none of the files):")
        for flag in dict.fromkeys(map(supplier_of, missing)):
            for line in summarize(name for name in missing if supplier_of(name) == flag):
                name, _, note = line.partition(" ")
                published = published_name_of(name)
                alias = f" = {published}" if published != name else ""
                lines.append(f"  {name}{alias}{' ' + note if note else ''}, expected from {flag}")
    if unexpected:
        lines += ["Unexpected (unknown in Video-LLaMA's files):", *(f"  {key}" for key in unexpected)]
    if misfits:
        lines += ["Of another size:", *(f"  {misfit}" for misfit in misfits)]
    if missing:
        flags = ", ".join(dict.fromkeys(supplier_of(name).split(" or ")[0] for name in missing))
        lines.append(f"Likely mistake: the file of {flags} was not given, is not whole, or belongs to another model.")
    elif misfits:
        lines.append("Likely mistake: files of models of different sizes (7B and 13B?) were given together.")
    else:
        lines.append("If they are of no use to the model, --ignore-unexpected leaves them out.")
    return "\n".join(lines)
