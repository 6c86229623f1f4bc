"""CLIP and SigLIP checkpoints with their own projection: the embeddings and the scale that they were trained with."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from big_checkpoints import RATE, write_audio
from tiny import SIZE, write_bert
from tiny_project import distill as call
from tiny_project import make_project, refusal

from distill import pipeline
from distill.contracts import UserError
from distill.recipe import load_recipe
from students import tower_weights
from teachers import PretrainedAudio, PretrainedText, PretrainedVision

TEXTS = torch.tensor([[7, 9, 11, 2], [8, 6, 2, 0]])
MASK = torch.tensor([[True] * 4, [True, True, True, False]])
PIXELS = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    from transformers import SiglipConfig, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**shape, "image_size": SIZE, "patch_size": 8}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {**shape, "vocab_size": 80, "max_position_embeddings": 10, **special}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(12.0))
        model.logit_bias.fill_(-7.0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    write_bert(folder / "bert")
    shutil.copy(folder / "bert" / "tokenizer.json", folder)
    return folder


def towers(folder, **options):
    weights = f"path:{folder}"
    text = PretrainedText(weights=weights, projected=True, max_length=10, **options)
    return text.eval(), PretrainedVision(weights=weights, projected=True, **options).eval()


@torch.no_grad()
def embedded(text, vision, ids, mask):
    said = text({"text": ids, "text_mask": mask}), vision({"image": PIXELS})
    for encoded in said:
        assert encoded.tokens.shape[1] == 1 and encoded.mask.all() and encoded.mask.shape == (2, 1)
    return [F.normalize(encoded.pooled, dim=1) for encoded in said]


def test_a_clips_embeddings_are_its_own(clip_folder):
    from transformers import CLIPModel

    whole = CLIPModel.from_pretrained(clip_folder).eval()
    text, vision = towers(clip_folder)
    eos = whole.config.text_config.eos_token_id
    ids = torch.tensor([[eos - 1, 9, 11, eos], [eos - 1, 6, eos, eos]])
    found = embedded(text, vision, ids, MASK)
    pixels = (PIXELS / 255 - vision.mean) / vision.std
    with torch.no_grad():
        expected = whole(input_ids=ids, pixel_values=pixels, attention_mask=MASK.long())
    torch.testing.assert_close(found[0], expected.text_embeds)
    torch.testing.assert_close(found[1], expected.image_embeds)
    assert text.out_dim == vision.out_dim == 8
    assert vision.own_scale == {"logit_scale": pytest.approx(whole.logit_scale.exp().item(), rel=1e-5)}


def test_a_siglips_embeddings_are_those_of_padded_texts(siglip_folder):
    from transformers import SiglipModel

    whole = SiglipModel.from_pretrained(siglip_folder).eval()
    text, vision = towers(siglip_folder)
    found = embedded(text, vision, TEXTS, MASK)
    pixels = (PIXELS / 255 - vision.mean) / vision.std
    with torch.no_grad():
        expected = whole(input_ids=F.pad(TEXTS, (0, 6)), pixel_values=pixels)
    torch.testing.assert_close(found[0], expected.text_embeds)
    torch.testing.assert_close(found[1], expected.image_embeds)
    assert text.own_scale == {"logit_scale": pytest.approx(12.0), "logit_bias": pytest.approx(-7.0)}


def test_a_tower_of_no_pair_has_no_projection(bert_folder, siglip_folder):
    with pytest.raises(UserError, match="a 'bert' shares no embedding space with another tower"):
        PretrainedText(weights=f"path:{bert_folder}", projected=True)
    with pytest.raises(UserError, match="max_length is 11, and its texts have at most 10"):
        PretrainedText(weights=f"path:{siglip_folder}", projected=True, max_length=11)


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory, clip_folder):
    """A CLIP of five layers and four heads, 32 wide."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    folder = tmp_path_factory.mktemp("deep")
    shutil.copytree(clip_folder, folder, dirs_exist_ok=True)
    shape = {"num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32}
    text = {**CLIPTextConfig.from_pretrained(clip_folder).to_dict(), **shape}
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=8, **shape)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [PretrainedText, PretrainedVision])
def test_a_cut_tower_inherits_even_layers_and_first_heads(deep_folder, kind):
    options = {"weights": f"path:{deep_folder}", "projected": True}
    whole, part = kind(**options), kind(**options, freeze=False, cut={"layers": 3, "heads": 2})
    tower_weights(encoder=whole, student=part)
    given, found = whole.tower.state_dict(), part.tower.state_dict()
    for ours, theirs in ((0, 0), (1, 2), (2, 4)):
        query, mlp = (
            next(name for name in found if f"layers.{ours}." in name and end in name)
            for end in ("q_proj.weight", "fc1.bias")
        )
        source = query.replace(f"layers.{ours}.", f"layers.{theirs}.")
        assert torch.equal(found[query], given[source][:16, :16])  # two heads of eight
        assert torch.equal(found[mlp], given[mlp.replace(f"layers.{ours}.", f"layers.{theirs}.")][:32])
    assert part.out_dim == whole.out_dim == 8
    assert len([name for name in found if name.endswith("q_proj.weight")]) == 3
    inputs = {"text": TEXTS, "text_mask": MASK} if kind is PretrainedText else {"image": PIXELS}
    assert part(inputs).pooled.shape == (2, 8)


