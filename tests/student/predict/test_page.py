"""The page for people: one file that loads nothing, runs no script but its own, and says what the lines say."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdecs.cli import app
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.errors import OutputError
from kdecs.evaluation.predictions import Prediction
from kdecs.student.predict import files
from kdecs.student.predict.page import PageWriter, live_page
from kdecs.student.predict.page import policy as page_policy
from kdecs.student.predict.streaming import PairPrediction

EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> 😀 \u2028"


class Marks:
    """Finds a cause in the whole text of every pair."""

    def detail(self, pairs, *, batch_tokens, on_batch):
        del batch_tokens, on_batch
        texts = [p.dialogue.utterances[p.candidate - 1].text for p in pairs]
        return [
            PairPrediction(
                Prediction(p.dialogue.id, p.target, p.candidate, "fear", True, t), 0.5, (0, len(t))
            )
            for p, t in zip(pairs, texts, strict=True)
        ]


def dialogue_of(name, *texts):
    return Dialogue(name, tuple(Utterance(n, "A", text, None, None) for n, text in enumerate(texts, 1)))


def data_of(page: str):
    """The JSON of a page as a browser reads it: up to the first end of a script."""
    found = re.search(r'(?s)<script type="application/json" id="data">(.*?)</script', page)
    return json.loads(found[1])


def written(*dialogues):
    parts: list[bytes] = []
    page = PageWriter(parts.append)
    for one in dialogues:
        page.add(one, Marks().detail([], batch_tokens=0, on_batch=None))
    page.close()
    return b"".join(parts).decode()


def test_no_text_ends_the_script_that_holds_it():
    page = written(dialogue_of(EVIL, EVIL), dialogue_of("second", "x"))
    data = data_of(page)
    assert [one["id"] for one in data["dialogues"]] == [EVIL, "second"]
    assert data["dialogues"][0]["utterances"] == [{"speaker": "A", "utterance": EVIL}]
    assert data_of(written()) == {"dialogues": []}
    for part in ("<script", "</script>", "<!--", "<img"):
        assert page.count(part) == live_page().count(part)


@pytest.mark.parametrize("page", ["live", "written"])
def test_the_policy_allows_the_pages_own_script_and_style_alone(page):
    text = live_page() if page == "live" else written(dialogue_of("d", "x"))
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1])
    assert policy == page_policy(asks=page == "live")
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules.get("connect-src") == ("'self'" if page == "live" else None)
    for tag in ("script", "style"):
        [content] = re.findall(rf"(?s)<{tag}>(.*?)</{tag}>", text)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    # No event handlers and no style attributes, which the policy would stop; nothing from elsewhere.
    assert not re.search(r"<[^>]+\s(on\w+|style)=", text)
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text


def test_a_page_is_written_beside_the_lines_and_says_the_same(tmp_path, capsys):
    source, output, page = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "page.html"
    rows = [
        {"id": name, "utterances": [{"speaker": "A", "utterance": f"{name} {n}"} for n in range(2)]}
        for name in ("one", "two")
    ]
    for row in rows:
        for turn, utterance in enumerate(row["utterances"], 1):
            utterance["turn"] = turn
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = files.FileRequest(source, output, has_offsets=True, has_example=False, html=page)
    files.predict_file(request, lambda runtime: Marks(), device="cpu")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    data = data_of(page.read_text("utf-8"))["dialogues"]
    assert [pair for one in data for pair in one["predictions"]] == lines
    assert [one["id"] for one in data] == ["one", "two"]
    assert capsys.readouterr().out == f"{output}, {page}: 6 pairs of 2 dialogues, 6 causes\n"


def test_a_page_goes_to_standard_output_alone(tmp_path, capfdbinary):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"id": "d", "utterances": [{"turn": 1, "speaker": "A", "utterance": "x"}]}))
    request = files.FileRequest(source, None, has_example=False, html=Path("-"))
    files.predict_file(request, lambda runtime: Marks(), device="cpu")
    shown = capfdbinary.readouterr()
    assert data_of(shown.out.decode())["dialogues"][0]["id"] == "d"
    assert shown.out.startswith(b"<!doctype html>") and shown.out.endswith(b"</html>\n")
    assert b"1 pairs of 1 dialogues" in shown.err


def test_a_page_never_replaces_an_input_or_the_lines(tmp_path):
    (tmp_path / "in.jsonl").write_text("{}")
    request = files.FileRequest(tmp_path / "in.jsonl", None, html=tmp_path / "in.jsonl")
    with pytest.raises(OutputError, match="is the input"):
        files.predict_file(request, lambda runtime: Marks())
    same = ["--output", str(tmp_path / "x"), "--html", str(tmp_path / "." / "x")]
    result = CliRunner().invoke(app, ["predict", "--student", "s", "--input", "in.jsonl", *same])
    assert result.exit_code == 2 and "name the same file" in " ".join(result.output.split())
