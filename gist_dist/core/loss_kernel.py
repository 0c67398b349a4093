"""The loss of loss.py as Triton kernels: of the rows × candidates scores only one bit each is ever in memory.

Forward: tiles of student and guide scores are computed together, identical texts and false negatives leave them, and
each row keeps a running log-sum-exp; what stays is written as bits. Backward: scores are computed again and, weighted
by softmax, collected once by the tiles that own query rows and once by those that own candidates. Nothing is added
atomically, so that results repeat bit for bit. The order of candidates decides every row's loss and mask whoever scores
it; gradients of candidates sum over the rows of a worker in fp32 within a tile and fp64 beyond, so they are equal
between numbers of workers to fp32 rounding.

Products are fp32, and follow torch.set_float32_matmul_precision where that asks for less: high is three TF32 products,
medium one. Embeddings of the guide in fp16 go to the tensor cores as they are, exactly.
"""

# Axes:  s rows of one span   c candidates of one part   w words of 32 bits   k pieces of the candidates
#        t all texts of the tables: positives, negatives, anchors   u unique texts   d student width   e guide width

from collections.abc import Iterable
from dataclasses import dataclass
from typing import no_type_check  # jaxtyping's import hook would wrap what Triton compiles

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from gist_dist.config import LossConfig
from gist_dist.core.candidates import BatchIndex, LossShare, guide_threshold

BITS_BYTES = 2**28
"""Rows are scored in spans whose bits, kept between forward and backward, take no more."""
PIECE = 512
"""Candidates of one running log-sum-exp; fp64 joins the pieces."""
PROGRAMS = 512
"""Enough for any GPU: where fewer tiles own gradients, several programs share the work of one."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the pieces that one program works on; powers of 2."""

    rows: int = 64
    candidates: int = 64
    step: int = 16
    """Piece of the embeddings' width."""
    owners: int = 64
    """Texts whose gradients a program collects."""
    others: int = 32
    """Texts that it collects them from, at a time."""
    gradient_step: int = 64
    """Piece of the width in which gradients are collected."""


