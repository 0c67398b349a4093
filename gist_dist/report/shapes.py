"""What the files of a run must hold for the report and the model card to be made of them."""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from gist_dist.common.untrusted import Number, Shape

Count = Number | None
"""As JSON tells it, or not known."""
ABSENT: Any = None
"""May be left out, but is not null."""


class ModelSection(Shape):
    model: str | None = None
    prompts: dict[str, str | None] | None = None


class StudentSection(ModelSection):
    model: str


class RecipeSource(Shape):
    path: str
    license: str | None = None


class DataSection(Shape):
    sources: list[RecipeSource]
    root: str | None = None


class BatchSection(Shape):
    global_size: Count = None


class OptimSection(Shape):
    max_grad_norm: Count = None


class EvaluateSection(Shape):
    tasks: list[str] | None = None
    keep_best: str | None = None
    stop_after: Count = None
    least_gain: Count = None


class BenchmarkTasks(Shape):
    """An entry of mteb/benchmarks.json."""

    name: str
    tasks: list[str]
    left_out: list[str] = ABSENT
    private: list[str] = ABSENT


class HubSection(Shape):
    repo_id: str | None = None
    license: str | None = None
    language: list[str] | None = None


class TrackingSection(Shape):
    hub: HubSection | None = None


class Recipe(Shape):
    """config.yaml, of any version."""

    name: str | None = None
    student: StudentSection
    guide: ModelSection | None = None
    data: DataSection
    batch: BatchSection | None = None
    loss: dict[str, Any] | None = None
    optim: OptimSection | None = None
    evaluate: EvaluateSection | None = None
    tracking: TrackingSection | None = None
    environment: dict[str, Any] | None = None


class SourceAccount(Shape):
    name: str
    path: str
    rows_read: Number
    rows_used: Number
    dropped: dict[str, Number] = ABSENT
    first_dropped: list[str] = ABSENT
    rows_added: Number = 0
    recipe_source: Annotated[int, Field(ge=0)] | None = None
    weight: Count = None
    rows_per_epoch: Count = None
    distinct_texts: Count = None
    duplicates_admitted: Count = None
    why_duplicates: str | None = None


class DataSummary(Shape):
    """data.json."""

    sources: list[SourceAccount] = ABSENT
    reports: list[SourceAccount] = ABSENT
    num_rows: Count = None
    num_positives: Count = None
    num_texts: Count = None
    steps: Count = None
    steps_per_epoch: Count = None
    rows_moved: Count = None
    duplicates_admitted: Count = None
    content: str | None = None


class Step(Shape):
    """A line of metrics.jsonl. Of its other values those that are no numbers are passed over."""

    step: Annotated[int, Field(ge=0, le=10**15)]
    epoch: Count = None
    rows: Count = None
    sources: dict[str, Any] = ABSENT
    seconds: dict[str, Any] = ABSENT


class MaskedExample(Shape):
    chosen: str
    source: str
    block: str
    anchor: str
    positive: str
    candidate: str
    row: Number
    threshold: Number
    guide_positive: Number
    guide_candidate: Number
    student_positive: Number
    student_candidate: Number


class MaskedExamples(Shape):
    """masked_examples.json."""

    step: Count = None
    num_rows: Count = None
    num_candidates: Count = None
    num_masked: Count = None
    examples: list[MaskedExample] = ABSENT


class Module(Shape):
    """An entry of a SentenceTransformer's modules.json."""

    type: str
    path: Annotated[str, Field(max_length=200)]


class Pooling(Shape):
    pooling_mode: str | list[str] | None = None
    embedding_dimension: int | None = None


class TokenizerSettings(Shape):
    model_max_length: Count = None


class KeptPrompts(Shape):
    prompts: dict[str, str | None] | None = None


RECIPE, DATA, STEP, EXAMPLES = (TypeAdapter(shape) for shape in (Recipe, DataSummary, Step, MaskedExamples))
MODULES, POOLING_SETTINGS, TOKENIZER_SETTINGS = (
    TypeAdapter(list[Module]),
    TypeAdapter(Pooling),
    TypeAdapter(TokenizerSettings),
)
KEPT_PROMPTS = TypeAdapter(KeptPrompts)
BENCHMARKS = TypeAdapter(list[BenchmarkTasks])
FAILURES = TypeAdapter(dict[str, dict[str, Any]])
"""mteb/failures.json: label (baseline, trained, guide) → task → error."""
