"""Every rule of the loss beyond the paper's, alone and together, against reference.py."""

import itertools

import numpy as np
import pytest
import torch
from reference import Row, reference_loss
from test_loss import Case, blocks_of

from gist_dist.config import LossConfig, Promotion
from gist_dist.core.candidates import BatchIndex, LossShare, row_blocks
from gist_dist.core.loss import gist_loss


class RichCase(Case):
    """Rows of several positives, known positives and groups, beside all that Case has."""

    def __init__(
        self, num_rows: int = 23, further: bool = True, known: bool = True, groups: bool = True, seed: int = 0
    ):
        super().__init__(num_rows, seed=seed)
        random = np.random.default_rng(seed)
        if further:  # texts of other rows, and none that equals the row's own
            for number in (0, 3, 9, num_rows - 1):
                row = self.rows[number]
                own = {int(self.identity[t]) for t in (row.anchor, row.positive)}
                others = [t for t in range(len(self.identity)) if int(self.identity[t]) not in own]
                chosen = random.choice(others, size=1 + number % 3, replace=False).tolist()
                self.rows[number] = Row(row.anchor, row.positive, row.negatives, tuple(chosen))
        self.known = {(i, t) for i in range(num_rows) for t in self._others(i) if known and random.random() < 0.15}
        # As a plan has it: copies of a further positive are known, wherever they stand.
        for i, row in enumerate(self.rows):
            same = {int(self.identity[t]) for t in row.further}
            self.known |= {(i, t) for t in self._others(i) if int(self.identity[t]) in same}
        self.groups = None
        if groups:  # of a few texts; the others have one each
            self.groups = -1 - torch.arange(len(self.identity))
            members = random.choice(len(self.identity), size=14, replace=False)
            self.groups[members] = torch.from_numpy(random.integers(0, 4, size=14))
            self.known = {(i, t) for i, t in self.known if self.groups[t] != self.groups[self.rows[i].anchor]}

    def _others(self, row: int) -> list[int]:
        own = {int(self.identity[t]) for t in (self.rows[row].anchor, self.rows[row].positive)}
        return [t for t in range(len(self.identity)) if int(self.identity[t]) not in own]

    @property
    def batch(self) -> BatchIndex:
        more = [(i, text) for i, row in enumerate(self.rows) for text in row.further]
        table = [row.positive for row in self.rows] + [text for _, text in more]
        table += [text for row in self.rows for text in row.negatives] + [row.anchor for row in self.rows]
        further = torch.full((len(self.rows), 3), -1)
        for place, (row, _) in enumerate(more):
            further[row, (further[row] >= 0).sum()] = len(self.rows) + place
        own = set(further.flatten().tolist())
        places = [
            (i, place)
            for i, text in sorted(self.known)
            for place, t in enumerate(table)
            if t == text and not (place in own and place in further[i].tolist())
        ]
        rows, known = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
        return BatchIndex(
            torch.tensor([row.anchor for row in self.rows]),
            torch.tensor([row.positive for row in self.rows]),
            torch.tensor([text for row in self.rows for text in row.negatives]),
            self.identity,
            negative_rows=torch.tensor([i for i, row in enumerate(self.rows) for _ in row.negatives]),
            more_positives=torch.tensor([text for _, text in more]) if more else None,
            further_positives=further if more else None,
            known_rows=rows,
            known_places=known,
            groups=self.groups,
        )

    def compare(self, config: LossConfig, guided: bool = True, sizes: tuple[int | None, ...] = (1, 5, None)) -> dict:
        student = self.student.clone().requires_grad_()
        guide = self.guide if guided else None
        groups = None if self.groups is None else self.groups.tolist()
        loss, counts = reference_loss(self.rows, student, guide, self.identity.tolist(), config, self.known, groups)
        gradient = torch.autograd.grad(loss, student)[0]
        assert gradient.abs().sum() > 0.5
        for size in sizes:
            share = gist_loss(self.student, guide, self.batch, blocks_of(len(self.rows), size), config)
            assert_equal(share, loss.detach(), gradient, counts)
        return counts


