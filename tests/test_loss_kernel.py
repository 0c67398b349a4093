"""The Triton kernels of loss_kernel.py against the plain path and the formulas of the design.

On a GPU where there is one, else in Triton's interpreter: in a process of its own, since the interpreter has to be
asked for before Triton is imported.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from test_loss import FLAGS, MARGINS, Case, blocks_of, config_of
from torch.nn import functional as F

from gist_dist.config import LossConfig
from gist_dist.core.candidates import BatchIndex, LossShare
from gist_dist.core.loss import gist_loss

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton, of the dev extra, is only for Linux")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = {"rows": 128, "candidates": 128, "step": 64, "owners": 128, "others": 128, "gradient_step": 64}
"""The interpreter's time goes by the number of tiles."""


@pytest.fixture(scope="module")
def worker():
    """A process that has the kernels."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_choose_interpreter, initargs=(DEVICE == "cpu",)) as pool:
        yield pool


def _choose_interpreter(interpret: bool) -> None:
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def fused(worker, student, guide, batch, blocks, config, sizes=None, precision="highest", **limits) -> LossShare:
    """sizes: of tiles; limits: module constants of loss_kernel, to meet with few rows what many rows meet."""
    return worker.submit(_fused, student, guide, batch, blocks, config, sizes or {}, precision, limits).result()


def _fused(student, guide, batch, blocks, config, sizes, precision, limits) -> LossShare:
    from gist_dist.core import loss_kernel

    usual = dict(vars(loss_kernel))
    if sizes:
        limits |= {"TILES": dict.fromkeys(loss_kernel.TILES, loss_kernel.Tiles(**sizes))}
    torch.set_float32_matmul_precision(precision)
    try:
        vars(loss_kernel).update(limits)
        guide = None if guide is None else guide.to(DEVICE)
        share = gist_loss(student.to(DEVICE), guide, batch.to(torch.device(DEVICE)), blocks, config, kernel=True)
    finally:
        vars(loss_kernel).update({name: usual[name] for name in limits})
        torch.set_float32_matmul_precision("highest")
    counts = {name: value.cpu() for name, value in share.counts.items()}
    return LossShare(share.loss.cpu(), share.gradient.cpu(), counts)


def fused_case(worker, case: Case, config: LossConfig, guided=True, block=None, **options) -> LossShare:
    guide = case.guide.float() if guided else None
    return fused(worker, case.student.float(), guide, case.batch, blocks_of(len(case.rows), block), config, **options)


def assert_as_good(share: LossShare, plain: LossShare, exact: LossShare) -> None:
    """No further from fp64 than twice what the plain path is in fp32, or than rounding the result once more."""
    error, plain_error = ((s.gradient - exact.gradient).norm() for s in (share, plain))
    assert error <= 2 * plain_error + 2e-7 * exact.gradient.norm()
    assert abs(share.loss - exact.loss) <= 2 * abs(plain.loss - exact.loss) + 1e-7 * exact.loss
    # Weights, and what only the plain path's rules drop, the kernel leaves out.
    plain_only = {name for name in exact.counts if "weight" in name} | {"known_dropped", "promoted"}
    assert exact.counts.keys() - plain_only <= share.counts.keys() <= exact.counts.keys()
    for name in share.counts:
        value = exact.counts[name]
        tolerance = 1e-6 if name.endswith("similarity") or "weight" in name else 0
        assert share.counts[name].item() == pytest.approx(value.item(), rel=tolerance, abs=10 * tolerance), name


@pytest.mark.parametrize("negatives", ["none", "ragged", "many in one row"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("margin", [None, *MARGINS])
def test_kernels_are_as_good_as_the_plain_path(worker, margin, flags, negatives):
    """None: no guide."""
    case, guided = Case(27, negatives), margin is not None
    config = config_of(margin or ("absolute", 0.0), flags)
    exact, plain = case.share(config, guided), case.share(config, guided, dtype=torch.float32)
    assert exact.counts["identical_dropped"] >= 3
    assert_as_good(fused_case(worker, case, config, guided, block=5), plain, exact)


def test_kernels_equal_the_reference(worker):
    """Which knows nothing of loss.py."""
    case, config = Case(27), config_of(("relative", 0.05))
    loss, gradient, counts = case.expected(config)
    share = fused_case(worker, case, config)
    assert counts["masked_ap"] > 0 and share.counts["masked_ap"] == counts["masked_ap"]
    torch.testing.assert_close(share.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(share.gradient, gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_rows", [252, 507, 123])
def test_awkward_sizes(worker, num_rows):
    """More than one tile, one piece and one span; several programs share a tile's gradients, or one has them all."""
    case, config = Case(num_rows, seed=num_rows), config_of(("relative", 0.05))
    exact, plain = case.share(config), case.share(config, dtype=torch.float32)
    for programs in (1, 7) if num_rows == 252 else (7,):
        limits = {"PIECE": 256, "BITS_BYTES": 4 * 256 * 60, "PROGRAMS": programs}
        assert_as_good(fused_case(worker, case, config, block=11, sizes=LARGE, **limits), plain, exact)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_temperatures(worker, temperature):
    case, config = Case(64, seed=2), config_of(temperature=temperature)
    exact, plain = case.share(config), case.share(config, dtype=torch.float32)
    assert_as_good(fused_case(worker, case, config, sizes=LARGE), plain, exact)


