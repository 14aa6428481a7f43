"""The page on which people label dialogues in their browser: one HTML file, which needs no network.

It is `page.html` with the dialogues, the labels and, if wanted, the suggestions of a run in its element `data`. What it
saves is described in `kdecs.annotate.review.importing`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kdecs.annotate.labels import Annotation, TurnKey, TurnLabel
from kdecs.annotate.project import Project
from kdecs.corpus.schema import Dialogue
from kdecs.errors import ConfigError
from kdecs.pages import NO_DATA, content_security_policy, json_in_script, page_template


def review_page(
    project: Project, dialogues: Sequence[Dialogue], annotators: Sequence[str], suggestions: Annotation | None
) -> str:
    """The page for these dialogues and annotators. Raises ConfigError if there is nobody or nothing to review."""
    if not annotators:
        raise ConfigError(
            f"{project.root}: project.yaml names no annotators; add them there, or name one with --annotator"
        )
    if not dialogues:
        raise ConfigError(f"{project.root}: no dialogue is left to review")
    found: Mapping[TurnKey, TurnLabel] = suggestions.labels if suggestions else {}
    data = {
        "project": project.texts_sha256,
        "labels": list(project.config.labels),
        "annotators": list(annotators),
        "causes_after": project.config.causes_after,
        "suggested_by": suggestions.name if suggestions else None,
        "dialogues": [
            {
                "id": dialogue.id,
                "utterances": [
                    {
                        "speaker": u.speaker,
                        "utterance": u.text,
                        "suggestion": _suggestion(found.get((dialogue.id, u.turn))),
                    }
                    for u in dialogue.utterances
                ],
            }
            for dialogue in dialogues
        ],
    }
    template = page_template("kdecs.annotate.review", "page.html")
    page = template.replace("POLICY", content_security_policy(template), 1)
    return page.replace(NO_DATA, NO_DATA.replace("null", json_in_script(data)), 1)


def _suggestion(label: TurnLabel | None) -> dict[str, Any] | None:
    if label is None or label.emotion is None:
        return None
    causes = None if label.causes is None else [{"turn": c.turn, "span": c.span} for c in label.causes]
    return {"emotion": label.emotion, "causes": causes}
