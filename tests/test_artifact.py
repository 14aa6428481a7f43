"""Artifact directories: damage of every kind is found, nothing half-written counts."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kdecs.artifact import (
    MANIFEST_NAME,
    atomic_path,
    check_output,
    content_checksum,
    file_lock,
    has_valid_checksum,
    install_files,
    is_complete,
    listed_file,
    read_manifest,
    read_verified_manifest,
    remove_leftovers,
    share_files,
    temporary_folder,
    verify_artifact,
    write_manifest,
)
from kdecs.errors import ArtifactError, OutputError


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "labels"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.bin").write_bytes(bytes(range(256)) * 16)
    (directory / "sub" / "b.txt").write_text("text")
    write_manifest(
        directory,
        "soft-labels",
        config_hash="c" * 64,
        inputs={"corpus": "d" * 64},
        files=["a.bin", "sub/b.txt"],
        rows={"a.bin": 7},
        details={"words": ["because"]},
    )
    return directory


def test_whole_directory_has_no_fault(artifact: Path) -> None:
    assert verify_artifact(artifact) == []
    manifest = read_manifest(artifact, "soft-labels")
    assert [(f.path, f.bytes, f.rows) for f in manifest.files] == [("a.bin", 4096, 7), ("sub/b.txt", 4, None)]
    assert is_complete(artifact, "soft-labels", "c" * 64)
    assert not is_complete(artifact, "soft-labels", "e" * 64)


@pytest.mark.parametrize("offset", [0, 1, 2047, 4095])
def test_each_flipped_byte_is_found(artifact: Path, offset: int) -> None:
    data = bytearray((artifact / "a.bin").read_bytes())
    data[offset] ^= 1
    (artifact / "a.bin").write_bytes(data)
    assert [fault.split(": ")[1][:6] for fault in verify_artifact(artifact)] == ["sha256"]


def test_every_fault_is_told_not_only_the_first(artifact: Path) -> None:
    (artifact / "a.bin").write_bytes(b"short")
    (artifact / "sub" / "b.txt").unlink()
    faults = verify_artifact(artifact)
    assert len(faults) == 2
    assert "5 bytes, the manifest says 4096" in faults[0]
    assert "missing" in faults[1]
    assert not is_complete(artifact, "soft-labels", "c" * 64)


def test_directory_without_manifest_is_unfinished(artifact: Path) -> None:
    (artifact / MANIFEST_NAME).unlink()
    assert not is_complete(artifact, "soft-labels", "c" * 64)
    with pytest.raises(ArtifactError, match="unfinished"):
        read_manifest(artifact)


def test_wrong_kind_is_named(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="holds a soft-labels, expected a teacher"):
        read_manifest(artifact, "teacher")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside", "a\\b", ""])
def test_paths_that_leave_the_directory_are_refused(artifact: Path, name: str) -> None:
    manifest = json.loads((artifact / MANIFEST_NAME).read_text())
    manifest["files"][0]["path"] = name
    (artifact / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside"):
        read_manifest(artifact)


def test_link_out_of_the_directory_is_refused(artifact: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("text")
    (artifact / "sub" / "b.txt").unlink()
    (artifact / "sub" / "b.txt").symlink_to(secret)
    with pytest.raises(ArtifactError, match="link"):
        read_manifest(artifact)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"kind": "teacher"}', "\x00\x01"])
def test_damaged_manifest_is_one_clear_line(artifact: Path, damage: str) -> None:
    (artifact / MANIFEST_NAME).write_text(damage)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(artifact)
    assert "\n" not in str(caught.value)


def test_other_format_version_is_refused(artifact: Path) -> None:
    manifest = json.loads((artifact / MANIFEST_NAME).read_text())
    manifest["format_version"] = 99
    (artifact / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="format version 99, this kdecs reads 1"):
        read_manifest(artifact)


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


WRITES_AND_DIES = """
import os, sys
from pathlib import Path
from kdecs.artifact import atomic_path, temporary_folder
folder = Path(sys.argv[1])
with temporary_folder(folder / "product") as temporary, atomic_path(folder / "file") as path:
    (temporary / "weights").write_text("half")
    path.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_the_killed_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    foreign = [".file.tmp", ".file.0123456789abcdef.tmp.txt", ".other.0123456789abcdef.tmp", ".file.1.tmp"]
    foreign += [".file.fedcba9876543210.tmp"]  # of another host, whose locks may not be seen here
    for name in foreign:
        (tmp_path / name).touch()
    (tmp_path / ".file.0123456789abcdef.tmp").touch()
    os.utime(tmp_path / ".file.0123456789abcdef.tmp", (0, 0))  # of another host and long ago
    command = [sys.executable, "-c", WRITES_AND_DIES, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        assert not (tmp_path / ".file.0123456789abcdef.tmp").exists()
        during = sorted(tmp_path.iterdir())
        assert len(during) == len(foreign) + 2
        for name in ("file", "product"):
            remove_leftovers(tmp_path / name)
        assert sorted(tmp_path.iterdir()) == during
        os.kill(writer.pid, signal.SIGKILL)
    assert sorted(tmp_path.iterdir()) == during
    with atomic_path(tmp_path / "file") as path:
        path.write_text("whole")
    with temporary_folder(tmp_path / "product") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, "file"])


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "n" * 233])
def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("new")
        remove_leftovers(tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "new")]


