"""The stages that make the data set: `mixing` chooses its rows, `card` describes them, `publish` writes them."""

from collections.abc import Iterator
from typing import Any

from ..records import Drop
from .build import Build
from .card import Statistics, write_card
from .config import STAGES
from .mixing import Mixer
from .publish import published_record, push, save_to_disk, write_parquet
from .store import row_of


def choose_rows(build: Build) -> None:
    """Decides on the rows of all parts."""
    parts, store = build.source_parts(), build.store
    build.progress.start("mixing", build.num_rows("decontamination", parts))
    if all(store.is_complete("mixing", part) for part in parts):
        return
    mixer = Mixer(store.folder / "mixing.sqlite", build.config.mixing)
    mixer.select(
        (part, position, row_of(record))
        for part in parts
        for position, record in enumerate(store.records("decontamination", part))
    )
    for part in parts:
        store.remove("mixing", part)
        build.write_decisions("mixing", part, mixer.decisions(part))


def _published(build: Build, statistics: Statistics | None = None) -> Iterator[dict[str, Any]]:
    """The rows of the data set, in order; those that may not be published are left out, and counted."""
    models, store = build.config.response_models, build.store
    for part in build.source_parts():
        if not store.is_complete("mixing", part):
            raise ValueError(
                "The rows have not been chosen. The data set is made of those that were. Run the stage 'mixing' first."
            )
        may_redistribute = build.config.sources[int(part[:3])].may_redistribute
        kept = {record["position"] for record in store.records("mixing", part)}
        documents = {document.id: document for document in build.documents(part)}
        for position, record in enumerate(store.records("decontamination", part)):
            if position not in kept:
                continue
            row = row_of(record)
            document = documents[row.document_id]
            published = published_record(row, document, models, may_redistribute=may_redistribute)
            if isinstance(published, Drop):
                if statistics is not None:
                    statistics.add_drop(published)
                continue
            if statistics is not None:
                num_tokens = document.num_tokens if row.document is None else build.tokenizer.count(row.document)
                statistics.add(published, num_tokens, document.license)
            build.progress.advance(1, [])
            yield published


def describe(build: Build) -> None:
    """Writes the card."""
    parts, config = build.source_parts(), build.config
    build.progress.start("card", build.num_rows("mixing", parts))
    statistics = Statistics()
    for stage in STAGES:
        for part in build.store.parts(stage):
            for drop in build.store.drops(stage, part):
                statistics.add_drop(drop)
    for _ in _published(build, statistics):
        pass
    write_card(
        build.output_dir / "dataset",
        statistics,
        config.card,
        recipe=config.public_yaml(),
        fingerprint=config.fingerprint,
        command="python scripts/build_longblocks.py --config recipe.yaml",
        engine=config.questions.engine,
        models={
            f"{stage}: {name}": config.servers[name].model for stage in STAGES for name in config.servers_of(stage)
        },
        tokenizer=build.tokenizer.name,
        evaluation_sets=[evaluation_set.name for evaluation_set in config.decontamination.against],
    )


def publish(build: Build, pushes: bool) -> None:
    """Writes the Parquet files, and uploads them with the card if `pushes`."""
    folder, config = build.output_dir / "dataset", build.config.publish
    build.progress.start("publish", build.num_rows("mixing", build.source_parts()))
    files = write_parquet(
        _published(build), folder, build.config.response_models, max_shard_bytes=config.max_shard_bytes
    )
    if config.save_to_disk:
        save_to_disk(files, build.output_dir / "saved", config.max_shard_bytes)
    push(folder, config, dry_run=not pushes)
