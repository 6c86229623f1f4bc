"""Adapters of transformers towers: they alone learn, survive a file, export, and what cannot be is refused."""

import builtins
from importlib.util import find_spec

import pytest
import torch
from big_checkpoints import RATE, write_audio
from safetensors.torch import load_file, save_file
from tiny import SIZE

from distill.builders import build_part
from distill.config import Part
from distill.contracts import CLEAN_VIEW, Batch, UserError
from distill.export.onnx import export_onnx, graph_outputs
from distill.fusion import FUSIONS
from distill.multimodal import MultimodalModel
from distill.predict import open_session
from distill.tasks import LinearHead
from teachers import ENCODERS

SAMPLES = 8000
TARGETS = {"text": ["query", "value"], "image": ["q_proj", "v_proj"], "audio": ["q_proj", "fc1"]}
INPUTS = {
    "text": {
        "text": torch.tensor([[7, 9, 11, 2], [8, 6, 2, 0]]),
        "text_mask": torch.tensor([[True] * 4, [True] * 3 + [False]]),
    },
    "image": {"image": torch.arange(2 * 3 * SIZE * SIZE).remainder(251).to(torch.uint8).view(2, 3, SIZE, SIZE)},
    "audio": {
        "audio": torch.randint(-3000, 3000, (2, SAMPLES), generator=torch.Generator().manual_seed(0)).to(torch.int16),
        "audio_length": torch.tensor([SAMPLES, SAMPLES]),
    },
}
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
modalities = pytest.mark.parametrize("modality", ["text", "image", "audio"])


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    return write_audio(tmp_path_factory.mktemp("whisper"), "whisper")


@pytest.fixture
def build(bert_folder, clip_folder, whisper_folder):
    def built(modality, lora, *, freeze=False):
        folder = {"text": bert_folder, "image": clip_folder, "audio": whisper_folder}[modality]
        kind = {"image": "vision"}.get(modality, modality)
        part = Part(type=f"pretrained_{kind}", weights=f"path:{folder}", freeze=freeze, lora=lora)
        data = {"sample_rate": RATE, "num_samples": SAMPLES} if modality == "audio" else {}
        return build_part(ENCODERS, part, f"encoders.{modality}", **data)

    return built


def adapted(build, modality):
    torch.manual_seed(0)
    return build(modality, {"rank": 4, "alpha": 8, "targets": TARGETS[modality]})


def taught(encoder):
    """Adapters as after some learning: B is no longer zero."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    return encoder.eval()


@needs_peft
@modalities
def test_adapters_alone_learn_and_begin_with_what_the_tower_says(build, modality):
    encoder, plain = adapted(build, modality), build(modality, None).eval()
    assert not encoder.frozen
    names = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == set(TARGETS[modality])
    with torch.no_grad():
        assert torch.equal(encoder.eval()(INPUTS[modality]).pooled, plain(INPUTS[modality]).pooled)
        before = encoder(INPUTS[modality]).pooled
        assert (taught(encoder)(INPUTS[modality]).pooled - before).abs().max() > 1e-3
    encoder(INPUTS[modality]).pooled.square().sum().backward()
    assert all((parameter.grad is not None) is parameter.requires_grad for parameter in encoder.parameters())


@needs_peft
@modalities
def test_adapters_survive_a_file(build, modality, tmp_path):
    first = taught(adapted(build, modality))
    save_file(first.state_dict(), tmp_path / "weights.safetensors")
    second = adapted(build, modality).eval()
    with torch.no_grad():
        wanted = first(INPUTS[modality]).tokens
        assert not torch.equal(second(INPUTS[modality]).tokens, wanted)
        second.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(second(INPUTS[modality]).tokens, wanted)


@needs_peft
@modalities
def test_a_model_with_adapters_exports(build, modality, tmp_path):
    encoder = taught(adapted(build, modality))
    fusion, heads = FUSIONS["concat"]([modality], dim=8), {"kind": LinearHead(8, 3)}
    model = MultimodalModel({modality: encoder}, fusion, heads, {}, dim=8, embedding_dim=4).eval()
    present = {modality: torch.ones(2, dtype=torch.bool)}
    batch = Batch(torch.arange(2), torch.full((2,), CLEAN_VIEW), INPUTS[modality], present, {})
    export_onnx(model, batch, tmp_path / "model.onnx")
    feeds = {
        name: value.numpy() for name, value in (INPUTS[modality] | {f"{modality}_present": present[modality]}).items()
    }
    found = open_session(tmp_path / "model.onnx").run(None, feeds)
    with torch.no_grad():
        expected = graph_outputs(model(batch))
    for value, wanted in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "freeze", "message"),
    [
        ({"r": 8, "targets": ["query"]}, False, "lora: unknown key 'r'; "),
        ({"targets": ["query"]}, True, "lora: adapters have to learn; set freeze to false"),
        ({"rank": 0, "targets": ["query"]}, False, "lora.rank is 0; give a whole number from 1"),
        ({"alpha": True, "targets": ["query"]}, False, "lora.alpha is True; give a whole number from 1"),
        ({"rank": 8}, False, r"lora.targets is \[\]; name some of the tower's layers: dense, key, query, value"),
        ({"targets": ["quer"]}, False, "lora.targets: the tower has no linear layer 'quer'; .*query"),
    ],
)
def test_adapters_that_cannot_be_are_refused(build, lora, freeze, message):
    with pytest.raises(UserError, match=message):
        build("text", lora, freeze=freeze)


def test_a_cut_tower_takes_no_adapters(clip_folder):
    lora, cut = {"targets": ["q_proj"]}, {"heads": 1}
    with pytest.raises(UserError, match="'cut' makes a new one; leave one of them out"):
        ENCODERS["pretrained_vision"](weights=f"path:{clip_folder}", freeze=False, lora=lora, cut=cut)


def test_a_missing_package_is_named(build, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "peft":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"lora needs the package peft; pip install 'multidistill\[peft\]'"):
        build("text", {"targets": ["query"]})


def test_layers_that_an_adapter_would_not_reach_are_no_targets(tmp_path):
    folder = write_audio(tmp_path, "wavlm")
    with pytest.raises(UserError, match="no linear layer 'q_proj'"):
        ENCODERS["pretrained_audio"](
            weights=f"path:{folder}", freeze=False, lora={"targets": ["q_proj"]}, sample_rate=RATE, num_samples=SAMPLES
        )
