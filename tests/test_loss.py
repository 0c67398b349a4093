"""gist_loss against the formulas of the design, written down a second time in reference.py."""

import itertools

import pytest
import torch
from reference import Row, reference_loss
from torch.nn import functional as F

from gist_dist.config import LossConfig
from gist_dist.core.candidates import PARTS, TIE, BatchIndex, LossShare, row_blocks
from gist_dist.core.loss import gist_loss

MARGINS = [("absolute", 0.0), ("absolute", 0.4), ("absolute", -0.1), ("relative", 0.3), ("relative", -0.2)]
FLAGS = list(itertools.product((True, False), repeat=2))


class Case:
    """Rows, embeddings and identities, for the reference and for gist_loss."""

    def __init__(self, num_rows: int, negatives: str = "ragged", duplicates: bool = True, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.rows = random_rows(num_rows, negatives, duplicates, random)
        num_texts = 1 + max(max(row.anchor, row.positive, *row.negatives) for row in self.rows)
        # A row's texts share a topic and topics repeat, so that the guide finds false negatives.
        topic = torch.zeros(num_texts, dtype=torch.long)
        for number, row in enumerate(self.rows):
            topic[[row.anchor, row.positive, *row.negatives]] = number % max(2, num_rows // 2)
        topics = torch.randn(num_rows + 1, 12, generator=random, dtype=torch.float64)
        noise = torch.randn(num_texts, 12, generator=random, dtype=torch.float64)
        self.guide = F.normalize(topics[topic] + 1.2 * noise, dim=-1)
        noise = torch.randn(num_texts, 9, generator=random, dtype=torch.float64)
        self.student = F.normalize(0.5 * topics[topic][:, :9] + noise, dim=-1)
        self.identity = torch.arange(num_texts)
        if duplicates:  # two texts of other rows, different only in what the student doesn't see
            twins = self.rows[-1].positive, self.rows[-2].positive
            self.identity[twins[0]] = self.identity[twins[1]]
            self.student[twins[0]] = self.student[twins[1]]

    @property
    def batch(self) -> BatchIndex:
        return BatchIndex(
            torch.tensor([row.anchor for row in self.rows]),
            torch.tensor([row.positive for row in self.rows]),
            torch.tensor([text for row in self.rows for text in row.negatives], dtype=torch.long),
            self.identity,
        )

    def expected(self, config: LossConfig, guided: bool = True):
        student = self.student.clone().requires_grad_()
        loss, counts = reference_loss(
            self.rows, student, self.guide if guided else None, self.identity.tolist(), config
        )
        return loss.detach(), torch.autograd.grad(loss, student)[0], counts

    def share(
        self,
        config: LossConfig,
        guided: bool = True,
        block: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> LossShare:
        guide = self.guide.to(dtype) if guided else None
        return gist_loss(self.student.to(dtype), guide, self.batch, blocks_of(len(self.rows), block), config)


def random_rows(num_rows: int, negatives: str, duplicates: bool, random: torch.Generator) -> list[Row]:
    """Rows of new texts, some of them then replaced so that texts repeat in every way they can."""
    most = {"none": 0, "ragged": 3, "many in one row": 0}[negatives]
    sizes = torch.randint(0, most + 1, (num_rows,), generator=random).tolist()
    if negatives == "many in one row":
        sizes[2] = 31
    if duplicates and negatives == "ragged":
        sizes[0:2] = [2, 1]
    new = itertools.count()
    rows = [Row(next(new), next(new), tuple(next(new) for _ in range(size))) for size in sizes]
    if duplicates:
        positives = [row.positive for row in rows]
        anchors = [row.anchor for row in rows]
        rows[4] = Row(anchors[3], positives[4], rows[4].negatives)  # an anchor twice
        rows[5] = Row(anchors[5], positives[3], rows[5].negatives)  # a positive twice
        rows[6] = Row(positives[3], positives[6], rows[6].negatives)  # an anchor that is the positive of others
        rows[7] = Row(anchors[7], anchors[7], rows[7].negatives)  # a positive that is its own anchor
        if negatives == "ragged":
            own_and_other = (positives[0], positives[8])
            rows[0] = Row(anchors[0], positives[0], own_and_other)  # hard negatives that are positives
            rows[1] = Row(anchors[1], positives[1], (rows[0].negatives[1],))  # and a hard negative twice
    # Texts are numbered in an order that says nothing of their rows, without gaps.
    used = sorted({text for row in rows for text in (row.anchor, row.positive, *row.negatives)})
    number = dict(zip(used, torch.randperm(len(used), generator=random).tolist(), strict=True))
    return [Row(number[r.anchor], number[r.positive], tuple(number[n] for n in r.negatives)) for r in rows]


def blocks_of(num_rows: int, size: int | None) -> list[range]:
    size = size or num_rows
    return [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def config_of(margin=("absolute", 0.0), flags=(True, True), temperature=0.1) -> LossConfig:
    kind, value = margin
    return LossConfig(
        temperature=temperature,
        margin=value,
        margin_kind=kind,
        contrast_anchors=flags[0],
        contrast_positives=flags[1],
    )


def assert_equal_counts(share: LossShare, expected: dict[str, float], config: LossConfig, with_negatives: bool) -> None:
    used = {"ap": True, "aa": config.contrast_anchors, "pp": config.contrast_positives, "an": with_negatives}
    for count in ("candidates_", "masked_weight_"):
        counted = {name.removeprefix(count) for name in share.counts if name.startswith(count)}
        assert counted == {part for part in PARTS if used[part]}
    for name, value in share.counts.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("negatives", ["none", "ragged", "many in one row"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("margin", [None, *MARGINS])
def test_loss_gradient_and_counts_equal_the_reference(margin, flags, negatives):
    """None: no guide."""
    case, guided = Case(27, negatives), margin is not None
    config = config_of(margin or ("absolute", 0.0), flags)
    loss, gradient, counts = case.expected(config, guided)
    assert gradient.abs().sum() > 1 and counts["identical_dropped"] >= 3
    if guided:
        assert 0 < counts["masked_ap"] < counts["candidates_ap"]
    for block in (1, 5, None):
        share = case.share(config, guided, block)
        torch.testing.assert_close(share.loss, loss, rtol=0, atol=1e-10)
        torch.testing.assert_close(share.gradient, gradient, rtol=0, atol=1e-10)
        assert_equal_counts(share, counts, config, negatives != "none")


def test_cases_hold_what_they_are_meant_to_hold():
    """Every rule of the design meets a text that it decides about."""
    case = Case(27)
    anchors, positives = [r.anchor for r in case.rows], [r.positive for r in case.rows]
    negatives = [n for r in case.rows for n in r.negatives]
    assert len(set(anchors)) < len(anchors) and len(set(positives)) < len(positives)
    assert any(r.anchor == r.positive for r in case.rows)
    assert any(a == p for i, a in enumerate(anchors) for j, p in enumerate(positives) if i != j)
    assert any(r.positive in r.negatives for r in case.rows)
    assert any(n in positives and n != r.positive for r in case.rows for n in r.negatives)
    assert len(set(negatives)) < len(negatives)
    assert len({len(r.negatives) for r in case.rows}) > 2 and any(not r.negatives for r in case.rows)
    assert len(case.identity.unique()) < len(case.identity)
    guide_positive = (case.guide[anchors] * case.guide[positives]).sum(dim=1)
    assert (guide_positive < 0).any() and (guide_positive > 0).any()  # a relative margin has two cases


@pytest.mark.parametrize("num_rows", [252, 507, 123])
def test_awkward_sizes_equal_the_reference(num_rows):
    case, config = Case(num_rows, seed=num_rows), config_of(("relative", 0.05))
    loss, gradient, counts = case.expected(config)
    for block in (num_rows, 64, 11):
        share = case.share(config, block=block)
        torch.testing.assert_close(share.loss, loss, rtol=0, atol=1e-10)
        torch.testing.assert_close(share.gradient, gradient, rtol=0, atol=1e-10)
        assert_equal_counts(share, counts, config, with_negatives=True)


@pytest.mark.parametrize("num_rows", [2, 3])
def test_smallest_batches_equal_the_reference(num_rows):
    for guided in (True, False):
        case, config = Case(num_rows, "none", duplicates=False), config_of()
        loss, gradient, _ = case.expected(config, guided)
        share = case.share(config, guided)
        torch.testing.assert_close(share.loss, loss, rtol=0, atol=1e-10)
        torch.testing.assert_close(share.gradient, gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_workers", [2, 3, 7, 40])
def test_shares_of_disjoint_blocks_add_up(num_workers):
    """Also where some workers have no block at all."""
    case, config = Case(27), config_of(("absolute", 0.1))
    whole, blocks = case.share(config), blocks_of(27, 4)
    shares = [
        gist_loss(case.student, case.guide, case.batch, blocks[rank::num_workers], config)
        for rank in range(num_workers)
    ]
    torch.testing.assert_close(sum(s.loss for s in shares), whole.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(s.gradient for s in shares), whole.gradient, rtol=0, atol=1e-12)
    for name, value in whole.counts.items():
        assert sum(s.counts[name] for s in shares).item() == pytest.approx(value.item(), rel=1e-12)


def test_gradient_equals_finite_differences():
    """Says that the reference's autograd, too, is of the loss that is reported."""
    case, config = Case(9), config_of(("absolute", 0.1))
    gradient, step = case.share(config).gradient, 1e-6
    for text, width in itertools.product(range(0, len(case.student), 3), range(0, 9, 4)):
        losses = []
        for sign in (1, -1):
            moved = case.student.clone()
            moved[text, width] += sign * step
            losses.append(gist_loss(moved, case.guide, case.batch, blocks_of(9, None), config).loss)
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(slope, gradient[text, width], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_fp32_is_no_worse_than_autograd_in_fp32(temperature):
    case, config = Case(123, seed=1), config_of(temperature=temperature)
    loss, gradient, _ = case.expected(config)
    naive_student = case.student.float().requires_grad_()
    naive_loss, _ = reference_loss(case.rows, naive_student, case.guide.float(), case.identity.tolist(), config)
    naive_gradient = torch.autograd.grad(naive_loss, naive_student)[0]
    share = case.share(config, block=32, dtype=torch.float32)
    assert abs(share.loss - loss) <= abs(naive_loss - loss) + 1e-6 * loss
    naive_error = (naive_gradient - gradient).norm()
    assert (share.gradient - gradient).norm() <= 1.5 * naive_error + 1e-6 * gradient.norm()


def test_row_without_any_candidate_left_has_no_loss_and_no_gradient():
    case, config = Case(12, duplicates=False), config_of(("absolute", 3.0))  # masks everything
    share = case.share(config, block=5)
    assert share.loss == 0 and not share.gradient.any()
    assert share.counts["rows_without_negatives"] == 12
    assert share.counts["masked_ap"] == share.counts["candidates_ap"] == 12 * 11


def test_one_row_without_candidates_among_others():
    case, config = Case(12, duplicates=False), config_of(flags=(False, False))
    lonely = case.rows[3]
    case.guide[lonely.positive] = -case.guide[lonely.anchor]  # everything is closer than its positive
    loss, gradient, counts = case.expected(config)
    share = case.share(config)
    assert counts["rows_without_negatives"] == share.counts["rows_without_negatives"] == 1
    torch.testing.assert_close(share.loss, loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(share.gradient, gradient, rtol=0, atol=1e-10)
    assert torch.isfinite(share.gradient).all()
    assert not share.gradient[lonely.anchor].any() and share.gradient[case.rows[0].anchor].any()


def test_batch_of_one_text_repeated_has_no_loss():
    """Every candidate is identical to the anchor: nothing to contrast with, and nothing breaks."""
    batch = BatchIndex(torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]), torch.tensor([0]), torch.tensor([5, 5]))
    embeddings = F.normalize(torch.randn(2, 4), dim=-1)
    share = gist_loss(embeddings, embeddings, batch, [range(3)], config_of())
    assert share.loss == 0 and not share.gradient.any()
    assert share.counts["identical_dropped"] == 3 * 2 * 3 + 3


def test_copies_of_the_positive_do_not_count_as_negatives():
    """A strict σ > t never masks a copy of the positive (σ = t); the identical-text rule does."""
    case = Case(12, duplicates=False)
    first, second = case.rows[:2]
    case.rows[1] = Row(second.anchor, first.positive, second.negatives)
    share = case.share(config_of(flags=(False, False)), guided=False)
    assert share.counts["identical_dropped"] == 2  # in each of the two rows the other's positive
    loss, _, counts = case.expected(config_of(flags=(False, False)), guided=False)
    torch.testing.assert_close(share.loss, loss, rtol=0, atol=1e-10)
    assert counts["candidates_ap"] == share.counts["candidates_ap"] == 12 * 11 - 2


def test_candidate_as_close_as_the_positive_stays():
    """Rounding doesn't decide: σ = t is no false negative, nor is what lies within the tolerance of ties above it."""
    one_hot, index = torch.eye(6, dtype=torch.float64), torch.arange(6)  # every σ(a, ·) is exactly 0
    batch = BatchIndex(index[:3], index[3:], index[:0], index)
    for margin, kept in ((0.0, 1), (0.9 * TIE, 1), (1.1 * TIE, 0)):
        share = gist_loss(one_hot, one_hot, batch, [range(3)], config_of(("absolute", margin)))
        assert share.counts["masked_ap"] == share.counts["masked_aa"] == (0 if kept else 6)


@pytest.mark.parametrize("budget_bytes", [1.0, 5e3, 2e4, 1e9])
@pytest.mark.parametrize("num_rows", [2, 27, 507])
def test_blocks_take_every_row_once_and_stay_in_the_budget(num_rows, budget_bytes):
    case = Case(num_rows, duplicates=False)
    blocks = row_blocks(case.batch, config_of(), budget_bytes)
    assert [row for block in blocks for row in block] == list(range(num_rows))
    num_candidates = 3 * num_rows + len(case.batch.negatives)
    for block in blocks:
        assert len(block) == 1 or 4 * len(block) * num_candidates <= budget_bytes


def test_there_are_blocks_for_many_workers_at_large_batches():
    index = torch.arange(65536)
    blocks = row_blocks(BatchIndex(index, index + 65536, index[:0], torch.arange(2 * 65536)), config_of(), 1e12)
    assert len(blocks) >= 64 and len({len(block) for block in blocks}) == 1


@pytest.mark.parametrize("guided", [True, False])
def test_memory_of_a_block_stays_in_the_budget(guided):
    """Rows × candidates of one block and the tables of the texts; never rows × candidates × width."""
    num_rows, num_negatives, width, budget_bytes = 3000, 500, 2, 1.5e6
    index = torch.arange(num_rows)
    num_texts = 2 * num_rows + num_negatives
    batch = BatchIndex(index, index + num_rows, index[:num_negatives] + 2 * num_rows, torch.arange(num_texts))
    student = F.normalize(torch.randn(num_texts, width), dim=-1)
    guide = F.normalize(torch.randn(num_texts, width), dim=-1) if guided else None
    blocks = row_blocks(batch, config_of(), budget_bytes)
    assert len(blocks[0]) < 64  # the budget decided, not the number of blocks wanted for sharing
    # Student and guide by role, gradients by role and by text; identities by role.
    tables = (3 + guided) * student.nbytes + batch.identity.nbytes
    peak = peak_bytes(lambda: gist_loss(student, guide, batch, blocks, config_of()))
    assert 0.6 * budget_bytes < peak - tables < 1.02 * budget_bytes


def peak_bytes(function) -> int:
    """Most bytes of CPU tensors alive at once within, temporaries of every operator included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    alive, peak = 0, 0
    allocations = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, size in sorted(allocations, key=lambda allocation: allocation[0]):
        alive += size
        peak = max(peak, alive)
    return peak


def test_similarities_in_half_precision_are_refused():
    case = Case(9)
    with pytest.raises(AssertionError, match="fp32"):
        case.share(config_of(), dtype=torch.bfloat16)
