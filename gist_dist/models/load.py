"""A model from a folder or the Hub, in fp32 and with its true limit of tokens; or the reason why it can't be used."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gist_dist.common.errors import UserError
from gist_dist.common.hub import go_offline_if_unreachable
from gist_dist.common.stock_model import ensure_padding, hold_limit, position_limit
from gist_dist.common.text import one_line
from gist_dist.config import GuideConfig, StudentConfig
from gist_dist.models.folder import NO_VOCABULARY, other_family, stored_dtype, what_is_wrong, what_to_say, why_it_failed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

LOADED = "_is_hf_initialized"
"""What transformers marks weights with that it has read, and modules that it has looked at."""


@dataclass(frozen=True)
class Loaded:
    """A model that can be fed token ids, and what it brought."""

    model: "SentenceTransformer"
    limit_to_save: int | None
    """As its tokenizer has it, where a number beyond any text stands for none; a higher student.max_tokens, if set."""
    stored_dtype: str | None
    """Type of its weights on disk; here they are fp32."""
    folder: Path | None
    """Where its files lie on this machine."""


def load(config: StudentConfig | GuideConfig, section: str, device: torch.device | str) -> Loaded:
    """UserError if there is no such model, or none that is fed token ids."""
    model = load_sentence_transformer(config, section, device)
    name, folder = str(config.model), _folder_of(str(config.model), config.revision)
    try:
        return _made_ready(model, config, name, section, folder)
    except (AttributeError, TypeError, LookupError, ValueError) as error:  # what its files tell is no sense
        raise UserError(f"{section}.model: '{name}' can't be used: {cause_of(error)}") from error


def _made_ready(
    model: "SentenceTransformer", config: StudentConfig | GuideConfig, name: str, section: str, folder: Path | None
) -> Loaded:
    _refuse_other_kinds(model, name, section)
    for prompt_name, text in model.prompts.items():
        if not isinstance(text, str | None):
            raise UserError(
                f"{section}.model: '{name}' has a prompt that is no text, {prompt_name!r} in "
                "config_sentence_transformers.json; fix it there"
            )
    _refuse_random_weights(model, name, section)
    model.float()  # what is stored narrower loses nothing, and small steps then add up
    _ensure_padding(model, name, section)
    _refuse_tokens_beyond_the_table(model, name, section)
    _tell_missing_end(model, name, section)
    hold_limit(model)
    positions = position_limit(transformer_of(model))
    if config.max_tokens and config.max_tokens > (positions or math.inf):
        raise UserError(
            f"{section}.max_tokens = {config.max_tokens}: {config.model} has positions for {positions} tokens; lower it"
        )
    to_save = max(model.max_seq_length or 0, config.max_tokens or 0) or None
    if config.max_tokens:
        model.max_seq_length = config.max_tokens
    return Loaded(model, to_save, stored_dtype(folder) if folder else None, folder)


def load_sentence_transformer(
    config: StudentConfig | GuideConfig, section: str, device: torch.device | str
) -> "SentenceTransformer":
    """With weights in fp32, whatever they are stored in. UserError if it can't be loaded."""
    name = config.model
    assert name is not None  # only a guide that starts as the student has none
    path = Path(name).expanduser()
    offline = not path.exists() and go_offline_if_unreachable()
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for weights that load in a second
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise UserError(f"{section}.model: no folder '{name}'; give a SentenceTransformer folder or a Hub id")
    if path.is_dir() and (wrong := what_is_wrong(path)):
        raise UserError(f"{section}.model: '{name}' can't be loaded: {wrong}")
    # Flash attention is loaded where it can run: not by the driver, which only tokenizes.
    is_flash = config.attention == "flash_attention_2"
    attention = None if is_flash and torch.device(device).type != "cuda" else config.attention
    try:
        model = SentenceTransformer(
            str(path) if looks_local else name,
            device=str(device),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            model_kwargs={"dtype": torch.float32} | ({"attn_implementation": attention} if attention else {}),
        )
    except Exception as error:
        away = offline and isinstance(error, OSError)
        found = _folder_of(name, config.revision)
        reason = (found and (what_is_wrong(found) or why_it_failed(found, config.trust_remote_code))) or cause_of(error)
        reason = "the Hub is out of reach and its cache hasn't it" if away else reason
        raise UserError(f"{section}.model: '{name}' can't be loaded: {reason}") from error
    if is_flash:
        first: Any = model[0]
        first.unpad_inputs = False  # chunks come padded
    folder = _folder_of(name, config.revision)
    if folder and (wrong := other_family(folder)):  # of the Hub
        raise UserError(f"{section}.model: '{name}' can't be used: {wrong}")
    if folder and (said := what_to_say(folder)):
        logger.warning("%s.model: '%s': %s", section, name, said)
    return model


