"""Time and peak memory of one loss and backward over the number of completion tokens T; memory of a whole step.

    python scripts/benchmarks/loss.py [--tokens 256 1024 4096] [--repeats 5]
    python scripts/benchmarks/loss.py --count [--tokens 16384]

The loss, from hidden states, in four ways, interleaved in one run, at the vocabulary of Qwen3 and Qwen2.5 (151,936):

- naive: both models' full logits, softmax, autograd: log-probability, entropy and reverse KL;
- TRL distillation: the tiled reverse KL that TRL's `DistillationTrainer` runs;
- TRL GRPO: the tiled log-probability and entropy that TRL's `GRPOTrainer` runs;
- ours: log-probability, entropy and reverse KL in one pass.

Memory is what a way holds beyond its inputs (hidden states and heads): on CUDA the allocator's peak, on the CPU the
growth of the process's peak resident set, each measurement in a process of its own. It includes the gradients, which
every way must hold.

Then the loss and backward of one micro-batch in TRL's `GRPOTrainer` and in `DGRPOTrainer`, with a model of few layers
and the same vocabulary: what the teacher adds, beside what it must (its weights and the completions' hidden states).

`--count` needs no GPU: it counts the kernels of one loss and backward on CUDA, and the bytes that they read and write,
with log-probability and reverse KL, in bfloat16. Operators run on fake tensors; each that computes is a kernel, which
reads its inputs and writes its outputs once. A compiled function counts as what Inductor makes of it for CUDA, which
`COMPILED` says.
"""

import argparse
import ctypes
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from dgrpo_trl import DGRPOConfig, DGRPOTrainer, losses, tiles
from dgrpo_trl.fused import Fused
from dgrpo_trl.losses import Distillation, LMHead, token_terms


def make_inputs(num_tokens: int, vocab_size: int, hidden_size: int, teacher_hidden_size: int, device: str):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    hidden, weight = randn(num_tokens, hidden_size), randn(vocab_size, hidden_size).mul_(hidden_size**-0.5)
    teacher_hidden = randn(num_tokens, teacher_hidden_size)
    teacher_weight = randn(vocab_size, teacher_hidden_size).mul_(teacher_hidden_size**-0.5)
    targets = torch.randint(vocab_size, (num_tokens,), device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, targets


def naive(hidden, weight, teacher_hidden, teacher_weight, targets):
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    log_t = (teacher_hidden @ teacher_weight.t()).float().log_softmax(-1)
    p = log_p.exp()
    logps = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    entropies = -(p * log_p).sum(-1).detach()
    return (0.5 * (p * (log_p - log_t)).sum(-1) - logps).mean() + 0 * entropies.mean()


def trl_distillation(hidden, weight, teacher_hidden, teacher_weight, targets):
    divergences, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, teacher_weight, None, 1.0, 1.0
    )
    return 0.5 * divergences.mean()


def trl_grpo(hidden, weight, teacher_hidden, teacher_weight, targets):
    logps, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("entropy",))
    return -logps.mean()


def ours(hidden, weight, teacher_hidden, teacher_weight, targets):
    terms = token_terms(
        hidden, LMHead(weight), targets, distillation=Distillation(teacher_hidden, LMHead(teacher_weight))
    )
    return (0.5 * terms.divergences - terms.logps).mean()


WAYS = {"naive": naive, "TRL distillation": trl_distillation, "TRL GRPO": trl_grpo, "ours": ours}


def measure(way: str, sizes: tuple, device: str, repeats: int) -> tuple[float, float]:
    """Median seconds and peak MiB beyond the inputs."""
    inputs = make_inputs(*sizes, device)

    def run():
        for x in inputs[:2]:
            x.grad = None
        WAYS[way](*inputs).backward()

    if device == "cuda":
        run()  # compiles the Triton kernels
        for x in inputs[:2]:
            x.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), memory


def peak_mib(device: str) -> float:
    """Peak memory so far, in MiB: the allocator's on CUDA, the process's elsewhere."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A hundred words: the rollouts are given, so that nothing is read with it."""
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, 100)}}
    model = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<end>")


