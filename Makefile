# make demo           sets itself up, trains on the digits, samples; ends by printing where the pictures are
# make test-local     sets itself up, runs the tests
# make setup          .venv, with gmdist in it; all of these begin with it
# make test-faults    commands, workers and nodes of Ray are killed; ten minutes
# make test-cluster   nodes of Ray on this machine that come and go, tokens, jobs, ports
# make test-s3        a real S3 server (OpenStack Swift) in an environment of its own
# make test-slurm     jobs on a Slurm of two nodes on this machine; seven minutes, and root
# make test-gpu       on a machine with a GPU; needs neither Ray nor DeepSpeed, and says what it could not run
# make parity         what diffusers, transformers, lpips, vector-quantize-pytorch and others compute, ours computes
# make lint           ruff and mypy; make lint-oldest: mypy with the oldest torch
# make bench          what takes minutes; make bench-NAME: beside peers, or trained and measured
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
DEMO := runs/demo
OLDEST_TORCH := 2.11.0

.DEFAULT_GOAL := help
.PHONY: help setup demo test-local test-faults test-cluster test-gpu test-s3 s3-server test-slurm slurm parity lint lint-oldest \
	bench bench-loader bench-diffusion bench-autoencoders bench-digits-gans bench-tokenizers bench-gan bench-sweep

help:
	@sed -n 's/^# make/make/p' Makefile

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "gmdist needs Python 3.11 or 3.12; set PYTHON=/path/to/it" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup
	@$(BIN)/gmdist data make digits data/digits
	@$(BIN)/gmdist train configs/digits/autoencoder_kl.yaml run.dir=$(DEMO)/autoencoder_kl
	@$(BIN)/gmdist train configs/digits/latent_diffusion.yaml \
		family.first_stage=$(DEMO)/autoencoder_kl run.dir=$(DEMO)/latent_diffusion
	@$(BIN)/gmdist sample $(DEMO)/latent_diffusion --num-images 100 --out $(DEMO)/latent_diffusion/digits.png
	@$(BIN)/gmdist report $(DEMO)/autoencoder_kl $(DEMO)/latent_diffusion
	@echo "ten of each digit:  $(DEMO)/latent_diffusion/digits.png"
	@echo "the whole story:    $(DEMO)/latent_diffusion/report.html"

test-local: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

test-faults: setup
	$(BIN)/python -m pytest -m faults tests/faults

test-cluster: setup
	$(BIN)/python -m pytest -m cluster tests/cluster

.s3/installed: requirements-s3.txt
	$(PYTHON) -m venv .s3
	.s3/bin/pip install --quiet --disable-pip-version-check -r requirements-s3.txt
	@touch $@

s3-server: .s3/installed
	.s3/bin/python tests/s3/server.py

test-s3: setup .s3/installed
	GMDIST_S3_PYTHON=.s3/bin/python $(BIN)/python -m pytest -m s3 tests/s3

test-slurm: setup
	tests/cluster/slurm/install.sh
	$(BIN)/python -m pytest -m slurm -rs tests/cluster/slurm

# That Slurm, to try things on: prints what reaches it.
slurm: setup
	tests/cluster/slurm/install.sh
	$(BIN)/python tests/cluster/slurm/nodes.py

test-gpu:
	GMDIST_TEST_DEVICE=cuda $(or $(wildcard $(BIN)/python),python3) -m pytest -m gpu -rs \
		tests/test_rng.py tests/families tests/train/test_engine.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# GPU machines may hold an older torch: all that is used of it has to be there. Its types are in every wheel, and the one
# for macOS is small and without CUDA; nothing of it is run.
.torch-oldest/installed: pyproject.toml
	rm -rf .torch-oldest
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .torch-oldest --only-binary=:all: \
		--platform macosx_11_0_arm64 --python-version 3.12 torch==$(OLDEST_TORCH)
	@touch $@

lint-oldest: setup .torch-oldest/installed
	MYPYPATH=.torch-oldest $(BIN)/mypy --python-version 3.12 --cache-dir .mypy_cache/oldest

bench: setup
	$(BIN)/python benchmarks/rng.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/ema.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/engine.py

.parity/installed: requirements-parity.txt .venv/installed
	rm -rf .parity
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .parity -r requirements-parity.txt
	@touch $@

parity: setup .parity/installed
	PYTHONPATH=.parity $(BIN)/python -m pytest -m parity tests/parity

# The peers of benchmarks/loader.py in an environment of their own.
.peers/installed: requirements-peers.txt
	$(PYTHON) -m venv .peers
	.peers/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	@touch $@

bench-loader: setup .s3/installed .peers/installed
	$(BIN)/python benchmarks/loader.py --peers .peers/bin/python --s3 .s3/bin/python

bench-diffusion: setup .parity/installed
	$(BIN)/python benchmarks/diffusion.py --peers .parity

# Twenty minutes: the digits' autoencoders, tokenizers and priors, trained and measured.
bench-autoencoders: setup .parity/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=.parity $(BIN)/python benchmarks/digits_autoencoders.py

# Twenty-five minutes: the digits' GANs, trained and measured.
bench-digits-gans: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/digits_gans.py

bench-sweep: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/sweep.py

bench-tokenizers: setup .parity/installed
	$(BIN)/python benchmarks/tokenizing.py --peers .parity

bench-gan: setup .parity/installed
	$(BIN)/python benchmarks/gan.py --peers .parity
