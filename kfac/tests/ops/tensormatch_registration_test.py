"""Which method of the collection a record becomes a call of."""

import pytest
import tensorflow as tf

from kfac.python.ops.tensormatch import graph_search as gs

tf1 = tf.compat.v1
Type = gs.RecordType
CONV = {"strides": (1, 2, 2, 1), "padding": "SAME", "data_format": "NHWC"}


@pytest.fixture(autouse=True)
def graph_fixture():
    with tf.Graph().as_default():
        yield


class Recorder:
    """Stands for a collection and writes down what is registered."""

    def __init__(self, linked=None, default_generic_approximation="diagonal"):
        self.calls = []
        self.generic_reasons = {}
        self.default_generic_approximation = default_generic_approximation
        self._linked = linked

    def _get_linked_approx(self, params):
        return self._linked

    def __getattr__(self, name):
        if not name.startswith("register_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def tensor(*shape, dtype=tf.float32):
    return tf1.placeholder(dtype, shape)


def variable(name, shape=(3, 4)):
    return tf1.get_variable(name, shape, use_resource=True)


def dense(inputs, outputs, dense_inputs=True, params=None):
    data = {"inputs": inputs, "outputs": outputs, "dense_inputs": dense_inputs}
    return gs.MatchRecord(Type.fully_connected, params, set(), data)


def conv(inputs, outputs, kind=Type.conv2d, **data):
    data = {"inputs": inputs, "outputs": outputs, **CONV, **data}
    return gs.MatchRecord(kind, None, set(), data)


def register(params, *records, reuse=False, batch_size=None, collection=None):
    """The only call that the records of one group lead to."""
    collection = collection or Recorder()
    for record in records:
        record.params = params
    gs.register_records(collection, {params: list(records)}, reuse, batch_size)
    (call,) = collection.calls
    assert call[2].pop("reuse") == reuse
    return call


class TestDense:
    def test_one_use(self):
        w, x, y = variable("w"), tensor(5, 3), tensor(5, 4)
        name, args, options = register(w, dense(x, y), reuse=True)
        assert name == "register_fully_connected" and args == (w, x, y)
        assert options == {"dense_inputs": True, "approx": None}

    def test_several_uses_are_tuples_in_the_order_of_records(self):
        w = variable("w")
        xs, ys = [[tensor(5, n) for _ in range(3)] for n in (3, 4)]
        records = [dense(x, y) for x, y in zip(xs, ys, strict=True)]
        name, args, options = register(w, *records)
        assert name == "register_fully_connected_multi"
        assert args == (w, tuple(xs), tuple(ys)) and "num_uses" not in options

    def test_uses_folded_into_the_batch(self):
        w, x, y = variable("w"), tensor(15, 3), tensor(15, 4)
        name, args, options = register(w, dense(x, y), batch_size=5)
        assert name == "register_fully_connected_multi" and args == (w, x, y)
        assert options == {"num_uses": 3, "dense_inputs": True, "approx": None}

    @pytest.mark.parametrize(("size", "batch_size"), [(15, None), (None, 5), (15, 15)])
    def test_without_evidence_nothing_is_folded(self, size, batch_size):
        w, x, y = variable("w"), tensor(size, 3), tensor(size, 4)
        name, _, _ = register(w, dense(x, y), batch_size=batch_size)
        assert name == "register_fully_connected"

    def test_rows_must_divide_into_the_batch(self):
        w, x, y = variable("w"), tensor(16, 3), tensor(16, 4)
        with pytest.raises(ValueError, match="16 rows.* 5"):
            register(w, dense(x, y), batch_size=5)

    def test_rank_3_has_the_uses_on_the_first_axis(self):
        w, x, y = variable("w"), tensor(7, 5, 3), tensor(7, 5, 4)
        name, args, options = register(w, dense(x, y))
        assert name == "register_fully_connected_multi" and args == (w, x, y)
        assert options["num_uses"] == 7 and "batch_major" not in options

    def test_several_sequences_must_have_the_cases_first(self):
        w = variable("w")
        records = [dense(tensor(7, None, 3), tensor(7, None, 4)) for _ in range(2)]
        with pytest.raises(ValueError, match="first axis"):
            register(w, *records)
        records = [dense(tensor(None, 7, 3), tensor(None, 7, 4)) for _ in range(2)]
        _, _, options = register(w, *records)
        assert options["num_uses"] == 14 and options["batch_major"]

    def test_groups_are_passed_as_tuples(self):
        w, b = variable("w"), variable("b", [4])
        _, args, _ = register((w, b), dense(tensor(5, 3), tensor(5, 4)))
        assert args[0] == (w, b)


class TestIds:
    @pytest.mark.parametrize("linked", [None, "kron_both_diag"])
    def test_one_lookup_is_single_use_with_that_table_s_approximation(self, linked):
        w, ids, y = variable("w"), tensor(5, dtype=tf.int32), tensor(5, 4)
        collection = Recorder(linked)
        name, args, options = register(w, dense(ids, y, False), collection=collection)
        assert name == "register_fully_connected" and args == (w, ids, y)
        approx = None if linked else "kron_in_diag"
        assert options == {"dense_inputs": False, "approx": approx}

    @pytest.mark.parametrize("linked", [None, "kron_indep_both_diag"])
    def test_several_lookups_use_the_other_table(self, linked):
        w = variable("w")
        records = [
            dense(tensor(5, dtype=tf.int32), tensor(5, 4), False) for _ in range(2)
        ]
        name, _, options = register(w, *records, collection=Recorder(linked))
        assert name == "register_fully_connected_multi"
        approx = None if linked else "kron_indep_in_diag"
        assert options == {"dense_inputs": False, "approx": approx}

    def test_rank_2_ids_have_the_uses_on_the_first_axis(self):
        w, ids, y = variable("w"), tensor(7, 5, dtype=tf.int32), tensor(7, 5, 4)
        name, _, options = register(w, dense(ids, y, False), batch_size=5)
        assert name == "register_fully_connected_multi" and options["num_uses"] == 7

    def test_a_table_cannot_be_a_matrix_too(self):
        w = variable("w")
        lookup = dense(tensor(5, dtype=tf.int32), tensor(5, 4), False)
        with pytest.raises(ValueError, match="table"):
            register(w, lookup, dense(tensor(5, 3), tensor(5, 4)))


class TestConvolutions:
    def test_one_use(self):
        w, x, y = variable("w", [3, 3, 2, 4]), tensor(5, 8, 8, 2), tensor(5, 4, 4, 4)
        name, args, options = register(w, conv(x, y), batch_size=5)
        assert name == "register_conv2d"
        assert args == (w, (1, 2, 2, 1), "SAME", x, y)
        assert options == {"data_format": "NHWC"}

    def test_folded_uses(self):
        w, x, y = variable("w", [3, 3, 2, 4]), tensor(15, 8, 8, 2), tensor(15, 4, 4, 4)
        name, args, options = register(w, conv(x, y), batch_size=5)
        assert name == "register_conv2d_multi"
        assert args == (w, (1, 2, 2, 1), "SAME", x, y)
        assert options == {"data_format": "NHWC", "num_uses": 3}

    def test_images_must_divide_into_the_batch(self):
        w, x, y = variable("w", [3, 3, 2, 4]), tensor(16, 8, 8, 2), tensor(16, 4, 4, 4)
        with pytest.raises(ValueError, match="divide"):
            register(w, conv(x, y), batch_size=5)

    def test_several_uses(self):
        w = variable("w", [3, 3, 2, 4])
        xs, ys = [[tensor(5, 8, 8, n) for _ in range(2)] for n in (2, 4)]
        records = [conv(x, y) for x, y in zip(xs, ys, strict=True)]
        name, args, options = register(w, *records)
        assert name == "register_conv2d_multi"
        assert args == (w, (1, 2, 2, 1), "SAME", tuple(xs), tuple(ys))
        assert options == {"data_format": "NHWC"}

    def test_uses_with_different_strides_are_an_error(self):
        w = variable("w", [3, 3, 2, 4])
        first = conv(tensor(5, 8, 8, 2), tensor(5, 4, 4, 4))
        second = conv(tensor(5, 8, 8, 2), tensor(5, 8, 8, 4), strides=(1, 1, 1, 1))
        with pytest.raises(ValueError, match="different strides"):
            register(w, first, second)

    def test_inputs_of_rank_5_are_an_error(self):
        w = variable("w", [3, 3, 2, 4])
        with pytest.raises(ValueError, match="rank 5"):
            register(w, conv(tensor(2, 5, 8, 8, 2), tensor(2, 5, 8, 8, 4)))

    def test_dilations_are_passed_on(self):
        w = variable("w", [3, 3, 2, 4])
        record = conv(tensor(5, 8, 8, 2), tensor(5, 4, 4, 4), dilations=(1, 2, 2, 1))
        assert register(w, record)[2]["dilations"] == (1, 2, 2, 1)

    def test_1d(self):
        w, x, y = variable("w", [3, 2, 4]), tensor(5, 8, 2), tensor(5, 4, 4)
        record = conv(x, y, Type.conv1d, strides=(1, 2, 1), dilations=(1, 3, 1))
        name, args, options = register(w, record)
        assert name == "register_conv1d" and args == (w, (1, 2, 1), "SAME", x, y)
        assert options == {"dilations": (1, 3, 1)}

    def test_3d_has_spatial_strides(self):
        w, x, y = variable("w", [3, 3, 3, 2, 4]), tensor(5, 8, 8, 8, 2), tensor()
        record = conv(x, y, Type.convolution, strides=(1, 1, 2, 3, 1))
        name, args, options = register(w, record)
        assert name == "register_convolution" and args == (w, x, y, "SAME")
        assert options == {"strides": (1, 2, 3)}

    def test_depthwise(self):
        w, x, y = variable("w", [3, 3, 2, 4]), tensor(5, 8, 8, 2), tensor()
        record = conv(x, y, Type.depthwise_conv2d, dilations=(2, 2))
        name, args, options = register(w, record)
        assert name == "register_depthwise_conv2d"
        assert args == (w, x, y, (1, 2, 2, 1), "SAME") and options == {"rate": (2, 2)}

    @pytest.mark.parametrize(
        "kind", [Type.conv1d, Type.convolution, Type.depthwise_conv2d]
    )
    def test_only_2d_ones_can_be_used_several_times(self, kind):
        records = [conv(tensor(5, 8, 2), tensor(), kind) for _ in range(2)]
        with pytest.raises(ValueError, match="2 times"):
            register(variable("w"), *records)
        with pytest.raises(ValueError, match="3 times"):
            register(
                variable("v"), conv(tensor(15, 8, 2), tensor(), kind), batch_size=5
            )


class TestOtherKinds:
    def test_scale_and_shift(self):
        s, x, y = variable("s", [3]), tensor(5, 3), tensor(5, 3)
        record = gs.MatchRecord(
            Type.scale_and_shift, s, set(), {"inputs": x, "outputs": y}
        )
        name, args, options = register(s, record)
        assert name == "register_scale_and_shift" and args == (s, x, y)
        assert options == {}

    def test_scale_and_shift_cannot_be_used_twice(self):
        s = variable("s", [3])
        records = [
            gs.MatchRecord(
                Type.scale_and_shift,
                s,
                set(),
                {"inputs": tensor(5, 3), "outputs": tensor(5, 3)},
            )
            for _ in range(2)
        ]
        with pytest.raises(ValueError, match="2 tensors"):
            register(s, *records)

    def batch_norm(self, *params):
        return gs.MatchRecord(Type.batch_norm, params, set(), {})

    def test_batch_norm_is_generic_parameter_by_parameter(self):
        s, o, collection = variable("s", [3]), variable("o", [3]), Recorder()
        records = {(s, o): [self.batch_norm(s, o)]}
        gs.register_records(collection, records, batch_size=5)
        assert collection.calls == [
            ("register_generic", (param, 5), {"reuse": False}) for param in (s, o)
        ]
        assert {ref.deref().name for ref in collection.generic_reasons} == {
            "s:0",
            "o:0",
        }

    @pytest.mark.parametrize(
        "collection",
        [Recorder("full"), Recorder(None, "full")],
        ids=["linked", "default"],
    )
    def test_batch_norm_is_one_group_for_other_approximations(self, collection):
        params = variable("s", [3]), variable("o", [3])
        records = {params: [self.batch_norm(*params)]}
        gs.register_records(collection, records, reuse=True, batch_size=5)
        assert collection.calls == [("register_generic", (params, 5), {"reuse": True})]

    def test_batch_norm_needs_the_batch_size(self):
        s = variable("s", [3])
        with pytest.raises(gs.AmbiguousRegistrationError, match="batch_size"):
            register(s, self.batch_norm(s))

    def test_inputs_may_be_made_on_demand(self):
        s, x, made = variable("s", [3]), tensor(5, 3), []

        def make():
            made.append(x)
            return x

        data = {"inputs": make, "outputs": tensor(5, 3)}
        record = gs.MatchRecord(Type.scale_and_shift, s, set(), data)
        assert register(s, record)[1][1] is x
        assert record.inputs is x and len(made) == 1


class TestSeveralGroups:
    def test_tuples_come_first_then_names_decide(self):
        names = ["b", "a", "c"]
        singles = {name: variable(name) for name in names}
        pairs = {
            name: (variable(f"w{name}"), variable(f"x{name}", [4])) for name in names
        }
        groups = [*singles.values(), *pairs.values()]
        records = {group: [dense(tensor(5, 3), tensor(5, 4))] for group in groups}
        for group, (record,) in records.items():
            record.params = group
        collection = Recorder()
        gs.register_records(collection, records)
        order = [args[0] for _, args, _ in collection.calls]
        expected = [pairs[name] for name in "abc"] + [singles[name] for name in "abc"]
        assert order == expected

    def test_mixed_types_are_reported_before_anything_is_registered(self):
        good, bad = variable("good"), variable("bad", [3])
        scale = {"inputs": tensor(5, 3), "outputs": tensor(5, 3)}
        records = {
            good: [dense(tensor(5, 3), tensor(5, 4), params=good)],
            bad: [
                dense(tensor(5, 3), tensor(5, 4), params=bad),
                gs.MatchRecord(Type.scale_and_shift, bad, set(), scale),
            ],
        }
        collection = Recorder()
        with pytest.raises(ValueError, match="mixed record types") as info:
            gs.register_records(collection, records)
        assert collection.calls == []
        assert "bad:0" in str(info.value) and "good" not in str(info.value)
        assert "fully_connected" in str(info.value)

    def test_all_problems_are_in_one_message(self):
        names = ["v", "w"]
        records = {
            variable(name): [dense(tensor(16, 3), tensor(16, 4))] for name in names
        }
        for v, (record,) in records.items():
            record.params = v
        with pytest.raises(ValueError) as info:
            gs.register_records(Recorder(), records, batch_size=5)
        assert all(f"{name}:0" in str(info.value) for name in names)
