"""Hard negatives mined again by the student as it goes: data.mine.every_steps (ANCE, Xiong et al. 2021,
arXiv:2007.00808).

Every N steps all workers encode the texts with the student as it then is, each a part; each searches for a
part of the anchors, and every row takes what was found. A function of the step: a checkpoint keeps what was found last.
"""

# Axes:  t texts   d student width   a anchors   k negatives wanted   rows of the corpus

import logging
import time
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gist_dist.core.collectives import all_gather_rows
from gist_dist.core.plan import cut_chunks
from gist_dist.data.mining import by_row, minable_rows, mine_block, options_of, plan_corpus_search
from gist_dist.training.train_state import RunTrainState

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 2**13
"""Texts of similar length that are cut into chunks together; whoever encodes a chunk, its texts are the same."""


class MiningSchedule:
    """What the rows' mined negatives are at every step."""

    def __init__(self, train_state: RunTrainState, num_steps: int) -> None:
        self.train_state, self.num_steps = train_state, num_steps
        mine = train_state.config.data.mine
        self.every = mine.every_steps if mine else None
        self._mined: np.ndarray | None = None

    @cached_property
    def _rows(self) -> np.ndarray:
        """Which are mined for, at every renewal the same."""
        return minable_rows(self.train_state.config, self.train_state.corpus)

    def changes_after(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0 and step < self.num_steps

    def is_renewed_by(self, step: int) -> bool:
        """Whether the step after this one has negatives that the student has found."""
        return self.every is not None and self.every <= step < self.num_steps

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; empty before the first renewal."""
        return {} if self._mined is None else {"negatives": torch.from_numpy(self._mined)}

    def resume(self, done: int, tensors: dict[str, Tensor]) -> None:
        if self.is_renewed_by(done):
            self._adopt(tensors["negatives"].cpu().numpy())

    def renew(self, step: int) -> None:
        """Search with the student of this step, on every worker."""
        config, corpus, world, started = (
            self.train_state.config,
            self.train_state.corpus,
            self.train_state.world,
            time.monotonic(),
        )
        assert config.data.mine is not None
        options, rows = options_of(config.data.mine), self._rows
        search = plan_corpus_search(corpus, options, rows)
        texts = np.unique(np.concatenate([search.anchors, search.positives, search.pool]))
        vectors = self._encode(texts)

        def embeddings(wanted: np.ndarray) -> np.ndarray:
            return vectors[np.searchsorted(texts, wanted)]

        device, memory = self.train_state.student.device, config.batch.loss_gb
        assigned = [search.blocks()[rank :: world.size] for rank in range(world.size)]
        mined = [
            mine_block(search, block, embeddings, options, config.seed, memory, device).texts
            for block in assigned[world.rank]
        ]
        local = torch.from_numpy(np.concatenate([np.empty((0, options.negatives), np.int64), *mined])).to(device)
        counts = [sum(block.stop - block.start for block in own) for own in assigned]
        gathered = all_gather_rows(local, counts, world).cpu().numpy()
        found = np.empty_like(gathered)
        found[np.concatenate([np.arange(block.start, block.stop) for own in assigned for block in own])] = gathered
        self._adopt(by_row(corpus, rows, search, found))
        if world.rank == 0:
            told = int((found >= 0).sum()), len(search.anchors), time.monotonic() - started
            logger.info("after step %d the student found %d hard negatives for %d anchors in %.1f s", step, *told)

    def _adopt(self, mined: np.ndarray) -> None:
        self._mined = mined
        self.train_state.corpus.adopt(mined)

    def _encode(self, texts: np.ndarray) -> np.ndarray:
        """fp16 unit vectors of these texts, on every worker [t d]."""
        student, world, corpus = self.train_state.student, self.train_state.world, self.train_state.corpus
        order = texts[np.argsort(corpus.student_lengths[texts], kind="stable")]
        groups = [order[start : start + TEXTS_AT_ONCE] for start in range(0, len(order), TEXTS_AT_ONCE)]
        chunk_tokens = self.train_state.config.batch.tokens_at_once
        chunks = [g[c.texts] for g in groups for c in cut_chunks(corpus.student_lengths[g], chunk_tokens)]
        local = [torch.empty(0, student.width, dtype=torch.float16, device=student.device)]
        student.model.eval()
        with torch.inference_mode():
            local += [student.embed(corpus.student_tokens(chunk)).half() for chunk in chunks[world.rank :: world.size]]
        student.model.train()
        assigned = [chunks[rank :: world.size] for rank in range(world.size)]
        gathered = all_gather_rows(torch.cat(local), [sum(map(len, own)) for own in assigned], world).cpu().numpy()
        vectors = np.empty_like(gathered)
        vectors[np.searchsorted(texts, np.concatenate([chunk for own in assigned for chunk in own]))] = gathered
        return vectors
