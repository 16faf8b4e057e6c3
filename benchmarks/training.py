"""How fast Video-LLaMA trains, and in how much memory: one run, one table, three contenders side by side.

    python benchmarks/training.py --size tiny --device cpu
    python benchmarks/training.py --size 7b --device cuda

Every stage of `examples/training` is trained with random weights on videos that the benchmark renders, by

    online   this package's training code as the stage's file sets it up: media read, cropped and encoded at each step
    cached   the same, reading the encoders' features from a feature cache
    plain    a loop as one writes it by hand around the same model and the same samples: decoding between the steps,
             all logits computed

They take turns inside every repeat, so that whatever else the machine does falls on all of them. On a CPU nobody has
workers, the clock is the CPU time of the process, and only ratios are printed. `benchmarks/README.md` explains every
row.
"""

import argparse
import csv
import gc
import itertools
import json
import math
import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
import transformers
from inference import (
    GIB,
    NUM_FRAMES,
    SIZES,
    Size,
    build_model,
    check_device,
    describe_ratio,
    describe_run,
    get_clock,
    make_parser,
    measure_ceilings,
    peak_resident_memory,
    transformer,
    verdict,
    video_llama_config,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.feature_extraction_video_llama import VideoLlamaFeatureExtractor
from transformers_videollama.image_processing_video_llama import VideoLlamaImageProcessor
from transformers_videollama.training.arguments import parse_arguments
from transformers_videollama.training.feature_cache_writer import cache_features
from transformers_videollama.training.run import load_data
from transformers_videollama.training.trainer import VideoLlamaTrainer
from transformers_videollama.video_processing_video_llama import VideoLlamaVideoProcessor

STAGES = ("video_stage1", "video_stage2", "audio_stage1", "audio_stage2")
STAGE_FILES = Path(__file__).resolve().parent.parent / "examples" / "training"
CONTENDERS = ("online", "cached", "plain")

# On one H200, 7b in bfloat16, stage 1 of the video branch: the row, the column it is about, and the value to reach
TARGETS = {"online": ("ceiling", 0.45), "cached": ("ratio", 5.0), "memory": ("memory", 40 * GIB)}


@dataclass
class Load:
    """
    What is trained on, and for how long.

    Args:
        height, width, seconds (`int`): Of the videos, of 25 frames a second.
        num_videos (`int`): How many there are; every epoch shows each several times.
        batch_size (`int`, *optional*): In place of the stage's own.
        warm_up, steps (`int`): Steps of a turn that are not timed, and that are.
        plain_steps (`int`): Timed steps of the plain loop, after a single one: it prepares nothing ahead, so that all
            its steps take the same.
        workers (`int`): Processes that decode for the training code.
    """

    height: int
    width: int
    seconds: int
    num_videos: int
    batch_size: int | None
    warm_up: int
    steps: int
    plain_steps: int
    workers: int


# Few videos of little content on a CPU; those of WebVid's size on a GPU, and the published batches
LOADS = {
    "cpu": Load(240, 320, 2, 4, batch_size=2, warm_up=1, steps=2, plain_steps=2, workers=0),
    "cuda": Load(336, 596, 8, 32, batch_size=None, warm_up=4, steps=16, plain_steps=4, workers=14),
}


# ----------------------------------------------------------------------------------------------------- model and data


def training_config(size: Size, branch: str, processor: VideoLlamaProcessor) -> VideoLlamaConfig:
    """
    That of the inference benchmark; for the audio branch with ImageBind's vision tower, of the ViT's width and depth.
    """
    config = video_llama_config(size)
    if branch == "audio":
        vision = transformer(1280, 5120, 32, 16) if size is SIZES["7b"] else size.vision
        vision = {**vision, "patch_size": 14, "projection_dim": size.audio["projection_dim"]}
        config = VideoLlamaConfig(**{**config.to_dict(), "audio_vision_config": vision})
    for kind in ("image", "video", "audio"):
        setattr(config, f"{kind}_token_id", getattr(processor, f"{kind}_token_id"))
    return config


def build_processor(vocab_size: int) -> VideoLlamaProcessor:
    """A processor whose words are numbers, `w0`, `w1`, …, as many as the decoder knows."""
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(vocab_size - 3))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    return VideoLlamaProcessor(
        VideoLlamaImageProcessor(),
        tokenizer,
        VideoLlamaVideoProcessor(),
        VideoLlamaFeatureExtractor(),
        chat_template="vicuna",
    )


