# make generate   installs into .venv and tells a story with the built-in model
# make test       installs into .venv and runs the tests
# make test-one-thread  those of the bits once more, with one thread
# make parity     the tests against transformers on torch, which live in .venv-oracle
# make test-oldest  the tests on the oldest jax that is supported
# make compile-gpu  compiles kernels and engine programs for an H200, an A100 and an L4, without one
# make clean      removes what the others made

PROMPT ?= Once upon a time
OLDEST_JAX := 0.11.2
ORACLE_TORCH := 2.13.0
WORKERS ?= 2
PIP := -m pip install --quiet --disable-pip-version-check
PYTEST_OPTIONS ?= -n $(WORKERS) --dist loadfile

.PHONY: generate test test-one-thread parity test-oldest compile-gpu clean
.SUFFIXES:
.DELETE_ON_ERROR:

generate: .venv/.installed
	@.venv/bin/jaxllm generate "$(PROMPT)"

test: .venv/.installed-test
	.venv/bin/python -m pytest tests --ignore=tests/parity -m "not simulator" $(PYTEST_OPTIONS)
	NPROC=16 .venv/bin/python -m pytest tests/kernels -m simulator $(PYTEST_OPTIONS)

test-one-thread: .venv/.installed-test
	NPROC=1 .venv/bin/python -m pytest tests/kernels/test_probe.py tests/kernels/test_tree.py tests/test_reproducible.py tests/test_shapes.py tests/test_proof.py $(PYTEST_OPTIONS)

parity: .venv/.installed-test .venv-oracle/.installed
	.venv/bin/python -m pytest tests/parity

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest tests --ignore=tests/parity -m "not simulator" $(PYTEST_OPTIONS)
	NPROC=16 .venv-oldest/bin/python -m pytest tests/kernels -m simulator $(PYTEST_OPTIONS)

compile-gpu: .venv-compile/.installed
	.venv-compile/bin/python tools/compile_gpu.py
	.venv-compile/bin/python tools/compile_gpu.py --card a100 --model-shape smollm2-135m
	.venv-compile/bin/python tools/compile_gpu.py --card l4 --kernels-only

clean:
	rm -rf .venv .venv-oldest .venv-compile .venv-oracle .jax_cache .pytest_cache .parity build jaxllm.egg-info

# An environment is made once; it is installed again when pyproject.toml is newer than its stamp.
.venv .venv-oldest .venv-compile:
	@echo "making $@"; python=$$(tools/find_python.sh) && "$$python" -m venv $@ || { rm -rf $@; exit 1; }

.venv/.installed: pyproject.toml | .venv
	@echo "installing jaxllm into .venv: one to three minutes, once"
	@.venv/bin/python $(PIP) -e .
	@touch $@

.venv/.installed-test: pyproject.toml | .venv
	@echo "installing jaxllm and its test tools into .venv: one to three minutes, once"
	@.venv/bin/python $(PIP) -e ".[test,train]"
	@touch .venv/.installed $@

.venv-oldest/.installed: pyproject.toml Makefile | .venv-oldest
	.venv-oldest/bin/python $(PIP) -e ".[test,train]" jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX)
	@touch $@

# The compiler for NVIDIA cards without its CUDA libraries: pinned to jax's own version, which pip cannot derive.
.venv-compile/.installed: pyproject.toml Makefile | .venv-compile
	.venv-compile/bin/python $(PIP) -e .
	version=$$(.venv-compile/bin/python -c "import importlib.metadata as m; print(m.version('jax'))") && \
	.venv-compile/bin/python $(PIP) --no-deps jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12
	@touch $@

# torch first and for the CPU alone, from the index at hand or else from its makers': nothing here may pull in CUDA.
# Python 3.11 where there is one, since that wheel is the one most often at hand.
.venv-oracle/.installed: tools/oracle/requirements.txt
	python=$$(tools/find_python.sh 11 11 2>/dev/null || tools/find_python.sh 10) && "$$python" -m venv .venv-oracle
	.venv-oracle/bin/python $(PIP) torch==$(ORACLE_TORCH)+cpu 2>/dev/null || \
	.venv-oracle/bin/python $(PIP) torch==$(ORACLE_TORCH) --index-url https://download.pytorch.org/whl/cpu
	.venv-oracle/bin/python $(PIP) -r tools/oracle/requirements.txt
	@touch $@
