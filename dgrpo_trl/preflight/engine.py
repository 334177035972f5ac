"""How accelerate distributes a run over devices."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Engine:
    """How a run is distributed."""

    kind: str = "single"  # or `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"`, `"fsdp2"`
    num_processes: int = 1  # devices of all nodes
    offload_optimizer: bool = False  # its states are in the memory of the host
    offload_params: bool = False  # so are the weights

    @property
    def is_deepspeed(self) -> bool:
        return self.kind.startswith("zero")

    def shards(self, what: str) -> int:
        """Over how many devices `"weights"`, `"gradients"` or `"optimizer"` are spread."""
        sharded = {
            "weights": ("zero3", "fsdp2"),
            "gradients": ("zero2", "zero3", "fsdp2"),
            "optimizer": ("zero1", "zero2", "zero3", "fsdp2"),
        }[what]
        return self.num_processes if self.kind in sharded else 1


def read_engine(path: str | Path | None) -> Engine:
    """The engine that an accelerate configuration describes; one process without one."""
    if path is None:
        return Engine()
    try:
        return _parse_engine(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(
            f"The accelerate configuration {str(path)!r} cannot be read: {error!r}. The estimate needs the number of "
            "processes and the ZeRO stage. See `recipes/accelerate_configs` for examples."
        ) from error


def _parse_engine(values: dict[str, Any]) -> Engine:
    processes = int(values.get("num_processes", 1))
    kind = str(values.get("distributed_type", "NO"))
    if kind == "DEEPSPEED":
        stage, *devices = _zero_settings(values.get("deepspeed_config") or {})
        return Engine(
            f"zero{stage}" if stage else "ddp", processes, *(device not in (None, "none") for device in devices)
        )
    if kind == "FSDP":
        offloads = bool((values.get("fsdp_config") or {}).get("fsdp_offload_params"))
        return Engine("fsdp2", processes, offloads, offloads)
    return Engine("ddp" if processes > 1 else "single", processes)


def _zero_settings(config: dict[str, Any]) -> tuple[int, str | None, str | None]:
    """Stage of ZeRO, and the devices that optimizer and parameters are offloaded to."""
    if "deepspeed_config_file" not in config:
        stage = int(config.get("zero_stage", 2))
        return stage, config.get("offload_optimizer_device"), config.get("offload_param_device")
    zero = json.loads(Path(config["deepspeed_config_file"]).read_text(encoding="utf-8")).get("zero_optimization", {})
    optimizer, param = ((zero.get(f"offload_{name}") or {}).get("device") for name in ("optimizer", "param"))
    return int(zero.get("stage", 0)), optimizer, param
