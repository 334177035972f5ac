"""Is everything right, and as fast and small as it should be, on this GPU? Under 10 minutes on an H100.

    python scripts/gpu_check.py                   # or `make gpu-check`
    python scripts/gpu_check.py --device cpu      # the same checks with small sizes, to try them out

Attention kernels against the definition at 8,192 tokens and Qwen3's heads; a training step in each precision against
float32 on the CPU; a short training; loss, shared prefix and memory measured; two steps with vLLM, and a ZeRO-3 step
on two GPUs, where these are there. Each check runs in a process of its own, with its log in `--output_dir`.

Prints a table, and writes `gpu_check.json` beside the logs. The exit code is 0 if no check failed, 1 if one did, and
2 if there is no GPU.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from gpu_checks import Check
from gpu_checks.attention import check_attention
from gpu_checks.measures import check_loss, check_memory, check_prefix
from gpu_checks.report import environment, run_apart, run_here, table, write_json
from gpu_checks.training import PRECISIONS, check_offload, check_step, check_training, check_vllm
from gpu_checks.zero3 import check_two_gpus

from dgrpo_trl.cli.arguments import exit_with_message, parse_arguments
from dgrpo_trl.shared_prefix import BACKENDS


NO_GPU = (
    f"PyTorch {torch.__version__} sees no CUDA GPU, so that nothing can be checked. Run this on a node with one, see "
    "there that `nvidia-smi` lists it, and install PyTorch for CUDA by `make install-gpu`. `--device cpu` runs the "
    "same checks with small sizes."
)
# In the order of the table; the limits add up to more than they take
CHECKS = {
    **{f"attention {name}": Check(partial(check_attention, name), 90) for name in BACKENDS},
    **{f"step {name}": Check(partial(check_step, name), 120) for name in PRECISIONS},
    "offload": Check(check_offload, 120),
    "training": Check(check_training, 120),
    "loss": Check(check_loss, 120),
    "prefix": Check(check_prefix, 240),
    "memory": Check(check_memory, 240),
    "vllm": Check(check_vllm, 240),
    "two gpus": Check(check_two_gpus, 240),
}


@dataclass
class GpuCheckArguments:
    """What to check, and where to write."""

    output_dir: Path = field(default=Path("outputs/gpu_check"), metadata={"help": "Folder of the JSON and the logs."})
    device: str = field(
        default="cuda", metadata={"help": "'cpu' runs the checks with small sizes.", "choices": ["cuda", "cpu"]}
    )
    only: list[str] = field(
        default_factory=list, metadata={"help": "Names of checks; all by default.", "choices": [*CHECKS]}
    )
    result: Path | None = field(
        default=None, metadata={"help": "Run the one check of `--only` in this process, and write its result here."}
    )


def main() -> int:
    with exit_with_message(ValueError):
        (args,) = parse_arguments((GpuCheckArguments,), description=__doc__)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    checks = {name: check for name, check in CHECKS.items() if name in args.only or not args.only}
    if args.result is not None:
        ((name, check),) = checks.items()
        args.result.write_text(json.dumps(asdict(run_here(name, check, args.device))))
        return 0
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in environment(args.device).items()), flush=True)
    results = []
    for name, check in checks.items():
        results.append(run_apart(name, check, args.device, args.output_dir))
        print(f"{name}: {results[-1].status}", flush=True)
    write_json(args.output_dir / "gpu_check.json", args.device, results)
    print(f"\n{table(results)}\n\n{args.output_dir / 'gpu_check.json'}")
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
