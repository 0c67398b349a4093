"""Guided contrastive fine-tuning of text-embedding models at any batch size, on a Ray cluster.

from gist_dist import parse_config, train

summary = train(parse_config({"name": "mine", "student": {...}, "data": {...}}))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gist_dist.common.version import __version__

if TYPE_CHECKING:
    from gist_dist.common.errors import UserError
    from gist_dist.config import RunConfig
    from gist_dist.drop_in import CachedGISTEmbedLoss
    from gist_dist.on_ray.driver import train_and_evaluate as train
    from gist_dist.recipe import load_recipe, parse_config

__all__ = ["CachedGISTEmbedLoss", "RunConfig", "UserError", "__version__", "load_recipe", "parse_config", "train"]

# Imported when asked for: a recipe is read without torch, and the loss is used without ray.
_HOMES = {
    "CachedGISTEmbedLoss": "gist_dist.drop_in:CachedGISTEmbedLoss",
    "RunConfig": "gist_dist.config:RunConfig",
    "UserError": "gist_dist.common.errors:UserError",
    "load_recipe": "gist_dist.recipe:load_recipe",
    "parse_config": "gist_dist.recipe:parse_config",
    "train": "gist_dist.on_ray.driver:train_and_evaluate",
}


if not TYPE_CHECKING:  # to which every name would then be there

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'gist_dist' has no attribute '{name}'")
        module, _, attribute = _HOMES[name].partition(":")
        return getattr(import_module(module), attribute)
