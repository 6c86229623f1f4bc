"""Encoders that embed their input and do no more: a token reads its own piece, and one transformer reads them all."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from test_encoders import DATA, PARAMS
from torch import Tensor

from distill.build import build_model, example_batch, input_spec, told_by_data
from distill.builders import build_part
from distill.config import ModelConfig
from distill.contracts import UserError
from distill.data_config import Part
from distill.evaluate import feeds
from distill.export.onnx import export_onnx
from distill.multimodal import evaluating
from distill.pipeline import ENCODERS
from distill.predict import open_session
from distill.targets import unnamed
from students.embedded import AudioPatches, ImagePatches, SeriesPatches, TabularTokens, TextTokens

EMBEDDED = {
    "image": "image_patches",
    "text": "text_tokens",
    "audio": "audio_patches",
    "series": "series_patches",
    "tabular": "tabular_tokens",
}


def joint(tokenizer_file: Any, modalities: list[str], **fusion: Any) -> Any:
    encoders = {name: {"type": EMBEDDED[name], **PARAMS[EMBEDDED[name]]} for name in modalities}
    fused = {"type": "self_attention", "dim": 16, "depth": 2, "heads": 2} | fusion
    config = ModelConfig.model_validate(
        {"encoders": encoders, "fusion": fused, "embedding_dim": 8, "unimodal_heads": False}
    )
    given = told_by_data(config, ENCODERS, DATA) | {"text": {"tokenizer_file": tokenizer_file}}
    torch.manual_seed(0)
    return build_model(config, ENCODERS, {"kind": unnamed(3)}, "student", given).eval()


def differing(ours: Tensor, theirs: Tensor) -> list[int]:
    """The tokens in which one row's differ."""
    return (ours != theirs).flatten(2).any(2)[0].nonzero().flatten().tolist()


def test_a_patch_is_a_token_and_its_place_is_known():
    encoder = ImagePatches(image_size=20, dim=6, patch=8)
    image = torch.full((1, 3, 20, 20), 90, dtype=torch.uint8)
    plain = encoder({"image": image}).tokens
    assert plain.shape == (1, 9, 6)
    assert len(plain[0, [0, 1, 3, 4]].unique(dim=0)) == 4  # whole patches are alike but for their places
    image[0, :, 17, 2] = 200  # in the third row of patches
    assert differing(plain, encoder({"image": image}).tokens) == [6]


def test_a_smaller_image_has_the_first_places():
    encoder = ImagePatches(image_size=32, dim=6, patch=8)
    image = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    small = encoder({"image": image[:, :, :16, :16]}).tokens
    assert torch.allclose(small, encoder({"image": image}).tokens[:, [0, 1, 4, 5]], atol=1e-6)


def test_a_word_is_a_token_and_padding_is_none():
    encoder = TextTokens(tokenizer_file="tokenizer.json", vocab_size=9, dim=6, max_length=5)
    text, mask = torch.tensor([[3, 3, 4, 0]]), torch.tensor([[True, True, True, False]])
    plain = encoder({"text": text, "text_mask": mask})
    assert not torch.equal(plain.tokens[0, 0], plain.tokens[0, 1])
    assert not plain.tokens[0, 3].any()
    torch.testing.assert_close(plain.pooled, plain.tokens[:, :3].mean(1))
    assert differing(plain.tokens, encoder({"text": torch.tensor([[3, 5, 4, 7]]), "text_mask": mask}).tokens) == [1]


def test_a_window_of_steps_is_a_token():
    encoder = SeriesPatches(channels=2, num_steps=10, dim=6, patch=4)
    series, length = torch.rand(1, 10, 2), torch.tensor([10])
    changed = series.clone()
    changed[0, 5] += 1
    before, after = (encoder({"series": s, "series_length": length}).tokens for s in (series, changed))
    assert before.shape == (1, 3, 6)
    assert differing(before, after) == [1]