def build_trainable(
    size: Size, branch: str, processor: VideoLlamaProcessor, device: torch.device, dtype: torch.dtype
) -> VideoLlamaForConditionalGeneration:
    """A randomly initialised model whose branch is trained, in float32 as the training code has it."""
    config = training_config(size, branch, processor)
    model = build_model(VideoLlamaForConditionalGeneration, config, device, dtype, "sdpa")
    model.set_trainable(branch)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def render_video(path: Path, load: Load, seed: int) -> None:
    """An H.264 video of a box that moves over a gradient."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[: load.height, : load.width]
    background = np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)
    x, y = generator.integers(0, (load.width // 2, load.height // 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = load.width, load.height, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for index in range(25 * load.seconds):
            picture = background.copy()
            left = (x + 3 * index) % (load.width // 2)
            picture[y : y + load.height // 3, left : left + load.width // 3] = generator.integers(0, 256, 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_data(folder: Path, load: Load, num_rows: int) -> None:
    """Videos, and both kinds of annotations of them: captions of 8 to 24 words, and three turns of about 80 each."""
    words = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{words.randrange(1000)}" for _ in range(words.randint(shortest, longest)))

    (folder / "videos").mkdir()
    for number in range(load.num_videos):
        render_video(folder / "videos" / f"{number}.mp4", load, number)
    with open(folder / "captions.csv", "w", newline="") as captions, open(folder / "chats.jsonl", "w") as chats:
        table = csv.writer(captions)
        table.writerow(["videoid", "name", "page_dir"])
        for number in range(num_rows):
            video = number % load.num_videos
            table.writerow([video, text(8, 24), "videos"])
            messages: list[dict[str, Any]] = []
            for _ in range(3):
                messages.append({"role": "user", "content": [{"type": "text", "text": text(5, 20)}]})
                messages.append({"role": "assistant", "content": [{"type": "text", "text": text(40, 80)}]})
            messages[0]["content"].insert(0, {"type": "video", "path": f"videos/{video}.mp4"})
            chats.write(json.dumps({"messages": messages}) + "\n")


def stage_arguments(
    stage: str, contender: str, folder: Path, load: Load, device: str, compile_decoder: bool
) -> tuple[Any, Any, Any]:
    """What `examples/training/train.py` would make of the stage's file, with this data and without anything saved."""
    is_first = stage.endswith("1")
    source = {"format": "webvid" if is_first else "chat", "annotations": str(folder / "captions.csv")}
    if not is_first:
        source["annotations"] = str(folder / "chats.jsonl")
    options: dict[str, Any] = {
        "model": "random weights",
        "trained_part": "none",
        "datasets": json.dumps([source]),
        "output_dir": folder / "output",
        "max_steps": load.warm_up + load.steps,
        "warmup_steps": 0,
        "dataloader_num_workers": load.workers,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "bf16": str(device == "cuda").lower(),
        "use_cpu": str(device == "cpu").lower(),
        "compile_decoder": str(compile_decoder).lower(),
    }
    if load.batch_size is not None:
        options["per_device_train_batch_size"] = load.batch_size
    if contender == "cached":
        branch = stage.partition("_")[0]
        options |= {"feature_cache": folder / f"cache_{branch}", "random_resized_crop": "false", "sampling": "uniform"}
    command = [str(STAGE_FILES / f"{stage}.yaml"), *(f"--{name}={value}" for name, value in options.items())]
    return parse_arguments(command)


def write_cache(
    model: VideoLlamaForConditionalGeneration, branch: str, processor: VideoLlamaProcessor, folder: Path
) -> None:
    media = [(str(path), "video") for path in sorted((folder / "videos").iterdir())]
    kinds = ["frames"] if branch == "video" else ["clips"]
    cache_features(model, processor, media, folder / f"cache_{branch}", kinds, NUM_FRAMES, num_workers=0)


# ---------------------------------------------------------------------------------------------------------- contenders


class TurnClock(TrainerCallback):
    """Notes the time after the warm-up and at the end of a turn."""

    def __init__(self, clock: Callable[[], float], load: Load):
        self.clock, self.load = clock, load
        self.times: list[float] = []

    def step(self, number: int) -> None:
        """After step `number`, counted from 1."""
        if number in (self.load.warm_up, self.load.warm_up + self.load.steps):
            self.times.append(self.clock())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step(state.global_step)


