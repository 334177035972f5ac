"""Time of an optimizer step on one and on two processes, and how much of it is communication.

    python scripts/benchmarks/distributed.py [--engines ddp zero3] [--processes 1 2]

The global batch is the same throughout: two groups of 8 completions of given rollouts, with a teacher of the student's
size. Seconds are medians over steps, of the slowest rank. Communication is what the profiler sees in collectives on
rank 0 (gloo on CPUs, NCCL on GPUs), waiting for the other rank included; it overlaps with work in part, so the shares
say how much there is, not how much would be saved. On a CPU each process has one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent.parent
GROUP, NUM_GROUPS, NUM_STEPS = 8, 2, 5


def launcher(engine: str, processes: int, folder: Path) -> list[str]:
    """The command before the script."""
    if engine == "ddp":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    config = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": processes}
    config |= {"use_cpu": not torch.cuda.is_available(), "mixed_precision": "no", "distributed_type": "DEEPSPEED"}
    config["deepspeed_config"] = {"zero_stage": 3, "zero3_init_flag": True}
    path = folder / "accelerate.json"
    path.write_text(json.dumps(config))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]


def work(output: str, prompt_tokens: int, completion_tokens: int) -> None:
    """One rank: steps on given rollouts."""
    from datasets import Dataset
    from loss import make_tokenizer
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from dgrpo_trl import DGRPOConfig, DGRPOTrainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = make_tokenizer()

    def rollout(prompts, trainer):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 99, (prompt_tokens,), generator=generator).tolist()
        completions = torch.randint(1, 99, (len(prompts), completion_tokens), generator=generator).tolist()
        return {"prompt_ids": [ids] * len(prompts), "completion_ids": completions, "logprobs": None}

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if device == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    models = [Path(output).parent / name for name in ("student", "teacher")]
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {
        "per_device_train_batch_size": GROUP,
        "gradient_accumulation_steps": NUM_GROUPS // world,
        "num_generations": GROUP,
        "max_completion_length": completion_tokens,
        "max_steps": NUM_STEPS,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "gradient_checkpointing": device == "cuda",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    trainer = DGRPOTrainer(
        str(models[0]),
        None,
        DGRPOConfig(f"{output}_out", **options),
        Dataset.from_dict({"prompt": [f"w{i + 1}" for i in range(2 * NUM_STEPS)]}),
        processing_class=tokenizer,
        rollout_func=rollout,
        teacher_model=str(models[1]),
        callbacks=[Clock()],
    )
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        trainer.train()
    events = [e for e in profiler.key_averages() if e.key.lower().startswith(("gloo:", "nccl"))]
    name = "device_time_total" if device == "cuda" else "cpu_time_total"
    slowest = trainer.accelerator.gather(torch.tensor(Clock.seconds, device=trainer.accelerator.device)[None]).amax(0)
    if trainer.accelerator.is_main_process:
        steps = slowest.tolist()[1:]  # the first one compares the shared prefix, and warms up
        result = {
            "seconds": statistics.median(steps),
            "processes": world,
            "communication": sum(getattr(e, name) for e in events) / 1e6 / sum(slowest.tolist()),
        }
        Path(output).write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero3"], choices=["ddp", "zero3"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="divisors of 2")
    parser.add_argument("--prompt_tokens", type=int, default=1024)
    parser.add_argument("--completion_tokens", type=int, default=128)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.prompt_tokens, args.completion_tokens)
        return
    from loss import make_tokenizer
    from shared_prefix import make_model

    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    print("| engine | processes | seconds per step | times one process | communication |", flush=True)
    print("| --- " * 5 + "|", flush=True)
    lengths = ["--prompt_tokens", str(args.prompt_tokens), "--completion_tokens", str(args.completion_tokens)]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name in ("student", "teacher"):
            make_model(device, args.prompt_tokens + args.completion_tokens + 64).save_pretrained(folder / name)
            make_tokenizer().save_pretrained(folder / name)
        for engine in args.engines:
            first = None
            for processes in args.processes:
                output = folder / f"{engine}_{processes}.json"
                command = [*launcher(engine, processes, folder), str(Path(__file__).resolve()), *lengths]
                run = subprocess.run(
                    [*command, "--worker", str(output)], env=environment, cwd=ROOT, capture_output=True, text=True
                )
                if run.returncode != 0:
                    raise SystemExit(f"{engine} on {processes} processes failed:\n{run.stderr[-3000:]}")
                result = json.loads(output.read_text())
                assert result["processes"] == processes
                first = first or result["seconds"]
                print(
                    f"| {engine} | {processes} | {result['seconds']:.2f} | {first / result['seconds']:.2f} | "
                    f"{result['communication']:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
