"""``distill serve``: a bundle behind HTTP on this machine."""

from __future__ import annotations

import errno
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer

from distill.contracts import UserError

HOST = "127.0.0.1"
GRACE_SECONDS = 5  # for requests that have begun, once it is asked to stop


def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder, e.g. runs/NAME/quantize/onnx-int8.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    threads: Annotated[int, typer.Option(min=1, help="Threads inside an operator.")] = 1,
    provider: Annotated[str, typer.Option(help="Of ONNX bundles: cpu, cuda or tensorrt.")] = "cpu",
    max_mb: Annotated[float, typer.Option(min=0.01, max=2048, help="Largest request, MB.")] = 16.0,
    max_rows: Annotated[int, typer.Option(min=1, help="Most rows of a request.")] = 64,
) -> None:
    """Answer rows over HTTP, on this machine alone (127.0.0.1); needs no torch."""
    try:
        import uvicorn

        from distill.serving import Limits, make_app
    except ModuleNotFoundError as error:
        raise UserError(f"distill serve needs {error.name}: pip install 'multidistill[serve]'") from error
    from distill.predict import load

    predictor = load(bundle, threads=threads, provider=provider)
    limits = Limits(body_bytes=int(max_mb * 1e6), rows=max_rows)
    with _bound(port) as listening:
        app = make_app(predictor, limits)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS)
        server = uvicorn.Server(config)

        def leave(signum: int, frame: object) -> None:
            server.should_exit = True

        # uvicorn has handlers of its own while it runs, and raises what it got again for those from before
        before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
        address = f"http://{HOST}:{listening.getsockname()[1]}"
        typer.echo(f"serving {predictor.info['name']} on {address} (POST {address}/predict); stop with Ctrl-C")
        try:
            server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _bound(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()  # from here on requests wait, and are answered as soon as the server has begun
    except OSError as error:
        listening.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(
                f"--port {port} cannot be had on {HOST}: {error.strerror}; give another one, or 0"
            ) from None
        raise
    return listening
