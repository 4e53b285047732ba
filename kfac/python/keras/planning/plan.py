"""What training a model with K-FAC will cost, before anything is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from kfac.python.keras import arguments, option_checks
from kfac.python.keras.kfac_optimizer import Kfac
from kfac.python.keras.models import PureModel
from kfac.python.keras.planning.cost_trace import CostTrace, input_specs
from kfac.python.keras.planning.layer_cost import LayerCost
from kfac.python.ops import replica_cost, report
from kfac.python.ops.layer_collection import approximations

# A factor that takes more than this is worth a warning; and an average phase of the
# curvature that takes more than the gradient itself.
LARGE_FACTOR_BYTES = 1 << 30
_COSTLIEST = 5  # Layers that the table lists.
# Approximations with other factors than `replica_cost` knows.
_OTHERS = frozenset(
    {
        approximations.APPROX_EKFAC_NAME,
        approximations.APPROX_EKFAC_PRODUCT_NAME,
        approximations.APPROX_KRONECKER_SUA_NAME,
        approximations.APPROX_KRONECKER_SERIES_1_NAME,
        approximations.APPROX_KRONECKER_SERIES_2_NAME,
    }
)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a training step.

    Attributes:
      name: what it is.
      flops: floating-point operations of the matrix products of one run.
      every: steps from one run to the next.
      kept_bytes: memory that it holds between steps.
      temporary_bytes: memory that it needs while it runs, at least.
    """

    name: str
    flops: float
    every: int
    kept_bytes: int
    temporary_bytes: int

    @property
    def flops_a_step(self) -> float:
        """Operations, spread over the steps of a period."""
        return self.flops / self.every


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cost of training by phase and by layer; `str` gives a table.

    Attributes:
      batch_size: cases in a step.
      phases: in the order they run in; the first is what every optimizer does.
      layers: one entry a parameter group.
      warnings: what looks wrong, and what to do about it.
    """

    batch_size: int
    phases: tuple[Phase, ...]
    layers: tuple[LayerCost, ...]
    warnings: tuple[str, ...]

    def phase(self, name: str) -> Phase:
        """The phase of that name.

        Raises:
          KeyError: there is none.
        """
        return {phase.name: phase for phase in self.phases}[name]

    @property
    def flops_a_step(self) -> float:
        """Operations of an average step."""
        return sum(phase.flops_a_step for phase in self.phases)

    @property
    def ratio_to_gradient(self) -> float:
        """Operations of an average step, in units of the gradient's."""
        return self.flops_a_step / self.phases[0].flops

    @property
    def kept_bytes(self) -> int:
        """Memory held between steps: parameters and the optimizer's state."""
        return sum(phase.kept_bytes for phase in self.phases)

    @property
    def peak_bytes(self) -> int:
        """That, and the most that a phase needs while it runs."""
        return self.kept_bytes + max(p.temporary_bytes for p in self.phases)

    def on_replicas(self) -> list[replica_cost.Layer]:
        """The layers for `kfac.python.ops.replica_cost`, sharers of factors together.

        Raises:
          ValueError: an approximation that module does not know, such as EKFAC.
        """
        unknown = [la.name for la in self.layers if la.row.approximation in _OTHERS]
        if unknown:
            raise ValueError(
                f"Costs on replicas are not known of {', '.join(sorted(_OTHERS))}, "
                f"which {', '.join(unknown)} have."
            )
        together = sorted(self.layers, key=lambda layer: layer.first_user)
        return [layer.on_replicas for layer in together]

    def __str__(self) -> str:
        return _format(self)


