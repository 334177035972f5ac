"""Prompts on their way into a run: control tokens in their text stay text, and they fit the models' positions."""

from collections import Counter
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from trl import GRPOTrainer, is_conversational

from .chat import breakable_tokens, escape_messages, special_token_warnings
from .checks import arriving_prompt_problems, raise_problems
from .config import DGRPOConfig
from .row_checks import prompt_problems
from .shared_prefix import unpadded


logger = get_logger(__name__)


class CheckedPrompts(GRPOTrainer):
    """Tokenizes prompts of the student, results of tools, and prompts of the teacher. A base of the trainer."""

    args: DGRPOConfig
    _positions: dict[str, int | None]  # of each model that reads prompts, by what messages call it
    _warned: set[str]  # of which texts with special tokens a warning was logged
    _batch_environments: list[str | None]  # TRL's

    def _tokenize_prompts(self, prompts: list) -> tuple:
        tokenized = self._tokenize(prompts)
        # Here, not at every turn: TRL ends a completion at `max_completion_length`, results of tools included
        self._check_positions(tokenized[0], "the student")
        return tokenized

    def _tokenize(self, prompts: list) -> tuple:
        tokenized: tuple = super()._tokenize_prompts(self._escaped(prompts))
        return tokenized

    def _escaped(self, prompts: list) -> list:
        raise_problems(prompt_problems(prompts, "This batch"))  # streams are checked no earlier
        if not is_conversational({"prompt": prompts[0]}):
            return prompts  # texts, whose control tokens are meant
        if not isinstance(self.train_dataset, Dataset) or self.environment_factories is not None:
            self._warn_once(prompts, "Prompts of this batch")  # those of a data set were counted before
        return [self._escaped_messages(prompt) for prompt in prompts]

    def _escaped_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return escape_messages(messages, self._tokenizer, self.args.keep_special_tokens)

    def _warn_once(self, prompts: list, name: str) -> None:
        if name not in self._warned:
            for warning in special_token_warnings(prompts, name, self._tokenizer, self.args.keep_special_tokens):
                self._warned.add(name)
                logger.warning(warning)

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        self._warn_once([tool_messages], "The result of a tool")
        ids: list[int] = super()._get_tool_suffix_ids(self._escaped_messages(tool_messages))
        return ids

    def _generate(self, prompts: list) -> tuple:
        if self.rollout_func is not None:  # it applies the chat template itself
            prompts = self._escaped(prompts)
        generated: tuple = super()._generate(prompts)
        if self.rollout_func is not None:
            self._warn_of_control_tokens(generated[1], generated[2])
        return generated

    def _warn_of_control_tokens(self, completion_ids: list[list[int]], env_mask: list[list[int]] | None) -> None:
        """Counts, once, the control tokens among the ids that `env_mask` says the student did not write."""
        name = "rollout_func"
        if env_mask is None or name in self._warned:
            return
        control = {self._tokenizer.convert_tokens_to_ids(token) for token in breakable_tokens(self._tokenizer)}
        pairs = zip(completion_ids, env_mask, strict=True)
        others = [i for ids, mask in pairs for i, own in zip(ids, mask, strict=True) if not own]
        counts = Counter(self._tokenizer.convert_ids_to_tokens(i) for i in others if i in control)
        if counts:
            self._warned.add(name)
            logger.warning(
                f"`rollout_func` returned {len(others):,} token ids of others (`env_mask` 0), with control tokens "
                f"among them: {dict(counts.most_common())}. Token ids are taken as they are: those that frame a turn "
                "are meant, those that stood in a text are not. Pass what others wrote through "
                "`dgrpo_trl.chat.escape_special_tokens` before you tokenize it."
            )

    def _check_positions(self, prompt_ids: list[list[int]], reader: str) -> None:
        """Raises if a prompt leaves `reader` no room for the longest completion: streams are checked no earlier."""
        positions = None if self.args.allow_extrapolation else self._positions[reader]
        raise_problems(arriving_prompt_problems(prompt_ids, self.max_completion_length or 0, positions, reader))

    def _teacher_prompt_ids(self, inputs: list[dict[str, Any]], rollouts: dict[str, Any]) -> list[list[int]]:
        """What the teacher reads before each completion: the row's own teacher prompt, else the student's prompt."""
        prompt_ids = [ids.tolist() for ids in unpadded(rollouts["prompt_ids"], rollouts["prompt_mask"])]
        column = self.args.teacher_prompt_column
        own = {} if column is None else {i: row[column] for i, row in enumerate(inputs) if row.get(column) is not None}
        if own:
            for i, ids in zip(own, self._tokenize_rows(list(own.values()), list(own)), strict=True):
                prompt_ids[i] = list(ids)
        self._check_positions(prompt_ids, "the teacher")
        return prompt_ids

    def _tokenize_rows(self, prompts: list, rows: list[int]) -> list[list[int]]:
        """Token ids of `prompts`, which belong to these rows of the generation batch: each with its row's tools."""
        if self.environment_factories is None:
            return list(self._tokenize(prompts)[0])
        environments = self._batch_environments
        self._batch_environments = [environments[i] for i in rows]
        try:
            return list(self._tokenize(prompts)[0])
        finally:
            self._batch_environments = environments
