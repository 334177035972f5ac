"""Why something was left out, see `reasons.yaml`; [`Store`] refuses a reason that is missing there."""

from ..files import read_table
from ..llm.failures import REQUEST_REASONS


_TABLES = read_table(__package__, "reasons.yaml")
REASONS: dict[str, dict[str, str]] = _TABLES["stages"]
READING_REASONS: dict[str, str] = _TABLES["reading"]


def is_known(stage: str, reason: str) -> bool:
    """Whether the tables list a reason for a stage of the builder."""
    request_reason = reason.removeprefix("verification_") if stage == "verification" else reason
    return reason in REASONS[stage] or request_reason in REQUEST_REASONS


def may_succeed_again(stage: str, reason: str) -> bool:
    """Whether it was a request that failed, and that may succeed in another run."""
    return REQUEST_REASONS.get(reason.removeprefix(f"{stage}_"), False)
