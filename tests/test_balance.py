"""Balance of modalities: the paper's factors for two, any number of them, what is modulated, and what is logged."""

import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks_job import make_model as in_float64
from tiny import make_batch, make_model, make_objective, terms
from tiny_job import assert_same, lines, stopped_and_continued, weights

from distill.balance import Balance, balance_factors, noise_generator, scored_tasks
from distill.batch_parts import take
from distill.config import BalanceConfig, TrainConfig
from distill.contracts import IGNORE, Outputs
from distill.engine import fit
from distill.multimodal import MultimodalModel, Reader, evaluating
from distill.optimize import build_optimizer
from distill.ranks import Ranks, accelerator_for
from distill.step import Stepper
from distill.trainee import Trainee

NAMES = ("image", "text", "audio", "video", "series")
HEADS = terms(
    *({"loss": "cross_entropy", "task": f"{t}.{m}"} for t, m in product(("kind", "tone"), ("image", "text", "fused")))
)
SCORES = st.lists(st.floats(1e-6, 1), min_size=1, max_size=5)


def config(**settings):
    return BalanceConfig.model_validate(settings)


def said(batch, **shares):
    """Outputs in which a modality's heads give the true class some probability, "kind" of three and "tone" of two."""
    logits = {}
    for (task, labels), (name, share) in product(batch.targets.items(), shares.items()):
        count = {"kind": 3, "tone": 2}[task]
        truth = torch.nn.functional.one_hot(labels.clamp(min=0), count).bool()
        value = torch.as_tensor(share, dtype=torch.float64).expand(len(labels))[:, None]
        logits[f"{task}.{name}"] = torch.where(truth, value, (1 - value) / (count - 1)).log()
    return Outputs(logits, {}, {})


def with_gradients(model, seed=0):
    """Random gradients at all parameters, and a copy of them by name."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def changed(model, shares, *, step=0, total=10, seed=0, **settings):
    """Modulate random gradients by given scores: those before, those behind, and what is logged."""
    batch = make_batch()
    before = with_gradients(model)
    balance = Balance(model, HEADS, config(**settings), seed)
    balance.advance(step, total)
    balance.see(said(batch, **shares), batch)
    values = balance.modulate(Ranks())
    return before, gradients(model), values


def owner(name, modalities=("image", "text")):
    """The modality that a parameter belongs to before fusion, or None."""
    parts = name.removeprefix("others.0.").split(".")
    return parts[1] if parts[0] in ("encoders", "necks", "token_necks") and parts[1] in modalities else None


def test_two_modalities_have_the_papers_factors():
    found = balance_factors({"image": 0.6, "text": 0.3}, 0.5)
    assert found == pytest.approx({"image": 1 - math.tanh(1.0), "text": 1.0})
    assert found["image"] == pytest.approx(0.23840584)


def test_of_three_each_is_compared_with_the_mean_of_the_others():
    found = balance_factors({"image": 0.6, "text": 0.45, "audio": 0.15}, 0.1)
    assert found == pytest.approx({"image": 1 - math.tanh(0.2), "text": 1 - math.tanh(0.12), "audio": 1.0})


@given(SCORES, st.floats(0, 5), st.randoms(use_true_random=False))
def test_a_permutation_of_modalities_permutes_factors(scores, alpha, random):
    given = dict(zip(NAMES, scores, strict=False))
    shuffled = dict(random.sample(list(given.items()), len(given)))
    assert balance_factors(shuffled, alpha) == balance_factors(given, alpha)


@given(SCORES, st.floats(0, 5))
def test_only_those_ahead_are_slowed_down_and_the_weakest_never(scores, alpha):
    found = balance_factors(dict(zip(NAMES, scores, strict=False)), alpha)
    assert all(0 <= factor <= 1 for factor in found.values())
    assert found[min(found, key=dict(zip(NAMES, scores, strict=False)).get)] == 1


@given(st.floats(0, 1), st.integers(1, 5), st.floats(0, 5))
def test_equal_scores_leave_all_as_they_are(score, count, alpha):
    assert set(balance_factors(dict.fromkeys(NAMES[:count], score), alpha).values()) == {1.0}


def test_one_that_knows_beside_one_that_knows_nothing_stands_still():
    assert balance_factors({"image": 0.5, "text": 0.0}, 0.3) == {"image": 0.0, "text": 1.0}


def test_scores_are_true_class_probabilities_of_rows_with_label_and_modality(wordpiece_file):
    """Over all rows the ratio of means is the paper's ratio of sums."""
    model, batch = make_model(wordpiece_file), make_batch(4)
    batch.targets["kind"][0] = IGNORE
    batch.present["text"][1] = False
    balance = Balance(model, HEADS, config(alpha=0.5), 0)
    balance.see(said(batch, image=[0.9, 0.8, 0.4, 0.6], text=[0.3, 0.9, 0.2, 0.4]), batch)
    values = balance.modulate(Ranks())
    image, text = (1.8 / 3 + 2.7 / 4) / 2, (0.6 / 2 + 0.9 / 3) / 2
    assert values["balance/score/image"] == pytest.approx(image)
    assert values["balance/score/text"] == pytest.approx(text)
    assert values["balance/share/image"] == pytest.approx(image / (image + text))
    assert values["balance/factor/image"] == pytest.approx(1 - math.tanh(0.5 * image / text))
    assert values["balance/factor/text"] == 1


