"""Training rows without labels, and which labels ``data.labelled`` hides."""

import pytest
from test_prepare import good_rows, report_of, run

from distill.contracts import UserError
from distill.data.prepared import PreparedData


def many_rows() -> list[dict]:
    """80 families of three training rows each, and the ten good rows behind them."""
    base = good_rows()[0]
    train = [
        base | {"id": 1000 + n, "label": "ab"[n % 2], "colour": n % 2, "family": f"many{n // 3}", "text": f"row {n}"}
        for n in range(240)
    ]
    return [*train, *good_rows()[6:]]


def texts_alone(folder, rows, seed=0, **changes):
    """Prepare without images: (info, ids of training rows with a label)."""
    info, data, _ = run(folder, rows, modalities={"text": "text"}, seed=seed, **changes)
    return info, data.ids[data.rows("train", labelled=True)].tolist()


def test_training_rows_without_labels_stay_and_others_are_left_out(tmp_path):
    rows = good_rows()
    for number in (1, 4, 7):
        rows[number]["label"] = rows[number]["colour"] = None
    info, data, report = run(tmp_path, rows, max_bad_fraction=0.1)
    assert info["rows"] == {"train": 6, "valid": 1, "test": 2} and info["hidden_labels"] == 0
    assert report["labelled"] == info["labelled"] == {"train": 4, "valid": 1, "test": 2}
    assert [entry["id"] for entry in report["bad_rows"]["rows"]] == [93]
    assert data.ids[data.rows("train")].tolist() == [95, 96, 97, 98, 99, 100]
    assert data.ids[data.rows("train", labelled=True)].tolist() == [95, 97, 98, 100]


def test_a_row_with_a_label_of_one_task_is_labelled(tmp_path):
    rows = good_rows()
    rows[0]["label"] = rows[1]["colour"] = None
    info, data, _ = run(tmp_path, rows)
    assert info["labelled"]["train"] == 6 and len(data.rows("train", labelled=True)) == 6


def test_a_training_row_without_anything_is_bad(tmp_path):
    rows = good_rows()
    rows[0] |= {"label": None, "colour": None, "text": ""}
    info, _, report = run(tmp_path, rows, modalities={"text": "text"}, max_bad_fraction=0.1)
    assert info["bad_rows"] == 1 and report["bad_rows"]["rows"][0]["reason"] == "every modality is missing"


def test_a_share_of_the_groups_keeps_its_labels(tmp_path):
    rows = many_rows()
    family = {row["id"]: row["family"] for row in rows}
    everything, all_ids = texts_alone(tmp_path, rows)
    found = {share: texts_alone(tmp_path, rows, labelled=share) for share in (0.2, 0.5, 1.0)}
    for share, (info, ids) in found.items():
        families = {family[row] for row in ids}
        assert len(ids) == 3 * len(families) == info["labelled"]["train"]  # whole families
        assert abs(len(families) - 80 * share) <= 16
        assert info["hidden_labels"] == 240 - len(ids) and info["rows"] == everything["rows"]
        assert info["labelled"]["test"] == everything["labelled"]["test"]
    assert set(found[0.2][1]) < set(found[0.5][1]) < set(found[1.0][1]) == set(all_ids)
    assert texts_alone(tmp_path, rows, labelled=0.2)[1] == found[0.2][1] != texts_alone(tmp_path, rows, 1, labelled=0.2)


def test_a_hidden_label_is_nowhere_and_its_class_stays(tmp_path):
    rows = many_rows()
    rows[0]["label"] = "seldom"
    seeds = (texts_alone(tmp_path, rows, seed, labelled={"rows": 60})[1] for seed in range(20))
    assert next(ids for ids in seeds if 1000 not in ids)
    data, report = PreparedData.open(tmp_path / "data"), report_of(tmp_path)
    assert data.labels["label"] == ["a", "b", "seldom"]
    assert report["classes"]["label"]["train"]["seldom"] == 0 and report["hidden_labels"] == 180
    for task, values in data.targets.items():
        assert (values[data.rows("train")] >= 0).sum() == 60 == sum(report["classes"][task]["train"].values())


@pytest.mark.parametrize("group", ["family", None])
def test_a_number_of_rows_is_exact(tmp_path, group):
    rows = many_rows()
    family = {row["id"]: row["family"] for row in rows}
    for count in (20, 30, 31, 240):
        _, ids = texts_alone(tmp_path, rows, group=group, labelled={"rows": count})
        assert len(ids) == count
        families = {family[row] for row in ids}
        assert len(families) == -(-count // 3) if group else len(families) > count / 3 or count == 240
    _, half = texts_alone(tmp_path, rows, group=group, labelled={"groups": 0.5})
    _, some = texts_alone(tmp_path, rows, group=group, labelled={"groups": 0.5, "rows": 30})
    assert len(some) == 30 and set(some) < set(half)


def test_rows_that_have_no_label_do_not_count(tmp_path):
    rows = many_rows()
    for row in rows[:120]:
        row["label"] = row["colour"] = None
    info, ids = texts_alone(tmp_path, rows, labelled={"rows": 50})
    assert len(ids) == 50 and min(ids) >= 1120 and info["hidden_labels"] == 70


@pytest.mark.parametrize(
    "labelled, message",
    [
        ({"rows": 300}, "data.labelled.rows is 300, and 240 training rows have a label; lower it"),
        ({"rows": 1}, r"data.labelled leaves labels of 1 class\(es\) of task 'label' in train; at least 2"),
    ],
)
def test_too_few_labels_are_refused(tmp_path, labelled, message):
    with pytest.raises(UserError, match=message):
        texts_alone(tmp_path, many_rows(), labelled=labelled)
    assert not (tmp_path / "data").exists()
