"""Scanning does what a registration by hand does; decisions are the user's."""

import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc
from kfac.python.ops.tensormatch import graph_search as gs
from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.tests import graph_kinds
from kfac.tests.ops import tensormatch_cases as cases
from kfac.tests.ops.tensormatch_cases import (
    BATCH,
    add_loss,
    blocks,
    collection_of,
    data,
    ids,
    reason,
    scan,
    variable,
)

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph_fixture(request):
    if "kind" in request.fixturenames:
        yield
        return
    with tf.Graph().as_default() as graph:
        yield graph


# Models: each returns the output, the variables and a registration by hand.


def dense_model():
    x = data(None, 3)
    w, b, v = variable("w", 3, 4), variable("b", 4), variable("v", 4, 2)
    hidden = tf.matmul(x, w) + b
    activations = tf.tanh(hidden)
    output = tf.matmul(activations, v)

    def by_hand(collection):
        collection.register_fully_connected((w, b), x, hidden)
        collection.register_fully_connected(v, activations, output)

    return output, [w, b, v], by_hand


def convolution_model():
    x = data(None, 6, 6, 2)
    w, b, v = variable("w", 3, 3, 2, 3), variable("b", 3), variable("v", 2, 2, 3, 2)
    hidden = tf.nn.conv2d(x, w, 2, "SAME") + b
    activations = tf.nn.relu(hidden)
    output = tf.nn.conv2d(activations, v, 1, "VALID", dilations=2)

    def by_hand(collection):
        collection.register_conv2d((w, b), [1, 2, 2, 1], "SAME", x, hidden)
        collection.register_conv2d(
            v, [1, 1, 1, 1], "VALID", activations, output, dilations=[1, 2, 2, 1]
        )

    return output, [w, b, v], by_hand


def scale_model():
    x = data(None, 4, 3)
    s, t, u = variable("s", 3), variable("t", 3), variable("u", 4, 3)
    hidden = s * x + t
    output = tf.tanh(hidden) * u

    def by_hand(collection):
        collection.register_scale_and_shift((s, t), x, hidden)
        collection.register_scale_and_shift(u, output.op.inputs[0], output)

    return output, [s, t, u], by_hand


def embedding_model():
    x = ids(None)
    w, v = variable("w", 7, 3), variable("v", 3, 2)
    rows = tf.nn.embedding_lookup(w, x)
    outputs = graph_util.reduce_identity_ops(rows)
    output = tf.matmul(rows, v)

    def by_hand(collection):
        collection.register_fully_connected(v, outputs, output)
        collection.register_fully_connected(w, x, outputs, dense_inputs=False)

    return output, [w, v], by_hand


def recurrent_model():
    steps = [data(None, 3, seed=t) for t in range(3)]
    w, b, u = variable("w", 3, 4), variable("b", 4), variable("u", 4, 4)
    state = tf.zeros([tf.shape(steps[0])[0], 4])
    tensors = [[], [], [], []]
    for step in steps:
        inputs = tf.matmul(step, w) + b
        recurrent = tf.matmul(state, u)
        for column, tensor in zip(
            tensors, (step, inputs, state, recurrent), strict=True
        ):
            column.append(tensor)
        state = tf.tanh(inputs + recurrent)

    def by_hand(collection):
        collection.register_fully_connected_multi((w, b), tensors[0], tensors[1])
        collection.register_fully_connected_multi(u, tensors[2], tensors[3])

    return state, [w, b, u], by_hand


def folded_model():
    x = data(3 * BATCH, 3)
    w, v = variable("w", 3, 4), variable("v", 4, 2)
    hidden = tf.matmul(x, w)
    activations = tf.tanh(hidden)
    output = tf.matmul(activations, v)

    def by_hand(collection):
        collection.register_fully_connected_multi(v, activations, output, num_uses=3)
        collection.register_fully_connected_multi(w, x, hidden, num_uses=3)

    return output, [w, v], by_hand


