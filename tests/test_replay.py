"""Replay holds what happened, once, in order, whatever the environment; updates come when due.

Most tests train through main() on Counting, whose observations say where they come from and which
writes down every transition. What replay and updates hold is compared with what happened.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import BOUNDS, ENDINGS, SPACES, journal, made_columns, oldest_first
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("gymnasium_only")


def check(stored, expected):
    """The same transitions; the allowance is for actions, which went to the bounds and back."""
    for name, column, other in zip(stored._fields, stored, expected):
        assert column.dtype == np.float32
        np.testing.assert_allclose(column, other, rtol=0, atol=1e-6, err_msg=name)


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("variant", [*ENDINGS, *SPACES])
def test_replay_holds_every_transition_once_in_order(sac, train, variant, n_envs):
    seen = train(sac, f"Counting-{variant}-v0", 102, num_envs=n_envs)
    rounds = -(-102 // n_envs)
    assert seen.buffer.count == len(seen.buffer) == len(journal.made) == rounds * n_envs
    check(seen.stored, made_columns(sac))
    # And without the environment's list: no transition crosses an episode, for instance and episode
    # stay, and the step goes up by one.
    moved = seen.stored.next_obs[:, :3] - seen.stored.obs[:, :3]
    np.testing.assert_allclose(moved, np.tile([0, 0, 1 / 3], (len(moved), 1)), atol=1e-5)


@pytest.mark.parametrize("variant, ends", [("terminated", 1), ("both", 1), ("truncated", 0)])
def test_only_termination_is_stored_as_such(sac, train, variant, ends):
    stored = train(sac, f"Counting-{variant}-v0", 60).stored
    done = np.array([m.done for m in journal.made])
    assert done.sum() > 10
    np.testing.assert_array_equal(stored.terminated, done * np.float32(ends))


@pytest.mark.parametrize(
    "capacity, n_envs", [(50, 1), (53, 1), (50, 3), (52, 4), (53, 4), (5, 4), (4, 4)]
)
def test_a_full_ring_holds_the_newest_and_only_they(sac, train, capacity, n_envs):
    seen = train(sac, "Counting-mixed-v0", 120, num_envs=n_envs, buffer_size=capacity)
    assert len(seen.buffer.rows) == len(seen.buffer) == capacity
    check(seen.stored, sac.Batch(*(column[-capacity:] for column in made_columns(sac))))


def test_the_buffer_has_no_more_rows_than_the_run_can_fill(sac, train):
    seen = train(sac, "Counting-mixed-v0", 60, num_envs=4, buffer_size=10**9)
    assert 60 <= len(seen.buffer.rows) <= 64


@pytest.mark.without("sac_continuous")  # it has no --action-repeat
@pytest.mark.parametrize("n_envs", [1, 3])
def test_a_buffer_has_no_more_rows_than_actions_come(sac, train, n_envs):
    flags = dict(num_envs=n_envs, action_repeat=4, learning_starts=96)
    seen = train(sac, "Counting-mixed-v0", 121, **flags)
    actions = len(seen.stored[0])
    assert len(seen.buffer) == actions >= 121 / 4
    assert actions <= len(seen.buffer.rows) <= actions + n_envs


@pytest.mark.parametrize("n_envs, capacity", [(1, 1000), (4, 1000), (3, 20)])
class TestUpdates:
    @pytest.fixture
    def updates(self, sac, train, n_envs, capacity):
        flags = dict(num_envs=n_envs, buffer_size=capacity, learning_starts=12, batch_size=16)
        updates = train(sac, "Counting-mixed-v0", 60, **flags).updates
        assert len(updates) == len(journal.made) - 12
        return updates

    def test_get_batches_of_what_happened(self, sac, updates, capacity):
        made = made_columns(sac)
        for update in updates:
            drawn = update.batch.reward.long().numpy()  # rewards count the transitions
            assert max(0, update.made - capacity) <= drawn.min()
            assert drawn.max() < update.made
            batch = sac.Batch(*(column.numpy() for column in update.batch))
            check(batch, sac.Batch(*(column[drawn] for column in made)))

    def test_get_a_fresh_batch_each(self, updates):
        batches = {update.batch.reward.numpy().tobytes() for update in updates}
        assert len(batches) == len(updates)

    def test_get_fresh_normal_noise(self, updates):
        noise = torch.cat([update.noise for update in updates])
        assert noise.shape == (2 * len(updates), 16, 2)
        assert len({half.numpy().tobytes() for half in noise}) == len(noise)
        assert abs(noise.mean()) < 0.1
        assert abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("checkpoint_frequency", [1000, 7])
@pytest.mark.parametrize(
    "n_envs, learning_starts", [(1, 1), (1, 30), (3, 30), (3, 31), (4, 4), (4, 30)]
)
def test_one_update_per_step_after_learning_starts(
    sac, train, n_envs, learning_starts, checkpoint_frequency
):
    flags = dict(learning_starts=learning_starts, checkpoint_frequency=checkpoint_frequency)
    seen = train(sac, "Counting-mixed-v0", 50, num_envs=n_envs, **flags)
    assert 50 <= len(journal.made) < 50 + n_envs
    # Updates come before the environments' step, and learn from what was stored till then.
    moments = []
    for step in range(0, len(journal.made), n_envs):
        learning_steps = max(0, step + n_envs - learning_starts)
        moments += [step] * min(n_envs, learning_steps)
    assert [update.made for update in seen.updates] == moments
    assert len(moments) == len(journal.made) - learning_starts


@pytest.mark.parametrize("name", BOUNDS)
def test_replay_stores_actions_before_rescaling(sac, train, name):
    seen = train(sac, f"Counting-{name}-actions-v0", 60, num_envs=4, learning_starts=20)
    actions = seen.stored.action
    assert (abs(actions) <= 1).all()
    assert (actions.min(0) < -0.3).all()
    assert (actions.max(0) > 0.3).all()
    check(seen.stored, made_columns(sac, BOUNDS[name]))


class Reads(TorchDispatchMode):
    """Counts how often Python reads a number of a tensor, which makes it wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_number_of_a_tensor(sac, train):
    """Logs do, and each of these runs writes one, at its end."""
    counts = []
    for steps in (60, 100):
        with Reads() as reads:
            seen = train(sac, "Counting-mixed-v0", steps, learning_starts=20)
        assert len(seen.updates) == steps - 20
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


