"""Commands that run one after another: what the demo and the reproduction consist of.

A stage whose outputs are complete for the same command and inputs is skipped, so that a second run costs nothing and
an interrupted one resumes.
"""

import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from dgrpo_trl import evaluation, longblocks
from dgrpo_trl.files import sha256_of, write_json


SCRIPTS = Path(__file__).resolve().parent
RECIPES = SCRIPTS.parent / "recipes"
WEIGHTS = "model.safetensors"


@dataclass
class Stage:
    """A command, and how to know whether it must run."""

    name: str  # also of its marker file; the part before the first `_` is its kind
    purpose: str  # for the log
    command: list[str]
    inputs: list[Path]  # files whose content decides the result
    outputs: list[Path]  # files that exist after it


def fingerprint(stage: Stage) -> str:
    """Hash of the command and of the content of its inputs."""
    digest = hashlib.sha256(json.dumps(stage.command).encode())
    for path in stage.inputs:
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def run_stage(stage: Stage, number: str, markers: Path) -> float:
    """Runs a stage, or skips it if its marker has the same fingerprint and its outputs exist; the seconds it took."""
    marker = markers / f"{stage.name}.json"
    found = fingerprint(stage)
    if marker.exists() and all(path.exists() for path in stage.outputs):
        content = json.loads(marker.read_text(encoding="utf-8"))
        if content["fingerprint"] == found:
            print(f"[{number}] {stage.name}: complete, skipped; it took {content['seconds']:.0f} s", flush=True)
            return content["seconds"]
    marker.unlink(missing_ok=True)
    print(f"\n[{number}] {stage.name}: {stage.purpose}\n$ {shlex.join(stage.command)}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # `accelerate launch` would take 1
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SCRIPTS.parent), environment.get("PYTHONPATH")]))
    status = subprocess.run(stage.command, env=environment).returncode
    seconds = time.monotonic() - start
    if status != 0:
        print(f"[{number}] {stage.name} failed with exit status {status}", file=sys.stderr, flush=True)
        raise SystemExit(status)
    missing = [str(path) for path in stage.outputs if not path.exists()]
    if missing:
        raise SystemExit(f"[{number}] {stage.name} did not write {', '.join(missing)}")
    write_json(marker, {"fingerprint": found, "seconds": seconds})
    print(f"[{number}] {stage.name}: {seconds:.0f} s; largest process so far {peak_gib():.1f} GiB", flush=True)
    return seconds


def run_stages(stages: Sequence[Stage], output_dir: Path) -> dict[str, float]:
    """Runs stages in order, and returns the seconds of each, now or when it ran; one that fails ends the process."""
    markers = output_dir / "stages"
    markers.mkdir(parents=True, exist_ok=True)
    seconds = {stage.name: run_stage(stage, f"{i}/{len(stages)}", markers) for i, stage in enumerate(stages, start=1)}
    print()
    for kind in dict.fromkeys(name.partition("_")[0] for name in seconds):
        total = sum(value for name, value in seconds.items() if name.partition("_")[0] == kind)
        print(f"{kind}: {total / 60:.1f} minutes")
    print(f"all: {sum(seconds.values()) / 60:.1f} minutes; largest process of this run {peak_gib():.1f} GiB")
    return seconds


