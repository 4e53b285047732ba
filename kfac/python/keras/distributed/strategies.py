"""Makes `tf.distribute` strategies from a word, as on a command line."""

from __future__ import annotations

import json
import os

import tensorflow as tf

KINDS = ("none", "mirrored", "multi_worker", "tpu")


def make_strategy(
    kind: str,
    num_replicas: int | None = None,
    tpu: str | None = None,
    timeout: float = 600.0,
) -> tf.distribute.Strategy:
    """A strategy; call this before anything else of TensorFlow runs.

    Args:
      kind: "none", "mirrored" (the devices of one machine), "multi_worker" (processes
        that TF_CONFIG describes) or "tpu".
      num_replicas: for "mirrored": how many devices; all GPUs by default. Without GPUs
        the CPU is divided into as many logical devices.
      tpu: name or address of the TPU, "local" for one in this machine.
      timeout: seconds that a collective of several workers waits for the others.

    Raises:
      ValueError: unknown kind, options that belong to another kind, more replicas than
        devices, or no cluster in TF_CONFIG.
      RuntimeError: the CPU cannot be divided, since TensorFlow has started.
    """
    if kind not in KINDS:
        raise ValueError(f"The kind of strategy is {kind!r}; use one of {KINDS}.")
    if num_replicas is not None and kind != "mirrored":
        raise ValueError(
            f"num_replicas={num_replicas} is for 'mirrored'; {kind!r} knows its own."
        )
    if tpu is not None and kind != "tpu":
        raise ValueError(f"tpu={tpu!r} is for kind 'tpu', not {kind!r}.")
    if num_replicas is not None and num_replicas < 1:
        raise ValueError(f"num_replicas={num_replicas}; expected at least 1.")
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout!r}; expected seconds.")
    if kind == "mirrored":
        return tf.distribute.MirroredStrategy(_devices(num_replicas))
    if kind == "multi_worker":
        _check_cluster()
        return tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                timeout_seconds=timeout
            )
        )
    if kind == "tpu":
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu or "")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    return tf.distribute.get_strategy()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process reports and saves for all."""
    resolver = strategy.cluster_resolver
    if not is_multi_worker(strategy) or not resolver.cluster_spec().as_dict():
        return True
    if "chief" in resolver.cluster_spec().as_dict():
        return resolver.task_type == "chief"
    return resolver.task_id == 0


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes take part."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _check_cluster() -> None:
    """Without a cluster TensorFlow would train alone and say nothing."""
    given = os.environ.get("TF_CONFIG", "")
    try:
        has_cluster = bool(json.loads(given)["cluster"])
    except (ValueError, KeyError, TypeError):
        has_cluster = False
    if not has_cluster:
        raise ValueError(
            "'multi_worker' needs the workers' addresses in the environment variable "
            f"TF_CONFIG, which is {given!r}. On one machine start the program by "
            "kfac.examples.launch_local; a cluster's scheduler usually sets it."
        )


def _devices(count: int | None) -> list[str] | None:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        if count is not None and count > len(gpus):
            raise ValueError(
                f"num_replicas={count}, but this machine has {len(gpus)} GPUs."
            )
        return [f"GPU:{i}" for i in range(count or len(gpus))]
    count = count or 1
    (cpu, *_) = tf.config.list_physical_devices("CPU")
    if len(tf.config.get_logical_device_configuration(cpu) or [cpu]) < count:
        try:
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"The CPU cannot be divided into {count} devices any more: call "
                "make_strategy before anything else of TensorFlow runs."
            ) from error
    return [f"CPU:{i}" for i in range(count)]