# The buffer by itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_ring_by_itself(sac, chunk):
    buffer = sac.ReplayBuffer(5, obs_dim=2, action_dim=1)
    added = np.zeros((0, 7))
    for start in range(0, 8 * chunk, chunk):
        new = np.arange(start, start + chunk)[:, None] + np.arange(7) / 10
        buffer.add(new[:, :2], new[:, 2:3], new[:, 3], new[:, 4], new[:, 5:])
        added = np.concatenate([added, new])
        assert buffer.count == len(added)
        assert len(buffer) == min(5, len(added))
        stored = oldest_first(sac, buffer)
        rows = np.column_stack(stored)
        np.testing.assert_array_equal(rows, np.float32(added[-5:]))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.uint8])
def test_rows_are_float32_whatever_comes_in(sac, dtype):
    buffer = sac.ReplayBuffer(10, obs_dim=2, action_dim=1)
    numbers = np.random.default_rng(0).uniform(0, 99, (2, 6)).astype(dtype)
    obs, action, reward, next_obs = np.split(numbers, [2, 3, 4], axis=1)
    buffer.add(obs, action, reward[:, 0], np.array([True, False]), next_obs)
    batch = buffer[buffer.sample_index(6, torch.Generator().manual_seed(0))]
    assert {column.dtype for column in (buffer.rows, *batch)} == {torch.float32}
    expected = np.hstack([obs, action, reward, [[1], [0]], next_obs]).astype(np.float32)
    np.testing.assert_array_equal(np.column_stack(oldest_first(sac, buffer)), expected)


@pytest.mark.parametrize("added", [1, 25, 40, 41, 70])
class TestSamples:
    @pytest.fixture
    def drawn(self, sac, added):
        """400 samples for each of the filled rows of a buffer for 40."""
        buffer = sac.ReplayBuffer(40, obs_dim=2, action_dim=3)
        buffer.rows.fill_(torch.nan)  # so that an unfilled row shows
        shapes = [(1, 2), (1, 3), (1,), (1,), (1, 2)]
        scales = [1 / 3, -1, 1, 2, 1 / 7]
        for i in range(added):
            columns = [np.full(shape, scale * i) for shape, scale in zip(shapes, scales)]
            buffer.add(*columns)
        batch = buffer[buffer.sample_index(400 * len(buffer), torch.Generator().manual_seed(0))]
        return SimpleNamespace(batch=batch, shapes=shapes, scales=scales)

    def test_keep_together_what_was_stored_together(self, added, drawn):
        for column, shape, scale in zip(drawn.batch, drawn.shapes, drawn.scales):
            assert column.shape == (400 * min(added, 40), *shape[1:])
            numbers = column.numpy().T / scale
            expected = np.broadcast_to(drawn.batch.reward, numbers.shape)
            np.testing.assert_allclose(numbers, expected, rtol=1e-6)

    def test_are_uniform_over_the_filled_rows(self, added, drawn):
        values, counts = np.unique(drawn.batch.reward, return_counts=True)
        np.testing.assert_array_equal(values, np.arange(added)[-40:])
        freedom = len(values) - 1
        chi_square = ((counts - 400) ** 2 / 400).sum()
        assert abs(chi_square - freedom) <= 4 * np.sqrt(2 * freedom)  # four sigmas


def test_samples_follow_their_generator_alone(sac):
    buffer = sac.ReplayBuffer(1000, obs_dim=1, action_dim=1)
    column = np.arange(1000.0)
    buffer.add(column[:, None], column[:, None], column, column, column[:, None])
    generator = torch.Generator().manual_seed(3)
    first = buffer[buffer.sample_index(50, generator)].reward
    second = buffer[buffer.sample_index(50, generator)].reward
    torch.manual_seed(7)  # the global generator plays no part
    again = buffer[buffer.sample_index(50, torch.Generator().manual_seed(3))].reward
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
