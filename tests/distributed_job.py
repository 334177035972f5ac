"""What `distributed_runs.py` launches: every rank runs the cases of a file, one after another, in one process.

    distributed_job.py FOLDER

`FOLDER/cases.json` has a list of `{"name", "kind", ...}`; the other keys are arguments of the functions below. Each
rank writes `NAME.rankN.json` when a case has ended, and as it runs the collective calls to `NAME.rankN.calls`; rank 0
also writes the weights. After an error that was not expected, the job ends: the ranks may be at different places.
"""

from collectives import RECORDER


if __name__ == "__main__":
    RECORDER.install()

import faulthandler  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest.mock import patch  # noqa: E402

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, DistributedType, PartialState  # noqa: E402
from distributed_training import CASE_SECONDS, train  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from dgrpo_trl import DGRPOTrainer  # noqa: E402
from dgrpo_trl.cli import train_sft  # noqa: E402
from dgrpo_trl.shared_prefix import PrefixSharing  # noqa: E402
from dgrpo_trl.teacher import Teacher  # noqa: E402


def shard_on_the_cpu() -> None:
    """Makes Accelerate take its FSDP plugin: of processes on the CPU it ignores it, and they run as DDP."""
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def mark_phases() -> None:
    for owner, method, phase in (
        (DGRPOTrainer, "training_step", "step"),
        (GRPOTrainer, "_generate", "generation"),  # the parent's, without the check
        (PrefixSharing, "confirm", "check"),
        (Teacher, "hidden_states", "teacher"),
        (DGRPOTrainer, "_compute_loss", "loss"),
    ):
        RECORDER.mark(owner, method, phase)


def dgrpo(folder: Path, name: str, student: str, teacher: str, options: dict) -> dict:
    result, weights = train(str(folder / name), student, teacher, options)
    if int(os.environ["RANK"]) == 0:
        save_file(weights, folder / f"{name}.safetensors")
    return result


def sft(folder: Path, name: str, arguments: list[str]) -> dict:
    with patch.object(Accelerator, "end_training"):  # it ends the process group, and another case follows
        train_sft.main(arguments)
    return {}


def run_case(folder: Path, name: str, kind: str, fails: bool = False, **arguments) -> None:
    output = folder / f"{name}.rank{os.environ['RANK']}"
    faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
    has_failed, start = False, time.monotonic()
    with RECORDER.to(output.with_name(output.name + ".calls")):
        try:
            result = globals()[kind](folder, name, **arguments)
        except Exception:
            has_failed, result = True, {"error": traceback.format_exc()}
            traceback.print_exc()
    output.with_name(output.name + ".json").write_text(json.dumps({**result, "seconds": time.monotonic() - start}))
    if has_failed and not fails:
        sys.exit(1)
    gc.collect()


def main(folder: Path) -> None:
    # The first rank to time out prints its stack and ends. The others print theirs when the launcher ends them, or
    # when they fail because the first is gone
    faulthandler.register(signal.SIGTERM, chain=True)
    shard_on_the_cpu()
    mark_phases()
    for case in json.loads((folder / "cases.json").read_text()):
        run_case(folder, **case)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
