"""How fast Video-LLaMA answers, and in how much memory: one run, one table, three contenders side by side.

    python benchmarks/inference.py --size base --device cpu
    python benchmarks/inference.py --size 7b --device cuda

The contenders have randomly initialised weights and get the same frames and the same text:

    ours     this package: sdpa attention; on a GPU also a static cache and compiled encoder blocks and decode step
    (a)      the library's InstructBlipVideo with an encoder and a decoder of the same sizes; it has no audio branch
    (b)      this package the way the published system runs: eager attention and a dynamic cache, nothing compiled

They take turns inside every repeat, so that whatever else the machine does falls on all of them. On a CPU the clock is
the CPU time of one thread and only ratios are printed. Peak memory is measured in a process of its own for each
contender. `benchmarks/README.md` explains every row and holds the results.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import (
    CompileConfig,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import is_bitsandbytes_available

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration

GIB = 2**30
NUM_FRAMES = 8  # of the end-to-end row: what the published system samples from a video
NUM_NEW_TOKENS = 64
NUM_TEXT_TOKENS = 64  # the prompt's words around the media
NUM_QUESTION_TOKENS = 16  # the part of them that InstructBlipVideo's Q-Former reads too

# Tuning turns matrix-vector products into generated kernels, which read the weights faster than the ready-made ones
DECODE_COMPILE_OPTIONS = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}

# On one H200, 7b in bfloat16: the row, the column it is about, and the value to reach
TARGETS = {
    "vision": ("ceiling", 0.55),
    "decode": ("ceiling", 0.70),
    "end_to_end": ("ratio_b", 3.0),
    "memory": ("memory", 20 * GIB),
    "memory_4bit": ("memory", 9 * GIB),
}


# --------------------------------------------------------------------------------------------------------------- sizes


@dataclass
class Size:
    """
    Sizes of the parts, in about the published proportions. The branches' Q-Formers have the width of `qformer` and,
    like the published ones, two layers.
    """

    vision: dict[str, int]
    qformer: dict[str, int]
    audio: dict[str, int]
    text: dict[str, Any]
    cpu_frame_chunk_size: int  # frames whose activations stay in a CPU's cache, for the model's `frame_chunk_size`


def transformer(hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int) -> dict:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
    }


SIZES = {
    "tiny": Size(
        vision={**transformer(64, 256, 8, 4), "patch_size": 14},
        qformer=transformer(32, 128, 12, 2),
        audio={**transformer(32, 128, 2, 2), "projection_dim": 48},
        text={**transformer(192, 512, 6, 3), "num_key_value_heads": 3, "vocab_size": 1024},
        cpu_frame_chunk_size=8,
    ),
    "base": Size(
        vision={**transformer(384, 1536, 12, 6), "patch_size": 14},
        qformer=transformer(192, 768, 12, 3),
        audio={**transformer(192, 768, 4, 3), "projection_dim": 256},
        text={**transformer(576, 1536, 12, 9), "num_key_value_heads": 3, "vocab_size": 49152},
        cpu_frame_chunk_size=4,
    ),
    "7b": Size(
        vision={**transformer(1408, 6144, 39, 16), "patch_size": 14},
        qformer=transformer(768, 3072, 12, 12),
        audio={**transformer(768, 3072, 12, 12), "projection_dim": 1024},
        text={**transformer(4096, 11008, 32, 32), "num_key_value_heads": 32, "vocab_size": 32000},
        cpu_frame_chunk_size=4,
    ),
}


def video_llama_config(size: Size) -> VideoLlamaConfig:
    text_config = LlamaConfig(**size.text)
    branch = {**size.qformer, "num_hidden_layers": 2, "cross_attention_frequency": 1}
    return VideoLlamaConfig(
        vision_config=size.vision,
        qformer_config={**size.qformer, "encoder_hidden_size": size.vision["hidden_size"]},
        video_qformer_config={**branch, "encoder_hidden_size": size.qformer["hidden_size"]},
        audio_config=size.audio,
        audio_qformer_config={**branch, "encoder_hidden_size": size.audio["projection_dim"]},
        text_config=text_config,
        image_token_id=text_config.vocab_size,
        video_token_id=text_config.vocab_size + 1,
        audio_token_id=text_config.vocab_size + 2,
    )


def instructblipvideo_config(size: Size) -> InstructBlipVideoConfig:
    return InstructBlipVideoConfig(
        # Its own default, 1e-10, makes the encoder's weights zeros, which a processor multiplies faster than numbers
        vision_config={**size.vision, "initializer_range": 0.02},
        qformer_config={**size.qformer, "encoder_hidden_size": size.vision["hidden_size"]},
        text_config=LlamaConfig(**size.text),
        num_query_tokens=32,
        video_token_index=size.text["vocab_size"] - 1,  # it embeds its placeholder, so that lies inside the vocabulary
    )


# ----------------------------------------------------------------------------------------------------- work of one run


def transformer_flops(config: Any, num_tokens: int) -> int:
    """
    Multiplications and additions of a transformer over n tokens of width D, with feed-forward width M, per layer:
    2n(4D² + 2DM) in the linear layers and 4n²D in the attention.
    """
    width, wide = config.hidden_size, config.intermediate_size
    linear = 2 * num_tokens * (4 * width**2 + 2 * width * wide)
    return config.num_hidden_layers * (linear + 4 * num_tokens**2 * width)


def qformer_flops(config: Any, num_queries: int, num_memory: int) -> int:
    """
    Those of a Q-Former: a transformer over q queries of width D and, in every `cross_attention_frequency`-th layer, an
    attention to m memory vectors of width E: 2(2qD² + 2mED) + 4qmD.
    """
    width = config.hidden_size
    cross = 2 * (2 * num_queries * width**2 + 2 * num_memory * config.encoder_hidden_size * width)
    cross += 4 * num_queries * num_memory * width
    num_cross_layers = math.ceil(config.num_hidden_layers / config.cross_attention_frequency)
    return transformer_flops(config, num_queries) + num_cross_layers * cross


def vision_flops(config: VideoLlamaConfig, num_videos: int, num_frames: int) -> int:
    """
    Those of the vision path: patches, ViT and image Q-Former for every frame, then the video branch for every video.
    """
    vision, qformer, video = config.vision_config, config.qformer_config, config.video_qformer_config
    patches = 2 * vision.num_patches * (vision.num_channels * vision.patch_size**2) * vision.hidden_size
    frame = patches + transformer_flops(vision, 1 + vision.num_patches)
    frame += qformer_flops(qformer, config.num_query_tokens, 1 + vision.num_patches)
    branch = qformer_flops(video, config.num_video_query_tokens, num_frames * config.num_query_tokens)
    branch += 2 * config.num_video_query_tokens * video.hidden_size * config.text_config.hidden_size
    return num_videos * (num_frames * frame + branch)


def decode_bytes(model: VideoLlamaForConditionalGeneration, context_length: int) -> int:
    """
    The fewest bytes that a decode step moves: every weight of the decoder's blocks and of the head once (of the
    embeddings one row, which is left out), and the keys and values of the context, 2 · layers · heads · head size ·
    length values.
    """
    embeddings = model.get_input_embeddings().weight
    weights = [parameter for parameter in model.model.language_model.parameters() if parameter is not embeddings]
    weights.append(model.lm_head.weight)
    text = model.config.text_config
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * context_length
    return sum(weight.numel() * weight.element_size() for weight in weights) + cached * embeddings.element_size()


# ---------------------------------------------------------------------------------------------------------- contenders


class StepClock(StoppingCriteria):
    """
    Notes the time at every new token, and stops nothing. It does not wait for a GPU: `generate` does, once a token, so
    that the times are one step apart all the same.
    """

    def __init__(self, device: torch.device):
        self.clock = time.process_time if device.type == "cpu" else time.perf_counter
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        self.times.append(self.clock())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Contender:
    """
    A model with its inputs, and what is measured of it.

    Args:
        model (`PreTrainedModel`): On its device, in its dtype.
        num_videos, num_frames (`int`): What the vision row encodes; the other rows take one video of 8 frames.
    """

    name: str
    num_soft_tokens: int
    video_token_id: int
    audio_token_id: int | None = None

    def __init__(self, model: PreTrainedModel, num_videos: int, num_frames: int):
        self.model = model.eval()
        generator = torch.Generator().manual_seed(0)
        options = {"device": model.device, "dtype": model.dtype}
        size = model.config.vision_config.image_size
        self.frames = torch.randn(num_videos, num_frames, 3, size, size, generator=generator).to(**options)
        self.video = torch.randn(1, NUM_FRAMES, 3, size, size, generator=generator).to(**options)
        text = torch.randint(3, model.config.text_config.vocab_size - 1, (1, NUM_TEXT_TOKENS), generator=generator)
        media = [self.video_token_id] * self.num_soft_tokens
        if self.audio_token_id is not None:
            media += [self.audio_token_id] * model.config.num_audio_query_tokens
        prompt = torch.cat([text[:, :4], torch.tensor([media]), text[:, 4:]], dim=1)
        self.input_ids = prompt.to(model.device)
        self.attention_mask = torch.ones_like(self.input_ids)
        self.generate_options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS}

    def encode(self, frames: torch.Tensor) -> Any:
        """The vision path: frames to soft tokens."""
        raise NotImplementedError

    def prefill(self, encoded: Any) -> torch.Tensor:
        """The decoder over the whole prompt, whose media are encoded already; the scores of the first new token."""
        raise NotImplementedError

    def generate(self, step_clock: StepClock) -> torch.Tensor:
        """End to end, from frames (and sound) to new tokens."""
        raise NotImplementedError

    def encode_media(self) -> Any:
        """What `prefill` takes."""
        raise NotImplementedError


class VideoLlamaContender(Contender):
    """This package, at its best (`ours`) or as the published system runs (`(b)`)."""

    def __init__(self, model: VideoLlamaForConditionalGeneration, name: str, num_videos: int, num_frames: int):
        self.name = name
        self.num_soft_tokens = model.config.num_video_query_tokens
        self.video_token_id, self.audio_token_id = model.config.video_token_id, model.config.audio_token_id
        super().__init__(model, num_videos, num_frames)
        audio = model.config.audio_config
        shape = (1, audio.max_source_positions, audio.num_mel_bins, audio.max_length)
        sound = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self.sound = sound.to(device=model.device, dtype=model.dtype)
        self.cache: StaticCache | None = None
        model.generation_config.eos_token_id = None

    def use_static_cache_and_compile(self) -> None:
        """
        Compiles the encoders' blocks, each kind once, and the decode step. The cache is made once and emptied for
        every answer: its tensors stay where a recorded CUDA graph looks for them.
        """
        model = self.model.model
        for blocks in (
            model.vision_tower.encoder.layers,
            model.qformer.encoder.layer,
            model.audio_tower.encoder.layers,
        ):
            for block in blocks:
                block.compile()
        length = self.input_ids.shape[1] + NUM_NEW_TOKENS
        self.cache = StaticCache(self.model.config.text_config, max_cache_len=64 * math.ceil(length / 64))
        self.generate_options["past_key_values"] = self.cache
        # The model does not change between steps: checking a thousand modules at each would leave the GPU waiting
        guards = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self.generate_options["compile_config"] = CompileConfig(
            fullgraph=True, dynamic=False, mode=None, options=DECODE_COMPILE_OPTIONS | guards
        )

    def encode(self, frames: torch.Tensor) -> Any:
        return self.model.get_video_features(frames, return_dict=True)

    def hear(self) -> Any:
        """The audio path: mel clips to soft tokens."""
        return self.model.get_audio_features(self.sound, return_dict=True)

    def prefill(self, encoded: Any) -> torch.Tensor:
        if self.cache is not None:
            self.cache.reset()
        return self.model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            mm_encoder_outputs=encoded,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def generate(self, step_clock: StepClock) -> torch.Tensor:
        if self.cache is not None:
            self.cache.reset()
        return self.model.generate(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            pixel_values_videos=self.video,
            input_features=self.sound,
            stopping_criteria=StoppingCriteriaList([step_clock]),
            **self.generate_options,
        )

    def encode_media(self) -> dict[str, Any]:
        return {"video": self.encode(self.video), "audio": self.hear()}


class InstructBlipVideoContender(Contender):
    """The library's own video model of that time, which sees the same frames and text but hears nothing."""

    name = "a"

    def __init__(self, model: InstructBlipVideoForConditionalGeneration, num_videos: int, num_frames: int):
        self.num_soft_tokens = NUM_FRAMES * model.config.num_query_tokens
        self.video_token_id = model.config.video_token_index
        super().__init__(model, num_videos, num_frames)
        vocab_size = model.config.qformer_config.vocab_size
        question = torch.randint(vocab_size, (1, NUM_QUESTION_TOKENS), generator=torch.Generator().manual_seed(1))
        self.question = question.to(model.device)
        model.language_model.generation_config.eos_token_id = None  # every contender generates all its tokens

    def encode(self, frames: torch.Tensor) -> Any:
        question = self.question.expand(len(frames), -1)
        return self.model.get_video_features(frames, qformer_input_ids=question, return_dict=True)

    def prefill(self, encoded: Any) -> torch.Tensor:
        # As its `forward`, which does not take encoded frames in every supported version of the library
        inputs_embeds = self.model.get_input_embeddings()(self.input_ids)
        mask = self.model.get_placeholder_mask(self.input_ids, inputs_embeds=inputs_embeds)
        inputs_embeds = inputs_embeds.masked_scatter(mask, encoded.pooler_output.to(inputs_embeds.dtype))
        return self.model.language_model(
            inputs_embeds=inputs_embeds, attention_mask=self.attention_mask, use_cache=True, logits_to_keep=1
        ).logits

    def generate(self, step_clock: StepClock) -> torch.Tensor:
        return self.model.generate(
            pixel_values=self.video,
            qformer_input_ids=self.question,
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            stopping_criteria=StoppingCriteriaList([step_clock]),
            **self.generate_options,
        )

    def encode_media(self) -> Any:
        return self.encode(self.video)


