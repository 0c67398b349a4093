"""The tables of docs/scaling.md, from the model in gist_dist/planning/cost_model.py.

python benchmarks/scaling_table.py           prints them, at once
"""

from gist_dist.planning.cost_model import GPUS, Estimate, Workload, estimate
from gist_dist.planning.model_shape import ModelShape

STUDENT = ModelShape("BAAI/bge-base-en-v1.5", 109_482_240, 85_054_464, 768, 768, 12)
GUIDE = ModelShape("WhereIsAI/UAE-Large-V1", 335_141_888, 302_309_376, 1024, 1024, 24)
SIZES, GPU_NUMBERS = (4096, 16384, 65536, 262144, 1048576), (1, 8, 64, 256, 1024)


def workload(rows: int, online: bool = False) -> Workload:
    """Triplets of 80 padded tokens a text, base student, large guide, bf16 encoders."""
    texts = 3.0 * rows
    return Workload(
        rows=rows,
        texts=texts,
        negatives=rows,
        student_tokens=80 * texts,
        guide_tokens=80 * texts * online,
        chunk_tokens=16384,
        largest_chunk=16384,
        student=STUDENT,
        guide=GUIDE,
        student_bf16=True,
        guide_bf16=True,
        contrast_anchors=True,
        contrast_positives=True,
        gather_bytes=4,
        activation_bytes_per_token=12 * 768 * 34,
        activation_budget=20e9,
        loss_budget=0.25e9,
    )


def speed_table(kind: str = "h100") -> list[str]:
    """Step seconds and the phase that takes most of them."""
    lines = [f"| rows | {' | '.join(f'{n:,} GPUs' if n > 1 else '1 GPU' for n in GPU_NUMBERS)} |"]
    lines.append("|---" * (len(GPU_NUMBERS) + 1) + "|")
    for rows in SIZES:
        told = [estimate(workload(rows), gpus, GPUS[kind]) for gpus in GPU_NUMBERS]
        lines.append(f"| {rows:,} | {' | '.join(f'{_seconds(t)}, {t.bottleneck}' for t in told)} |")
    return lines


def phase_table(kind: str = "h100", gpus: int = 64) -> list[str]:
    """Seconds by phase, network and memory on one number of GPUs."""
    phases = ("encode", "backward", "loss", "gather", "scatter", "reduce", "guide", "optimizer", "plan")
    lines = [f"| rows | {' | '.join(phases)} | GB received | GB memory |", "|---" * (len(phases) + 3) + "|"]
    for rows in SIZES:
        told = estimate(workload(rows), gpus, GPUS[kind])
        seconds = " | ".join(f"{told.seconds[phase]:.3f}" for phase in phases)
        network, memory = sum(told.network.values()) / 1e9, sum(told.memory.values()) / 1e9
        lines.append(f"| {rows:,} | {seconds} | {network:.1f} | {memory:.0f} |")
    return lines


def kind_table(rows: int = 65536, gpus: int = 8) -> list[str]:
    """The same batch on other GPUs, with the guide cached and online."""
    lines = ["| kind | cached guide | online guide | bottleneck | GB memory, of |", "|---|---|---|---|---|"]
    for kind, gpu in GPUS.items():
        cached, online = (estimate(workload(rows, online), gpus, gpu) for online in (False, True))
        memory = f"{sum(cached.memory.values()) / 1e9:.0f}, {gpu.memory_bytes / 1e9:.0f}"
        steps = f"{_seconds(cached)} | {_seconds(online)}"
        lines.append(f"| {kind} | {steps} | {cached.bottleneck} | {memory} |")
    return lines


def _seconds(told: Estimate) -> str:
    return f"{told.step_seconds:,.3g} s" if told.step_seconds < 1000 else f"{told.step_seconds:,.0f} s"


def main() -> None:
    for table in (speed_table(), phase_table(), kind_table()):
        print("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
