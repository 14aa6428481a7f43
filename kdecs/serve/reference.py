"""The schema of the HTTP interface as a page for people: FastAPI's own pages load scripts from the network."""

import json
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from kdecs.pages import content_hash

_EXAMPLE = {"id": "d1", "utterances": [{"speaker": "A", "utterance": "I got the job!"}]}
_LIMITS = {
    "minimum": "from {}",
    "maximum": "up to {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}


def reference_page(schema: dict[str, Any], address: str) -> tuple[str, str]:
    """The page of an OpenAPI schema for a server at an address, and the Content-Security-Policy that it needs."""
    environment = Environment(
        loader=PackageLoader("kdecs.serve", "."),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("reference.html").render(
        **_with_defaults(schema), kind=_kind, address=address, example=json.dumps(_EXAMPLE)
    )
    style = content_hash(re.findall(r"(?s)<style>(.*?)</style>", page))
    policy = f"default-src 'none'; img-src data:; style-src '{style}'; base-uri 'none'; form-action 'none'"
    return page, f"{policy}; frame-ancestors 'none'"


def _with_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the keys that the page reads and OpenAPI leaves out where they are empty."""
    for methods in schema["paths"].values():
        for method, operation in methods.items():
            methods[method] = {"description": "", "parameters": [], "requestBody": None, **operation}
    for name, model in schema["components"]["schemas"].items():
        fields = {field: {"description": "", **value} for field, value in model["properties"].items()}
        schema["components"]["schemas"][name] = {"required": [], **model, "properties": fields}
    return schema


def _kind(value: dict[str, Any]) -> Markup:
    """A JSON schema in words, with links to the models that it names."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return Markup('<a href="#{0}">{0}</a>').format(name)
    if "anyOf" in value:
        return Markup(" or ").join(_kind(part) for part in value["anyOf"])
    found = Markup("list of {}").format(_kind(value["items"])) if "items" in value else escape(value["type"])
    limits = [text.format(f"{value[key]:,g}") for key, text in _LIMITS.items() if key in value]
    limits = ["not empty" if limit.startswith("at least 1 ") else limit for limit in limits]
    return found + f" ({', '.join(limits)})" if limits else found
