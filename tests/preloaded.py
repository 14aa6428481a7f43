"""What the server of forked test processes imports before it forks (support.ForkedPython): all that stages import."""

import gc

from kdecs.runtime import import_deepspeed

gc.disable()  # as in conftest.py; what is frozen is also not copied into the forked process by a collection there
import_deepspeed()

import kdecs.baselines.training  # noqa: E402
import kdecs.student.training  # noqa: E402
import kdecs.teacher.scoring  # noqa: E402
import kdecs.teacher.training  # noqa: E402, F401

gc.freeze()
gc.enable()
