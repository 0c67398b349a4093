"""What a GPU changes: step against sentence-transformers, largest batch, MFU, fused kernel against the plain loss.

Random weights of the sizes of all-MiniLM-L6-v2, bge-base and UAE-Large, a made-up tokenizer, texts as long as those of
the mixed data pack; bf16 on both sides. Needs neither Ray, MTEB, datasets nor any download. A case is skipped, and its
reason written down, where by what was measured before it would not end in time; what was measured is written after
every case.

    benchmarks/gpu.sh                                  at most 8 minutes on one H100 or H200
    python benchmarks/gpu.py --smoke                   everything at toy sizes on a CPU, about a minute
"""

import argparse
import inspect
import json
import math
import os
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Claim, gigabytes, interleave, number, parser, publish, ratio, say, seconds_of, spread, start
from loss_stage import embeddings
from sides import SHAPES, Ours, Setting, Theirs, load_rows, pair_batch, random_encoder

from gist_dist.config import LossConfig
from gist_dist.core.loss import gist_loss, row_blocks

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16, by what the device's name contains."""

PAIRS = (("minilm", "minilm"), ("bge-base", "bge-base"), ("minilm", "uae-large"))
"""Student and guide, in the order in which they are measured."""


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    flags.add_argument("--largest", type=int, default=262144, help="rows of the largest step tried")
    flags.add_argument("--kernel-sizes", type=int, nargs="+", default=[4096, 16384, 65536])
    flags.add_argument("--minutes", type=float, default=7.0, help="no case begins that would end later")
    flags.add_argument("--chunk-tokens", type=int, default=32768, help="ours")
    flags.add_argument("--activation-gb", type=float, default=20.0, help="ours")
    flags.add_argument("--mini-batch-sizes", type=int, nargs="+", default=[64, 256], help="theirs, the best of")
    flags.add_argument("--smoke", action="store_true")
    arguments = flags.parse_args()
    start(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # a quarter of a million rows are tokenized first
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = PAIRS
    if arguments.smoke:
        arguments.sizes, arguments.kernel_sizes, arguments.largest = [32, 64], [64, 128], 128
        arguments.mini_batch_sizes, arguments.chunk_tokens, arguments.repeats = [8, 16], 512, 2
        pairs = (("tiny", "tiny"),)
    elif arguments.device == "cpu":
        raise SystemExit("no GPU here; --smoke tries everything at toy sizes")
    Run(arguments).all(pairs)


class Run:
    """Results, and the time that is left for more."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.results, self.claims = arguments, [], []
        self.ends = time.monotonic() + 60 * arguments.minutes
        self.device = arguments.device

    def left(self) -> float:
        return self.ends - time.monotonic()

    def all(self, pairs: tuple[tuple[str, str], ...]) -> None:
        for n in self.arguments.kernel_sizes:
            self.kernel(n)
        rows, _ = load_rows("mixed", max(self.arguments.largest, *self.arguments.sizes))
        say(f"{len(rows):,} rows made; {self.left():.0f} s left")
        for number_of_pair, pair in enumerate(pairs):
            ours, setting = self.ours(pair, rows)
            say(f"{pair}: ready; {self.left():.0f} s left")
            self.steps(pair, ours, setting, with_theirs=number_of_pair < 2)
            if number_of_pair == 0:
                self.largest(pair, ours)
            del ours
            _free(self.device)

    def ours(self, pair: tuple[str, str], rows: list[dict[str, str]]) -> tuple[Ours, Setting]:
        folder = self.arguments.work / "models"
        student, guide = (random_encoder(folder / f"made-up-{shape}", SHAPES[shape]) for shape in pair)
        setting = Setting(
            student, guide, tuple(rows), self.arguments.work, max_tokens=256, precision="bf16", device=self.device
        )
        budgets = {"chunk_tokens": self.arguments.chunk_tokens, "activation_gb": self.arguments.activation_gb}
        return Ours(setting, **budgets), setting

    # ---- step against sentence-transformers ----

    def steps(self, pair: tuple[str, str], ours: Ours, setting: Setting, with_theirs: bool) -> None:
        theirs, reason = None, "left out: time goes to the other pairs"
        if with_theirs:
            theirs, reason = self.best_theirs(setting, ours), ""
        mine_before, theirs_before = [], []
        for n in self.arguments.sizes:
            result = {"case": "step", "student": pair[0], "guide": pair[1], "rows": n}
            mine = predict(mine_before, n)
            if mine > self.left():
                self.add(result | {"skipped": f"would take about {mine:.0f} s, {self.left():.0f} are left"})
                continue
            sides = {"ours": partial(ours.step, n)}
            expected = predict(theirs_before, n)
            if theirs and expected + 2 * mine <= min(self.left(), 0.4 * 60 * self.arguments.minutes):
                sides["theirs"] = partial(theirs.step, n)
            elif theirs:
                reason = f"theirs would take about {expected:.0f} s ({self.left():.0f} are left for everything)"
            try:
                samples = interleave(sides, self.arguments.repeats, 20, ["theirs"], device=self.device)
            except torch.OutOfMemoryError:
                _free(self.device)
                reason, sides = "theirs ran out of memory", {"ours": sides["ours"]}
                samples = interleave(sides, self.arguments.repeats, 20, device=self.device)
            result |= {name: taken.told() for name, taken in samples.items()} | self.efficiency(pair, ours, n, samples)
            mine_before.append((n, samples["ours"].median))
            if "theirs" in samples:
                theirs_before.append((n, samples["theirs"].median))
                result["ratio"] = ratio(samples["theirs"], samples["ours"])
                what = f"step, {pair[0]} guided by {pair[1]}, {n:,} rows, bf16: theirs ÷ ours"
                self.claims.append(Claim(what, result["ratio"]["median"]))
            else:
                result["theirs_skipped"] = reason
            self.add(result)

    def best_theirs(self, setting: Setting, ours: Ours) -> Theirs:
        """At the best of several mini_batch_size, on the smallest batch."""
        n, sizes = min(self.arguments.sizes), self.arguments.mini_batch_sizes
        theirs = Theirs(setting, ours, mini_batch_size=sizes[0])

        def step(mini_batch_size: int) -> None:
            theirs.loss.mini_batch_size = mini_batch_size
            theirs.step(n)

        samples = interleave({str(s): partial(step, s) for s in sizes}, repeats=1, device=self.device)
        theirs.loss.mini_batch_size = min(sizes, key=lambda size: samples[str(size)].median)
        say(f"theirs by mini_batch_size: { {name: taken.median for name, taken in samples.items()} }")
        return theirs

    def efficiency(self, pair: tuple[str, str], ours: Ours, n: int, samples: dict[str, Any]) -> dict[str, Any]:
        """Useful work only: a second encode and padding don't count."""
        plan, seconds = ours.plan(n), samples["ours"].median
        lengths = ours.corpus.student_lengths[plan.texts]
        student, guide = (SHAPES[shape].flops(lengths) for shape in pair)
        told = {"rows_per_second": n / seconds, "tokens_per_second": int(lengths.sum()) / seconds}
        told["padding"] = 1 - plan.num_tokens / plan.padded_tokens
        told["tflops"] = (3 * student + guide) / seconds / 1e12
        if peak := _peak_flops(self.device):
            told["mfu"] = 1e12 * told["tflops"] / peak
            if n == max(self.arguments.sizes):
                what = f"MFU of the step, {pair[0]} guided by {pair[1]}, {n:,} rows, bf16"
                self.claims.append(Claim(what, 100 * told["mfu"], unit=" %"))
        return told

    # ---- largest batch ----

    def largest(self, pair: tuple[str, str], ours: Ours) -> None:
        """Doubles the batch until memory, time or rows end."""
        done = [
            (r["rows"], r["ours"]["seconds"]["median"]) for r in self.results if "ours" in r and r["case"] == "step"
        ]
        n = max(self.arguments.sizes)
        while 2 * n <= self.arguments.largest:
            n *= 2
            result = {"case": "largest", "student": pair[0], "guide": pair[1], "rows": n}
            if predict(done, n) > 0.35 * self.left():
                self.add(result | {"skipped": f"would take about {predict(done, n):.0f} s"})
                return
            try:
                taken = interleave({"ours": partial(ours.step, n)}, 1, cold=["ours"], device=self.device)["ours"]
            except torch.OutOfMemoryError:
                _free(self.device)
                self.add(result | {"skipped": "out of memory"})
                return
            done.append((n, taken.median))
            self.add(result | {"ours": taken.told(), "rows_per_second": n / taken.median})
        self.claims.append(Claim("largest step tried on one GPU", done[-1][0], unit=" rows"))

    # ---- the loss stage: fused kernel against the plain path ----

    def kernel(self, n: int) -> None:
        student, guide = (e.to(self.device) for e in embeddings(n, 384))
        # Rounded, so that equal similarities of the guide don't depend on precision more than they do in training.
        guide = guide.half().float()
        batch, config = pair_batch(n).to(torch.device(self.device)), LossConfig()

        def loss(kernel: bool, dtype: torch.dtype = torch.float32) -> Any:
            # Loss memory enough for blocks that keep a GPU busy.
            blocks = row_blocks(batch, config, 2e9)
            option = {"kernel": kernel} if has_kernel() else {}
            return gist_loss(student.to(dtype), guide.to(dtype), batch, blocks, config, **option)

        result: dict[str, Any] = {"case": "loss stage", "rows": n}
        sides = {"plain": partial(loss, False)}
        if has_kernel() and self.device == "cuda":
            sides["kernel"] = partial(loss, True)
        else:
            result["kernel_skipped"] = "no CUDA device" if has_kernel() else "this gist_dist has no fused kernel"
        samples = interleave(sides, self.arguments.repeats, 10, device=self.device)
        result |= {name: taken.told() for name, taken in samples.items()}
        result["errors"] = errors = {}
        if n == min(self.arguments.kernel_sizes):
            exact = loss(False, torch.float64)
            scale = exact.gradient.abs().max()
            for name, side in sides.items():
                share = side()
                errors[name] = {
                    "loss": (share.loss - exact.loss).abs().item() / exact.loss.item(),
                    "gradient": ((share.gradient - exact.gradient).abs().max() / scale).item(),
                    "masked": sum(float(v - exact.counts[k]) for k, v in share.counts.items() if "masked" in k),
                }
        if "kernel" in samples:
            result["ratio"] = ratio(samples["plain"], samples["kernel"])
            self.claims.append(Claim(f"loss stage, {n:,} rows: plain ÷ kernel", result["ratio"]["median"]))
            if errors:
                worse = errors["kernel"]["gradient"] / max(errors["plain"]["gradient"], 1e-7)
                self.claims.append(Claim("kernel's gradient error ÷ the plain path's, against fp64", worse, at_most=10))
        self.add(result)
        _free(self.device)

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        say(f"{self.left():4.0f} s left  {json.dumps({k: v for k, v in result.items() if not isinstance(v, dict)})}"
            f" {seconds_of(result)}")  # fmt: skip
        document = {
            "question": "On one GPU: how fast is a step, how large can a batch be, and what is the fused kernel worth?",
            "control": "sentence-transformers' CachedGISTEmbedLoss in bf16 on the same token ids; the plain loss",
            "settings": {k: v for k, v in vars(self.arguments).items() if isinstance(v, int | float | str | list)},
            "results": self.results,
        }
        publish(
            "gpu-smoke" if self.arguments.smoke else "gpu", document, COLUMNS, self.claims, self.draw,
            self.arguments.results, quiet=True,
        )  # fmt: skip

    def draw(self, axes: Any) -> None:
        for shapes in dict.fromkeys((r["student"], r["guide"]) for r in self.results if r["case"] == "step"):
            for side in ("ours", "theirs"):
                drawn = [r for r in self.results if side in r and (r.get("student"), r.get("guide")) == shapes]
                times = [r["rows"] / r[side]["seconds"]["median"] for r in drawn]
                axes.plot([r["rows"] for r in drawn], times, marker="o", label=f"{side}, {' guided by '.join(shapes)}")
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="rows of the batch", ylabel="rows/s", title="step, bf16")


