"""The page that people label on, and what is taken from the files that it saves."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdecs.annotate.labels import ReviewedTurn, add_reviews
from kdecs.annotate.project import Project, create_project
from kdecs.annotate.review.page import review_page
from kdecs.annotate.running import read_annotations
from kdecs.cli import app
from kdecs.corpus.schema import Dialogue
from kdecs.errors import ConfigError, CorpusError, PredictionError

EVIL = "<img src=x onerror=\"document.title='stolen'\"></script><b>bold</b>"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["annotate", *map(str, arguments)])


def saved(project: Project, *labels: dict[str, Any], annotator: str = "ann") -> str:
    return json.dumps({"project": project.texts_sha256, "annotator": annotator, "labels": labels})


def decision(dialogue: Dialogue, **changes: Any) -> dict[str, Any]:
    word = dialogue.utterances[0].text.split()[0]
    values: dict[str, Any] = {"dialogue_id": dialogue.id, "turn": 1, "emotion": "worry"}
    return values | {"causes": [{"turn": 1, "span": word}], "at": "2026-01-01T00:00:00.123Z"} | changes


def test_a_page_holds_the_listed_dialogues_and_nothing_that_it_could_load(
    project: Project, gold: list[Dialogue], tmp_path: Path
) -> None:
    work, page = tmp_path / "list.jsonl", tmp_path / "ann.html"
    lines = [
        {"dialogue_id": gold[2].id, "annotators": ["ann"]},
        {"dialogue_id": gold[0].id, "annotators": ["ben"]},
        {"dialogue_id": gold[1].id, "annotators": ["ann", "ben"]},
    ]
    work.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = run("review", "export", project.root, "--html", page, "--list", work, "--annotator", "ann")
    assert made.exit_code == 0, made.output
    text = page.read_text(encoding="utf-8")
    [data] = re.findall(r'(?s)<script type="application/json" id="data">(.*?)</script>', text)
    found = json.loads(data)
    assert [item["id"] for item in found["dialogues"]] == [gold[2].id, gold[1].id]
    assert found["annotators"] == ["ann"] and found["suggested_by"] is None
    assert "default-src 'none'" in text and "POLICY" not in text and not re.search(r'(src|href)="http', text)
    run("review", "export", project.root, "--html", page)
    assert json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text())[0])["annotators"] == list(
        project.config.annotators
    )
    work.write_text('{"dialogue_id": "other"}\n')
    refused = run("review", "export", project.root, "--html", page, "--list", work)
    assert "no dialogue of this project" in str(refused.exception)


def test_texts_cannot_end_the_script(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"id": "d", "utterances": [{"turn": 1, "speaker": "A", "utterance": EVIL}]}))
    project = create_project(tmp_path / "p", [chat], annotators=["ann"])
    page = review_page(project, list(project.dialogues.values()), ["ann"], None)
    assert page.count("</script>") == 2 and "<img" not in page
    with pytest.raises(ConfigError, match="names no annotators"):
        review_page(project, list(project.dialogues.values()), [], None)


def test_a_saved_file_is_imported_once_and_a_corpus_under_a_name(
    project: Project, gold: list[Dialogue], corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "review-ann.json"
    file.write_text(saved(project, decision(gold[0]), decision(gold[1], emotion="neutral", causes=[])))
    assert "2 new of 2 decisions of ann" in run("review", "import", project.root, file).output
    assert "0 new of 2" in run("review", "import", project.root, file).output
    assert "no file that the page saved" in str(run("review", "import", project.root, corpus).exception)
    assert run("review", "import", project.root, corpus, "--annotator", "gold").exit_code == 0
    ann, given = read_annotations(project)
    assert (ann.name, given.name, len(ann.labels)) == ("ann", "gold", 2)
    assert ann.labels[gold[0].id, 1].emotion == "worry"
    assert given.emotions() == {(d.id, u.turn): u.emotion for d in gold for u in d.utterances}
    assert all(label.causes is not None for label in given.labels.values())
    coarse = create_project(tmp_path / "coarse", [corpus])
    refused = run("review", "import", coarse.root, corpus, "--annotator", "gold")
    assert re.search(r"the emotion \w+, expected one of happiness.*: --table FILE", str(refused.exception))
    (tmp_path / "table.json").write_text('{"others": "neutral"}')
    mapped = run(
        "review", "import", coarse.root, corpus, "--annotator", "gold", "--table", tmp_path / "table.json"
    )
    assert mapped.exit_code == 0, mapped.exception
    assert set(read_annotations(coarse)[0].emotions().values()) <= set(coarse.config.labels)


def changed(**changes: Any) -> Callable[[Project, list[Dialogue]], str]:
    return lambda project, gold: saved(project, decision(gold[0], **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(emotion="joy"), "the emotion 'joy', expected one of"),
        (changed(dialogue_id="x"), "is not in this project"),
        (changed(turn=99), "turn 99, expected one from 1 to"),
        (changed(turn=0), "turn: Input should be greater than 0"),
        (changed(turn="1"), "turn: Input should be a valid integer"),
        (changed(at="yesterday"), "at: String should match"),
        (changed(note=""), "note: Extra inputs"),
        (changed(emotion="neutral"), "is neutral and has causes"),
        (changed(causes=[{"turn": 2, "span": "x"}]), "a cause in turn 2, expected one up to turn 1"),
        (changed(causes=[{"turn": 1, "span": "nobody said"}]), "exactly as they stand"),
        (changed(causes=[{"turn": 1, "span": " "}]), "exactly as they stand"),
        (lambda project, gold: saved(project, decision(gold[0]), annotator="../ann"), "expected letters"),
        (
            lambda project, gold: saved(project).replace(project.texts_sha256, "0"),
            "a review of other dialogues",
        ),
        (lambda project, gold: '{"project": 1}', "no file that the page saved"),
    ],
)
def test_a_wrong_review_is_refused_in_one_line_and_nothing_is_kept(
    content: Callable[[Project, list[Dialogue]], str],
    message: str,
    project: Project,
    gold: list[Dialogue],
    tmp_path: Path,
) -> None:
    file, good = tmp_path / "review.json", tmp_path / "good.json"
    good.write_text(saved(project, decision(gold[1])))
    file.write_text(content(project, gold))
    result = run("review", "import", project.root, good, file)
    assert isinstance(result.exception, PredictionError | ConfigError | CorpusError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert project.reviewers == []


def test_a_damaged_line_of_a_persons_file_is_named(project: Project, gold: list[Dialogue]) -> None:
    path = project.review_file("ann")
    add_reviews(path, [ReviewedTurn.model_validate(decision(gold[0]))])
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(PredictionError, match=r"ann\.jsonl, line 2: dialogue_id: Field required"):
        read_annotations(project)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; tests/install_chromium.sh installs it")
def test_a_dialogue_is_labelled_by_keyboard_alone(
    project: Project, gold: list[Dialogue], tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    page_file = tmp_path / "review.html"
    assert run("review", "export", project.root, "--html", page_file).exit_code == 0
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox, which needs privileges that containers do not have. Only this page is opened.
        # With a profile on disk, as people have: one in memory now and then loses what a page keeps.
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, args=["--no-sandbox"], accept_downloads=True
        )
        page, other = context.new_page(), context.new_page()
        for window in (page, other):
            window.on("pageerror", lambda error: complaints.append(str(error)))
            window.on("console", lambda message: complaints.append(message.text))
            window.goto(page_file.as_uri())
        keys = page.evaluate("Object.fromEntries(data.labels.map((label) => [label, keyOf(label)]))")
        first = gold[0].utterances
        # Turn 1 is neutral, turn 2 worry because of two words of turn 1 and one word of turn 2.
        for key in (
            keys["neutral"],
            "ArrowDown",
            keys["worry"],
            "c",
            "ArrowUp",
            "ArrowLeft",
            "Shift+ArrowRight",
        ):
            page.keyboard.press(key)
        for key in ("Enter", "ArrowDown", "ArrowRight", "ArrowLeft", "Enter", "Escape"):
            page.keyboard.press(key)
        assert page.inner_text("#progress").startswith("2 of ")
        # Another window of the page follows. Until it does, the browser may not have kept the decisions yet.
        other.wait_for_function("document.getElementById('progress').textContent.startsWith('2 of ')")
        # On a busy machine Chromium hands a reloaded page what it keeps a moment too late.
        for _ in range(5):
            page.reload()
            if page.inner_text("#progress").startswith("2 of "):
                break
            page.wait_for_timeout(500)
        assert page.inner_text("#progress").startswith("2 of ")
        with page.expect_download() as download:
            page.keyboard.press("s")
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        page.screenshot(path=str(tmp_path / "review.png"), full_page=True)
        context.close()
    assert complaints == []
    assert file.name == "review-ann.json"
    imported = run("review", "import", project.root, file)
    assert "2 new of 2 decisions of ann" in imported.output, imported.exception
    [ann] = read_annotations(project)
    label = ann.labels[gold[0].id, 2]
    assert label.emotion == "worry" and label.causes is not None
    spans = {cause.turn: cause.span for cause in label.causes}
    assert spans == {1: " ".join(first[0].text.split()[:2]), 2: re.findall(r"\w+", first[1].text)[-1]}
