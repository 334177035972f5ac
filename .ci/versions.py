"""Runs the tests of what extends TRL and transformers with other versions of them than constraints.txt has.

    .venv/bin/python .ci/versions.py gpu       # those of constraints-gpu.txt, the oldest that pyproject.toml allows
    .venv/bin/python .ci/versions.py newest    # the newest that pyproject.toml allows

An environment lies over that of the Python that runs this, and holds only the packages that differ: it takes seconds,
and a few megabytes.
"""

import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
PACKAGES = ("accelerate", "datasets", "huggingface-hub", "peft", "tokenizers", "transformers", "trl")
TESTS = (
    "trl_compat trainer prefix prefix_trainer sharing losses long_runs scripts recipes command_lines checks "
    "run_metrics model_card evaluation_generation quantized"
).split()


def make_environment(name: str) -> Path:
    """The Python of an environment over this one, in which `PACKAGES` have other versions."""
    folder = Path(sys.prefix) / "versions" / name
    venv.create(folder, clear=True, symlinks=True)
    python = folder / "bin" / "python"
    below = sysconfig.get_path("purelib")
    path = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)})) / "below.pth"
    path.write_text(f"import site; site.addsitedir({below!r})\n")
    if name == "gpu":
        # Where it is installed, PEFT imports bitsandbytes, which says on a CPU what it lacks: so it is here alone
        packages = ["--constraint", "constraints-gpu.txt", *PACKAGES, "bitsandbytes"]
    else:
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        ranges = {Requirement(text).name: text for text in declared}
        packages = ["--upgrade", *(ranges.get(package, package) for package in PACKAGES)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *packages], cwd=ROOT, check=True)
    return python


def main() -> None:
    if sys.argv[1:] not in (["gpu"], ["newest"]):
        sys.exit(__doc__)
    python = make_environment(sys.argv[1])
    versions = "from importlib.metadata import version\n"
    versions += f"print('==', *(f'{{name}} {{version(name)}}' for name in {PACKAGES!r}), flush=True)"
    subprocess.run([python, "-c", versions], check=True)
    tests = [f"tests/test_{name}.py" for name in TESTS]
    command = [python, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *tests]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
