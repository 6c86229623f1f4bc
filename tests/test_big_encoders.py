"""Torchvision models and audio towers as encoders: what they read and give, what is refused, and that they export."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from big_checkpoints import RATE, write_audio
from safetensors.torch import load_file, save_file
from tiny import write_clip

from distill.builders import build_part
from distill.config import Part
from distill.contracts import CLEAN_VIEW, Batch, UserError
from distill.export.onnx import export_onnx, graph_outputs
from distill.fusion import FUSIONS
from distill.multimodal import MultimodalModel
from distill.predict import open_session
from distill.tapped import Tapped
from distill.tasks import LinearHead
from teachers import ENCODERS
from teachers.audio import KINDS, read_extractor

SAMPLES = 12000
LENGTHS = torch.tensor([SAMPLES, 7000, 900])
AUDIO = ["wav2vec2", "wav2vec2_group", "hubert", "wavlm", "whisper", "ast", "clap", "clap_fused"]
FAMILIES = {
    "alexnet": "features",
    "convnext_tiny": "features",
    "densenet121": "relu",
    "efficientnet_b0": "features",
    "mnasnet0_5": "layers",
    "mobilenet_v2": "features",
    "mobilenet_v3_small": "features",
    "regnet_y_400mf": "trunk_output",
    "resnet18": "layer4",
    "shufflenet_v2_x0_5": "conv5",
    "squeezenet1_1": "features",
    "swin_t": "permute",
    "vgg11_bn": "features",
}
pytestmark = [  # inside transformers' WavLM, with a mask
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
]


def sound(seed=0, lengths=LENGTHS, samples=SAMPLES):
    noise = torch.randn(len(lengths), samples, generator=torch.Generator().manual_seed(seed)) * 3000
    return (noise * (torch.arange(samples) < lengths[:, None])).to(torch.int16)


def pictures(rows=3, size=64):
    return torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> a checkpoint of it, written when it is first asked for."""
    written = {}

    def folder(kind):
        if kind not in written:
            written[kind] = write_audio(tmp_path_factory.mktemp(kind), kind)
        return written[kind]

    return folder


@pytest.fixture
def build(folders):
    """Encoders as the pipeline builds them: by their type and parameters, and what it says of the data."""

    def built(kind, **params):
        if kind in FAMILIES:
            return build_part(ENCODERS, Part(type="torchvision", name=kind, size=64, **params), "encoders.image")
        data = {name: params.pop(name, value) for name, value in (("sample_rate", RATE), ("num_samples", SAMPLES))}
        part = Part(type="pretrained_audio", **{"weights": f"path:{folders(kind)}", **params})
        return build_part(ENCODERS, part, "encoders.audio", **data)

    return built


def inputs_of(encoder):
    if hasattr(encoder, "front_end"):
        return "audio", {"audio": sound(), "audio_length": LENGTHS}
    return "image", {"image": pictures()}


def model_of(encoder):
    """A model of one encoder, and a batch for it whose second row lacks the modality."""
    modality, inputs = inputs_of(encoder)
    torch.manual_seed(0)
    heads = {"kind": LinearHead(8, 3)}
    model = MultimodalModel(
        {modality: encoder}, FUSIONS["concat"]([modality], dim=8), heads, {}, dim=8, embedding_dim=4
    )
    batch = Batch(
        torch.arange(3), torch.full((3,), CLEAN_VIEW), inputs, {modality: torch.tensor([True, False, True])}, {}
    )
    return model.eval(), batch


@pytest.mark.parametrize("kind", ["vgg11_bn", "resnet18", *AUDIO])
@pytest.mark.parametrize("freeze", [True, False])
def test_an_encoder_is_frozen_or_trained(build, kind, freeze):
    encoder = build(kind, freeze=freeze).train()
    tower = encoder.tower if hasattr(encoder, "tower") else encoder.net
    assert encoder.frozen is freeze and tower.training is not freeze
    assert not freeze or not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not freeze or not any(module.training for module in tower.modules())
    pooled = encoder(inputs_of(encoder)[1]).pooled
    assert pooled.shape == (3, encoder.out_dim) and pooled.isfinite().all() and pooled.requires_grad is not freeze
    if not freeze:
        pooled.square().sum().backward()
        assert sum(parameter.grad is not None for parameter in encoder.parameters()) > 10