def build_model(
    model_class: type[PreTrainedModel], config: Any, device: torch.device, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """A randomly initialised model, made where it will run."""
    torch.manual_seed(0)
    with device:
        return model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation).eval()


def build_contender(name: str, size: Size, device: torch.device, dtype: torch.dtype) -> Contender:
    """The contender of that name: `ours`, `a` or `b`."""
    shape = vision_shape(device)
    if name == "a":
        config = instructblipvideo_config(size)
        model = build_model(InstructBlipVideoForConditionalGeneration, config, device, dtype, "sdpa")
        return InstructBlipVideoContender(model, *shape)
    attn_implementation = "eager" if name == "b" else "sdpa"
    model = build_model(
        VideoLlamaForConditionalGeneration, video_llama_config(size), device, dtype, attn_implementation
    )
    contender = VideoLlamaContender(model, name, *shape)
    if name == "ours" and device.type == "cuda":
        contender.use_static_cache_and_compile()
    elif name == "ours":
        model.config.frame_chunk_size = size.cpu_frame_chunk_size
    return contender


def share_weights(ours: VideoLlamaContender) -> VideoLlamaContender:
    """The published way to run the model, (b), around the very weights of `ours`."""
    memo = {id(tensor): tensor for tensor in ours.model.parameters()}
    model = copy.deepcopy(ours.model, memo)
    model.config.frame_chunk_size = VideoLlamaConfig().frame_chunk_size
    model.set_attn_implementation("eager")
    return VideoLlamaContender(model, "b", *ours.frames.shape[:2])


