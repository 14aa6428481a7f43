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
    """Serves CONTENT; `is_cut` breaks answers off in the middle."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.num_requests = 0
        self.is_cut = False
        self.content = CONTENT
        self.status = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/folder"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.num_requests += 1
        if server.status:
            self.send_error(server.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        self.wfile.write(server.content[: len(server.content) // 2] if server.is_cut else server.content)

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
    return fetch(FILE, directory, base_url=server.url, **options)


def test_a_file_is_fetched_once(server, tmp_path):
    received = []
    assert get(server, tmp_path / "new", on_bytes=received.append)
    assert (tmp_path / "new" / "corpus.json").read_bytes() == CONTENT
    assert sum(received) == len(CONTENT)
    assert not get(server, tmp_path / "new")
    assert server.num_requests == 1


def test_a_cut_download_is_refused_and_starts_again(server, tmp_path):
    server.is_cut = True
    with pytest.raises(
        CorpusError, match=f"ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes"
    ) as refusal:
        get(server, tmp_path)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
    server.is_cut = False
    assert get(server, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


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
        CorpusError, match="HTTP status 404; if this machine has no internet access, download"
    ):
        get(server, tmp_path)
    closed = "http://127.0.0.1:1/folder"
    with pytest.raises(CorpusError, match="refused; if this machine has no internet access"):
        fetch(FILE, tmp_path, base_url=closed)
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_is_no_url_is_one_clear_line(tmp_path):
    with pytest.raises(CorpusError, match=r"unknown url type.*expected a URL such as https://"):
        fetch(FILE, tmp_path, base_url="nonsense")


def test_the_command_fetches_all_three(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "RECCON_FILES", tuple(RemoteFile(n, FILE.sha256) for n in ("a", "b", "c")))
    arguments = ["fetch", str(tmp_path), "--mirror", server.url]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("downloaded, sha256 verified") == 3
    assert CliRunner().invoke(app, arguments).stdout.count("already there, sha256 verified") == 3


def test_the_pinned_files_are_on_a_pinned_commit():
    assert len(fetching.RECCON_COMMIT) == 40
    assert fetching.RECCON_COMMIT in fetching.RECCON_URL
    assert [file.name for file in fetching.RECCON_FILES] == [
        "dailydialog_train.json",
        "dailydialog_valid.json",
        "dailydialog_test.json",
    ]