def test_a_modality_that_no_row_has_is_no_measure_for_the_others(wordpiece_file):
    model, batch = make_model(wordpiece_file), make_batch()
    batch.present["text"][:] = False
    before = with_gradients(model)
    balance = Balance(model, HEADS, config(alpha=0.5, noise=False), 0)
    balance.see(said(batch, image=0.9, text=0.1), batch)
    values = balance.modulate(Ranks())
    assert values == pytest.approx(
        {"balance/score/image": 0.9, "balance/share/image": 1.0, "balance/factor/image": 1.0}
    )
    assert_same(gradients(model), before)


def test_without_any_label_nothing_happens(wordpiece_file):
    model, batch = make_model(wordpiece_file), make_batch()
    for labels in batch.targets.values():
        labels[:] = IGNORE
    before = with_gradients(model)
    balance = Balance(model, HEADS, config(noise=False), 0)
    balance.see(said(batch, image=0.9, text=0.1), batch)
    assert balance.modulate(Ranks()) == {}
    assert_same(gradients(model), before)


def test_tasks_without_a_term_on_each_head_do_not_count():
    objective = terms(
        {"loss": "cross_entropy", "task": "tone.image"},
        {"loss": "kd", "task": "kind.text"},
        {"loss": "kd", "task": "tone"},
        {"loss": "cross_entropy", "task": "kind.image"},
        {"loss": "cosine", "embedding": "image"},
    )
    assert scored_tasks(objective, ["image", "text"]) == ["kind"]
    assert scored_tasks(objective, ["image", "text", "audio"]) == []


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
def test_what_belongs_to_the_leading_modality_is_scaled_and_nothing_else(wordpiece_file, fusion):
    model = make_model(wordpiece_file, fusion=fusion)
    before, after, values = changed(model, {"image": 0.8, "text": 0.2}, alpha=0.2, noise=False)
    factor = values["balance/factor/image"]
    assert factor == pytest.approx(1 - math.tanh(0.8), rel=1e-6)
    scaled = {name: grad * (factor if owner(name) == "image" else 1) for name, grad in before.items()}
    assert_same(after, scaled)
    assert sum(owner(name) == "image" for name in after) > 4


def test_necks_of_all_members_of_an_ensemble_are_scaled(wordpiece_file):
    first, other = make_model(wordpiece_file), make_model(wordpiece_file, seed=1)
    parts = (first.fusion, dict(first.heads), {task: dict(by) for task, by in first.unimodal_heads.items()})
    theirs = (other.fusion, dict(other.heads), {task: dict(by) for task, by in other.unimodal_heads.items()})
    widths = {name: encoder.out_dim for name, encoder in first.encoders.items()}
    reader = Reader(widths, *theirs, dim=12, embedding_dim=6)
    model = MultimodalModel(dict(first.encoders), *parts, dim=12, embedding_dim=6, others=[reader]).train()
    before = with_gradients(model)
    batch = make_batch()
    balance = Balance(model, HEADS, config(noise=False), 0)
    outputs = [said(batch, image=share, text=0.2).logits for share in (0.5, 0.7)]
    joined = {f"{name}@{n}": value for n, each in enumerate(outputs) for name, value in each.items()}
    balance.see(Outputs(joined, {}, {}), batch)
    values = balance.modulate(Ranks())
    assert values["balance/score/image"] == pytest.approx(0.6)
    factor = values["balance/factor/image"]
    after = gradients(model)
    assert_same(after, {name: grad * (factor if owner(name) == "image" else 1) for name, grad in before.items()})
    assert not torch.equal(after["others.0.necks.image.linear.weight"], before["others.0.necks.image.linear.weight"])


