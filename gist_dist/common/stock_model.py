"""What a SentenceTransformer needs before it encodes anybody's texts: a limit that it can hold, a padding token, and
prompts by role. For training and evaluation alike."""

from collections.abc import Mapping
from typing import Any, NamedTuple

NO_LIMIT = 2**24
"""Tokenizers without a limit tell a number beyond any text, such as 1e30."""


class Prompts(NamedTuple):
    """Put before every text of a role."""

    query: str
    document: str


NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""What models call them; encode_document means to take the first that there is."""


def prompts_of(model: Any, given: Mapping[str, str | None]) -> Prompts:
    """Those given, and for a role without one the model's own, as its encode_query and encode_document have it; its
    default prompt for both roles where it has none by role."""
    own = {role: _first(model.prompts, names) for role, names in NAMES.items()}
    if not any(own.values()) and model.default_prompt_name:
        own = dict.fromkeys(own, model.prompts.get(model.default_prompt_name) or "")
    return Prompts(**{role: own[role] if given.get(role) is None else str(given[role]) for role in own})


def _first(prompts: Mapping[str, str | None], names: tuple[str, ...]) -> str:
    return next((text for name in names if (text := prompts.get(name))), "")


class Adopted(NamedTuple):
    """Prompts and default prompt name for a model to take on."""

    prompts: dict[str, Any]
    default_prompt_name: str | None
    note: str | None
    """What a user of encode() should know."""


def adopted(model: Any, trained: Prompts) -> Adopted:
    """encode_query and encode_document take these, and so does encode() where both are the same. Its other prompts, and
    its default prompt where it can, stay."""
    prompts, name = dict(model.prompts), model.default_prompt_name
    if any(trained) or any(prompts.get(role) for role in trained._fields):
        prompts |= trained._asdict()
    default = (prompts.get(name) or "") if name else ""
    if trained.query == trained.document:
        name = name if default == trained.query else ("query" if trained.query else None)
        return Adopted(prompts, name, None)
    told = f"its default prompt '{name}' ({default!r})" if name else "no prompt"
    note = f"encode() alone takes {told}; call encode_query() and encode_document(), which have the prompts of training"
    return Adopted(prompts, name, None if default in trained and name else note)


def hold_limit(model: Any) -> int | None:
    """Its limit of tokens, special ones included, lowered to what it has positions for; None: it has none."""
    said, transformer = model.max_seq_length, model.transformers_model
    limits = [said if said and said < NO_LIMIT else None, position_limit(transformer)]
    limit = min((limit for limit in limits if limit), default=None)
    if limit and limit != said:
        model.max_seq_length = limit
    return limit


def position_limit(transformer: Any) -> int | None:
    """How many tokens it has positions for: of a table those that can be used (RoBERTa's begin behind the padding's),
    else what its config tells, as for rotary ones; None for models without, as T5."""
    if transformer is None:
        return None
    for module in transformer.modules():
        table: Any = getattr(module, "position_embeddings", None)
        if hasattr(table, "num_embeddings"):
            padding = getattr(module, "padding_idx", table.padding_idx)
            return table.num_embeddings - (padding + 1 if isinstance(padding, int) else 0)
    config = transformer.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    told = getattr(config, "max_position_embeddings", None)
    return told if isinstance(told, int) and 0 < told < NO_LIMIT else None


def ensure_padding(model: Any) -> str | None:
    """Texts of different lengths need a padding token; attention never sees it. Which kind of token took its place, if
    it had none; "" where there is none that could."""
    tokenizer = model.tokenizer
    if not hasattr(tokenizer, "pad") or tokenizer.pad_token_id is not None:
        return None
    for kind in ("eos_token", "unk_token", "bos_token"):
        if token := getattr(tokenizer, kind):
            tokenizer.pad_token = token
            return kind
    return ""
