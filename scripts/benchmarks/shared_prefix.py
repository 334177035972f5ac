"""Time and peak memory of a micro-batch, the teacher's forward included, with and without the shared prefix.

    python scripts/benchmarks/shared_prefix.py [--lengths 512x128 2048x128 2048x512 8192x128] [--figure FILE.png]

One prompt of P tokens with G completions of C tokens, for each P x C of `--lengths`, in three ways that take turns in
one run, on the same rollouts and equal models:

- TRL: the loss and backward of TRL's `GRPOTrainer`, which has no teacher;
- off: those of `DGRPOTrainer` with `shared_prefix="off"`, and its teacher's forward;
- on: the same with `shared_prefix="on"`.

The ideal ratio is that of the tokens that are run, G (P + C) / (P + G C). Times are the process's own CPU seconds in
user mode on a CPU, which other processes and page faults disturb least, and seconds of the clock on CUDA. The teacher
reads the full prompt, and then one of `--evidence_tokens`.

Memory is what a micro-batch adds to a process that already holds the models and the student's gradients: on CUDA the
allocator's peak, on a CPU the growth of the peak resident set, each measured in a process of its own. "One row" is a
micro-batch of one completion without sharing: what a user would have to fall back to.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from loss import add_teacher, in_child, make_rollouts, make_trainer, peak_mib
from transformers import Qwen3Config, Qwen3ForCausalLM


WAYS = ("TRL", "off", "on")


def make_model(device: str, max_length: int) -> Qwen3ForCausalLM:
    """Random weights: on CUDA the architecture of Qwen3-1.7B, elsewhere one that a CPU can run."""
    sizes = {
        "cuda": {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        "cpu": {
            "vocab_size": 8192,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
        },
    }[device]
    config = Qwen3Config(**sizes, max_position_embeddings=max_length, tie_word_embeddings=True)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)


class Step:
    """A trainer of one of `WAYS` and rollouts of one prompt; `evidence_length` tokens are the teacher's own prompt."""

    def __init__(self, way, device, prompt_length, completion_length, evidence_length, num_rows):
        self.device = device
        self.teaches = way != "TRL"
        max_length = prompt_length + completion_length + 64
        self.trainer = make_trainer(
            make_model(device, max_length),
            make_model(device, max_length) if self.teaches else None,
            num_rows,
            device,
            gradient_checkpointing=device == "cuda",
            max_completion_length=completion_length,
            **({"shared_prefix": way} if self.teaches else {}),
        )
        generator = torch.Generator().manual_seed(0)
        vocab_size = self.trainer.model.config.vocab_size
        prompt = torch.randint(1, vocab_size, (1, prompt_length), generator=generator)
        completions = torch.randint(1, vocab_size, (num_rows, completion_length), generator=generator)
        self.rollouts = make_rollouts(prompt.repeat(num_rows, 1).to(device), completions.to(device))
        ids = prompt[0].tolist()
        self.prompts = {"full": [ids] * num_rows, "evidence": [ids[:evidence_length]] * num_rows}

    def teacher(self, prompt: str = "full") -> None:
        add_teacher(self.trainer, self.rollouts, self.prompts[prompt])

    def student(self) -> None:
        self.trainer.compute_loss(self.trainer.model, dict(self.rollouts)).backward()

    def seconds(self, part, *args) -> float:
        start = self._clock()
        part(*args)
        return self._clock() - start

    def _clock(self) -> float:
        if self.device == "cpu":
            return getrusage(RUSAGE_SELF).ru_utime
        torch.cuda.synchronize()
        return time.perf_counter()


def warmed_up(way: str, device: str, num_rows: int, lengths: tuple[int, int], evidence_length: int) -> Step:
    """A step whose kernels have run once, on short rollouts, and whose student has gradients."""
    step = Step(way, device, *lengths, evidence_length, num_rows)
    whole = step.rollouts
    step.rollouts = make_rollouts(whole["prompt_ids"][:, :32], whole["completion_ids"][:, :8])
    if step.teaches:
        add_teacher(step.trainer, step.rollouts, step.rollouts["prompt_ids"].tolist())
    step.student()
    step.rollouts = whole
    return step


def measure_times(device: str, num_rows: int, lengths: tuple[int, int], evidence_length: int, repeats: int) -> dict:
    """Median seconds of each part in each way, NaN for what does not fit; the ways take turns."""
    steps = {way: warmed_up(way, device, num_rows, lengths, evidence_length) for way in WAYS}
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for way, step in steps.items():
            parts = {f"{way} student": (step.student,)}
            if step.teaches:
                parts = {f"{way} teacher {name}": (step.teacher, name) for name in ("evidence", "full")} | parts
            for name, part in parts.items():
                try:
                    seconds.setdefault(name, []).append(step.seconds(*part))
                except torch.OutOfMemoryError:
                    seconds[name] = [math.nan]
            step.rollouts.pop("teacher_hidden_states", None)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_memory(way: str, device: str, num_rows: int, lengths: tuple[int, int], evidence_length: int) -> float:
    """Peak MiB that teacher, loss and backward add, NaN if they do not fit."""
    step = warmed_up(way, device, num_rows, lengths, evidence_length)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_mib(device)
    try:
        if step.teaches:
            step.teacher()
        step.student()
    except torch.OutOfMemoryError:
        return math.nan
    return peak_mib(device) - before


