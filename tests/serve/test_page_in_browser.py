"""The page in headless Chromium: typed, pasted and opened dialogues, keyboard, screen reader, widths, colours.

`tests/install_chromium.sh` installs what it needs; without that these tests are skipped.
"""

import json
import re
import shutil
import threading

import pytest

from kdecs.corpus.reading import bundled_sample, parse_dialogue
from kdecs.evaluation.predictions import Prediction
from kdecs.serve.guard import guarded, own_names
from kdecs.serve.server import OPEN_PATHS, Batchers, make_app
from kdecs.student.predict import streaming
from kdecs.student.predict.page import PageWriter
from kdecs.student.predict.streaming import PairPrediction

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; tests/install_chromium.sh installs it"),
]

TOKEN = "correct-horse-battery"
EVIL = "<img src=x onerror=\"document.title='stolen'\"></script><b>bold</b>"
LINES = """Anna: Oh 😀 no, the washing machine leaks again!
Ben: I called the plumber.
Anna: Thank you so much."""


class Rules:
    """Explains every "Thank" by all candidates and each exclamation by itself, with the first three words as span.

    "Wait" waits for the gate.
    """

    def __init__(self):
        self.gate = threading.Event()

    def stream(self, dialogues, *, max_distance, batch_tokens, on_batch, on_warning):
        del batch_tokens, on_batch, on_warning
        return streaming.stream(self, dialogues, max_distance=max_distance)

    def detail(self, pairs, *, batch_tokens=0, on_batch=None):
        del batch_tokens, on_batch
        if any(pair.dialogue.utterances[0].text == "Wait" for pair in pairs):
            self.gate.wait(30)
        return [self.predict(pair) for pair in pairs]

    def predict(self, pair):
        texts = [utterance.text for utterance in pair.dialogue.utterances]
        target, candidate = texts[pair.target - 1], texts[pair.candidate - 1]
        is_thanks = target.startswith("Thank")
        is_cause = is_thanks or ("!" in target and pair.target == pair.candidate)
        emotion = "gratitude" if is_thanks else "fear" if is_cause else "neutral"
        span = re.match(r"(\S+ ?){1,3}", candidate)[0].rstrip() if is_cause else ""
        prediction = Prediction(pair.dialogue.id, pair.target, pair.candidate, emotion, is_cause, span)
        return PairPrediction(prediction, 0.9 - 0.1 * pair.candidate, (0, len(span)) if span else None)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox, which needs privileges that containers do not have. Only the page under test is opened.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def rules():
    return Rules()


@pytest.fixture(scope="module")
def addresses(serving, rules):
    """Two servers of the same student: one open, one with a token."""
    names = own_names("127.0.0.1", [])
    with (
        Batchers(rules) as batchers,
        serving(guarded(make_app(batchers), names)) as port,
        serving(guarded(make_app(batchers), names, token=TOKEN, open_paths=OPEN_PATHS)) as locked,
    ):
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{locked}"