def assert_equal(share: LossShare, loss: torch.Tensor, gradient: torch.Tensor, counts: dict[str, float]) -> None:
    torch.testing.assert_close(share.loss, loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(share.gradient, gradient, rtol=0, atol=1e-10)
    for name, value in share.counts.items():
        assert value.item() == pytest.approx(counts[name], rel=1e-9, abs=1e-9), name


RULES = {
    "in_batch": {"in_batch": False},
    "own negatives": {"negatives": "own"},
    "guarded": {"guard_negatives": True, "margin": 0.3},
    "sum": {"positives": "sum"},
    "promotion": {"false_negatives": "positive"},
    "promotion by guide": {
        "false_negatives": "positive", "promotion": Promotion(margin=-0.05, most=3, weight="guide"),
    },
}  # fmt: skip


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_equals_the_reference(rule, guided):
    counts = RichCase().compare(LossConfig(temperature=0.1, **RULES[rule]), guided)
    assert counts["known_dropped"] > 5 and counts["known_weight"] > 0
    assert (counts["masked_weight"] > 0) == guided
    if "promotion" in rule and guided:
        assert counts["promoted"] > 5


@pytest.mark.parametrize("first, second", list(itertools.combinations(RULES, 2)))
def test_two_rules_together_equal_the_reference(first, second):
    config = LossConfig(temperature=0.2, margin_kind="relative", **RULES[first] | RULES[second])
    RichCase(seed=1).compare(config, sizes=(7,))


@pytest.mark.parametrize("flags", list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("what", ["further", "known", "groups"])
def test_each_kind_of_known_positive_equals_the_reference(what, flags):
    case = RichCase(**{name: name == what for name in ("further", "known", "groups")}, seed=2)
    config = LossConfig(temperature=0.1, contrast_anchors=flags[0], contrast_positives=flags[1])
    assert case.compare(config)["known_dropped"] > 0


def test_rows_of_each_source_have_its_loss():
    """Temperature, margin and every switch; rows of the sources follow each other."""
    case = RichCase(further=False)
    configs = [
        LossConfig(temperature=0.1),
        LossConfig(temperature=0.3, contrast_anchors=False, false_negatives="positive", negatives="own"),
        LossConfig(temperature=0.05, in_batch=False, margin=0.2, margin_kind="relative"),
    ]
    sections = tuple(zip((range(0, 9), range(9, 17), range(17, 23)), configs, strict=True))
    batch = BatchIndex(**{**vars(case.batch), "sections": sections})
    student = case.student.clone().requires_grad_()
    loss, counts = reference_loss(
        case.rows, student, case.guide, case.identity.tolist(),
        [config for rows, config in sections for _ in rows], case.known, case.groups.tolist(),
    )  # fmt: skip
    gradient = torch.autograd.grad(loss, student)[0]
    blocks = row_blocks(batch, LossConfig(), 4.0 * 100 * 5)
    assert len(blocks) > 6 and sorted(row for block in blocks for row in block) == list(range(23))
    shares = [gist_loss(case.student, case.guide, batch, blocks[rank::3], LossConfig()) for rank in range(3)]
    total = LossShare(
        sum(share.loss for share in shares), sum(share.gradient for share in shares),
        {name: sum(share.counts[name] for share in shares) for name in shares[0].counts},
    )  # fmt: skip
    assert_equal(total, loss.detach(), gradient, counts)


def test_masked_weight_is_the_share_of_the_softmax():
    """Two rows: what the guide drops would have had e of e + 1."""
    student = torch.tensor([[1.0, 0.0], [0.8, 0.6], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    guide = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0], [0.9, 1.0], [1.0, 0.1], [0, 1], [0, 1]]).double(), dim=1
    )
    batch = BatchIndex(torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([2]), torch.arange(5))
    config = LossConfig(temperature=1.0, contrast_anchors=False, contrast_positives=False)
    share = gist_loss(student, guide, batch, [range(0, 1)], config)
    assert share.counts["masked_an"] == 1 and share.counts["masked_ap"] == 0
    e = torch.tensor(1.0).exp().item()
    assert share.counts["masked_weight"].item() == pytest.approx(e / (e + 1))
    assert share.counts["masked_weight_an"].item() == pytest.approx(1.0)


def test_a_row_whose_every_candidate_is_dropped_has_no_weight_and_no_loss():
    student = torch.eye(4, dtype=torch.float64)
    batch = BatchIndex(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.zeros(0, dtype=torch.long), torch.arange(4))
    share = gist_loss(student, None, batch, [range(2)], LossConfig(in_batch=False))
    assert share.loss == 0 and not share.gradient.any() and share.counts["rows_without_negatives"] == 2