@pytest.mark.parametrize(("student_width", "guide_width"), [(384, 1024), (1, 33), (100, 16)])
def test_widths(worker, student_width, guide_width):
    """Topics repeat, so that the guide has something to mask."""
    random, index, num_rows = torch.Generator().manual_seed(0), torch.arange(40), 20
    topics = torch.randn(5, 1024, generator=random, dtype=torch.float64)[index % 5]
    student, guide = (
        F.normalize(topics[:, :width] + torch.randn(40, width, generator=random, dtype=torch.float64), dim=1)
        for width in (student_width, guide_width)
    )
    batch, blocks, config = BatchIndex(index[:20], index[20:], index[:0], index), [range(num_rows)], config_of()
    exact = gist_loss(student, guide, batch, blocks, config)
    plain = gist_loss(student.float(), guide.float(), batch, blocks, config)
    assert exact.counts["masked_ap"] > 0
    assert_as_good(fused(worker, student.float(), guide.float(), batch, blocks, config), plain, exact)


def test_guide_in_half_precision_is_taken_as_it_is(worker):
    case, config = Case(40, seed=3), config_of()
    case.guide = case.guide.half().double()
    exact, plain = case.share(config), case.share(config, dtype=torch.float32)
    half = case.student.float(), case.guide.half(), case.batch, blocks_of(40, None), config
    assert_as_good(fused(worker, *half), plain, exact)
    assert_as_good(gist_loss(*half), plain, exact)


def test_shares_of_workers_add_up(worker):
    """Also that of a worker without rows, and that of a single row; gradients to fp32 rounding.

    Embeddings of few bits, whose products are exact in fp32: the matrix products of some CPUs, where the interpreter
    runs, round a row by its place in the tile.
    """
    case, config = Case(27), config_of(("absolute", 0.1))
    case.student, case.guide = ((table * 2**10).round() / 2**10 for table in (case.student, case.guide))
    whole, blocks = fused_case(worker, case, config), [range(0, 1), range(1, 12), range(12, 27)]
    tables = case.student.float(), case.guide.float(), case.batch
    shares = [fused(worker, *tables, blocks[rank:][:1], config) for rank in range(4)]
    assert shares[3].loss == 0 and not shares[3].gradient.any()
    torch.testing.assert_close(sum(s.loss for s in shares), whole.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(s.gradient for s in shares), whole.gradient, rtol=0, atol=1e-6)
    for name, value in whole.counts.items():
        assert sum(s.counts[name] for s in shares).item() == pytest.approx(value.item(), rel=1e-12), name


def test_results_repeat_bit_for_bit(worker):
    case, config = Case(100, seed=4), config_of()
    first, second = (fused_case(worker, case, config, sizes=LARGE, PROGRAMS=4) for _ in range(2))
    assert first.loss == second.loss and torch.equal(first.gradient, second.gradient)


