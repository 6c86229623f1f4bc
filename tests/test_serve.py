"""A bundle behind HTTP: the same answers as without, for one request and many, and a sentence for each mistake."""

from __future__ import annotations

import asyncio
import base64
import http.client
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export_models import tiny_preprocessor, write_tiny_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_project import distill, refusal

from distill.export.bundle import write_bundle
from distill.predict import Predictor, load
from distill.serving import Batcher, BusyError, Limits, join_feeds
from distill.targets import tasks_from_json

NAMES = ["apple", "bird", "chair"]
GRACE = "import sys; import distill.serve_command as s; s.GRACE_SECONDS = 1;"
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from distill.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_bundle(
        folder / "bundle",
        model_path=write_tiny_graph(folder / "graph.onnx"),
        preprocessor=tiny_preprocessor(folder, image_size=8),
        tasks=tasks_from_json({"category": NAMES}),
        name="tiny",
        source={},
        info={},
    )
    return folder / "bundle"


@pytest.fixture(scope="module")
def port(bundle: Path) -> Iterator[int]:
    """Of a server in a process that cannot import torch."""
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        "serve",
        bundle,
        "--port",
        "0",
        "--max-mb",
        "0.1",
        "--max-rows",
        "8",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"serving tiny on http://127\.0\.0\.1:(\d+) ", line)
        assert found, (line, process.communicate(timeout=10))
        yield int(found[1])
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


@pytest.fixture(scope="module")
def photo(bundle: Path) -> Path:
    path = bundle.parent / "photo.png"
    Image.new("RGB", (20, 10), (200, 30, 90)).save(path)
    return path


def ask(
    port: int,
    path: str,
    body: Any = None,
    *,
    host: str = "",
    origin: str = "",
    kind: str = "application/json",
    chunked: bool = False,
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": kind} | ({"Host": host} if host else {}) | ({"Origin": origin} if origin else {})
    sent = iter([content]) if chunked else content
    connection.request("GET" if body is None else "POST", path, sent, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if answer.headers.get("content-type") == "application/json" else text


def form(**fields: str | bytes) -> tuple[bytes, str]:
    """A form with files and texts, and its type."""
    parts = []
    for name, value in fields.items():
        file = '; filename="a"' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else value.encode()
        parts.append(f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content)
    return b"\r\n".join([*parts, b"--edge--\r\n"]), "multipart/form-data; boundary=edge"


def test_answers_are_those_of_predict(port: int, bundle: Path, photo: Path) -> None:
    picture = base64.b64encode(photo.read_bytes()).decode()
    rows = [{"image": picture, "text": "red cat"}, {"image": picture}, {"text": "blue dog green"}]
    status, answer = ask(port, "/predict", {"rows": rows, "top_k": 2})
    expected = load(bundle).predict([{**row, **({"image": photo} if "image" in row else {})} for row in rows], top_k=2)
    assert status == 200 and answer == {"predictions": json.loads(json.dumps(expected))}
    body, kind = form(image=photo.read_bytes(), text="red cat")
    status, answer = ask(port, "/predict/form?top_k=2", body, kind=kind)
    assert status == 200 and answer["category"]["label"] == expected[0]["category"]["label"]
    assert answer["category"]["probability"] == pytest.approx(expected[0]["category"]["probability"], abs=1e-6)


def test_many_at_once_get_their_own_answers(port: int, bundle: Path) -> None:
    texts = [" ".join(["red", "blue", "cat", "dog"][number % 4 :][: 1 + number % 3]) for number in range(60)]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda text: ask(port, "/predict", {"rows": [{"text": text}]}), texts))
    expected = load(bundle).predict([{"text": text} for text in texts])
    for (status, answer), one in zip(found, expected, strict=True):
        assert status == 200
        said = answer["predictions"][0]["category"]
        assert said["probability"] == pytest.approx(one["category"]["probability"], abs=1e-5)
        assert said["label"] == one["category"]["label"]
    assert ask(port, "/health") == (200, {"status": "ok", "model": "tiny", "waiting": 0})


