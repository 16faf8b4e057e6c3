"""Trains the small model from nothing but the decoder, station by station, as the paper trained the large one.

    python examples/miniworld/train.py

0. renders clips and paints pictures, trains the frozen encoders on them (`encoders.py`), writes the clips' features to
   a cache, learns which soft tokens the decoder understands (`dictionary.py`), and starts the branches as these
   (`branches.py`);
1. video branch, stage 1: captions;
2. video branch, stage 2: conversations;
3. audio branch, stages 1 and 2: on frames alone, in place of sounds;
4. both branches together, on the same conversations, still on frames alone.

Stages 1 to 4 are runs of `examples/training/train.py` with the YAML files of the folder `stages`. Interrupted at any
time, the same command goes on where it stopped. At the end everything but the decoder is written to `model/`, where
`from_pretrained` finds it. Everything is trained on a GPU where there is one, else on the CPU.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from branches import start_branches
from decoder import find_decoder
from dictionary import train_dictionaries
from encoders import (
    ATTENTION,
    DEVICE,
    FAST_BFLOAT16,
    frame_scores,
    hearing_score,
    read_clips,
    train_frame_encoder,
    train_imagebind,
)
from filelock import FileLock, Timeout
from make_data import make_data
from model_file import export_model
from pictures import make_pictures
from small_model import make_model, make_processor

HERE = Path(__file__).resolve().parent
TRAINING = HERE.parent / "training"
STAGES = ("video_stage1", "video_stage2", "audio_stage1", "audio_stage2", "both_branches")
BESIDE = {"audio_stage1": "video_stage2", "both_branches": "audio_stage2"}  # stages that begin with a finished model
VALIDATION_CLIPS = 200  # the last ones, a tenth at most, on which encoders and the start of branches are not trained


def train_encoders(folder: Path, data: Path, options: argparse.Namespace) -> None:
    """Station 0: writes a model folder whose encoders are trained and whose branches are random."""
    decoder = find_decoder(options.cache, with_tokenizer=True)
    processor = make_processor(decoder)
    model = make_model(decoder, options.seed)
    model.set_attn_implementation(ATTENTION)
    work = folder.with_name("encoders")
    clips = read_clips(data, processor, work, options.seed, options.processes)
    training = {name: array[: -options.validation_clips] for name, array in clips.items()}
    validation = slice(-options.validation_clips, None)
    pictures = make_pictures(work, options.pictures, processor, options.seed, options.processes)
    heads = train_frame_encoder(
        model, processor, training, pictures, work, options.frame_steps, options.frame_batch_size, options.seed
    )
    print("frames, on clips not trained on:", frame_scores(model, heads, processor, clips, validation))
    train_imagebind(model, processor, training, work, options.sound_steps, options.sound_batch_size, options.seed)
    print("sounds whose nearest frames are right:", hearing_score(model, processor, clips, validation))
    # What is shipped, so that the branches are trained on what they will be used with
    model.to(torch.bfloat16)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(folder)


def run(script: str, *arguments: object) -> None:
    """Runs a script of `examples/training` in a process of its own; its output is shown."""
    command = [sys.executable, str(TRAINING / script), *map(str, arguments)]
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def train(options: argparse.Namespace) -> None:
    """All stations, each from where it was interrupted."""
    torch.set_num_threads(options.processes)
    data, base, features = options.work / "data", options.work / "base", options.work / "features"
    if not (data / "train-audio-conversations.jsonl").exists():
        make_data(data, "train", options.clips, options.seed, options.processes)
    if not base.exists():
        train_encoders(base, data, options)
    cached = ("--feature_cache", features, "--model", base)
    run("cache_features.py", *cached, "--media", data / "clips", "--kinds", "frames", "clips", "--bf16", "true",
        "--dataloader_num_workers", options.processes)  # fmt: skip

    started = options.work / "started"
    if not started.exists():
        dictionaries = train_dictionaries(
            base, data, options.work / "dictionaries", options.dictionary_steps, options.dictionary_batch_size,
            options.seed,
        )  # fmt: skip
        start_branches(
            base, started, data, features, options.work / "branches", dictionaries, options.branch_steps,
            options.branch_batch_size, options.seed, options.validation_clips,
        )  # fmt: skip

    previous = None
    model = started
    for stage in STAGES:
        output = options.work / stage
        if stage in BESIDE:
            model, previous = options.work / BESIDE[stage] / "merged", None
        if not (output / "merged").exists():
            datasets = (HERE / "stages" / f"{stage}.yaml").read_text(encoding="utf-8")
            config = options.work / f"{stage}.yaml"
            config.write_text(datasets.replace("<data>", str(data)), encoding="utf-8")
            start = ("--trained_part", previous) if previous else ()
            computation = ("--use_cpu", DEVICE.type == "cpu", "--bf16", FAST_BFLOAT16)
            steps = ("--max_steps", options.stage_steps) if options.stage_steps else ()
            run("train.py", config, "--model", model, *start, "--feature_cache", features, "--output_dir", output,
                *computation, *steps, "--attn_implementation", ATTENTION, "--merge", "true",
                "--resume_from_checkpoint", "last")  # fmt: skip
        previous = output
    export_model(options.work / STAGES[-1] / "merged", options.output)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/miniworld"), help="where everything is kept meanwhile"
    )
    parser.add_argument("--output", type=Path, default=HERE / "model", help="where the trained model is written")
    parser.add_argument("--clips", type=int, default=20000, help="clips to train on")
    parser.add_argument("--pictures", type=int, default=48000, help="pictures to train the frame encoder on")
    parser.add_argument("--frame-steps", type=int, default=3600, help="steps of the frame encoder's training")
    parser.add_argument("--frame-batch-size", type=int, default=32)
    parser.add_argument("--sound-steps", type=int, default=700, help="steps of ImageBind's training")
    parser.add_argument("--sound-batch-size", type=int, default=64)
    parser.add_argument("--dictionary-steps", type=int, default=2000, help="steps of the dictionaries' training")
    parser.add_argument("--dictionary-batch-size", type=int, default=16)
    parser.add_argument("--branch-steps", type=int, default=4000, help="steps to start a branch, 3.5 times for video")
    parser.add_argument("--branch-batch-size", type=int, default=64)
    parser.add_argument("--stage-steps", type=int, help="steps of each later stage, in place of those in `stages/`")
    parser.add_argument("--processes", type=int, default=2, help="processes that render and read clips")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.cache = options.work
    options.validation_clips = min(VALIDATION_CLIPS, options.clips // 10)
    options.work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(options.work / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        parser.error(f"another run is training in {options.work}: wait for it, or give another folder as --work.")
    with lock:
        train(options)


if __name__ == "__main__":
    main()
