"""Numbers on real data: the diabetes study that scikit-learn brings (Efron et al. 2004), against a linear model."""

import csv

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tiny_project import distill

from distill.predict import load
from distill.runs import read_json

TRAIN, VALID = 250, 70
RECIPE = """\
version: 1
name: diabetes
data:
  source: {{type: table, path: rows.csv}}
  modalities: {{tabular: [{columns}]}}
  targets: {{progression: {{column: progression, kind: regression}}}}
  id: id
teacher:
  encoders: {{tabular: {{type: tabular_mlp, dim: 16, depth: 1}}}}
  fusion: {{type: concat, dim: 16}}
  members: 8
  train: &train
    {{epochs: 15, batch_size: 32, lr: 1.0e-3, weight_decay: 0.1, ema: 0.95}}
  objective: [{{loss: mse, task: progression}}]
student:
  encoders: {{tabular: {{type: tabular_mlp, dim: 16}}}}
  fusion: {{type: concat, dim: 16}}
  train: *train
  baseline: [{{loss: mse, task: progression}}]
  objective:
    - {{loss: mse, task: progression}}
    - {{loss: regression_kd, task: progression}}
prune: {{ratio: 0.25, train: {{epochs: 4, batch_size: 32, lr: 1.0e-3}}}}
export: {{min_agreement_int8: 0.9}}
bench: {{repeats: 10}}
"""


@pytest.mark.slow
def test_numbers_of_a_real_study_are_as_near_as_a_linear_model_brings_them(tmp_path):
    study = load_diabetes(scaled=False)
    order = np.random.default_rng(0).permutation(len(study.target))
    split = np.repeat(["train", "valid", "test"], [TRAIN, VALID, len(order) - TRAIN - VALID])
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*study.feature_names, "progression", "id", "split"])
        for number, (row, part) in enumerate(zip(order, split, strict=True)):
            table.writerow([*study.data[row], study.target[row], number, part])
    recipe = tmp_path / "diabetes.yaml"
    recipe.write_text(RECIPE.format(columns=", ".join(study.feature_names)))
    answer = distill("run", recipe, f"output={tmp_path / 'runs'}")
    assert answer.code == 0, answer.err

    train, test = order[split == "train"], order[split == "test"]
    scaler = StandardScaler().fit(study.data[train])
    linear = Ridge(1.0).fit(scaler.transform(study.data[train]), study.target[train])
    reached = linear.score(scaler.transform(study.data[test]), study.target[test])
    report = read_json(tmp_path / "runs" / "diabetes" / "report" / "report.json")
    found = {model["name"]: model["quality"]["progression"]["r2"] for model in report["models"]}
    print({"linear": reached, **found})
    assert min(found.values()) > reached - 0.1 > 0.2

    bundle = tmp_path / "runs" / "diabetes" / "quantize" / "onnx-int8"
    rows = [{"tabular": dict(zip(study.feature_names, study.data[row].tolist(), strict=True))} for row in test]
    said = [entry["progression"]["values"]["progression"] for entry in load(bundle).predict(rows)]
    residual = np.square(np.array(said) - study.target[test]).sum()
    r2 = 1 - residual / np.square(study.target[test] - study.target[test].mean()).sum()
    assert r2 == pytest.approx(found["onnx-int8"], abs=1e-4)
