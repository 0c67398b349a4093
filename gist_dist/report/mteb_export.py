"""A run's MTEB results in the layout of MTEB's own ResultCache, ready to be loaded, compared and submitted.

``mteb.ResultCache("runs/NAME/mteb").load_results()`` reads mteb/results/OWNER__NAME/REVISION/TASK.json, which MTEB's
own code writes here from mteb/baseline, mteb/trained and mteb/guide.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.config import RunConfig
from gist_dist.evaluation.evaluate import result_files
from gist_dist.evaluation.tasks import import_mteb
from gist_dist.report.publish import pushed_commit

UNKNOWN_REVISION = "no_revision_available"
"""What MTEB writes where it knows none."""


class Named(NamedTuple):
    """What MTEB calls a model."""

    name: str
    """OWNER/NAME; the owner "local" has no account on the Hub."""
    revision: str | None = None
    """Commit on the Hub; null: a hash of the model's content."""
    adapted_from: str | None = None
    """Hub id of the model it was trained from."""


def export_run(config: RunConfig, run_dir: Path) -> None:
    """Write run_dir/mteb/results for all models of a run that have results."""
    student, guide = config.student, config.guide
    hub = config.tracking.hub.repo_id
    models = {
        "trained": Named(hub or f"local/{config.name}", pushed_commit(run_dir, hub), _on_hub(student.model)),
        "baseline": Named(_name(student.model), student.revision),
    }
    if guide and guide.model:
        models["guide"] = Named(_name(guide.model), guide.revision)
    folder = Path(run_dir) / "mteb"
    shutil.rmtree(folder / "results", ignore_errors=True)  # of a name or revision that the model had before
    export_results(folder, models, config.evaluate.batch_size)


def export_results(folder: Path, models: dict[str, Named], batch_size: int) -> None:
    """Write folder/results from folder/<label>, under the names that MTEB shall know the labels by.

    batch_size: of the evaluation, which MTEB notes. Raises UserError for a damaged result.
    """
    for label, named in models.items():
        if files := result_files(Path(folder) / label):
            _export(Path(folder), files, named, batch_size)


def _export(folder: Path, files: list[Path], named: Named, batch_size: int) -> None:
    import_mteb()
    from mteb import ResultCache, TaskResult
    from mteb.models import ModelMeta

    try:
        known = json.loads((files[0].parent / "model_meta.json").read_text(encoding="utf-8"))
        identity = json.loads((files[0].parent / "details" / files[0].name).read_text(encoding="utf-8"))["model"]
        revision = known["revision"] if known["revision"] != UNKNOWN_REVISION else identity
        known |= {"name": named.name, "revision": named.revision or revision}
        known |= {"adapted_from": named.adapted_from} if named.adapted_from else {}
        known.pop("is_cross_encoder", None)  # MTEB writes it and warns of it when it reads
        meta = ModelMeta.model_validate_json_resolved(json.dumps(known))
        results = [TaskResult.from_disk(file) for file in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"not as an evaluation leaves it ({one_line(error)}); delete it and evaluate again"
        raise UserError(f"{files[0].parent}: {problem}") from None
    cache = ResultCache(folder)
    for result in results:
        cache.save_to_cache(result, meta, encode_kwargs={"batch_size": batch_size})


def _name(model: str) -> str:
    return _on_hub(model) or f"local/{Path(model).name}"


def _on_hub(model: str) -> str | None:
    """OWNER/NAME, the only form that MTEB takes."""
    looks = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    return model if looks and not Path(model).exists() else None
