"""The pattern language, on plain data and on graphs."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.tensormatch import graph_matcher as gm
from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.tests import graph_kinds

tf1 = tf.compat.v1


def is_int(datum):
    return isinstance(datum, int)


def is_positive(datum):
    return datum > 0


class TestElements:
    def test_an_element_binds_any_datum_to_its_name(self):
        assert gm.matcher(("?", "x"))(3) == {"x": 3}

    @pytest.mark.parametrize("name", [None, ""])
    def test_an_element_without_a_name_matches_and_binds_nothing(self, name):
        assert gm.matcher(("?", name))(3) is True

    def test_every_restriction_must_hold(self):
        match = gm.matcher(("?", "x", is_int, is_positive))
        assert match(3) == {"x": 3}
        assert not match(-3)
        assert not match("3")

    def test_restrictions_are_asked_from_left_to_right_up_to_the_first_that_fails(self):
        # is_positive("3") would raise.
        assert not gm.matcher(("?", "x", is_int, is_positive))("3")

    def test_a_name_that_occurs_again_must_meet_an_equal_datum(self):
        match = gm.matcher(("List", ("?", "x"), ("?", "x")))
        assert match([1, 1]) == {"x": 1}
        assert not match([1, 2])
        assert match([[1, 2], [1, 2]]) == {"x": [1, 2]}


class TestLists:
    @pytest.mark.parametrize("data", [[1, 2], (1, 2)])
    def test_items_match_in_order_in_lists_and_tuples(self, data):
        assert gm.matcher(("List", ("?", "a"), ("?", "b")))(data) == {"a": 1, "b": 2}

    @pytest.mark.parametrize("data", [[], [1], [1, 2, 3], 12, None, "ab"])
    def test_the_length_must_agree_and_the_datum_be_a_sequence(self, data):
        assert not gm.matcher(("List", ("?", "a"), ("?", "b")))(data)

    def test_an_empty_list_pattern_matches_empty_sequences_only(self):
        match = gm.matcher(("List",))
        assert match([]) is True
        assert match(()) is True
        assert not match([1])

    def test_a_pattern_may_be_written_as_a_list(self):
        assert gm.matcher(["List", ["?", "a"]])([5]) == {"a": 5}

    def test_the_sequence_itself_is_not_consumed(self):
        _, consumed = gm.matcher_with_consumed(("List", ("?", None), 2))([1, 2])
        assert consumed == {1, 2}


class TestChoices:
    def test_the_first_alternative_that_matches_wins(self):
        match = gm.matcher(("?:choice", ("?", "i", is_int), ("?", "any")))
        assert match(1) == {"i": 1}
        assert match("s") == {"any": "s"}

    def test_no_alternative_no_match(self):
        assert not gm.matcher(("?:choice", 1, 2))(3)
        assert not gm.matcher(("?:choice",))(3)

    def test_a_choice_backtracks_when_the_rest_fails(self):
        pattern = ("List", ("?:choice", ("?", "x"), ("?", "y")), ("?", "x"))
        assert gm.matcher(pattern)([1, 1]) == {"x": 1}
        assert gm.matcher(pattern)([1, 2]) == {"y": 1, "x": 2}

    def test_nothing_of_a_failed_alternative_stays_bound_or_consumed(self):
        pattern = ("?:choice", ("List", ("?", "x"), 9), ("List", 1, ("?", "z")))
        assert gm.matcher_with_consumed(pattern)([1, 2]) == ({"z": 2}, {1, 2})


class TestNegation:
    def test_matches_what_the_negated_pattern_does_not(self):
        match = gm.matcher(("?:not", ("?", "x", is_int)))
        assert match("s") is True
        assert not match(1)

    def test_adds_no_bindings_and_consumes_nothing(self):
        pattern = ("List", ("?", "a"), ("?:not", ("?", "b", is_int)))
        assert gm.matcher_with_consumed(pattern)([1, "s"]) == ({"a": 1}, {1})


class TestAny:
    def test_any_consumes_the_datum(self):
        assert gm.matcher_with_consumed(("?:any",))(7) == ({}, {7})

    def test_any_consumes_the_items_of_a_list(self):
        assert gm.matcher_with_consumed(("?:any",))([7, [8]]) == ({}, {7, 8})

    def test_any_noconsume_consumes_nothing(self):
        assert gm.matcher_with_consumed(("?:any_noconsume",))(7) == ({}, set())


class TestEquality:
    @pytest.mark.parametrize("datum", [3, "three", None, ()])
    def test_other_patterns_match_what_equals_them(self, datum):
        assert gm.matcher(datum)(datum) is True
        assert not gm.matcher(datum)(4)

    def test_it_consumes(self):
        assert gm.matcher_with_consumed(3)(3) == ({}, {3})

    def test_an_unknown_form_is_compared_and_does_not_match_nodes(self):
        # Out before In is no node pattern.
        with tf.Graph().as_default():
            x = tf1.placeholder(tf.float32, [2])
            y = tf.tanh(x)
            pattern = (gp.Tanh, ("Out", gp.Tensor), ("In", gp.Tensor))
            assert not gm.is_internal_node_pattern(gm.expand_thunks(pattern))
            assert not gm.matcher(pattern)(y.op)

    def test_a_tensor_in_a_pattern_is_compared_by_identity(self):
        def build():
            x = tf.ones([2])
            other = tf.ones([2])
            y = tf.tanh(x)
            assert gm.matcher((gp.Tanh, ("In", x)))(y.op) is True
            assert not gm.matcher((gp.Tanh, ("In", other)))(y.op)
            return y

        graph_kinds.Run(graph_kinds.FUNCTION, build)()


class TestThunks:
    def test_callables_that_need_no_argument_are_called_repeatedly(self):
        def inner():
            return ("?", "x")

        def outer(size=2, other=2):
            return inner

        assert gm.expand_thunks(outer) == ("?", "x")

    def test_containers_keep_their_type(self):
        expanded = gm.expand_thunks(["List", (gp.Tensor,), lambda: [1]])
        assert expanded == ["List", (gp.Tensor(),), [1]]

    def test_predicates_and_builtins_are_left_alone(self):
        pattern = ("?", "x", is_int, callable, int)
        assert gm.expand_thunks(pattern) == pattern

    def test_keyword_collecting_callables_are_thunks(self):
        def thunk(*args, **kwargs):
            return "expanded"

        assert gm.expand_thunks(thunk) == "expanded"


@pytest.fixture(name="affine")
def affine_fixture():
    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float32, [4, 3], name="x")
        w = tf1.get_variable("w", [3, 2], use_resource=True)
        product = tf.matmul(x, w)
        y = tf.tanh(product)
        yield x, w, product, y


class TestNodes:
    def test_inputs_and_outputs_are_matched(self, affine):
        x, w, product, y = affine
        pattern = (
            gp.MatMul("op"),
            ("In", gp.Tensor("in"), gp.Variable("w")),
            ("Out", gp.Tensor("out")),
        )
        bindings = gm.matcher(pattern)(product.op)
        assert bindings["in"] is x and bindings["out"] is product
        assert bindings["op"] is product.op and bindings["w"] is w.handle

    def test_the_output_side_alone_leaves_the_inputs_free(self, affine):
        _, _, product, y = affine
        assert gm.matcher((gp.MatMul, ("Out", gp.Tensor("out"))))(product.op)
        consumers = (gp.Tensor, ("Out", gp.Tanh("next")))
        assert gm.matcher(consumers)(product) == {"next": y.op}

    def test_a_leaf_has_no_inputs_not_even_an_empty_list(self, affine):
        x = affine[0]
        assert not gm.matcher((gp.Tensor, ("In",)))(x)
        assert gm.matcher((gp.Tensor, ("Out", gp.MatMul)))(x) is True

    def test_an_operation_without_inputs_has_an_empty_list(self, affine):
        x = affine[0]
        assert gm.matcher((gp.Op, ("In",)))(x.op) is True

    def test_tensors_of_several_producers_fail_without_an_error(self, affine):
        _, _, product, y = affine
        pattern = (("?", "both"), ("In", gp.Op))
        assert not gm.matcher(pattern)([product, y])
        assert gm.matcher(pattern)([product, product])

    def test_consumed_holds_unnamed_tensors_and_operations(self, affine):
        x, w, product, y = affine
        pattern = (gp.Tensor, ("In", (gp.Tanh, ("In", (gp.Tensor, ("In", gp.MatMul))))))
        bindings, consumed = gm.matcher_with_consumed(pattern)(y)
        assert bindings == {}
        assert consumed == {y, y.op, product, product.op}

    @pytest.mark.parametrize("kind", graph_kinds.ALL)
    def test_nodes_match_in_every_kind_of_graph(self, kind):
        def build():
            w = graph_kinds.variable(np.eye(2, dtype=np.float32), "w")
            x = tf.exp(tf.ones([3, 2]))
            y = tf.matmul(x, w)
            bindings, consumed = gm.matcher_with_consumed(gp.Affine)(y)
            assert bindings["in"] is x
            # in, weights, operation and output; some of them as references.
            assert len(consumed) == 4
            assert y.op in consumed
            return y

        graph_kinds.Run(kind, build)()


class TestEntryPoints:
    def test_all_matcher_lists_every_way_and_starts_afresh_on_each_call(self):
        match = gm.all_matcher(("?:choice", ("?", "a"), 1, ("?:any",)))
        assert match(1) == [{"a": 1}, True, True]
        assert match(1) == [{"a": 1}, True, True]
        assert match(2) == [{"a": 2}, True]

    def test_all_matcher_gives_an_empty_list_for_no_match(self):
        assert gm.all_matcher(1)(2) == []

    def test_matcher_with_consumed_is_truthy_even_without_bindings(self):
        assert gm.matcher_with_consumed(("?:any_noconsume",))(0) == ({}, set())
        assert not gm.matcher_with_consumed(1)(2)

    def test_combinators_do_not_change_what_they_are_given(self):
        bindings, consumed = {"x": 1}, {1}
        combinator = gm.match_element("y", [])
        result = combinator(2, bindings, consumed, lambda *state: state)
        assert result == ({"x": 1, "y": 2}, {1, 2})
        assert (bindings, consumed) == ({"x": 1}, {1})

    def test_combinators_return_what_the_continuation_returns(self):
        assert gm.match_eqv(1)(1, {}, set(), lambda *_: "result") == "result"
        assert gm.match_any(1, {}, set(), lambda *_: 0) == 0


class TestSyntax:
    def test_sequences(self):
        assert gm.is_seq([]) and gm.is_seq(()) and not gm.is_seq("s")
        assert gm.is_empty_seq([]) and not gm.is_empty_seq([1])
        assert not gm.is_empty_seq(0)
        assert gm.is_nonempty_seq((1,)) and not gm.is_nonempty_seq(())
        assert gm.is_pattern((1,)) and not gm.is_pattern(1)

    def test_forms_are_told_by_their_tag(self):
        forms = {
            gm.is_element_pattern: ("?", "x"),
            gm.is_choice_pattern: ("?:choice", 1),
            gm.is_list_pattern: ("List", 1),
            gm.is_not_pattern: ("?:not", 1),
            gm.is_any_pattern: ("?:any",),
            gm.is_any_noconsume_pattern: ("?:any_noconsume",),
            gm.is_internal_node_pattern: (("?", "x"), ("In", 1)),
        }
        for predicate in forms:
            for owner, form in forms.items():
                assert bool(predicate(form)) == (predicate is owner)

    def test_a_tensor_as_first_item_is_no_tag(self):
        def build():
            x = tf.ones([2])
            assert not gm.is_element_pattern((x, "x"))
            return x

        graph_kinds.Run(graph_kinds.FUNCTION, build)()

    def test_accessors(self):
        element = ("?", "x", is_int)
        assert gm.element_name(element) == "x"
        assert tuple(gm.element_restrictions(element)) == (is_int,)
        assert tuple(gm.choice_patterns(("?:choice", 1, 2))) == (1, 2)
        assert tuple(gm.list_patterns(("List", 1, 2))) == (1, 2)
        assert gm.negated_pattern(("?:not", 1)) == 1
        node = (element, ("Out", 3, 4))
        absent = ("?:any_noconsume",)
        assert gm.internal_node_pattern(node) == element
        assert gm.internal_node_input_pattern(node) == absent
        assert gm.internal_node_output_pattern(node) == ("List", 3, 4)
        assert gm.internal_patterns(node) == [element, absent, ("List", 3, 4)]
        assert gm.internal_node_input_pattern((element, ("In", 1))) == ("List", 1)

    def test_node_patterns_need_sequences_and_the_tags_in_order(self):
        p = ("?", "x")
        assert gm.is_internal_node_pattern((p, ("In",), ("Out",)))
        for other in [
            (p,),
            (p, ("Out",), ("In",)),
            (p, ("In",), ("In",)),
            (p, ("Inside", 1)),
            ("p", ("In", 1)),
            (p, "In"),
            ((), ("In",)),
        ]:
            assert not gm.is_internal_node_pattern(other)


class TestPatternEvaluator:
    def test_the_first_responsible_handler_is_asked(self):
        evaluator = gm.PatternEvaluator(lambda pat: "default")
        evaluator.defhandler(is_int, lambda pat: "int")
        evaluator.defhandler(lambda pat: True if pat == 1 else False, lambda pat: "one")
        assert [evaluator(1), evaluator("s")] == ["int", "default"]

    def test_without_default_an_unknown_pattern_is_an_error(self):
        with pytest.raises(ValueError, match="No handler"):
            gm.PatternEvaluator()(1)


class TestAnyAndAll:
    def test_any_is_the_first_truthy_value_or_false(self):
        assert gm._any([0, "", 5, 6]) == 5
        assert gm._any([0, ""]) is False
        assert gm._any([]) is False

    def test_all_is_the_first_falsy_value_or_the_last(self):
        assert gm._all([1, "", 5]) == ""
        assert gm._all([1, 5]) == 5
        assert gm._all([]) is True