def test_a_sound_has_a_token_for_each_band_of_each_time_that_is_there():
    encoder = AudioPatches(sample_rate=8000, num_samples=2000, dim=6, patch=8, bands=10)
    audio = torch.randint(-9000, 9000, (2, 2000), dtype=torch.int16)
    found = encoder({"audio": audio, "audio_length": torch.tensor([2000, 700])})
    assert found.tokens.shape == (2, 16, 6)  # 25 frames in four times, four bands
    assert found.mask.sum(1).tolist() == [16, 8]  # the third time begins with the sample 1280
    assert found.mask[1, :8].all() and not found.tokens[1, 8:].any()
    audio[1, 700:] = 5
    assert torch.equal(found.tokens, encoder({"audio": audio, "audio_length": torch.tensor([2000, 700])}).tokens)


def test_a_column_is_a_token_and_an_unknown_code_is_one_of_its_own():
    encoder = TabularTokens(num_numbers=2, num_codes=1, code_size=3, dim=6)
    table = torch.tensor([[0.5, 0.5, 0.0, 0.0, 1.0]])
    before = encoder({"tabular": table}).tokens
    for place, token in ((0, 0), (3, 1), (4, 2)):
        changed = table.clone()
        changed[0, place] += 1
        assert differing(before, encoder({"tabular": changed}).tokens) == [token]


def test_one_graph_of_five_modalities_answers_for_every_subset(wordpiece_file, tmp_path):
    model = joint(wordpiece_file, list(EMBEDDED))
    subsets = list(product([True, False], repeat=len(EMBEDDED)))
    batch = example_batch(input_spec(model), DATA, rows=len(subsets), length=7)
    present = {name: torch.tensor([has[number] for has in subsets]) for number, name in enumerate(EMBEDDED)}
    batch = batch._replace(present=present)
    export_onnx(model, example_batch(input_spec(model), DATA, rows=3, length=5), tmp_path / "model.onnx")
    (found,) = open_session(tmp_path / "model.onnx").run(["kind"], dict(feeds(batch)))
    with evaluating(model):
        said = model(batch).logits["kind"]
    assert float((torch.from_numpy(found) - said).abs().max()) < 1e-5
    assert len(said.round(decimals=6).unique(dim=0)) == len(subsets)


def test_modalities_meet_from_the_first_layer_on(wordpiece_file):
    model = joint(wordpiece_file, ["image", "text"], depth=1)
    batch = example_batch(input_spec(model), DATA, rows=2, length=7)
    changed = batch._replace(inputs={**batch.inputs, "text": (batch.inputs["text"] + 3) % 9})
    states = []
    model.fusion.blocks[0].register_forward_hook(lambda module, given, state: states.append(state))
    with evaluating(model):
        model(batch), model(changed)
    image = states[0].shape[1] - 8  # its tokens stand before the text's seven, each with a learned one
    assert (states[0] != states[1]).any(2)[:, :image].all()


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("image_patches", {"patch": 0}, "patch is 0, expected at least 1"),
        ("audio_patches", {"bands": 0}, "bands is 0, expected at least 1"),
        ("series_patches", {"dim": 0}, "dim is 0, expected at least 1"),
        ("tabular_tokens", {"num_numbers": 0, "num_codes": 0}, "a table has at least one column"),
        ("image_patches", {"depth": 2}, "image_patches has no parameter 'depth'"),
    ],
)
def test_sizes_that_make_no_tokens_are_refused(kind, changes, said):
    given = {
        "image_patches": {"image_size": 32},
        "audio_patches": {"sample_rate": 16000, "num_samples": 4000},
        "series_patches": {"channels": 2, "num_steps": 24},
        "tabular_tokens": {"num_numbers": 2, "num_codes": 1, "code_size": 4},
    }[kind]
    part = Part.model_validate({"type": kind, **given, "dim": 16, **changes})
    with pytest.raises(UserError, match=said):
        build_part(ENCODERS, part, "student.encoders.x")