def make_trainer(student, teacher, num_rows: int, device: str, **options):
    """A `DGRPOTrainer`, or `GRPOTrainer` where there is no teacher, for micro-batches of `num_rows` given rollouts."""
    config_class, trainer_class = (GRPOConfig, GRPOTrainer) if teacher is None else (DGRPOConfig, DGRPOTrainer)
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            folder,
            per_device_train_batch_size=num_rows,
            num_generations=max(2, num_rows),
            generation_batch_size=max(2, num_rows),
            use_cpu=device == "cpu",
            report_to="none",
            **{"bf16": device == "cuda", **options},
        )
        trainer = trainer_class(
            student,
            lambda completions, **_: [0.0] * len(completions),
            config,
            Dataset.from_dict({"prompt": ["w1"] * max(2, num_rows)}),
            processing_class=make_tokenizer(),
            **({} if teacher is None else {"teacher_model": teacher}),
        )
    trainer.model.to(device).train()
    if options.get("gradient_checkpointing"):  # otherwise the start of training does it
        kwargs = options.get("gradient_checkpointing_kwargs") or {"use_reentrant": False}
        trainer.model.gradient_checkpointing_enable(kwargs)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_rollouts(prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> dict:
    """Rollouts as the trainer hands them to its loss; shapes `(B, P)` and `(B, T)`."""
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": torch.linspace(-1, 1, len(prompt_ids), device=prompt_ids.device),
        "num_items_in_batch": torch.tensor(completion_ids.numel(), device=prompt_ids.device),
    }


def add_teacher(trainer, rollouts: dict, prompts: list[list[int]]) -> None:
    """The teacher's forward over the rollouts, under `prompts`."""
    rollouts["teacher_hidden_states"] = trainer.teacher.hidden_states(
        prompts, rollouts["completion_ids"], rollouts["completion_mask"], 0, len(prompts)
    )


def measure_step(trainer_name: str, vocab_size: int, hidden_size: int, num_tokens: int, device: str) -> dict:
    """Peak MiB that the loss and backward of 4 completions add to a process that holds the student."""
    torch.manual_seed(0)
    num_rows, prompt_length = 4, 512

    def model():
        config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden_size // 4,
            tie_word_embeddings=True,
        )
        return Qwen3ForCausalLM(config)

    student = model()
    before = peak_mib(device)
    is_ours = trainer_name == "DGRPOTrainer"
    # Without the shared prefix: what the loss alone takes
    options = {"gradient_checkpointing": False, **({"shared_prefix": "off"} if is_ours else {})}
    trainer = make_trainer(student, model() if is_ours else None, num_rows, device, **options)
    length = num_tokens // num_rows
    ids = torch.randint(1, vocab_size, (num_rows, prompt_length + length), device=device)
    rollouts = make_rollouts(ids[:, :prompt_length], ids[:, prompt_length:])
    teacher_must = 0.0
    if is_ours:
        add_teacher(trainer, rollouts, rollouts["prompt_ids"].tolist())
        held = [*trainer.teacher_model.parameters(), rollouts["teacher_hidden_states"]]
        teacher_must = sum(x.numel() * x.element_size() for x in held) / 2**20
    trainer.compute_loss(trainer.model, rollouts).backward()
    return {"MiB": peak_mib(device) - before, "teacher must": teacher_must}


def in_child(function, *arguments):
    """Calls `function` in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def print_steps(args: argparse.Namespace, device: str) -> None:
    print("\n| T | GRPOTrainer: MiB | DGRPOTrainer: MiB | difference | teacher's weights and hidden states |")
    print("| --- | --- | --- | --- | --- |")
    for num_tokens in (args.tokens[0], args.tokens[-1]):
        sizes = (args.vocab_size, args.hidden_size, num_tokens, device)
        stock, dgrpo = (in_child(measure_step, name, *sizes) for name in ("GRPOTrainer", "DGRPOTrainer"))
        print(
            f"| {num_tokens} | {stock['MiB']:.0f} | {dgrpo['MiB']:.0f} | {dgrpo['MiB'] - stock['MiB']:.0f} | "
            f"{dgrpo['teacher must']:.0f} |",
            flush=True,
        )


# --- What runs on CUDA, counted

# Kernels, and passes over the inputs, in the Triton code of PyTorch 2.13. Of the two kernels of `fold_tile`, one reads
# the targets' logits, and one goes over the tiles twice: for the maxima, and for the sums
COMPILED = {
    tiles.fold_tile: (2, 2),
    tiles.tile_log_probs: (1, 1),
    tiles.tile_gradient: (1, 1),
    losses._terms_of_jsd: (1, 1),
}
NOT_KERNELS = {"aten.detach.default", "aten.empty.memory_format", "prim.device.default"}


class Traffic(TorchDispatchMode):
    """Counts the kernels that operators launch, and the bytes that these read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # On fake tensors, this one lacks a rule
        outputs = kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)
        if not func.is_view and str(func) not in NOT_KERNELS:
            self.add(1, 1, (args, {k: v for k, v in kwargs.items() if k != "out"}), outputs)
        return outputs

    def add(self, kernels: int, passes: int, inputs, outputs) -> None:
        read, written = (
            sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))
            for tensors in (inputs, outputs)
        )
        self.kernels += kernels
        self.bytes += passes * read + written

    def compiled(self, function: Fused, kernels: int, passes: int):
        """Stands for the compiled function."""

        def run(*args):
            with torch.utils._python_dispatch._disable_current_modes(), args[0].values_NV.fake_mode:
                outputs = function.function(*args)
            self.add(kernels, passes, args, outputs)
            return outputs

        return run