def test_all_layers_and_heads_inherited_are_the_teacher(siglip_folder):
    whole, part = (
        PretrainedVision(
            weights=f"path:{siglip_folder}", projected=True, freeze=freeze, cut={"heads": 2} if cut else None
        )
        for freeze, cut in ((True, False), (False, True))
    )
    tower_weights(encoder=whole, student=part)
    with torch.no_grad():
        torch.testing.assert_close(part({"image": PIXELS}).pooled, whole({"image": PIXELS}).pooled)


def test_packed_attention_is_cut_in_each_of_its_parts(siglip_folder):
    options = {"weights": f"path:{siglip_folder}", "projected": True}
    whole = PretrainedVision(**options)
    part = PretrainedVision(**options, freeze=False, cut={"heads": 1})
    tower_weights(encoder=whole, student=part)
    given, found = (
        next(value for name, value in encoder.tower.state_dict().items() if name.endswith("in_proj_weight"))
        for encoder in (whole, part)
    )
    assert torch.equal(found.view(3, 8, 8), given.view(3, 16, 16)[:, :8, :8])


@pytest.mark.parametrize(
    ("cut", "freeze", "message"),
    [
        ({"depth": 1}, False, "cut: unknown key 'depth'; choices: heads, layers"),
        ({"layers": 6}, False, "cut: layers is 6, and the tower has 5; give 1 to 5"),
        ({"heads": 0}, False, "cut: heads is 0, and the tower has 4; give 1 to 4"),
        ({"heads": 2}, True, "cut: a smaller tower has to learn; set freeze to false"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(deep_folder, cut, freeze, message):
    with pytest.raises(UserError, match=message):
        PretrainedVision(weights=f"path:{deep_folder}", freeze=freeze, cut=cut)


def test_towers_of_other_kinds_and_larger_ones_inherit_nothing(deep_folder, bert_folder):
    deep = PretrainedText(weights=f"path:{deep_folder}", freeze=False)
    with pytest.raises(UserError, match="of another kind than the teacher's"):
        tower_weights(encoder=deep, student=PretrainedText(weights=f"path:{bert_folder}"))
    small = PretrainedText(weights=f"path:{deep_folder}", freeze=False, cut={"heads": 2})
    with pytest.raises(UserError, match="larger than the teacher's"):
        tower_weights(encoder=small, student=deep)


@pytest.fixture
def project(tmp_path, clip_folder, monkeypatch):
    make_project(tmp_path)
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "kept.yaml").write_text(KEPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


KEPT = """\
version: 1
name: kept
data:
  source: {type: table, path: rows.csv}
  modalities: {image: image, text: caption}
  id: id
  working_size: 32
  augment: {image: {flip: 0.5, shift: 2}, text: {word_dropout: 0.1}}
teacher:
  encoders:
    image: {type: pretrained_vision, weights: "path:clip", projected: true}
    text: {type: pretrained_text, weights: "path:clip", projected: true, max_length: 30}
  fusion: null
  embedding_dim: 8
  objective: [] # the checkpoint as it is
student:
  encoders:
    image: {type: pretrained_vision, weights: "path:clip", projected: true, freeze: false, cut: {heads: 1}}
    text: {type: pretrained_text, weights: "path:bert", max_length: 12, freeze: false}
  fusion: null
  embedding_dim: 8
  inherit: {image: {type: tower_weights}}
  train: {epochs: 1, batch_size: 16}
  baseline:
    - {loss: clip_infonce, embedding: "image,text"}
  objective:
    - {loss: clip_relational_kl, embedding: "image,text", params: {student_scale: learned, teacher_scale: own}}
    - {loss: clip_icl, embedding: "image,text", positives: [text], params: {scale: learned}}
retrieval: {}
cache: {views: 2}
export: {min_agreement_int8: 0.9, quantize: {calibration_rows: 16}}
"""


def test_a_checkpoint_is_a_teacher_as_it_is(project):
    done = pipeline.run(load_recipe("kept.yaml"), until="student", quiet=True)
    info = done["teacher"].info
    assert "steps" not in info and info["own_scale"] == {"logit_scale": pytest.approx(1 / 0.07, rel=1e-3)}
    assert done["student"].info["steps"] > 0 and done["inherit"].info["inherited"] == ["image"]


def test_a_frozen_teacher_with_an_objective_has_nothing_to_learn(project):
    terms = "teacher.objective=[{loss: clip_infonce, embedding: 'image,text'}]"
    assert "set it to []" in refusal(call("validate", "kept.yaml", terms))


@torch.no_grad()
def test_a_claps_text_embeddings_are_its_own(tmp_path):
    from transformers import ClapModel

    folder = write_audio(tmp_path, "clap")
    write_bert(folder / "bert")
    shutil.copy(folder / "bert" / "tokenizer.json", folder)
    encoder = PretrainedText(weights=f"path:{folder}", projected=True, max_length=10).eval()
    texts = torch.tensor([[7, 9, 11, 2], [8, 6, 2, 1]])
    encoded = encoder({"text": texts, "text_mask": MASK})
    whole = ClapModel.from_pretrained(folder).eval()
    wanted = whole.text_projection(whole.text_model(texts, attention_mask=MASK.long()).pooler_output)
    torch.testing.assert_close(encoded.pooled, wanted)
    assert encoder.pad_id == 1 and encoder.out_dim == 8 and not encoder.whole_length
    audio = PretrainedAudio(weights=f"path:{folder}", projected=True, sample_rate=RATE, num_samples=8000)
    assert audio.own_scale == encoder.own_scale == {"logit_scale": pytest.approx(1 / 0.07, rel=1e-3)}
