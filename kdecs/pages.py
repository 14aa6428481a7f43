"""Pages for people in one HTML file each, which load nothing from anywhere and run no script but their own.

A template has one `<style>`, in which a comment marks the place of the rules that all pages share (`pages.css`), one
`<script>`, the word POLICY in its Content-Security-Policy, and an element `data` for JSON, `NO_DATA`. The policy names
script and style by their hashes, so that the browser runs that script and no other, whatever the texts in the data
hold.
"""

import base64
import functools
import hashlib
import json
import re
from importlib import resources

_SHARED_STYLE = "/* pages.css */\n"
NO_DATA = '<script type="application/json" id="data">null</script>'


@functools.cache
def page_template(package: str, name: str) -> str:
    """The text of a template that comes with a package of kdecs, with the rules of style that all pages share."""
    text = (resources.files(package) / name).read_text(encoding="utf-8")
    assert text.count(NO_DATA) == text.count(_SHARED_STYLE) == 1
    return text.replace(_SHARED_STYLE, (resources.files("kdecs") / "pages.css").read_text(encoding="utf-8"))


@functools.cache
def content_security_policy(template: str, *more: str, asks: bool = False) -> str:
    """What a page may do: run its own script and style, and, if it `asks`, send requests to its own server."""
    # By hashes, because a file has no server that could give each answer a nonce.
    script, style = (
        content_hash(re.findall(rf"(?s)<{tag}>(.*?)</{tag}>", template)) for tag in ("script", "style")
    )
    parts = ["default-src 'none';", *(["connect-src 'self';"] if asks else [])]
    parts += ["img-src data:;", f"script-src '{script}';", f"style-src '{style}';"]
    return " ".join([*parts, "base-uri 'none'; form-action 'none'", *(f"; {part}" for part in more)])


def content_hash(found: list[str]) -> str:
    """How a Content-Security-Policy names the one script or style that was found."""
    [content] = found
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def json_in_script(value: object) -> str:
    """JSON that no text in it can end the script element of."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
