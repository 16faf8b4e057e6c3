"""Converts the published files of Video-LLaMA to a folder that `from_pretrained` loads.

    python conversion/convert_video_llama_checkpoint.py \
        --eva-vit eva_vit_g.pth --blip2 blip2_pretrained_flant5xxl.pth --imagebind imagebind_huge.pth \
        --llama Llama-2-7b-chat-hf --vl-checkpoint VL_LLaMA_2_7B_Finetuned.pth \
        --al-checkpoint AL_LLaMA_2_7B_Finetuned.pth --output-dir video-llama-2-7b

Any subset of the files may be given as long as every parameter is in one of them; without an audio-branch file the
model does not hear. Where several files hold the same parameter the later one counts, in the order of the flags below.
Tensors are read, converted and written one by one, so that the memory needed does not grow with the model.

The flow, as `convert` reads: open the files and plan which parameter comes from where (`published_names.py`,
`weight_plan.py`), read the configuration off the shapes (`model_config.py`), write shards (`weight_files.py`), save
configuration and processor, load the result and check it. All of it happens in `<output-dir>/.incomplete`, from where
the checked files are moved, `config.json` last: a conversion that was interrupted leaves nothing that loads.
"""

import argparse
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from model_config import (
    choose_dtype,
    choose_family,
    infer_config,
    load_text_config,
    load_tokenizer,
    read_for_config,
    read_meta_heads,
)
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from weight_files import ConversionError, WeightFile, checksum, first_line, open_weight_files, read_json, write_shard
from weight_plan import (
    KIND_OF_FLAG,
    Plan,
    add_delta,
    check_decoder_is_no_difference,
    check_kind,
    check_plan,
    check_widths,
    compare_with_model,
    make_plan,
    select_towers,
)

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration
from transformers_videollama.chat_templates import CHAT_TEMPLATES
from transformers_videollama.feature_extraction_video_llama import VideoLlamaFeatureExtractor
from transformers_videollama.image_processing_video_llama import VideoLlamaImageProcessor
from transformers_videollama.model_card import make_model_card
from transformers_videollama.modeling_video_llama_towers import VideoLlamaAudioVisionModel
from transformers_videollama.processing_video_llama import VideoLlamaProcessor
from transformers_videollama.video_processing_video_llama import VideoLlamaVideoProcessor

logger = logging.getLogger("convert_video_llama_checkpoint")

# The published sampling defaults
PUBLISHED_GENERATION = {
    "max_new_tokens": 300,
    "do_sample": True,
    "top_p": 0.9,
    "temperature": 1.0,
    "num_beams": 1,
    "min_length": 1,
    "repetition_penalty": 1.0,
}

PLACEHOLDER_IDS = ("image_token_id", "video_token_id", "audio_token_id")

# ImageBind's vision tower, which only training needs, is a model of its own in a folder beside the main one, from
# where `load_audio_vision_tower` loads it.
TOWER_PREFIX = "model.audio_vision_tower."
SUBFOLDERS = {"": ".", TOWER_PREFIX: "audio_vision_tower"}

WORK_FOLDER = ".incomplete"
# A model of up to this many bytes is loaded whole for the check. The load of a larger one is played through without
# values, which are compared file by file.
LOAD_BYTES = 128 * 2**20

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