def vision_shape(device: torch.device) -> tuple[int, int]:
    """Videos and frames a video of the vision row: 64 frames fill a GPU, and the model has 32 positions."""
    return (2, 32) if device.type == "cuda" else (1, NUM_FRAMES)


# ----------------------------------------------------------------------------------------------------------- measuring


def get_clock(device: torch.device) -> Callable[[], float]:
    """Wall time once the GPU is done, or the CPU time of this process, which does not count what others do."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


@torch.no_grad()
def measure(
    contenders: list[Contender], repeats: int, clock: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every row, contender and repeat."""
    times: dict[str, dict[str, list[float]]] = {
        row: {contender.name: [] for contender in contenders}
        for row in ("vision", "audio", "prefill", "decode", "end_to_end")
    }

    # Others can only slow a CPU's caches and memory down, so there the fastest of a few tries is the least disturbed
    # one
    on_cpu = contenders[0].model.device.type == "cpu"
    tries, typical = (3, min) if on_cpu else (1, statistics.median)

    def seconds_of(function: Callable, *args) -> float:
        start = clock()
        function(*args)
        return clock() - start

    def timed(row: str, contender: Contender, function: Callable, *args) -> None:
        times[row][contender.name].append(min(seconds_of(function, *args) for _ in range(tries)))

    encoded = {contender.name: contender.encode_media() for contender in contenders}
    for contender in contenders:  # warm up: first calls allocate and compile
        contender.encode(contender.frames)
        contender.prefill(encoded[contender.name])
        for _ in range(2):
            contender.generate(StepClock(contender.model.device))
    # In every order: who runs next finds the caches as the one before left them
    orders = itertools.cycle(itertools.permutations(contenders))
    for order in itertools.islice(orders, repeats):
        for contender in order:
            timed("vision", contender, contender.encode, contender.frames)
        for contender in order:
            if isinstance(contender, VideoLlamaContender):
                timed("audio", contender, contender.hear)
        for contender in order:
            timed("prefill", contender, contender.prefill, encoded[contender.name])
        for contender in order:
            step_clock = StepClock(contender.model.device)
            times["end_to_end"][contender.name].append(seconds_of(contender.generate, step_clock))
            if len(step_clock.times) != NUM_NEW_TOKENS:
                raise RuntimeError(
                    f"Contender {contender.name} gave {len(step_clock.times)} new tokens and not {NUM_NEW_TOKENS}: "
                    "the rows would not compare like with like."
                )
            steps = [after - before for before, after in itertools.pairwise(step_clock.times)]
            times["decode"][contender.name].append(typical(steps))
    return times


