"""The choice of layers to leave out: on costs that add up and on costs that interact."""

import json
from dataclasses import replace

import pytest

from dbsam_deploy.core.errors import AccuracyError, ExportError, InputError
from dbsam_deploy.quantization.layers import Layer
from dbsam_deploy.quantization.qdq import Calibrated
from dbsam_deploy.quantization.sweep import (
    Group,
    Judge,
    Measured,
    accepts,
    check_groups,
    group_name,
    groups_of,
    sweep,
)
from dbsam_deploy.recipe import load_recipe

PLAN = load_recipe("int8").quantization
GATE = load_recipe("int8").gate


def layer(module, macs=10):
    return Layer(module, "MatMul", module, "x", "w", "y", macs)


@pytest.mark.parametrize(
    ("module", "group"),
    [
        ("image_encoder.blocks.3.attn.qkv", "image_encoder.blocks.3.attn.*"),
        ("image_encoder.layers.1.blocks.0.mlp.fc2", "image_encoder.layers.1.blocks.0.mlp.*"),
        ("image_encoder.layers.0.downsample.conv1.c", "image_encoder.layers.0.downsample.*"),
        ("image_encoder.patch_embed.proj", "image_encoder.patch_embed.proj"),
        ("image_encoder.neck.0", "image_encoder.neck.0"),
    ],
)
def test_group_names(module, group):
    assert group_name(module) == group


def test_groups_count_work_and_leave_the_recipes_exclusions_out():
    layers = [
        layer("e.blocks.0.mlp.lin1", 30),
        layer("e.blocks.0.mlp.lin2", 20),
        layer("e.blocks.0.attn.qkv", 5),
        layer("e.a.0.attn.sampling_offsets"),
    ]
    assert groups_of(layers, PLAN) == (
        Group("e.blocks.0.mlp.*", 2, 50),
        Group("e.blocks.0.attn.*", 1, 5),
    )
    with pytest.raises(ExportError, match="nothing to choose between"):
        check_groups(groups_of(layers[:2], PLAN))


class Costs:
    """Losses of agreement by group, with an extra loss for pairs that are both quantised."""

    def __init__(self, costs, pairs=()):
        self.costs, self.pairs, self.asked = costs, dict(pairs), []

    def __call__(self, exclude):
        self.asked.append(exclude)
        kept = [name for name in self.costs if name not in exclude]
        loss = sum(self.costs[name] for name in kept)
        loss += sum(cost for pair, cost in self.pairs.items() if set(pair) <= set(kept))
        return Measured(0.99, loss, 1 - loss, 1 - loss, loss, len(kept) / len(self.costs))

    def groups(self, **macs):
        return tuple(Group(name, 1, macs.get(name, 1)) for name in self.costs)


def run(costs, budget, **macs):
    return sweep(costs.groups(**macs), costs, lambda m: m.loss <= budget, budget=budget)


def test_nothing_is_left_out_where_everything_fits():
    found = run(Costs({"a": 0.001, "b": 0.002}), 0.01)
    assert found.exclude == ()
    assert found.chosen == found.everything
    assert [row.group.name for row in found.ranked] == ["b", "a"]


def test_the_costly_group_goes_and_the_rest_stays():
    found = run(Costs({"a": 0.001, "b": 0.5, "c": 0.002}), 0.01)
    assert found.exclude == ("b",)
    assert found.chosen.loss <= 0.01


def test_groups_that_only_hurt_together_are_found():
    """Alone each costs nothing; together they cost more than the budget: one of them goes."""
    costs = Costs({"a": 0.001, "b": 0.001, "c": 0.004}, {("a", "b"): 0.1})
    found = run(costs, 0.01, c=100)
    assert found.exclude in (("a",), ("b",))


def test_work_that_was_left_out_in_vain_is_put_back():
    """`small` goes first, being worst for its work; without `big` it would have fitted."""
    costs = Costs({"small": 0.008, "big": 0.05, "c": 0.0})
    found = run(costs, 0.01, small=1, big=100, c=100)
    assert found.exclude == ("big",)


