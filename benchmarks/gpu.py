"""What a GPU changes: correctness, step against sentence-transformers, largest batch, MFU, variants of the loss.

Random weights of the sizes of all-MiniLM-L6-v2, bge-base and UAE-Large, a made-up tokenizer, texts as long as those of
the mixed data pack; bf16 on both sides. Needs neither Ray, MTEB, datasets nor any download. Sections run in the order
of SECTIONS, each with its own deadline; one that fails is told and the next begins. What was measured is written after
every case.

    benchmarks/gpu.sh                                  at most 8 minutes on one H100 or H200
    python benchmarks/gpu.py --smoke                   everything at toy sizes on a CPU, about a minute
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Claim, gigabytes, interleave, number, parser, publish, ratio, say, seconds_of, spread, start
from loss_stage import embeddings
from sides import SHAPES, Ours, Setting, Shape, Theirs, load_rows, pair_batch, random_encoder

from gist_dist.config import BatchConfig, LossConfig
from gist_dist.core.budgets import fitted
from gist_dist.core.candidates import row_blocks
from gist_dist.core.device import prepare_cuda
from gist_dist.core.gradcache import ActivationBudget
from gist_dist.core.loss import gist_loss
from gist_dist.models.compiled import COMPILE

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16, by what the device's name contains."""