def measure_ceilings(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> tuple[float, float]:
    """FLOP/s of an 8192³ matrix product on random numbers, and bytes/s, read and written, of a copy on the device."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(GIB, device=device, dtype=torch.float32)
    target = torch.empty_like(source)

    def median_time(function: Callable, calls: int) -> float:
        times = []
        for _ in range(8):
            start = clock()
            for _ in range(calls):
                function()
            times.append((clock() - start) / calls)
        return statistics.median(times[3:])

    matmul = 2 * 8192**3 / median_time(lambda: torch.matmul(left, right), 10)
    copied = 2 * source.numel() * source.element_size() / median_time(lambda: target.copy_(source), 5)
    return matmul, copied


def peak_memory_of(name: str, size: Size, device: torch.device, dtype: torch.dtype) -> int:
    """
    The most bytes that weights and activations of a contender take up to the end of its answer. To be called in a
    process that does nothing else.
    """
    before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    contender = build_quantized(size, device, dtype) if name == "4bit" else build_contender(name, size, device, dtype)
    contender.generate(StepClock(device))
    if device.type == "cuda":
        if name != "4bit":  # there, loading counts too
            torch.cuda.reset_peak_memory_stats()
        contender.generate(StepClock(device))
        return torch.cuda.max_memory_allocated()
    return peak_resident_memory() - before


def peak_resident_memory() -> int:
    """The most bytes that this process has had in memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("Peak memory on a CPU is read from /proc/self/status, which this system does not have.")
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


def build_quantized(size: Size, device: torch.device, dtype: torch.dtype) -> VideoLlamaContender:
    """
    `ours` with the decoder in 4 bits, loaded as a user loads it, with a dynamic cache. Leaves the peak of the loading.
    """
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        build_model(
            VideoLlamaForConditionalGeneration, video_llama_config(size), device, dtype, "sdpa"
        ).save_pretrained(folder)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        model = VideoLlamaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, quantization_config=quantization_config, device_map={"": device}
        )
    return VideoLlamaContender(model, "4bit", *vision_shape(device))


