"""A training job that any number of processes can run; ``python -m torch.distributed.run`` starts it for the tests.

Usage: ``ranks_job.py FOLDER RESULTS [SETTING=VALUE ...]``; the first rank writes gradients, losses and weights.
Beside those of ``train``: ``terms=[NUMBER, ...]`` takes some of the terms below; ``stop=STEP`` sends SIGTERM to the
last rank in that step, and a second call in the same folder goes on; ``norm=true`` gives the image encoder a
BatchNorm, and the metrics ``valid/apart``, how far the ranks' statistics are from each other when they validate.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import around, make_loader, make_objective, only_ids, terms
from torch import nn

from distill import engine, evaluate
from distill.averaging import as_mean_teacher, join_teachers
from distill.config import TrainConfig
from distill.contracts import Outputs
from distill.data.prepared import PreparedData
from distill.engine import Job, fit
from distill.interrupts import InterruptedRunError
from distill.multimodal import Encoded, Encoder, evaluating
from distill.ranks import Ranks, join
from distill.retrieval import pairs_of
from distill.sharding import local, whole
from distill.step import Stepper
from distill.tapped import Tapped

TERMS = [
    {"loss": "cross_entropy", "task": "kind"},
    {"loss": "cross_entropy", "task": "kind.text"},
    {"loss": "cross_entropy", "task": "tone.image", "weight": 0.5},
    {"loss": "kd", "task": "kind"},
    {"loss": "cosine", "embedding": "text"},
    {"loss": "fitnet", "taps": {"student": "encoders.image.layer", "teacher": "encoders.image.layer"}},
    {"loss": "clip_infonce", "embedding": "image,text"},
    {"loss": "clip_relational_kl", "embedding": "image,text"},
    {"loss": "clip_fd", "embedding": "image,text"},
    {"loss": "rkd", "embedding": "text", "weight": 0.01},
    {"loss": "sp", "embedding": "image"},
    {"loss": "dist", "task": "kind"},
    {"loss": "crd", "embedding": "text", "weight": 0.1, "params": {"dim": 4, "negatives": 9}},
    {"loss": "queue_kl", "embedding": "image", "params": {"size": 30, "teacher_temperature": 0.1}},
    {"loss": "ctkd", "task": "tone", "params": {"strength": {"from": 0.0, "to": 1.0, "until": 0.5}}},
    {"loss": "clip_afd", "embedding": "image,text", "weight": {"from": 1.0, "to": 0.1, "schedule": "cosine"}},
    {
        "loss": "siglip",
        "embedding": "image,text",
        "weight": 0.1,
        "positives": ["text", "group"],
        "params": {"logit_scale": "learned", "logit_bias": "learned"},
    },
    {"loss": "kd", "task": "kind", "teacher": ["teacher", "eye"], "mix": "learned"},
    {"loss": "dkd", "task": "kind", "teacher": ["teacher", "eye"], "mix": "confidence"},
    {"loss": "dist", "task": "tone", "teacher": ["teacher", "eye"], "mix": "learned"},
    {"loss": "mse_logits", "task": "kind", "teacher": "ema"},
    {"loss": "cross_entropy", "task": "kind.image"},
]
BY_DEFAULT = 20  # the next one needs train.ema
EYE = {"eye": ["image"]}
"""What the second teacher reads; the row without an image is the first one's alone."""