@pytest.mark.parametrize("kind", ["vgg11_bn", "resnet18", *AUDIO])
def test_weights_survive_a_file_and_kept_outputs_take_the_towers_place(build, kind, tmp_path):
    first, inputs = build(kind).eval(), inputs_of(build(kind))[1]
    save_file(first.state_dict(), tmp_path / "weights.safetensors")
    second = build(kind).eval()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
        second.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        expected, found = first(inputs), second(inputs)
        kept = {f"{name}_encoded" if name in ("audio", "image") else name: value for name, value in inputs.items()}
        again = first(kept | {name: first.encode(*inputs.values()) for name in kept if name.endswith("_encoded")})
    for one, other, stored in zip(expected, found, again, strict=True):
        assert torch.equal(one, other) and torch.equal(one, stored)


EXPORTED = ["resnet18", "wav2vec2", "whisper", "ast", "clap"]
SLOW = ["vgg11_bn", "swin_t", "convnext_tiny", "wav2vec2_group", "hubert", "wavlm", "clap_fused"]


@pytest.mark.parametrize("kind", [*EXPORTED, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_an_exported_model_says_the_same(build, kind, tmp_path):
    model, batch = model_of(build(kind, projected=True) if kind.startswith("clap") else build(kind))
    export_onnx(model, batch, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx")
    modality = next(iter(batch.present))
    feeds = {
        name: value.numpy() for name, value in (batch.inputs | {f"{modality}_present": batch.present[modality]}).items()
    }
    found = session.run(None, feeds)
    with torch.no_grad():
        expected = graph_outputs(model(batch))
    for value, (name, wanted) in zip(found, expected.items(), strict=True):
        if name == f"embedding_{modality}":  # the graph encodes the blank row too, and nobody reads that
            value, wanted = value[[0, 2]], wanted[[0, 2]]
        np.testing.assert_allclose(value, wanted.numpy(), rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "path", "shape"),
    [
        ("vgg11_bn", "net.features.7", (64 * 2, 16, 16)),
        ("resnet18", "net.layer3", (256, 4, 4)),
        ("wav2vec2", "tower.encoder.layers.0", (150, 16)),
        ("whisper", "tower.layers.1", (50, 16)),
        ("ast", "tower.layernorm", (20, 16)),
        ("clap", "front_end", (1, 101, 16)),
        ("clap", "", (64, 16)),
    ],
)
def test_modules_can_be_tapped(build, kind, path, shape):
    model, batch = model_of(build(kind))
    tap = f"encoders.{next(iter(batch.present))}.{path}".removesuffix(".")
    with torch.no_grad():
        (feature,) = Tapped(model, [tap])(batch).features.values()
    assert feature.shape[1:] == shape and not feature[1].any() and feature[2].any()


@pytest.mark.parametrize(("name", "node"), FAMILIES.items())
def test_tokens_are_torchvisions_last_feature_map(build, name, node, tmp_path):
    from torchvision.models import get_model
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(1)
    reference = get_model(name, weights=None)
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    encoder = build(name, weights=f"path:{tmp_path}/weights.safetensors").eval()
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        encoded = encoder({"image": pictures()})
        wanted = create_feature_extractor(reference.eval(), {node: "map"})((pictures() / 255 - mean) / std)["map"]
    torch.testing.assert_close(encoded.tokens, wanted.flatten(2).transpose(1, 2))
    torch.testing.assert_close(encoded.pooled, wanted.mean((2, 3)))
    assert encoded.mask.all() and encoded.mask.shape == encoded.tokens.shape[:2]
    assert encoder.out_dim == wanted.shape[1]


def test_images_of_another_size_are_resized(build):
    encoder = build("resnet18").eval()
    assert encoder({"image": pictures(size=96)}).tokens.shape == (3, 4, 512)
    flat = [torch.full((1, 3, size, size), 77, dtype=torch.uint8) for size in (96, 64)]
    with torch.no_grad():
        torch.testing.assert_close(*(encoder({"image": image}).pooled for image in flat), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"name": "vgg20"}, "torchvision: 'vgg20' is no classification model of it; .*vgg"),
        ({"name": "vit_b_16"}, "torchvision: 'vit_b_16' gives no feature map that is read here; "),
        (
            {"name": "resnet18", "weights": "IMAGENET1K_V2"},
            "has no weights 'IMAGENET1K_V2'; .*IMAGENET1K_V1.*, or path:FILE",
        ),
        (
            {"name": "resnet18", "weights": "path:nowhere.safetensors"},
            "nowhere.safetensors' cannot be read as safetensors",
        ),
        ({"name": "alexnet", "size": 8}, "size 8 leaves no feature map; give more"),
    ],
)
def test_what_torchvision_cannot_build_is_refused(params, message):
    with pytest.raises(UserError, match=message):
        build_part(ENCODERS, Part(type="torchvision", **params), "encoders.image")