def test_only_a_file_or_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "link to a pipe").symlink_to("pipe")
    for name in ("directory", "pipe", "link to a pipe", "link"):
        expectation = contextlib.nullcontext() if name == "link" else pytest.raises(OutputError, match=name)
        with expectation, atomic_path(tmp_path / name) as temporary:
            temporary.write_text("new")
    assert (tmp_path / "target").read_text() == "kept"
    assert not (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "directory",
        "link",
        "link to a pipe",
        "pipe",
        "target",
    ]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_modes_follow_the_umask_whoever_writes(tmp_path: Path, umask: int) -> None:
    def write_privately(path: Path) -> None:  # as safetensors does: another file, for its owner alone
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)

    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "ours") as path:
            path.write_text("text")
        with atomic_path(tmp_path / "theirs") as path:
            write_privately(path)
        (tmp_path / "model" / "sub").mkdir(parents=True)
        for name in ("model/a", "model/sub/b"):
            write_privately(tmp_path / name)
        share_files(tmp_path / "model")
        with temporary_folder(tmp_path / "installed") as folder:
            write_privately(folder / "c")
            assert install_files(folder, tmp_path / "installed") == ["c"]
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_checksum_of_a_directory_depends_on_content_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("same")
    assert content_checksum(tmp_path / "one") == content_checksum(tmp_path / "two")
    (tmp_path / "two" / "x").write_text("other")
    assert content_checksum(tmp_path / "one") != content_checksum(tmp_path / "two")


def test_lock_is_seen_by_a_second_holder(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock") as first, file_lock(tmp_path / "lock", blocking=False) as second:
        assert (first, second) == (True, False)
    with file_lock(tmp_path / "lock", blocking=False) as again:
        assert again


def test_check_of_an_output_changes_nothing(artifact: Path, tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "output", "teacher", "c" * 64)
    assert not (tmp_path / "new").exists()
    check_output(artifact, "soft-labels", "c" * 64)
    assert verify_artifact(artifact) == []


def test_output_of_other_work_or_damaged_is_refused(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"of another config or of other inputs .* choose another output"):
        check_output(artifact, "soft-labels", "e" * 64)
    with pytest.raises(ArtifactError, match="holds a soft-labels, expected a teacher"):
        check_output(artifact, "teacher", "c" * 64)
    (artifact / "a.bin").write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"damaged soft-labels directory .*a\.bin: 5 bytes"):
        check_output(artifact, "soft-labels", "c" * 64)
    check_output(artifact, "soft-labels", "c" * 64, can_repair=True)


@pytest.mark.parametrize(
    ("is_ours", "files", "refusal"),
    [
        (None, [], None),
        (None, ["shard-0"], "holds shard-0 but no record"),
        (True, ["shard-0"], None),
        (False, ["shard-0"], "unfinished teacher of other work"),
        (False, [], "unfinished teacher of other work"),
    ],
)
def test_unfinished_output_goes_by_its_record(
    tmp_path: Path, is_ours: bool | None, files: list[str], refusal: str | None
) -> None:
    for name in files:
        (tmp_path / name).touch()
    expectation = pytest.raises(ArtifactError, match=refusal) if refusal else contextlib.nullcontext()
    with expectation:
        check_output(tmp_path, "teacher", "c" * 64, data_files="shard-*", is_begun_here=lambda: is_ours)


def test_labels_carry_a_checksum_of_their_manifest(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert has_valid_checksum(manifest)
    assert not has_valid_checksum(manifest.model_copy(update={"config_hash": "e" * 64}))
    (artifact / "x").touch()
    other = write_manifest(artifact, "report", config_hash="0", inputs={}, files=["x"])
    assert other.details == {}


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("model/adapter_config.json", True),
        ("model/model-00001-of-00002.safetensors", True),
        ("model/model.safetensors.index.json", True),
        ("model/.metadata", True),
        ("model/modeling_x.py", True),
        ("model/chat_templates/tool.jinja", True),
        ("tokenizer.4.0.json", True),
        ("heads.safetensors", True),
        ("trial.json", False),
        ("notes.txt", False),
        ("model/._model.safetensors", False),
        ("model/README.md", False),
        ("best-2/model/model.safetensors", False),
    ],
)
def test_a_file_that_would_be_loaded_but_is_not_listed_is_a_fault(
    tmp_path: Path, name: str, is_read: bool
) -> None:
    """Of a model, that is: what lies beside labels is never read."""
    for kind in ("student", "soft-labels"):
        directory = tmp_path / kind
        (directory / "model").mkdir(parents=True)
        (directory / "model" / "config.json").write_text("{}")
        write_manifest(directory, kind, config_hash="c" * 64, inputs={}, files=["model/config.json"])
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x")
        faults = verify_artifact(directory)
        if is_read and kind == "student":
            assert [fault.partition(": ")[0] for fault in faults] == [str(directory / name)]
            with pytest.raises(ArtifactError, match=r"does not list this file.*move it out"):
                read_verified_manifest(directory, kind)
        else:
            assert faults == []


def test_one_file_is_read_after_its_checksum(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert listed_file(artifact, manifest, "sub/b.txt").read_text() == "text"
    (artifact / "sub" / "b.txt").write_text("tEXt")
    with pytest.raises(ArtifactError, match=r"b\.txt: sha256 .*damaged; run the command"):
        listed_file(artifact, manifest, "sub/b.txt")
    with pytest.raises(ArtifactError, match=r"lists no c\.txt"):
        listed_file(artifact, manifest, "c.txt")