def plan(
    model: Any,
    batch_size: int,
    x: Any = None,
    optimizer: Any = None,
    print_fn: Callable[[str], Any] | None = print,
    **options: Any,
) -> Plan:
    """Operations and memory of each phase of a K-FAC step.

        kfac.keras.plan(model, batch_size=512, invert_every=100)

    Nothing is trained and no state is made: the model is traced once for the gradient's
    cost, and the curvature's is computed from the layers' shapes.  Operations are those
    of matrix products and convolutions alone.

    Args:
      model: built Keras model, or callable with `trainable_variables`.
      batch_size: cases in a step.
      x: inputs, or `tf.TensorSpec`s for them, whose first size is replaced by
        `batch_size`; needed for models without `inputs` (subclassed ones), or where
        another size is unknown.
      optimizer: the `Kfac` to read options from; by default the one the model was
        compiled with, else one with default options.
      print_fn: gets the table; None prints nothing.
      **options: arguments of `Kfac` to use instead of the optimizer's, for instance
        `cov_update_every` or `fisher_approx`.

    Returns:
      The figures.

    Raises:
      ValueError: no batch size, unknown options or shapes, or the optimizer is no
        `Kfac`.
    """
    batch_size = option_checks.batch_size(batch_size)
    options = _options(model, optimizer, options)
    pure = PureModel(model, loss="mean_squared_error")  # Any loss costs the same.
    traced = CostTrace(
        pure,
        input_specs(pure, batch_size, x),
        options["cov_batch_fraction"],
        options["fisher_approx"],
    )
    phases = _phases(traced, options)
    result = Plan(
        batch_size=batch_size,
        phases=phases,
        layers=traced.layers,
        warnings=tuple(_warnings(traced, phases)),
    )
    if print_fn is not None:
        print_fn(str(result))
    return result


