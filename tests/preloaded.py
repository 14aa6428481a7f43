"""What the server of forked test processes imports before it forks (support.ForkedPython): all that stages import."""

from kdecs.runtime import import_deepspeed

import_deepspeed()

import kdecs.baselines.training  # noqa: E402
import kdecs.student.training  # noqa: E402
import kdecs.teacher.scoring  # noqa: E402
import kdecs.teacher.training  # noqa: E402, F401
