"""Evaluation on the published benchmarks: readers of their files, answers of the model, scores, the report.

`benchmarks.py` lists what there is; `cli/eval.py` puts it together.
"""
