"""Cold start: supervised fine-tuning of the student on prompt -> answer, with TRL's `SFTTrainer`.

    accelerate launch scripts/train_sft.py --config recipes/smollm2-135m/sft/demo.yaml

Only the completion is trained on: the reference answers, or a teacher's responses, which makes it off-policy
distillation. Every field of TRL's `SFTConfig` and `ModelConfig` is a key of the recipe and a flag of the command line;
a key that no argument matches is an error.
"""

import logging
from collections.abc import Sequence

from trl import SFTConfig

from ..checks import supervised_findings
from ..config import SFTScriptArguments
from ..models import read_models
from ..run.training import train_to_the_end
from .training_run import prepare_run


logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    run = prepare_run(SFTScriptArguments, SFTConfig, arguments, __doc__)
    if run is None:
        return
    models = read_models(run.model_args.model_name_or_path, None, run.training_args, run.tokenizer)
    args = run.script_args
    findings = supervised_findings(
        run.training_args, models, run.datasets, args.allow_extrapolation, args.keep_special_tokens
    )
    for warning in findings.warnings:
        logger.warning(warning)
    findings.raise_for_problems()
    from ..sft_trainer import ResumableSFTTrainer  # takes seconds, which `--help` and a dry run do without

    trainer = ResumableSFTTrainer(**run.trainer_arguments, processing_class=run.tokenizer)
    train_to_the_end(trainer, run.script_args.dataset_name)
