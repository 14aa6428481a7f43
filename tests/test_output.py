"""Where a command may write: inputs are refused under any name, and only files are ever replaced."""

import contextlib
import importlib
import io
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import child_environment

from kdecs.corpus.reading import bundled_sample
from kdecs.errors import OutputError
from kdecs.output import is_standard_output, open_output, refuse_inputs


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, data: bytes = b"new\n") -> None:
    with open_output(path) as file:
        file.write(data)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A corpus file under three names, a model directory under two, and an empty directory."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.jsonl").write_text("in")
    (tmp_path / "link.jsonl").symlink_to("data/in.jsonl")
    os.link(tmp_path / "data" / "in.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "base" / "onnx").mkdir(parents=True)
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "also-base").symlink_to("base")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("output", "inputs", "message"),
    [
        ("data/in.jsonl", ["data/in.jsonl"], "is the input .* itself"),
        ("data/../out/../data/in.jsonl", ["data/in.jsonl"], "is the input"),
        ("link.jsonl", ["data/in.jsonl"], "is the input"),
        ("hard.jsonl", ["base", "link.jsonl"], "is the input"),
        ("base/config.json", ["base"], "lies inside"),
        ("base/predictions.jsonl", ["also-base"], "lies inside"),
        ("also-base/new/predictions.jsonl", ["base"], "lies inside"),
        ("out/new.jsonl", ["data/in.jsonl", "base", "missing"], None),
        ("data/in.jsonl.gz", ["data/in.jsonl"], None),
        ("base-2.jsonl", ["base"], None),
    ],
)
def test_a_file_that_is_or_lies_in_an_input_is_refused(places, output, inputs, message):
    expectation = pytest.raises(OutputError, match=message) if message else contextlib.nullcontext()
    with expectation:
        refuse_inputs(places / output, [places / name for name in inputs])


@pytest.mark.parametrize(
    ("output", "source", "message"),
    [
        ("base", "base", "is the input"),
        ("also-base", "base", "is the input"),
        ("base/student", "also-base", "lies inside"),
        (".", "base", "holds .*base"),
        ("data", "data/in.jsonl", None),  # a corpus beside the outputs harms nobody
        ("base", "base/config.json", "holds .*config.json"),
        ("data/in.jsonl", "base", "is a file, expected a directory"),
        ("out", "base", None),
        ("ba", "base", None),
    ],
)
def test_a_directory_that_is_or_holds_or_lies_in_an_input_is_refused(places, output, source, message):
    expectation = pytest.raises(OutputError, match=message) if message else contextlib.nullcontext()
    with expectation:
        refuse_inputs(places / output, [None, places / source], is_directory=True)


def test_a_sweep_may_hold_its_teachers_but_not_among_its_trials(places):
    (places / "out" / "labels").mkdir()
    refuse_inputs(places / "out", [places / "out" / "labels"], is_directory=True, may_hold=True)
    (places / "out" / "trials" / "a").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"holds .*trials/a"):
        refuse_inputs(places / "out", [places / "out" / "trials" / "a"], is_directory=True, may_hold=True)


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("train_student", {"output": "also-base", "cache": "cache"}),
        ("train_student", {"output": "base/student", "cache": "cache"}),
        ("train_student", {"output": ".", "cache": "/nowhere"}),
        ("train_student", {"output": "out", "cache": "base/onnx"}),
        ("train_teacher", {"output": "base"}),
        ("train_baseline", {"output": "base/onnx"}),
        ("export_soft_labels", {"output": "also-base/labels", "teacher": "base"}),
        ("cross_fit", {"output": "out", "work": "base/onnx"}),
        ("cross_fit", {"output": "base"}),
    ],
)
def test_each_stage_refuses_to_write_where_it_reads(places, monkeypatch, entry, values):
    """Before anything else: the base here is no model at all."""
    configs = {
        "train_baseline": "kec",
        "export_soft_labels": "smollm2-135m",
        "cross_fit": "tiny",
    }
    model = {"export_soft_labels": "base", "cross_fit": "teacher.model.base"}.get(entry, "model.base")
    places_of = {key: str(places / value) for key, value in values.items()} | {model: str(places / "base")}
    places_of |= {f"corpus.{split}": str(bundled_sample(split)) for split in ("train", "valid")}
    if entry != "train_teacher":
        places_of["corpus.test"] = str(bundled_sample("test"))
    settings = [part for key, value in places_of.items() for part in ("--set", f"{key}={value}")]
    default = "minilm-kd" if entry == "train_student" else "roberta-base"
    monkeypatch.setattr(sys, "argv", [entry, "--config", configs.get(entry, default), *settings])
    before = sorted(places.rglob("*"))
    with pytest.raises(OutputError, match=r"base.*choose another output"):
        importlib.import_module(f"kdecs.launch.{entry}").main()
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_is_replaced_at_the_end_and_a_link_to_it_stays(tmp_path, is_link):
    target = tmp_path / "target"
    target.write_text("old")
    path = tmp_path / "link" if is_link else target
    if is_link:
        path.symlink_to("target")

    def fail() -> None:
        with open_output(path) as file:
            file.write(b"half")
            assert target.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    write(path)
    assert target.read_text() == "new\n" and path.is_symlink() == is_link
    assert entries(tmp_path) == sorted({"target", path.name})


