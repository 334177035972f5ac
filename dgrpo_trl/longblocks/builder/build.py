"""One build: its configuration, its folder, and what its stages share."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ...llm.cache import RequestCache
from ...llm.tokens import TokenCounter, load_token_counter
from ..records import Document, Drop
from .config import BuildConfig
from .decontamination import Decontaminator
from .progress import Progress
from .store import KEPT_SCHEMA, Store, document_of


class Build:
    """What the stages of a build work with; the arguments are those of [`Builder`]."""

    def __init__(self, config: BuildConfig, output_dir: Path, shard: int, num_shards: int):
        self.config = config
        self.output_dir = output_dir
        self.shard, self.num_shards = shard, num_shards
        self.store = Store(output_dir / "work")
        self.progress = Progress()

    @cached_property
    def tokenizer(self) -> TokenCounter:
        return load_token_counter(self.config.tokenizer)

    @cached_property
    def decontaminator(self) -> Decontaminator:
        return Decontaminator(self.config.decontamination)

    def marker(self, index: int) -> Path:
        """The file that says that a source was read to its end."""
        return self.store.folder / "sources" / f"{index:03d}-{self.config.sources[index].name}-complete"

    def source_parts(self) -> list[str]:
        """All parts, in the order of the configuration.

        Raises:
            ValueError: If a source has not been read to its end.
        """
        for index, source in enumerate(self.config.sources):
            if not self.marker(index).exists():
                raise ValueError(
                    f"The source {source.name!r} has not been read to its end. This stage needs all documents. Run "
                    "the stage 'sources' first, on every shard."
                )
        return self.store.parts("sources")

    def documents(self, part: str) -> Iterator[Document]:
        """The documents of a part that are no duplicates."""
        kept = {record["position"] for record in self.store.records("deduplication", part)}
        for position, record in enumerate(self.store.records("sources", part)):
            if position in kept:
                yield document_of(record)

    def num_rows(self, stage: str, parts: Iterable[str]) -> int:
        """What a stage kept of some parts."""
        return sum(self.store.counts(stage, part)["num_rows"] for part in parts)

    def write_decisions(self, stage: str, part: str, decisions: Iterable[tuple[int, str, Drop | None]]) -> None:
        """Writes which items of a part stay: position and id of each, and the drop of one that leaves."""
        kept: list[dict[str, Any]] = []
        drops: list[Drop] = []
        for position, item_id, drop in decisions:
            if drop is None:
                kept.append({"position": position, "id": item_id})
            else:
                drops.append(drop)
            self.progress.advance(int(drop is None), [drop] if drop else [])
        self.store.write(stage, part, KEPT_SCHEMA, kept, drops, len(kept) + len(drops))

    def request_cache(self, server: str) -> RequestCache:
        """This shard's finished requests to a server; those of other shards are read."""
        folder = self.store.folder / "requests"
        folder.mkdir(exist_ok=True)
        path = folder / f"{server}-{self.shard}-of-{self.num_shards}.sqlite"
        return RequestCache(path, read_only=sorted(set(folder.glob(f"{server}-*.sqlite")) - {path}))
