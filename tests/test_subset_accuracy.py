"""The benchmark of sets of modalities: what a table says of made-up shares."""

from benchmarks.quickstart_seeds import seed_recipes
from benchmarks.subset_accuracy import ALL, MODELS, markdown, parse


def seeds_of(number):
    """What two tasks' shares may be under two seeds, of three models."""
    step = 0.01 * number
    return {
        name: {"kind": {"image": 0.5, "text": 0.25 + step, "image+text": 0.7, ALL: 0.6 + 0.1 * place + step}}
        for place, name in enumerate(MODELS)
    }


def test_fusion_is_compared_with_the_best_modality_alone_and_the_student_with_the_baseline(tmp_path):
    (recipe,) = seed_recipes("trimodal", [], str(tmp_path), 1)
    text = markdown([seeds_of(0), seeds_of(1)], recipe, "python -m benchmarks.subset_accuracy")
    lines = text.splitlines()
    assert lines[0] == "# What each set of modalities is worth: trimodal" and "seeds 0 to 1" in text
    assert "| image | 50.0 ±0.0 | 50.0 ±0.0 | 50.0 ±0.0 |  |" in lines
    assert "| all | 60.5 ±6.4 | 70.5 ±6.4 | 80.5 ±6.4 | +10.0 (+10.0 to +10.0) |" in lines
    worth = lines[-1]
    assert worth.startswith("| all − the best one alone | +10.5 (+4.1 to +16.9), image | +20.5 ")
    assert "text" not in worth  # neither the worse one, nor both


def test_options():
    options = parse(["teacher.train.epochs=2", "--seeds", "2", "student.train.epochs=1"])
    assert (options.recipe, options.seeds) == ("trimodal", 2)
    assert options.overrides == ["teacher.train.epochs=2", "student.train.epochs=1"]