def cause_of(error: Exception) -> str:
    """What a library's error says in a line; damaged configuration files are named as such."""
    if isinstance(error, AttributeError | TypeError | LookupError):
        import transformers

        return (
            f"its configuration files are damaged, or from a version that transformers {transformers.__version__} "
            f"doesn't know ({type(error).__name__})"
        )
    return one_line(error)


def transformer_of(model: "SentenceTransformer") -> Any:
    """The transformers model inside."""
    found = model.transformers_model
    assert found is not None  # others are refused
    return found


def _folder_of(name: str, revision: str | None) -> Path | None:
    """Where its files lie on this machine."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for repo in (name, f"sentence-transformers/{name}"):
        try:
            cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        except HFValidationError:
            continue
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _refuse_other_kinds(model: "SentenceTransformer", name: str, section: str) -> None:
    kind, transformer = type(model[0]).__name__, model.transformers_model
    if kind == "Router":
        raise UserError(
            f"{section}.model: '{name}' begins with a Router, so that queries and documents take different ways; name "
            "the model of one of them"
        )
    if transformer is None or not any(transformer is module for module in model[0].modules()):
        raise UserError(f"{section}.model: '{name}' begins with {kind}; only transformer models are supported")
    senses = {sense for m in getattr(model[0], "modalities", ()) for sense in ((m,) if isinstance(m, str) else m)}
    if others := sorted(senses - {"text", "message"}):
        raise UserError(
            f"{section}.model: '{name}' is multimodal ({', '.join(sorted(senses))}); only text models are supported, "
            f"and what it does with {others[0]} would not be kept"
        )
    if not hasattr(model.tokenizer, "pad"):
        raise UserError(f"{section}.model: '{name}' has no tokenizer of transformers; copy its tokenizer files to it")
    tokenizer = model.tokenizer
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # made up by transformers
        raise UserError(f"{section}.model: '{name}' can't be used: {NO_VOCABULARY}")


def _refuse_random_weights(model: "SentenceTransformer", name: str, section: str) -> None:
    """Weights that the files lack, transformers makes at random, and only logs it."""
    transformer = transformer_of(model)
    if not any(getattr(module, LOADED, False) for module in transformer.modules()):
        return  # by other code than transformers'
    named = {n: p for n, p in transformer.named_parameters() if "lora_" not in n}
    random = {n: p for n, p in named.items() if not getattr(p, LOADED, False)}
    if not random:
        return
    with torch.enable_grad():  # a pooler that nothing uses does no harm
        model(model.preprocess(["a text"]))["sentence_embedding"].sum().backward()
    used = [n for n, p in random.items() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    if used:
        raise UserError(
            f"{section}.model: {len(used)} of {len(named)} weights of '{name}' are not in its files ({used[0]}), and "
            "would be random; get the whole model, or the config.json that belongs to these files"
        )


def _ensure_padding(model: "SentenceTransformer", name: str, section: str) -> None:
    kind = ensure_padding(model)
    if kind == "":
        raise UserError(
            f"{section}.model: the tokenizer of '{name}' has no padding token, and none that could take its place; set "
            "pad_token in its tokenizer_config.json"
        )
    if kind:
        token = model.tokenizer.pad_token
        logger.warning("%s.model: '%s' has no padding token; its %s %r pads, as saved", section, name, kind, token)


def _refuse_tokens_beyond_the_table(model: "SentenceTransformer", name: str, section: str) -> None:
    try:
        table = transformer_of(model).get_input_embeddings()
    except NotImplementedError:
        return
    if not isinstance(table, nn.Embedding):
        return
    vocabulary = model.tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= table.num_embeddings)
    if beyond:
        number, token = beyond[0]
        raise UserError(
            f"{section}.model: the tokenizer of '{name}' knows {len(beyond):,} tokens that its model has no embedding "
            f"for ({token!r} is number {number:,}, the table has {table.num_embeddings:,} rows); call "
            "resize_token_embeddings(len(tokenizer)) and save it, or use the tokenizer that belongs to it"
        )


def _tell_missing_end(model: "SentenceTransformer", name: str, section: str) -> None:
    """Models that pool the last token are mostly made to find a mark of the end there."""
    modes = [getattr(module, "pooling_mode", ()) for module in model]
    if not any("lasttoken" in ((mode,) if isinstance(mode, str) else mode) for mode in modes):
        return
    text, bare = (model.tokenizer("the end", add_special_tokens=special)["input_ids"] for special in (True, False))
    if text and bare and text[-1] == bare[-1]:
        logger.warning(
            "%s.model: '%s' pools the last token, and its tokenizer puts no end token behind a text: the last word is "
            "pooled, in training as in use; if its card asks for one, set it in the tokenizer's post-processor",
            section,
            name,
        )
