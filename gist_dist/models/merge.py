"""`gist-dist merge`: one model of several fine-tunes of a common ancestor, by sentence-transformers and mergekit."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_folder, write_text
from gist_dist.common.text import one_line
from gist_dist.models.folder import what_is_wrong

METHODS = (
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties",
    "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "model_stock", "nearswap", "sce", "arcee_fusion",
)  # fmt: skip
"""Names of mergekit's methods."""


def merge_models(
    models: Sequence[str],
    output: Path,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: str | None = None,
    parameters: dict[str, Any] | None = None,
) -> Path:
    """Write the merged model, a stock SentenceTransformer directory, and give its place.

    models: folders of models or of runs, or Hub ids; the first one's prompts and settings are kept. weights: of each,
    for methods that take them; by default equal. base: the common ancestor, for methods that need one. parameters: of
    mergekit's method besides, such as {"t": 0.3} of slerp. UserError for what can't be merged, and before anything is
    written.
    """
    if len(models) < 2:
        raise UserError("merge takes two models or more")
    if find_spec("mergekit") is None:
        raise UserError("the package mergekit is missing; pip install 'gist-dist[merge]'")
    if weights is not None and len(weights) != len(models):
        raise UserError(f"--weights: {len(weights)} for {len(models)} models; give one for each")
    if output.exists():
        raise UserError(f"--output {output} is there already; name a new folder")
    options = dict(parameters or {}) | ({} if weights is None else {"weight": list(weights)})
    places = [model_of(model) for model in models]
    from sentence_transformers import SentenceTransformer

    try:
        merged = SentenceTransformer.merge(
            places, method, base_model=model_of(base) if base else None, parameters=options
        )
    except (ValueError, TypeError, KeyError, OSError, NotImplementedError) as error:
        raise UserError(f"{', '.join(models)} can't be merged by {method}: {one_line(error)}") from error

    def write(aside: Path) -> None:
        merged.save(str(aside), create_model_card=False)
        write_text(aside / "README.md", _card(models, method, options, base))

    try:
        write_folder(output, write)
    except OSError as error:
        raise UserError(f"--output {output}: can't be written: {error.strerror or error}") from None
    return output


def model_of(name: str) -> str:
    """The model of a run's folder, or what is named. UserError for a folder that is no model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"there is no model folder '{name}'; give a model, a run, or a Hub id")
        return name
    if (folder / "config.yaml").is_file() and (folder / "state.json").is_file():
        if not (folder / "model").is_dir():
            raise UserError(f"{name} is a run without a model; finish it first")
        folder = folder / "model"
    if wrong := what_is_wrong(folder):
        raise UserError(f"{name}: {wrong}")
    return str(folder)


def _card(models: Sequence[str], method: str, options: dict[str, Any], base: str | None) -> str:
    """Names folders by their last part: a card is published, the paths of a machine are not."""
    told = ", ".join(f"`{_name(model)}`" for model in models)
    settings = "".join(f"\n- {key}: {value}" for key, value in options.items())
    ancestor = f"\n- base: `{_name(base)}`" if base else ""
    return (
        "---\nlibrary_name: sentence-transformers\ntags:\n- sentence-transformers\n- merge\n- mergekit\n---\n\n"
        f"# Merged model\n\nThe weights of {told}, merged with mergekit by gist_dist. Prompts and settings are those "
        f"of the first.\n\n- method: {method}{settings}{ancestor}\n\nIts licence follows from theirs.\n"
    )


def _name(model: str) -> str:
    return Path(model).name if Path(model).expanduser().exists() else model
