"""A bundle behind HTTP: the same answers as without, for one request and many, and a sentence for each mistake."""

from __future__ import annotations

import base64
import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_models import tiny_preprocessor, write_tiny_graph
from PIL import Image
from tiny_project import distill, refusal

from distill.export.bundle import write_bundle
from distill.predict import Predictor, load
from distill.serving import join_feeds
from distill.targets import tasks_from_json

NAMES = ["apple", "bird", "chair"]
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
    port: int, path: str, body: Any = None, *, host: str = "", kind: str = "application/json", chunked: bool = False
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": kind} | ({"Host": host} if host else {})
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
