"""Fixtures that several test files share: tiny checkpoints and tiny prepared data, made once a session."""

import pytest
import tiny
import torch

from distill.data.prepared import PreparedData

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