def unmatched_model():
    x = data(None, 3)
    w, v = variable("w", 3, 2), variable("v", 2, 2)
    output = tf.matmul(tf.matmul(x, w), tf.sin(v))

    def by_hand(collection):
        collection.register_fully_connected(w, x, output.op.inputs[0])
        collection.register_generic(v, BATCH)

    return output, [w, v], by_hand


MODELS = [
    dense_model,
    convolution_model,
    scale_model,
    embedding_model,
    recurrent_model,
    folded_model,
    unmatched_model,
]


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("model", MODELS)
def test_scanning_equals_registration_by_hand(kind, model):
    def build():
        output, variables, by_hand = model()
        manual = collection_of(output)
        by_hand(manual)
        automatic = collection_of(output)
        automatic.auto_register_layers(variables, batch_size=BATCH)
        cases.assert_equal_collections(automatic, manual)
        assert list(blocks(automatic)) == list(blocks(manual)), "order of blocks"
        cases.check_uses(automatic, variables)
        return tf.constant(0)

    graph_kinds.Run(kind, build)()


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_every_kind_of_graph_is_scanned(kind):
    def build():
        output, variables, by_hand = dense_model()
        automatic, manual = collection_of(output), collection_of(output)
        by_hand(manual)
        gs.register_layers(automatic, variables)
        cases.assert_equal_collections(automatic, manual)
        cases.check_uses(automatic, variables)
        return tf.constant(0)

    graph_kinds.Run(kind, build)()


def test_reference_variables_are_found():
    x = data(None, 3)
    w = tf1.get_variable("w", [3, 4], use_resource=False)
    b = tf1.get_variable("b", [4], use_resource=False)
    collection = scan(tf.matmul(x, w) + b, [w, b])
    assert blocks(collection) == {"w,b": "FullyConnectedKFACBasicFB"}


def test_losses_in_a_branch_find_layers_outside_of_it():
    found = {}

    @tf.function(autograph=False)
    def step(x, flag):
        output = tf.matmul(x, w)

        def branch():
            scaled = tf.matmul(output, v)
            found.update(blocks(scan(scaled, [w, v])))
            return tf.reduce_sum(scaled)

        return tf.cond(flag, branch, lambda: 0.0)

    with tf.init_scope():
        w, v = tf.Variable(tf.ones([3, 4]), name="w"), tf.Variable(tf.ones([4, 2]))
    step.get_concrete_function(tf.TensorSpec([None, 3]), tf.TensorSpec([], tf.bool))
    assert len(found) == 2 and set(found.values()) == {"FullyConnectedKFACBasicFB"}


class TestEntry:
    def test_losses_must_be_registered_first(self):
        with pytest.raises(ValueError, match="[Nn]o loss"):
            gs.register_layers(lc.LayerCollection(), [variable("w", 3)])

    def test_the_new_blocks_are_returned(self):
        output, (w, b, v), _ = dense_model()
        collection = collection_of(output)
        collection.register_fully_connected(v, output.op.inputs[0], output)
        added = gs.register_layers(collection, [w, b, v])
        ((params, block),) = added.items()
        assert params[0] is w and params[1] is b
        assert block is collection.fisher_blocks[(w, b)]

    def test_only_variables_of_the_list_are_registered(self):
        output, (w, b, v), _ = dense_model()
        assert blocks(scan(output, [v])) == {"v": "FullyConnectedKFACBasicFB"}

    def test_something_else_than_a_variable_is_an_error(self):
        output, _, _ = dense_model()
        with pytest.raises(ValueError, match="variable"):
            scan(output, [output])

    def test_wrapped_variables_are_unwrapped(self):
        class Wrapper:
            def __init__(self, value):
                self.value = value

        output, variables, _ = dense_model()
        collection = scan(output, [Wrapper(v) for v in variables])
        assert len(blocks(collection)) == 2

    def test_losses_may_have_several_inputs(self):
        x, w = data(None, 3), variable("w", 3, 4)
        mean, log_scale = tf.split(tf.matmul(x, w), 2, axis=1)

        class Loss:
            inputs = (mean, tf.exp(log_scale))

        collection = collection_of(mean)
        collection._loss_dict["other"] = [Loss()]
        gs.register_layers(collection, [w])
        assert blocks(collection) == {"w": "FullyConnectedKFACBasicFB"}

    def test_what_the_losses_do_not_depend_on_is_not_matched(self):
        x, w, v = data(None, 3), variable("w", 3, 2), variable("v", 3, 2)
        output, _ = tf.matmul(x, w), tf.matmul(x, v)
        collection = scan(output, [w, v], batch_size=BATCH)
        assert blocks(collection)["v"] == "NaiveDiagonalFB"
        assert "do not depend" in reason(collection, v)

    def test_custom_gradients_do_not_stop_the_scan(self):
        x, w, v = data(None, 3), variable("w", 3, 4), variable("v", 4, 2)
        output = tf.matmul(tf.nn.silu(tf.matmul(x, w)), v)
        assert len(blocks(scan(output, [w, v]))) == 2

    def test_the_order_does_not_depend_on_the_order_of_the_list(self):
        output, variables, _ = dense_model()
        first, second = scan(output, variables), scan(output, variables[::-1])
        assert list(blocks(first)) == list(blocks(second)) == ["w,b", "v"]

    def test_one_subgraph_can_be_registered_by_itself(self):
        output, (w, b, v), _ = dense_model()
        collection = collection_of(output)
        gs.register_subgraph_layers(
            collection, [w, b, v], cases.subgraph(output), user_registered_variables={v}
        )
        assert list(blocks(collection)) == ["w,b"]


