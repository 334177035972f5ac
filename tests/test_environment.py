"""Versions: pyproject.toml, constraints.txt, constraints-gpu.txt and what the packages ask of each other agree."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTENDED = ("accelerate", "datasets", "peft", "transformers", "trl")
EXTRAS_OF_OTHERS = {"trl": ("", "deepspeed", "peft", "vllm"), "math-verify": ("antlr4-13-2",)}
# Of the metadata of vLLM 0.31.0, which is not installed where the tests run
VLLM = (
    "huggingface-hub>=1.31.0",
    "llguidance>=1.7.0,<1.8.0",
    "openai>=2.25.0",
    "pydantic>=2.12.0",
    "setuptools>=77.0.3,<81.0.0",
    "tokenizers>=0.21.1",
    "torch==2.13.0",
    "transformers>=5.10.4,<5.18.0",
)


def read_pins(name):
    lines = (line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in (line.split("==") for line in lines)}


def requirements(extras):
    """What pyproject.toml asks for, extras that name others resolved."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    waiting = [Requirement(text) for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    for requirement in waiting:
        if canonicalize_name(requirement.name) == "dgrpo-trl":
            waiting += [
                Requirement(text) for extra in requirement.extras for text in PROJECT["optional-dependencies"][extra]
            ]
        else:
            found.append(requirement)
    return found


def extras_of_make(gpu):
    makefile = (ROOT / "Makefile").read_text()
    (extras,) = re.findall(r"^EXTRAS := ([a-z,]+)$", makefile, re.M)
    (more,) = re.findall(r"^EXTRAS := \$\(EXTRAS\),([a-z,]+)$", makefile, re.M)
    return extras.split(",") + (more.split(",") if gpu else [])


CPU_PINS, GPU_PINS = read_pins("constraints.txt"), read_pins("constraints-gpu.txt")


@pytest.mark.parametrize(("pins", "gpu"), [(CPU_PINS, False), (GPU_PINS, True)], ids=["cpu", "gpu"])
def test_the_pinned_versions_are_in_the_ranges_of_pyproject(pins, gpu):
    for requirement in requirements(extras_of_make(gpu)):
        name = canonicalize_name(requirement.name)
        assert not gpu or name in pins, f"{name} is not in constraints-gpu.txt. Run .ci/resolve.py."
        assert name not in pins or requirement.specifier.contains(pins[name]), f"{requirement}, but {pins[name]}"


def test_a_gpu_node_gets_every_extra_and_the_tested_versions_where_vllm_allows_them():
    assert {*extras_of_make(gpu=True)} | {"tensorboard", "trackio"} == {*PROJECT["optional-dependencies"]}
    others = {name for name in CPU_PINS if GPU_PINS.get(name) != CPU_PINS[name]}
    assert others == {"huggingface-hub", "transformers"}


def test_the_minimum_of_what_is_extended_is_the_version_of_a_gpu_node():
    ranges = {requirement.name: requirement.specifier for requirement in requirements(())}
    for name in EXTENDED:
        (minimum,) = (Version(s.version) for s in ranges[name] if s.operator == ">=")
        assert GPU_PINS[name].release[:2] == minimum.release[:2], f"{name}: {minimum} was not tried"


def test_python_is_one_that_the_dependencies_run_on():
    ours = SpecifierSet(PROJECT["requires-python"])
    for name in EXTENDED:
        theirs = SpecifierSet(importlib.metadata.metadata(name)["Requires-Python"])
        assert all(theirs.contains(f"3.{minor}") for minor in range(30) if ours.contains(f"3.{minor}")), name


def test_the_versions_of_a_gpu_node_are_what_the_packages_ask_for():
    """Of each other, as far as they are installed here in the version of a GPU node; and as vLLM does."""
    found = [("vllm", Requirement(text)) for text in VLLM]
    for name, version in GPU_PINS.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(installed.version) == version:
            found += [(name, Requirement(text)) for text in installed.requires or ()]
    found = [
        (name, asked)
        for name, asked in found
        if asked.marker is None
        or any(asked.marker.evaluate({"extra": extra}) for extra in EXTRAS_OF_OTHERS.get(name, ("",)))
    ]
    assert len(found) > 200 and GPU_PINS["vllm"] == Version("0.31.0")
    for name, asked in found:
        assert asked.specifier.contains(GPU_PINS[canonicalize_name(asked.name)]), f"{name} asks for {asked}"


@pytest.mark.slow
def test_a_resolver_finds_the_versions_of_a_gpu_node_for_every_python():
    """Needs an index of packages, and no more than their metadata."""
    subprocess.run([sys.executable, str(ROOT / ".ci" / "resolve.py"), "--check"], check=True)