class Turn:
    """
    One contender's turn at a stage: `run` trains for the steps of the load.

    Args:
        stage, contender (`str`): Of `STAGES` and `CONTENDERS`.
        model (`VideoLlamaForConditionalGeneration`): As [`build_trainable`] makes it; all contenders train the same.
    """

    def __init__(
        self,
        stage: str,
        contender: str,
        model: VideoLlamaForConditionalGeneration,
        processor: VideoLlamaProcessor,
        folder: Path,
        load: Load,
        device: str,
        compile_decoder: bool = False,
    ):
        self.contender, self.model, self.processor = contender, model, processor
        self.load = replace(load, warm_up=1, steps=load.plain_steps) if contender == "plain" else load
        model_args, data_args, self.args = stage_arguments(stage, contender, folder, load, device, compile_decoder)
        self.dataset, self.collator = load_data(data_args, model_args.branch, self.args, processor, model)
        self.batch_size = self.args.per_device_train_batch_size

    def run(self, clock: Callable[[], float]) -> float:
        """Seconds a sample."""
        turn_clock = TurnClock(clock, self.load)
        if self.contender == "plain":
            self._run_plain(turn_clock)
        else:
            trainer = VideoLlamaTrainer(
                model=self.model,
                args=self.args,
                train_dataset=self.dataset,
                data_collator=self.collator,
                processing_class=self.processor,
                callbacks=[turn_clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        start, end = turn_clock.times
        return (end - start) / (self.load.steps * self.batch_size)

    def first_batch(self) -> dict[str, torch.Tensor]:
        batch = self.collator([self.dataset[index] for index in range(self.batch_size)])
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.args.bf16 else nullcontext()

    def _run_plain(self, turn_clock: TurnClock) -> None:
        model = self.model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
        for step in range(self.load.warm_up + self.load.steps):
            samples = [self.dataset[step * self.batch_size + index] for index in range(self.batch_size)]
            batch = {name: tensor.to(model.device) for name, tensor in self.collator(samples).items()}
            with self.autocast():
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            turn_clock.step(step + 1)


# ----------------------------------------------------------------------------------------------------------- measuring


def release() -> None:
    """What a turn leaves behind goes before the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_stage(
    turns: list[Turn], repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds a sample of each contender and repeat, and on a GPU the most bytes allocated in a contender's turns."""
    seconds: dict[str, list[float]] = {turn.contender: [] for turn in turns}
    peaks = dict.fromkeys(seconds, 0)
    on_gpu = turns[0].model.device.type == "cuda"
    # In every order: who runs next finds the caches as the one before left them
    orders = itertools.cycle(itertools.permutations(turns))
    for order in itertools.islice(orders, repeats):
        for turn in order:
            release()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds[turn.contender].append(turn.run(clock))
            turn.model.zero_grad(set_to_none=True)
            if on_gpu:
                peaks[turn.contender] = max(peaks[turn.contender], torch.cuda.max_memory_allocated())
    return seconds, peaks


def count_flops(turn: Turn) -> int:
    """Multiplications and additions of a sample in one step of the training code, counted by PyTorch as it runs."""
    model, batch = turn.model.train(), turn.first_batch()
    with FlopCounterMode(display=False) as counter, turn.autocast():
        model(**batch, skip_logits=True, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() // turn.batch_size


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process forked from this one, so that its memory is its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in a process of its own; its error is above.") from None
    finally:
        process.join()


def peak_memory_of(stage: str, contender: str, size: Size, folder: Path, load: Load) -> int:
    """
    The bytes by which training grows the resident set of this process, which does nothing else; weights included.
    """
    before = psutil.Process().memory_info().rss
    branch = stage.partition("_")[0]
    processor = build_processor(size.text["vocab_size"])
    model = build_trainable(size, branch, processor, torch.device("cpu"), torch.float32)
    Turn(stage, contender, model, processor, folder, load, "cpu").run(get_clock(torch.device("cpu")))
    return peak_resident_memory() - before


def write_cache_alone(size: Size, branch: str, folder: Path) -> None:
    """[`write_cache`] in a process that ends, so that the memory of the next ones does not start higher."""
    processor = build_processor(size.text["vocab_size"])
    model = build_trainable(size, branch, processor, torch.device("cpu"), torch.float32)
    write_cache(model, branch, processor, folder)


# ----------------------------------------------------------------------------------------------------------- the table


def run(args: argparse.Namespace) -> None:
    """Measures every stage and prints the table."""
    size, device = SIZES[args.size], torch.device(args.device)
    on_gpu, load, clock = device.type == "cuda", LOADS[args.device], get_clock(device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    targets = TARGETS if on_gpu and args.size == "7b" else {}
    print(describe_run(args.size, str(dtype)[6:], device))
    matmul = math.nan
    if on_gpu:
        matmul, _ = measure_ceilings(device, dtype, clock)
        release()
        print(f"Measured peak: {matmul / 1e12:.0f} TFLOP/s (8192³ matmul)")
    print()

    def show(*line: str) -> None:
        print(f"| {' | '.join(line)} |", flush=True)

    header = ["row", "online to plain", "cached to plain", "cached to online"]
    if on_gpu:
        header += ["online", "cached", "plain", "online, of matmul", "target"]
    show(*header)
    show(*["---"] * len(header))

    def show_memory(stage: str, peaks: dict[str, int]) -> None:
        pairs = (("plain", "online"), ("plain", "cached"), ("online", "cached"))
        line = [f"{stage}, peak memory", *(f"{peaks[other] / peaks[own]:.2f}x" for other, own in pairs)]
        if on_gpu:
            goal = targets.get("memory") if stage == "video_stage1" else None
            line += [*(f"{peaks[name] / GIB:.1f} GiB" for name in CONTENDERS), "", verdict(peaks["online"], goal)]
        show(*line)

    with tempfile.TemporaryDirectory(prefix="videollama-benchmark-") as temporary:
        folder = Path(temporary)
        largest_batch = load.batch_size or 32
        # More than a turn takes, because the next batches are prepared ahead to its end
        write_data(folder, load, 2 * largest_batch * (load.warm_up + load.steps))
        peaks_of = {}
        branches = list(dict.fromkeys(stage.partition("_")[0] for stage in args.stages))
        if not on_gpu:
            for branch in branches:
                in_child(write_cache_alone, size, branch, folder)
            for stage in args.stages:
                peaks_of[stage] = {
                    name: in_child(peak_memory_of, stage, name, size, folder, load) for name in CONTENDERS
                }
        processor = build_processor(size.text["vocab_size"])
        for branch in branches:
            model = build_trainable(size, branch, processor, device, dtype)
            if on_gpu:
                write_cache(model, branch, processor, folder)
            for stage in (stage for stage in args.stages if stage.startswith(branch)):
                turns = [
                    Turn(stage, name, model, processor, folder, load, args.device, args.compile_decoder)
                    for name in CONTENDERS
                ]
                flops = count_flops(turns[0]) if on_gpu else 0
                seconds, peaks = measure_stage(turns, args.repeats, clock)
                pairs = (("online", "plain"), ("cached", "plain"), ("cached", "online"))
                line = [f"{stage}, batch {turns[0].batch_size}"]
                line += [describe_ratio(seconds[own], seconds[other]) for own, other in pairs]
                if on_gpu:
                    typical = {name: statistics.median(values) for name, values in seconds.items()}
                    line += [f"{1 / typical[name]:.1f} samples/s" for name in CONTENDERS]
                    fraction = flops / typical["online"] / matmul
                    line.append(f"{fraction:.0%}")
                    goals = targets if stage == "video_stage1" else {}
                    verdicts = [
                        verdict(fraction, goals.get("online")),
                        verdict(typical["online"] / typical["cached"], goals.get("cached")),
                    ]
                    line.append(", ".join(filter(None, verdicts)))
                show(*line)
                show_memory(stage, peaks if on_gpu else peaks_of[stage])
            del model, turns
            release()
    print(
        "\nRatios above 1: the first trains more samples a second, or takes less memory. Medians over the repeats, "
        "quartiles in brackets."
    )


def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses what cannot run here before anything is allocated."""
    if args.device == "cpu" and not Path("/proc/self/status").exists():
        parser.error("--device cpu: peak memory is read from /proc/self/status, which this system does not have.")
    size = SIZES[args.size]
    with torch.device("meta"):
        config = training_config(size, "audio", build_processor(size.text["vocab_size"]))
        num_parameters = VideoLlamaForConditionalGeneration(config).num_parameters()
    check_device(args, parser, num_parameters * (2 if args.device == "cuda" else 4), "choose a smaller --size")


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], size="tiny", repeats=3)
    parser.add_argument(
        "--compile-decoder",
        action="store_true",
        help="train with --compile_decoder; the plain loop, whose model it is as well, gets the compiled layers",
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.device == "cpu":
        torch.set_num_threads(1)
    check_arguments(args, parser)
    run(args)


if __name__ == "__main__":
    main()
