"""The builder: documents in, verified questions out, in stages that can be run alone and resume after any crash.

| stage | reads | leaves |
| --- | --- | --- |
| `sources` | the sources | clean documents |
| `deduplication` | documents | which of them stay |
| `blocks` | documents | their blocks, and which are related |
| `questions` | documents, blocks | rows |
| `verification` | rows, documents | rows with checks |
| `responses` | rows, documents | rows with teachers' answers |
| `decontamination` | rows | rows |
| `mixing` | rows of all parts | which of them stay |
| `card` | all of it | `dataset/README.md` and its figure |
| `publish` | all of it | `dataset/data/*.parquet`, and the Hub where asked |

What a stage leaves out has a reason, see [`reasons`].
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...files import write_json
from ...llm.cache import RequestCache
from ..reasons import REQUEST_REASONS, may_succeed_again
from .build import Build
from .config import GLOBAL_STAGES, STAGES, BuildConfig
from .part_stages import PART_STAGES, run_parts
from .stages import choose_rows, describe, publish, read_sources, remove_duplicates
from .store import explain_full_disk


logger = logging.getLogger(__name__)


# What runs each stage; `publish` is told whether to upload
_RUN: dict[str, Callable[[Build], None]] = {
    "sources": read_sources,
    "deduplication": remove_duplicates,
    **{stage: partial(run_parts, stage=stage) for stage in PART_STAGES},
    "mixing": choose_rows,
    "card": describe,
}


class Builder:
    """Runs the stages of one configuration in one folder.

    Args:
        config ([`BuildConfig`]):
            What to build.
        output_dir (`Path`):
            Folder of the build: `work/` for what stages leave, `dataset/` for what is published, `summary.json`.
        shard, num_shards (`int`, *optional*):
            Which share of the parts, or in the stage `sources` of the sources, this process works on, of how many.
    """

    def __init__(self, config: BuildConfig, output_dir: Path, shard: int = 0, num_shards: int = 1):
        if not 0 <= shard < num_shards:
            raise ValueError(
                f"`shard` is {shard} of {num_shards}. Shards count from 0. Give one of 0 to {num_shards - 1}."
            )
        self.config, self.output_dir = config, output_dir
        self.build = Build(config, output_dir, shard, num_shards)
        self.store = self.build.store

    def run(
        self,
        stages: Iterable[str] = STAGES,
        restart_from: str | None = None,
        retry_failed: bool = False,
        push: bool = False,
    ) -> dict[str, Any]:
        """Runs stages, in their order; what is done already is not done again.

        Args:
            stages (`Iterable[str]`, *optional*):
                Names out of `STAGES`.
            restart_from (`str`, *optional*):
                Remove what this stage and those after it made: needed after a change of configuration. Finished
                requests are kept all the same.
            retry_failed (`bool`, *optional*, defaults to `False`):
                Make the parts again from which a server's failure has left something out.
            push (`bool`, *optional*, defaults to `False`):
                Let the stage `publish` upload. Without it, it reports what it would upload.

        Returns:
            `dict`: the summary, which is also in `summary.json`: rows and drops by stage and reason.

        Raises:
            ValueError: If the configuration is not the one of earlier stages, a stage that this one needs has not been
                run, or a source or an evaluation set cannot be read.
            RuntimeError: If another process works on the same shard, or a server refuses every request.
        """
        wanted = [stage for stage in STAGES if stage in set(stages)]
        build = self.build
        with ExitStack() as stack:
            lock = FileLock(self.store.folder / f".lock-{build.shard}-of-{build.num_shards}")
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except Timeout as error:
                raise RuntimeError(
                    f"Another process builds in {self.output_dir}. Two would write the same parts. Wait for it, or "
                    "give this one another `--output_dir`."
                ) from error
            if restart_from is not None:
                self._forget(restart_from)
            if retry_failed:
                self._forget_failures()
            self._check_config()
            if "decontamination" in wanted:
                build.decontaminator  # noqa: B018 - an evaluation set that is missing is seen before the work
            stack.enter_context(build.progress)
            stack.enter_context(explain_full_disk(self.output_dir))
            for stage in wanted:
                if stage in GLOBAL_STAGES and build.num_shards > 1:
                    raise ValueError(
                        f"The stage {stage!r} sees all parts at once. It cannot be shared out among "
                        f"{build.num_shards} processes. Run it alone, without a shard."
                    )
                if stage == "publish":
                    publish(build, push)
                else:
                    _RUN[stage](build)
        return self._write_summary()

    # --- The configuration that the parts were made with

    def _check_config(self) -> None:
        """Refuses to resume with another configuration, which would leave parts of both in one data set."""
        path = self.store.folder / "config.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        current = {stage: json.loads(json.dumps(self.config.settings(stage))) for stage in STAGES}
        for stage in STAGES:
            if stage in known and self.store.parts(stage) and known[stage] != current[stage]:
                keys = sorted(k for k in current[stage] | known[stage] if current[stage].get(k) != known[stage].get(k))
                raise ValueError(
                    f"The configuration of the stage {stage!r} differs from the one that {self.output_dir} was built "
                    f"with, in {', '.join(f'`{key}`' for key in keys)}. Parts of both would be mixed. Restore it, "
                    f"give another `--output_dir`, or run with `--restart_from {stage}`, which makes this stage and "
                    "the later ones again and keeps the finished requests."
                )
        write_json(path, current)

    def _forget(self, stage: str) -> None:
        if stage not in STAGES:
            raise ValueError(f"`restart_from` is {stage!r}, which is no stage. Give one of {', '.join(STAGES)}.")
        # The last first: killed in between, no later stage keeps what was made of something that was removed
        for later in reversed(STAGES[STAGES.index(stage) :]):
            self.store.remove(later)

    def _forget_failures(self) -> None:
        """Removes bad replies, the parts that lack something because of a server, and what was made of them."""
        for path in (self.store.folder / "requests").glob("*.sqlite"):
            cache = RequestCache(path)
            cache.forget_failures([reason for reason, may_succeed in REQUEST_REASONS.items() if may_succeed])
            cache.close()
        for index, stage in enumerate(STAGES):
            drops = {part: self.store.drops(stage, part) for part in self.store.parts(stage)}
            parts = {part for part in drops if any(may_succeed_again(stage, drop.reason) for drop in drops[part])}
            for later in reversed(STAGES[index:]) if parts else ():
                if later in GLOBAL_STAGES:
                    self.store.remove(later)
                for part in parts:
                    self.store.remove(later, part)

    # --- Summary

    def _write_summary(self) -> dict[str, Any]:
        stages = {}
        for stage in STAGES:
            parts = self.store.parts(stage)
            if parts:
                reasons = Counter(drop.reason for part in parts for drop in self.store.drops(stage, part))
                stages[stage] = {"kept": self.build.num_rows(stage, parts), "dropped": dict(reasons.most_common())}
        summary = {
            "name": self.config.name,
            "fingerprint": self.config.fingerprint,
            "output_dir": str(self.output_dir),
            "stages": stages,
        }
        write_json(self.output_dir / "summary.json", summary)
        return summary

    def check(self) -> None:
        """Opens the sources, the tokenizer and the evaluation sets, and reads a little of each; builds nothing."""
        self.build.tokenizer  # noqa: B018
        for source in self.config.sources:
            source.check()
        self.build.decontaminator  # noqa: B018
        logger.info(f"{self.config.name}: the configuration and {len(self.config.sources)} sources are in order.")
