"""The export command itself in this process, with the stand-in teacher in the place of the real one."""

import runpy
import signal
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import yaml
from fake_teacher import FakeScorer

from kdecs.soft_labels.config import ExportConfig

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "export_soft_labels.py"


class StandInScorer:
    """In the place of `kdecs.teacher.scoring.TeacherScorer`."""

    @classmethod
    def load(cls, directory: Path, **settings: object) -> FakeScorer:
        del settings
        return FakeScorer(directory)


def run_command(config: ExportConfig, folder: Path) -> int:
    """The exit code of `launch/export_soft_labels.py --config FILE`; the file is written into a folder."""
    path = folder / "export.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return run_script(path)


def run_script(path: Path) -> int:
    """The exit code of `launch/export_soft_labels.py --config PATH`."""
    scoring = ModuleType("kdecs.teacher.scoring")
    scoring.TeacherScorer = StandInScorer  # type: ignore[attr-defined]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    known = sys.modules.get(scoring.__name__)
    sys.modules[scoring.__name__] = scoring
    with (
        mock.patch.dict("os.environ", {"KDECS_DEVICE": "cpu"}),
        mock.patch.object(sys, "argv", [str(SCRIPT), "--config", str(path)]),
    ):
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            del sys.modules[scoring.__name__]
            sys.modules |= {} if known is None else {scoring.__name__: known}
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0
