"""The way to a real Label Studio and back: people label through its API and in a browser, and everything arrives.

`make test-label-studio` installs Label Studio and names its program in KDECS_LABEL_STUDIO; without it the tests are
skipped.
"""

import http.cookiejar
import json
import os
import random
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import free_port, wait_until
from typer.testing import CliRunner

from kdecs.annotate.labels import Annotation, TurnLabel
from kdecs.annotate.project import Project, create_project
from kdecs.annotate.review.label_studio import label_studio_tasks, labelling_configuration
from kdecs.annotate.running import read_annotations
from kdecs.cli import app
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.endpoint.answers import Cause

LABEL_STUDIO = os.environ.get("KDECS_LABEL_STUDIO", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not LABEL_STUDIO, reason="no Label Studio; make test-label-studio installs it"),
]
PEOPLE = ("ann", "ben", "cem")
PASSWORD = "f81d4fae-7dec"
TEXTS = (
    "We won 🎉🎉 at  last !",
    "<b>I</b> lost my job & the “rent” is due .",
    "Oh no !\nAgain ?",
    "昨日 は 楽しかった です 。",
    "ok",
    "Ça va , l'été ? 👩‍👩‍👧 Fine .",
)


class Browser:
    """What a person's browser sends: a session with its cookies."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.cookies = http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.cookies))

    def _token(self) -> str:
        return next((str(cookie.value) for cookie in self.cookies if cookie.name == "csrftoken"), "")

    def sign_up(self, email: str) -> None:
        self.opener.open(f"{self.url}/user/signup/", timeout=60).close()
        fields = {"csrfmiddlewaretoken": self._token(), "email": email, "password": PASSWORD}
        self.opener.open(
            f"{self.url}/user/signup/", urllib.parse.urlencode(fields).encode(), timeout=60
        ).close()
        assert self.call("GET", "/api/current-user/whoami")["email"] == email

    def call(self, method: str, path: str, value: Any = None) -> Any:
        headers = {"Content-Type": "application/json", "X-CSRFToken": self._token(), "Referer": self.url}
        data = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        try:
            with self.opener.open(request, timeout=120) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.code} {error.read().decode()}") from None


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Browser]]:
    """Three people who have signed up to a fresh server."""
    folder, port = tmp_path_factory.mktemp("label-studio"), free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
        "DJANGO_DB": "sqlite",
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        # It talks to nobody: no analytics, error reports or look for new versions.
        "LABEL_STUDIO_COLLECT_ANALYTICS": "0",
        "LABEL_STUDIO_LATEST_VERSION_CHECK": "0",
        "LABEL_STUDIO_SENTRY_DSN": "",
        "LABEL_STUDIO_FRONTEND_SENTRY_DSN": "",
    }
    command = [LABEL_STUDIO, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    log = folder / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, "--data-dir", str(folder)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def answers() -> bool:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            return False
        return True

    try:
        # The first start makes the database, in some hundred migrations.
        wait_until(answers, "Label Studio answers", timeout_s=900, poll_s=0.5)
        browsers = {name: Browser(url) for name in PEOPLE}
        for name, browser in browsers.items():
            browser.sign_up(f"{name}@example.org")
        yield browsers
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Eight dialogues of texts that are hard to count."""
    folder, shuffle = tmp_path_factory.mktemp("project"), random.Random(5)
    lines = []
    for number in range(8):
        texts = [shuffle.choice(TEXTS) for _ in range(2 + number)]
        turns = [
            {"turn": turn, "speaker": shuffle.choice("AB"), "utterance": text}
            for turn, text in enumerate(texts, start=1)
        ]
        lines.append(json.dumps({"id": f"d/{number}", "utterances": turns}))
    file = folder / "chats.jsonl"
    file.write_text("\n".join(lines))
    return create_project(folder / "p", [file], labels="fine", annotators=PEOPLE)


