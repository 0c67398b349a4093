"""How much of a step is anything but the encoders' own work?

1. The step against its encoder work alone. What the step asked its encoders for is recorded: every chunk's number of
   texts and of real tokens, and whether with a graph. The ceiling does the same with the same numbers of texts and
   tokens, but all texts of a chunk equally long, so that nothing is padded, and nothing else around: no planning, token
   ids, loss, gradients of embeddings, fp64 sums or optimizer.
2. The step with an activation budget that holds the whole batch against plain uncached training of it: the same chunks
   encoded with graphs, the loss from full similarity matrices by autograd, backward, clipping, optimizer.
3. Padding of the plans, which takes no time to know.

    python benchmarks/ceiling.py                                     about 25 minutes on 2 cores
    python benchmarks/ceiling.py --data short --rows 128 --plain-rows 64 --repeats 3   about 2 minutes
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Claim, interleave, model_flags, parser, publish, ratio, say, seconds_of, spread, start
from sides import DATA, Encoded, Ours, Setting, setting_of
from torch import Tensor, nn

from gist_dist.core.optim import clip_gradients


def main() -> None:
    flags = parser(__doc__)
    model_flags(flags)
    flags.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    flags.add_argument("--rows", type=int, default=512, help="of the step against its encoder work")
    flags.add_argument("--plain-rows", type=int, default=128, help="of the step against uncached training")
    flags.add_argument("--padding-rows", type=int, nargs="+", default=[1024, 4096])
    flags.add_argument("--activation-gb", type=float, default=1.0, help="of the step against its encoder work")
    arguments = flags.parse_args()
    start(arguments)
    results, claims = [], []
    for data in arguments.data:
        most = max(arguments.rows, arguments.plain_rows, *arguments.padding_rows)
        setting, _ = setting_of(arguments, data, most)
        results.append({"data": data, **measure(setting, arguments)})
        result = results[-1]
        say(f"{data}: {seconds_of(result)}")
        what = f"encoder work on packed tokens ÷ step, {data}, {arguments.rows:,} rows"
        claims.append(Claim(what, result["packed_ratio"]["median"], at_least=0.85, unit=""))
        what = f"step that keeps all graphs ÷ plain uncached training, {data}, {arguments.plain_rows:,} rows"
        claims.append(Claim(what, result["plain_ratio"]["median"], at_most=1.05))
        for n, share in result["padding"].items():
            claims.append(Claim(f"padding, {data}, {n:,} rows", 100 * share, at_most=5, unit=" %"))
    document = {
        "question": "Which part of a step is not its encoders' own work, and does gradient caching cost anything?",
        "control": "the encoders' work on equally many texts and tokens without padding; plain uncached training",
        "settings": {"student": arguments.student, "guide": arguments.guide, "activation_gb": arguments.activation_gb},
        "results": results,
    }
    columns = {
        "data": "data",
        "step s": lambda r: spread(r["step"]["seconds"]),
        "packed encoders s": lambda r: spread(r["packed"]["seconds"]),
        "packed ÷ step": lambda r: spread(r["packed_ratio"]),
        "all graphs kept s": lambda r: spread(r["kept"]["seconds"]),
        "plain training s": lambda r: spread(r["plain"]["seconds"]),
        "kept ÷ plain": lambda r: spread(r["plain_ratio"]),
        "padding": lambda r: ", ".join(f"{n:,} rows {share:.1%}" for n, share in r["padding"].items()),
    }
    publish("ceiling", document, columns, claims, lambda axes: draw(axes, results), arguments.results)


def measure(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    ours = Ours(setting, activation_gb=arguments.activation_gb)
    _, learned = ours.recorded(arguments.rows)  # the first step learns what a token's activations cost
    step, calls = ours.recorded(arguments.rows)
    packed = Packed(ours, calls)
    samples = interleave(
        {"step": partial(ours.step, arguments.rows), "packed": packed.run}, arguments.repeats, arguments.budget
    )
    del learned, packed
    kept = Ours(setting, activation_gb=1e6)
    again = [call for call in kept.recorded(arguments.plain_rows)[1] if call.encoder == "student"]
    assert all(call.with_graph for call in again), "the budget does not hold the batch"
    sides = {"kept": partial(kept.step, arguments.plain_rows), "plain": partial(plain_step, kept, arguments.plain_rows)}
    losses = sides["kept"]().loss, sides["plain"]()  # from neighbouring steps: equal but for one update and dropout
    samples |= interleave(sides, arguments.repeats, arguments.budget)
    plans = {n: ours.plan(n) for n in arguments.padding_rows}
    return {
        **{name: taken.told() for name, taken in samples.items()},
        "packed_ratio": ratio(samples["packed"], samples["step"]),
        "plain_ratio": ratio(samples["kept"], samples["plain"]),
        "losses": losses,
        "phases": step.seconds,
        "second_encodes": sum(c.encoder == "student" and not c.with_graph for c in calls),
        "chunks": sum(c.encoder == "student" and c.with_graph for c in calls),
        "padding": {n: 1 - plan.num_tokens / plan.padded_tokens for n, plan in plans.items()},
    }


class Packed:
    """The encoder work of a step on perfectly packed tokens."""

    def __init__(self, ours: Ours, calls: list[Encoded]) -> None:
        self.ours = ours
        self.work = [(call, *self._features(call)) for call in calls]
        wanted = sum(call.num_tokens for call in calls)
        done = sum(features["input_ids"].numel() for _, features, _ in self.work)
        assert abs(done - wanted) <= 0.02 * wanted, (done, wanted)

    def run(self) -> None:
        student, guide = self.ours.student, self.ours.guide
        for call, features, gradient in self.work:
            encoder = student if call.encoder == "student" else guide
            with torch.set_grad_enabled(call.with_graph):
                bf16 = encoder.config.precision == "bf16"
                with torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16):
                    embeddings = encoder.model(dict(features))["sentence_embedding"]
            if call.with_graph:
                embeddings.backward(gradient.to(embeddings.dtype))
        self.ours.student.model.zero_grad(set_to_none=True)

    def _features(self, call: Encoded) -> tuple[dict[str, Tensor], Tensor]:
        """As many tokens as the chunk had, in texts of its mean length."""
        encoder = self.ours.student if call.encoder == "student" else self.ours.guide
        length = round(call.num_tokens / call.num_texts)
        shape = round(call.num_tokens / length), length
        ids = torch.from_numpy(np.random.default_rng(length).integers(1000, len(encoder.model.tokenizer), shape))
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in encoder.model.tokenizer.model_input_names:
            features["token_type_ids"] = torch.zeros_like(ids)
        gradient = torch.full((shape[0], encoder.width), 1e-3, device=encoder.device)
        return {name: tensor.to(encoder.device) for name, tensor in features.items()}, gradient


def plain_step(ours: Ours, n: int) -> float:
    """What training without gradient caching does, on the chunks of our plan; the loss."""
    with dense_gradients(ours.student.model):
        return _plain_step(ours, n)


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[None]:
    """Of token tables too, as everybody else trains."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.sparse]
    for table in tables:
        table.sparse = False
    yield
    for table in tables:
        table.sparse = True


