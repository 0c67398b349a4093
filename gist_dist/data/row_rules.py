"""What the data say of rows beside their texts: who is known to mean the same, and which loss a source's rows have."""

# Axes:  t texts of the corpus   r its rows   i distinct ids of texts   k pairs
#        g rows of a batch       p places in its table of texts

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gist_dist.common.errors import UserError
from gist_dist.common.text import plural
from gist_dist.config import LossConfig, RunConfig
from gist_dist.data.ragged import expand

if TYPE_CHECKING:
    from gist_dist.data.corpus import Corpus


@dataclass(frozen=True)
class KnownPairs:
    """Ids of texts that stand together as anchor and positive of some row, in either order, as CSR."""

    starts: Int[np.ndarray, " i1"]
    """Where the partners of each id begin; one more than there are ids."""
    partners: Int[np.ndarray, " k"]

    @classmethod
    def of(cls, anchors: Int[np.ndarray, " r"], positives: Int[np.ndarray, " r"], num_ids: int) -> "KnownPairs":
        """anchors, positives: ids of the rows' texts."""
        differ = anchors != positives
        one, other = anchors[differ].astype(np.int64), positives[differ].astype(np.int64)
        pairs = np.unique(np.concatenate([one * num_ids + other, other * num_ids + one]))
        starts = np.searchsorted(pairs, np.arange(num_ids + 1, dtype=np.int64) * num_ids)
        return cls(starts, pairs % num_ids)

    def partners_of(
        self, ends: Int[np.ndarray, " e"], rows: Int[np.ndarray, " e"]
    ) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """Ids of texts of some rows, and those rows -> the rows again, and every partner of their texts; not of a text
        that has one partner, which is the other end of its own row."""
        counts = self.starts[ends + 1] - self.starts[ends]
        some = np.flatnonzero(counts > 1)
        number, place = expand(self.starts[ends[some]], counts[some])
        return rows[some][number], self.partners[place]


@dataclass(frozen=True)
class RowRules:
    """The rules of a corpus. What is None or empty is no rule there."""

    ids: Int[np.ndarray, " t"] | None = None
    """A number for every text, equal for texts that the student can't tell apart, without gaps."""
    pairs: KnownPairs | None = None
    groups: Int[np.ndarray, " t"] | None = None
    """A number for every text, equal for texts of one label or cluster, and negative where it is in none."""
    losses: tuple[LossConfig, ...] = ()
    """The loss of every source, where they differ."""

    def in_order(self, rows: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, tuple[tuple[range, LossConfig], ...]]:
        """The rows of a batch with those of equal loss together, and where those are. source: of every row."""
        if not self.losses:
            return rows, ()
        distinct = list(dict.fromkeys(self.losses))
        number = np.array([distinct.index(loss) for loss in self.losses])[source[rows]]
        ends = np.cumsum(np.bincount(number, minlength=len(distinct))).tolist()
        sections = zip([0, *ends], ends, distinct, strict=False)
        return rows[np.argsort(number, kind="stable")], tuple((range(a, b), own) for a, b, own in sections if a < b)

    def known(
        self,
        anchors: Int[np.ndarray, " g"],
        positives: Int[np.ndarray, " g"],
        table: Int[np.ndarray, " p"],
        further_rows: Int[np.ndarray, " m"],
    ) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]] | None:
        """Known positives of a batch's rows: row, ascending, and place in the table; all given as texts.

        They are the partners of a row's texts, and copies of its further positives, which stand in the table behind the
        positives; the row's own texts are not among them. further_rows: whose each further positive is.
        """
        if self.ids is None or (self.pairs is None and not len(further_rows)):
            return None
        own, num_rows = (self.ids[anchors], self.ids[positives]), len(anchors)
        further = self.ids[table[num_rows : num_rows + len(further_rows)]]
        found = [(further_rows, further)]
        if self.pairs is not None:
            ends, rows = np.concatenate([*own, further]), np.arange(num_rows)
            found.append(self.pairs.partners_of(ends, np.concatenate([rows, rows, further_rows])))
        row, text = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        is_other = (text != own[0][row]) & (text != own[1][row])
        row, place = _places(row[is_other], text[is_other], self.ids[table])
        whose = np.full(len(table), -1)
        whose[num_rows : num_rows + len(further_rows)] = further_rows
        is_other = whose[place] != row
        if self.groups is not None:  # those are dropped as texts of one group
            is_other &= self.groups[anchors[row]] != self.groups[table[place]]
        row, place = row[is_other], place[is_other]
        return (row, place) if len(row) else None


