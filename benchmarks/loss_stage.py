"""How fast is the loss stage (embeddings in, loss and their gradient out), and how much memory does it take?

Ours against the code of sentence-transformers' CachedGISTEmbedLoss, which is called on ready embeddings as its forward
calls it. Random unit vectors of width 384, a guide of the same width, four blocks but no hard negatives, fp32. Theirs
takes 86 s at N = 1024 on 2 cores; it is left out above --their-largest. Ours goes on, and at --memory-at rows runs in a
process of its own whose memory above the embeddings is what counts.

    python benchmarks/loss_stage.py                                               about 15 minutes on 2 cores
    python benchmarks/loss_stage.py --sizes 256 512 4096 --memory-at 16384        about 1 minute
"""

import argparse
import json
import subprocess
import sys
from functools import partial

import torch
from harness import (
    Claim,
    Samples,
    gigabytes,
    interleave,
    measured_memory,
    parser,
    publish,
    ratio,
    say,
    seconds_of,
    spread,
    start,
    timed,
)
from sides import SHAPES, pair_batch, random_encoder, their_loss

from gist_dist.config import BatchConfig, LossConfig
from gist_dist.core.candidates import row_blocks
from gist_dist.core.collectives import World
from gist_dist.core.loss import gist_loss


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 4096, 16384])
    flags.add_argument("--their-largest", type=int, default=1024)
    flags.add_argument("--memory-at", type=int, default=65536, help="0: leave it out")
    flags.add_argument("--width", type=int, default=384)
    flags.add_argument("--mini-batch-sizes", type=int, nargs="+", default=[32, 64, 128], help="theirs, the best of")
    flags.add_argument("--only-memory", type=int, help="measure memory at so many rows here, and print JSON")
    arguments = flags.parse_args()
    start(arguments)
    if arguments.only_memory:
        print(json.dumps(memory(arguments.only_memory, arguments.width)))
        return
    losses = their_losses(arguments)
    by_size = best_of(losses, arguments)
    loss = losses[min(by_size, key=by_size.get)]
    results, claims = [], []
    for n in arguments.sizes:
        results.append(measure(n, loss, arguments))
        say(f"{n:,} rows: {', '.join(f'{side} {told}' for side, told in seconds_of(results[-1]).items())}")
        if "ratio" in results[-1]:
            claim = f"loss stage, {n:,} rows: sentence-transformers ÷ ours"
            claims.append(Claim(claim, results[-1]["ratio"]["median"], at_least=200 if n == 1024 else None))
    if arguments.memory_at:
        command = [sys.executable, __file__, "--only-memory", str(arguments.memory_at), "--width", str(arguments.width)]
        command += ["--threads", str(arguments.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        above = results[-1]["above_embeddings_bytes"] / 1e9
        what = f"loss stage, {arguments.memory_at:,} rows: memory above the embeddings"
        claims.append(Claim(what, above, at_most=2, unit=" GB"))
    document = {
        "question": "How long does the loss stage take, and how much memory, as the global batch grows?",
        "control": "CachedGISTEmbedLoss.calculate_loss_and_cache_gradients of sentence-transformers, same embeddings",
        "settings": {"width": arguments.width, "precision": "fp32", "their_seconds_by_mini_batch_size": by_size},
        "results": results,
    }
    columns = {
        "rows": lambda r: f"{r['rows']:,}",
        "ours s": lambda r: spread(r["ours"]["seconds"]),
        "theirs s": lambda r: spread(r["theirs"]["seconds"]),
        "theirs ÷ ours": lambda r: spread(r["ratio"], "×"),
        "ours adds GB": lambda r: gigabytes(r["ours"]["added_bytes"]),
        "theirs adds GB": lambda r: gigabytes(r["theirs"]["added_bytes"]),
        "same loss to": lambda r: f"{r['loss_difference']:.0e}",
    }
    publish("loss_stage", document, columns, claims, lambda axes: draw(axes, results), arguments.results)


def embeddings(n: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 2n texts, student's and guide's: positives near their anchors, so that the guide has something to tell."""
    generator = torch.Generator().manual_seed(n)

    def near(spread: float) -> torch.Tensor:
        anchors = torch.randn(n, width, generator=generator)
        positives = anchors + spread * torch.randn(n, width, generator=generator)
        return torch.nn.functional.normalize(torch.cat([anchors, positives]), dim=-1)

    return near(2.0), near(6.0)


def our_stage(student: torch.Tensor, guide: torch.Tensor) -> tuple[float, torch.Tensor]:
    batch, config = pair_batch(len(student) // 2), LossConfig()
    share = gist_loss(student, guide, batch, row_blocks(batch, config, BatchConfig().loss_gb * 1e9), config)
    return share.loss.item(), share.gradient


def their_stage(loss: torch.nn.Module, student: torch.Tensor, guide: torch.Tensor) -> tuple[float, torch.Tensor]:
    columns = [[list(c.split(loss.mini_batch_size)) for c in side.split(len(side) // 2)] for side in (student, guide)]
    reps = [[part.detach().requires_grad_() for part in column] for column in columns[0]]
    value, gradients = loss.calculate_loss_and_cache_gradients(reps, columns[1])
    return value.item(), torch.cat([part for column in gradients for part in column])


def their_losses(arguments: argparse.Namespace) -> dict[int, torch.nn.Module]:
    """By mini_batch_size. The models inside are made up: this stage doesn't call them."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(random_encoder(arguments.work / "models" / "made-up-tiny", SHAPES["tiny"])))
    return {size: their_loss(model, model, LossConfig().temperature, 0.0, size) for size in arguments.mini_batch_sizes}


def best_of(losses: dict[int, torch.nn.Module], arguments: argparse.Namespace) -> dict[int, float]:
    """Seconds of their stage by mini_batch_size, at the smallest batch."""
    given = embeddings(min(arguments.sizes), arguments.width)
    sides = {str(size): partial(their_stage, loss, *given) for size, loss in losses.items()}
    return {int(size): taken.median for size, taken in interleave(sides, repeats=3).items()}


def measure(n: int, loss: torch.nn.Module, arguments: argparse.Namespace) -> dict:
    student, guide = embeddings(n, arguments.width)
    values: dict[str, tuple[float, torch.Tensor]] = {}

    def ours() -> None:
        values["ours"] = our_stage(student, guide)

    def theirs() -> None:
        values["theirs"] = their_stage(loss, student, guide)

    sides = {"ours": ours} | ({"theirs": theirs} if n <= arguments.their_largest else {})
    cold = ["theirs"] if n > min(arguments.sizes) else []
    samples = interleave(sides, arguments.repeats, arguments.budget, cold)
    result = {"rows": n, **{name: taken.told() for name, taken in samples.items()}}
    if "theirs" in samples:
        (mine, my_gradient), (other, other_gradient) = values["ours"], values["theirs"]
        # Theirs normalizes within the loss, which takes out the part along the embedding; ours leaves that to encoders.
        my_gradient = my_gradient - (my_gradient * student).sum(dim=1, keepdim=True) * student
        scale = other_gradient.abs().max().item()
        result |= {
            "ratio": ratio(samples["theirs"], samples["ours"]),
            "loss": mine,
            "loss_difference": abs(mine - other) / other,
            "gradient_difference": (my_gradient - other_gradient).abs().max().item() / scale,
        }
        assert result["loss_difference"] < 1e-3 and result["gradient_difference"] < 1e-2, result
    return result


def memory(n: int, width: int) -> dict:
    """Of one call, above the embeddings of student and guide, which it is given."""
    our_stage(*embeddings(64, width))
    samples, device = Samples(), torch.device("cpu")
    student, guide = embeddings(n, width)
    with measured_memory(samples, device):
        samples.seconds.append(timed(lambda: our_stage(student, guide), World(), device))
    given = student.nbytes + guide.nbytes
    return {
        "rows": n,
        "ours": samples.told(),
        "embeddings_bytes": given,
        "above_embeddings_bytes": samples.added_bytes,
    }


def draw(axes, results: list[dict]) -> None:
    for side, label in (("ours", "gist_dist"), ("theirs", "sentence-transformers")):
        points = [(r["rows"], r[side]["seconds"]["median"]) for r in results if side in r]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(yscale="log", xlabel="rows of the batch", ylabel="seconds", title="loss stage")
    axes.set_xscale("log", base=2)


if __name__ == "__main__":
    main()
