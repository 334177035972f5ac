"""Writes `constraints-gpu.txt`, or checks that each Python of a GPU node gets exactly what it names.

.venv/bin/python .ci/resolve.py            # after pyproject.toml or constraints.txt has changed
.venv/bin/python .ci/resolve.py --check
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
CONSTRAINTS, GPU_CONSTRAINTS = ROOT / "constraints.txt", ROOT / "constraints-gpu.txt"
EXTRAS = (
    "cluster",
    "deepspeed",
    "demo",
    "dev",
    "eval",
    "flash",
    "longblocks",
    "quantization",
    "vllm",
    "wandb",
)  # as in the Makefile
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORM = "x86_64-manylinux_2_31"
SOURCES = ("deepspeed", "jieba", "langdetect", "rouge-score", "sqlitedict", "word2number")  # no wheels of them exist
# What vLLM asks for otherwise than constraints.txt; of setuptools, Python 3.12 on alone
FREE = ("huggingface-hub", "transformers")
ALSO = ("setuptools<81",)


def compile_pins(python: str, constraints: list[str]) -> str:
    """Lines `name==version` of all that an installation under `constraints` brings."""
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "constraints.txt", Path(folder) / "pins.txt"
        file.write_text("\n".join(constraints) + "\n")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--no-header"]
        command += ["--no-annotate", "--python-version", python, "--python-platform", PLATFORM]
        command += ["--only-binary", ":all:", *(word for name in SOURCES for word in ("--no-binary", name))]
        command += [word for name in EXTRAS for word in ("--extra", name)]
        command += ["--constraint", str(file), "--output-file", str(output), "pyproject.toml"]
        subprocess.run(command, cwd=ROOT, check=True)
        return output.read_text()


def pins(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a Python gets others")
    if not parser.parse_args().check:
        constraints = [pin for pin in pins(CONSTRAINTS) if pin.partition("==")[0] not in FREE]
        header = [line for line in GPU_CONSTRAINTS.read_text().splitlines(keepends=True) if line.startswith("#")]
        GPU_CONSTRAINTS.write_text("".join(header) + compile_pins(PYTHONS[0], [*constraints, *ALSO]))
    expected = pins(GPU_CONSTRAINTS)
    for python in PYTHONS:
        found = compile_pins(python, expected).splitlines()
        if found != expected:
            sys.exit(f"Python {python} gets other packages: {', '.join(sorted({*found} ^ {*expected}))}")
        print(f"Python {python}: {len(found)} packages, all as {GPU_CONSTRAINTS.name} names them")


if __name__ == "__main__":
    main()