@pytest.mark.parametrize("settings", [{"alpha": 0}, {"alpha": 0.5, "until": 0.5, "step": 5}])
def test_measuring_alone_leaves_gradients_bit_by_bit(wordpiece_file, settings):
    before, after, values = changed(make_model(wordpiece_file), {"image": 0.8, "text": 0.2}, **settings)
    assert_same(after, before)
    assert values["balance/factor/image"] == 1 and values["balance/score/image"] == pytest.approx(0.8)


def test_the_last_step_of_its_share_is_still_modulated(wordpiece_file):
    shares, settings = {"image": 0.8, "text": 0.2}, {"alpha": 0.5, "until": 0.5, "step": 4}
    assert changed(make_model(wordpiece_file), shares, **settings)[2]["balance/factor/image"] < 1


def noise_of(model, **settings):
    before, after, values = changed(model, {"image": 0.5, "text": 0.25}, **settings)
    factors = {name: values[f"balance/factor/{name}"] for name in ("image", "text")}
    return {name: after[name] - before[name] * factors.get(owner(name), 1.0) for name in before}, before


def test_noise_has_each_gradients_deviation_and_nothing_else_gets_any(wordpiece_file):
    noise, before = noise_of(make_model(wordpiece_file))
    own = {name: value for name, value in noise.items() if owner(name)}
    assert all(not value.any() for name, value in noise.items() if name not in own)
    large = {name: value for name, value in own.items() if value.numel() >= 90}
    assert {owner(name) for name in large} == {"image", "text"}
    for name, value in large.items():
        expected = before[name].std().item()
        assert value.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * value.numel())), name
        assert abs(value.mean()) < 5 * expected / math.sqrt(value.numel()), name
        assert abs(torch.corrcoef(torch.stack([value.flatten(), before[name].flatten()]))[0, 1]) < 0.5


def test_noise_depends_on_seed_and_step_alone(wordpiece_file):
    model = make_model(wordpiece_file)
    first = noise_of(model, step=3, seed=1)[0]
    torch.manual_seed(99)
    assert_same(noise_of(model, step=3, seed=1)[0], first)
    name = "necks.text.linear.weight"
    for other in ({"step": 4, "seed": 1}, {"step": 3, "seed": 2}, {"step": 1, "seed": 3}):
        assert not torch.allclose(noise_of(model, **other)[0][name], first[name])
    draws = [
        torch.randn(3, generator=noise_generator(s, t, torch.device("cpu"))) for s, t in product(range(4), range(4))
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == 16


def test_entries_without_a_gradient_get_no_noise_and_frozen_parameters_nothing(wordpiece_file):
    model, batch = make_model(wordpiece_file), make_batch()
    with_gradients(model)
    table = next(p for name, p in model.named_parameters() if name.startswith("encoders.text") and p.ndim == 2)
    table.grad[::2] = 0
    frozen = model.encoders["image"].requires_grad_(False)
    for parameter in frozen.parameters():
        parameter.grad = None
    balance = Balance(model, HEADS, config(), 0)
    balance.see(said(batch, image=0.5, text=0.5), batch)
    balance.modulate(Ranks())
    assert not table.grad[::2].any() and table.grad[1::2].all()
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_parts_of_a_batch_add_up(wordpiece_file):
    model, batch = make_model(wordpiece_file).eval(), make_batch(9)
    batch.present["image"][4] = False
    batch.targets["kind"][7] = IGNORE
    whole, parts = (Balance(model, HEADS, config(alpha=0.4, noise=False), 0) for _ in range(2))
    with_gradients(model)
    with evaluating(model):
        whole.see(model(batch), batch)
        for start in range(3):
            some = take(batch, torch.arange(start, 9, 3))
            parts.see(model(some), some)
    assert parts.modulate(Ranks()) == pytest.approx(whole.modulate(Ranks()), rel=1e-6)


@pytest.mark.parametrize("extra", [[], [{"loss": "clip_infonce", "embedding": "image,text"}]], ids=["apart", "cached"])
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path, extra):
    def stepped(accumulate):
        model, batch = in_float64(8, 0), make_batch(12)
        tapped, objective = make_objective(model, [*HEADS, *terms(*extra)], batch)
        settings = TrainConfig.model_validate(
            {"accumulate": accumulate, "optimizer": "sgd", "balance": {"alpha": 0.5, "noise": True}}
        )
        trainee = Trainee(tapped, objective.double()).train()
        trainee.balance = Balance(model, objective.terms, settings.balance, 0)
        stepper = Stepper(
            accelerator_for("no"), Ranks(), trainee, build_optimizer(trainee, settings), settings, tmp_path
        )
        for step in range(3):
            trainee.advance(step, 3)
            values = stepper({"student": batch}, "student", None)[1]
        return values, dict(model.state_dict())

    values, weights_whole = stepped(1)
    again, weights_parts = stepped(4)
    assert {f"balance/{what}/{m}" for what in ("score", "share", "factor") for m in ("image", "text")} <= values.keys()
    assert again == pytest.approx(values, rel=1e-6)
    for name, value in weights_whole.items():
        torch.testing.assert_close(weights_parts[name], value, rtol=1e-7, atol=1e-10)


