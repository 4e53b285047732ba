"""The deep autoencoder with this library and with the TF1 package `kfac`, side by side.

    pip install --no-deps --target=FOLDER kfac==0.2.4
    python benchmarks/tf1_package.py FOLDER

Counts updates and seconds until the training cross-entropy is down to 58, with the
same v1 graph, weights, batches and options (everything adaptive, curvature from the
whole batch).  A third run takes the statistics and the quadratic model of this library
from 1/4 of the batch.  Each run is a process of its own and imports one `kfac` only.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
TARGET = 58.0
BATCH = 1024
EVALUATED = 2000
L2_REG = 1e-5


def run(fraction: float | None, max_updates: int) -> dict:
    """Trains with whatever `import kfac` finds; None leaves the fractions out."""
    import tensorflow.compat.v1 as tf

    import kfac

    tf.disable_v2_behavior()
    with np.load(ROOT / "kfac" / "examples" / "data" / "mnist_sample.npz") as arrays:
        images = arrays["x_train"].reshape(-1, 784).astype(np.float32) / 255
    rng = np.random.RandomState(0)
    weights = []
    for i, (d_in, d_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        scale = np.sqrt(6 / (d_in + d_out))
        value = rng.uniform(-scale, scale, (d_in, d_out)).astype(np.float32)
        w = tf.get_variable(f"w{i}", initializer=value, use_resource=True)
        b = tf.get_variable(
            f"b{i}", initializer=np.zeros(d_out, np.float32), use_resource=True
        )
        weights.append((w, b))

    def forward(x):
        calls = []
        for i, (w, b) in enumerate(weights):
            outputs = tf.matmul(x, w) + b
            calls.append(((w, b), x, outputs))
            linear = i in (len(weights) // 2 - 1, len(weights) - 1)
            x = outputs if linear else tf.tanh(outputs)
        return x, calls

    def cross_entropy(x):
        values = tf.nn.sigmoid_cross_entropy_with_logits(labels=x, logits=forward(x)[0])
        return tf.reduce_mean(tf.reduce_sum(values, axis=1))

    def loss_fn(x):
        squares = [tf.nn.l2_loss(v) for pair in weights for v in pair]
        return cross_entropy(x) + L2_REG * tf.add_n(squares)

    batch = tf.placeholder(tf.float32, [BATCH, 784])
    everything = tf.placeholder(tf.float32, [None, 784])
    logits, calls = forward(batch)
    collection = kfac.LayerCollection()
    collection.register_multi_bernoulli_predictive_distribution(
        logits, seed=0, targets=batch
    )
    for params, inputs, outputs in calls:
        collection.register_fully_connected(params, inputs, outputs)
    parts = {}
    if fraction is not None:
        parts = {"cov_batch_fraction": fraction, "qmodel_batch_fraction": fraction}
    loss = loss_fn(batch)
    optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
        learning_rate=None,
        momentum=None,
        momentum_type="qmodel",
        damping=150.0,
        adapt_damping=True,
        damping_adaptation_interval=5,
        min_damping=1e-5,
        l2_reg=L2_REG,
        cov_update_every=1,
        invert_every=5,
        cov_ema_decay=0.95,
        layer_collection=collection,
        batch_size=BATCH,
        loss=loss,
        loss_fn=loss_fn,
        train_batch=batch,
        **parts,
    )
    step = optimizer.minimize(loss)
    evaluated = cross_entropy(everything)
    curve, spent, processor = [], 0.0, 0.0
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for update in range(max_updates + 1):
            if update % 10 == 0:
                found = session.run(evaluated, {everything: images[:EVALUATED]})
                curve.append((update, spent, float(found)))
                if found <= TARGET:
                    break
            rows = rng.choice(len(images), BATCH, replace=False)
            start, used = time.perf_counter(), time.process_time()
            session.run(step, {batch: images[rows]})
            if update > 0:  # The first run includes TensorFlow's own preparations.
                spent += time.perf_counter() - start
                processor += time.process_time() - used
    update, _, found = curve[-1]
    return {
        "cross_entropy": found,
        "reached": found <= TARGET,
        "updates": update,
        "seconds": spent,
        "processor_seconds": processor,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where the TF1 package was installed")
    parser.add_argument("--max_updates", type=int, default=500)
    parser.add_argument("--as_child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_child is not None:
        fraction = float(arguments.as_child) if arguments.as_child else None
        print(json.dumps(run(fraction, arguments.max_updates)))
        return
    sys.path.insert(0, str(ROOT))
    from benchmarks import measuring
    from kfac.examples import reporting

    results = {}
    for name, path, fraction in (
        ("kfac 0.2.4", arguments.folder, ""),
        ("this library", str(ROOT), ""),
        ("this library, 1/4 of the batch", str(ROOT), "0.25"),
    ):
        command = [sys.executable, __file__, arguments.folder, "--as_child", fraction]
        command += ["--max_updates", str(arguments.max_updates)]
        output = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        results[name] = json.loads(output.splitlines()[-1])
        print(f"{name}: {results[name]['updates']} updates", flush=True)
    reporting.print_table(
        f"Autoencoder to a training cross-entropy of {TARGET:g}",
        ["", "updates", "seconds", "processor seconds", "cross-entropy"],
        [
            [
                name,
                f"{result['updates']}",
                result["seconds"],
                result["processor_seconds"],
                result["cross_entropy"],
            ]
            for name, result in results.items()
        ],
    )
    measuring.write_result("tf1_package", {"target": TARGET, **results})


if __name__ == "__main__":
    main()