def test_a_download_that_fails_stops(monkeypatch):
    def offline(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"weights IMAGENET1K_V1 could not be downloaded .*\(no route to host\)$"):
        ENCODERS["torchvision"](name="resnet18", weights="IMAGENET1K_V1")


def test_weights_of_another_model_are_refused(tmp_path):
    from torchvision.models import get_model

    file = tmp_path / "weights.safetensors"
    state = get_model("resnet18", weights=None).state_dict()
    save_file(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, file)
    with pytest.raises(UserError, match=r"1 weights have another shape than the model's, first 'conv1.weight'"):
        ENCODERS["torchvision"](name="resnet18", weights=f"path:{file}")
    with pytest.raises(UserError, match=r"lacks [0-9]+ of the model's weights, first 'layer1.2.bn1.bias'"):
        ENCODERS["torchvision"](name="resnet34", weights=f"path:{file}")


@pytest.mark.parametrize("kind", AUDIO)
def test_a_tower_says_what_transformers_says(build, folders, kind):
    encoder, folder = build(kind).eval(), folders(kind)
    name, extractor_name, _, part = KINDS[encoder.kind]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    clip = (sound()[1, :7000].float() / 32768).numpy()
    extracted = read_extractor(folder, extractor_name)(clip, sampling_rate=RATE, return_tensors="pt")
    extracted.pop("attention_mask", None)
    if "is_longer" in extracted:
        extracted["is_longer"] = torch.tensor([[False]])
    with torch.no_grad():
        wanted = (model.get_submodule(part) if part else model)(**extracted)
        encoded = encoder({"audio": sound(), "audio_length": LENGTHS})
    tokens, mask = encoded.tokens[1], encoded.mask[1]
    states = wanted.last_hidden_state[0]
    if kind.startswith("clap"):
        torch.testing.assert_close(encoded.pooled[1], wanted.pooler_output[0], rtol=1e-4, atol=1e-5)
        states = states.flatten(1).T
    if kind == "ast":
        torch.testing.assert_close(encoded.pooled[1], wanted.pooler_output[0], rtol=1e-4, atol=1e-5)
    if kind == "wav2vec2_group":
        return  # its norms read the zeros behind the clip, as in its own training
    count = min(len(states), len(tokens))
    torch.testing.assert_close(tokens[:count][mask[:count]], states[:count][mask[:count]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "counts", "total"),
    [("wav2vec2", [150, 87, 11], 150), ("whisper", [38, 22, 3], 38), ("ast", [18, 12, 4], 20), ("clap", [64] * 3, 64)],
)
def test_masks_say_which_tokens_hold_sound(build, kind, counts, total):
    encoder = build(kind).eval()
    with torch.no_grad():
        encoded = encoder({"audio": sound(), "audio_length": LENGTHS})
        nothing = encoder({"audio": torch.zeros(1, SAMPLES, dtype=torch.int16), "audio_length": torch.tensor([0])})
    assert encoded.tokens.shape == (3, total, 16) and encoded.mask.dtype == torch.bool
    assert encoded.mask.sum(1).tolist() == counts
    assert nothing.tokens.isfinite().all() and nothing.pooled.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "length", "count"),
    [
        ("wav2vec2", 79, 0),
        ("wav2vec2", 80, 1),
        ("wav2vec2", 160, 2),
        ("whisper", 320, 1),
        ("whisper", 321, 2),
        ("ast", 399, 2),
        ("ast", 400, 4),
        ("ast", 400 + 10 * 160 - 1, 4),
        ("ast", 400 + 10 * 160, 6),
    ],
)
def test_a_token_begins_where_its_first_sample_does(build, kind, length, count):
    inputs = {"audio": sound(lengths=torch.tensor([length])), "audio_length": torch.tensor([length])}
    assert int(build(kind)(inputs).mask.sum()) == count


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm", "whisper", "ast", "clap"])
def test_rows_do_not_depend_on_each_other_and_real_sound_counts(build, kind):
    encoder = build(kind).eval()
    with torch.no_grad():
        together = encoder({"audio": sound(), "audio_length": LENGTHS}).pooled
        alone = encoder({"audio": sound()[1:2], "audio_length": LENGTHS[1:2]}).pooled
        other = encoder({"audio": sound(seed=1)[1:2], "audio_length": LENGTHS[1:2]}).pooled
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    assert (alone - other).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["clap", "clap_fused"])
def test_a_claps_embedding_is_its_own(build, folders, kind):
    whole = transformers.ClapAudioModelWithProjection.from_pretrained(folders(kind)).eval()
    encoder = build(kind, projected=True).eval()
    extractor = read_extractor(folders(kind), "ClapFeatureExtractor")
    clip = (sound()[1, :7000].float() / 32768).numpy()
    features = extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        encoded = encoder({"audio": sound(), "audio_length": LENGTHS})
        wanted = whole(input_features=features, is_longer=torch.tensor([[False]])).audio_embeds
    assert encoded.tokens.shape == (3, 1, 8) and encoded.mask.all() and encoder.out_dim == 8
    torch.testing.assert_close(encoded.pooled[1:2], wanted, rtol=1e-4, atol=1e-5)
    assert encoder.own_scale == {"logit_scale": pytest.approx(1 / 0.07, rel=1e-3)}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "whisper",
            {"sample_rate": 8000},
            "reads 16000 samples a second, .* has 8000; set data.audio.sample_rate to 16000",
        ),
        ("whisper", {"num_samples": 16001}, "clips have 16001 samples, and this tower reads 16000 at most"),
        ("clap", {"num_samples": 16001}, "clips have 16001 samples, and this tower reads 16000 at most"),
        ("ast", {"num_samples": 16080}, "clips have 16080 samples, and this tower reads 16079 at most"),
        ("wav2vec2", {"num_samples": 79}, "clips have 79 samples, and this tower needs 80"),
        ("whisper", {"projected": True}, "a 'whisper' shares no embedding space with another tower"),
        ("whisper", {"weights": "path:nowhere"}, "pretrained weights are not there: .*no config.json"),
        ("whisper", {"sha256": "0" * 64}, "sha256 of model.safetensors is .*, the recipe pins 0000"),
    ],
)
def test_what_a_tower_cannot_read_is_refused(build, kind, options, message):
    with pytest.raises(UserError, match=message):
        build(kind, **options)


