"""The data set's card: what is in it, where it comes from, what was left out, and what has not been checked."""

import html
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...extras import import_extra
from ...files import write_text
from ...strict_model import StrictModel
from ..questions.baselines import Baselines
from ..records import Drop


FIGURE = "assets/document_lengths.png"
_BASELINES = ("task", "rows", "the most frequent answer", "stands in the question", "stands in the nearest line")
# Longer tables end in a line that says how many rows are left out
_MAX_TABLE_ROWS = 40
_PACKAGES = ("dgrpo-trl", "datasets", "huggingface_hub", "pyarrow", "tokenizers")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))

# From the most lenient to the strictest; within a tier none is stricter than another
_PUBLIC_DOMAIN, _PERMISSIVE, _ATTRIBUTION, _SHARE_ALIKE, _RESTRICTED, _UNKNOWN = range(6)
_TIERS = (
    (_RESTRICTED, r"cc-by-n[cd]|non-?commercial|no-(re)?distribution|no-derivatives"),
    (_SHARE_ALIKE, r"cc-by-sa|gfdl|\b[al]?gpl|\bmpl"),
    (_ATTRIBUTION, r"cc-by|odc-by"),
    (_PERMISSIVE, r"\bmit\b|apache|\bbsd|\bisc\b|\bpsf|python-software-foundation"),
    (_PUBLIC_DOMAIN, r"cc-?0|publicdomain|public-domain|unlicense|\bpddl"),
)
_HUB_IDS = (
    r"cc-by(?:-(?:nc|nd|sa))*-\d\.\d|odc-by|gfdl|[al]?gpl-\d\.\d|mpl-\d\.\d|mit\b|apache-2\.0|bsd-[23]-clause|"
    r"\bisc\b|cc0-1\.0|unlicense|pddl"
)


class CardConfig(StrictModel):
    """What the card says that the rows do not show."""

    pretty_name: str = Field(default="LongBlocks", description="Title of the card.")
    summary: str = Field(default="", description="Markdown below the title: what this set was built for.")
    license: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9.-]*$",
        description="License of the set, as an identifier of the Hub. By default the strictest among its documents', "
        "and `other` where that is not one license, or where the license of a document is not known.",
    )
    tags: tuple[str, ...] = Field(default=("long-context", "synthetic"), description="Tags on the Hub.")
    task_categories: tuple[str, ...] = Field(("question-answering", "text-generation"), description="Task categories.")


@dataclass
class Statistics:
    """What the card counts, in one pass over the rows; its size does not grow with their number.

    Lengths are counted in bins that double: below 1,024 tokens, up to 2,048, and so on.
    """

    num_rows: int = 0
    num_without_document: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    licenses: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    evidence_blocks: Counter[int] = field(default_factory=Counter)
    responses: Counter[str] = field(default_factory=Counter)
    length_bins: Counter[int] = field(default_factory=Counter)
    num_tokens: int = 0
    checks: dict[str, Counter[str]] = field(default_factory=dict)
    drops: Counter[tuple[str, str]] = field(default_factory=Counter)
    baselines: Baselines = field(default_factory=Baselines)

    def add(self, record: Mapping[str, Any], num_tokens: int | None = None, license: str | None = None) -> None:
        """Counts a row of the data set ([`publish.published_record`]); of its document, what is known."""
        self.num_rows += 1
        self.num_without_document += record["document"] is None
        self.sources[record["source"]] += 1
        self.languages[record["language"]] += 1
        self.tasks[record["task"]] += 1
        self.baselines.add(record["task"], record["question"], record["answer"], record["document"])
        self.licenses[record["source"], license] += 1
        self.evidence_blocks[len(record["evidence"])] += 1
        self.responses.update(n for n in record if n.startswith("response_") and record[n] is not None)
        if num_tokens is not None:
            self.length_bins[(num_tokens >> 10).bit_length()] += 1
            self.num_tokens += num_tokens
        for check in record["checks"]:
            counts = self.checks.setdefault(check["name"], Counter())
            counts.update({"rows": 1, "passed": int(check["passed"]), "score": check["score"]})

    def add_drop(self, drop: Drop) -> None:
        """Counts something that was left out."""
        self.drops[drop.stage, drop.reason] += 1