class TestTowers:
    def model(self, count, variables):
        w, b = variables
        return [tf.matmul(data(None, 3, seed=i), w) + b for i in range(count)]

    def test_towers_extend_the_blocks_of_the_first(self):
        w, b, v = variable("w", 3, 2), variable("b", 2), variable("v", 2)
        outputs = [y + tf.sin(v) for y in self.model(3, (w, b))]
        collection = lc.LayerCollection()
        for i, output in enumerate(outputs):
            add_loss(collection, output, "loss", reuse=i > 0)
        gs.register_layers(collection, [w, b, v], batch_size=BATCH)
        layer, generic = collection.get_blocks()
        assert layer.num_registered_towers == generic.num_registered_towers == 3
        expected = [y.op.inputs[0] for y in outputs]
        assert all(a is b for a, b in zip(layer._outputs, expected, strict=True))
        assert generic._batch_sizes == [BATCH] * 3
        cases.check_uses(collection, [w, b, v])

    def test_a_shared_layer_has_its_uses_in_every_tower(self):
        w = variable("w", 3, 3)
        collection = lc.LayerCollection()
        for tower in range(2):
            output = tf.matmul(tf.tanh(tf.matmul(data(None, 3, seed=tower), w)), w)
            add_loss(collection, output, "loss", reuse=tower > 0)
        gs.register_layers(collection, [w])
        (block,) = collection.get_blocks()
        assert [len(uses) for uses in block._inputs] == [2, 2]
        cases.check_uses(collection, [w])

    def test_all_losses_need_the_same_number_of_towers(self):
        outputs = self.model(3, (variable("w", 3, 2), variable("b", 2)))
        collection = collection_of(outputs[2], name="other")
        add_loss(collection, outputs[0], "loss")
        add_loss(collection, outputs[1], "loss", reuse=True)
        with pytest.raises(ValueError, match="towers"):
            gs.register_layers(collection, [])


