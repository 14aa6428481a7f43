"""Build the extension that DeepSpeed compiles for CPU ranks, so that no training has to wait for it."""

import os

from kdecs.errors import DependencyError
from kdecs.process import run_entry
from kdecs.runtime import check_extension_directory


def main() -> None:
    # Before the import, which chooses the accelerator: only CPU ranks need this extension, a minute of g++ and ninja.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    check_extension_directory()
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    try:
        ShareMemCommBuilder().load(verbose=False)
    except (RuntimeError, OSError) as error:
        last = str(error).strip().splitlines()[-1]
        raise DependencyError(
            f"DeepSpeed's CPU helper does not compile ({last}): install g++ and ninja"
        ) from None


if __name__ == "__main__":
    run_entry(main)