def _places(
    row: Int[np.ndarray, " k"], text: Int[np.ndarray, " k"], table: Int[np.ndarray, " p"]
) -> tuple[Int[np.ndarray, " l"], Int[np.ndarray, " l"]]:
    """Rows, ascending, and every place in the table that has a text of theirs, once."""
    if not len(row):
        return row, text
    order = np.argsort(table, kind="stable")
    sorted_table = table[order]
    first, last = (np.searchsorted(sorted_table, text, side=side) for side in ("left", "right"))
    found_at, place = expand(first, last - first)
    return np.divmod(np.unique(row[found_at] * len(table) + order[place]), len(table))


def row_rules(config: RunConfig, corpus: "Corpus") -> RowRules:
    """The rules of the corpus, as the recipe wants them."""
    losses = tuple(config.loss_of(config.data.sources[number]) for number in corpus.recipe_sources)
    losses = losses if len(set(losses)) > 1 or set(losses) != {config.loss} else ()
    kind, has_several = config.data.known_positives, len(corpus.pairs[0]) > corpus.num_rows
    if kind == "off" and not has_several:
        return RowRules(losses=losses)
    ids = np.unique(corpus.identity, return_inverse=True)[1]
    if kind == "off":  # copies of a row's own further positives are no negatives all the same
        return RowRules(ids, losses=losses)
    num_ids = int(ids.max(initial=-1)) + 1
    first, second = corpus.pairs
    ends = ids[first], ids[second]
    joined = [ends] if kind == "clusters" else []
    if corpus.label is not None:
        joined.append(pairs_of_labels(ids[corpus.anchors], corpus.label))
    groups = joined_by_pairs(joined, num_ids)[ids] if joined else None
    pairs = KnownPairs.of(*ends, num_ids) if kind == "pairs" else None
    return RowRules(ids, pairs, groups, losses)


def check_negatives(config: RunConfig, corpus: "Corpus") -> None:
    """UserError for a source whose rows have no candidate at all."""
    for number, of in enumerate(corpus.recipe_sources):
        if config.loss_of(config.data.sources[of]).in_batch or config.data.mine:
            continue
        rows = corpus.num_own_negatives[corpus.source == number]
        if len(rows) and not rows.any():
            raise UserError(
                f"data.sources[{of}]: loss.in_batch is false and no row has a hard negative, so that nothing is "
                "contrasted; name them in columns.negatives, set data.mine, or leave loss.in_batch true"
            )


def known_positives_lines(corpus: "Corpus") -> list[str]:
    """What the rules found, for the plan and the log."""
    rules, lines = corpus.rules, []
    if rules.pairs is not None:
        several = int((np.diff(rules.pairs.starts) > 1).sum())
        lines.append(f"{plural(several, 'text')} of {len(rules.pairs.starts) - 1:,} stand in several pairs")
    if rules.groups is not None:
        sizes = np.bincount(rules.groups[rules.groups >= 0])
        largest = f", the largest of {plural(int(sizes.max()), 'text')}" if len(sizes) else ""
        lines.append(f"{plural(len(sizes), 'cluster')} of texts that mean the same{largest}")
    return lines


def pairs_of_labels(
    anchors: Int[np.ndarray, " r"], labels: Int[np.ndarray, " r"]
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Pairs that join the anchors of every label, one after the other; 0 is no label."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] != 0]
    same = labels[order[1:]] == labels[order[:-1]]
    return anchors[order[:-1][same]], anchors[order[1:][same]]


def joined_by_pairs(pairs: list[tuple[np.ndarray, np.ndarray]], num_ids: int) -> Int[np.ndarray, " i"]:
    """A number for every id, equal where pairs join them; -1 less the id where none does."""
    one, other = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(num_ids, num_ids))
    component = connected_components(graph, directed=False)[1]
    is_alone = np.bincount(component)[component] == 1
    numbers = np.unique(component[~is_alone], return_inverse=True)[1]
    groups = -1 - np.arange(num_ids)
    groups[~is_alone] = numbers
    return groups