def hub_license(licenses: Iterable[str | None]) -> str:
    """The strictest of some licenses as an identifier of the Hub; `"other"` if no single known one is.

    They are written as sources write them: names, SPDX identifiers, addresses of Creative Commons. Of several versions
    of CC BY-SA it is the latest, to which the earlier ones may be taken.
    """
    texts = {_normalize_license(license or "") for license in licenses}
    tiers = {text: next((tier for tier, p in _TIERS if re.search(p, text)), _UNKNOWN) for text in texts}
    strictest = [text for text, tier in tiers.items() if tier == max(tiers.values())]
    found = {match[0] if (match := re.search(_HUB_IDS, text)) else "other" for text in strictest}
    if all(name.startswith("cc-by-sa-") for name in found):
        return max(found, default="other")
    return found.pop() if len(found) == 1 else "other"


def _normalize_license(text: str) -> str:
    text = re.sub(r"(?:https?://)?(?:www\.)?creativecommons\.org/licenses/", "cc-", text.lower())
    text = re.sub(r"creative commons[\s-]+zero", "cc0", text)
    return re.sub(r"[\s/_]+", "-", text)


def draw_lengths(statistics: Statistics, path: Path) -> None:
    """Writes the histogram of document lengths as a PNG file."""
    bins = range(min(statistics.length_bins), max(statistics.length_bins) + 1)
    figure = import_extra("matplotlib.figure", "The card's figure").Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar([_bin_label(index) for index in bins], [statistics.length_bins[index] for index in bins])
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_xlabel("Length of the document (tokens; 1K is 1,024)")
    axes.set_ylabel("Rows")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def _bin_label(index: int) -> str:
    return "< 1K" if index == 0 else f"{2 ** (index - 1)}K to {2**index}K"


def write_card(folder: Path, statistics: Statistics, config: CardConfig, **context: Any) -> Path:
    """Writes `README.md` as [`render_card`] makes it, and its figure where lengths are known."""
    folder.mkdir(parents=True, exist_ok=True)
    if statistics.length_bins:
        draw_lengths(statistics, folder / FIGURE)
    path = folder / "README.md"
    write_text(path, render_card(statistics, config, **context))
    return path


