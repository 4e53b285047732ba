import collections

import pytest
import tensorflow as tf

from kfac.python.ops import op_queue

tf1 = tf.compat.v1
Op = collections.namedtuple("Op", "name")
OPS = [Op(name) for name in "hgfedcba"]
N = len(OPS)


def _names(queue, count, sess=None):
    return [queue.next_op(sess).name for _ in range(count)]


def _chunks(names):
    return [names[i : i + N] for i in range(0, len(names), N)]


def test_every_pass_is_a_new_permutation():
    passes = _chunks(_names(op_queue.OpQueue(OPS, seed=1), 6 * N))
    assert all(sorted(chunk) == list("abcdefgh") for chunk in passes)
    # Six equal shuffles of eight ops by chance: one in 8!^5.
    assert len({tuple(chunk) for chunk in passes}) > 1


def test_the_order_depends_on_names_and_seed_not_on_the_order_given():
    first = _names(op_queue.OpQueue(OPS, seed=1), 3 * N)
    assert first == _names(op_queue.OpQueue(OPS[::-1], seed=1), 3 * N)
    assert first != _names(op_queue.OpQueue(OPS, seed=2), 3 * N)


def test_without_a_seed_queues_differ():
    assert _names(op_queue.OpQueue(OPS), 3 * N) != _names(op_queue.OpQueue(OPS), 3 * N)


def test_the_graphs_seed_is_the_default():
    with tf.Graph().as_default():
        tf1.set_random_seed(1)
        seeded = _names(op_queue.OpQueue(OPS), N)
    assert seeded == _names(op_queue.OpQueue(OPS, seed=1), N)


def test_draws_return_the_ops_themselves_in_a_finalized_graph():
    with tf.Graph().as_default() as graph:
        ops = [tf.no_op(name="a"), tf.constant(1, name="b")]
        queue = op_queue.OpQueue({op.name: op for op in ops}.values(), seed=0)
        graph.finalize()
        with tf1.Session() as session:
            drawn = [queue.next_op(session) for _ in range(2)]
    assert {id(op) for op in drawn} == {id(op) for op in ops}
    assert [a is b for a, b in zip(queue.ops, ops, strict=True)] == [True, True]


def test_each_session_has_its_own_position():
    queue = op_queue.OpQueue(OPS, seed=1)
    with tf.Graph().as_default(), tf1.Session() as first, tf1.Session() as second:
        started = _names(queue, 3, first)
        assert _names(queue, N, second) == started + _names(queue, N - 3, first)
    # No session: the queue's own position, untouched so far.
    assert _names(queue, 3) == started


def test_workers_share_an_order_but_start_apart():
    workers = [
        op_queue.OpQueue(OPS, seed=1, worker_index=i, num_workers=4) for i in range(4)
    ]
    drawn = list(zip(*[_names(worker, 2 * N) for worker in workers], strict=True))
    assert all(len(set(at_once)) == 4 for at_once in drawn)


def test_functions_can_be_queued():
    def update():
        return 3

    assert op_queue.OpQueue([update]).next_op()() == 3


def test_one_op_given_twice_is_one_op():
    queue = op_queue.OpQueue([OPS[0], OPS[1], OPS[0]])
    assert list(queue.ops) == OPS[:2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ops": (op for op in OPS)}, TypeError, "sized collection"),
        ({"ops": []}, ValueError, "at least one"),
        ({"ops": [Op("a"), Op("b"), [Op("a")][0]._replace()]}, ValueError, "named 'a'"),
        ({"ops": OPS, "worker_index": 2, "num_workers": 2}, ValueError, "worker_index"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        op_queue.OpQueue(**arguments)
