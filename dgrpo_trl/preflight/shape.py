"""What of a model decides its memory and its operations."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory and its operations."""

    num_parameters: int
    num_trainable: int
    num_layers: int
    hidden: int
    query: int  # width of all heads together
    key: int
    mlp: int  # width of what a token passes through: of all its experts
    vocab: int
    trains_head: bool = True

    @classmethod
    def of(cls, config: PreTrainedConfig, peft_config: Any = None, trust_remote_code: bool = False) -> "Shape":
        """Counts on the meta device: nothing is read or allocated."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            if peft_config is not None:
                from peft import get_peft_model

                model = get_peft_model(model, peft_config)
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        experts = getattr(text, "num_experts_per_tok", None)
        mlp = text.moe_intermediate_size * experts if experts else text.intermediate_size
        return cls(
            num_parameters=sum(p.numel() for p in model.parameters()),
            num_trainable=sum(p.numel() for p in model.parameters() if peft_config is None or p.requires_grad),
            num_layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            query=heads * head_dim,
            key=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
            mlp=mlp,
            vocab=text.vocab_size,
            trains_head=model.get_output_embeddings().weight.requires_grad,
        )

    def active(self) -> int:
        """Parameters of the layers that a token is multiplied with: without embeddings, and its own experts alone."""
        per_layer = self.hidden * (2 * self.query + 2 * self.key) + 3 * self.hidden * self.mlp
        return self.num_layers * per_layer

    def kept_by_layer(self, width: int) -> int:
        """Bytes per token that one layer keeps for its backward pass, with values of `width` bytes.

        Each of its two norms keeps input and normalized input in float32, and its output. Attention keeps queries and
        keys before and after their norm and their rotation, values and its output; the MLP its four products. A frozen
        layer keeps its input too, for the adapter's gradient.
        """
        norms = 2 * self.hidden * (4 + 4 + width)
        attention = width * (4 * self.query + 4 * self.key)
        return norms + attention + width * 4 * self.mlp

    def transient(self, width: int) -> int:
        """Bytes per token of what else is live at the widest place of a layer's backward pass.

        Two gradients of the width of the MLP (what they are made of goes as they come), those of its input and output,
        and one of attention's output.
        """
        return width * (2 * self.mlp + 2 * self.hidden + self.query)

    def forward_flops(self, segments: list[tuple[int, int]]) -> float:
        """Operations of one forward without the LM head.

        Args:
            segments (`list[tuple[int, int]]`):
                Number of tokens, and how many stand before the first of them, of each segment that is run.
        """
        tokens = sum(n for n, _ in segments)
        pairs = sum(n * before + n * (n + 1) / 2 for n, before in segments)
        return 2 * self.active() * tokens + 4 * self.num_layers * self.query * pairs

    def head_flops(self, tokens: int) -> float:
        return 2.0 * self.hidden * self.vocab * tokens
