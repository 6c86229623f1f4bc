"""Plans: composition, numbering of blocks, integrity, and rebuilding in another process without torch-pruning."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune import CONFIG, batch, real, settled
from torch import nn

from distill.checkpoint import save_weights
from distill.config import PruneConfig
from distill.contracts import UserError
from distill.fusion import PerceiverFusion
from distill.prune import PrunePlan, apply, compose, prune
from distill.prune.plans import FORMAT, VERSION

BLOCKS = 5


def stack() -> nn.Module:
    """Blocks of layers of one width, some in lists of their own."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(BLOCKS)),
            "other": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 7, bias=False)),
        }
    )


@st.composite
def plans(draw: st.DrawFn, model: nn.Module) -> PrunePlan:
    """A random plan for a model: cuts of tensors, attributes, removed blocks."""
    tensors: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        for dim, size in enumerate(tensor.shape):
            if size > 1 and draw(st.booleans()):
                kept = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
                tensors.setdefault(name, {})[str(dim)] = {"of": size, "kept": kept}
        if name in tensors:
            attributes[name.rpartition(".")[0]] = {"in_features": draw(st.integers(1, 9))}
    removed = {}
    for path, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks) > 1 and draw(st.booleans()):
            gone = sorted(draw(st.sets(st.integers(0, len(blocks) - 1), min_size=1, max_size=len(blocks) - 1)))
            removed[path] = {"of": len(blocks), "gone": gone}
    return PrunePlan(tensors, attributes, removed, {"blocks": [draw(st.integers(0, 9)), 0]})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_plans_applied_one_after_the_other_are_their_composition(data: st.DataObject) -> None:
    first = data.draw(plans(stack()))
    once = apply(stack(), first)
    second = data.draw(plans(once))
    twice, joined = apply(copy.deepcopy(once), second), compose(first, second)
    direct = apply(stack(), joined)
    assert list(direct.state_dict()) == list(twice.state_dict())
    for name, tensor in twice.state_dict().items():
        assert torch.equal(tensor, direct.state_dict()[name])
    for path, module in twice.named_modules():
        assert module.extra_repr() == direct.get_submodule(path).extra_repr()
    again = apply(copy.deepcopy(once), joined.since(first))
    for name, tensor in twice.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert joined.report["blocks"] == [first.report["blocks"][0], 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_names_of_a_smaller_model_and_of_the_whole_one(data: st.DataObject) -> None:
    whole = stack()
    for number, tensor in enumerate(whole.parameters()):
        tensor.data.fill_(number)
    there = {name: int(tensor.flatten()[0]) for name, tensor in whole.named_parameters()}
    made = data.draw(plans(whole))
    smaller = apply(whole, made)
    left = {name: int(tensor.flatten()[0]) for name, tensor in smaller.named_parameters()}
    assert left == {made.renamed(name): number for name, number in there.items() if made.renamed(name) is not None}
    for name, number in left.items():
        assert there[made.original(name)] == number
        cut = made.tensors.get(made.original(name), {}).get("0")
        assert made.lost(name, 0) == (cut["of"] - len(cut["kept"]) if cut else 0)


def test_a_plan_that_does_not_follow_another_is_refused() -> None:
    first = PrunePlan({"weight": {"0": {"of": 5, "kept": [0, 3]}}})
    with pytest.raises(UserError, match="'weight' has 2 left, and the next expects 5"):
        compose(first, first)
    removed = PrunePlan(removed={"blocks": {"of": BLOCKS, "gone": [1]}})
    smaller = apply(stack(), removed)
    with pytest.raises(UserError, match=r"'blocks' has blocks 4, expected 5; build the model it was made for"):
        apply(smaller, removed)
    with pytest.raises(UserError, match="has blocks absent"):
        apply(nn.Linear(2, 2), removed)


def test_a_changed_truncated_or_later_plan_is_refused(tmp_path: Path) -> None:
    file, made = tmp_path / "plan.json", PrunePlan({"weight": {"0": {"of": 3, "kept": [0, 2]}}}, report={"x": [0.1, 2]})
    made.save(file)
    assert PrunePlan.load(file) == made
    content = json.loads(file.read_text())
    assert content["format"] == FORMAT and content["version"] == 1 and len(content["sha256"]) == 64

    def refused(sentence: str, text: str) -> None:
        file.write_text(text)
        with pytest.raises(UserError, match=sentence) as error:
            PrunePlan.load(file)
        assert str(file) in str(error.value) and "prune again" in str(error.value)

    changed = copy.deepcopy(content)
    changed["tensors"]["weight"]["0"]["kept"] = [0, 1]
    refused("was changed after it was written", json.dumps(changed))
    refused("was changed after it was written", json.dumps({**content, "report": {}}))
    refused("not readable as a pruning plan", json.dumps(content)[:-20])
    unsigned = {name: value for name, value in content.items() if name != "sha256"}
    refused("not readable as a pruning plan: it lacks 'sha256'", json.dumps(unsigned))
    refused("not readable as a pruning plan: it lacks 'format'", json.dumps({"tensors": {}}))
    refused("its format is 'other'", json.dumps({**content, "format": "other"}))
    refused(f"has version {VERSION + 1}, and {VERSION} is read here", json.dumps({**content, "version": VERSION + 1}))


REBUILD = """
import sys
sys.modules["torch_pruning"] = None
import torch, test_prune
from pathlib import Path
from distill.checkpoint import load_weights
from distill.prune import PrunePlan, apply
from test_prune_plans import whole
folder = Path(sys.argv[1])
model = apply(whole(1), PrunePlan.load(folder / "plan.json")).eval()
load_weights(model, folder / "model.safetensors")
torch.save(test_prune.outputs(model), folder / "outputs.pt")
"""


def whole(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return settled(real(PerceiverFusion(["image", "text"], 32, depth=3)))


def test_a_pruned_model_is_rebuilt_in_another_process_without_torch_pruning(tmp_path: Path) -> None:
    config = PruneConfig(
        **{**CONFIG, "modules": ["encoders.image", "fusion"], "heads": 0.5, "head_dims": 0.5, "round_to": 2},
        depth={"fusion.blocks": 1, "encoders.image.stages.2": 1},
    )
    pruned, made = prune(whole(0), batch(), config)
    assert made.removed.keys() == config.depth.keys() and made.report["parameters"][1] < made.report["parameters"][0]
    made.save(tmp_path / "plan.json")
    save_weights(pruned, tmp_path / "model.safetensors")
    root = Path(__file__).parents[1]
    environment = {"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", REBUILD, str(tmp_path)], check=True, env=environment, cwd=root)
    with torch.no_grad():
        said = pruned(batch())
    found = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for part in ("logits", "embeddings"):
        for name, value in getattr(said, part).items():
            assert (found[f"{part}.{name}"] - value).abs().max() == 0.0