def measure_memory(names: list[str], args: argparse.Namespace) -> dict[str, int]:
    """
    `peak_memory_of` each contender, in fresh processes: as many at a time as a GPU has room for, because what another
    one allocates there does not count, and one after the other on a CPU.
    """

    def measure_one(name: str) -> int:
        command = [sys.executable, __file__, "--size", args.size, "--device", args.device, "--dtype", args.dtype]
        result = subprocess.run([*command, "--memory-of", name], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"Measuring the memory of {name} failed:\n{result.stderr}")
        return json.loads(result.stdout.splitlines()[-1])

    at_a_time = 1
    if args.device == "cuda":
        at_a_time = max(1, torch.cuda.mem_get_info()[0] // weights_size(args))
    with ThreadPoolExecutor(at_a_time) as pool:
        return dict(zip(names, pool.map(measure_one, names), strict=True))


# ----------------------------------------------------------------------------------------------------------- the table


@dataclass
class Row:
    """
    A line of the table.

    Args:
        name (`str`): Key of `TARGETS`.
        label (`str`): What is measured.
        unit (`str`): What `amount` counts; empty for a time.
        amount (`float`): Work of one timed call: frames, clips, tokens. A time is its number of calls, 1.
    """

    name: str
    label: str
    unit: str
    amount: float

    def show(self, seconds: float) -> str:
        return f"{self.amount / seconds:.1f} {self.unit}/s" if self.unit else f"{1000 * seconds:.1f} ms"


def describe_ratio(ours: list[float], others: list[float]) -> str:
    """
    How many times as fast ours is: the median over the repeats, in each of which both took their turn, and quartiles.
    """
    ratios = [other / own for own, other in zip(ours, others, strict=True)]
    if len(ratios) < 3:
        return f"{statistics.median(ratios):.2f}x"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def verdict(value: float, target: tuple[str, float] | None) -> str:
    """Whether a value meets its target: at most that many bytes, or at least that ratio or fraction."""
    if target is None:
        return ""
    column, goal = target
    if column == "memory":
        return f"{'PASS' if value < goal else 'MISS'} (under {goal / GIB:.0f} GiB)"
    goal_text = f"{goal:.0%}" if column == "ceiling" else f"{goal:.1f}x"
    return f"{'PASS' if value >= goal else 'MISS'} (at least {goal_text})"


def describe_run(size: str, dtype: str, device: torch.device) -> str:
    """The line above a table: what it was measured with."""
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} thread"
    return f"{size}, {dtype}, {hardware}, torch {torch.__version__}, transformers {transformers.__version__}"


