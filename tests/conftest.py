"""Fixtures that several test files share: tiny checkpoints and tiny prepared data, made once a session."""

from functools import partial

import pytest
import tiny
import torch
from tiny_job import BUDGET

from distill import evaluate
from distill.config import TrainConfig
from distill.data.prepared import PreparedData
from distill.engine import Job

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A random BERT in transformers format."""
    return tiny.write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP, both towers, in transformers format."""
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def wordpiece_file(tmp_path_factory):
    """A WordPiece tokenizer.json."""
    return tiny.write_wordpiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Small learnable data, opened; a few of its rows lack an image, a text or a label."""
    return PreparedData.open(tiny.write_prepared(tmp_path_factory.mktemp("prepared")))


@pytest.fixture
def make_job(prepared, wordpiece_file, tmp_path):
    """A job in a folder of its own name; the same arguments give the same job."""

    def make(
        name="run", *, objective=tiny.LABELS, model=None, loader=None, seed=0, teacher=None, example=None, **config
    ):
        loader = loader or tiny.make_loader(prepared, wordpiece_file)
        model = model or tiny.make_model(wordpiece_file, dropout=0.2, modality_dropout=0.2)
        ids = torch.tensor(prepared.ids[prepared.rows("train")])
        tapped, made = tiny.make_objective(
            model, objective, loader.at(0, 0)["student"], example, rows=tiny.only_ids(ids)
        )
        valid = tiny.make_loader(prepared, wordpiece_file, split="valid", shuffle=False, augment=None)
        batches = evaluate.clean_batches(valid, "student")
        validate = partial(evaluate.validation_scores, batches=batches, tasks=tiny.TASKS)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = TrainConfig.model_validate(BUDGET | config)
        return Job(tapped, made, loader, "student", settings, folder, seed, validate, teacher)

    return make
