"""`kdecs serve`. FastAPI and torch are imported inside the function, so that `kdecs --help` stays fast."""

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from kdecs.errors import DependencyError, KdecsError
from kdecs.student.commands import BatchTokens, Device

_MIN_TOKEN_CHARACTERS = 16


def serve(
    student: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of a trained student, or of its export.")
    ],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to listen on; any but loopback needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file with the token that clients must send; by default the variable KDECS_SERVE_TOKEN.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name by which clients call this server; repeatable."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Give a request up after this time.")
    ] = 60.0,
    device: Device = "auto",
    batch_tokens: BatchTokens = 8192,
) -> None:
    """Answer requests for predictions over HTTP, and show a page to try the student on.

    POST /v1/predict takes one dialogue or a list, GET /health tells whether the server lives, GET /docs
    describes both. SIGTERM and Ctrl-C end the server once the running requests are answered.

    Examples:

    kdecs serve --student runs/student-tiny

    kdecs serve --student runs/student-tiny --host 0.0.0.0 --allowed-host emotions.example.org --token-file token
    """
    from kdecs.process import say, served_token
    from kdecs.serve.guard import address_of, guarded, listen, own_names, run_server

    token = served_token(token_file)
    if token is None and not _is_loopback(host):
        raise KdecsError(
            f"--host {host}: other machines can reach this address, so the server needs a token; write one into a "
            "file (head -c 24 /dev/urandom | base64 > token) and give --token-file token, or listen on 127.0.0.1"
        )
    if token is not None and (
        len(token) < _MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable()
    ):
        raise KdecsError(
            f"{token_file or 'KDECS_SERVE_TOKEN'}: found a token that is too short or holds other than printable ASCII "
            f"characters, expected one line of at least {_MIN_TOKEN_CHARACTERS}; make one with: "
            "head -c 24 /dev/urandom | base64"
        )
    try:
        from kdecs.serve.server import OPEN_PATHS, Batchers, make_app
    except ImportError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise DependencyError(
            f"FastAPI is not installed ({error}); install it with: pip install 'kdecs[serve]'"
        ) from None
    with listen(host, port) as listener:
        from kdecs.student.predict.predictor import Student

        loaded = Student.from_pretrained(student, device=device)
        with Batchers(loaded, batch_tokens=batch_tokens) as batchers:
            app = guarded(
                make_app(batchers, timeout_s=timeout),
                own_names(host, allowed_host or []),
                token=token,
                open_paths=OPEN_PATHS,
            )
            say(f"{student}: {address_of(listener)} (Ctrl-C ends it)")
            # A request may wait for its whole time, and then its answer has to be sent.
            run_server(app, listener, stop_after_s=timeout + 5)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, whose address may change
        return False