def labelled(project: Project, name: str) -> Annotation:
    """Labels as a person may give them: some turns undecided, some causes open, none, or several."""
    draw = random.Random(name)
    labels: dict[tuple[str, int], TurnLabel] = {}
    for dialogue in project.dialogues.values():
        for utterance in dialogue.utterances:
            emotion = draw.choice([None, NEUTRAL, *project.config.labels])
            if emotion is None:
                continue
            causes: list[Cause] | None = []
            if emotion != NEUTRAL and draw.random() < 0.2:
                causes = None
            elif emotion != NEUTRAL:
                for turn in range(1, utterance.turn + 1):
                    words = dialogue.utterances[turn - 1].text.split(" ")
                    begin = draw.randrange(len(words))
                    span = " ".join(words[begin : draw.randint(begin + 1, len(words))])
                    if span.strip() == span != "" and draw.random() < 0.5:
                        causes.append(Cause(turn, span))
            label = TurnLabel(emotion, None if causes is None else tuple(causes))
            labels[dialogue.id, utterance.turn] = label
    return Annotation(name, "person", labels)


def decisions(annotation: Annotation) -> dict[tuple[str, int], Any]:
    return {key: (label.emotion, label.causes) for key, label in annotation.labels.items()}


def result_of(project: Project, dialogue: Dialogue, annotation: Annotation) -> list[dict[str, Any]]:
    [task] = label_studio_tasks(project, [dialogue], [annotation])
    return task["predictions"][0]["result"] if "predictions" in task else []


