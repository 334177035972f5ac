"""Teachers' answers over the whole document, for the columns `response_<model>` that a cold start is trained on."""

import asyncio
from dataclasses import replace

from pydantic import Field

from ...llm import ChatClient, RequestFailed
from ...strict_model import StrictModel
from ..identification import Identify, other_language
from ..questions.agreement import answers_agree
from ..records import UNANSWERABLE, Drop, Row


STAGE = "responses"


class TeacherConfig(StrictModel):
    """One teacher."""

    server: str = Field(description="Its name among `servers`.")
    name: str | None = Field(None, description="Model in the name of the column. Default: the server's `model`.")
    max_tokens: int = Field(8192, ge=1, description="Longest response, in tokens, reasoning included.")
    max_draws: int = Field(3, ge=1, description="Draws until one is in the question's language; at temperature 0 one.")
    keep_thinking: bool = Field(False, description="Put the reasoning before the answer, between `<think>` tags.")
    keep_only_correct: bool = Field(False, description="Leave responses out that do not agree with the answer.")
    required: bool = Field(False, description="Whether a row without this response leaves.")


class ResponsesConfig(StrictModel):
    """Section `responses`."""

    teachers: tuple[TeacherConfig, ...] = Field((), description="Models that answer. Default: none.")


class Responder:
    """Lets the teachers answer; `clients` are by server. Without `identify`, a response may be in any language."""

    def __init__(self, config: ResponsesConfig, clients: dict[str, ChatClient], identify: Identify | None = None):
        self.config = config
        self.clients = clients
        self.identify = identify

    async def respond(self, row: Row, document_text: str) -> tuple[Row | None, list[Drop]]:
        """The row with the responses, or `None` if it lacks one that is required; and what is missing, and why.

        A response that failed has the reason of [`llm.failures`]; one in another language than the question, however
        often it was drawn, `wrong_language`; one that is wrong, where only right ones are wanted, `wrong_response`.
        """
        # As in training: the document, then the question
        messages = [{"role": "user", "content": f"{document_text}\n\n{row.question}"}]
        teachers = sorted(self.config.teachers, key=lambda teacher: not teacher.required)
        num_required = sum(teacher.required for teacher in teachers)
        results: list[str | Drop] = []
        for group in (teachers[:num_required], teachers[num_required:]):
            results += await asyncio.gather(*(self._respond(teacher, row, messages) for teacher in group))
            drops = [result for result in results if isinstance(result, Drop)]
            if drops and group and group[0].required:
                return None, drops  # no other teacher is asked about a row that leaves
        answered = {self._name(teacher): result for teacher, result in zip(teachers, results, strict=True)}
        names = [self._name(teacher) for teacher in self.config.teachers]  # in the order of the configuration
        given = {name: answer for name in names if isinstance(answer := answered[name], str)}
        return replace(row, responses={**row.responses, **given}), drops

    def _name(self, teacher: TeacherConfig) -> str:
        return teacher.name or self.clients[teacher.server].config.model

    async def _respond(self, teacher: TeacherConfig, row: Row, messages: list[dict[str, str]]) -> str | Drop:
        name, client = self._name(teacher), self.clients[teacher.server]
        found = None
        for sample in range(1 if client.config.temperature == 0 else teacher.max_draws):
            try:
                reply = await client.complete(messages, max_tokens=teacher.max_tokens, sample=sample)
            except RequestFailed as error:
                return Drop(STAGE, row.source, row.id, error.reason, f"{name}: {error.detail}")
            if self.identify is not None and row.task != UNANSWERABLE:  # whose answer may be an English phrase
                found = other_language({"response": reply.text}, row.language, self.identify)
            if found is None:
                break
        if found is not None:
            return Drop(STAGE, row.source, row.id, "wrong_language", f"{name}: {found[0]}: {reply.text[:300]}")
        # What repeats the question is an echo, and may hold the answer with the rest of the prompt
        is_right = answers_agree(row.answer, reply.text) and row.question not in reply.text
        if teacher.keep_only_correct and not is_right:
            return Drop(STAGE, row.source, row.id, "wrong_response", f"{name}: {reply.text[:300]}")
        if teacher.keep_thinking and reply.thinking:
            return f"<think>\n{reply.thinking}\n</think>\n\n{reply.text}"
        return reply.text
