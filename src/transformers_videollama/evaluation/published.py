"""Published scores, as reported in the papers that are named, beside which the measured ones are shown."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """
    What a paper reports about a model.

    Args:
        model (`str`): The model.
        source (`str`): The paper, and what else one has to know to compare.
        scores (`dict[str, float]`): By the name of the score, of a part of a benchmark by `"group: name"`.
    """

    model: str
    source: str
    scores: dict[str, float]


def _judged(model: str, accuracy: float, score: float) -> Published:
    return Published(model, _ZERO_SHOT_QA, {"accuracy by judge": accuracy, "score by judge (0–5)": score})


_ZERO_SHOT_QA = "zero-shot, judged by GPT-3.5; Video-LLaVA's paper (arXiv 2311.10122)"
_MVBENCH = "MVBench's paper (arXiv 2311.17005)"
_MVBENCH_VIDEO_LLAMA = {
    "action sequence": 27.5,
    "action prediction": 25.5,
    "action antonym": 51.0,
    "fine grained action": 29.0,
    "unexpected action": 39.0,
    "object existence": 48.0,
    "object interaction": 40.5,
    "object shuffle": 38.0,
    "moving direction": 22.5,
    "action localization": 22.5,
    "scene transition": 43.0,
    "action count": 34.0,
    "moving count": 22.5,
    "moving attribute": 32.5,
    "state change": 45.5,
    "fine grained pose": 32.5,
    "character order": 40.0,
    "egocentric navigation": 30.0,
    "episodic reasoning": 21.0,
    "counterfactual inference": 37.0,
}
_GIT = "trained on this data set; GIT's paper (arXiv 2205.14100)"
_IFEVAL = "IFEval's paper (arXiv 2311.07911)"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "msvd-qa": (
        _judged("Video-LLaMA", 51.6, 2.5),
        _judged("VideoChat", 56.3, 2.8),
        _judged("Video-ChatGPT", 64.9, 3.3),
        _judged("Video-LLaVA", 70.7, 3.9),
    ),
    "msrvtt-qa": (
        _judged("Video-LLaMA", 29.6, 1.8),
        _judged("VideoChat", 45.0, 2.5),
        _judged("Video-ChatGPT", 49.3, 2.8),
        _judged("Video-LLaVA", 59.2, 3.5),
    ),
    "activitynet-qa": (
        _judged("Video-LLaMA", 12.4, 1.1),
        _judged("VideoChat", 26.5, 2.2),
        _judged("Video-ChatGPT", 35.2, 2.7),
        _judged("Video-LLaVA", 45.3, 3.3),
    ),
    "tgif-qa": (
        _judged("VideoChat", 34.4, 2.3),
        _judged("Video-ChatGPT", 51.4, 3.0),
        _judged("Video-LLaVA", 70.0, 4.0),
    ),
    "mvbench": (
        Published(
            "Video-LLaMA",
            _MVBENCH,
            {"average of tasks: by generation": 34.1}
            | {f"{task}: by generation": value for task, value in _MVBENCH_VIDEO_LLAMA.items()},
        ),
        Published("VideoChat", _MVBENCH, {"average of tasks: by generation": 35.5}),
        Published("Video-ChatGPT", _MVBENCH, {"average of tasks: by generation": 32.7}),
        Published("VideoChat2", _MVBENCH, {"average of tasks: by generation": 51.1}),
        Published("guessing", _MVBENCH, {"average of tasks: by generation": 27.3}),
    ),
    "msrvtt-caption": (Published("GIT", _GIT, {"BLEU-4": 53.8, "METEOR": 32.9, "ROUGE-L": 67.7, "CIDEr": 73.9}),),
    "msvd-caption": (Published("GIT", _GIT, {"BLEU-4": 79.5, "METEOR": 51.1, "ROUGE-L": 87.3, "CIDEr": 180.2}),),
    "pope": (
        Published(
            "InstructBLIP",
            "pictures of COCO; POPE's paper (arXiv 2305.10355)",
            {
                "random: accuracy": 88.57,
                "random: precision": 84.09,
                "random: recall": 95.13,
                "random: F1": 89.27,
                "random: yes ratio": 56.57,
                "popular: accuracy": 82.77,
                "popular: precision": 76.27,
                "popular: recall": 95.13,
                "popular: F1": 84.66,
                "popular: yes ratio": 62.37,
                "adversarial: accuracy": 72.10,
                "adversarial: precision": 65.13,
                "adversarial: recall": 95.13,
                "adversarial: F1": 77.32,
                "adversarial: yes ratio": 73.03,
            },
        ),
    ),
    "instructions": tuple(
        Published(
            model,
            _IFEVAL,
            {
                "after training: prompts, strict": strict,
                "after training: instructions, strict": strict_instructions,
                "after training: prompts, loose": loose,
                "after training: instructions, loose": loose_instructions,
            },
        )
        for model, strict, strict_instructions, loose, loose_instructions in (
            ("GPT-4", 76.89, 83.57, 79.30, 85.37),
            ("PaLM 2 S", 43.07, 55.76, 46.95, 59.11),
        )
    ),
}
"""By the name of the benchmark; the video probe is made anew from each data set, and nothing is published of it."""