def _plain_step(ours: Ours, n: int) -> float:
    plan, tau = ours.plan(n), ours.config.loss.temperature
    student = [ours.student.embed(ours.corpus.student_tokens(plan.texts[c.texts])) for c in plan.student_chunks]
    order = np.argsort(np.concatenate([c.texts for c in plan.student_chunks]))
    guide_chunks, guide_order = ours.guide_inputs(plan)
    guide = [ours.guide.encode(ours.corpus.guide_tokens(texts)) for texts in guide_chunks]
    s, g = torch.cat(student)[torch.from_numpy(order)], torch.cat(guide)[torch.from_numpy(guide_order)]
    anchors, positives = torch.from_numpy(plan.anchors), torch.from_numpy(plan.positives)
    threshold = (g[anchors] * g[positives]).sum(dim=1, keepdim=True)
    own, blocks = torch.eye(n, dtype=torch.bool, device=s.device), []
    for queries, candidates in ((anchors, positives), (anchors, anchors), (positives, positives)):
        masked = g[queries] @ g[candidates].T > threshold
        masked = masked & ~own if candidates is positives and queries is anchors else masked | own
        blocks.append((s[queries] @ s[candidates].T).masked_fill(masked, -torch.inf))
    loss = torch.nn.functional.cross_entropy(torch.cat(blocks, dim=1) / tau, torch.arange(n, device=s.device))
    loss.backward()
    clip_gradients(ours.student.parameters(), ours.config.optim.max_grad_norm)
    ours.train_state.optimizer.step()
    ours.train_state.optimizer.zero_grad(set_to_none=True)
    return loss.item()


def draw(axes: Any, results: list[dict[str, Any]]) -> None:
    for place, (low, high, label) in enumerate(
        (("packed", "step", "packed ÷ step"), ("plain", "kept", "plain ÷ kept"))
    ):
        heights = [r[low]["seconds"]["median"] / r[high]["seconds"]["median"] for r in results]
        axes.bar([x + 0.35 * (place - 0.5) for x in range(len(results))], heights, 0.33, label=label)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xticks(range(len(results)), [r["data"] for r in results])
    axes.set(ylabel="share of the step", title="what is not overhead")


if __name__ == "__main__":
    main()