def convert(
    output_dir: str | Path,
    files: dict[str, str | Path],
    *,
    llama_delta: str | Path | None = None,
    dtype: str = "auto",
    family: str | None = None,
    config_overrides: dict[str, Any] | None = None,
    ignore_unexpected: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """
    Converts published files to a folder that `from_pretrained` loads. The arguments are the flags of the command line.

    Args:
        output_dir (`str` or `Path`): The folder to make; an earlier conversion in it is replaced.
        files (`dict[str, str | Path]`): The files by their flags, as `{"--llama": "Llama-2-7b-chat-hf", …}`.

    Returns:
        `Path`: the output folder, complete and checked.

    Raises:
        ConversionError: with an explanation for the person who gave the files. The output folder is then as it was.
    """
    output_dir = Path(output_dir)
    paths = {flag: Path(files[flag]) for flag in KIND_OF_FLAG if files.get(flag) is not None}
    delta_dir = None if llama_delta is None else Path(llama_delta)
    overrides = config_overrides or {}
    _check_paths(paths, delta_dir, output_dir)

    opened = {flag: open_weight_files(path) for flag, path in paths.items()}
    for flag, weight_files in opened.items():
        check_kind(flag, paths[flag], weight_files)
    plan, unexpected = make_plan(opened)
    check_decoder_is_no_difference(plan)
    decoder_dirs = [paths["--llama"]]
    if delta_dir is not None:
        add_delta(plan, delta_dir)
        decoder_dirs.insert(0, delta_dir)
    select_towers(plan, (overrides.get("vision_config") or {}).get("num_hidden_layers"))
    if "--imagebind" in paths and not any(name.startswith("model.audio_branch.") for name in plan):
        logger.warning("Without --al-checkpoint the model does not hear: --imagebind is not used.")
    check_plan(plan, read_for_config(plan), unexpected)

    text_config = load_text_config(decoder_dirs, plan)
    check_widths(plan, text_config)
    if family is None:
        family = choose_family(decoder_dirs, text_config, _training_configs(opened))
    processor = _make_processor(decoder_dirs, plan, text_config, family)
    placeholder_ids = {name: getattr(processor, name) for name in PLACEHOLDER_IDS}
    config = infer_config(plan, text_config, placeholder_ids, read_meta_heads(paths.values()), overrides)
    config.dtype = config.text_config.dtype = choose_dtype(dtype, text_config, plan)
    config.text_config.name_or_path = decoder_dirs[0].resolve().name  # not the whole path on this machine
    tower_config, config.audio_vision_config = config.audio_vision_config, None
    models: dict[str, PreTrainedModel] = {}  # by the prefix of their parameters' names in the plan
    with torch.device("meta"):
        models[""] = VideoLlamaForConditionalGeneration(config)
        if tower_config is not None:
            tower_config.dtype = config.dtype
            models[TOWER_PREFIX] = VideoLlamaAudioVisionModel(tower_config)
    for name in models[""].all_tied_weights_keys:  # the library saves a shared parameter under one of its names
        plan.pop(name, None)
    specs = {prefix: _parameters_of(model, config.dtype) for prefix, model in models.items()}
    shapes = {prefix + name: shape for prefix in specs for name, (shape, _) in specs[prefix].items()}
    compare_with_model(plan, shapes, unexpected, ignore_unexpected)

    work_dir = output_dir / WORK_FOLDER
    is_new = not output_dir.exists()
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    try:
        total_size = sum(map(_size, specs.values()))
        _check_disk(output_dir, total_size)
        checksums = {}
        with tqdm(total=total_size, unit="B", unit_scale=True, desc="Writing weights") as progress:
            for prefix, model in models.items():
                folder = work_dir / SUBFOLDERS[prefix]
                checksums[prefix] = _write_weights(folder, plan, prefix, specs[prefix], max_shard_size, progress)
                model.config.architectures = [type(model).__name__]
                model.config.save_pretrained(folder)
        processor.save_pretrained(work_dir)
        _make_generation_config(processor).save_pretrained(work_dir)
        with tqdm(total=sum(map(len, specs.values())), unit="tensor", desc="Checking weights") as progress:
            for prefix, model in models.items():
                _check_folder(work_dir / SUBFOLDERS[prefix], type(model), specs[prefix], checksums[prefix], progress)
        _check_processor(work_dir, config)
        _publish(work_dir, output_dir)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
        if is_new and not any(output_dir.iterdir()):
            output_dir.rmdir()
    sound = "with sound" if config.audio_config is not None else "without sound"
    logger.info("%s is complete: %d tensors, %s, %s prompts.", output_dir, len(shapes), sound, family)
    return output_dir


def _check_paths(paths: dict[str, Path], delta_dir: Path | None, output_dir: Path) -> None:
    """Refuses paths that cannot work, before anything is read."""
    inputs = paths | ({} if delta_dir is None else {"--llama-delta": delta_dir})
    for flag, path in inputs.items():
        if not path.exists():
            raise ConversionError(f"{flag} {path}: there is no such file or folder.")
        if flag in ("--llama", "--llama-delta") and not path.is_dir():
            raise ConversionError(f"{flag} {path}: this is a file, where a decoder's folder was expected.")
        if path.resolve() == output_dir.resolve():
            raise ConversionError(f"--output-dir {output_dir} is {flag}, which would be lost: choose another.")
    if "--llama" not in paths:
        raise ConversionError(
            "--llama is missing: the decoder's configuration and tokenizer come from its folder, even if another file "
            "holds its weights" + (", and --llama-delta is added to it." if delta_dir is not None else ".")
        )
    if output_dir.exists():
        config_file = output_dir / "config.json"
        if not output_dir.is_dir():
            raise ConversionError(f"--output-dir {output_dir} is a file: choose a folder.")
        is_earlier = config_file.is_file() and read_json(config_file).get("model_type") == "video_llama"
        if not is_earlier and (config_file.exists() or any(output_dir.glob("*.safetensors"))):
            raise ConversionError(f"--output-dir {output_dir} holds a model, which would be lost: choose another.")


def _training_configs(opened: dict[str, list[WeightFile]]) -> list[dict]:
    """What the published training code saved about itself with the branches."""
    return [file.training_config for files in opened.values() for file in files if file.training_config]


def _make_processor(decoder_dirs: list[Path], plan: Plan, text_config: Any, family: str) -> VideoLlamaProcessor:
    """The processor that fits the weights. It adds the placeholders to the decoder's tokenizer."""
    hears = "model.audio_branch.query_tokens" in plan
    num_audio_tokens = {"num_audio_tokens": plan["model.audio_branch.query_tokens"].shape[1]} if hears else {}
    num_video_tokens = plan["model.video_branch.query_tokens"].shape[1]
    return VideoLlamaProcessor(
        image_processor=VideoLlamaImageProcessor(),
        tokenizer=load_tokenizer(decoder_dirs, text_config),
        video_processor=VideoLlamaVideoProcessor(),
        feature_extractor=VideoLlamaFeatureExtractor(),
        chat_template=family,
        num_image_tokens=num_video_tokens,
        num_video_tokens=num_video_tokens,
        load_audio_from_video=hears,
        **num_audio_tokens,
    )


def _make_generation_config(processor: VideoLlamaProcessor) -> GenerationConfig:
    """The published sampling, which ends at the end-of-sequence token or at the family's stop string."""
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stop = {}
    if processor.stop_string is not None:
        # For `generate` without a tokenizer: the tokens of the string at the start of a word, and inside one
        word = tokenizer("a", add_special_tokens=False).input_ids
        inside = tokenizer("a" + processor.stop_string, add_special_tokens=False).input_ids
        spellings = [tokenizer(processor.stop_string, add_special_tokens=False).input_ids]
        if inside[: len(word)] == word and inside[len(word) :] not in spellings:
            spellings.append(inside[len(word) :])
        stop = {"stop_strings": [processor.stop_string], "stop_string_token_ids": {processor.stop_string: spellings}}
    return GenerationConfig(**PUBLISHED_GENERATION, **special, **stop)


def _parameters_of(model: PreTrainedModel, dtype: torch.dtype) -> Specs:
    """Shape and dtype of every parameter to write, in the model's order; some are kept in float32 by the model."""
    float32_names = model._keep_in_fp32_modules_strict or ()
    return {
        name: (tuple(tensor.shape), torch.float32 if any(re.search(n, name) for n in float32_names) else dtype)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }


def _size(specs: Specs) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs.values())