def test_joined_rows_have_the_outputs_of_rows_alone(bundle: Path) -> None:
    predictor: Predictor = load(bundle)
    parts = [predictor.feeds([{"text": text}]) for text in ("red", "blue dog green cat", "dog")]
    assert len({part["text"].shape for part in parts}) > 1
    joined = predictor.run(join_feeds(parts, predictor.preprocessor.tokenizer.pad_id))  # type: ignore[union-attr]
    for row, part in enumerate(parts):
        np.testing.assert_allclose(joined["category"][row], predictor.run(part)["category"][0], atol=1e-5)


def test_what_it_reads_is_told(port: int) -> None:
    status, model = ask(port, "/model")
    assert status == 200 and model["reads"] == ["image", "text"]
    assert model["tasks"] == {"category": {"kind": "classification", "names": NAMES}}
    status, schema = ask(port, "/openapi.json")
    assert status == 200 and {"/predict", "/predict/form", "/embed", "/health", "/model"} == schema["paths"].keys()
    assert {"image", "text"} == schema["components"]["schemas"]["Row"]["properties"].keys()
    content = schema["paths"]["/predict/form"]["post"]["requestBody"]["content"]
    assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"rows": []}, 422, "at least 1"),
        ({"rows": [{"text": "a"}] * 9}, 422, "at most 8"),
        ({"rows": [{"sound": "a"}]}, 422, "sound"),
        ({"rows": [{}]}, 422, "row 0 has no image or text"),
        ({"rows": [{"text": "a"}, {"text": " "}]}, 422, "row 1 has no image or text"),
        ({"rows": [{"image": "/etc/hostname"}]}, 422, "row 0: image is no base64"),
        ({"rows": [{"image": "photo.png"}]}, 422, "row 0: image is no base64"),
        ({"rows": [{"image": "AAAA"}]}, 422, "row 0: not a readable image"),
        ({"rows": [{"text": "a"}], "top_k": 0}, 422, "top_k"),
        (b'{"rows": [{"text": "a"}], "top_k": NaN}', 422, "top_k"),
        (b'{"rows": [{"text": "\\ud800 red"}]}', 422, "row 0: the text has half of a surrogate pair"),
        (b'{"rows": [{"text": "a"}], "\\ud800": 1}', 422, "unable to parse"),
        (b"{", 422, "JSON"),
        ({"rows": [{"text": "a" * 200_000}]}, 413, "larger than 100000 bytes"),
    ],
)
def test_mistakes(port: int, body: Any, status: int, message: str) -> None:
    found, answer = ask(port, "/predict", body)
    assert found == status and message in json.dumps(answer), answer


def test_a_body_that_does_not_tell_its_size_is_counted(port: int) -> None:
    status, answer = ask(port, "/predict", json.dumps({"rows": [{"text": "a" * 200_000}]}).encode(), chunked=True)
    assert status == 413 and "larger than 100000 bytes" in answer["detail"]


def test_mistakes_in_forms(port: int) -> None:
    for fields, message in (
        ({"text": "a", "sound": b"x"}, "reads no sound; it reads image, text"),
        ({"image": "/etc/hostname"}, "not a readable image"),
        ({"text": ""}, "has no image or text"),
    ):
        body, kind = form(**fields)  # type: ignore[arg-type]
        status, answer = ask(port, "/predict/form", body, kind=kind)
        assert status == 422 and message in answer["detail"], answer


def test_a_file_that_was_not_chosen_is_absent(port: int) -> None:
    body, kind = form(image=b"", text="red cat")
    assert ask(port, "/predict/form", body, kind=kind)[0] == 200


def test_pages_elsewhere_are_refused(port: int) -> None:
    body = {"rows": [{"text": "red"}]}
    assert ask(port, "/predict", body, origin="http://evil.example")[0] == 403
    assert ask(port, "/predict", body, origin="null")[0] == 403
    assert ask(port, "/predict", body, origin=f"http://127.0.0.1:{port}")[0] == 200