COLUMNS = {
    "case": "case",
    "student": lambda r: r["student"],
    "guide": lambda r: r["guide"],
    "rows": lambda r: f"{r['rows']:,}",
    "ours (or plain) s": lambda r: spread((r.get("ours") or r["plain"])["seconds"]),
    "theirs (or kernel) s": lambda r: spread((r.get("theirs") or r["kernel"])["seconds"]),
    "ratio": lambda r: spread(r["ratio"], "×"),
    "rows/s": lambda r: number(r["rows_per_second"]),
    "TFLOP/s": lambda r: number(r["tflops"]),
    "MFU": lambda r: f"{r['mfu']:.1%}",
    "peak GB": lambda r: gigabytes((r.get("ours") or r["plain"])["peak_bytes"]),
    "skipped": lambda r: r.get("skipped") or r.get("theirs_skipped") or r.get("kernel_skipped") or "",
}


def predict(measured: list[tuple[int, float]], n: int) -> float:
    """Seconds at n rows, on the safe side: as if all of the largest measured step grew with the square of the batch, or
    as fast as it last did. 0 where nothing was measured yet."""
    if not measured:
        return 0.0
    rows, seconds = measured[-1]
    power = 2.0
    if len(measured) > 1:
        before, faster = measured[-2]
        power = min(2.0, max(1.0, math.log(seconds / faster) / math.log(rows / before) + 0.3))
    return seconds * (n / rows) ** power


def has_kernel() -> bool:
    return "kernel" in inspect.signature(gist_loss).parameters


def _peak_flops(device: str) -> float | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def _free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