def render_card(
    statistics: Statistics,
    config: CardConfig,
    *,
    recipe: str,
    fingerprint: str,
    command: str,
    engine: Literal["rule", "llm"],
    models: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
    evaluation_sets: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
) -> str:
    """The card as text, see `card_template.md`: metadata of the Hub, tables, what was checked, how to build it again.

    Names that come from the sources cannot break out of their place: neither Markdown nor HTML in them has an effect.
    The recipe is shown verbatim, and must hold no secret. `models` maps what a model was asked for to its name;
    `versions` are by default those of the installed packages.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    license = config.license or hub_license(license for _, license in statistics.licenses)
    languages = sorted(name for name in statistics.languages if re.fullmatch(r"[a-z]{2,3}", name or ""))
    data = DatasetCardData(
        pretty_name=config.pretty_name,
        language=languages or None,
        license=license,
        license_name="see-card" if license == "other" else None,
        size_categories=[next((name for limit, name in _SIZES if statistics.num_rows < limit), "10M<n<100M")],
        task_categories=list(config.task_categories),
        tags=list(config.tags),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    if versions is None:
        versions = {name: metadata.version(name) for name in _PACKAGES}
    card = DatasetCard.from_template(
        data,
        template_str=resources.files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"),
        title=_text(config.pretty_name),
        summary=config.summary,
        rows=f"{statistics.num_rows:,}",
        engine=engine,
        counts=_count_tables(statistics),
        baselines=_table(_BASELINES, statistics.baselines.shares()),
        lengths=_lengths(statistics, tokenizer),
        figure=FIGURE if statistics.length_bins else None,
        checks=_checks_table(statistics),
        drops=_table(("stage", "reason", "left out"), _counted(statistics.drops)),
        set_license=license,
        licenses=_table(("source", "license of the documents", "rows"), _counted(statistics.licenses)),
        num_without_document=f"{statistics.num_without_document:,}" if statistics.num_without_document else None,
        models=_table(("for", "model"), sorted((models or {}).items())),
        evaluation_sets=", ".join(_text(name) for name in evaluation_sets),
        fingerprint=_text(fingerprint),
        command=_fenced(command, "bash"),
        recipe=_fenced(recipe, "yaml"),
        versions=", ".join(_text(f"{name}=={version}") for name, version in versions.items()),
    )
    return card.content + "\n"


def _count_tables(statistics: Statistics) -> str:
    tables: list[tuple[str, Counter[Any]]] = [
        ("source", statistics.sources),
        ("language", statistics.languages),
        ("task", statistics.tasks),
        ("evidence blocks", statistics.evidence_blocks),
        ("responses", statistics.responses),
    ]
    return "\n\n".join(_table((name, "rows"), _counted(counts)) for name, counts in tables if counts)


def _lengths(statistics: Statistics, tokenizer: str | None) -> str:
    known = statistics.length_bins.total()
    if not known:
        return "The lengths of the documents were not counted."
    bins = sorted(statistics.length_bins.items())
    unknown = statistics.num_rows - known
    mean = f"On average a document has {statistics.num_tokens / known:,.0f} tokens"
    counted = f", counted with {_text(tokenizer)}" if tokenizer else ""
    left = f" Of {unknown:,} rows the length is not known." if unknown else ""
    rows = ((_bin_label(index), count, f"{count / known:.1%}") for index, count in bins)
    return f"{mean}{counted}.{left}\n\n{_table(('tokens', 'rows', 'share'), rows)}"


def _checks_table(statistics: Statistics) -> str:
    header = ("check", "rows checked", "passed", "mean score")
    rows = ((n, c["rows"], c["passed"], f"{c['score'] / c['rows']:.3f}") for n, c in sorted(statistics.checks.items()))
    return _table(header, rows)


def _counted(counts: Counter) -> list[tuple]:
    """Rows of a table, the most frequent first; equal ones by name, so that the same set has the same card."""
    rows = [(*(name if isinstance(name, tuple) else (name,)), count) for name, count in counts.items()]
    return sorted(rows, key=lambda row: (-row[-1], [str(value) for value in row]))


def _table(header: Sequence[str], rows: Iterable[Collection[Any]]) -> str:
    """A table of Markdown; empty without rows."""
    rows = list(rows)
    if not rows:
        return ""
    numeric = [isinstance(value, int) for value in rows[0]]
    lines = [header, ["---:" if is_number else "---" for is_number in numeric]]
    lines += [[_text(value) for value in row] for row in rows[:_MAX_TABLE_ROWS]]
    if len(rows) > _MAX_TABLE_ROWS:
        lines.append([f"and {len(rows) - _MAX_TABLE_ROWS:,} more", *[""] * (len(header) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    """A value as text that Markdown and HTML leave alone."""
    if value is None:
        return "not known"
    if isinstance(value, int):
        return f"{value:,}"
    text = "".join(character if character.isprintable() else " " for character in str(value))
    text = " ".join(text.split())
    if re.fullmatch(r"(?!(?i:.*www\.))[A-Za-z0-9][A-Za-z0-9_./=-]*", text):
        return f"`{text}`" if "_" in text or "=" in text or "/" in text else text
    text = re.sub(r"[\\`*_{}\[\]()#+!|~$:@]", lambda match: f"&#{ord(match[0])};", html.escape(text))
    return re.sub(r"(?i)(www)\.", r"\1&#46;", text)


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
