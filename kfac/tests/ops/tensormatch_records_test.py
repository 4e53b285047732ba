"""Records made from matches, and which of them are kept."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.layer_collection.parameters_dict import IdentityDict
from kfac.python.ops.tensormatch import graph_matcher as gm
from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch import graph_search as gs
from kfac.tests import graph_kinds

tf1 = tf.compat.v1
FC, SCALE = gs.RecordType.fully_connected, gs.RecordType.scale_and_shift


@pytest.fixture(autouse=True)
def graph_fixture(request):
    if "in_functions" in request.node.name:
        yield
        return
    with tf.Graph().as_default():
        yield


def placeholder(shape=(5, 3), dtype=tf.float32):
    return tf1.placeholder(dtype, shape)


def variable(name, shape=(3, 4), use_resource=True):
    return tf1.get_variable(name, shape, use_resource=use_resource)


def tensor_of(v):
    return v.handle if hasattr(v, "handle") else v.op.outputs[0]


def record(make, pattern, node, known):
    bindings, consumed = gm.matcher_with_consumed(pattern)(node)
    result = make(bindings, consumed, {tensor_of(v): v for v in known})
    assert result is None or result.tensor_set == consumed
    return result


def affine(node, *known):
    return record(gs.record_affine_from_bindings, gp.Affine, node, known)


def embed(node, *known):
    return record(gs.record_affine_from_bindings, gp.Embed, node, known)


def scale_and_shift(node, *known):
    make = gs.record_scale_and_shift_from_bindings
    return record(make, gp.ScaleAndShift, node, known)


class TestTypes:
    def test_record_types_have_the_documented_values(self):
        names = ["fully_connected", "conv2d", "scale_and_shift", "batch_norm"]
        assert [gs.RecordType[name].value for name in names] == [1, 2, 3, 4]

    def test_ambiguity_is_an_exception_of_its_own(self):
        assert gs.AmbiguousRegistrationError.__bases__ == (Exception,)

    def test_a_record_holds_what_it_is_given_and_a_fresh_dict(self):
        first = gs.MatchRecord(FC, "w", {1})
        second = gs.MatchRecord(FC, "w", {1})
        assert (first.record_type, first.params, first.tensor_set) == (FC, "w", {1})
        assert first.data == {} and first.data is not second.data
        assert first != second and len({first, second}) == 2
        assert gs.MatchRecord(FC, "w", {1}, {"a": 2}).data == {"a": 2}

    def test_ensure_sequence(self):
        assert gs.ensure_sequence([1]) == [1]
        assert gs.ensure_sequence((1, 2)) == (1, 2)
        assert gs.ensure_sequence(1) == (1,)


class TestAffine:
    @pytest.mark.parametrize("use_resource", [True, False])
    def test_weights_and_bias(self, use_resource):
        x = placeholder()
        w = variable("w", use_resource=use_resource)
        b = variable("b", [4], use_resource)
        y = tf.matmul(x, w) + b
        result = affine(y, w, b)
        assert result.record_type is FC
        assert result.params[0] is w and result.params[1] is b
        assert result.data == {"inputs": x, "outputs": y, "dense_inputs": True}

    def test_an_unknown_bias_leaves_the_weights_with_the_sum_as_output(self):
        w, b = variable("w"), variable("b", [4])
        y = tf.matmul(placeholder(), w) + b
        result = affine(y, w)
        assert result.params is w and result.data["outputs"] is y

    def test_a_bias_that_is_not_one_entry_per_output_is_left_out(self):
        w, b = variable("w"), variable("b", [5, 4])
        result = affine(tf.matmul(placeholder(), w) + b, w, b)
        assert result.params is w

    def test_no_known_parameter_no_record(self):
        y = tf.matmul(placeholder(), variable("w")) + variable("b", [4])
        assert affine(y) is None

    def test_a_bias_without_its_weights_is_an_error(self):
        b = variable("b", [4])
        y = tf.matmul(placeholder(), variable("w")) + b
        with pytest.raises(ValueError, match="bias"):
            affine(y, b)

    def test_inputs_of_rank_3(self):
        x, w = placeholder([2, 5, 3]), variable("w")
        result = affine(tf.matmul(x, w), w)
        assert result.record_type is FC and result.data["inputs"] is x

    def test_inputs_of_rank_4_are_an_error(self):
        w = variable("w")
        with pytest.raises(ValueError, match="rank 4"):
            affine(tf.matmul(placeholder([2, 2, 5, 3]), w), w)

    @pytest.mark.parametrize(
        "product",
        [
            lambda w: tf.matmul(placeholder([5, 4]), w, transpose_b=True),
            lambda w: tf.matmul(placeholder([3, 5]), w, transpose_a=True),
            lambda w: tf.matmul(placeholder([2, 5, 4]), w, adjoint_b=True),
            lambda w: tf.matmul(placeholder([2, 3, 5]), w, adjoint_a=True),
        ],
    )
    def test_transposed_products_are_an_error(self, product):
        w = variable("w")
        with pytest.raises(ValueError, match="transpose"):
            affine(product(w), w)

    def test_another_linear_operation_is_an_error(self):
        x, w = placeholder(), variable("w")
        y = tf.matmul(x, w)
        bindings = {"in": x, "weights": w.handle, "linear_op": x.op}
        bindings["pre_activations"] = y
        with pytest.raises(ValueError, match="Placeholder"):
            gs.record_affine_from_bindings(bindings, set(), {w.handle: w})

    def test_convolution(self):
        x, w = placeholder([2, 8, 8, 3]), variable("w", [3, 3, 3, 4])
        b = variable("b", [4])
        y = tf.nn.conv2d(x, w, [1, 2, 2, 1], "SAME") + b
        result = affine(y, w, b)
        assert result.record_type is gs.RecordType.conv2d
        assert result.data == {
            "inputs": x,
            "outputs": y,
            "strides": (1, 2, 2, 1),
            "padding": "SAME",
            "data_format": "NHWC",
        }

    def test_dilations_are_recorded(self):
        w = variable("w", [3, 3, 3, 4])
        y = tf.nn.conv2d(placeholder([2, 8, 8, 3]), w, 1, "VALID", dilations=[2, 1])
        assert affine(y, w).data["dilations"] == (1, 2, 1, 1)

    def test_captured_variables_are_found_in_functions(self):
        def build():
            v = graph_kinds.variable(np.ones((3, 4), np.float32), "v")
            y = tf.matmul(tf.exp(tf.ones([2, 3])), v)
            bindings, consumed = gm.matcher_with_consumed(gp.Affine)(y)
            known = IdentityDict([(bindings["weights"], v)])
            result = gs.record_affine_from_bindings(bindings, consumed, known)
            assert result.params is v and result.data["outputs"] is y
            return y

        graph_kinds.Run(graph_kinds.FUNCTION, build)()


class TestEmbed:
    @pytest.mark.parametrize(
        "lookup",
        [
            lambda w, ids: tf.raw_ops.GatherV2(params=w, indices=ids, axis=0),
            lambda w, ids: tf.raw_ops.Gather(params=w, indices=ids),
            lambda w, ids: tf.raw_ops.ResourceGather(
                resource=w.handle, indices=ids, dtype=tf.float32
            ),
        ],
    )
    @pytest.mark.parametrize("shape", [[5], [2, 5]])
    def test_lookups_are_dense_layers_with_ids(self, lookup, shape):
        w, ids = variable("w", [7, 3]), placeholder(shape, tf.int32)
        y = lookup(w, ids)
        result = embed(y, w)
        assert result.record_type is FC and result.params is w
        assert result.data == {"inputs": ids, "outputs": y, "dense_inputs": False}

    def test_ids_of_rank_3_are_an_error(self):
        w = variable("w", [7, 3])
        ids = placeholder([2, 3, 5], tf.int32)
        y = tf.raw_ops.GatherV2(params=w, indices=ids, axis=0)
        with pytest.raises(ValueError, match="rank 3"):
            embed(y, w)


class TestScaleAndShift:
    def test_scale_and_shift(self):
        x, s, t = placeholder(), variable("s", [3]), variable("t", [3])
        y = x * s + t
        result = scale_and_shift(y, s, t)
        assert result.record_type is SCALE
        assert result.params[0] is s and result.params[1] is t
        assert result.data == {"inputs": x, "outputs": y}

    def test_scale_alone(self):
        s, t = variable("s", [3]), variable("t", [3])
        assert scale_and_shift(placeholder() * s + t, s).params is s
        assert scale_and_shift(placeholder() * s, s).params is s

    def test_nothing_known(self):
        assert scale_and_shift(placeholder() * variable("s", [3])) is None

    def test_a_shift_without_its_scale_is_an_error(self):
        t = variable("t", [3])
        with pytest.raises(ValueError, match="shift"):
            scale_and_shift(placeholder() * variable("s", [3]) + t, t)


class TestBatchNorm:
    @pytest.mark.parametrize("known", [("s", "o"), ("s",), ("o",), ()])
    def test_scale_and_offset_may_be_known_separately(self, known):
        x, s, o = placeholder([2, 4, 4, 3]), variable("s", [3]), variable("o", [3])
        y, _, _ = tf1.nn.fused_batch_norm(x, s, o, is_training=True)
        chosen = [v for v in (s, o) if v.op.name in known]
        make = gs.record_batch_norm_from_bindings
        result = record(make, gp.FusedBatchNormOutput, y, chosen)
        if not known:
            assert result is None
            return
        assert result.record_type is gs.RecordType.batch_norm
        assert result.data == {"inputs": x, "outputs": y}
        params = gs.ensure_sequence(result.params)
        assert all(a is b for a, b in zip(params, chosen, strict=True))
        assert isinstance(result.params, tuple) == (len(known) == 2)


class Collection:
    """What filters ask of a collection."""

    def __init__(self, *linked):
        self.linked_parameters = {frozenset(group): None for group in linked}


def fc(params, tensors):
    return gs.MatchRecord(FC, params, set(tensors))


class TestFilters:
    def test_user_registered_variables_take_their_groups_with_them(self):
        kept, other = fc("v", [1]), fc(("w", "b"), [2])
        records = {"v": [kept], ("w", "b"): [other], "b": [fc("b", [3])]}
        assert gs.filter_user_registered_records(records, {"b"}) == {"v": [kept]}
        assert gs.filter_user_registered_records(records, set()) == records

    def test_groups_that_overlap_a_linked_one_without_being_equal_are_dropped(self):
        group, alone, other = fc(("w", "b"), [1]), fc("w", [2]), fc("v", [3])
        records = {("w", "b"): [group], "w": [alone], "v": [other]}
        kept = gs.filter_grouped_variable_records(Collection(["b", "w"]), records)
        assert kept == {("w", "b"): [group], "v": [other]}
        kept = gs.filter_grouped_variable_records(Collection(["w"]), records)
        assert kept == {"w": [alone], "v": [other]}
        kept = gs.filter_grouped_variable_records(Collection(["b"], ["v"]), records)
        assert kept == {"w": [alone], "v": [other]}

    def test_parts_of_larger_records_are_dropped(self):
        small, large = fc("w", [1, 2]), fc(("w", "b"), [1, 2, 3])
        records = {"w": [small], ("w", "b"): [large]}
        assert gs.filter_subgraph_records(records) == {("w", "b"): [large]}

    def test_equal_sets_and_other_variables_do_not_count(self):
        first, second = fc("w", [1, 2]), fc(("w", "b"), [1, 2])
        unrelated = fc("v", [1])
        records = {"w": [first], ("w", "b"): [second], "v": [unrelated]}
        assert gs.filter_subgraph_records(records) == records

    def test_the_order_of_uses_is_kept(self):
        uses = [fc("w", [10 * t, 10 * t + 1]) for t in range(5)]
        part = fc("w", [20])
        kept = gs.filter_subgraph_records({"w": [*uses[:3], part, *uses[3:]]})
        assert kept == {"w": uses}

    def test_many_uses_take_linear_time(self):
        count = 3000  # All pairs would be 4.5 million comparisons of sets.
        tensors = [[f"in{t}", f"w{t}", f"out{t}"] for t in range(count)]
        inner = [fc("w", t) for t in tensors]
        outer = [fc(("w", "b"), [*t, f"sum{i}"]) for i, t in enumerate(tensors)]
        kept = gs.filter_subgraph_records({"w": inner, ("w", "b"): outer})
        assert kept == {("w", "b"): outer}

    def test_filters_leave_their_argument_alone(self):
        records = {"w": [fc("w", [1])], ("w", "b"): [fc(("w", "b"), [1, 2])]}
        before = {key: list(value) for key, value in records.items()}
        gs.filter_records(Collection(), records, {"w"})
        gs.filter_subgraph_records(records)["v"] = []
        assert records == before

    def test_removed_records_suppress_nothing(self):
        # (w, b) contains w, but linking w removes it first.
        alone, group = fc("w", [1]), fc(("w", "b"), [1, 2])
        records = {"w": [alone], ("w", "b"): [group]}
        assert gs.filter_records(Collection(["w"]), records, set()) == {"w": [alone]}
        assert gs.filter_records(Collection(), records, {"b"}) == {"w": [alone]}

    def test_a_variable_in_two_remaining_groups_is_ambiguous(self):
        records = {
            ("w", "b"): [fc(("w", "b"), [1, 2])],
            ("w", "c"): [fc(("w", "c"), [3, 4])],
        }
        with pytest.raises(gs.AmbiguousRegistrationError) as info:
            gs.filter_records(Collection(), records, set())
        assert "w is used in the layers (w, b) and (w, c)" in str(info.value)

    def test_variables_count_by_identity_in_functions(self):
        def build():
            v = graph_kinds.variable(np.ones(3, np.float32), "v")
            w = graph_kinds.variable(np.ones(3, np.float32), "w")
            first, second = fc(v, [1]), fc((v, w), [1, 2])
            records = IdentityDict([(v, [first]), ((v, w), [second])])
            kept = gs.filter_records(Collection(), records, [])
            assert list(kept.values()) == [[second]]
            kept = gs.filter_user_registered_records(records, [w])
            assert list(kept.values()) == [[first]]
            return tf.constant(0)

        graph_kinds.Run(graph_kinds.FUNCTION, build)()
