"""How long a shard takes: it is what a stopped worker loses, and what the last worker of a job is waited for."""

import math

LONG_SHARD_S = 3600.0
WANTED_SHARD_S = 600.0
MEASURED_AFTER_S = 60.0
"""A rate is believed once a shard was worked on for so long: a device's first batches are slow."""

MAX_SHARDS = 100_000


def long_shard_warning(num_shards: int, *, num_pairs: int, num_scored: int, seconds: float) -> str | None:
    """One line where a shard of `num_pairs` takes longer than LONG_SHARD_S at the rate measured so far, else None.

    `num_shards` is the config's; the line names a number with which a shard takes WANTED_SHARD_S.
    """
    if not num_scored or seconds < MEASURED_AFTER_S:
        return None
    shard_s = seconds / num_scored * num_pairs
    if shard_s <= LONG_SHARD_S:
        return None
    wanted = min(MAX_SHARDS, math.ceil(num_shards * shard_s / WANTED_SHARD_S))
    return (
        f"warning: at {num_scored / seconds:,.1f} pairs a second a shard takes {shard_s / 3600:.1f} hours, and a "
        f"worker that is stopped loses the shard in hand; with num_shards: {wanted} (in another output) it is "
        f"{WANTED_SHARD_S / 60:.0f} minutes"
    )