def _check_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConversionError(f"--output-dir {folder}: {free / 1e9:.1f} GB are free, {size / 1e9:.1f} GB are needed.")


def _write_weights(
    folder: Path, plan: Plan, prefix: str, specs: Specs, max_shard_size: str, progress: tqdm
) -> dict[str, int]:
    """Writes all shards of one model and their index. Returns the CRC-32 of every tensor."""

    def read(name: str) -> torch.Tensor:
        piece, dtype = plan[prefix + name], specs[name][1]
        tensor = piece.read().to(dtype)
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):  # both are NaN if any value is
            raise ConversionError(
                f"{piece} holds values that are not finite in {dtype}: the file is damaged, or they are too large for "
                "this dtype (choose another with --dtype)."
            )
        return tensor

    folder.mkdir(exist_ok=True)
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    checksums = {}
    for filename, names in split.filename_to_tensors.items():
        for name, size, crc in write_shard(folder / filename, {name: specs[name] for name in names}, read):
            checksums[name] = crc
            progress.update(size)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return checksums


def _check_folder(
    folder: Path, model_class: type[PreTrainedModel], specs: Specs, checksums: dict[str, int], progress: tqdm
) -> None:
    """Loads the folder as its users will, and compares every tensor in it with what was to be written."""
    files = open_weight_files(folder)
    found: dict[str, torch.Tensor] = {}
    for file in files:
        for name in file.shapes:
            tensor = file.read(name)
            if (tuple(tensor.shape), tensor.dtype) != specs[name] or checksum(tensor) != checksums[name]:
                raise ConversionError(f"{name} in {file.path} is not what was written: is the disk in order?")
            found[name] = torch.empty_like(tensor, device="meta")
            progress.update()
    if len(files) > 1:
        weight_map = read_json(folder / "model.safetensors.index.json")["weight_map"]
        if weight_map != {name: file.path.name for file in files for name in file.shapes}:
            raise ConversionError(f"The index of {folder} does not list what its shards hold.")

    is_small = _size(specs) <= LOAD_BYTES
    if is_small:
        model, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    else:
        config = model_class.config_class.from_pretrained(folder)
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=found, device_map={"": "meta"}, dtype="auto", output_loading_info=True
        )
    problems = {what: names for what, names in info.items() if names}
    if problems:
        raise ConversionError(f"The converted folder does not load as a whole: {problems}.")
    for name, tensor in model.state_dict().items():
        if name in specs and (tuple(tensor.shape), tensor.dtype) != specs[name]:
            raise ConversionError(f"{name} loads as {tuple(tensor.shape)}, {tensor.dtype}, not as {specs[name]}.")
        if name in specs and is_small and checksum(tensor) != checksums[name]:
            raise ConversionError(f"{name} does not load with the values that were written.")


