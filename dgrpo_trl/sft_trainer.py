"""TRL's `SFTTrainer` for the cold start, with the checkpoints and the model card of [`DGRPOTrainer`]."""

from pathlib import Path

from trl import SFTTrainer

from .run.card import add_recipe_and_metrics
from .run.checkpoints import CompleteCheckpoints


class ResumableSFTTrainer(CompleteCheckpoints, SFTTrainer):
    """`SFTTrainer`, whose complete checkpoints are marked, and whose card holds recipe and metrics."""

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            add_recipe_and_metrics(Path(self.args.output_dir) / "README.md", self.args, self.state.log_history)