@pytest.fixture
def damaged(folders, tmp_path):
    return shutil.copytree(folders("whisper"), tmp_path / "whisper")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", None, "no preprocessor_config.json, which says how the tower's audio is prepared"),
        ("preprocessor_config.json", "{", "preprocessor_config.json is not readable as JSON"),
        (
            "preprocessor_config.json",
            '{"feature_extractor_type": "ASTFeatureExtractor"}',
            "is of a ASTFeatureExtractor",
        ),
        ("preprocessor_config.json", '{"hop_length": 0}', "preprocessor_config.json: "),
        ("config.json", '{"model_type": "bert"}', "a 'bert' is no audio tower known here; "),
        ("config.json", '{"model_type": "whisper", "auto_map": {"AutoModel": "x.Y"}}', "names code of its own"),
    ],
)
def test_damaged_checkpoints_are_refused(build, damaged, file, content, message):
    (damaged / file).unlink()
    if content is not None:
        (damaged / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        build("whisper", weights=f"path:{damaged}")


def test_missing_weights_of_the_tower_stop_and_others_do_not_count(build, damaged):
    file = damaged / "model.safetensors"
    state = load_file(file)
    decoder = next(name for name in state if ".decoder." in name)
    encoder = next(name for name in state if ".encoder." in name)
    save_file({name: value for name, value in state.items() if name != decoder}, file, {"format": "pt"})
    build("whisper", weights=f"path:{damaged}")
    save_file({name: value for name, value in state.items() if name != encoder}, file, {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights of its audio tower, first 'encoder"):
        build("whisper", weights=f"path:{damaged}")


def test_an_image_tower_is_no_audio_tower(build, tmp_path):
    with pytest.raises(UserError, match="a 'clip' is no audio tower known here; did you mean 'clap'"):
        build("whisper", weights=f"path:{write_clip(tmp_path / 'clip')}")