def test_a_new_file_and_the_target_of_a_link_are_made_with_their_folders(tmp_path):
    (tmp_path / "link").symlink_to("a/b/target")
    write(tmp_path / "link")
    write(tmp_path / "c" / ("d" * 255))
    assert (tmp_path / "a" / "b" / "target").read_text() == "new\n"
    assert entries(tmp_path / "c") == ["d" * 255]


def test_a_pipe_is_written_through_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join()
    assert read == [b"new\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode) and entries(tmp_path) == ["pipe"]


def test_an_open_descriptor_is_written_where_it_stands(tmp_path):
    """As a shell passes `/dev/fd/63`, and `>> log` as /dev/stdout."""
    log = tmp_path / "log"
    log.write_bytes(b"kept\n")
    with log.open("ab") as file:
        write(Path(f"/dev/fd/{file.fileno()}"))
        write(Path(f"/proc/self/fd/{file.fileno()}"))
    assert log.read_bytes() == b"kept\nnew\nnew\n"
    with log.open("rb") as file:
        for number in (file.fileno(), 987):
            with pytest.raises(OutputError, match="not open for writing"):
                write(Path(f"/dev/fd/{number}"))
    assert is_standard_output(Path("-")) and is_standard_output(Path("/dev/stdout"))
    assert not is_standard_output(Path("/dev/stderr")) and not is_standard_output(None)


def test_a_reader_that_ends_first_is_one_line(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)

    def fill() -> None:
        with open_output(Path(f"/dev/fd/{writer}")) as file:
            for _ in range(100):
                file.write(b"x" * 1000)

    with pytest.raises(OutputError, match="its reader ended"):
        fill()
    os.close(writer)


def test_a_device_is_written_through():
    before = os.stat("/dev/null")
    write(Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.path.samestat(before, os.stat("/dev/null"))
    with pytest.raises(OSError, match="No space left"):
        write(Path("/dev/full"))


@pytest.mark.parametrize("name", ["a directory", "a socket"])
def test_what_cannot_be_written_to_is_refused_before_the_work(tmp_path, name):
    import socket

    path = tmp_path / "place"
    if name == "a directory":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(OutputError, match=f"is {name}, expected a file"), open_output(path):
        pytest.fail("the work has begun")


def test_standard_output_takes_bytes_in_their_order(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    print("first")
    write(Path("-"))
    print("last", flush=True)
    assert stream.buffer.getvalue() == b"first\nnew\nlast\n"  # type: ignore[attr-defined]


def test_streams_that_are_files_are_refused_as_inputs_too(tmp_path):
    """`kdecs … --input F --output - >> F`, and `--input - --output F < F`."""
    path = tmp_path / "F"
    path.write_text("in\n")
    program = (
        "import sys\nfrom pathlib import Path\nfrom kdecs.output import refuse_inputs\n"
        "from kdecs.process import exit_code_of\n"
        f"F, S = Path({str(path)!r}), Path('-')\n"
        "code = [exit_code_of(lambda: refuse_inputs(*pair)) for pair in ((F, [S]), (S, [F]), (S, [S]))]\n"
        "sys.stderr.write(str(code))"
    )
    with path.open("ab") as out, path.open("rb") as source:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdin=source, stdout=out, stderr=subprocess.PIPE, env=child_environment(), check=False,
        )  # fmt: skip
    assert done.stderr.decode().endswith("[1, 1, 1]"), done.stderr
    assert path.read_text() == "in\n"


WAITS = """
import sys
from pathlib import Path
from kdecs import cli
from kdecs.output import open_output

def app(standalone_mode):
    with open_output(Path(sys.argv[1])) as file:
        file.write(b"half")
        print("ready", flush=True)
        sys.stdin.read()

cli.app = app
cli.main()
"""


def test_a_command_that_is_ended_leaves_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", WAITS, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
    ) as command:
        assert command.stdout is not None and command.stdout.readline() == b"ready\n"
        assert len(entries(tmp_path)) == 1
        command.terminate()
        assert command.wait(60) == 143
    assert entries(tmp_path) == []