class Stand:
    """A predictor whose graph doubles a number, takes a while, and fails at a negative one."""

    preprocessor = SimpleNamespace(tokenizer=None)

    def __init__(self) -> None:
        self.runs: list[int] = []

    def feeds(self, rows: Any) -> dict[str, Any]:
        time.sleep(0.005)
        return {"x": np.array([[row] for row in rows], np.float32)}

    def run(self, feeds: Any) -> dict[str, Any]:
        self.runs.append(len(feeds["x"]))
        time.sleep(0.01)
        if (feeds["x"] < 0).any():
            raise MemoryError("no room")
        return {"y": 2 * feeds["x"]}


def asked(stand: Stand, limits: Limits, requests: list[list[float]]) -> list[Any]:
    """What concurrent requests get."""

    async def all_of_them() -> list[Any]:
        batcher = Batcher(stand, limits)  # type: ignore[arg-type]
        worker = asyncio.create_task(batcher.work())
        found = await asyncio.gather(*(batcher.run(rows) for rows in requests), return_exceptions=True)
        assert batcher.waiting == 0 and not worker.done()
        worker.cancel()
        return found

    return asyncio.run(all_of_them())


def test_what_fails_together_is_tried_alone_and_later_requests_get_answers() -> None:
    requests = [[float(number)] for number in range(12)]
    requests[5] = [-1.0]
    found = asked(Stand(), Limits(), requests)
    for number, answer in enumerate(found):
        if number == 5:
            assert isinstance(answer, MemoryError)
        else:
            assert answer["y"].tolist() == [[2.0 * number]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 6))
def test_runs_have_as_many_rows_as_they_may_and_everyone_gets_his_own(sizes: list[int], batch: int) -> None:
    stand, numbers = Stand(), itertools.count()
    requests = [[float(next(numbers)) for _ in range(size)] for size in sizes]
    found = asked(stand, Limits(batch=batch), requests)
    assert [answer["y"][:, 0].tolist() for answer in found] == [[2 * x for x in rows] for rows in requests]
    assert max(stand.runs) <= batch and sum(stand.runs) == sum(sizes)


def test_who_comes_when_too_many_wait_is_told_so_and_one_alone_never_is() -> None:
    found = asked(Stand(), Limits(waiting=3), [[1.0] * 3] * 6)
    busy = [isinstance(answer, BusyError) for answer in found]
    assert busy == [False, False, True, True, True, True]  # the second one finds three rows waiting, as many as may
    assert not isinstance(asked(Stand(), Limits(waiting=3), [[1.0] * 50])[0], BusyError)


def test_a_request_that_does_not_end_does_not_keep_the_server(bundle: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH.replace("import sys;", GRACE), "serve", bundle, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r":(\d+) ", process.stdout.readline())
        assert found
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=10) as waiting:
            waiting.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
            assert ask(int(found[1]), "/health")[0] == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0


def test_names_that_others_point_here_are_refused(port: int) -> None:
    assert ask(port, "/health", host="evil.example")[0] == 400
    assert ask(port, "/health", host=f"localhost:{port}")[0] == 200


def test_no_other_machine_is_answered(port: int) -> None:
    listening = Path("/proc/net/tcp")
    if not listening.is_file():
        pytest.skip("no list of sockets here")
    lines = [line.split()[1] for line in listening.read_text().splitlines()[1:]]
    assert next(line for line in lines if line.endswith(f":{port:04X}")).startswith("0100007F:")


def test_refusals(bundle: Path, port: int, tmp_path: Path) -> None:
    assert f"--port {port} cannot be had on 127.0.0.1" in refusal(distill("serve", bundle, "--port", str(port)))
    assert "is not a bundle" in refusal(distill("serve", tmp_path, "--port", "0"))
