"""Towers in open_clip format: they say what open_clip says, export, and what cannot be is refused."""

import copy
import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZE, write_bert

from distill.builders import build_part
from distill.config import Part
from distill.contracts import CLEAN_VIEW, Batch, UserError
from distill.dual import DualEncoder
from distill.export.onnx import export_onnx, graph_outputs
from distill.predict import open_session
from distill.prune import apply
from distill.prune.vocabulary import plan_vocabulary
from distill.tapped import Tapped
from teachers import ENCODERS

needs_open_clip = pytest.mark.skipif(find_spec("open_clip") is None, reason="open_clip_torch is not installed")
SHAPE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 10, "vocab_size": 80, "width": 16, "heads": 2, "layers": 2},
}
STATISTICS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
TEXT = torch.tensor([[7, 9, 11, 79], [8, 6, 79, 0]])
MASK = torch.tensor([[True] * 4, [True, True, True, False]])
PIXELS = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INPUTS = {"image": {"image": PIXELS}, "text": {"text": TEXT, "text_mask": MASK}}


def whole():
    import open_clip

    torch.manual_seed(0)
    return open_clip.CLIP(**SHAPE).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("open_clip")
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": SHAPE, "preprocess_cfg": STATISTICS}))
    save_file(whole().state_dict(), place / "open_clip_model.safetensors")
    write_bert(place / "bert")
    shutil.copy(place / "bert" / "tokenizer.json", place)
    return place


def built(folder, modality, **params):
    part = Part(type=f"open_clip_{modality}", weights=f"path:{folder}", **params)
    return build_part(ENCODERS, part, f"encoders.{modality}")


@needs_open_clip
def test_embeddings_are_the_checkpoints(folder):
    image, text = (built(folder, modality).eval() for modality in ("image", "text"))
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in STATISTICS.values())
    with torch.no_grad():
        seen, read = image(INPUTS["image"]), text(INPUTS["text"])
        torch.testing.assert_close(seen.pooled, whole().encode_image((PIXELS / 255 - mean) / std))
        padded = torch.nn.functional.pad(TEXT, (0, 6))
        torch.testing.assert_close(read.pooled, whole().encode_text(padded))
    assert image.out_dim == text.out_dim == 8 and seen.mask.all() and read.mask.all()
    assert seen.tokens.shape == read.tokens.shape == (2, 1, 8)
    assert image.own_scale == text.own_scale == {"logit_scale": pytest.approx(1 / 0.07, rel=1e-4)}


@needs_open_clip
@pytest.mark.parametrize(("modality", "shape"), [("image", (2, 4, 64)), ("text", (2, 4, 16))])
def test_tokens_freezing_and_files(folder, modality, shape, tmp_path):
    encoder = built(folder, modality, projected=False, freeze=False).train()
    encoded = encoder(INPUTS[modality])
    assert encoded.tokens.shape == shape and encoder.out_dim == shape[2] and encoded.pooled.requires_grad
    assert torch.equal(encoded.mask, MASK if modality == "text" else torch.ones(2, 4, dtype=torch.bool))
    frozen = built(folder, modality, projected=False).train()
    assert frozen.frozen and not any(module.training for module in frozen.tower.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    save_file(frozen.state_dict(), tmp_path / "weights.safetensors")
    again = built(folder, modality, projected=False)  # attention takes another path where weights learn
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
        again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(again(INPUTS[modality]).tokens, frozen(INPUTS[modality]).tokens)
        kept = {f"{modality}_encoded": frozen.encode(*INPUTS[modality].values()), "text_mask": MASK}
        assert torch.equal(frozen(kept).pooled, frozen(INPUTS[modality]).pooled)


@needs_open_clip
def test_a_pair_exports_and_can_be_tapped(folder, tmp_path):
    model = DualEncoder({modality: built(folder, modality) for modality in ("image", "text")}, 8).eval()
    inputs, present = INPUTS["image"] | INPUTS["text"], torch.ones(2, dtype=torch.bool)
    batch = Batch(torch.arange(2), torch.full((2,), CLEAN_VIEW), inputs, {"image": present, "text": present}, {})
    tap = "encoders.image.tower.transformer.resblocks.1"
    export_onnx(model, batch, tmp_path / "model.onnx")
    feeds = {
        name: value.numpy() for name, value in (inputs | {"image_present": present, "text_present": present}).items()
    }
    session = open_session(tmp_path / "model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, {name: feeds[name] for name in names})
    with torch.no_grad():
        expected = graph_outputs(model(batch))
        assert Tapped(model, [tap])(batch).features[tap].shape == (2, 5, 64)
    for value, wanted in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), wanted, rtol=0, atol=1e-4)


@needs_open_clip
def test_what_is_missing_is_named(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "copy")
    state = load_file(place / "open_clip_model.safetensors")
    save_file(
        {name: value for name, value in state.items() if name != "ln_final.bias"}, place / "open_clip_model.safetensors"
    )
    built(place, "image")
    with pytest.raises(
        UserError, match=r"1 weights of its text tower are missing or of another shape, first 'ln_final.bias'"
    ):
        built(place, "text")
    with pytest.raises(UserError, match="max_length is 11, and its texts have at most 10"):
        built(folder, "text", max_length=11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_cfg": {}}, "lacks embed_dim, vision_cfg, text_cfg, mean or std"),
        ({"model_cfg": SHAPE | {"text_cfg": {"hf_model_name": "x"}}}, "its text tower is one of transformers"),
        (
            {"model_cfg": SHAPE | {"text_cfg": {"pool_type": "last"}}},
            "does not read the embedding at the closing token",
        ),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, change, message):
    content = {"model_cfg": SHAPE, "preprocess_cfg": STATISTICS} | change
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        built(tmp_path, "text")
    with pytest.raises(UserError, match=r"no open_clip_config.json in .*; expected a folder in open_clip format"):
        built(tmp_path / "nowhere", "image")


@pytest.mark.skipif(find_spec("open_clip") is not None, reason="open_clip_torch is installed")
def test_a_missing_package_is_named(tmp_path):
    content = {"model_cfg": SHAPE, "preprocess_cfg": STATISTICS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"open_clip_torch; pip install 'multidistill\[openclip\]'"):
        built(tmp_path, "image")


@needs_open_clip
def test_a_pruned_vocabulary_leaves_texts_of_kept_tokens_as_they_were(folder):
    encoder = built(folder, "text").eval()
    counts = np.bincount(TEXT.flatten(), minlength=80)
    plan = plan_vocabulary(torch.nn.ModuleDict({"text": encoder}), "text", counts, 1, [79])
    smaller = apply(torch.nn.ModuleDict({"text": copy.deepcopy(encoder)}), plan)["text"]
    assert plan.report["tokens"] == [80, 12]  # the first eight, 8, 9, 11 and the closing token
    renamed = torch.tensor(smaller.token_rows)[TEXT]
    assert not torch.equal(renamed, TEXT)
    with torch.no_grad():
        found = smaller({"text": renamed, "text_mask": MASK})
        assert torch.equal(found.pooled, encoder(INPUTS["text"]).pooled)