def test_what_three_people_label_through_the_api_arrives_whole(
    people: dict[str, Browser], project: Project, tmp_path: Path
) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["annotate", "review", *map(str, arguments)])

    # Suggestions of a person's labels stand for those of a run: Label Studio checks them against the configuration.
    suggested = tmp_path / "suggested.json"
    labels = [
        {"dialogue_id": key[0], "turn": key[1], "emotion": label.emotion, "at": "2026-01-01T00:00:00Z"}
        | {
            "causes": None
            if label.causes is None
            else [{"turn": c.turn, "span": c.span} for c in label.causes]
        }
        for key, label in labelled(project, "first").labels.items()
    ]
    suggested.write_text(
        json.dumps({"project": project.texts_sha256, "annotator": "first", "labels": labels})
    )
    assert run("import", project.root, suggested).exit_code == 0
    work = tmp_path / "list.jsonl"
    order = list(project.dialogues)[::-1]
    work.write_text("".join(json.dumps({"dialogue_id": name}) + "\n" for name in order))
    tasks_file = tmp_path / "tasks.json"
    made = run("export", project.root, "--label-studio", tasks_file, "--list", work, "--suggest", "first")
    assert made.exit_code == 0, made.exception

    ann = people["ann"]
    configuration = tasks_file.with_suffix(".xml").read_text(encoding="utf-8")
    settings = {"title": "kdecs", "label_config": configuration, "maximum_annotations": len(PEOPLE)}
    number = ann.call("POST", "/api/projects", settings)["id"]
    imported = ann.call(
        "POST", f"/api/projects/{number}/import", json.loads(tasks_file.read_text(encoding="utf-8"))
    )
    assert imported["task_count"] == imported["prediction_count"] == len(order), imported
    tasks = ann.call("GET", f"/api/tasks?project={number}&page_size=100&fields=all")["tasks"]
    assert [task["data"]["dialogue_id"] for task in sorted(tasks, key=lambda task: task["id"])] == order

    times: dict[tuple[str, str], str] = {}
    for name, browser in people.items():
        for task in tasks:
            dialogue = project.dialogues[task["data"]["dialogue_id"]]
            path = f"/api/tasks/{task['id']}/annotations/"
            # Ben corrects himself once, and skips a dialogue before he labels it.
            if name == "ben" and dialogue.id == order[0]:
                browser.call("POST", path, {"result": [], "was_cancelled": True})
            given = labelled(project, "other" if name == "ben" and dialogue.id == order[1] else name)
            saved = browser.call("POST", path, {"result": result_of(project, dialogue, given)})
            if name == "ben" and dialogue.id == order[1]:
                corrected = {"result": result_of(project, dialogue, labelled(project, name))}
                saved = browser.call("PATCH", f"/api/annotations/{saved['id']}/", corrected)
            times[name, dialogue.id] = saved["updated_at"]

    exported = tmp_path / "export.json"
    exported.write_text(json.dumps(ann.call("GET", f"/api/projects/{number}/export?exportType=JSON")))
    users = {name: browser.call("GET", "/api/current-user/whoami")["id"] for name, browser in people.items()}
    refused = run("import", project.root, exported)
    assert f"--annotator {users['ann']}=NAME" in str(refused.exception)
    given = [part for name in PEOPLE for part in ("--annotator", f"{users[name]}={name}")]
    taken = run("import", project.root, exported, *given)
    assert taken.exit_code == 0, taken.exception
    assert "decisions of ben (annotations left out: 1 skipped)" in taken.output
    for name in PEOPLE:
        [found] = read_annotations(project, [name])
        assert decisions(found) == decisions(labelled(project, name))
        assert {key: label.at for key, label in found.labels.items()} == {
            key: times[name, key[0]] for key in found.labels
        }


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Where words stand on the page; texts may hold them more than once, and then the first counts.
PLACE = """([turn, words]) => {
  const phrase = document.querySelector(`[data-testid='phrase:${turn - 1}']`);
  const walker = document.createTreeWalker(phrase, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const begin = walker.currentNode.data.indexOf(words), range = document.createRange();
    if (begin < 0) continue;
    range.setStart(walker.currentNode, begin);
    range.setEnd(walker.currentNode, begin + words.length);
    const box = range.getBoundingClientRect();
    return [box.left, box.right, (box.top + box.bottom) / 2];
  }
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; tests/install_chromium.sh installs it")
def test_what_a_person_marks_in_the_browser_arrives_as_marked(
    people: dict[str, Browser], tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    file = tmp_path / "chat.jsonl"
    turns = [
        {"turn": turn, "speaker": "A", "utterance": text} for turn, text in enumerate(TEXTS[:3], start=1)
    ]
    file.write_text(json.dumps({"id": "d", "utterances": turns}) + "\n")
    project = create_project(tmp_path / "p", [file], labels="fine")
    ann = people["ann"]
    settings = {"title": "chat", "label_config": labelling_configuration(project.config.labels)}
    number = ann.call("POST", "/api/projects", settings)["id"]
    ann.call(
        "POST",
        f"/api/projects/{number}/import",
        label_studio_tasks(project, list(project.dialogues.values()), []),
    )
    [task] = ann.call("GET", f"/api/tasks?project={number}")["tasks"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.add_cookies(
            [{"name": cookie.name, "value": str(cookie.value), "url": ann.url} for cookie in ann.cookies]
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{ann.url}/projects/{number}/data?task={task['id']}")
        page.wait_for_selector("[data-testid='phrase:0']")

        def mark(label: str, turn: int, words: str) -> None:
            # Without a region that is selected, whose label would change.
            page.keyboard.press("Escape")
            page.locator(".lsf-label", has_text=re.compile(f"^{label}")).first.click()
            left, right, y = page.evaluate(PLACE, [turn, words])
            page.mouse.move(left + 0.5, y)
            page.mouse.down()
            page.mouse.move((left + right) / 2, y)
            page.mouse.move(right - 0.5, y)
            page.mouse.up()
            page.wait_for_selector(f".htx-highlight >> text={words.split()[-1]}")
            page.keyboard.press("Escape")

        mark("happiness", 1, "We")
        mark("worry", 2, "lost")
        mark("anger", 3, "Oh")
        mark("cause", 1, "🎉 at  last")
        mark("cause", 2, "job & the “rent”")
        for words, effects in (("last", [1, 2]), ("rent", [2])):
            page.locator(".htx-highlight", has_text=words).last.click()
            for effect in effects:
                page.locator("[class*=choice__item]", has_text=re.compile(f"^{effect}")).first.click()
            page.keyboard.press("Escape")
        page.locator(".htx-highlight", has_text="Oh").last.click()
        page.locator("[class*=choice__item]", has_text="no cause").click()
        page.screenshot(path=str(tmp_path / "label-studio.png"))
        with page.expect_response(
            lambda reply: reply.request.method == "POST" and "annotations" in reply.url
        ):
            page.get_by_role("button", name="Submit").click()
        browser.close()
    exported = tmp_path / "export.json"
    exported.write_text(json.dumps(ann.call("GET", f"/api/projects/{number}/export?exportType=JSON")))
    taken = CliRunner().invoke(
        app, ["annotate", "review", "import", str(project.root), str(exported), "--annotator", "ann"]
    )
    assert taken.exit_code == 0, taken.exception
    [found] = read_annotations(project)
    last, rent = Cause(1, "🎉 at  last"), Cause(2, "job & the “rent”")
    assert decisions(found) == {
        ("d", 1): ("happiness", (last,)),
        ("d", 2): ("worry", (last, rent)),
        ("d", 3): ("anger", ()),
    }
