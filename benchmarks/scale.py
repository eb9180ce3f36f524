"""How trainings and fusions scale over processes, and what a thousand concepts would take.

``python benchmarks/scale.py workers|slurm|ledger|fuse|simulate``; docs/scale.md shows what it printed. Nothing else
should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONCEPTS = Path(__file__).resolve().parent.parent / "concepts"
NAMES = sorted(path.name for path in CONCEPTS.iterdir() if (path / "concept.yaml").is_file())
SHORT = ["--steps", "20", "prior.loss_weight=0"]  # of a training; its start and its loading are as long as ever


def program(*words: str, environment: dict[str, str] | None = None) -> tuple[float, str]:
    """Seconds and output of a command of this program."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "spectral_diffusion", *words], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(done.stderr)
    return time.monotonic() - start, done.stdout


def photo_folders(count: int, folder: Path) -> list[str]:
    """Folders of concepts, some of them copies under other names."""
    out = []
    for index in range(count):
        source = CONCEPTS / NAMES[index % len(NAMES)]
        place = folder / f"c{index:03d}"
        if not place.exists():
            shutil.copytree(source, place)
            (place / "concept.yaml").unlink()
            (place / "concept.yaml").write_text(f"name: c{index:03d}\nnoun: dog\ntoken: <c{index:03d}>\n")
        out.append(str(place))
    return out


def train(folders: list[str], output: Path, *more: str, environment: dict[str, str] | None = None) -> float:
    """Seconds of a batch of short trainings."""
    words = ("train", *folders, "-o", str(output), "--rank", "1", *SHORT, *more)
    return program(*words, environment=environment)[0]


def workers(folder: Path) -> None:
    """Strong scaling: the same concepts with more processes. Weak scaling: as many more concepts."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    train(photo_folders(2, folder), folder / "warm", environment=one_thread)  # spectrum into the cache
    for count in (1, 2, 4):
        strong = train(
            photo_folders(4, folder), folder / f"strong{count}", "--jobs", str(count), environment=one_thread
        )
        weak = train(
            photo_folders(2 * count, folder), folder / f"weak{count}", "--jobs", str(count), environment=one_thread
        )
        print(f"{count} processes: 4 concepts {strong:.0f} s, {2 * count} concepts {weak:.0f} s", flush=True)


def slurm(folder: Path) -> None:
    """Twelve short trainings on one and on two nodes of a core each, and the executor's own time per concept."""
    from tools.slurm import LocalSlurm

    folders = photo_folders(12, folder)
    train(folders[:2], folder / "warm")
    for nodes in (1, 2):
        cluster = LocalSlurm(folder / f"slurm{nodes}", nodes=nodes)
        cluster.start()
        try:
            output = folder / f"nodes{nodes}"
            start = time.monotonic()
            train(folders, output, "--executor", "slurm", "--cluster", "memory_gb=2", environment=cluster.environment)
            submitted = time.monotonic() - start
            while True:
                rows = json.loads(program("batch", "status", str(output), "--json", environment=cluster.environment)[1])
                if all(row["state"] in ("done", "failed") for row in rows):
                    break
                time.sleep(1)
            total = time.monotonic() - start
        finally:
            cluster.stop()
        assert all(row["state"] == "done" for row in rows), rows
        busy = sum(row["seconds"] for row in rows)
        beside = (nodes * (total - submitted) - busy) / len(rows)
        print(
            f"{nodes} nodes: {total:.0f} s from the command on, {submitted:.0f} s of them until it was submitted; jobs "
            f"{busy:.0f} s, so {beside:.1f} s per job beside",
            flush=True,
        )


def ledger(folder: Path) -> None:
    """Slots of a thousand concepts, the ledger's size, and the time to list them."""
    from spectral_diffusion.slots.ledger import Ledger, SlotRequest

    place = Ledger(folder / "slots.json")
    requests = {f"concept-{index:04d}": SlotRequest(4, "next", 4096) for index in range(1000)}
    start = time.monotonic()
    place.reserve_all("f" * 64, requests)
    seconds, size = time.monotonic() - start, place.path.stat().st_size
    listed = min(program("slots", "list", str(folder))[0] for _ in range(3))
    print(f"1,000 slots in {seconds:.2f} s, {size / 1000:.0f} kB, listed in {listed:.2f} s")


def fuse(folder: Path) -> None:
    """Gradient fusion of 4 and of 64 adapters: seconds and peak memory, in one process each."""
    from spectral_diffusion.config.train import TrainConfig
    from spectral_diffusion.models.loading import load_base
    from spectral_diffusion.training.run import train_to_file

    base, files = load_base("pocket", "cpu"), []
    for place in map(Path, photo_folders(64, folder)):
        config = TrainConfig(
            concept=place, output=folder / "adapters" / f"{place.name}.safetensors", method="lora", rank=4, steps=1,
            target_modules="attention", device="cpu", prior={"loss_weight": 0.0},
        )  # fmt: skip
        if not config.output.exists():
            train_to_file(config, base=base)
        files.append(str(config.output))
    for count, more in ((4, []), (64, []), (64, ["--executor", "local", "--jobs", "2"])):
        script = (
            "import resource, sys; from spectral_diffusion.cli import main\n"
            "try: main()\n"
            "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        start = time.monotonic()
        name = f"{count}{'shared' if more else ''}"
        words = ["fuse", *files[:count], "-o", str(folder / f"fused{name}"), "--merge", "gradient", *more]
        cache = {**os.environ, "SPECTRAL_DIFFUSION_CACHE": str(folder / f"cache{name}")}
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=cache)
        peak = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
        how = ", two processes" if more else f", peak {peak[0] / 2**20:.2f} GiB"
        print(f"{count} adapters: {time.monotonic() - start:.0f} s{how}", flush=True)


def simulate(cards: int, concepts: int, start: float, load_gb: float, disk_gbs: float, seconds: float) -> None:
    """A timeline of many trainings on many cards of one shared disk, from measured pieces.

    Args:
        start: seconds of a job before it reads its base: queue, Python, libraries.
        load_gb: that every job reads; ``disk_gbs``: gigabytes a second of the disk for all together.
        seconds: of the training itself.
    """
    # Readers share the disk; with more of them each takes longer, so a job's reading is worked out when it begins.
    free = [0.0] * cards
    reading: list[float] = []  # ends of those who read
    ends = []
    for _ in range(concepts):
        begin = heapq.heappop(free) + start
        reading = [end for end in reading if end > begin]
        read = load_gb / disk_gbs * (len(reading) + 1)
        reading.append(begin + read)
        end = begin + read + seconds
        ends.append(end)
        heapq.heappush(free, end)
    total, ideal = max(ends), concepts * (seconds + start + load_gb / disk_gbs) / cards
    print(
        f"{concepts} concepts on {cards} cards, {load_gb:g} GB each from a disk of {disk_gbs:g} GB/s: "
        f"{total / 3600:.2f} h, {ideal / total:.0%} of what a disk without limit gives"
    )


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["workers", "slurm", "ledger", "fuse", "simulate"])
    parser.add_argument("--work", type=Path, help="a folder to keep")
    arguments = parser.parse_args()
    if arguments.what == "simulate":
        for load in (0.03, 8.0, 18.0):
            for disk in (1.0, 5.0):
                simulate(64, 1000, 12.0, load, disk, 600.0)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        {"workers": workers, "slurm": slurm, "ledger": ledger, "fuse": fuse}[arguments.what](folder)
    print(f"peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