# Chosen by what the compiler says of registers on sm_80 and sm_90 (nothing of note is spilled), not by timing.
TILES = {"ieee": Tiles(), "tf32x3": Tiles(others=64), "tf32": Tiles(others=64)}
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
@no_type_check
def _products(left, left_texts, right, right_texts, width, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """The product of every text of one tile with every text of the other, in fp32."""
    products = tl.zeros((left_texts.shape[0], right_texts.shape[0]), tl.float32)
    for start in range(0, width, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        left_tile = tl.load(left + left_texts[:, None] * width + column, mask=column < width, other=0.0)
        right_tile = tl.load(right + right_texts[:, None] * width + column, mask=column < width, other=0.0)
        products = tl.dot(left_tile, tl.trans(right_tile), products, input_precision=PRECISION)
    return products


@triton.jit
@no_type_check
def _own_scores(
    table, queries, candidates, scores, num_rows, width,
    ROWS: tl.constexpr, CANDIDATES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of queries with the candidates of the same number, by the same product as all others: equal texts tie."""
    first = tl.program_id(0) * ROWS
    row, candidate = first + tl.arange(0, ROWS), first + tl.arange(0, CANDIDATES)
    query_texts = tl.load(queries + row, mask=row < num_rows, other=0)
    candidate_texts = tl.load(candidates + candidate, mask=candidate < num_rows, other=0)
    products = _products(table, query_texts, table, candidate_texts, width, STEP, PRECISION)
    own = tl.sum(tl.where(row[:, None] == candidate[None, :], products, 0.0), 1)
    tl.store(scores + row, own, mask=row < num_rows)


@triton.jit
@no_type_check
def _forward(
    student, guide, queries, candidates, anchor_identity, positive_identity, candidate_identity, thresholds,
    bits, log_sums, num_identical, num_masked,
    num_rows, num_candidates, num_words, student_width, guide_width, inverse_temperature,
    GUIDED: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows against one piece of a part's candidates."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    query_texts = tl.load(queries + row, mask=in_rows, other=0)
    anchor = tl.load(anchor_identity + row, mask=in_rows, other=0)
    positive = tl.load(positive_identity + row, mask=in_rows, other=0)
    if GUIDED:
        threshold = tl.load(thresholds + row, mask=in_rows, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    identical_count = tl.zeros((ROWS,), tl.int32)
    masked_count = tl.zeros((ROWS,), tl.int32)
    first = tl.program_id(1) * PIECE
    for start in range(first, tl.minimum(first + PIECE, num_candidates), CANDIDATES):
        candidate = start + tl.arange(0, CANDIDATES)
        in_candidates = candidate < num_candidates
        texts = tl.load(candidates + candidate, mask=in_candidates, other=0)
        identity = tl.load(candidate_identity + candidate, mask=in_candidates, other=0)
        scores = _products(student, query_texts, student, texts, student_width, STEP, PRECISION)
        considered = in_rows[:, None] & in_candidates[None, :]
        identical = (identity[None, :] == anchor[:, None]) | (identity[None, :] == positive[:, None])
        identical_count += tl.sum((considered & identical).to(tl.int32), 1)
        kept = considered & (identical == 0)
        if GUIDED:
            guide_scores = _products(guide, query_texts, guide, texts, guide_width, STEP, PRECISION)
            closer = guide_scores > threshold[:, None]
            masked_count += tl.sum((kept & closer).to(tl.int32), 1)
            kept = kept & (closer == 0)
        scores = tl.where(kept, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total *= tl.exp((largest - shift) * inverse_temperature)
        total += tl.sum(tl.exp((scores - shift[:, None]) * inverse_temperature), 1)
        largest = new_largest
        # A tile's bits of 32 candidates in one word; those beyond the last candidate are 0.
        places = tl.reshape(kept.to(tl.int32), (ROWS, CANDIDATES // 32, 32)) << tl.arange(0, 32)[None, None, :]
        word = start // 32 + tl.arange(0, CANDIDATES // 32)
        at = bits + row.to(tl.int64)[:, None] * num_words + word[None, :]
        tl.store(at, tl.sum(places, 2), mask=in_rows[:, None] & (word < num_words)[None, :])
    at = tl.program_id(1).to(tl.int64) * num_rows + row
    log_sum = largest.to(tl.float64) * inverse_temperature + tl.log(total).to(tl.float64)
    tl.store(log_sums + at, log_sum, mask=in_rows)
    tl.store(num_identical + at, identical_count, mask=in_rows)
    tl.store(num_masked + at, masked_count, mask=in_rows)


@triton.jit
@no_type_check
def _gradients(
    student, owners, others, bits, shifts, scales, gradients,
    num_owners, num_others, others_per_program, num_words, width, inverse_temperature,
    QUERIES_OWN: tl.constexpr, OWNERS: tl.constexpr, OTHERS: tl.constexpr, STEP: tl.constexpr,
    GRADIENT_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds Σ softmax · other to the gradients of a tile of owners: query rows, or candidates."""
    owner = tl.program_id(0) * OWNERS + tl.arange(0, OWNERS)
    in_owners = owner < num_owners
    owner_texts = tl.load(owners + owner, mask=in_owners, other=0)
    owner_gradients = gradients + (tl.program_id(1).to(tl.int64) * num_owners + owner)[:, None] * width
    first = tl.program_id(1) * others_per_program
    for start in range(first, tl.minimum(first + others_per_program, num_others), OTHERS):
        other = start + tl.arange(0, OTHERS)
        in_others = other < num_others
        other_texts = tl.load(others + other, mask=in_others, other=0)
        scores = _products(student, owner_texts, student, other_texts, width, STEP, PRECISION)
        if QUERIES_OWN:
            row, candidate = owner[:, None], other[None, :]
            shift = tl.load(shifts + owner, mask=in_owners, other=0.0)[:, None]
            scale = tl.load(scales + owner, mask=in_owners, other=0.0)[:, None]
        else:
            row, candidate = other[None, :], owner[:, None]
            shift = tl.load(shifts + other, mask=in_others, other=0.0)[None, :]
            scale = tl.load(scales + other, mask=in_others, other=0.0)[None, :]
        considered = in_owners[:, None] & in_others[None, :]
        words = tl.load(bits + row.to(tl.int64) * num_words + candidate // 32, mask=considered, other=0)
        kept = (words >> (candidate % 32)) & 1
        softmax = tl.where(kept == 1, tl.exp((scores - shift) * inverse_temperature) * scale, 0.0)
        for width_start in range(0, width, GRADIENT_STEP):
            column = width_start + tl.arange(0, GRADIENT_STEP)[None, :]
            texts = tl.load(student + other_texts[:, None] * width + column, mask=column < width, other=0.0)
            added = tl.dot(softmax, texts, input_precision=PRECISION)
            mine = in_owners[:, None] & (column < width)
            so_far = tl.load(owner_gradients + column, mask=mine, other=0.0)
            tl.store(owner_gradients + column, so_far + added.to(tl.float64), mask=mine)
        tl.debug_barrier()  # the next tile reads what this one wrote, maybe in other threads


def fused_share(
    student: Float[Tensor, "u d"],
    guide: Float[Tensor, "u e"] | None,
    batch: BatchIndex,
    blocks: Iterable[range],
    config: LossConfig,
) -> LossShare:
    """What loss.gist_loss returns, for fp32 embeddings of the student."""
    assert student.dtype == torch.float32, "the kernels compute in fp32"
    _refuse_other_rules(batch, config)
    with torch.cuda.device_of(student):
        scorer = _FusedScorer(student, guide, batch, config)
        rows = [torch.arange(block.start, block.stop, device=student.device) for block in blocks]
        for span in torch.cat(rows).split(scorer.rows_per_span) if rows else ():
            scorer.add(span)
        return scorer.share()


def _refuse_other_rules(batch: BatchIndex, config: LossConfig) -> None:
    """ValueError for the rules that only the plain path knows."""
    plain = LossConfig()
    rules = [
        rule
        for rule in ("in_batch", "negatives", "guard_negatives", "false_negatives")
        if getattr(config, rule) != getattr(plain, rule)
    ]
    has = {
        "known positives": batch.known_rows, "several positives": batch.more_positives, "groups": batch.groups,
        "a loss for each source": batch.sections or None,
    }  # fmt: skip
    if rules := rules + [name for name, value in has.items() if value is not None]:
        raise ValueError(f"the fused kernel does not offer {', '.join(rules)}; leave kernel=True out")


class _FusedScorer:
    """What the spans have added up to so far; gradients still lack the factor 1 / (τ g)."""

    def __init__(self, student: Tensor, guide: Tensor | None, batch: BatchIndex, config: LossConfig) -> None:
        self.student, self.batch, self.config = student.detach().contiguous(), batch, config
        self.guide = None if guide is None else guide.contiguous()
        self.parts = batch.parts(config)
        self.inverse_temperature = torch.tensor(1 / config.temperature, dtype=torch.float32).item()  # the kernels'
        self.precision = PRECISIONS[torch.get_float32_matmul_precision()]
        self.tiles = TILES[self.precision]
        self.texts = {"anchor": batch.anchors, "positive": batch.positives, "negative": batch.negatives}
        width = student.shape[1]
        self.gradients = {r: student.new_zeros(len(t), width, dtype=torch.float64) for r, t in self.texts.items()}
        num_words = sum(-(-len(candidates) // 32) for _, candidates in self.parts.values())
        self.rows_per_span = max(self.tiles.rows, BITS_BYTES // (4 * num_words) // self.tiles.rows * self.tiles.rows)
        self.loss = student.new_zeros((), dtype=torch.float64)
        names = [f"{count}_{part}" for count in ("candidates", "masked") for part in self.parts]
        # What the rules weigh is counted by the plain path only.
        names += ["identical_dropped", "rows_without_negatives", "positive_similarity", "guide_positive_similarity"]
        self.counts = {name: student.new_zeros((), dtype=torch.float64) for name in names}

    def add(self, rows: Int[Tensor, "s"]) -> None:
        similarity = self._own_scores(self.student, rows)
        thresholds = None
        if self.guide is not None:
            guide_positive = self._own_scores(self.guide, rows)
            self.counts["guide_positive_similarity"] += guide_positive.double().sum()
            thresholds = guide_threshold(guide_positive, self.config)
        bits, pieces = {}, []
        for part in self.parts:
            bits[part], log_sums = self._forward(part, rows, thresholds)
            pieces.append(log_sums)
        negatives = torch.cat(pieces).logsumexp(dim=0)
        own = similarity.double() * self.inverse_temperature
        excess = negatives - own  # log of the negatives' weight against the positive's
        softplus = torch.logaddexp(excess, torch.zeros_like(excess))
        self.loss += softplus.sum() / self.batch.num_rows
        self.counts["rows_without_negatives"] += (negatives == -torch.inf).sum()
        self.counts["positive_similarity"] += similarity.double().sum()
        pull = excess.sigmoid().unsqueeze(1)
        for role, target in (("anchor", "positive"), ("positive", "anchor")):
            self.gradients[role][rows] -= pull * self.student[self.texts[target][rows]]
        log_sums = own + softplus
        shifts = (log_sums / self.inverse_temperature).float()  # as a similarity
        scales = (shifts.double() * self.inverse_temperature - log_sums).exp().float()  # what rounding took off
        for part in self.parts:
            self._add_gradients(part, rows, bits[part], (shifts, scales))

    def _own_scores(self, table: Float[Tensor, "u _"], rows: Int[Tensor, "s"]) -> Float[Tensor, "s"]:
        scores, tiles = self.student.new_empty(len(rows)), self.tiles
        _own_scores[(triton.cdiv(len(rows), tiles.rows),)](
            table, self.batch.anchors[rows], self.batch.positives[rows], scores, len(rows), table.shape[1],
            ROWS=tiles.rows, CANDIDATES=tiles.candidates, STEP=tiles.step, PRECISION=self.precision,
            **OPTIONS,
        )  # fmt: skip
        return scores

    def _forward(
        self, part: str, rows: Int[Tensor, "s"], thresholds: Float[Tensor, "s"] | None
    ) -> tuple[Int[Tensor, "s w"], Float[Tensor, "k s"]]:
        """Which candidates stay, and the log-sum-exp of their scores / τ by piece."""
        queries, candidates = self.parts[part]
        identity, tiles, num_candidates = self.batch.identity, self.tiles, len(candidates)
        pieces, num_words = triton.cdiv(num_candidates, PIECE), triton.cdiv(num_candidates, 32)
        bits = torch.empty(len(rows), num_words, dtype=torch.int32, device=rows.device)
        log_sums = self.student.new_empty(pieces, len(rows), dtype=torch.float64)
        identical, masked = (torch.empty_like(log_sums, dtype=torch.int32) for _ in range(2))
        guide, thresholds = (self.student, self.student) if self.guide is None else (self.guide, thresholds)
        _forward[(triton.cdiv(len(rows), tiles.rows), pieces)](
            self.student, guide, queries[rows], candidates, identity[self.batch.anchors[rows]],
            identity[self.batch.positives[rows]], identity[candidates], thresholds,
            bits, log_sums, identical, masked,
            len(rows), num_candidates, num_words, self.student.shape[1], guide.shape[1], self.inverse_temperature,
            GUIDED=self.guide is not None, ROWS=tiles.rows, CANDIDATES=tiles.candidates, PIECE=PIECE, STEP=tiles.step,
            PRECISION=self.precision, **OPTIONS,
        )  # fmt: skip
        num_identical = identical.sum()
        self.counts["identical_dropped"] += num_identical - len(rows) * (part != "an")  # less the rows themselves
        self.counts[f"candidates_{part}"] += len(rows) * num_candidates - num_identical
        self.counts[f"masked_{part}"] += masked.sum()
        return bits, log_sums

    def _add_gradients(
        self, part: str, rows: Int[Tensor, "s"], bits: Int[Tensor, "s w"], normalisers: tuple[Tensor, Tensor]
    ) -> None:
        queries, candidates = self.parts[part]
        query_role = "positive" if part == "pp" else "anchor"
        candidate_role = {"aa": "anchor", "an": "negative"}.get(part, "positive")
        for_queries = self._collect(queries[rows], candidates, bits, normalisers, queries_own=True)
        self.gradients[query_role][rows] += for_queries
        into = self.gradients[candidate_role]
        self._collect(candidates, queries[rows], bits, normalisers, queries_own=False, into=into)

    def _collect(
        self,
        owners: Int[Tensor, "o"],
        others: Int[Tensor, "p"],
        bits: Int[Tensor, "s w"],
        normalisers: tuple[Tensor, Tensor],
        queries_own: bool,
        into: Float[Tensor, "o d"] | None = None,
    ) -> Float[Tensor, "o d"]:
        """Σ softmax · other for every owner, added to ``into``."""
        tiles, width = self.tiles, self.student.shape[1]
        if into is None:
            into = self.student.new_zeros(len(owners), width, dtype=torch.float64)
        owner_tiles, other_tiles = triton.cdiv(len(owners), tiles.owners), triton.cdiv(len(others), tiles.others)
        tiles_per_program = triton.cdiv(other_tiles, triton.cdiv(PROGRAMS, owner_tiles))
        num_shares = triton.cdiv(other_tiles, tiles_per_program)
        shares = into.unsqueeze(0) if num_shares == 1 else into.new_zeros(num_shares, *into.shape)
        _gradients[(owner_tiles, num_shares)](
            self.student, owners, others, bits, *normalisers, shares,
            len(owners), len(others), tiles_per_program * tiles.others, bits.shape[1], width,
            self.inverse_temperature,
            QUERIES_OWN=queries_own, OWNERS=tiles.owners, OTHERS=tiles.others, STEP=tiles.step,
            GRADIENT_STEP=tiles.gradient_step, PRECISION=self.precision, **OPTIONS,
        )  # fmt: skip
        return into if num_shares == 1 else into.add_(shares.sum(dim=0))

    def share(self) -> LossShare:
        gradient = torch.zeros_like(self.student, dtype=torch.float64)
        for role, texts in self.texts.items():
            gradient.index_put_((texts,), self.gradients[role], accumulate=True)  # index_add_ adds in any order on CUDA
        gradient *= self.inverse_temperature / self.batch.num_rows
        return LossShare(self.loss, gradient, self.counts)
