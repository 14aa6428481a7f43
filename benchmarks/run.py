"""Run the benchmarks one after another (each in a process of its own) and print their records as a table.

python benchmarks/run.py                 # all that need no GPU
python benchmarks/run.py teacher_scoring student_step
python benchmarks/run.py --gpu           # those of an accelerator: bench files named gpu_*.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from record import RESULTS, ROOT, device_name

HELPERS = {"record", "run"}


def scripts(names: list[str], *, gpu: bool) -> list[Path]:
    """Benchmark scripts of this folder, or those named."""
    found = {
        path.stem: path
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if path.stem not in HELPERS and not path.stem.startswith("_")
    }
    unknown = [name for name in names if name not in found]
    if unknown:
        raise SystemExit(f"no benchmark {unknown[0]!r}; there are {', '.join(found)}")
    if names:
        return [found[name] for name in names]
    return [path for stem, path in found.items() if stem.startswith("gpu_") == gpu]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    if arguments.gpu and not device_name():
        print("no CUDA device: the GPU benchmarks are skipped")
        return
    failed = []
    for path in scripts(arguments.names, gpu=arguments.gpu):
        print(f"-- {path.stem}", flush=True)
        if subprocess.run([sys.executable, str(path)], cwd=ROOT, check=False).returncode != 0:
            failed.append(path.stem)
    print(f"\n{'benchmark':44} {'ratio':>8} {'target':>7}  ours / baseline")
    for path in sorted(RESULTS.rglob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "ratio" not in record:
            continue
        target = "" if record["target"] is None else f"{record['target']:g}"
        print(
            f"{path.relative_to(RESULTS).with_suffix('')!s:44} {record['ratio']:8.2f} {target:>7}  "
            f"{record['ours']:.4g} / {record['baseline']:.4g} {record['unit']} ({record['baseline_name']})"
        )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
