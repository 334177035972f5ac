"""Evaluates a checkpoint: long-context tasks made here, held-out questions, and lm-evaluation-harness.

    python scripts/evaluate.py --config recipes/eval/cpu.yaml --model_name_or_path outputs/demo/dgrpo \
        --output_dir outputs/eval/dgrpo
    python scripts/evaluate.py --model_name_or_path outputs/demo/dgrpo --questions outputs/demo/data/test.jsonl \
        --output_dir outputs/eval/dgrpo-demo

Writes `results.json`, `results.md` and `heatmap.png`. Started again after it was stopped, it goes on.
"""

from trl import TrlParser

from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.evaluation.results import results_table
from dgrpo_trl.evaluation.runs import EvaluationRun


def main(args: EvaluationArguments) -> None:
    print(results_table(EvaluationRun(args).run()))


if __name__ == "__main__":
    main(*TrlParser((EvaluationArguments,)).parse_args_and_config())