class TestDecisions:
    """`w` is used with `b` in one place and with `c` in another."""

    def model(self):
        x = data(None, 3)
        w, b, c = variable("w", 3, 3), variable("b", 3), variable("c", 3)
        self.variables = [w, b, c]
        hidden = tf.tanh(tf.matmul(x, w) + b)
        return collection_of(tf.matmul(hidden, w) + c)

    def scan(self, *linked, approximation=None, batch_size=BATCH):
        collection = self.model()
        by_name = {v.op.name: v for v in self.variables}
        for group in linked:
            params = tuple(by_name[name] for name in group)
            collection.define_linked_parameters(params, approximation)
        gs.register_layers(collection, self.variables, batch_size=batch_size)
        return blocks(collection)

    def test_undecided_it_is_ambiguous(self):
        with pytest.raises(gs.AmbiguousRegistrationError, match="w:0, b:0.*w:0, c:0"):
            self.scan()

    def test_linking_the_weights_alone_makes_the_biases_generic(self):
        assert self.scan(("w",)) == {
            "w": "FullyConnectedMultiIndepFB",
            "b": "NaiveDiagonalFB",
            "c": "NaiveDiagonalFB",
        }

    def test_linking_one_layer_leaves_the_other_bias_generic(self):
        assert self.scan(("w", "c")) == {
            "w,c": "FullyConnectedKFACBasicFB",
            "b": "NaiveDiagonalFB",
        }

    def test_linking_a_bias_does_not_decide(self):
        # It removes (w, b), so that the first use of w is one without bias.
        with pytest.raises(gs.AmbiguousRegistrationError, match="w:0 .*w:0, c:0"):
            self.scan(("b",))

    def test_a_user_registration_decides(self):
        collection = self.model()
        w, b, c = self.variables
        collection.register_generic(w, BATCH)
        gs.register_layers(collection, self.variables, batch_size=BATCH)
        assert set(blocks(collection).values()) == {"NaiveDiagonalFB"}


class TestLinking:
    def test_a_group_that_no_layer_has_is_an_error(self):
        output, (w, b, v), _ = dense_model()
        collection = collection_of(output)
        collection.define_linked_parameters((b, v))
        with pytest.raises(ValueError) as info:
            gs.register_layers(collection, [w, b, v], batch_size=BATCH)
        message = str(info.value)
        assert "in linked group" in message and "was not matched" in message
        (group,) = collection.linked_parameters
        assert str(group) in message

    def test_a_linked_layer_gets_its_approximation(self):
        output, (w, b, v), _ = dense_model()
        collection = collection_of(output)
        collection.define_linked_parameters((b, w), "diagonal")
        gs.register_layers(collection, [w, b, v])
        assert blocks(collection)["w,b"] == "FullyConnectedDiagonalFB"

    def test_a_linked_single_variable_may_be_generic(self):
        output, (w, v), _ = unmatched_model()
        collection = collection_of(output)
        collection.define_linked_parameters(v, "full")
        gs.register_layers(collection, [w, v], batch_size=BATCH)
        assert blocks(collection)["v"] == "NaiveFullFB"

    def test_linked_parameters_of_a_batch_norm_are_one_group(self):
        x, s, t = data(None, 3), variable("s", 3), variable("t", 3)
        mean, variance = tf.nn.moments(x, [0])
        output = tf.nn.batch_normalization(x, mean, variance, t, s, 1e-3)
        collection = collection_of(output)
        collection.define_linked_parameters((s, t), "diagonal")
        gs.register_layers(collection, [s, t])
        assert blocks(collection) == {"s,t": "ScaleAndShiftDiagonalFB"}


class TestLeftOvers:
    def test_without_batch_size_they_are_the_user_s_decision(self):
        output, (w, v), _ = unmatched_model()
        collection = collection_of(output)
        with pytest.raises(gs.AmbiguousRegistrationError, match="'v:0'.*Sin"):
            gs.register_layers(collection, [w, v])
        assert blocks(collection) == {}, "nothing is registered half-way"

    def test_with_it_they_become_generic_for_a_reason(self):
        output, (w, v), _ = unmatched_model()
        collection = scan(output, [w, v], batch_size=BATCH)
        assert "Sin" in reason(collection, v)
        assert w.ref() not in collection.generic_reasons

    def test_the_batch_size_may_be_unknown_statically(self):
        output, (w, v), _ = unmatched_model()
        size = tf.shape(output)[0]
        collection = scan(output, [w, v], batch_size=size)
        assert collection.fisher_blocks[v]._batch_sizes == [size]

    def test_user_registered_variables_are_none(self):
        output, (w, v), _ = unmatched_model()
        collection = collection_of(output)
        collection.register_generic(v, BATCH)
        assert len(gs.register_layers(collection, [w, v])) == 1
