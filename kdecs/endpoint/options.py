"""The options that every command with an endpoint takes."""

from typing import Annotated, Any

import typer

KeyVariable = Annotated[
    str,
    typer.Option("--key-variable", metavar="NAME", help="Environment variable that holds the server's key."),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=JSON",
        help="Further key of each request, such as seed=1; null leaves one out, such as temperature=null.",
    ),
]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, max=256, help="Calls at a time.")]
PerMinute = Annotated[float, typer.Option("--per-minute", min=0, help="Most calls per minute; 0: no limit.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the server.")]
Attempts = Annotated[
    int, typer.Option("--attempts", min=1, max=100, help="Attempts per call before it fails.")
]


def request_options(texts: list[str] | None) -> dict[str, Any]:
    """The keys of a request that `--option KEY=JSON` gives. Raises typer.BadParameter."""
    from kdecs.corpus.checking import NotJson, decode_json

    options: dict[str, Any] = {}
    for text in texts or []:
        key, separator, value = text.partition("=")
        if not separator or not key or key in ("model", "messages", "stream", "n"):
            raise typer.BadParameter(f"--option {text}: expected KEY=JSON, such as seed=1")
        try:
            options[key] = decode_json(value.encode("utf-8", "surrogateescape")).value
        except NotJson:
            raise typer.BadParameter(f"--option {text}: the value is no JSON; put a text in quotes") from None
    return options
