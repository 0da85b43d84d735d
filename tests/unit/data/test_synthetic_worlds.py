"""The true probabilities: against plain loops, and what each world lets compose."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.rounding import by_chance, rounded
from torchrec_hilomoe.data.synthetic.inputs import FADING, Inputs
from torchrec_hilomoe.data.synthetic.population import GROUPS, HOURS, LEAF_ITEMS, Sessions, USERS
from torchrec_hilomoe.data.synthetic.worlds import (
    ADDEND_SCALE,
    ADDING,
    BEST_AUC,
    CHANGES,
    CLICK_RATE,
    expected_auc,
    MATCH_SCALE,
    RANK,
    World,
    WORLDS,
)
from torchrec_hilomoe.training.metrics import auc

ROWS = 300


def log_odds(probability):
    return np.log(probability) - np.log1p(-probability)


def terms_of(world):
    """Of a probability's longest sum: every change adds as many products as it has ranks."""
    return world.shared.size + sum(CHANGES[world.name].values()) * RANK


def no_difference(probability, world):
    """Nothing but rounding, which log odds amplify at both ends."""
    amplified = 1 / min(probability.min(), (1 - probability).min())
    return rounded(0.0, terms_of(world), scale=amplified)


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return World.draw(request.param, np.random.default_rng(1))


@pytest.fixture(scope="module")
def sessions(world):
    return Sessions.draw(world.population, ROWS, np.random.default_rng(2))


def test_probabilities_follow_the_equation_row_by_row(world, sessions):
    """The module's docstring as loops: one map a row, its changes added one at a time."""
    inputs = Inputs.of(world.population, sessions)
    expected = []
    for row in range(ROWS):
        weight, bias = world.shared.T.copy(), 0.0
        first = 0
        for name, count in CHANGES[world.name].items():
            change = first + inputs.attributes[name][row]
            ranks = slice(change * RANK, (change + 1) * RANK)
            weight += world.up[ranks].T @ world.down[:, ranks].T
            bias = bias + world.shift[change]
            first += count
        hidden = np.maximum(weight @ inputs.continuous[row] + bias, 0.0)
        logit = world.intercept + world.scale * (world.readout @ hidden)
        for index, name in enumerate(ADDING):
            logit += world.addend[index, inputs.attributes[name][row]]
        logit += ADDEND_SCALE * world.population.user_bias[sessions.user[row]]
        logit += ADDEND_SCALE * world.population.item_bias[sessions.candidate[row]]
        logit += MATCH_SCALE * inputs.match[row]
        expected.append(1.0 / (1.0 + np.exp(-logit)))
    assert world.probabilities(sessions).tolist() == rounded(expected, terms_of(world), scale=1.0)


def test_group_and_match_are_those_of_the_history(world, sessions):
    inputs = Inputs.of(world.population, sessions)
    empty = sessions.history_length == 0
    assert empty.any()
    for row in np.flatnonzero(~empty):
        events = sessions.history[row, : sessions.history_length[row]]
        votes, same, total = np.zeros(GROUPS), 0.0, 0.0
        for age, item in enumerate(reversed(events)):
            branch, group = divmod(item // LEAF_ITEMS, GROUPS)
            votes[group] += FADING**age
            same += FADING**age * (branch == inputs.attributes["branch"][row])
            total += FADING**age
        assert inputs.attributes["group"][row] == votes.argmax()
        want = (same / total - 0.25) / 0.25
        assert inputs.match[row] == rounded(want, terms=2 * len(events), scale=1 / 0.25)
    assert np.all(inputs.attributes["group"][empty] == 0)
    assert np.all(inputs.match[empty] == inputs.match[~empty].min())


def test_padding_decides_nothing(world, sessions):
    beyond = np.arange(sessions.history.shape[1]) >= sessions.history_length[:, None]
    other = replace(sessions, history=np.where(beyond, 0, sessions.history))
    np.testing.assert_array_equal(world.probabilities(sessions), world.probabilities(other))


def test_context_changes_the_map_in_the_composed_world_only(world, sessions):
    """Moving every row from one context to another moves its logit by a constant, or does not."""
    contexts = world.population.hour_context[np.arange(HOURS)]
    first, second = np.flatnonzero(contexts == 0)[0], np.flatnonzero(contexts == 1)[0]
    before, after = (
        world.probabilities(replace(sessions, hour=np.full(ROWS, hour))) for hour in (first, second)
    )
    spread = np.ptp(log_odds(after) - log_odds(before))
    assert spread > 1.0 if world.name == "composed" else spread == no_difference(before, world)


def test_a_child_means_something_else_under_another_branch():
    """In ``tree`` the leaves' changes are all different; ``composed`` knows branches only."""
    rng = np.random.default_rng(3)
    tree, composed = World.draw("tree", rng), World.draw("composed", rng)
    sessions = Sessions.draw(tree.population, ROWS, rng)
    in_force = {}
    for world in (tree, composed):
        people = world.population
        plain = replace(
            people,
            item_latent=np.zeros_like(people.item_latent),
            item_bias=np.zeros_like(people.item_bias),
        )
        moved = []
        for leaf in range(GROUPS):  # the children of the first branch
            candidate = np.full(ROWS, leaf * LEAF_ITEMS)
            rows = replace(sessions, candidate=candidate)
            moved.append(replace(world, population=plain).probabilities(rows))
        in_force[world.name] = np.ptp(log_odds(np.array(moved)), axis=0)
    assert in_force["composed"].max() == no_difference(np.array(moved), composed)
    assert np.median(in_force["tree"]) > 1.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WORLDS)
def test_every_population_has_the_same_click_rate_and_best_auc(name, seed):
    rng = np.random.default_rng(seed)
    world = World.draw(name, rng)
    probability = world.probabilities(Sessions.draw(world.population, 32_768, rng))
    # Visits of a user are alike, so that it is users who are drawn.
    assert probability.mean() == by_chance(CLICK_RATE, probability.std() / USERS**0.5)
    deviation = (BEST_AUC * (1 - BEST_AUC) / USERS) ** 0.5
    assert expected_auc(probability) == by_chance(BEST_AUC, deviation)


def test_expected_auc_is_the_mean_over_draws_of_labels():
    rng = np.random.default_rng(0)
    probability = rng.beta(1.0, 3.0, size=4000)
    drawn = [auc(probability, 1.0 * (rng.random(4000) < probability)) for _ in range(50)]
    sigma = np.std(drawn) / np.sqrt(len(drawn))
    assert abs(expected_auc(probability) - np.mean(drawn)) < 5 * sigma
