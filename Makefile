# Two commands do everything on a fresh machine:
#   make demo   the MNIST autoencoder with K-FAC, Adam and SGD (about five minutes)
#   make test   the whole test suite
# make demo-distributed trains with two worker processes on this machine (a minute);
# kill one meanwhile, and both go on from the last checkpoint.

PYTHON ?= python3
VENV ?= .venv
# pytest-xdist workers; two suit a machine of two cores.
JOBS ?= 2
# Seconds of training an optimizer in the demo.
SECONDS_EACH ?= 60

export TF_CPP_MIN_LOG_LEVEL ?= 2
BIN := $(VENV)/bin

.PHONY: demo demo-distributed test lint format clean

demo: $(VENV)/.examples
	$(BIN)/python -m kfac.examples.autoencoder_mnist \
	    --optimizer=kfac,adam,sgd --train_seconds=$(SECONDS_EACH) \
	    --plot=results/autoencoder_mnist.png

demo-distributed: $(VENV)/.examples
	rm -rf results/demo_distributed
	$(BIN)/python -m kfac.examples.launch_local --num_workers=2 --max_restarts=3 -- \
	    $(BIN)/python -m kfac.examples.classifier_mnist_tpu_strategy \
	    --strategy=multi_worker --checkpoint_dir=results/demo_distributed

test: $(VENV)/.tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/.lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.lint
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) results build dist *.egg-info

# One virtual environment; $(VENV)/.EXTRA says that the extra EXTRA is in it.
$(VENV)/.%: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
