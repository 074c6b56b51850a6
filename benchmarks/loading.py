"""What loading a steering costs, without its base model: time, memory and size on disk.

    python benchmarks/loading.py [FOLDER] [--repeats N]

FOLDER is a steering repo, by default the real one for Qwen3-30B-A3B. The time is beside that of
reading the same two files as plain bytes, so that a slow disk shows.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from steered_moe import RouterSteering
from steered_moe.repo_config import CONFIG_FILE, TENSOR_FILE

REAL = Path(__file__).parent.parent / "examples" / "qwen3-30b-a3b-english-shared"


def milliseconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Sorted times of single calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)


def peak(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that Python allocates at most while it runs, and bytes of the result's tensors."""
    tracemalloc.start()
    steering = run()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    held = [getattr(steering, name) for name in ("layers", "weights", "force")]
    return most, sum(t.nbytes for t in held if t is not None)


def main(folder: Path, repeats: int) -> dict[str, float]:
    """Print and return the numbers."""
    files = [folder / CONFIG_FILE, folder / TENSOR_FILE]
    first = milliseconds(lambda: RouterSteering.load(folder), 1)[0]
    times = milliseconds(lambda: RouterSteering.load(folder), repeats)
    plain = milliseconds(lambda: [file.read_bytes() for file in files], repeats)
    most, tensors = peak(lambda: RouterSteering.load(folder))
    numbers = {
        "first load, ms": first,
        "median load, ms": statistics.median(times),
        "slowest load, ms": times[-1],
        "median of reading the bytes, ms": statistics.median(plain),
        "bytes on disk": sum(file.stat().st_size for file in files),
        "bytes of tensors": tensors,
        "peak bytes of Python objects": most,
    }
    for name, value in numbers.items():
        print(f"{name:>34}: {value:,.2f}" if value < 1000 else f"{name:>34}: {value:,.0f}")
    return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=REAL)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.repeats)