VOCABULARY = 30_522
"""Rows of BERT's token table."""
COMPILED_ROWS = (4096, 1024, 256)
"""Rows of the steps that are compiled, by model."""


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 16384])
    flags.add_argument("--largest", type=int, default=65536, help="rows of the largest step tried")
    flags.add_argument("--kernel-sizes", type=int, nargs="+", default=[4096, 16384])
    flags.add_argument("--minutes", type=float, default=7.0, help="no case begins later")
    flags.add_argument("--only", nargs="+", help="sections")
    flags.add_argument("--mini-batch-sizes", type=int, nargs="+", default=[256, 1024], help="theirs, the best of")
    flags.add_argument("--smoke", action="store_true")
    arguments = flags.parse_args()
    start(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = (("minilm", "minilm"), ("bge-base", "bge-base"), ("uae-large", "uae-large"))
    if arguments.smoke:
        arguments.sizes, arguments.kernel_sizes, arguments.largest = [32, 64], [64, 128], 128
        arguments.mini_batch_sizes, arguments.repeats = [8, 16], 2
        pairs = (("tiny", "tiny"),) * 2
    elif arguments.device == "cpu":
        raise SystemExit("no GPU here; --smoke tries everything at toy sizes")
    Run(arguments).all(pairs)


class Run:
    """Results, and the time that is left for more."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.results, self.claims = arguments, [], []
        self.began = time.monotonic()
        self.ends = self.deadline = self.began + 60 * arguments.minutes
        self.device = arguments.device
        self.repeats = min(3, arguments.repeats)
        self.strict = self.packing = True
        if self.device == "cuda":
            prepare_cuda()

    def left(self) -> float:
        """Seconds of this section."""
        return self.deadline - time.monotonic()

    def all(self, pairs: tuple[tuple[str, str], ...]) -> None:
        self.ours: dict[tuple[str, str], Ours] = {}
        self.settings: dict[tuple[str, str], Setting] = {}
        first, *others = pairs
        sections: list[tuple[str, float, Callable[[], None]]] = [
            ("facts", 15, self.facts),
            ("loss correct", 30, self.loss_correct),
            ("prepare", 60, lambda: self.prepare(first)),
            ("step correct", 40, lambda: self.step_correct(first)),
            ("step", 80, lambda: self.steps(first, self.arguments.sizes)),
            ("profile", 20, lambda: self.profile(first, sorted(self.arguments.sizes)[-2])),
            *(
                (f"step {pair[0]}", seconds, partial(self.one_model, pair, 256 if pair[0] == "uae-large" else 1024))
                for pair, seconds in zip(others, (60, 50), strict=False)
            ),
            *(
                (f"compiled {pair[0]}", 60, partial(self.compiled, pair, n))
                for pair, n in zip(pairs, COMPILED_ROWS, strict=False)
            ),
            ("loss stage", 40, self.loss_variants),
            ("largest", 60, lambda: self.largest(first)),
        ]
        for name, seconds, section in sections:
            if self.arguments.only and name not in ("prepare", *self.arguments.only):
                continue
            self.deadline = min(self.ends, time.monotonic() + seconds)
            began = time.monotonic()
            try:
                if self.left() < 3:
                    raise TimeoutError("no time is left")
                section()
            except Exception as error:
                traceback.print_exc(limit=-6)
                self.add({"case": name, "skipped": f"{type(error).__name__}: {str(error)[:200]}"})
            _free(self.device)
            say(f"== {name}: {time.monotonic() - began:.1f} s, {self.ends - time.monotonic():.0f} s left for all")

    # ---- facts ----

    def facts(self) -> None:
        small = torch.zeros(8, device=self.device)
        told: dict[str, Any] = {"case": "facts"}

        def launches() -> None:
            for _ in range(1000):
                small.add_(1)

        told["launch_us"] = 1000 * self.seconds(launches)
        size = 4096 if self.device == "cuda" else 64
        for dtype in (torch.bfloat16, torch.float32):
            a, b = (torch.randn(2 * size, size, device=self.device).to(dtype) for _ in range(2))
            told[f"gemm_tflops_{dtype}"] = 8 * size**3 / self.seconds(lambda a=a, b=b: a @ b.T) / 1e12
        self.add(told)

    def seconds(self, call: Callable[[], Any], repeats: int = 3) -> float:
        """Median, warm."""
        samples = interleave({"it": call}, repeats, device=self.device)["it"]
        return samples.median

    # ---- correctness ----

    def loss_correct(self) -> None:
        """Against fp64: the plain loss, and every variant of the kernel."""
        n = min(1024, *self.arguments.kernel_sizes)
        student, guide, batch = self.loss_inputs(n)
        blocks, config = row_blocks(batch, LossConfig(), 2e9), LossConfig()
        exact = gist_loss(student.double(), guide.double(), batch, blocks, config, kernel=False)
        scale = exact.gradient.abs().max()
        for name, call in self.variants(student, guide, batch).items():
            share, again = call(), call()
            error = ((share.gradient - exact.gradient).abs().max() / scale).item()
            self.add({
                "case": "loss correct", "rows": n, "variant": name, "gradient_error": error,
                "loss_error": (share.loss - exact.loss).abs().item() / exact.loss.item(),
                "masked_more": sum(float(v - exact.counts[k]) for k, v in share.counts.items() if "masked" in k),
                "same_again": torch.equal(share.gradient, again.gradient),
            })  # fmt: skip

    def step_correct(self, pair: tuple[str, str]) -> None:
        ours, n = self.ours[pair], min(256, *self.arguments.sizes)
        model = ours.student.model
        told: dict[str, Any] = {"case": "step correct", "rows": n}
        state = {k: v.clone() for k, v in model.state_dict().items()}
        for packing in (False, True):
            name = "packed" if packing else "padded"
            self.use(ours, packing, 4096)
            model.load_state_dict(state)
            texts = ours.student.inputs(ours.tokens(n)[1])
            with torch.no_grad():
                first = ours.student.encode(texts, dropout_seed=(1, 2))
            told[f"{name} dropout repeated"] = torch.equal(first, ours.student.encode(texts, dropout_seed=(1, 2)))
            model.eval()
            with torch.no_grad():
                told[f"{name} embeddings"] = ours.student.encode(texts, dropout_seed=(1,)).double()
            model.train()
            outcomes = []
            for _ in range(2):
                model.load_state_dict(state)
                ours.train_state.optimizer.state.clear()
                ours.num_steps = 0
                with _deterministic(self.device, self.strict):
                    result = ours.step(n)
                outcomes.append((result.loss, [p.detach().clone() for p in ours.student.parameters()]))
            told[f"{name} step repeated"] = outcomes[0][0] == outcomes[1][0] and all(
                map(torch.equal, outcomes[0][1], outcomes[1][1])
            )
            told[f"{name} loss"] = outcomes[0][0]
        padded, packed = told.pop("padded embeddings"), told.pop("packed embeddings")
        told["packed - padded"] = ((padded - packed).norm() / padded.norm()).item()
        model.load_state_dict(state)
        model.eval()
        ours.student.packs = False
        ours.student.precision = "fp32"
        with torch.no_grad():
            exact = ours.student.embed(ours.tokens(n)[1]).double()
        for name, rounded in (("padded", padded), ("packed", packed)):
            told[f"{name} - fp32"] = ((rounded - exact).norm() / exact.norm()).item()
        # fp32 on this device against fp64 on the CPU, no dropout
        some = ours.tokens(8)[1]
        gradients = []
        for device, dtype in ((self.device, torch.float32), ("cpu", torch.float64)):
            model.to(device=device, dtype=dtype)
            embedding = ours.student.embed(some)
            embedding.backward(torch.linspace(-1, 1, embedding.numel()).view_as(embedding).to(embedding))
            gradients.append(torch.cat([p.grad.to_dense().cpu().double().flatten() for p in ours.student.parameters()
                                        if p.grad is not None]))  # fmt: skip
            model.zero_grad(set_to_none=True)
        told["fp32 gradient against fp64"] = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
        model.to(device=self.device, dtype=torch.float32).train()
        ours.student.precision = "bf16"
        model.load_state_dict(state)
        ours.train_state.optimizer.state.clear()
        self.add(told)

    # ---- steps ----

    def prepare(self, pair: tuple[str, str]) -> None:
        rows, _ = load_rows("mixed", max(self.arguments.largest, *self.arguments.sizes))
        self.rows = rows
        say(f"{len(rows):,} rows made; {self.left():.0f} s left")
        self.make(pair, rows)

    def make(self, pair: tuple[str, str], rows: list[dict[str, str]]) -> Ours:
        folder = self.arguments.work / "models"
        student, guide = (random_encoder(folder / f"made-up-{shape}", SHAPES[shape]) for shape in pair)
        self.settings[pair] = Setting(
            student, guide, tuple(rows), self.arguments.work, max_tokens=256, precision="bf16", device=self.device
        )
        self.ours[pair] = ours = Ours(self.settings[pair], packing=True)
        self.packing = self.packing and ours.student.packs and ours.guide is not None and ours.guide.packs
        say(f"{pair}: ready; {self.left():.0f} s left")
        self.try_out(ours)
        return ours

    def try_out(self, ours: Ours) -> None:
        """A small step: what this machine refuses, packing or strict determinism, is told and left out from here on."""
        for _ in range(3):
            try:
                self.ours_side(ours, min(64, *self.arguments.sizes), packing=True, chunk_tokens=4096)()
                return
            except RuntimeError as error:
                traceback.print_exc(limit=-6)
                self.add({"case": "refused", "skipped": str(error)[:300]})
                if "determinis" in str(error) and self.strict:
                    self.strict = False
                else:
                    self.packing = False

    def use(
        self, ours: Ours, packing: bool, chunk_tokens: int, activation_gb: float = 0.0, start_tokens: int | None = None
    ) -> None:
        """Have its next step cut and encode so."""
        fields = {
            "chunk_tokens": chunk_tokens, "activation_gb": activation_gb, "chunk_start_tokens": start_tokens,
            "packing": packing,
        }  # fmt: skip
        batch = ours.config.batch.model_copy(update=fields)
        ours.config = ours.train_state.config = ours.config.model_copy(update={"batch": batch})
        ours.student.packs = ours.guide.packs = packing and self.packing
        ours.train_state.activations = ActivationBudget(activation_gb * 1e9, ours.student.model)

    def budgets(self, shape: Shape) -> tuple[int, float]:
        """Chunk tokens and gigabytes of kept graphs, as a run has them here where its recipe leaves them open.
        Results up to 94d710f had a tenth and two fifths of the memory."""
        total = float(torch.cuda.mem_get_info()[1] if self.device == "cuda" else 5e9)
        parameters = shape.flops_per_token // 2 + VOCABULARY * shape.width
        guide_bytes = 2.0 * parameters
        batch = fitted(BatchConfig(), total, parameters, guide_bytes, shape.width, shape.layers, True, float("inf"))
        return batch.tokens_at_once, batch.kept_bytes / 1e9

    def ours_side(self, ours: Ours, n: int, deterministic: bool = True, **how: Any) -> Callable[[], Any]:
        def step() -> Any:
            self.use(ours, **how)
            with _deterministic(self.device, deterministic and self.strict):
                return ours.step(n)

        return step

    def steps(self, pair: tuple[str, str], sizes: list[int]) -> None:
        ours = self.ours[pair]
        tokens, kept = self.budgets(SHAPES[pair[0]])
        theirs = self.theirs(pair, min(sizes))
        for n in sizes:
            if self.left() < 5:
                raise TimeoutError(f"{n} rows: no time is left")
            side = partial(self.ours_side, ours, n)
            sides = {
                "ours": side(packing=True, chunk_tokens=tokens, activation_gb=kept),
                "padded": side(packing=False, chunk_tokens=tokens, activation_gb=kept),
            }
            if n <= 4096:
                sides["theirs"] = partial(_loosely, self.device, partial(theirs.step, n))
            if n == 4096 or self.arguments.smoke:
                sides |= {
                    "packed, 16k": side(packing=True, chunk_tokens=16384, activation_gb=kept),
                    "padded, 16k": side(packing=False, chunk_tokens=16384, activation_gb=kept),
                    "none kept": side(packing=True, chunk_tokens=tokens),
                    "not deterministic": side(
                        packing=True, chunk_tokens=tokens, activation_gb=kept, deterministic=False
                    ),
                }
                if self.arguments.smoke or os.environ.get("GIST_DIST_FIRST_RUN"):
                    sides["as the first run"] = side(
                        packing=False, chunk_tokens=32768, activation_gb=20, start_tokens=32
                    )
            self.measure(pair, ours, n, sides, self.repeats, kept)

    def measure(
        self, pair: tuple[str, str], ours: Ours, n: int, sides: dict[str, Any], repeats: int, kept: float
    ) -> None:
        result = {"case": "step", "student": pair[0], "guide": pair[1], "rows": n}
        samples = interleave(sides, repeats, max(1.0, 0.5 * self.left()), ["theirs"], device=self.device)
        result |= {name: taken.told() for name, taken in samples.items()}
        self.use(ours, True, self.budgets(SHAPES[pair[0]])[0], kept)
        result |= self.efficiency(pair, ours, n, samples["ours"].median)
        if "theirs" in samples:
            result["ratio"] = ratio(samples["theirs"], samples["ours"])
            what = f"step, {pair[0]} guided by {pair[1]}, {n:,} rows, bf16: theirs ÷ ours"
            self.claims.append(Claim(what, result["ratio"]["median"]))
        self.add(result)

    def theirs(self, pair: tuple[str, str], n: int) -> Theirs:
        """At the best of several mini_batch_size."""
        sizes, ours = self.arguments.mini_batch_sizes, self.ours[pair]
        theirs, taken = Theirs(self.settings[pair], ours, mini_batch_size=sizes[0]), {}
        for size in sizes:
            theirs.loss.mini_batch_size = size
            try:
                _loosely(self.device, partial(theirs.step, n))
                taken[size] = self.seconds(lambda: _loosely(self.device, partial(theirs.step, n)), 1)
            except torch.OutOfMemoryError:
                _free(self.device)
        theirs.loss.mini_batch_size = min(taken, key=lambda size: taken[size])
        say(f"theirs by mini_batch_size: {taken}")
        return theirs

    def efficiency(self, pair: tuple[str, str], ours: Ours, n: int, seconds: float) -> dict[str, Any]:
        """MFU counts useful work only: neither a second encode nor padding; HFU counts the second encodes too."""
        plan, budget = ours.plan(n), ours.train_state.activations
        lengths = ours.corpus.student_lengths[plan.texts]
        student, guide = (SHAPES[shape].flops(lengths) for shape in pair)
        told: dict[str, Any] = {"rows_per_second": n / seconds, "tokens_per_second": int(lengths.sum()) / seconds}
        told["chunks"], told["tokens"] = len(plan.student_chunks), int(lengths.sum())
        told["tflops"] = (3 * student + guide) / seconds / 1e12
        if peak := _peak_flops(self.device):
            with _deterministic(self.device, self.strict):
                ours.step(n)
            kept = budget.used_bytes / max(1.0, budget.bytes_per_token) / max(1, plan.padded_tokens)
            told["kept"] = min(1.0, kept)
            told["mfu"] = 1e12 * told["tflops"] / peak
            told["hfu"] = ((4 - told["kept"]) * student + guide) / seconds / peak
            what = f"MFU of the step, {pair[0]} guided by {pair[1]}, {n:,} rows, bf16"
            self.claims.append(Claim(what, 100 * told["mfu"], unit=" %"))
        return told

    def one_model(self, pair: tuple[str, str], their_rows: int) -> None:
        """Larger models at their_rows, against theirs, and alone at four times as many."""
        ours = self.make(pair, self.rows)
        tokens, kept = self.budgets(SHAPES[pair[0]])
        their_rows = min(their_rows, max(self.arguments.sizes))
        theirs = self.theirs(pair, their_rows)
        for n in dict.fromkeys((their_rows, min(4096, max(self.arguments.sizes)))):
            side = partial(self.ours_side, ours, n, chunk_tokens=tokens, activation_gb=kept)
            sides = {"ours": side(packing=True), "padded": side(packing=False)}
            if n == their_rows:
                sides["theirs"] = partial(_loosely, self.device, partial(theirs.step, n))
            self.measure(pair, ours, n, sides, min(2, self.repeats), kept)
            if self.left() < 8:
                break
        if len(self.ours) > 1:
            del self.ours[pair]

    def compiled(self, pair: tuple[str, str], n: int) -> None:
        """student.compile and guide.compile against neither; also with dropout that the compiler fuses."""
        plain, n = self.ours.get(pair) or self.make(pair, self.rows), min(n, max(self.arguments.sizes))
        tokens, kept = self.budgets(SHAPES[pair[0]])
        side = partial(self.ours_side, n=n, packing=True, chunk_tokens=tokens, activation_gb=kept)
        self.profile(pair, n)
        for fallback in (True, False):
            torch._dynamo.reset()
            COMPILE["options"]["fallback_random"] = fallback
            ours = Ours(replace(self.settings[pair], compile=True), packing=True)
            name, began = "compiled" if fallback else "compiled, fused dropout", time.monotonic()
            told: dict[str, Any] = {"case": name, "student": pair[0], "guide": pair[1], "rows": n}
            calls = {"plain": side(plain), "compiled": side(ours)}
            losses = {which: call().loss for which, call in calls.items()}
            told["first_step_s"] = time.monotonic() - began
            texts = ours.student.inputs(ours.tokens(min(64, n))[1])
            with torch.no_grad():
                first = ours.student.encode(texts, dropout_seed=(1, 2))
            told["dropout repeated"] = torch.equal(first, ours.student.encode(texts, dropout_seed=(1, 2)))
            second = ours.student.encode(texts, dropout_seed=(1, 2)).detach()
            told["repeated within"] = (first - second).abs().max().item()
            samples = interleave(calls, self.repeats, max(1.0, 0.4 * self.left()), device=self.device)
            told |= {which: taken.told() for which, taken in samples.items()} | {"losses": str(losses)}
            self.use(ours, True, tokens, kept)
            self.add(told | self.efficiency(pair, ours, n, samples["compiled"].median))
        self.ours[pair] = ours
        self.profile(pair, n)
        self.ours.pop(pair)

    def largest(self, pair: tuple[str, str]) -> None:
        """Doubles the batch until memory, time or rows end."""
        ours, n = self.ours[pair], max(self.arguments.sizes)
        how = self.budgets(SHAPES[pair[0]])
        while 2 * n <= self.arguments.largest:
            n *= 2
            before = time.monotonic()
            call = self.ours_side(ours, n, packing=True, chunk_tokens=how[0], activation_gb=how[1])
            taken = interleave({"ours": call}, 1, cold=["ours"], device=self.device)["ours"]
            self.add({"case": "largest", "student": pair[0], "guide": pair[1], "rows": n, "ours": taken.told(),
                      "rows_per_second": n / taken.median})  # fmt: skip
            if 3 * (time.monotonic() - before) > self.left():
                break
        self.claims.append(Claim("largest step tried on one GPU", n, unit=" rows"))

    def profile(self, pair: tuple[str, str], n: int) -> None:
        """Where a step's time goes: kernels, launches, waits of the host."""
        ours = self.ours[pair]
        tokens, kept = self.budgets(SHAPES[pair[0]])
        call = self.ours_side(ours, n, packing=True, chunk_tokens=tokens, activation_gb=kept)
        call()
        cuda = self.device == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
        with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
            began = time.perf_counter()
            result = call()
            wall = time.perf_counter() - began
        kernels: dict[str, list[float]] = {}
        calls: dict[str, int] = {}
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer"):
                spent = kernels.setdefault(event.name[:70], [0.0, 0])
                spent[0] += event.time_range.elapsed_us() / 1e3
                spent[1] += 1
            elif event.name.startswith(("cuda", "cuLaunch")):
                calls[event.name] = calls.get(event.name, 0) + 1
        top = sorted(kernels.items(), key=lambda item: -item[1][0])[:40]
        told = {
            "case": "profile", "student": pair[0], "rows": n, "wall_s": wall,
            "device_ms": sum(v[0] for v in kernels.values()),
            "kernels": sum(v[1] for v in kernels.values()), "phases": result.seconds,
            "calls": calls, "top": {name: [round(ms, 2), times] for name, (ms, times) in top},
        }  # fmt: skip
        say(json.dumps(told, indent=1, default=str))
        self.add(told)

    # ---- variants of the loss ----

    def loss_inputs(self, n: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
        student, guide = (e.to(self.device) for e in embeddings(n, 384))
        # Rounded, as the guide's are, so that equal similarities don't depend on precision more than in training.
        return student, guide.half().float(), pair_batch(n).to(torch.device(self.device))

    def variants(self, student: torch.Tensor, guide: torch.Tensor, batch: Any) -> dict[str, Callable[[], Any]]:
        config = LossConfig()
        blocks = row_blocks(batch, config, 2e9)

        def kernel(guide: torch.Tensor, precision: str = "highest") -> Any:
            torch.set_float32_matmul_precision(precision)
            try:
                return gist_loss(student, guide, batch, blocks, config, kernel=True)
            finally:
                torch.set_float32_matmul_precision("highest")

        sides = {"plain": partial(gist_loss, student, guide, batch, blocks, config)}
        if self.device == "cuda":
            half = guide.half()
            sides |= {
                "kernel": partial(kernel, guide), "kernel, fp16 guide": partial(kernel, half),
                "kernel, tf32x3": partial(kernel, guide, "high"),
                "kernel, tf32x3, fp16 guide": partial(kernel, half, "high"),
            }  # fmt: skip
        return sides

    def loss_variants(self) -> None:
        for n in self.arguments.kernel_sizes:
            inputs = self.loss_inputs(n)
            samples = interleave(self.variants(*inputs), 2, 10, device=self.device)
            self.add({"case": "loss stage", "rows": n} | {name: taken.told() for name, taken in samples.items()})

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        short = {k: v for k, v in result.items() if not isinstance(v, dict)}
        say(f"{time.monotonic() - self.began:4.0f} s  {json.dumps(short)} {seconds_of(result)}")
        document = {
            "question": "On one GPU: how fast is a step, how large can a batch be, and what is the fused kernel worth?",
            "control": "sentence-transformers' CachedGISTEmbedLoss in bf16 on the same token ids; the plain loss",
            "settings": {k: v for k, v in vars(self.arguments).items() if isinstance(v, int | float | str | list)},
            "results": self.results,
        }
        publish(
            "gpu-smoke" if self.arguments.smoke else "gpu", document, COLUMNS, self.claims, None,
            self.arguments.results, quiet=True,
        )  # fmt: skip


def _times(result: dict[str, Any]) -> str:
    return "; ".join(f"{name} {told}" for name, told in seconds_of(result).items())


COLUMNS = {
    "case": "case",
    "student": lambda r: r["student"],
    "guide": lambda r: r["guide"],
    "rows": lambda r: f"{r['rows']:,}",
    "seconds": _times,
    "theirs ÷ ours": lambda r: spread(r["ratio"], "×"),
    "rows/s": lambda r: number(r["rows_per_second"]),
    "MFU": lambda r: f"{r['mfu']:.1%}",
    "HFU": lambda r: f"{r['hfu']:.1%}",
    "peak GB": lambda r: gigabytes(r["ours"]["peak_bytes"]),
    "skipped": lambda r: r.get("skipped", ""),
}


@contextmanager
def _deterministic(device: str, wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if device == "cuda":
        torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _loosely(device: str, call: Callable[[], Any]) -> Any:
    """As it comes: without strict determinism."""
    with _deterministic(device, False):
        return call()


def _peak_flops(device: str) -> float | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def _free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
