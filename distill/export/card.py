"""The model card of a bundle: its README, with code that a reader can run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from distill.formats import TEXT
from distill.formats.image import ImageFormat
from distill.formats.tabular import TabularFormat
from distill.predict import LABELS_FILE, MODEL_FILE, RUNTIME
from distill.preprocess import ROWS, SPEC_FILE, TOKENIZER_FILE, Preprocessor, Tokenizer
from distill.runtimes import RUNTIMES
from distill.targets import CAPTIONING, CLASSIFICATION, KINDS, MULTILABEL, REGRESSION, Task

ARGUMENTS = {
    "image": "'photo.png'",
    "text": "'a few words'",
    "audio": "'sound.wav'",
    "video": "'clip.mp4'",
    "series": "'series.csv'",
}
"""Modality -> an example of what the predictor takes."""
WHAT = {CLASSIFICATION: "classes", MULTILABEL: "labels", REGRESSION: "numbers", CAPTIONING: "tokens of captions"}
"""Kind of task -> what its outputs are of."""
SAYS = {
    CLASSIFICATION: "Outputs of tasks with classes are logits: a softmax gives probabilities.",
    MULTILABEL: "Outputs of tasks with labels are logits of each: a sigmoid gives the probability that it holds.",
    REGRESSION: f"Outputs of tasks with numbers are standardised: times `std`, plus `mean`, both in `{LABELS_FILE}`.",
    CAPTIONING: f"Outputs of tasks with captions are ids of tokens, named in `{LABELS_FILE}`; 3 closes a caption.",
}
CORE_ML = (
    "In an app, add `model.mlpackage` to the Xcode project (iOS 16, macOS 13 or newer). It reads one row: whole",
    "numbers and flags as multi-arrays of int32, others of float32, of the shapes below with `batch` 1; texts are",
    "padded with 0 under a `text_mask` of 0. It gives float32.",
    "",
)
CHECK = (
    "`distill verify .` compares it with its source on the machine that runs it, where it brings rows for that:",
    "`check.safetensors` holds validation rows of its training data.",
    "",
)
TENSORRT = {
    "fp32": "`trtexec` builds an engine of this graph for 1 to 64 rows. TensorRT 11 has no `--fp16`: leave it out, or "
    "build that of the bundle `onnx-fp16`. It was not built here.",
    "fp16": "`trtexec` builds an engine of this graph for 1 to 64 rows; TensorRT 10 needs `--stronglyTyped` beside it. "
    "It was not built here.",
}
"""Precision -> what is said of an engine."""
PRESENT = "An input `..._present` that is false makes the model ignore that modality."
DIRECTIONS = (
    "Embeddings have length 1: the product of one of an image and one of a text is their cosine. An input",
    "`..._present` that is false gives zeros.",
)


def model_card(content: Mapping[str, Any], tasks: Mapping[str, Task], preprocessor: Preprocessor) -> str:
    """Return a bundle's README: what it is made of, how to run it, what goes in and comes out.

    Args:
        content: of ``bundle.json``.
        tasks: what the outputs say; empty for a model that gives embeddings alone.
        preprocessor: of the bundle.
    """
    tensors = [
        f"| {kind} | `{name}` | {value['dtype']} | {' x '.join(str(size) for size in value['shape'])} |"
        for kind in ("inputs", "outputs")
        for name, value in content[kind].items()
    ]
    told = [f"- `{name}`: {len(task.names)} {WHAT[task.kind]} ({_some(task.names)})" for name, task in tasks.items()]
    facts = [f"- {key}: {_plain(value)}" for part in ("info", "source") for key, value in content[part].items()]
    facts += _vocabulary(preprocessor.tokenizer)
    kinds = {task.kind for task in tasks.values()}
    arguments = ", ".join(f"'{name}': {_argument(preprocessor, name)}" for name in _modalities(preprocessor))
    verb = "predict" if tasks else "embed"
    return "\n".join(
        [
            f"# {content['name']}",
            "",
            f"A model distilled with multidistill. It runs on {content['runtime']}{_beside(content['runtime'])}.",
            "",
            *told,
            "",
            *facts,
            "",
            "## Use",
            "",
            *(
                _alone(preprocessor, [] if tasks else [*content["outputs"]], tasks)
                if content["runtime"] == RUNTIME
                else ()
            ),
            "```python",
            "from distill.predict import load",
            "",
            f"print(load('.').{verb}([{{{arguments}}}]))",
            "```",
            "",
            *(CORE_ML if content["runtime"] == "coreml" else ()),
            *(CHECK if "not_run" in content["info"] else ()),
            *_tensorrt(content, preprocessor),
            "## Tensors",
            "",
            "| | name | type | shape |",
            "|---|---|---|---|",
            *tensors,
            "",
            *([*(SAYS[kind] for kind in KINDS if kind in kinds), PRESENT] if tasks else DIRECTIONS),
            "`bundle.json` holds the sha256 of every file.",
            "",
        ]
    ).replace("\n\n\n", "\n\n")


def _tensorrt(content: Mapping[str, Any], preprocessor: Preprocessor) -> list[str]:
    """How TensorRT builds an engine from the graph; of ONNX files in float, as it takes int8 of another kind."""
    precision = content["info"].get("precision")
    if content["runtime"] != RUNTIME or precision not in TENSORRT:
        return []
    length = preprocessor.tokenizer.max_length if preprocessor.tokenizer else 1
    return [
        "## TensorRT",
        "",
        TENSORRT[precision],
        "",
        "```",
        trtexec(content["inputs"], length, half=precision == "fp32"),
        "```",
        "",
    ]


def trtexec(inputs: Mapping[str, Mapping[str, Any]], length: int, *, half: bool, batch: int = 64) -> str:
    """Return the command that builds a TensorRT engine for 1 to ``batch`` rows, best for one.

    Args:
        inputs: name -> dtype and shape, in which names stand for dimensions of any size.
        length: tokens of the longest text.
        half: whether TensorRT 10 may compute in fp16.
        batch: most rows.
    """
    profiles = {"min": (1, 1), "opt": (1, length), "max": (batch, length)}
    shapes = [
        f"--{name}Shapes="
        + ",".join(
            f"{tensor}:" + "x".join(str({"batch": rows, "length": tokens}.get(size, size)) for size in value["shape"])
            for tensor, value in inputs.items()
        )
        for name, (rows, tokens) in profiles.items()
    ]
    flags = ["--fp16"] if half else []
    return " \\\n  ".join([f"trtexec --onnx={MODEL_FILE} --saveEngine=model.plan", *flags, *shapes])


def _beside(runtime: str) -> str:
    """What a runtime needs, and what it does not."""
    chosen = RUNTIMES[runtime]
    needs = f" (`pip install 'multidistill[{chosen.extra}]'`)" if chosen.extra else ""
    return needs if chosen.needs_torch else f"{needs}, without torch"


def _plain(value: Any) -> str:
    """A fact as people read it; of a search for float layers the names, not the table."""
    if isinstance(value, Mapping) and value.keys() >= {"kept", "scan"}:
        return f"{len(value['kept'])} of {len(value['scan'])} layers are kept in float: {', '.join(value['kept'])}"
    return value if isinstance(value, str) else f"`{json.dumps(value)}`"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _argument(preprocessor: Preprocessor, modality: str) -> str:
    """An example of what the predictor takes."""
    records = preprocessor.formats.get(modality)
    if not isinstance(records, TabularFormat):
        return ARGUMENTS[modality]
    values = {**dict.fromkeys(records.numbers[:2], 1.5), **dict.fromkeys(records.categories[:1], "name")}
    return repr(values)


def _modalities(preprocessor: Preprocessor) -> list[str]:
    return [*preprocessor.formats, *([TEXT] if preprocessor.tokenizer else [])]


def _alone(preprocessor: Preprocessor, embeddings: Sequence[str], tasks: Mapping[str, Task]) -> list[str]:
    """How to run the graph with nothing but the runtime and what decodes files; of images, texts and classes alone."""
    image = preprocessor.formats.get("image")
    plain = all(task.kind == CLASSIFICATION for task in tasks.values())
    if not plain or not {"image", TEXT}.issuperset(_modalities(preprocessor)):
        return []
    packages = ["onnxruntime", "numpy"]
    packages += ["pillow"] if image is not None else []
    packages += ["tokenizers"] if preprocessor.tokenizer else []
    lines = [f"In this folder, with {', '.join(packages[:-1])} and {packages[-1]} alone:"]
    if image is not None:
        lines += [
            "(As in training, `draft` decodes a large JPEG at a fraction of its size, and a `centering` just below one",
            "half rounds an odd margin down.)",
        ]
    assert image is None or isinstance(image, ImageFormat)
    code = _example(image, preprocessor.tokenizer, embeddings)
    return [
        *lines,
        "",
        "```python",
        *code,
        "```",
        "",
        "With multidistill, which also takes 16-bit greyscale images:",
        "",
    ]


def _vocabulary(tokenizer: Tokenizer | None) -> list[str]:
    """What became of a pruned vocabulary."""
    if tokenizer is None or tokenizer.rows is None:
        return []
    rows = tokenizer.rows
    return [f"- tokens: {len(rows):,}, which are read by {rows.count:,} embeddings (`{ROWS}` in `{SPEC_FILE}`)"]


def _token_ids(tokenizer: Tokenizer) -> list[str]:
    """Lines that give the ids of a text, [1, L]."""
    ids = f'np.array([Tokenizer.from_file("{TOKENIZER_FILE}").encode("a few words").ids])'
    rows = f'np.array(json.load(open("{SPEC_FILE}", encoding="utf-8"))["{TEXT}"]["{ROWS}"])'
    return [f"ids = {ids}"] if tokenizer.rows is None else [f"rows = {rows}", f"ids = rows[{ids}]"]


def _example(image: ImageFormat | None, tokenizer: Tokenizer | None, embeddings: Sequence[str]) -> list[str]:
    """At most 16 lines of Python that prepare one row exactly as ``Preprocessor`` does, and classify or embed it."""
    lines = ["import json", "import numpy as np", "from onnxruntime import InferenceSession"]
    feeds = []
    if image is not None:
        lines.append("from PIL import Image, ImageOps")
    if tokenizer is not None:
        lines.append("from tokenizers import Tokenizer")
    if image is not None:
        size = image.size
        lines += [
            f'(image := Image.open("photo.png")).draft("RGB", ({2 * size}, {2 * size}))',
            'image = ImageOps.exif_transpose(image).convert("RGBA")',
            'image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")',
        ]
        if image.crop:
            lines.append(f"pixels = np.array([ImageOps.fit(image, ({size}, {size})).split()])")
        else:
            square = f'ImageOps.pad(image, ({size}, {size}), color="white", centering=(0.4999, 0.4999))'
            lines += [
                f"image = image.resize([max(1, round(side * {size} / max(image.size))) for side in image.size])",
                f"pixels = np.array([{square}.split()])",
            ]
        feeds.append('"image": pixels, "image_present": [True]')
    if tokenizer is not None:
        lines += _token_ids(tokenizer)
        feeds.append('"text": ids, "text_mask": ids >= 0, "text_present": [True]')
    lines.append(f"feeds = {{{', '.join(feeds)}}}")
    if embeddings:
        return [*lines, f'print(InferenceSession("{MODEL_FILE}").run({json.dumps(embeddings)}, feeds))']
    return [
        *lines,
        f'labels = json.load(open("{LABELS_FILE}", encoding="utf-8"))',
        f'for task, logits in zip(labels, InferenceSession("{MODEL_FILE}").run(list(labels), feeds)):',
        "    print(task, labels[task][logits.argmax()], 1 / np.exp(logits - logits.max()).sum())  # its probability",
    ]