@pytest.fixture
def open_page(browser):
    """Open an address in a fresh window; nothing may be loaded from elsewhere or complain in the console."""
    contexts, complaints = [], []

    def open_page(address, *, width=1000, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: request.url.startswith(address) or complaints.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # A refused request is in the console, too; that is what the page shows its reader.
    refused = "the server responded with a status of"
    assert [
        line for line in complaints if refused not in line and not line.startswith(("blob:", "data:"))
    ] == []


def predict(page, text):
    page.fill("#text", text)
    page.click("text=Find the causes")
    page.wait_for_selector("#result:not([hidden])")


def test_typed_lines_show_emotions_causes_spans_and_scores(addresses, open_page):
    page = open_page(addresses[0])
    predict(page, LINES)
    assert page.inner_text("#status") == "3 utterances; 4 causes found, for 2 of them."
    badges = ["Emotion: fear", "Emotion: neutral", "Emotion: gratitude"]
    assert page.locator(".turn .badge").all_text_contents() == badges
    # The emoji counts as one character in Python and as two in JavaScript.
    assert page.locator("mark").all_inner_texts() == ["Oh 😀 no,", "I called the", "Thank you so"]
    assert page.locator("#dialogue svg g").count() == 4
    # Pointing at the last utterance leaves its three arcs and shows the score of each candidate.
    page.hover("#turn-3 .text")
    assert page.locator("#dialogue svg g.on").count() == 3
    assert page.locator(".score").all_inner_texts() == ["0.80", "0.70", "0.60"]
    page.hover("h1")
    assert page.locator("#dialogue svg g.on").count() == 0
    # One arc alone.
    page.locator("#dialogue svg g").nth(1).locator(".reach").dispatch_event("pointerenter")
    assert page.locator("#dialogue svg g.on").count() == 1
    assert "turn 1 → turn 3: gratitude, score 0.80" in page.locator("#dialogue svg g.on title").text_content()
    # Only candidates at most one turn back.
    page.fill("#distance", "1")
    page.keyboard.press("Enter")
    expect(page.locator("#dialogue svg g")).to_have_count(3)


def test_keyboard_and_screen_reader_get_the_same(addresses, open_page):
    page = open_page(addresses[0])
    page.focus("#text")
    page.keyboard.insert_text(LINES)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#result:not([hidden])")
    said = page.locator("#dialogue").aria_snapshot()
    for line in (
        "Turn 3",
        "Emotion: gratitude",
        'link "turn 1, Anna"',
        "“Oh 😀 no,” (score 0.80)",
        'link "this utterance itself"',
    ):
        assert line in said
    assert "img" not in said  # the arcs say nothing that the lists do not
    assert page.get_by_role("status").inner_text().startswith("3 utterances")
    # From the last control before the result, Tab goes from cause to cause and Enter to the utterance.
    page.focus("#distance")
    for _ in range(2):
        page.keyboard.press("Tab")
    focused = "document.activeElement.textContent"
    assert page.evaluate(focused) == "turn 1, Anna"
    assert page.locator("#dialogue svg g.on").count() == 1
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "turn-1"
    assert page.locator("label[for=text]").inner_text() == "A dialogue"
    unnamed = """[...document.querySelectorAll("button, input, select, textarea")]
      .filter((element) => !(element.labels?.length || element.textContent.trim())).length"""
    assert page.evaluate(unnamed) == 0


def test_every_format_and_every_fault_of_it(addresses, open_page, tmp_path):
    page = open_page(addresses[0])
    turns = [{"turn": 1, "speaker": "A", "utterance": "Thank you"}]
    for text, ids in (
        (json.dumps({"id": "own", "utterances": turns}), ["own"]),
        (json.dumps(turns), ["1"]),
        (json.dumps([{"utterances": turns}, {"id": "b", "utterances": turns}]), ["1", "b"]),
        (
            '{"id": "a", "utterances": %s}\n{"id": "b", "utterances": %s}\n' % ((json.dumps(turns),) * 2),
            ["a", "b"],
        ),
        (json.dumps({"tr_1": [turns], "tr_2": [turns]}), ["tr_1", "tr_2"]),
        ("A： Thank you\nso much\n\nB: Well", ["1"]),
    ):
        predict(page, text)
        expect(page.locator("#status")).not_to_contain_text("Predicting")
        assert page.is_hidden("#error"), page.inner_text("#error")
        assert page.locator("#which option").all_inner_texts() == ids
    assert page.locator(".text").all_inner_texts() == ["Thank you so much", "Well"]
    for text, message in (
        ("", "There is no dialogue yet"),
        ("Thank you", "The first line has no speaker"),
        ("{", "This is no JSON"),
        ('{"utterances": []}\n{"utterances": x}', "Line 2 is no JSON"),
        ('{"a": 1}', "This JSON is no dialogue"),
        (
            '[{"utterances": [{"speaker": 5, "utterance": "x"}]}]',
            "turn 1, field speaker: found 5, expected a string",
        ),
    ):
        page.fill("#text", text)
        page.click("text=Find the causes")
        expect(page.locator("#error")).to_contain_text(message)
    # A file of many dialogues is sent in portions, and each of them can be looked at.
    page.set_input_files("#file", bundled_sample("test"))
    expect(page.locator("#status")).to_contain_text("is open")
    page.click("text=Find the causes")
    names = list(json.loads(bundled_sample("test").read_text("utf-8")))
    expect(page.locator("#which option")).to_have_count(len(names))
    page.select_option("#which", names[-1])
    assert page.inner_text("#title") == f"Dialogue {names[-1]}"


def test_what_is_predicted_before_a_stop_is_shown(addresses, open_page, rules):
    page = open_page(addresses[0])
    first, second = ([{"speaker": "A", "utterance": text}] * 24 for text in ("Well", "Wait"))
    page.fill(
        "#text", json.dumps([{"id": "first", "utterances": first}, {"id": "second", "utterances": second}])
    )
    page.click("text=Find the causes")
    expect(page.locator("#status")).to_have_text("Predicting: 1 of 2 dialogues …")
    page.click("text=Stop")
    expect(page.locator("#status")).to_contain_text("These are the first 1 of 2 dialogues.")
    assert (
        page.inner_text("#title") == "Dialogue first" and page.is_hidden("#stop") and page.is_hidden("#error")
    )
    rules.gate.set()


def test_texts_are_text_and_the_page_can_be_sent_on(addresses, open_page, tmp_path):
    page = open_page(addresses[0])
    rows = [{"id": "1", "utterances": [{"speaker": f"{EVIL}!", "utterance": f"Thank {EVIL}"}]}]
    predict(page, json.dumps(rows))
    assert page.locator(".text").inner_text() == f"Thank {EVIL}"
    page.click("text=Copy the JSON")
    expect(page.locator("#status")).to_have_text("The JSON is copied.")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["predictions"][0]["emotion"] == "gratitude"
    with page.expect_download() as download:
        page.click("text=Save as a page")
    saved = tmp_path / "saved.html"
    download.value.save_as(saved)
    # The same page as `kdecs predict --html` writes.
    parts = []
    writer = PageWriter(parts.append)
    for dialogue, found in streaming.stream(Rules(), [parse_dialogue(row, "x") for row in rows]):
        writer.add(dialogue, found)
    writer.close()
    data = re.compile(r'(?s)(?<=id="data">)(.*?)(?=</script)')
    texts = saved.read_text("utf-8"), b"".join(parts).decode()
    assert json.loads(data.search(texts[0])[0]) == json.loads(data.search(texts[1])[0])
    assert data.sub("", texts[0], 1) == data.sub("", texts[1], 1)
    shown = open_page(f"file://{saved}")
    assert shown.locator(".text").inner_text() == f"Thank {EVIL}"
    assert shown.is_hidden("#ask") and shown.title() == page.title() == "Who feels what, and why"


def test_a_server_with_a_token_asks_for_it(addresses, open_page):
    page = open_page(addresses[1])
    page.fill("#text", LINES)
    page.click("text=Find the causes")
    page.wait_for_selector("#error:not([hidden])")
    assert "needs its token" in page.inner_text("#error")
    page.keyboard.insert_text(TOKEN)  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#result:not([hidden])")
    assert page.is_hidden("#error")


@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (360, "dark"), (1400, "light"), (1000, "dark")]
)
def test_it_fits_and_can_be_read_at_any_width_and_in_both_colours(addresses, open_page, width, scheme):
    page = open_page(addresses[0], width=width, scheme=scheme)
    predict(page, LINES + "\nBen: " + "x" * 400)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # WCAG's contrast of text to what is behind it: 4.5 for text, 3 for arcs and borders.
    contrast = """(selector, property, least) => [...document.querySelectorAll(selector)].filter((element) => {
      const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const luminance = (colour, below) => {
        canvas.fillStyle = below; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
          .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
          .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
      };
      const paper = getComputedStyle(document.querySelector(".panel")).backgroundColor;
      const behind = element.matches("mark, button") ? getComputedStyle(element).backgroundColor : paper;
      const both = [luminance(getComputedStyle(element)[property], paper), luminance(behind, paper)];
      return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05) < least;
    }).length"""
    for selector, name, least in (
        ("p, a, strong, .badge, mark, .number, .because li, button, summary, label", "color", 4.5),
        (".badge:not(.neutral)", "borderTopColor", 3),
        ("svg .line", "stroke", 3),
    ):
        assert page.evaluate(f"([s, p, l]) => ({contrast})(s, p, l)", [selector, name, least]) == 0, selector
