"""Prompts on their way into a run: control tokens in their text stay text, and they fit the models' positions."""

from typing import Any

from trl import GRPOTrainer, is_conversational

from .chat import escape_messages
from .checks import arriving_prompt_problems, raise_problems
from .config import DGRPOConfig
from .row_checks import prompt_problems
from .shared_prefix import unpadded


class CheckedPrompts(GRPOTrainer):
    """Tokenizes prompts of the student, results of tools, and prompts of the teacher. A base of the trainer."""

    args: DGRPOConfig
    _positions: dict[str, int | None]  # of each model that reads prompts, by what messages call it
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
        return [escape_messages(prompt, self._tokenizer) for prompt in prompts]

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        ids: list[int] = super()._get_tool_suffix_ids(escape_messages(tool_messages, self._tokenizer))
        return ids

    def _generate(self, prompts: list) -> tuple:
        if self.rollout_func is not None:  # it applies the chat template itself
            prompts = self._escaped(prompts)
        generated: tuple = super()._generate(prompts)
        return generated

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
