"""Where the candidates of a row stand."""

# Axes:  g rows of the global batch   q further positives of a row, at most   k pairs of a row and a candidate

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gist_dist.config import LossConfig
from gist_dist.core.candidates import BatchIndex, slice_size
from gist_dist.core.device import sent


class Layout:
    """Where a row's candidates stand, in the table of texts and in the columns of its scores: an anchor's in the order
    of the table, then the positive's."""

    def __init__(self, batch: BatchIndex, config: LossConfig) -> None:
        self.parts = batch.parts(config)
        num_positives, num_negatives = len(batch.all_positives), len(batch.negatives)
        starts = {"ap": 0, "an": num_positives, "aa": num_positives + num_negatives, "pp": 0}
        first = 0 if config.in_batch else num_positives
        last = num_positives + num_negatives + batch.num_rows * ("aa" in self.parts)
        self.for_anchors, self.for_positives = slice(first, last), slice(0, num_positives)
        """Parts of the table that an anchor and a positive are scored against."""
        self.anchor_width = last - first
        self.width = self.anchor_width + num_positives * ("pp" in self.parts)
        self.columns = dict[str, slice]()
        self.slices = list[tuple[str, slice, slice]]()
        """Part, place in the table and columns, piece by piece."""
        for part in self.parts:
            offset, count = self.anchor_width if part == "pp" else -first, len(self.parts[part][1])
            self.columns[part] = slice(starts[part] + offset, starts[part] + offset + count)
            for start in range(starts[part], starts[part] + count, slice_size(batch)):
                stop = min(start + slice_size(batch), starts[part] + count)
                self.slices.append((part, slice(start, stop), slice(start + offset, stop + offset)))
        self.own_columns = [self.columns[part].start for part in ("ap", "aa", "pp") if part in self.parts]
        """Where the row of number 0 meets its own positive, or itself; the next row in the next column."""
        self.own_negatives: Tensor | None = None
        """Where a row has its own only: whose each is."""
        if config.negatives == "own":
            assert batch.negative_rows is not None
            self.own_negatives = batch.negative_rows.cpu()
        self.known = self._pairs(batch.known_rows, batch.known_places)
        further = batch.further_positives
        self.further = Pairs()
        if further is not None:
            rows, columns = (further.cpu() >= 0).nonzero(as_tuple=True)
            self.further = self._pairs(rows, further.cpu()[rows, columns])

    def places(self, columns: Int[Tensor, "*k"]) -> tuple[Int[Tensor, "*k"], Bool[Tensor, "*k"]]:
        """In the table; and whether they are candidates of the row's positive, not of its anchor."""
        of_positive = columns >= self.anchor_width
        return torch.where(of_positive, columns - self.anchor_width, columns + self.for_anchors.start), of_positive

    def _pairs(self, rows: Int[Tensor, "k"] | None, places: Int[Tensor, "k"] | None) -> "Pairs":
        """Every column in which such a row meets such a place."""
        if rows is None or places is None:
            return Pairs()
        found = []
        for number, (part, columns) in enumerate(self.columns.items()):
            first = 0 if part == "pp" else columns.start + self.for_anchors.start
            chosen = (places >= first) & (places < first + columns.stop - columns.start)
            if part == "an" and self.own_negatives is not None:
                chosen[chosen.clone()] = self.own_negatives[places[chosen] - first] == rows[chosen]
            column = places[chosen] - first + columns.start
            found.append(torch.stack([rows[chosen], column, torch.full_like(column, number)]))
        row, column, part = torch.cat(found, dim=1)
        order = row.argsort(stable=True)
        return Pairs(row[order], column[order], part[order], tuple(self.columns))


class SomePairs(NamedTuple):
    """Single candidates of the rows of a block."""

    row: Int[Tensor, "k"]
    column: Int[Tensor, "k"]
    part: Int[Tensor, "k"]
    """Number of the part."""
    num_by_part: dict[str, int]


_NONE = torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class Pairs:
    """Single candidates of single rows, by row; on the host."""

    rows: Tensor = _NONE
    columns: Tensor = _NONE
    parts: Tensor = _NONE
    names: tuple[str, ...] = ()

    def of(self, block: range, device: torch.device) -> Iterator[SomePairs]:
        """Those of a block, all at once; nothing where there are none."""
        start, stop = torch.searchsorted(self.rows, torch.tensor([block.start, block.stop])).tolist()
        if start < stop:
            numbers = torch.bincount(self.parts[start:stop], minlength=len(self.names)).tolist()
            tensors = (self.rows[start:stop] - block.start, self.columns[start:stop], self.parts[start:stop])
            row, column, part = (sent(tensor, device) for tensor in tensors)
            yield SomePairs(row, column, part, dict(zip(self.names, numbers, strict=True)))
