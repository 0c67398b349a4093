"""What the guide is at every step: a model in the step, embeddings from the cache, or a frozen copy of the student."""

from dataclasses import replace

import numpy as np
from torch import Tensor

from gist_dist.common.errors import UserError
from gist_dist.core.collectives import barrier
from gist_dist.core.plan import BatchPlan, plan_batch
from gist_dist.data.sampler import Sampler
from gist_dist.models.encoder import Guide
from gist_dist.models.guide_cache import GuideCache, embedding_fingerprint, fill
from gist_dist.training.checkpoint import model_tensors
from gist_dist.training.train_state import RunTrainState


class Guidance:
    """Plans batches with what the guide needs, and renews the guide where the recipe says guide.refresh.

    With refresh, step s is guided by the student as it was after the last step before s that is a multiple of
    refresh: a function of the step alone, so that a resumed run is guided as an undisturbed one.
    """

    def __init__(self, train_state: RunTrainState, sampler: Sampler, cache: GuideCache | None) -> None:
        self.train_state, self.sampler, self.config = train_state, sampler, train_state.config
        self.refresh = self.config.guide_refresh
        self.cache = cache
        self._copy: dict[str, Tensor] = {}
        if cache is not None:
            self._locate(cache, train_state.corpus.texts_in_use)

    def plan(self, step: int) -> BatchPlan:
        corpus = self.train_state.corpus
        encodes = self.train_state.guide is not None
        plan = plan_batch(corpus, self.sampler.rows(step), step, self.train_state.chunk_rule, encodes)
        if self.cache is None:
            return plan
        return replace(plan, guide_embeddings=self.cache.embeddings(self.positions[plan.guide_inputs]))

    def changes_after(self, step: int) -> bool:
        return self.refresh is not None and step % self.refresh == 0 and step < self.sampler.num_steps

    def is_renewed_by(self, step: int) -> bool:
        """Whether the step after this one is guided by a copy of the student."""
        return self.refresh is not None and self.refresh <= step < self.sampler.num_steps

    def tensors(self) -> dict[str, Tensor]:
        """The student's copy that now guides, as a checkpoint stores it. Empty before the first renewal."""
        return self._copy

    def resume(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Restore the guide of the step after `done`, on every worker."""
        if self.is_renewed_by(done):
            guide = self._copy_of_student()
            for name, tensor in model_tensors(guide.model).items():
                tensor.copy_(tensors[name])
            self._adopt(guide, done)

    def renew(self, step: int) -> None:
        """The student of this step becomes the guide, on every worker."""
        self._adopt(self._copy_of_student(), step)

    def _copy_of_student(self) -> Guide:
        assert self.config.guide is not None  # which alone says refresh
        return Guide.copy_of(self.train_state.student, self.config.guide)

    def _adopt(self, guide: Guide, done: int) -> None:
        is_first, tensors = not self._copy, model_tensors(guide.model)
        if self.config.guide_mode == "online":
            self.train_state.guide, self._copy = guide, tensors
            return
        self._copy = {name: tensor.cpu() for name, tensor in tensors.items()}
        config, world, corpus = self.config, self.train_state.world, self.train_state.corpus
        cache = GuideCache(config.guide_cache_dir, embedding_fingerprint(guide), guide.width, config.data.local_copy)
        texts = self._texts_until_renewal(done)
        share = (world.rank, world.size)
        fill(
            cache,
            corpus.guide_keys[texts],
            lambda chosen: corpus.guide_tokens(texts[chosen]),
            corpus.guide_lengths[texts],
            guide,
            config.batch.tokens_at_once,
            share,
        )
        barrier(world)
        cache.refresh()
        outdated, self.cache = self.cache, cache
        self._locate(cache, texts)
        barrier(world)
        # The first one is the recipe's guide.
        if world.rank == 0 and not is_first and outdated is not None and outdated.place != cache.place:
            outdated.remove()

    def _texts_until_renewal(self, done: int) -> np.ndarray:
        """Text numbers of the steps that the new guide guides; all, where their negatives are yet to be mined."""
        corpus, refresh, mine = self.train_state.corpus, self.refresh, self.config.data.mine
        if mine and mine.every_steps:
            return corpus.texts_in_use
        assert refresh is not None
        last = min(done // refresh * refresh + refresh, self.sampler.num_steps)
        seen = np.zeros(len(corpus.identity), dtype=bool)
        for step in range(done + 1, last + 1):
            rows = self.sampler.rows(step)
            seen[corpus.texts_of(rows)] = True
        return np.flatnonzero(seen)

    def _locate(self, cache: GuideCache, texts: np.ndarray) -> None:
        """Where in the cache every text is, -1 for those not asked for."""
        corpus = self.train_state.corpus
        self.positions = np.full(len(corpus.identity), -1, dtype=np.int64)
        self.positions[texts] = cache.find(corpus.guide_keys[texts])
        num_missing = int((self.positions[texts] < 0).sum())
        if num_missing:
            raise UserError(
                f"the guide cache lacks {num_missing:,} of {len(texts):,} texts; run again, or gist-dist precompute, "
                "and they are encoded"
            )
