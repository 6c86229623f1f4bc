"""Pruning of word embeddings: what stays is read as before, what goes is read as its like, in training and bundles."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from test_prune_stage import with_student
from tiny_project import distill, run_python
from torch import nn

from distill import pipeline, prune
from distill.build import input_spec
from distill.contracts import TEST, TRAIN, UserError
from distill.data.texts import Texts
from distill.data.tokens import count_tokens
from distill.fit.candidates import Candidates
from distill.predict import load
from distill.preprocess import Preprocessor, Tokenizer
from distill.prune import PrunePlan
from distill.prune.vocabulary import FIRST, plan_vocabulary
from distill.recipe import load_recipe
from distill.runs import read_json
from distill.token_rows import TokenRows
from distill.vocabulary import cut_vocabulary
from distill.workspace import PRUNED, STUDENT, Workspace
from students import INHERITANCES, StaticEmbeddings, TextTokens
from teachers import PretrainedText

CUT = "prune.vocabulary.min_count=1"
OUTSIDE = "a dark dog"  # words that no row has


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return with_student(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project / "runs/tiny"


def ran(*options: str, until: str = PRUNED, recipe: str = "recipe.yaml") -> Workspace:
    read = load_recipe(recipe, ["trackers=[]", *options])
    return Workspace(
        read, pipeline.ENCODERS, INHERITANCES, done=pipeline.run(read, until=until, quiet=True), quiet=True
    )


def answers(work: Workspace, model: Any) -> torch.Tensor:
    loader = work.clean_loader(TRAIN, input_spec(model), STUDENT)
    with torch.no_grad():
        return torch.cat([model(loader.at(0, number)[STUDENT]).logits["shape"] for number in range(len(loader))])


def test_texts_of_kept_tokens_are_answered_as_before_to_the_bit() -> None:
    work = ran()
    model = work.model(STUDENT)
    work.recipe = load_recipe("recipe.yaml", [CUT])
    made = cut_vocabulary(work, model, PrunePlan())
    smaller: Any = prune.apply(copy.deepcopy(model), made)
    before, after = made.report["tokens"]
    assert after < before == model.encoders["text"].table.num_embeddings
    assert smaller.encoders["text"].table.weight.shape[0] == after == input_spec(smaller).rows.count
    assert made.report["parameters"] == [sum(p.numel() for p in each.parameters()) for each in (model, smaller)]
    assert (answers(work, smaller) - answers(work, model)).abs().max() == 0.0


def test_dropped_tokens_are_read_as_the_most_alike_or_as_unknown() -> None:
    work = ran()
    model = work.model(STUDENT)
    weight = model.encoders["text"].table.weight.detach()
    spec = input_spec(model)
    plain = Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id)
    special, unknown = plain.roles()
    found = {}
    for dropped in ("nearest", "unknown"):
        work.recipe = load_recipe("recipe.yaml", [CUT, f"prune.vocabulary.dropped={dropped}"])
        smaller: Any = prune.apply(copy.deepcopy(model), cut_vocabulary(work, model, PrunePlan()))
        mine = input_spec(smaller)
        tokenizer = Tokenizer(mine.tokenizer, mine.max_length, mine.pad_id, mine.rows)
        (ids, mask, words), (old, _, same) = tokenizer.words([OUTSIDE]), plain.words([OUTSIDE])
        assert mask.shape == old.shape and (words == same).all()
        found[dropped] = smaller.encoders["text"].table.weight.detach()[torch.from_numpy(ids[0])]
        kept = set(mine.rows.rows[old[0]].tolist())
        assert kept == set(ids[0].tolist())
    counts = count_tokens(work.data().texts, work.data().rows(TRAIN), plain, len(weight), work.data().folder)
    frequent = [code for code in np.flatnonzero(counts) if code not in special]
    cosines = nn.functional.normalize(weight, dim=1)
    dropped_ids = [code for code in old[0] if not counts[code] and code not in special and code >= FIRST]
    assert dropped_ids, "nothing tests what is dropped"
    for place, code in enumerate(old[0]):
        expected = weight[code]
        if code in dropped_ids:
            expected = weight[frequent[int((cosines[frequent] @ cosines[code]).argmax())]]
            assert torch.equal(found["unknown"][place], weight[unknown])
        assert torch.equal(found["nearest"][place], expected)


def test_counts_are_of_training_rows_as_often_as_they_have_a_token() -> None:
    tokenizer = Tokenizer("bert/tokenizer.json", 4)
    texts = Texts.of(["red red", "blue", "red red", "green", "red blue moon cat"])
    counts = count_tokens(texts, np.array([0, 2, 4]), tokenizer, 200, Path.cwd())
    ids, _ = tokenizer(["red", "blue", "green", "moon"])
    assert [int(counts[code]) for code in ids[:, 1]] == [5, 1, 0, 0]  # the last text is cut to four tokens
    assert counts[ids[0, 0]] == counts[ids[0, -1]] == 3  # those around each


def test_a_bundle_reads_what_training_read_and_says_what_the_model_says(here: Path, tmp_path: Path) -> None:
    work = ran(CUT, until="quantize")
    model = work.model(PRUNED)
    rows = input_spec(model).rows
    for bundle in (here / "export/onnx-fp32", here / "quantize/onnx-int8"):
        assert read_json(bundle / "bundle.json")["version"] == 2
        spec = read_json(bundle / "preprocess.json")["text"]
        assert TokenRows(spec["token_rows"]) == rows
        assert Preprocessor.load(bundle).tokenizer.rows == rows
    graph = onnx.load(here / "export/onnx-fp32/model.onnx").graph
    width = model.encoders["text"].table.embedding_dim
    assert [rows.count, width] in [list(each.dims) for each in graph.initializer]

    data = work.data()
    batch = next(iter([work.clean_loader(TEST, input_spec(model), STUDENT).at(0, 0)[STUDENT]]))
    with torch.no_grad():
        expected = model(batch).logits["shape"].numpy()
    texts = [data.texts[int(row)] for row in data.rows(TEST)]
    predictor = load(here / "export/onnx-fp32")
    feeds = predictor.preprocessor([{"text": text} for text in texts])
    assert np.array_equal(feeds["text"], batch.inputs["text"].numpy())
    feeds |= {name: value.numpy() for name, value in batch.inputs.items() if not name.startswith("text")}
    feeds |= {f"{name}_present": value.numpy() for name, value in batch.present.items()}
    assert np.abs(predictor.run(feeds)["shape"] - expected).max() < 1e-5
    assert distill("predict", here / "export/onnx-fp32", "--text", OUTSIDE).code == 0

    copied = Path(shutil.copytree(here / "export/onnx-fp32", tmp_path / "bundle"))
    changed = read_json(copied / "preprocess.json")
    changed["text"]["token_rows"][-1] = 0
    (copied / "preprocess.json").write_text(json.dumps(changed))
    assert "was changed after export" in distill("predict", copied, "--text", OUTSIDE).err


def test_the_model_card_runs_as_it_is(here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = "student.encoders={text: {type: static_embeddings, vocab_size: 64, dim: 8, max_length: 12}}"
    text_only = [recipe, "student.objective=[{loss: kd, task: colour}]", "transfer.texts=0", "prune.ratio=0", CUT]
    work = ran(*text_only, "export.bundles=[onnx-fp32]", "name=words", until="export")
    bundle = (work.path("export") / "onnx-fp32").resolve()
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "token_rows" in code
    monkeypatch.chdir(bundle)
    said = run_python(code).split()
    predicted = load(bundle).predict([{"text": "a few words"}])[0]
    assert said[said.index("colour") + 1] == predicted["colour"]["label"]


@pytest.mark.parametrize("value", [[], [0, -1], [0.5], "text", [[1]], [2**70], {"a": 1}])
def test_malformed_rows_are_refused(here: Path, tmp_path: Path, value: Any) -> None:
    ran(CUT, until="export")
    folder = Path(shutil.copytree(here / "export/onnx-fp32", tmp_path / "bundle"))
    spec = read_json(folder / "preprocess.json")
    spec["text"]["token_rows"] = value
    (folder / "preprocess.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="malformed"):
        Preprocessor.load(folder)
    spec["text"]["token_rows"] = [0, 1]
    (folder / "preprocess.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"ids beyond the 2 that the model was pruned by"):
        Preprocessor.load(folder)


REBUILD = """
import sys
sys.modules["torch_pruning"] = None
import torch, test_vocabulary
work = test_vocabulary.ran("prune.vocabulary.min_count=1")
print(float((test_vocabulary.answers(work, work.model("pruned")) * 7).double().sum()).hex())
"""


def test_another_process_rebuilds_the_model_from_its_plan(here: Path) -> None:
    work = ran(CUT)
    expected = float((answers(work, work.model(PRUNED)) * 7).double().sum()).hex()
    assert run_python(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{REBUILD}").strip() == expected
    file = here / "pruned/plan.json"
    content = read_json(file)
    assert content["version"] == 2
    content["attributes"]["encoders.text"]["token_rows"][-1] = 0
    whole = file.read_text()
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="was changed after it was written"):
        work.model(PRUNED)
    file.write_text(whole)


def test_tokens_go_in_the_last_step_behind_channels_of_the_table() -> None:
    text = "student.encoders.text={type: small_transformer, vocab_size: 64, dim: 16, heads: 4, max_length: 12}"
    options = (text, "student.inherit={}", "prune.steps=2", "prune.train.epochs=2", "prune.ratio=0.5", CUT)
    work = ran(*options, "prune.modules=[encoders.image, encoders.text]", "name=steps")
    folder = work.path(PRUNED)
    first, plan = PrunePlan.load(folder / "step-1/plan.json"), PrunePlan.load(folder / "plan.json")
    assert "tokens" not in first.report and plan.report["tokens"][1] < plan.report["tokens"][0]
    model = work.model(PRUNED)
    assert plan.report["parameters"][1] == sum(p.numel() for p in model.parameters())
    assert plan.tensors["encoders.text.table.weight"]["0"]["of"] == plan.report["tokens"][0]


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_pretrained_towers_lose_rows_and_find_their_special_tokens_again(kind: str, tmp_path: Path) -> None:
    getattr(tiny, f"write_{kind}")(tmp_path)
    encoder = PretrainedText(weights=f"path:{tmp_path}", freeze=False, max_length=12, projected=kind != "bert").eval()
    model = nn.ModuleDict({"encoders": nn.ModuleDict({"text": encoder})})
    tokenizer = Tokenizer(encoder.tokenizer_file, 12, encoder.pad_id)
    special, _ = tokenizer.roles()
    texts = ["red moon", "a small cat", "the cat"]
    size = encoder.get_submodule(encoder.word_table).num_embeddings
    ids, mask = tokenizer(texts)
    counts = np.bincount(ids[mask], minlength=size)
    plan = plan_vocabulary(model, "encoders.text", counts, 1, special)
    smaller: Any = prune.apply(copy.deepcopy(model), plan)["encoders"]["text"]
    assert plan.report["tokens"][1] < size
    new, _ = Tokenizer(encoder.tokenizer_file, 12, smaller.pad_id, TokenRows(smaller.token_rows))(texts)
    inputs = {"text": torch.from_numpy(ids), "text_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        expected, found = encoder(inputs), smaller(inputs | {"text": torch.from_numpy(new)})
    assert torch.equal(expected.pooled, found.pooled) and torch.equal(expected.tokens, found.tokens)


def test_a_table_that_is_shared_or_never_read_is_refused() -> None:
    encoder = StaticEmbeddings(tokenizer_file="bert/tokenizer.json", vocab_size=64, dim=8)
    decoder = nn.Linear(8, 64, bias=False)
    decoder.weight = encoder.table.weight
    model = nn.ModuleDict({"text": encoder, "decoder": decoder})
    with pytest.raises(UserError, match=r"'decoder.weight' is the same matrix as 'text.table'.*leave"):
        plan_vocabulary(model, "text", np.ones(64, np.int64), 1, [0])
    with pytest.raises(UserError, match=r"min_count: no token comes 2 times"):
        plan_vocabulary(nn.ModuleDict({"text": encoder}), "text", np.ones(64, np.int64), 2, [0])
    assert plan_vocabulary(nn.ModuleDict({"text": encoder}), "text", np.ones(64, np.int64), 1, [0]) == PrunePlan()


@pytest.mark.parametrize("least", [1, 30])  # of 30, each training row has a token that goes
def test_an_encoder_that_reads_numbers_out_of_ids_is_refused(least: int) -> None:
    class Odd(TextTokens):
        def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
            encoded = super().forward(inputs)
            return encoded._replace(pooled=encoded.pooled + inputs["text"].float().mean())

    work = ran()
    model = work.model(STUDENT)
    odd = Odd(tokenizer_file=input_spec(model).tokenizer, vocab_size=len(model.encoders["text"].table.weight), dim=8)
    model.encoders["text"] = odd.eval()
    work.recipe = load_recipe("recipe.yaml", [f"prune.vocabulary.min_count={least}"])
    with pytest.raises(UserError, match="does more with token ids than look up rows"):
        cut_vocabulary(work, model, PrunePlan())


def test_a_table_smaller_than_its_tokenizer_is_refused() -> None:
    work = ran()
    model = work.model(STUDENT)
    size = Tokenizer(input_spec(model).tokenizer, 12).num_ids
    model.encoders["text"].table = nn.Embedding(size - 1, model.encoders["text"].table.embedding_dim)
    work.recipe = load_recipe("recipe.yaml", [CUT])
    sentence = f"has ids up to {size - 1}, and the table of encoders.text has {size - 1} rows; leave it out"
    with pytest.raises(UserError, match=sentence):
        cut_vocabulary(work, model, PrunePlan())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["student.encoders={image: {type: convnet, widths: [8], blocks: [0]}}"],
            "the student has no table of word embeddings: it",
        ),
        (["prune.vocabulary.min_count=0"], "greater than or equal to 1"),
        (["prune.vocabulary.dropped=gone"], "choices: nearest, unknown"),
        (["prune.vocabulary.counts=1"], "unknown key"),
        (["prune.ratio=0", "prune.modules=[encoders.sound]"], "the student has no module 'encoders.sound'"),
    ],
)
def test_what_cannot_be_cut_is_told_before_a_run(options: list[str], sentence: str) -> None:
    extra = ["student.inherit={}"] if "image:" in options[0] else []
    with pytest.raises(UserError, match=sentence):
        pipeline.check(load_recipe("recipe.yaml", [CUT, *options, *extra]))


def test_runs_without_it_keep_their_fingerprints() -> None:
    recipe = load_recipe("recipe.yaml", [])
    assert "vocabulary" not in prune.settings(recipe)
    assert prune.settings(load_recipe("recipe.yaml", [CUT]))["vocabulary"] == {"min_count": 1, "dropped": "nearest"}
    keys = [
        {item.stage.name: item.key for item in pipeline.plan(load_recipe("recipe.yaml", options))}
        for options in ([], ["prune.vocabulary=null"], [CUT])
    ]
    assert keys[0] == keys[1]
    changed = {name for name in keys[0] if keys[0][name] != keys[2][name]}
    assert PRUNED in changed and not changed & {"data", "vocabulary", "teacher", "cache", STUDENT}


def test_encoders_of_one_embedding_space_lose_rows_too() -> None:
    work = ran(CUT, "transfer.texts=0", "prune.ratio=0", recipe="dual.yaml", until="export")
    rows = input_spec(work.model(PRUNED)).rows
    assert rows is not None and rows.count < len(rows)
    texts = load(work.path("export") / "onnx-fp32-text")
    assert texts.preprocessor.tokenizer.rows == rows


def test_a_search_knows_the_size_of_cut_tables(tmp_path: Path) -> None:
    sizes = []
    for options in ([], [CUT]):
        work = ran(*options, until="quantize")
        made = Candidates(work.recipe, work.done, tmp_path / f"fit{len(options)}")
        sizes.append(made.untrained({"precision": "onnx-fp32"}).size_bytes)
    plan = PrunePlan.load(work.path(PRUNED) / "plan.json")
    before, after = plan.report["tokens"]
    width = work.model(PRUNED).encoders["text"].table.embedding_dim
    assert sizes[0] - sizes[1] == pytest.approx(4 * width * (before - after), abs=256)  # graphs note shapes too
