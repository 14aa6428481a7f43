import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from kdecs.corpus import fetch as fetching
from kdecs.corpus.commands import app
from kdecs.corpus.fetch import RemoteFile, fetch
from kdecs.errors import CorpusError

CONTENT = bytes(range(256)) * 1000
FILE = RemoteFile("corpus.json", hashlib.sha256(CONTENT).hexdigest())


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `cut_after` breaks that many first answers off in the middle."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = []
        self.cut_after = 0
        self.content = CONTENT
        self.ignores_ranges = False
        self.status = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/folder"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not server.ignores_ranges else 0
        if server.status or start > len(server.content) - 1:
            self.send_error(server.status or 416)
            return
        self.send_response(206 if start else 200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cut_after:
            server.cut_after -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *arguments):
        del arguments


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, directory, **options):
    return fetch(FILE, directory, base_url=server.url, pause_s=0, **options)


def test_a_file_is_fetched_once(server, tmp_path):
    received = []
    assert get(server, tmp_path / "new", on_bytes=received.append)
    assert (tmp_path / "new" / "corpus.json").read_bytes() == CONTENT
    assert sum(received) == len(CONTENT)
    assert not get(server, tmp_path / "new")
    assert server.ranges == [None]


def test_a_cut_download_goes_on(server, tmp_path):
    server.cut_after = 2
    assert get(server, tmp_path)
    assert (tmp_path / "corpus.json").read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-", f"bytes={len(CONTENT) * 3 // 4}-"]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


def test_a_later_call_goes_on(server, tmp_path):
    server.cut_after = 10
    with pytest.raises(CorpusError, match="bytes are kept, the same command goes on") as refusal:
        get(server, tmp_path)
    assert "\n" not in str(refusal.value)
    server.cut_after = 0
    kept = (tmp_path / ".corpus.json.part").stat().st_size
    assert get(server, tmp_path)
    assert server.ranges[-1] == f"bytes={kept}-"


def test_a_whole_part_needs_its_check_alone(server, tmp_path):
    (tmp_path / ".corpus.json.part").write_bytes(CONTENT)
    assert get(server, tmp_path)
    assert (tmp_path / "corpus.json").read_bytes() == CONTENT


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_foreign_part_is_fetched_anew(server, tmp_path, ignores_ranges):
    server.ignores_ranges = ignores_ranges
    (tmp_path / ".corpus.json.part").write_bytes(b"something else")
    assert get(server, tmp_path)
    assert (tmp_path / "corpus.json").read_bytes() == CONTENT


def test_another_content_is_refused_and_not_kept(server, tmp_path):
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(CorpusError, match="expected " + FILE.sha256[:12]):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_user_is_not_overwritten(server, tmp_path):
    (tmp_path / "corpus.json").write_text("mine")
    with pytest.raises(CorpusError, match="move the file away"):
        get(server, tmp_path)
    assert (tmp_path / "corpus.json").read_text() == "mine"


def test_no_internet_is_one_clear_line(server, tmp_path):
    server.status = 404
    with pytest.raises(
        CorpusError, match="HTTP status 404; without internet here, download the file elsewhere"
    ):
        get(server, tmp_path)
    assert server.ranges == [None]
    closed = "http://127.0.0.1:1/folder"
    with pytest.raises(CorpusError, match="refused; without internet here"):
        fetch(FILE, tmp_path, base_url=closed, pause_s=0)
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_is_no_url_is_one_clear_line(tmp_path):
    with pytest.raises(CorpusError, match=r"unknown url type.*expected a URL such as https://"):
        fetch(FILE, tmp_path, base_url="nonsense", pause_s=0)


def test_the_command_fetches_all_three(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "RECCON_FILES", tuple(RemoteFile(n, FILE.sha256) for n in ("a", "b", "c")))
    arguments = ["fetch", str(tmp_path), "--mirror", server.url]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("fetched, sha256 as pinned") == 3
    assert CliRunner().invoke(app, arguments).stdout.count("was there") == 3


def test_the_pinned_files_are_on_a_pinned_commit():
    assert len(fetching.RECCON_COMMIT) == 40
    assert fetching.RECCON_COMMIT in fetching.RECCON_URL
    assert [file.name for file in fetching.RECCON_FILES] == [
        "dailydialog_train.json",
        "dailydialog_valid.json",
        "dailydialog_test.json",
    ]