def test_rows_without_candidates_have_no_loss_and_no_gradient(worker):
    case = Case(12, duplicates=False)
    share = fused_case(worker, case, config_of(("absolute", 3.0)))  # masks everything
    assert share.loss == 0 and not share.gradient.any()
    assert share.counts["rows_without_negatives"] == 12
    one = BatchIndex(*(torch.tensor(texts, dtype=torch.long) for texts in ([0], [1], [], [0, 1])))
    share = fused(worker, case.student[:2].float(), case.guide[:2].float(), one, [range(1)], config_of())
    assert share.loss == 0 and not share.gradient.any() and share.counts["identical_dropped"] == 0


def test_equal_guide_vectors_tie(worker):
    """A copy of the positive that the student tells apart: no false negative, whatever the rounding."""
    random, index = torch.Generator().manual_seed(1), torch.arange(80)
    student = F.normalize(torch.randn(80, 24, generator=random), dim=1)
    guide = F.normalize(torch.randn(80, 100, generator=random), dim=1)
    guide[41:] = guide[40]  # all positives are one to the guide
    batch = BatchIndex(index[:40], index[40:], index[:0], index)
    share = fused(worker, student, guide, batch, blocks_of(40, None), config_of(flags=(True, False)))
    assert share.counts["masked_ap"] == 0 < share.counts["masked_aa"]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_less_precise_products_on_request(worker, precision):
    """The interpreter knows none: there it shows that their tiles work."""
    case, config = Case(70, seed=5), config_of(flags=(True, False))
    exact = case.share(config, guided=False)
    share = fused_case(worker, case, config, guided=False, precision=precision)
    tolerance = {"high": 1e-5, "medium": 1e-2}[precision]
    assert abs(share.loss - exact.loss) < tolerance * exact.loss
    assert (share.gradient - exact.gradient).norm() < tolerance * exact.gradient.norm()


def test_the_kernel_refuses_rules_that_it_does_not_know():
    case = Case(9)
    config = config_of().model_copy(update={"guard_negatives": True, "in_batch": False})
    with pytest.raises(ValueError, match="in_batch, guard_negatives; leave kernel=True out"):
        gist_loss(case.student.float(), None, case.batch, [range(9)], config, kernel=True)


def test_kernels_compile_for_nvidia_without_atomics(tmp_path, monkeypatch):
    """Down to Hopper's machine code, which needs no GPU; also shows that jaxtyping's hook leaves kernels alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gist_dist.core import loss_kernel

    pointers = {"guide": "fp16", "gradients": "fp64", "log_sums": "fp64", "bits": "i32", "num_identical": "i32"}
    pointers |= {"num_masked": "i32"} | dict.fromkeys(("table", "student", "thresholds", "shifts", "scales"), "fp32")
    pointers |= {"scores": "fp32"} | dict.fromkeys(("queries", "candidates", "owners", "others"), "i64")
    pointers |= dict.fromkeys(("anchor_identity", "positive_identity", "candidate_identity"), "i64")
    sizes = {name.upper(): size for name, size in vars(loss_kernel.TILES["ieee"]).items()}
    constants = sizes | {"PIECE": loss_kernel.PIECE, "PRECISION": "ieee", "GUIDED": True, "QUERIES_OWN": False}
    for kernel in (loss_kernel._own_scores, loss_kernel._forward, loss_kernel._gradients):
        signature = {name: "constexpr" if name.isupper() else "i32" for name in kernel.arg_names}
        signature |= {name: f"*{kind}" for name, kind in pointers.items() if name in signature}
        signature |= {"inverse_temperature": "fp32"} if "inverse_temperature" in signature else {}
        values = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name.isupper()}
        source = ASTSource(kernel, signature, constexprs=values)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=loss_kernel.OPTIONS)
        assert compiled.asm["cubin"] and "fma.rn.f32" in compiled.asm["ptx"]
        assert not {"atom", "red"} & {line.split(".")[0].strip() for line in compiled.asm["ptx"].splitlines()}
