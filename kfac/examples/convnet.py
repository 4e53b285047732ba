"""Trains a convolutional network on digits with K-FAC, Adam or SGD.

    python -m kfac.examples.convnet --optimizer=kfac,adam
    python -m kfac.examples.convnet --mode=async
    python -m kfac.examples.convnet --mode=chief_worker --num_threads=2

The last two share the work of K-FAC among threads of a TensorFlow 1 session, see
`kfac.examples.convnet_distributed`.
"""

from __future__ import annotations

from absl import app, flags

from kfac.examples import (
    classification,
    convnet_distributed,
    convnet_model,
    program,
    training,
)

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)
flags.adopt_module_key_flags(classification)
flags.DEFINE_enum(
    "mode",
    "single",
    ["single", *convnet_distributed.MODES],
    "single: one function does it all; async: threads refresh the curvature while the "
    "model trains; chief_worker: workers compute gradients, a chief does the rest.",
)
flags.DEFINE_list("filters", [16, 32, 32], "Filters of each convolution.")
flags.DEFINE_integer("num_threads", 2, "Threads that help, in the other modes.")

DEFAULTS = {
    "batch_size": 250,
    "train_steps": 100,
    "cov_update_every": 5,
    "invert_every": 10,
    "eval_size": 2000,
}
LEARNING_RATES = {"adam": 1e-2, "sgd": 3e-2}


def main(argv: list[str]) -> None:
    """Trains with every optimizer asked for, prints a table, writes the plot."""
    del argv
    filters = [int(number) for number in FLAGS.filters]

    def make_model() -> convnet_model.ConvNet:
        return convnet_model.ConvNet(filters, FLAGS.seed)

    if FLAGS.mode == "single":
        classification.run_program(
            "Convolutional network, MNIST", make_model, LEARNING_RATES
        )
        return
    if FLAGS.optimizer != ["kfac"] or FLAGS.adaptive:
        raise app.UsageError(
            f"--mode={FLAGS.mode} is for --optimizer=kfac with a fixed damping only."
        )
    if FLAGS.num_threads < 1:
        raise app.UsageError(
            f"--num_threads: at least 1 is needed, got {FLAGS.num_threads}."
        )
    data = program.load_data()
    start = convnet_distributed.MODES[FLAGS.mode]

    def make_run(name: str) -> training.Run:
        del name
        return start(
            make_model,
            data,
            classification.KfacSettings.from_flags(),
            batch_size=FLAGS.batch_size,
            eval_size=FLAGS.eval_size,
            num_workers=FLAGS.num_threads,
            device=FLAGS.device,
        )

    classification.report(
        f"Convolutional network, MNIST, {FLAGS.mode}", program.train_each(make_run)
    )


if __name__ == "__main__":
    program.start(main, DEFAULTS, without=["hidden_widths"])
