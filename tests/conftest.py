"""Tiny models, a tokenizer and a data set, all made here: no network, no weights."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers.decoders import ByteLevel as ByteLevelDecoder  # noqa: E402


transformers.logging.set_verbosity_error()

ROOT = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The ship Antonio sails from Venice with number 4821.",
    "What is the number of the ship? Answer with the number only.",
    "user assistant system The town of Marbury has 730 people and 12 mills.",
] * 4


def build_tokenizer(vocab_size: int = 300) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
}


def build_model(
    kind: str = "Qwen3", seed: int = 0, vocab_size: int = 300, scale: float = 8.0, **overrides
) -> transformers.PreTrainedModel:
    """A random causal LM. `scale` widens the logits, so that distributions differ and a wrong term shows."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab_size,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        **{"tie_word_embeddings": False, **SIZES, **overrides},
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model():
    return build_model


@pytest.fixture(scope="session")
def dataset():
    rows = [
        {
            "prompt": [{"role": "user", "content": f"The ship Antonio has number {i}. What is the number?"}],
            "answer": str(i),
        }
        for i in range(11, 43)
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def saved_teacher(tokenizer, tmp_path_factory):
    """Path of a saved teacher with the session's tokenizer."""
    path = str(tmp_path_factory.mktemp("teacher"))
    build_model(seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def length_reward(completions, **kwargs):
    """Differs between completions, so that advantages are not all zero."""
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


def given_rollouts(tokenizer):
    """Given completions of unequal length, some without an end: sampling would hide differences."""

    def rollout(prompts, trainer):
        ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        completions = []
        for i in range(len(prompts)):
            length = int(torch.randint(2, 8, (), generator=generator))
            end = [2] if i % 3 else []
            completions.append(torch.randint(3, 290, (length,), generator=generator).tolist() + end)
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    return rollout


@pytest.fixture
def make_trainer(tokenizer, dataset, make_model, tmp_path):
    """Builds a trainer of the given class with fast settings; keywords go to its config, or to the trainer."""
    from trl import GRPOConfig, GRPOTrainer

    from dgrpo_trl import DGRPOConfig

    trainer_arguments = {
        *("teacher_model", "peft_config", "reward_funcs", "rollout_func", "train_dataset", "eval_dataset"),
        "quantization_config",
    }

    def make(trainer_class, model=None, **kwargs):
        config_class = GRPOConfig if trainer_class is GRPOTrainer else DGRPOConfig
        arguments = {name: kwargs.pop(name) for name in trainer_arguments & kwargs.keys()}
        arguments = {"reward_funcs": length_reward, "train_dataset": dataset, **arguments}
        config = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 7,
            **kwargs,
        }
        return trainer_class(
            model=make_model() if model is None else model,
            args=config_class(**config),
            processing_class=tokenizer,
            **arguments,
        )

    return make
