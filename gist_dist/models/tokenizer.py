"""Texts to token ids exactly as a model sees them, by an object that goes to other processes without the weights."""

# Axes:  n texts

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, UInt64

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_TEXTS = 256
"""Tokenized at once; the model's preprocessing pads them all to the longest."""
Tokens = tuple[np.ndarray, np.ndarray]
"""Token ids of all texts, joined [sum of lengths], and the number of tokens of each [n]; both int32."""


@dataclass(frozen=True)
class TextTokenizer:
    """What an encoder does to texts before the model."""

    fingerprint: str
    """Hash of everything that turns a text into token ids."""
    max_tokens: int | None
    """Texts are cut to this many tokens, special ones included."""
    meaningless: np.ndarray
    """Ids that say nothing of the text: [UNK], [CLS], [SEP], padding and the bare mark of a word's beginning."""
    tokens_of: Callable[[Sequence[str]], Tokens]
    """The bare tokenizer, or where that gives something else the model's preprocessing, which loads the model anew in
    another process."""

    def __call__(self, texts: Sequence[str]) -> Tokens:
        parts = [self.tokens_of(texts[start : start + BATCH_TEXTS]) for start in range(0, len(texts) or 1, BATCH_TEXTS)]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])

    def num_known(self, tokens: Tokens) -> np.ndarray:
        """How many tokens of each text the model has learned something about [n]."""
        ids, lengths = tokens
        known = np.concatenate([[0], np.cumsum(~np.isin(ids, self.meaningless), dtype=np.int64)])
        ends = np.cumsum(lengths, dtype=np.int64)
        return known[ends] - known[ends - lengths]

    def knows(self, prompts: Sequence[str], texts: Sequence[str], tokens: Tokens) -> Bool[np.ndarray, " n"]:
        """Whether it knows any token of each text itself; tokens: of the texts with their prompts before them."""
        distinct = {prompt: 0 for prompt in prompts if prompt}
        if distinct:
            distinct = dict(zip(distinct, self.num_known(self(list(distinct))).tolist(), strict=True))
        of_prompt = np.array([distinct[prompt] if prompt else 0 for prompt in prompts])
        known = self.num_known(tokens) > of_prompt
        # No more than the prompt's own: only the bare text decides, since prompt and text may join into fewer tokens.
        doubtful = np.array([i for i in np.flatnonzero(~known).tolist() if prompts[i]], dtype=np.int64)
        if len(doubtful):
            known[doubtful] = self.num_known(self([texts[i] for i in doubtful])) > 0
        return known


def backend_tokens(backend: "Tokenizer", texts: Sequence[str]) -> Tokens:
    backend.no_padding()
    ids = [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def token_keys(tokens: Tokens) -> UInt64[np.ndarray, "n 2"]:
    """128 bits for each text, equal for equal token ids."""
    ids, lengths = tokens
    data, ends = ids.tobytes(), (np.cumsum(lengths, dtype=np.int64) * ids.itemsize).tolist()
    digests = (hashlib.blake2b(data[i:j], digest_size=16).digest() for i, j in zip([0, *ends], ends, strict=False))
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def as_lists(tokens: Tokens) -> pa.LargeListArray:
    ids, lengths = tokens
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(ids))
