"""Package definition; tooling is configured in pyproject.toml."""

from setuptools import find_packages, setup

EXAMPLES = ["matplotlib>=3.7", "rich>=13"]

setup(
    name="kfac-tf",
    version="0.1.0",
    description="K-FAC for TensorFlow 2 and Keras 3.",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["kfac", "kfac.*"]),
    package_data={
        "kfac.examples": ["data/*.npz", "data/*.md"],
        "kfac.tests": ["conformance/*.json"],
    },
    install_requires=[
        "tensorflow>=2.18",
        "keras>=3.6",
        # The [tf] extra brings tf-keras, which the distributions need beside Keras 3.
        "tensorflow-probability[tf]>=0.25",
        "numpy",
        "absl-py",
    ],
    extras_require={
        "examples": EXAMPLES,
        "tests": [*EXAMPLES, "pytest>=8", "pytest-xdist>=3", "hypothesis>=6"],
        "lint": ["ruff>=0.6"],
    },
)