class Pixels(Encoder):
    """A layer on the pixels, in float64, by default without BatchNorm, which sees the rows of one rank alone."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.out_dim = width
        self.layer = nn.Sequential(nn.Linear(3 * 16 * 16, width), *([nn.BatchNorm1d(width)] if norm else []))

    def forward(self, inputs: dict[str, torch.Tensor]) -> Encoded:
        values = self.layer(inputs["image"].flatten(1).double() / 255)
        return Encoded(values[:, None], torch.ones_like(values[:, :1], dtype=torch.bool), values)


class Words(Encoder):
    """The mean of embedded tokens behind two layers, in float64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_dim = width
        self.table = nn.Embedding(200, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width))

    def forward(self, inputs: dict[str, torch.Tensor]) -> Encoded:
        tokens, mask = self.table(inputs["text"]), inputs["text_mask"]
        tokens = tokens + self.layers(tokens)
        return Encoded(tokens, mask, (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


def make_model(width: int, seed: int, norm: bool = False):
    torch.manual_seed(seed)
    return around({"image": Pixels(width, norm), "text": Words(width)}).double()


def apart(model: nn.Module, ranks: Ranks) -> float:
    """How far the buffers of the ranks' models are from their mean, added up over the ranks."""
    own = torch.cat([buffer.double().reshape(-1) for buffer in model.buffers()])
    return ranks.sum((own - ranks.sum(own) / ranks.count).abs().sum()).item()


def main() -> None:
    folder, results = Path(sys.argv[1]), Path(sys.argv[2])
    settings = {name: json.loads(value) for name, value in (item.split("=", 1) for item in sys.argv[3:])}
    ranks = join()
    data = PreparedData.open(folder / "data")
    tokenizer = folder / "tokenizer.json"
    slices = {"rank": ranks.rank, "world_size": ranks.count}
    rows, stop, norm = settings.pop("batch_size", 24), settings.pop("stop", None), settings.pop("norm", False)
    loader = make_loader(data, tokenizer, ("student", "teacher"), batch_size=rows, **slices)
    valid = make_loader(data, tokenizer, split="valid", shuffle=False, augment=None, **slices)
    student, teacher = make_model(8, 0, norm), make_model(8, 1).eval().requires_grad_(False)
    objective = terms(*(TERMS[number] for number in settings.pop("terms", range(BY_DEFAULT))))
    asked, eye = Tapped(teacher, ["encoders.image.layer"]), make_model(8, 2).eval().requires_grad_(False)

    def ask(batches):
        with torch.no_grad():
            said = eye(batches["teacher"]).logits
            return join_teachers(asked(batches["teacher"]), Outputs({f"{k}@eye": v for k, v in said.items()}, {}, {}))

    first = next(make_loader(data, tokenizer, ("student", "teacher"), batch_size=rows).epoch(0))
    rows_read = data.rows("train")
    columns = {"id": data.ids, "text": data.texts.numbers, "image": data.codes["image"], "group": data.groups}
    keys = {name: torch.tensor(values[rows_read].astype("int64")) for name, values in columns.items()}
    known = {"rows": only_ids(keys["id"]), "row_keys": keys, "reads": EYE}
    with evaluating(student):
        example = join_teachers(ask(first), as_mean_teacher(student(first["student"])))
    tapped, made = make_objective(student, objective, first["student"], example, **known)
    config = TrainConfig.model_validate({"epochs": 5, "batch_size": rows, "lr": 0.01} | settings)
    run = results / "run"
    run.mkdir(parents=True, exist_ok=True)
    kept, losses, held = {}, [], {}

    class Noting(Stepper):
        def _gradients(self, batch, answer):
            count, values = super()._gradients(batch, answer)
            losses.append(values)
            held["weights"] = sum(local(p).numel() for p in self.trainee.parameters())
            if len(losses) == stop and ranks.rank == ranks.count - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(losses) in (1, 4):  # a full batch, and the ragged last one of the epoch
                named = dict(self.trainee.named_parameters())
                found = {f"{len(losses)}.{n}": p.grad for n, p in named.items() if p.grad is not None}
                kept.update({name: value.clone() for name, value in whole(found).items()})
            return count, values

    engine.Stepper = Noting
    batches = evaluate.clean_batches(valid, "student")
    own = data.rows("valid")
    pairs = pairs_of(
        {name: columns[name][own] for name in ("image", "text")},
        {name: data.present[name][own] for name in ("image", "text")},
    )

    def validate(model):
        recall = evaluate.validation_recall(model, batches, pairs, ranks.gather)
        spread = {"valid/apart": apart(model, ranks)} if norm else {}
        return {**recall, **spread, **evaluate.validation_scores(model, batches, data.tasks, ranks.gather)}

    try:
        info = fit(Job(tapped, made.double(), loader, "student", config, run, 0, validate, ask))
    except InterruptedRunError:
        if stop is None:
            raise
        return
    if ranks.first:
        save_file(kept, results / "gradients.safetensors")
        save_file(dict(made.named_buffers()), results / "memories.safetensors")
        (results / "losses.json").write_text(json.dumps({"losses": losses, "info": info, "held": held}))


if __name__ == "__main__":
    main()