def print_tables(rows: list[dict], num_rows: int, evidence_length: int) -> None:
    print(f"\nLoss and backward, G = {num_rows}: seconds, and how many times faster the shared prefix is\n")
    print("| P | C | TRL | off | on | TRL / on | off / on | ideal | share of ideal |")
    print("| --- " * 9 + "|")
    for row in rows:
        on, trl, off = (row[f"{way} student"] for way in ("on", "TRL", "off"))
        print(
            f"| {row['P']} | {row['C']} | {trl:.3g} | {off:.3g} | {on:.3g} | {trl / on:.2f} | {off / on:.2f} | "
            f"{row['ideal']:.2f} | {trl / on / row['ideal']:.2f} (off: {off / on / row['ideal']:.2f}) |"
        )
    print("\nThe teacher's forward, and the whole step (teacher, loss, backward; TRL's loss with the plain teacher)\n")
    print(
        "| P | C | teacher off | on | off / on | step: TRL / on | off / on | ideal | teacher's share of the step: "
        f"off | on | on, evidence of {evidence_length} |"
    )
    print("| --- " * 11 + "|")
    for row in rows:
        off, on = (row[f"{way} teacher full"] for way in ("off", "on"))
        evidence = row["on teacher evidence"]
        step = {
            "TRL": row["TRL student"] + off,
            "off": row["off student"] + off,
            "on": row["on student"] + on,
            "evidence": row["on student"] + evidence,
        }
        print(
            f"| {row['P']} | {row['C']} | {off:.3g} | {on:.3g} | {off / on:.2f} | {step['TRL'] / step['on']:.2f} | "
            f"{step['off'] / step['on']:.2f} | {row['ideal']:.2f} | {off / step['off']:.0%} | {on / step['on']:.0%} | "
            f"{evidence / step['evidence']:.0%} |"
        )
    print("\nPeak MiB beyond models and gradients\n")
    print("| P | C | TRL | off | on | one row | on / one row | TRL / on |")
    print("| --- " * 8 + "|")
    for row in rows:
        memory = row["memory"]
        print(
            f"| {row['P']} | {row['C']} | "
            + " | ".join(f"{memory[way]:.0f}" for way in (*WAYS, "one row"))
            + f" | {memory['on'] / memory['one row']:.2f} | {memory['TRL'] / memory['on']:.1f} |"
        )


def draw(rows: list[dict], num_rows: int, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    labels = [f"P = {row['P']:,}\nC = {row['C']:,}" for row in rows]
    places = range(len(rows))
    for shift, (name, color, values) in enumerate(
        (
            ("against TRL's loss", "#4477aa", [row["TRL student"] / row["on student"] for row in rows]),
            ("against shared_prefix='off'", "#88ccee", [row["off student"] / row["on student"] for row in rows]),
        )
    ):
        bars = left.bar([p + 0.38 * shift - 0.19 for p in places], values, 0.36, color=color, label=name)
        left.bar_label(bars, fmt="%.1f", fontsize=8)
    for place, row in zip(places, rows, strict=True):
        left.hlines(
            row["ideal"],
            place - 0.42,
            place + 0.42,
            color="#cc3311",
            linewidth=1.5,
            label="ideal, G (P + C) / (P + G C)" if place == 0 else None,
        )
    left.set_xticks(places, labels)
    left.set_ylabel("times faster")
    left.set_title(f"Loss and backward, G = {num_rows}")
    left.margins(y=0.35)
    left.legend(fontsize=8, loc="upper left")
    for shift, (way, color) in enumerate(
        (("TRL", "#999999"), ("off", "#88ccee"), ("on", "#4477aa"), ("one row", "#ddaa33"))
    ):
        values = [row["memory"][way] / 1024 for row in rows]
        right.bar([p + 0.2 * shift - 0.3 for p in places], values, 0.19, color=color, label=way)
    right.set_xticks(places, labels)
    right.set_ylabel("peak GiB beyond models and gradients")
    right.set_title("Memory, with a teacher except for TRL")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = ["512x128", "2048x128", "2048x512", "8192x128"]
    if device == "cuda":
        default = ["8192x1024", "32768x1024", "131072x1024"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=default, metavar="PxC", help="prompt x completion tokens")
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--evidence_tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3 if device == "cuda" else 2)
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, {'bfloat16' if device == 'cuda' else 'float32'}, torch {torch.__version__}"
    print(title, flush=True)
    rows = []
    for text in args.lengths:
        lengths = prompt_length, completion_length = tuple(int(part) for part in text.split("x"))
        common = (lengths, args.evidence_tokens)
        # A process a measurement: on CUDA, too, nothing is left over from the one before
        row = in_child(measure_times, device, args.num_generations, *common, args.repeats)
        row["memory"] = {way: in_child(measure_memory, way, device, args.num_generations, *common) for way in WAYS}
        row["memory"]["one row"] = in_child(measure_memory, "off", device, 1, *common)
        row["P"], row["C"], g = prompt_length, completion_length, args.num_generations
        row["ideal"] = g * (prompt_length + completion_length) / (prompt_length + g * completion_length)
        rows.append(row)
        print(f"measured {text}", flush=True)
    print_tables(rows, args.num_generations, args.evidence_tokens)
    if args.figure is not None:
        draw(rows, args.num_generations, args.figure, title)


if __name__ == "__main__":
    main()
