"""The card of a trained model, rendered, and read by huggingface_hub; and uploaded to a stand-in of the Hub."""

import re

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from dgrpo_trl import DGRPOTrainer


@pytest.fixture
def trained(make_trainer, saved_teacher):
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model_name_or_path=saved_teacher,
        distill_coef=0.3,
        hub_token="hf_secret",
        hub_model_id="somebody/ship",
        chat_template_kwargs={"enable_thinking": False},
    )
    trainer.train()
    return trainer


def test_the_card_holds_recipe_metrics_and_citation(trained, saved_teacher, tmp_path):
    trained.create_model_card(model_name="ship", dataset_name="LongBlocks")
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert "dgrpo" in card.data.tags and "trl" in card.data.tags
    recipe = yaml.safe_load(re.search(r"## Recipe.*?```yaml\n(.*?)```", text, re.S)[1])
    assert recipe["distill_coef"] == 0.3 and recipe["num_generations"] == 4 and recipe["max_steps"] == 2
    assert recipe["chat_template_kwargs"] == {"enable_thinking": False}
    assert "epsilon" not in recipe and "hub_token" not in recipe and "hf_secret" not in text
    assert str(tmp_path) not in text and saved_teacher not in text
    last = [entry for entry in trained.state.log_history if "distill/divergence" in entry][-1]
    assert f"| `distill/divergence` | {last['distill/divergence']:.4g} |" in text and "After 2 steps" in text
    assert "arXiv:2605.12227" in text and text.index("## Metrics") < text.index("### Framework versions")


class Hub:
    """Stands in for the Hub's API, and remembers."""

    def __init__(self, card):
        self.card, self.uploads = card, []

    def create_repo(self, name, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, **kwargs):
        self.uploads.append((kwargs["repo_id"], str(kwargs["folder_path"]), self.card.read_text()))


def test_what_is_pushed_holds_the_card(trained, monkeypatch, tmp_path):
    hub = Hub(tmp_path / "out" / "README.md")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trained.push_to_hub(dataset_name="LongBlocks")
    ((repo, folder, text),) = hub.uploads
    assert repo == "somebody/ship" and folder == str(tmp_path / "out") and "## Recipe" in text
