"""Why something was left out: every reason that the summary of a build and a reader's counts show.

A new reason is one line here; [`Store`] refuses one that is missing.
"""

# By the stage of the builder that counts them. `Drop.detail` says more of the single case
REASONS: dict[str, dict[str, str]] = {
    "sources": {
        # Reading, see [`sources`]
        "gated": "the data set of the Hub has terms that this user has not accepted: all of it is missing",
        "no_text": "it has no text, or only white space; or cleaning left nothing",
        "not_text": "its text column holds something else",
        "malformed_json": "the line is no JSON object",
        "undecodable": "it is binary, in no configured encoding, or holds half a surrogate pair",
        "unreadable": "it is damaged, encrypted, forbidden, or not a regular file",
        "too_large": "it has more bytes than `max_document_bytes`",
        # Cleaning, see [`builder.cleaning`]
        "secret": "it holds a key, and `cleaning.secrets` is `drop`",
        "mostly_symbols": "letters are fewer than `min_letter_share` of what is no white space",
        "repetitive": "one line makes up more than `max_repeated_line_share` of its lines",
        "unknown_language": "no language is stated, and none was recognized",
        "wrong_language": "another language than the source states was recognized",
        "language_not_wanted": "its language is not one of `cleaning.languages`",
        "too_short": "it has fewer tokens than `cleaning.min_tokens`",
        "too_long": "it has more tokens than `cleaning.max_tokens`",
    },
    "deduplication": {
        "exact_duplicate": "an earlier document has the same text, but for case and white space",
        "near_duplicate": "an earlier document is similar by `deduplication.threshold`",
    },
    "blocks": {},
    "questions": {
        # By rule, see [`questions.rule_engine`]
        "no_template_for_language": "no task can be asked in its language",
        "too_short_for_task": "the document has fewer than three blocks",
        "no_fit": "no facts, gaps or words were found that make the answer certain within the length",
        # By a model, see [`questions.llm_engine`]
        "too_few_blocks": "the document has fewer blocks than the task needs",
        "no_question": "the reply holds no question of a sensible length",
        "no_answer": "the reply holds no answer of a sensible length",
        "unknown_evidence": "the reply names a block that was not shown",
        "too_few_evidence_blocks": "the reply names fewer blocks than the task needs",
        "wrong_language": "the question or the answer is in another language than the document",
    },
    "verification": {  # See [`questions.verification`]
        "bad_evidence": "the offsets of its evidence select no text",
        "answer_in_question": "the question holds the answer",
        "wrong_language": "the question or the answer is in another language than the row",
        "not_grounded": "the answer does not follow from the evidence alone",
        "closed_book": "the model answers without any text",
        "hop_not_needed": "the model still answers with a block of the evidence removed",
        "answerable": "the document answers the question, which was to be unanswerable",
        "judge_rejected": "the judge rejects the row",
        "no_verdict": "the judge gave no verdict in the agreed form",
        "verification_no_verdict": "the judge never said whether two answers are the same",
    },
    "responses": {  # See [`builder.responses`]
        "wrong_language": "every response was in another language than the question",
        "wrong_response": "the response does not agree with the answer, and `keep_only_correct` is set",
    },
    "decontamination": {"contaminated": "it holds a piece of an evaluation set"},
    "mixing": {
        "duplicate_question": "an earlier row asks the same of the same document, or has the same question and answer",
        "enough_of_document": "the document has `max_rows_per_document` other rows",
        "not_in_shares": "its task, language or source is not named in `mixing.shares`",
        "over_share": "its task, language or source has its share of the rows",
        "enough_rows": "there are `max_rows` other rows",
    },
    "card": {},
    "publish": {"cannot_be_rejoined": "its document may not be published, and is not the text of the source as it is"},
}

# A request to a model failed, in `questions`, in `responses`, or in `verification` as `verification_<reason>`: what
# happened is in [`llm.failures`]. Here: whether another run may get a reply
REQUEST_REASONS = {
    "rate_limited": True,
    "server_error": True,
    "timeout": True,
    "connection_closed": True,
    "malformed_reply": True,
    "empty_reply": True,
    "truncated": True,
    "refused_content": False,
    "context_overflow": False,
    "bad_request": False,
}

# Why a row of a data set is no training row, see [`read`]
READING_REASONS = {
    "no_document": "its document is not in the set, and no copy of the books was given",
    "book_not_found": "the copy of the books does not hold its document, or no page of it",
    "book_differs": "the document joined from the pages is not the one that the question was made from",
    "empty_question": "it has no question",
    "empty_answer": "it has no answer",
    "empty_response": "it has no response in `completion_column`, or the last turn of a conversation is empty",
    "bad_evidence": "the offsets of its evidence select nothing in the document",
    "prompt_too_short": "its prompt has fewer than `min_prompt_tokens`",
    "prompt_too_long": "its prompt has more than `max_prompt_tokens`",
    "no_messages": "the conversation has no turn",
    "no_answer_turn": "the conversation does not end with an answer to something",
    "not_text": "a turn of the conversation is not text",
}


def is_known(stage: str, reason: str) -> bool:
    """Whether the tables list a reason for a stage of the builder."""
    request_reason = reason.removeprefix("verification_") if stage == "verification" else reason
    return reason in REASONS[stage] or request_reason in REQUEST_REASONS


def may_succeed_again(stage: str, reason: str) -> bool:
    """Whether it was a request that failed, and that may succeed in another run."""
    return REQUEST_REASONS.get(reason.removeprefix(f"{stage}_"), False)