def peak_gib() -> float:
    """Peak resident memory of the largest process that this run has started."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def has_bf16_instructions() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; where it does not, float32 is several times faster."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass(frozen=True)
class Project:
    """The stages of a folder: models in `<name>/`, questions in `data/<name>.jsonl`."""

    output_dir: Path
    bf16: bool  # whether to compute in bfloat16
    accelerate: str = "cpu"  # a file of `recipes/accelerate_configs`

    def rows(self, name: str) -> Path:
        return self.output_dir / "data" / f"{name}.jsonl"

    def _state(self, model: str) -> Path:
        """A file that changes with the model."""
        return self.output_dir / model / ("complete.json" if model == "model" else WEIGHTS)

    def prepare(self, script: str, recipes: str, rows: Sequence[str], flags: Sequence[str]) -> Stage:
        """Downloads and converts the model, builds the questions `recipes/longblocks/<recipes>`."""
        return Stage(
            name="prepare",
            purpose="download and convert the model, write the questions",
            command=[sys.executable, str(SCRIPTS / script), "--output_dir", str(self.output_dir), *flags],
            inputs=[
                SCRIPTS / script,
                SCRIPTS / "prepare_demo.py",
                *sorted((RECIPES / "longblocks").glob(recipes)),
                *code_of(longblocks),
            ],
            outputs=[self.output_dir / "model" / WEIGHTS, self._state("model"), *map(self.rows, rows)],
        )

    def train(
        self,
        name: str,
        purpose: str,
        recipe: Path,
        *,
        start: str,
        rows: str,
        seed: int,
        teacher: str | None = None,
        flags: Sequence[str] = (),
    ) -> Stage:
        """Trains the model `name` from the model `start`, by a recipe of `sft/` or of another method."""
        out = self.output_dir
        script = "train_sft.py" if recipe.parent.name == "sft" else "train_dgrpo.py"
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(RECIPES / "accelerate_configs" / f"{self.accelerate}.yaml")),
            *(str(SCRIPTS / script), "--config", str(recipe), "--output_dir", str(out / name)),
            *("--model_name_or_path", str(out / start), "--dataset_name", str(self.rows(rows))),
            *(() if teacher is None else ("--teacher_model_name_or_path", str(out / teacher))),
            *(*flags, "--seed", str(seed), "--bf16", str(self.bf16).lower()),
        ]
        models = [start] if teacher is None else [start, teacher]
        return Stage(
            name=f"train_{name}",
            purpose=purpose,
            command=command,
            inputs=[recipe, self.rows(rows), *map(self._state, models)],
            outputs=[out / name / WEIGHTS, out / name / "trainer_state.json"],
        )

    def evaluate(self, name: str, model: str, rows: str, results: Path, flags: Sequence[str] = ()) -> Stage:
        """Asks a model the questions `rows`."""
        command = [
            *(sys.executable, str(SCRIPTS / "evaluate.py"), "--model_name_or_path", str(self.output_dir / model)),
            *("--questions", str(self.rows(rows)), "--num_samples", "1000", "--max_new_tokens", "16", *flags),
            *("--dtype", "bfloat16" if self.bf16 else "float32"),
            *("--output_dir", str(results), "--overwrite", "true"),
        ]
        return Stage(
            name=f"evaluate_{name}",
            purpose=f"answers of {name} to the {rows} questions",
            command=command,
            inputs=[self.rows(rows), self._state(model)],
            outputs=[results / "results.json"],
        )

    def compare(
        self,
        name: str,
        title: str,
        groups: Mapping[str, Sequence[Path]],
        logs: Mapping[str, Sequence[Path]],
        output_dir: Path,
        flags: Sequence[str] = (),
    ) -> Stage:
        """Writes the page of evaluations (`groups`) and trainings (`logs`), both by label, one folder per seed."""
        command = [sys.executable, str(SCRIPTS / "compare.py"), "--title", title, "--output_dir", str(output_dir)]
        inputs = [path / "results.json" for paths in groups.values() for path in paths]
        inputs += [path / "trainer_state.json" for paths in logs.values() for path in paths]
        for flag, folders in (("--groups", groups), ("--logs", logs)):
            if folders:
                command += [flag, *(f"{label}={','.join(map(str, paths))}" for label, paths in folders.items())]
        return Stage(
            name=f"compare_{name}",
            purpose=f"tables and page: {title}",
            command=[*command, *flags],
            inputs=[*inputs, *code_of(evaluation)],
            outputs=[output_dir / "comparison.json", output_dir / "comparison.html"],
        )


def code_of(package: ModuleType) -> list[Path]:
    """The source files of a package, with the tables beside them."""
    files = Path(package.__file__).parent.rglob("*.*")
    return sorted(path for path in files if path.suffix in (".py", ".yaml", ".html", ".css", ".md"))
