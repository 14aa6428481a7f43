"""What a launcher (deepspeed, torchrun, srun with a script) tells a process about itself. No torch."""

import os


def launched_rank() -> tuple[int, int, int]:
    """Rank, local rank and world size from RANK, LOCAL_RANK and WORLD_SIZE; 0, 0, 1 without a launcher."""
    return (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )


def is_main_rank() -> bool:
    """Whether this process speaks for the job, for what is said before torch is imported."""
    return launched_rank()[0] == 0
