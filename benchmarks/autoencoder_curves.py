"""Loss of the deep autoencoder against updates and seconds: K-FAC, Adam, SGD.

    python benchmarks/autoencoder_curves.py --train_seconds=300

Flags are those of `kfac.examples.autoencoder_mnist`.  Adam's and SGD's learning rates
are the best of a sweep over factors of three.
"""

from kfac.examples import autoencoder_mnist, program

DEFAULTS = {
    **autoencoder_mnist.DEFAULTS,
    "optimizer": list(program.OPTIMIZERS),
    "train_seconds": 300.0,
    "results": "benchmarks/results/autoencoder_curves.json",
    "plot": "benchmarks/results/autoencoder_curves.png",
}

if __name__ == "__main__":
    program.start(autoencoder_mnist.main, DEFAULTS)