def lend_guard() -> None:
    """Lends the CUDA device the guard of `meta`, which does nothing: a PyTorch without CUDA has none."""
    cuda, meta = 1, 14  # of c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[cuda] = guards[cuda] or guards[meta]


def count(num_tokens: int, vocab_size: int, hidden_size: int, teacher_hidden_size: int, compiles: bool) -> Traffic:
    traffic = Traffic()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        hidden, weight, teacher_hidden, teacher_weight, targets = make_inputs(
            num_tokens, vocab_size, hidden_size, teacher_hidden_size, "cuda"
        )
        stack.enter_context(mock.patch.object(Fused, "is_possible", compiles))
        for function, (kernels, passes) in COMPILED.items():
            run = traffic.compiled(function, kernels, passes)
            stack.enter_context(mock.patch.object(function, "compiled", run))
        stack.enter_context(traffic)
        teacher = Distillation(teacher_hidden, LMHead(teacher_weight))
        terms = token_terms(hidden, LMHead(weight), targets, distillation=teacher)
        # Not by the engine of autograd, which needs the true device
        terms.logps.grad_fn.apply(terms.logps.detach(), None, terms.divergences.detach(), None, None)
    return traffic


def print_counts(args: argparse.Namespace) -> None:
    lend_guard()
    print(f"V = {args.vocab_size}, hidden sizes {args.hidden_size} and {args.teacher_hidden_size}, bfloat16\n")
    print("| T | uncompiled: kernels | TB | compiled: kernels | TB |\n| --- | --- | --- | --- | --- |")
    for num_tokens in args.tokens:
        sizes = (num_tokens, args.vocab_size, args.hidden_size, args.teacher_hidden_size)
        counts = [count(*sizes, compiles) for compiles in (False, True)]
        cells = " | ".join(f"{traffic.kernels} | {traffic.bytes / 1e12:.3f}" for traffic in counts)
        print(f"| {num_tokens} | {cells} |", flush=True)


def main() -> None:
    has_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count kernels and bytes instead, without a GPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--hidden_size", type=int, help="student's; 2048 on CUDA, else 128")
    parser.add_argument("--teacher_hidden_size", type=int, help="5120 on CUDA, else 256")
    parser.add_argument("--repeats", type=int, default=10 if has_cuda else 1, help="timed runs after a first one")
    parser.add_argument(
        "--max_naive_gib", type=float, default=64 if has_cuda else 8, help="leave out a larger naive run"
    )
    args = parser.parse_args()
    args.hidden_size = args.hidden_size or (2048 if has_cuda or args.count else 128)
    args.teacher_hidden_size = args.teacher_hidden_size or (5120 if has_cuda or args.count else 256)
    if args.count:
        print_counts(args)
        return
    device = "cuda" if has_cuda else "cpu"
    name = torch.cuda.get_device_name() if has_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"V = {args.vocab_size}, hidden sizes {args.hidden_size} (student) and {args.teacher_hidden_size} (teacher), "
        f"{'bfloat16' if has_cuda else 'float32'}, {name}, torch {torch.__version__}\n"
    )
    print("| T | " + " | ".join(f"{way}: s | MiB" for way in WAYS) + " | naive / ours: time | memory |")
    print("| --- " * (2 * len(WAYS) + 3) + "|")
    for num_tokens in args.tokens:
        sizes = (num_tokens, args.vocab_size, args.hidden_size, args.teacher_hidden_size)
        naive_gib = 7 * num_tokens * args.vocab_size * 4 / 2**30  # about seven (T, V) tensors
        results = {}
        for way in WAYS:
            if way == "naive" and naive_gib > args.max_naive_gib:
                continue
            results[way] = (
                measure(way, sizes, device, args.repeats)
                if has_cuda
                else in_child(measure, way, sizes, device, args.repeats)
            )
        cells = [f"{results[w][0]:.4g} | {results[w][1]:.0f}" if w in results else "- | -" for w in WAYS]
        ratios = "- | -"
        if "naive" in results:
            ratios = " | ".join(f"{a / b:.2f}" for a, b in zip(results["naive"], results["ours"], strict=True))
        print(f"| {num_tokens} | {' | '.join(cells)} | {ratios} |", flush=True)
    print_steps(args, device)


if __name__ == "__main__":
    main()