def test_a_budget_that_nothing_keeps_to_is_an_error():
    with pytest.raises(AccuracyError, match=r"not even .* alone keeps to the budget"):
        run(Costs({"a": 0.5, "b": 0.6}), 0.01)


@pytest.mark.parametrize("budget", [0.01, 0.6])
def test_progress_counts_every_measurement_and_ends_at_its_total(budget):
    told, costs = [], Costs({"a": 0.001, "b": 0.5, "c": 0.002, "d": 0.008, "e": 0.001})
    sweep(
        costs.groups(),
        costs,
        lambda m: m.loss <= budget,
        budget=budget,
        progress=lambda text, done, total: told.append((done, total)),
    )
    assert [done for done, _ in told] == list(range(len(told)))
    assert all(done < total for done, total in told[:-1])
    assert told[-1] == (len(told) - 1, len(told) - 1)
    totals = [total for _, total in told]
    assert totals == sorted(totals, reverse=True)


def test_a_choice_among_many_groups_takes_few_measurements():
    """Forty groups of which five are too costly: bisection, and one try each to put them back."""
    costs = Costs({f"g{i}": 0.1 if i % 8 == 3 else 1e-5 for i in range(40)})
    found = run(costs, 0.01)
    assert set(found.exclude) == {f"g{i}" for i in range(40) if i % 8 == 3}
    assert len(set(costs.asked)) <= 81 + 2 * 7 + 5


def test_the_gates_floors_hold_beside_the_budget():
    good = Measured(0.99, 0.01, 0.999, 0.95, 0.004, 1.0)
    assert accepts(good, 0.005, GATE)
    for worse in (
        replace(good, cosine=0.97),
        replace(good, agreement=0.94),
        replace(good, agreement_p5=0.84),
        replace(good, cosine=float("nan")),
        replace(good, dice_drop=0.006),
        replace(good, dice_drop=float("nan")),
    ):
        assert not accepts(worse, 0.005, GATE)


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Judges of a graph whose measurements are counted instead of made."""
    made = []

    def measure(self, exclude):
        made.append(exclude)
        return Measured(0.99, 0.1, 0.9, 0.8, 0.1, 0.5)

    monkeypatch.setattr(Judge, "_measure", measure)
    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"graph")

    class View:
        sha256 = "0"
        truth = ()

    def make(plan=PLAN):
        return Judge(Calibrated(path, (), {}), plan, [View()], tmp_path)

    return make, made


def test_a_sweep_goes_on_where_it_stopped(judge):
    make, made = judge
    first = make()
    assert first(("a", "b")) == first(("b", "a")) == Measured(0.99, 0.1, 0.9, 0.8, 0.1, 0.5)
    assert make()(("a", "b")).cosine == 0.99
    assert made == [("a", "b")]
    assert make().measured == 0


def test_another_recipe_starts_anew(judge):
    make, made = judge
    make()(())
    make(replace(PLAN, smoothing=0.5))(())
    assert len(made) == 2


def test_a_damaged_state_is_ignored_with_a_note(judge, tmp_path, capsys):
    make, _ = judge
    first = make()(())
    state = tmp_path / "sweep.json"
    body = json.loads(state.read_text())
    for damaged in (json.dumps({**body, "measured": {"": {"x": 1}}}), state.read_text()[:-9], "[]"):
        state.write_text(damaged)
        again = make()
        assert "sweep.json is damaged" in capsys.readouterr().err
        assert again(()) == first
        assert again.measured == 1


def test_a_choice_keeps_a_margin_to_the_floors():
    """On the floors themselves, other images would miss half of the time."""
    floors = Measured(
        GATE.embedding_cosine, 0.01, GATE.mask_agreement_mean, GATE.mask_agreement_p5, 0.0, 1.0
    )
    assert not accepts(floors, 0.005, GATE)


def test_images_without_labels_cannot_keep_to_a_budget(tmp_path):
    class View:
        sha256 = "0"
        truth = None

    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"graph")
    with pytest.raises(InputError, match="none of the 2 held-back images has labels"):
        Judge(Calibrated(path, (), {}), PLAN, [View(), View()], tmp_path)


def test_no_view_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no held-back image"):
        Judge(Calibrated(tmp_path, (), {}), PLAN, [], tmp_path)