def run(args: argparse.Namespace) -> None:
    """Measures everything and prints the table."""
    size, device, dtype = SIZES[args.size], torch.device(args.device), getattr(torch, args.dtype)
    on_gpu = device.type == "cuda"
    clock = get_clock(device)
    targets = TARGETS if on_gpu and (args.size, args.dtype) == ("7b", "bfloat16") else {}
    ours = build_contender("ours", size, device, dtype)
    contenders = [ours, build_contender("a", size, device, dtype), share_weights(ours)]
    ceilings = None
    if on_gpu:
        ceilings = measure_ceilings(device, dtype, clock)
        torch.cuda.empty_cache()
    times = measure(contenders, args.repeats, clock)

    num_videos, num_frames = vision_shape(device)
    config = ours.model.config
    rows = [
        Row("vision", f"vision path, {num_videos * num_frames} frames", "frames", num_videos * num_frames),
        Row("audio", f"audio path, {config.audio_config.max_source_positions} clips", "clips", ours.sound.shape[1]),
        Row("prefill", "prefill", "", 1),
        Row("decode", "decode", "tokens", 1),
        Row("end_to_end", f"{NUM_FRAMES} frames + sound + {NUM_NEW_TOKENS} tokens", "", 1),
    ]
    print(describe_run(args.size, args.dtype, device))
    if ceilings is not None:
        print(f"Measured peaks: {ceilings[0] / 1e12:.0f} TFLOP/s (8192³ matmul), {ceilings[1] / 1e12:.2f} TB/s (copy)")
    print()
    header = ["row", "ours", "(a) InstructBlipVideo", "(b) as published", "ours to (a)", "ours to (b)"]
    header += ["of peak", "target"]
    columns = range(len(header)) if on_gpu else (0, 4, 5)  # absolute times of a shared CPU say little

    def show(*line: str) -> None:
        print(f"| {' | '.join(line[i] for i in columns)} |", flush=True)

    show(*header)
    show(*["---"] * len(header))
    for row in rows:
        seconds = {name: statistics.median(values) for name, values in times[row.name].items() if values}
        ratios = {name: describe_ratio(times[row.name]["ours"], times[row.name][name]) for name in seconds}
        fraction, fraction_text = math.nan, ""
        if ceilings is not None and row.name == "vision":
            fraction = vision_flops(config, num_videos, num_frames) / seconds["ours"] / ceilings[0]
            fraction_text = f"{fraction:.0%} of matmul"
        if ceilings is not None and row.name == "decode":
            context = ours.input_ids.shape[1] + NUM_NEW_TOKENS // 2
            fraction = decode_bytes(ours.model, context) / seconds["ours"] / ceilings[1]
            fraction_text = f"{fraction:.0%} of copy"
        absolute = [row.show(seconds[name]) if name in seconds else "none" for name in ("ours", "a", "b")]
        target = targets.get(row.name)
        value = fraction if target is not None and target[0] == "ceiling" else seconds["b"] / seconds["ours"]
        show(row.label, *absolute, ratios.get("a", "none"), ratios["b"], fraction_text, verdict(value, target))
    del contenders, ours
    if on_gpu:
        torch.cuda.empty_cache()

    names = ["ours", "a", "b"]
    if on_gpu and is_bitsandbytes_available():
        names.append("4bit")
    peaks = measure_memory(names, args)
    absolute = [f"{peaks[name] / GIB:.2f} GiB" for name in ("ours", "a", "b")]
    ratios = [f"{peaks[name] / peaks['ours']:.2f}x" for name in ("a", "b")]
    show("peak memory, with sound", *absolute, *ratios, "", verdict(peaks["ours"], targets.get("memory")))
    if on_gpu:
        peak = peaks.get("4bit")
        shown = "bitsandbytes is not installed" if peak is None else f"{peak / GIB:.2f} GiB"
        target = "not measured" if peak is None else verdict(peak, targets.get("memory_4bit"))
        show("peak memory, with sound, 4-bit decoder", shown, "", "", "", "", "", target)
    print("\nRatios above 1: ours is faster, or takes less memory. Medians over the repeats, quartiles in brackets.")


