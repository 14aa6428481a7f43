"""What workers that were killed leave behind: temporary files, unfinished plans, probes and moved leases."""

import contextlib
from pathlib import Path

from kdecs.soft_labels.leases import Leases
from kdecs.soft_labels.plan import PLAN_DIRECTORY, remove_leftovers
from kdecs.soft_labels.records import WORK_DIRECTORY


def tidy(output: Path, *, lease_s: float) -> None:
    """Remove the litter of a finished export, unless another worker is at its last step; best effort.

    A directory that cannot be written to, or that came without its working files, is left as it is.
    """
    work = output / WORK_DIRECTORY
    if not work.is_dir():
        return
    with contextlib.suppress(OSError):
        leases = Leases(work / "leases", lease_s=lease_s)
        with leases.holding("manifest") as lease:
            if lease:
                remove_litter(output, leases)


def remove_litter(output: Path, leases: Leases) -> None:
    """Remove the litter of a complete export; call it under the lease of the manifest.

    Nobody needs it any more: all shards are there. A worker that was taken for dead and still writes finds its file
    gone, and looks again.
    """
    work = output / WORK_DIRECTORY
    for leftover in (*output.glob(".*.tmp"), *work.glob(".*.tmp"), *work.glob(".*.own")):
        leftover.unlink(missing_ok=True)
    remove_leftovers(work / PLAN_DIRECTORY)
    leases.remove_litter()