def _options(model: Any, optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """All options, as `Kfac` would complete them, and `fisher_approx`."""
    if optimizer is None:
        compiled = getattr(model, "optimizer", None)
        compiled = getattr(compiled, "inner_optimizer", compiled)
        optimizer = compiled if isinstance(compiled, Kfac) else None
    elif not isinstance(optimizer, Kfac):
        raise ValueError(
            f"plan needs a Kfac to read options from, got {type(optimizer).__name__}; "
            "leave it out for the default options."
        )
    config = {} if optimizer is None else optimizer.get_config()
    adaptive = given.pop("adaptive", False)
    fisher_approx = given.pop("fisher_approx", config.get("fisher_approx"))
    if adaptive:
        for name in ("momentum", "momentum_type", "adapt_damping"):
            config.pop(name, None)
    defaults = arguments.DEFAULTS
    configured = {k: v for k, v in config.items() if k in defaults and v != defaults[k]}
    given = {**configured, **given}
    has_model = adaptive or arguments.uses_quadratic_model({**defaults, **given})
    rate = None if has_model else 1.0
    options = arguments.resolve(rate, 1.0, adaptive, given)
    return {**options, "fisher_approx": fisher_approx}


def _phases(traced: CostTrace, options: dict[str, Any]) -> tuple[Phase, ...]:
    layers, parameters = traced.layers, traced.parameter_bytes
    fraction = options["cov_batch_fraction"]
    total = lambda attribute: sum(getattr(layer, attribute) for layer in layers)
    largest = max(
        (side for layer in layers for side in layer.matrix_sides.values()), default=0
    )
    phases = [
        Phase(
            "gradient",
            traced.gradient,
            1,
            kept_bytes=parameters,
            temporary_bytes=parameters + traced.activation_bytes,
        ),
        Phase(
            "statistics",
            fraction * (traced.forward + traced.signals) + total("statistics_flops"),
            options["cov_update_every"],
            kept_bytes=total("factor_bytes"),
            temporary_bytes=int(fraction * traced.activation_bytes)
            + max((layer.statistics_bytes for layer in layers), default=0),
        ),
        Phase(
            "inverses",
            total("inverse_flops"),
            options["invert_every"],
            kept_bytes=total("inverse_bytes"),
            # The damped matrix, its Cholesky factor, and the inverse of that.
            temporary_bytes=3 * 4 * largest**2,
        ),
        Phase(
            "preconditioning",
            total("preconditioning_flops"),
            1,
            kept_bytes=parameters,  # The momentum.
            temporary_bytes=2 * parameters,
        ),
    ]
    if arguments.uses_quadratic_model(options):
        part = options["qmodel_batch_fraction"]
        phases.append(
            Phase(
                "quadratic model",
                part * (traced.forward + traced.model_products),
                1,
                kept_bytes=0,
                temporary_bytes=int(2 * part * traced.activation_bytes),
            )
        )
    if options["adapt_damping"]:
        phases.append(
            Phase(
                "damping adaptation",
                2 * traced.forward,  # The loss before and after the step.
                options["damping_adaptation_interval"],
                kept_bytes=0,
                temporary_bytes=0,
            )
        )
    return tuple(phases)


def _warnings(traced: CostTrace, phases: Sequence[Phase]) -> list[str]:
    warnings = []
    for layer in traced.layers:
        warnings += _layer_warnings(layer)
    if traced.loops:
        warnings.append(
            f"The model runs loops, which are not counted: {', '.join(traced.loops)}."
        )
        return warnings
    gradient, statistics, inverses = phases[:3]
    if inverses.flops_a_step > gradient.flops:
        enough = math.ceil(inverses.flops / gradient.flops)
        warnings.append(
            f"Inverses cost {inverses.flops_a_step / gradient.flops:.1f} gradients a "
            f"step; with invert_every={enough} they would cost one. A larger batch "
            "makes them cheaper relative to the gradient, too."
        )
    if statistics.flops_a_step > gradient.flops:
        warnings.append(
            f"Statistics cost {statistics.flops_a_step / gradient.flops:.1f} gradients "
            "a step; take them from a part of the batch (cov_batch_fraction=0.25) or "
            "less often (cov_update_every=10)."
        )
    return warnings


def _layer_warnings(layer: LayerCost) -> list[str]:
    found = []
    for role, side in layer.matrix_sides.items():
        memory = 4 * side**2
        if memory < LARGE_FACTOR_BYTES:
            continue
        name = layer.row.variables[0].split("/")[-2]
        approximation = _with_diagonal(layer, role)
        found.append(
            f"{layer.name}: a factor of {side:,} by {side:,} numbers takes "
            f"{report.format_bytes(memory)}, its inverse as much again and "
            f"{format_flops(layer.inverse_flops)} an update; "
            f"fisher_approx={{{name!r}: {approximation!r}}} keeps its diagonal only."
        )
    if layer.row.reason is not None:
        found.append(
            f"{layer.name}: covered by a generic {layer.row.approximation} block only "
            f"({layer.row.reason})."
        )
    return found


def _with_diagonal(layer: LayerCost, role: str) -> str:
    """The approximation that has a diagonal factor in this role."""
    block = layer.row.block
    if role == "both" or not block.startswith("FullyConnected"):
        return "diagonal"
    is_used_once = block in ("FullyConnectedKFACBasicFB", "FullyConnectedEKFACFB")
    other = {"in": "out", "out": "in"}[role]
    sides = role if other in layer.matrix_sides else "both"
    return f"kron_{'' if is_used_once else 'indep_'}{sides}_diag"


def _format(planned: Plan) -> str:
    headings = [
        "Phase",
        "Operations",
        "Every",
        "A step",
        "Memory kept",
        "While it runs",
    ]
    rows = [
        [
            phase.name,
            format_flops(phase.flops),
            f"{phase.every}",
            format_flops(phase.flops_a_step),
            report.format_bytes(phase.kept_bytes),
            report.format_bytes(phase.temporary_bytes),
        ]
        for phase in planned.phases
    ]
    total = [
        "total",
        "",
        "",
        format_flops(planned.flops_a_step),
        report.format_bytes(planned.kept_bytes),
        f"peak {report.format_bytes(planned.peak_bytes)}",
    ]
    lines = [f"K-FAC with batches of {planned.batch_size:,}:", ""]
    lines += report.aligned(headings, rows, total)
    lines += ["", f"A step is {planned.ratio_to_gradient:.2f} gradients.", ""]
    costliest = sorted(planned.layers, key=lambda layer: -layer.inverse_flops)
    lines += report.aligned(
        ["Layers with the largest factors", "Approximation", "Factors", "Memory"],
        [
            [
                layer.name,
                layer.row.approximation,
                report.format_sides(layer.row),
                report.format_bytes(layer.factor_bytes + layer.inverse_bytes),
            ]
            for layer in costliest[:_COSTLIEST]
        ],
    )
    lines += [f"Warning: {warning}" for warning in planned.warnings]
    return "\n".join(lines)


def format_flops(count: float) -> str:
    """A number of operations with a unit, for example `1.5 GFLOP`."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TFLOP"
