# `make demo` and `make test` are all a newcomer needs; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SANITIZED := $(wildcard tests/native/test_matmul_*.py tests/nn/test_packed_*.py) tests/native/test_weight_extras.py \
  tests/native/test_add_packed.py tests/native/test_amx.py tests/ops/test_matmul.py tests/ops/test_complex_matmul.py \
  tests/ops/test_packed_layers.py tests/ops/test_eager_linear.py tests/test_io.py
SANITIZED_BOUNDS := $(wildcard tests/ops/test_interval*.py tests/interval/test_*.py tests/ops/test_sampl*.py tests/ops/test_grid*.py) \
  tests/ops/test_votes.py tests/ops/test_dense_product.py tests/ops/test_tensor_view.py tests/ops/test_masking.py \
  tests/native/test_normal.py tests/native/test_laplace.py
SANITIZERS := LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1
DATA ?=
OUT ?= demo-report

.PHONY: install demo test check test-slow sanitize sanitize-cuda bench wheel clean

install: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[test,demo,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/pyrobust demo --out $(OUT) $(if $(DATA),--data $(DATA))

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	sh tests/native/compile_cuda.sh

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# An installation of its own; -s, since a report that pytest captures is lost when a process ends.
sanitize: $(STAMP)
	$(BIN)/pip install -q --no-deps -e . -C build-dir=build/sanitize -C cmake.define.PYROBUST_SANITIZE=ON \
	  -C cmake.define.PYROBUST_CUDA_SHIM=OFF
	rm -f $(STAMP)
	$(SANITIZERS) $(BIN)/python -m pytest -s -m "slow or not slow" $(SANITIZED)
	$(SANITIZERS) $(BIN)/python -m pytest $(SANITIZED_BOUNDS)

# On a machine with a GPU: compute-sanitizer's four tools over tests/cuda.
sanitize-cuda: $(STAMP)
	PYTHON=$(BIN)/python sh tests/cuda/sanitize.sh

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only -q -s

wheel: $(STAMP)
	$(BIN)/pip wheel --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist
