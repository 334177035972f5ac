"""What people look at while a run trains: the tail of long prompts, and which tokens the teacher disagreed with."""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..scoring import DistilledTokens


TAIL_CHARS = 300
_ELLIPSIS = "[...] "
# Tokens of a byte-level vocabulary that one character takes at most
_MAX_TOKENS_PER_CHARACTER = 8
# The color scale ends here, in nats, unless a completion goes beyond
_FULL_COLOR_NATS = 2.0
_MAX_OPACITY = 0.75  # as in `heatmap.html`; more would make the text hard to read


def tail(prompt: str | list[dict]) -> str | list[dict]:
    """The end of a prompt, where the question stands: of a text, or of each message's text."""
    if isinstance(prompt, str):
        if len(prompt) <= TAIL_CHARS or prompt.startswith(_ELLIPSIS):
            return prompt
        return _ELLIPSIS + prompt[-TAIL_CHARS:]
    return [
        {**message, "content": tail(message["content"])} if isinstance(message.get("content"), str) else message
        for message in prompt
    ]


@dataclass(frozen=True)
class Trace:
    """A completion, token by token; divergences, log-probabilities and entropies are in nats."""

    prompt_ids: list[int]
    completion_ids: list[int]
    divergences: list[float]
    logps: list[float]
    teacher_entropies: list[float]
    advantage: float

    @property
    def mean_divergence(self) -> float:
        return sum(self.divergences) / max(1, len(self.divergences))


def decode_pieces(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[tuple[str, int]]:
    """Text in pieces, and how many tokens each stands for: more than one where these are one character together."""
    pieces, start = [], 0
    while start < len(ids):
        for end in range(start + 1, min(len(ids), start + _MAX_TOKENS_PER_CHARACTER) + 1):
            text = decode(list(ids[start:end]))
            if "\ufffd" not in text:
                break
        else:  # no character: the bytes stand alone
            end = start + 1
            text = decode([ids[start]])
        pieces.append((text, end - start))
        start = end
    return pieces


def render_heatmap(trace: Trace, tokenizer: PreTrainedTokenizerBase, title: str) -> str:
    """An HTML page that shows a completion with each token colored by the divergence to the teacher.

    It needs no network, and shows a token's numbers where the pointer rests on it.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    scale = max([_FULL_COLOR_NATS, *trace.divergences])
    spans, start = [], 0
    for text, count in decode_pieces(trace.completion_ids, decode):
        places = range(start, start + count)
        notes = "; ".join(
            f"token {i + 1}: divergence {trace.divergences[i]:.3f} nats, student's log-probability "
            f"{trace.logps[i]:.3f}, teacher's entropy {trace.teacher_entropies[i]:.3f}"
            for i in places
        )
        opacity = _MAX_OPACITY * max(0.0, *(trace.divergences[i] for i in places)) / scale
        spans.append((text, f"{opacity:.3f}", notes))
        start += count
    prompt = tail(decode(trace.prompt_ids))
    return _template().render(title=title, trace=trace, scale=scale, prompt=prompt, spans=spans)


@functools.cache
def _template() -> jinja2.Template:
    source = resources.files(__package__).joinpath("heatmap.html").read_text(encoding="utf-8")
    return jinja2.Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write_heatmap(folder: Path, step: int, page: str) -> Path:
    """Writes the page of a step, and an index of all steps."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.html"
    path.write_text(page, encoding="utf-8")
    steps = {file.name: int(file.stem.removeprefix("step_")) for file in sorted(folder.glob("step_*.html"))}
    index = _template().render(title="Where the teacher disagreed", steps=steps)
    (folder / "index.html").write_text(index, encoding="utf-8")
    return path


class Inspector:
    """Collects, between two log entries, the divergence of each completion and the one of the largest, to draw."""

    def __init__(self, keeps_rows: bool, keeps_trace: bool):
        self.keeps_rows, self.keeps_trace = keeps_rows, keeps_trace  # for the table, and for the heat map
        self.divergences: list[float | None] = []
        self.table_is_trained = False  # or of an evaluation, whose rows have no divergence here
        self.trace: Trace | None = None

    def begin(self, num_rows: int, is_training: bool) -> None:
        """A new generation batch of `num_rows` on this rank; one of an evaluation leaves what was collected alone."""
        self.table_is_trained = is_training
        if is_training:
            self.divergences = [None] * num_rows

    def observe(self, inputs: dict[str, Any], tokens: DistilledTokens, mask: Tensor) -> None:
        """Takes in a micro-batch that has been scored; `mask` of shape `(B, T)`: the tokens that count. Rank-local."""
        if not (self.keeps_rows or self.keeps_trace):
            return
        counts = mask.sum(-1)
        means = ((tokens.divergences.detach() * mask).sum(-1) / counts.clamp(min=1)).tolist()
        usable = [i for i, n in enumerate(counts.tolist()) if n > 0 and math.isfinite(means[i])]
        for i, index in enumerate(inputs["row_index"].tolist()):
            self.divergences[index] = means[i] if i in usable else None
        if not (self.keeps_trace and usable):
            return
        worst = max(usable, key=means.__getitem__)
        if self.trace is not None and self.trace.mean_divergence >= means[worst]:
            return
        where = mask[worst].bool()
        self.trace = Trace(
            prompt_ids=inputs["prompt_ids"][worst][inputs["prompt_mask"][worst].bool()].tolist(),
            completion_ids=inputs["completion_ids"][worst][where].tolist(),
            divergences=tokens.divergences[worst][where].detach().float().tolist(),
            logps=tokens.logps[worst][where].detach().float().tolist(),
            teacher_entropies=tokens.teacher_entropies[worst][where].float().tolist(),
            advantage=float(inputs["advantages"][worst].reshape(-1)[0]),
        )

    def complete_table(self, logs: dict[str, Any]) -> None:
        """Cuts long prompts in TRL's table of completions, adds the column `distill/divergence`. A collective call."""
        prompts = logs["prompt"] = deque(map(tail, logs["prompt"]), logs["prompt"].maxlen)
        if not self.keeps_rows:
            return
        divergences: list[float | None] = gather_object(self.divergences)
        if not self.table_is_trained or len(divergences) != len(prompts):
            divergences = [None] * len(prompts)
        logs["extra"]["distill/divergence"] = deque(divergences, prompts.maxlen)

    def write_heatmap(self, args: TrainingArguments, step: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the page of the collected trace, if there is one, to `output_dir/heatmaps` and to wandb."""
        if self.trace is None:
            return
        page = render_heatmap(self.trace, tokenizer, f"Step {step}: where the teacher disagreed")
        write_heatmap(Path(args.output_dir) / "heatmaps", step, page)
        self.trace = None
        if "wandb" in args.report_to:
            import wandb  # an optional dependency

            if wandb.run is not None:
                wandb.log({"heatmap": wandb.Html(page, inject=False)})
