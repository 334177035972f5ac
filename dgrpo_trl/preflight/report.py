"""What a dry run found, and its text."""

from dataclasses import dataclass, field

from ..checks import Findings


@dataclass
class Report(Findings):
    """What was found. `str(report)` is the text for the reader."""

    # Names and values, by the title of the section
    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    # Memory of one GPU by phase of a step and by what takes it
    memory_gib: dict[str, dict[str, float]] = field(default_factory=dict)
    # Memory of the host that one process takes for its GPU, by what takes it
    host_gib: dict[str, float] = field(default_factory=dict)
    # `"plain"` without the shared prefix, `"shared"` with it, `"decode"` of decoding alone
    step_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, section: str, name: str, value: str) -> None:
        self.sections.setdefault(section, []).append((name, value))

    def __str__(self) -> str:
        lines = []
        for section, rows in self.sections.items():
            width = max(len(name) for name, _ in rows)
            lines += [section, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
        for title, items in (("Warnings", self.warnings), ("Problems: the run must not start", self.problems)):
            if items:
                lines += [title, *(f"  - {item}" for item in items), ""]
        return "\n".join(lines) if lines else "Nothing to report."
