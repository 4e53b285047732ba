"""Runs one build function in every kind of graph the core promises to work in.

    @pytest.mark.parametrize("kind", graph_kinds.ALL)
    def test_something(kind):
        def build():
            w = graph_kinds.variable(np.eye(2), "w")
            return tf.matmul(w, w)
        run = graph_kinds.Run(kind, build)
        np.testing.assert_allclose(run(), np.eye(2))

`build` is called once, with the graph of that kind as the default graph (and a
`VariableStore` in force); each `run()` executes it once and returns NumPy values.
In the v1 kinds only what the returned tensors depend on is executed, so order side
effects with `tf.control_dependencies` and return tensors read after them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import state

tf1 = tf.compat.v1

V1_OFF = "v1 session, v2 behaviour off"
V1_ON = "v1 session, v2 behaviour on"
FUNCTION = "tf.function"
COND = "tf.cond branch"
XLA = "XLA"

ALL = (V1_OFF, V1_ON, FUNCTION, COND)
ALL_AND_XLA = (*ALL, XLA)
FAST = (V1_OFF, FUNCTION)


@contextlib.contextmanager
def v2_behavior_off() -> Iterator[None]:
    """The switches of `tf.compat.v1.disable_v2_behavior` that matter inside a graph.

    Unlike that function they can be put back, so one process tests both settings;
    `v2_behavior_off_test` runs the real thing in a process of its own.
    """
    tf1.disable_control_flow_v2()
    tf1.disable_v2_tensorshape()
    tf1.disable_tensor_equality()
    tf1.disable_resource_variables()
    try:
        yield
    finally:
        tf1.enable_control_flow_v2()
        tf1.enable_v2_tensorshape()
        tf1.enable_tensor_equality()
        tf1.enable_resource_variables()


def variable(
    value: Any, name: str, dtype: Any = None, trainable: bool = True
) -> tf.Variable:
    """A resource variable that outlives the trace, named `name` in every kind."""
    value = np.asarray(value, dtype)
    with tf.init_scope():
        if not tf.executing_eagerly():
            return tf1.get_variable(
                name, initializer=value, use_resource=True, trainable=trainable
            )
        # A function that creates variables is traced twice; the second trace must
        # find the first one's.
        made = _variables.setdefault(state.current_store(), {})
        if name not in made:
            made[name] = tf.Variable(value, name=name, trainable=trainable)
        return made[name]


_variables: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Run:
    """`build` made into something that runs, see the module's docstring.

    Attributes:
      store: the `VariableStore` holding the state of the non-v1 kinds.
      graph: the v1 graph, or the traced function's graph once it has run.
    """

    def __init__(self, kind: str, build: Callable[[], Any], seed: int = 1):
        self.kind = kind
        self.store = state.VariableStore()
        if kind in (V1_OFF, V1_ON):
            self._execute = self._start_session(build, seed)
        else:
            self._execute = self._start_function(build, seed)

    def __call__(self) -> Any:
        return self._execute()

    def _start_session(self, build, seed):
        self.graph = tf.Graph()
        switches = (
            v2_behavior_off() if self.kind == V1_OFF else contextlib.nullcontext()
        )
        with switches, self.graph.as_default():
            tf1.set_random_seed(seed)
            fetches = build()
            session = tf1.Session(graph=self.graph)
            session.run(tf1.global_variables_initializer())
        self.session = session
        return lambda: session.run(fetches)

    def _start_function(self, build, seed):
        tf.random.set_seed(seed)

        @tf.autograph.experimental.do_not_convert
        def traced(predicate):
            with self.store.as_default():
                self.graph = tf1.get_default_graph()
                if self.kind != COND:
                    return build()
                first: dict[str, Any] = {}

                def branch():
                    first["structure"] = build()
                    return tf.nest.flatten(first["structure"])

                def other():
                    return [tf.zeros_like(t) for t in _shapes(first["structure"])]

                # The branch under test is built first, the other one mimics it.
                values = tf.cond(predicate, branch, other)
                return tf.nest.pack_sequence_as(first["structure"], values)

        function = tf.function(traced, jit_compile=self.kind == XLA)
        yes = tf.constant(True)
        return lambda: tf.nest.map_structure(lambda t: t.numpy(), function(yes))


def _shapes(structure):
    """Static stand-ins for a structure of tensors of another graph."""
    return [
        tf.zeros([1 if d is None else d for d in t.shape.as_list()], t.dtype)
        for t in tf.nest.flatten(structure)
    ]