def _check_processor(folder: Path, config: VideoLlamaConfig) -> None:
    """Loads the processor of the folder and compares its placeholders with the model's."""
    processor = VideoLlamaProcessor.from_pretrained(folder)
    for name in PLACEHOLDER_IDS:
        if getattr(processor, name) != getattr(config, name):
            raise ConversionError(f"The reloaded processor's {name} is {getattr(processor, name)}, not the model's.")


def _publish(work_dir: Path, output_dir: Path) -> None:
    """
    Moves the checked files to their place, over those of an earlier conversion; the folder loads only at the end.
    """
    (output_dir / "config.json").unlink(missing_ok=True)
    for folder in map(output_dir.joinpath, SUBFOLDERS.values()):
        for stale in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
            stale.unlink()
    written = [path.relative_to(work_dir) for path in work_dir.rglob("*") if path.is_file()]
    for path in sorted(written, key=lambda path: (path == Path("config.json"), path)):
        (output_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (work_dir / path).replace(output_dir / path)


def push_to_hub(folder: Path, repo_id: str) -> str:
    """
    Uploads a converted folder to the Hub, to a repository that is made if need be, with a model card if that has none.

    Returns:
        `str`: the address of the commit.

    Raises:
        ConversionError: if the Hub cannot be reached or refuses; the folder stays as it is.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        has_card = api.file_exists(repo_id, "README.md")
        if not has_card:
            make_model_card(VideoLlamaConfig.from_pretrained(folder), repo_id).save(folder / "README.md")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload Video-LLaMA",
            ignore_patterns=["README.md"] if has_card else None,
        )
    except Exception as error:  # what the network raises has no common class
        raise ConversionError(
            f"{folder} is complete, but it could not be uploaded ({first_line(error)}). "
            f"Try again with `hf upload {repo_id} {folder}`."
        ) from error


def _read_overrides(value: str | None) -> dict[str, Any]:
    """The JSON object that `--config` gives, in a file or as it is."""
    if value is None:
        return {}
    try:
        overrides = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"--config {value}: neither a JSON object nor a file of one ({error}).") from error
    if not isinstance(overrides, dict):
        raise ConversionError(f"--config {value}: a JSON object was expected.")
    return overrides


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Converts the published files of Video-LLaMA to a folder that `from_pretrained` loads.",
        epilog="Where several files hold the same parameter the later one counts, in the order of the flags above.",
    )
    weights = parser.add_argument_group("files (each optional where another supplies its weights)")
    for flag, text in {
        "--eva-vit": "the ViT: eva_vit_g.pth",
        "--blip2": "image Q-Former and layer norm: blip2_pretrained_flant5xxl.pth",
        "--minigpt4": "starting point of the projection: pretrained_minigpt4.pth",
        "--imagebind": "the sound encoder: imagebind_huge.pth",
        "--llama": "folder of the decoder, in the format of `transformers` (always needed: it has the tokenizer)",
        "--llama-delta": "folder of a difference (Vicuna v0) to be added to --llama",
        "--all-in-one": "one file, or a folder of shards, with all weights",
        "--vl-checkpoint": "a video-branch file: finetune-vicuna7b-v2.pth, VL_LLaMA_2_7B_Finetuned.pth, ...",
        "--al-checkpoint": "an audio-branch file: finetune_vicuna7b_audiobranch.pth, AL_LLaMA_2_7B_Finetuned.pth, ...",
    }.items():
        weights.add_argument(flag, type=Path, metavar="PATH", help=text)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
        help="dtype to write in; auto: the decoder's (default)",
    )  # fmt: skip
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload the folder to this repository of the Hub")
    parser.add_argument(
        "--family", choices=tuple(CHAT_TEMPLATES),
        help="the prompts that the decoder knows (default: judged by names in the files; BiLLA and Ziya: vicuna)",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="JSON",
        help="fields of VideoLlamaConfig that cannot be read off the weights, as JSON or a file of it: "
        """'{"vision_config": {"num_attention_heads": 16}}'""",
    )  # fmt: skip
    parser.add_argument("--ignore-unexpected", action="store_true", help="leave out tensors that are not known")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file to write (default: 5GB)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, 1 for a mistake that is explained, 130 if interrupted."""
    args = _parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if args.push_to_hub is not None:
            validate_repo_id(args.push_to_hub)
        folder = convert(
            args.output_dir,
            {flag: getattr(args, flag[2:].replace("-", "_")) for flag in KIND_OF_FLAG},
            llama_delta=args.llama_delta,
            dtype=args.dtype,
            family=args.family,
            config_overrides=_read_overrides(args.config),
            ignore_unexpected=args.ignore_unexpected,
            max_shard_size=args.max_shard_size,
        )
        if args.push_to_hub is not None:
            print(push_to_hub(folder, args.push_to_hub))
    except (ConversionError, HFValidationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder without write permission
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
