"""Evaluates a checkpoint: long-context tasks made here, held-out questions, and lm-evaluation-harness.

    python scripts/evaluate.py --config recipes/eval/cpu.yaml --model_name_or_path outputs/demo/dgrpo \
        --output_dir outputs/eval/dgrpo
    python scripts/evaluate.py --model_name_or_path outputs/demo/dgrpo --questions outputs/demo/data/test.jsonl \
        --output_dir outputs/eval/dgrpo-demo

Writes `results.json`, `results.md` and `heatmap.png`. Started again after it was stopped, it resumes.
"""

from collections.abc import Sequence

from ..evaluation.arguments import EvaluationArguments
from .arguments import parse_arguments


def main(arguments: Sequence[str] | None = None) -> None:
    (args,) = parse_arguments((EvaluationArguments,), arguments, __doc__)
    # Takes seconds, which `--help` does without
    from ..evaluation.results import results_table
    from ..evaluation.runs import EvaluationRun

    print(results_table(EvaluationRun(args).run()))