def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses what cannot run here before anything is allocated."""
    check_device(args, parser, weights_size(args), "choose a smaller --size, or --dtype bfloat16")


def weights_size(args: argparse.Namespace) -> int:
    """Bytes of the weights that are compared: one model of each kind, because (b) shares those of ours."""
    size = SIZES[args.size]
    with torch.device("meta"):
        models = [
            VideoLlamaForConditionalGeneration(video_llama_config(size)),
            InstructBlipVideoForConditionalGeneration(instructblipvideo_config(size)),
        ]
    return sum(model.num_parameters() for model in models) * getattr(torch, args.dtype).itemsize


def check_device(args: argparse.Namespace, parser: argparse.ArgumentParser, needed: int, advice: str) -> None:
    """Refuses a device that is not there or has fewer free bytes than the weights need, and then gives advice."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here. Use --device cpu with --size tiny or base.")
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        parser.error(
            f"--size {args.size} needs {needed / GIB:.0f} GiB for the weights of what is compared, but "
            f"{free / GIB:.0f} GiB are free on {args.device}: {advice}."
        )


def make_parser(description: str, size: str, repeats: int) -> argparse.ArgumentParser:
    """What both benchmarks can be told; `size` and `repeats` are defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=SIZES, default=size, help=f"sizes of the models, by name (default: {size})")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help=f"interleaved repeats of every row (default: {repeats})"
    )
    return parser


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], size="base", repeats=9)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, else float32"
    )
    parser.add_argument("--memory-of", choices=["ours", "a", "b", "4bit"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks times shapes of their inputs, over one code object
    if args.memory_of:
        print(peak_memory_of(args.memory_of, SIZES[args.size], torch.device(args.device), getattr(torch, args.dtype)))
        return
    check_arguments(args, parser)
    run(args)


if __name__ == "__main__":
    main()