def test_a_training_logs_what_it_measured(make_job):
    job = make_job(objective=HEADS, balance={"alpha": 0.5, "until": 0.4}, epochs=5)
    fit(job)
    found = lines(job)
    for entry in found:
        shares = [entry[f"train/balance/share/{name}"] for name in ("image", "text")]
        assert sum(shares) == pytest.approx(1)
        assert all(0 < entry[f"train/balance/score/{name}"] < 1 for name in ("image", "text"))
    factors = [min(entry[f"train/balance/factor/{name}"] for name in ("image", "text")) for entry in found]
    assert all(factor < 1 for factor in factors[:2]) and factors[2:] == [1, 1, 1]
    assert found[-1]["train/balance/score/image"] > found[0]["train/balance/score/image"]


def test_trackers_are_told(make_job):
    job, told = make_job(objective=HEADS, balance={}, epochs=4), []

    job.track = lambda step: nullcontext(lambda step, values: told.append(values))
    fit(job)
    assert any("step/balance/factor/image" in values for values in told)
    assert any("train/balance/score/text" in values for values in told)


def test_measuring_alone_trains_as_without(make_job):
    plain, watched = make_job("plain", objective=HEADS), make_job("watched", objective=HEADS, balance={"alpha": 0})
    fit(plain)
    fit(watched)
    assert_same(weights(watched), weights(plain))
    assert not any("balance" in name for name in lines(plain)[0])
    assert [{k: v for k, v in entry.items() if "balance" not in k} for entry in lines(watched)] == lines(plain)


def test_a_balanced_training_differs(make_job):
    plain, balanced = (
        make_job("plain", objective=HEADS),
        make_job("balanced", objective=HEADS, balance={"noise": False}),
    )
    fit(plain)
    fit(balanced)
    assert not all(torch.equal(value, weights(plain)[name]) for name, value in weights(balanced).items())


@pytest.mark.parametrize("step", [3, 7])
def test_a_stopped_training_goes_on_exactly(make_job, step):
    settings = {"objective": HEADS, "balance": {"alpha": 0.4}}
    whole = make_job("whole", **settings)
    fit(whole)
    again = stopped_and_continued(make_job, step, **settings)
    assert_same(weights(again), weights(whole))
    assert lines(again) == lines(whole)


def test_a_step_that_is_not_finite_is_not_counted(make_job):
    job = make_job(objective=HEADS, balance={}, not_finite="skip", epochs=1)
    values = iter(range(100))
    forward = job.objective.forward

    def broken(*arguments):
        total, terms = forward(*arguments)
        return (total * math.nan if next(values) == 2 else total), terms

    job.objective.forward = broken
    fit(job)
    assert all(math.isfinite(value) for value in lines(job)[0].values())
